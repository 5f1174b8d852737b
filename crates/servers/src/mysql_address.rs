//! Where a MySQL or MariaDB is, and databases in it for single tests.

use std::fmt;
use std::process::Command;

use crate::{Error, program, unique_name};

/// A server and who may do everything in it.
#[derive(Clone)]
pub struct MySqlAddress {
    url: String,
    user: String,
    password: String,
    host: String,
    port: u16,
}

impl MySqlAddress {
    /// Reads `mysql://USER:PASSWORD@HOST:PORT`; a database in it is not minded, options behind a `?` are kept.
    ///
    /// # Errors
    /// [`Error::Address`] if it is of another form.
    pub fn parse(url: &str) -> Result<MySqlAddress, Error> {
        let bad = |reason| Error::Address { reason };
        let rest = url.strip_prefix("mysql://").ok_or(bad("it does not begin with mysql://"))?;
        let (rest, _) = rest.split_once('?').unwrap_or((rest, ""));
        let (rest, _) = rest.split_once('/').unwrap_or((rest, ""));
        let (account, server) = rest.rsplit_once('@').ok_or(bad("it names no user"))?;
        let (user, password) = account.split_once(':').unwrap_or((account, ""));
        let (host, port) = server.rsplit_once(':').unwrap_or((server, "3306"));
        Ok(MySqlAddress {
            url: url.to_owned(),
            user: percent_decoded(user).ok_or(bad("the user's name is not valid percent-encoding"))?,
            password: percent_decoded(password).ok_or(bad("the password is not valid percent-encoding"))?,
            host: host.to_owned(),
            port: port.parse().map_err(|_| bad("the port is no number"))?,
        })
    }

    /// The address as it was given.
    pub fn url(&self) -> &str {
        &self.url
    }

    /// The address of one database.
    pub fn database_url(&self, database: &str) -> String {
        let (server, options) =
            self.url.split_once('?').map_or((&*self.url, None), |(url, rest)| (url, Some(rest)));
        let scheme = "mysql://".len();
        let end = server[scheme..].find('/').map_or(server.len(), |slash| scheme + slash);
        let options = options.map(|options| format!("?{options}")).unwrap_or_default();
        format!("{}/{database}{options}", &server[..end])
    }

    /// Creates an empty database with a name that nobody else has.
    ///
    /// # Errors
    /// As [`MySqlAddress::run`].
    pub fn database(&self) -> Result<Database, Error> {
        let name = unique_name();
        self.run(&format!("CREATE DATABASE {name}"))?;
        let url = self.database_url(&name);
        Ok(Database { address: self.clone(), name, url })
    }

    /// Executes statements as the user of the address, and returns the rows, one a line, columns apart by a tab, without
    /// headings. It starts the program `mariadb` for it: some ten milliseconds.
    ///
    /// # Errors
    /// [`Error::Command`] when the server cannot be reached or refuses; [`Error::Missing`] without a client.
    pub fn run(&self, statements: &str) -> Result<String, Error> {
        let client = program::mysql_client()?;
        let mut command = Command::new(client);
        // The password in the environment: arguments are for all to see.
        command.arg("--no-defaults").env("MYSQL_PWD", &self.password);
        command.args(["--host", &self.host, "--port", &self.port.to_string(), "--user", &self.user]);
        command.args(["--protocol=TCP", "--batch", "--skip-column-names", "--execute", statements]);
        let output = command.output().map_err(Error::io("start the client of MariaDB"))?;
        if output.status.success() {
            return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
        }
        let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
        Err(Error::Command { what: format!("execute {statements:?}"), status: output.status, stderr })
    }
}

impl fmt::Debug for MySqlAddress {
    /// Without the password.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let MySqlAddress { user, host, port, .. } = self;
        f.debug_struct("MySqlAddress")
            .field("user", user)
            .field("host", host)
            .field("port", port)
            .finish_non_exhaustive()
    }
}

/// A database for one test. It is dropped when this is.
pub struct Database {
    address: MySqlAddress,
    name: String,
    url: String,
}

impl Database {
    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Where it is: `mysql://USER:PASSWORD@HOST:PORT/NAME`.
    pub fn url(&self) -> &str {
        &self.url
    }

    /// The server in which it is.
    pub fn address(&self) -> &MySqlAddress {
        &self.address
    }
}

impl fmt::Debug for Database {
    /// Without the password.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Database")
            .field("name", &self.name)
            .field("address", &self.address)
            .finish_non_exhaustive()
    }
}

impl Drop for Database {
    fn drop(&mut self) {
        // Somebody may still hold a lock on a table, or the server may be gone: then it is left to its end.
        let _ =
            self.address.run(&format!("SET lock_wait_timeout = 1; DROP DATABASE IF EXISTS {}", self.name));
    }
}

fn percent_decoded(text: &str) -> Option<String> {
    let mut decoded = Vec::with_capacity(text.len());
    let mut bytes = text.bytes();
    while let Some(byte) = bytes.next() {
        if byte != b'%' {
            decoded.push(byte);
            continue;
        }
        let digit = |byte: u8| char::from(byte).to_digit(16);
        let (high, low) = (digit(bytes.next()?)?, digit(bytes.next()?)?);
        decoded.push(u8::try_from(high * 16 + low).ok()?);
    }
    String::from_utf8(decoded).ok()
}

#[cfg(test)]
mod tests {
    use super::MySqlAddress;
    use crate::Error;

    #[test]
    fn an_address_is_taken_apart_and_put_together() {
        let address =
            MySqlAddress::parse("mysql://root:p%40ss%3a@db.test:3307/old?require_ssl=true").unwrap();
        assert_eq!((&*address.user, &*address.password), ("root", "p@ss:"));
        assert_eq!((&*address.host, address.port), ("db.test", 3307));
        assert_eq!(address.database_url("new"), "mysql://root:p%40ss%3a@db.test:3307/new?require_ssl=true");
        let plain = MySqlAddress::parse("mysql://root:secret@127.0.0.1").unwrap();
        assert_eq!(plain.port, 3306);
        assert_eq!(plain.database_url("new"), "mysql://root:secret@127.0.0.1/new");
        assert!(!format!("{plain:?}").contains("secret"));
    }

    #[test]
    fn what_is_no_address_is_refused_without_showing_it() {
        for url in [
            "postgres://root:secret@host",
            "mysql://secret",
            "mysql://root:secret@host:x",
            "mysql://root:secret%4@h",
        ] {
            let error = MySqlAddress::parse(url).unwrap_err();
            assert!(matches!(error, Error::Address { .. }), "{error}");
            assert!(!error.to_string().contains("secret"), "{error}");
        }
    }
}

//! Making connections: where to, with which session settings, and how often after one that failed.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use ::mysql::consts::CapabilityFlags;
use ::mysql::prelude::Queryable;
use ::mysql::{ClientIdentity, Conn, Error as MysqlError, MySqlError, Opts, OptsBuilder, SslOpts};

use super::Settings;
use super::fault::Fault;
use crate::OpenError;

/// The oldest servers that know all that the statements use: `JSON_TABLE`, `SKIP LOCKED`, CHECK, aliases as here.
pub(super) const OLDEST_MYSQL: (u16, u16, u16) = (8, 0, 19);
pub(super) const OLDEST_MARIADB: (u16, u16, u16) = (10, 6, 0);

/// After a failed connection nobody tries again for so long, doubled with each failure in a row. Whoever asks meanwhile is
/// refused at once.
const RECONNECT_PAUSE_MIN: Duration = Duration::from_millis(50);
/// The longest such pause.
const RECONNECT_PAUSE_MAX: Duration = Duration::from_secs(1);

/// The server closes a connection that has said nothing for so long, even within a transaction: a host that vanished would
/// otherwise hold its locks until TCP notices. Longer than a connection is kept that has nothing to do.
const SERVER_IDLE_SECONDS: u32 = 90;

/// A statement's set is cut into several, so that none is much longer than this; or half of what the server takes in one packet, if
/// that is less.
const SET_BYTES: usize = 4 << 20;

/// How long a host that does not answer at all stays unnoticed on a connection that waits.
const KEEPALIVE_MILLIS: u32 = 10_000;

/// How long the server may take for one statement of a migration.
const MIGRATION_IO_TIMEOUT: Duration = Duration::from_secs(30 * 60);

/// Whose server it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Vendor {
    MySql,
    MariaDb,
}

/// What a connection is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Role {
    Write,
    Read,
}

/// Makes the connections to one database.
pub(super) struct Connector {
    opts: Opts,
    vendor: Vendor,
    lock_timeout_seconds: u64,
    set_bytes: usize,
    address: String,
    database: String,
    gate: Mutex<Gate>,
}

/// Why there is no connection now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct NoConnection {
    pub(super) fault: Fault,
    /// When it makes sense to try again.
    pub(super) retry_at: Instant,
}

/// Keeps a server that does not answer from being asked by every thread all the time.
#[derive(Default)]
struct Gate {
    failures: u32,
    closed: Option<NoConnection>,
}

impl Connector {
    /// Understands the settings, finds or creates the database, and gives a connection for its migrations.
    pub(super) fn new(settings: &Settings) -> Result<(Connector, Conn), OpenError> {
        let (opts, database) = parse(settings)?;
        let address = address_of(&opts);
        let at = Place { address: &address, database: &database };
        let mut conn = at.connect_or_create(OptsBuilder::from_opts(opts.clone()))?;
        let known: Option<(String, usize)> =
            conn.query_first("SELECT VERSION(), @@max_allowed_packet").map_err(|error| at.refused(&error))?;
        let (version, packet_bytes) = known.unwrap_or_default();
        let vendor = if version.contains("MariaDB") { Vendor::MariaDb } else { Vendor::MySql };
        let oldest = if vendor == Vendor::MariaDb { OLDEST_MARIADB } else { OLDEST_MYSQL };
        if numbers_of(&version) < oldest {
            return Err(OpenError::ServerTooOld { address, found: version });
        }
        warn_if_not_durable(&mut conn, &at);
        let connector = Connector {
            opts,
            vendor,
            lock_timeout_seconds: settings.lock_timeout.as_secs().max(1),
            set_bytes: SET_BYTES.min(packet_bytes / 2),
            address,
            database,
            gate: Mutex::default(),
        };
        run_script(&mut conn, &connector.session_settings(Role::Write))
            .map_err(|error| connector.refused(&error))?;
        Ok((connector, conn))
    }

    /// A connection whose statements may take long.
    pub(super) fn connect_for_migrations(&self) -> Result<Conn, OpenError> {
        let patient = OptsBuilder::from_opts(self.opts.clone()).read_timeout(Some(MIGRATION_IO_TIMEOUT));
        let made = Conn::new(patient).and_then(|mut conn| {
            run_script(&mut conn, &self.session_settings(Role::Write))?;
            Ok(conn)
        });
        made.map_err(|error| self.refused(&error))
    }

    /// The server's host and port, or its socket.
    pub(super) fn address(&self) -> &str {
        &self.address
    }

    /// The database's name on the server.
    pub(super) fn database(&self) -> &str {
        &self.database
    }

    /// How long the text of a set may become.
    pub(super) fn set_bytes(&self) -> usize {
        self.set_bytes
    }

    /// What a failed statement means while the database is being opened.
    pub(super) fn refused(&self, error: &MysqlError) -> OpenError {
        Place { address: &self.address, database: &self.database }.refused(error)
    }

    /// A new connection, with its session settings; refused at once for a while after one that failed.
    pub(super) fn connect(&self, role: Role) -> Result<Conn, NoConnection> {
        if let Some(closed) = self.gate().refusal(Instant::now()) {
            return Err(closed);
        }
        let made = Conn::new(self.opts.clone()).and_then(|mut conn| {
            run_script(&mut conn, &self.session_settings(role))?;
            Ok(conn)
        });
        let mut gate = self.gate();
        match made {
            Ok(conn) => {
                if gate.failures > 0 {
                    tracing::info!(address = self.address, database = self.database, "connected again");
                }
                *gate = Gate::default();
                Ok(conn)
            }
            Err(error) => {
                let fault = Fault::of(&error);
                if gate.failures == 0 {
                    tracing::warn!(address = self.address, database = self.database, ?fault, "no connection");
                }
                Err(gate.fail(fault, Instant::now(), fastrand::f64()))
            }
        }
    }

    /// No code that can panic runs under the lock, so a poisoned one still guards a whole state.
    fn gate(&self) -> MutexGuard<'_, Gate> {
        self.gate.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The statements that make a session what the rest of this module relies on.
    fn session_settings(&self, role: Role) -> String {
        // Keys first, and no join that reads a whole table beside a set: such a plan is the cheaper one for a small table, but
        // it locks rows that are none of its business.
        let plans = match self.vendor {
            Vendor::MariaDb => "join_cache_level = 0",
            Vendor::MySql => "optimizer_switch = 'block_nested_loop=off'",
        };
        let transactions = match role {
            Role::Write => "ISOLATION LEVEL READ COMMITTED",
            Role::Read => "ISOLATION LEVEL REPEATABLE READ, READ ONLY",
        };
        // The first statement of a transaction begins it, which spares a round trip.
        format!(
            "SET NAMES utf8mb4 COLLATE utf8mb4_bin; SET SESSION time_zone = '+00:00', \
             sql_mode = 'STRICT_ALL_TABLES,ERROR_FOR_DIVISION_BY_ZERO,NO_ENGINE_SUBSTITUTION', \
             innodb_lock_wait_timeout = {}, wait_timeout = {SERVER_IDLE_SECONDS}, max_seeks_for_key = 1, {plans}, \
             autocommit = 0; SET SESSION TRANSACTION {transactions}",
            self.lock_timeout_seconds,
        )
    }
}

/// Runs statements that are separated by semicolons, up to the first that fails.
pub(super) fn run_script(conn: &mut Conn, text: &str) -> Result<(), MysqlError> {
    let mut results = conn.query_iter(text)?;
    while let Some(result) = results.iter() {
        for row in result {
            row?;
        }
    }
    Ok(())
}

impl Gate {
    fn refusal(&self, now: Instant) -> Option<NoConnection> {
        self.closed.clone().filter(|closed| now < closed.retry_at)
    }

    /// `chance` is in 0..1: threads and replicas that failed together do not come back together.
    fn fail(&mut self, fault: Fault, now: Instant, chance: f64) -> NoConnection {
        let pause = RECONNECT_PAUSE_MIN.saturating_mul(1 << self.failures.min(16)).min(RECONNECT_PAUSE_MAX);
        self.failures = self.failures.saturating_add(1);
        let closed = NoConnection { fault, retry_at: now + pause.mul_f64(0.5 + chance / 2.0) };
        self.closed = Some(closed.clone());
        closed
    }
}

/// The numbers at the beginning of a version: `10.11.19-MariaDB-log`, `8.0.36`. What is missing is 0.
pub(super) fn numbers_of(version: &str) -> (u16, u16, u16) {
    let mut numbers = version.split(|c: char| !c.is_ascii_digit()).map(|part| part.parse().unwrap_or(0));
    let mut next = || numbers.next().unwrap_or(0);
    (next(), next(), next())
}

/// Understands the URL; says which database is meant.
pub(super) fn parse(settings: &Settings) -> Result<(Opts, String), OpenError> {
    let wrong = |problem: String| OpenError::Url { database: settings.name, problem };
    let (url, tls) = without_tls_option(&settings.url).map_err(wrong)?;
    let opts = Opts::from_url(&url).map_err(|error| wrong(error.to_string()))?;
    let database = match opts.get_db_name() {
        Some(name) => name.to_owned(),
        None => format!("saga_{}", settings.name),
    };
    let plain = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == '-';
    if !database.chars().all(plain) || database.len() > 64 {
        return Err(wrong(format!(
            "the database's name {database:?} is not of 1 to 64 letters, digits, _ and -"
        )));
    }
    let ssl = opts.get_ssl_opts().cloned().or_else(|| tls.then(SslOpts::default));
    ssl.as_ref().map_or(Ok(()), check_files).map_err(wrong)?;
    let builder = OptsBuilder::from_opts(opts)
        .db_name(Some(&database))
        .ssl_opts(ssl)
        // Only to a socket that is asked for: what listens at a local port may be a tunnel to elsewhere.
        .prefer_socket(false)
        .tcp_connect_timeout(Some(settings.connect_timeout))
        .read_timeout(Some(settings.io_timeout))
        .write_timeout(Some(settings.io_timeout))
        .tcp_keepalive_time_ms(Some(KEEPALIVE_MILLIS))
        // Statements are kept by whoever prepares them.
        .stmt_cache_size(0)
        // An UPDATE tells how many rows it found, as on SQLite, not how many it made different.
        .additional_capabilities(CapabilityFlags::CLIENT_FOUND_ROWS);
    Ok((builder.into(), database))
}

/// Whether the files that are named can be read. When a connection is made it is too late to say which of them cannot: that looks like a
/// server that does not answer, and is waited for.
fn check_files(ssl: &SslOpts) -> Result<(), String> {
    let identity = ssl.client_identity();
    let files = [
        ("root_cert_path", ssl.root_cert_path()),
        ("cert_chain_path", identity.map(ClientIdentity::cert_chain_path)),
        ("priv_key_path", identity.map(ClientIdentity::priv_key_path)),
    ];
    for (option, file) in files {
        let Some(file) = file else { continue };
        std::fs::read(file).map_err(|error| format!("{option} names {}: {error}", file.display()))?;
    }
    Ok(())
}

/// The server's host and port, or its socket.
pub(super) fn address_of(opts: &Opts) -> String {
    match opts.get_socket() {
        Some(socket) => socket.to_owned(),
        None => format!("{}:{}", opts.get_ip_or_hostname(), opts.get_tcp_port()),
    }
}

/// Takes the option `tls` out of the URL.
fn without_tls_option(url: &str) -> Result<(String, bool), String> {
    let Some((base, options)) = url.split_once('?') else { return Ok((url.to_owned(), false)) };
    let mut tls = false;
    let mut others = Vec::new();
    for option in options.split('&').filter(|option| !option.is_empty()) {
        match option {
            "tls=true" => tls = true,
            "tls=false" => tls = false,
            other if other.starts_with("tls=") => return Err("tls is neither true nor false".to_owned()),
            other => others.push(other),
        }
    }
    let others = others.join("&");
    Ok((if others.is_empty() { base.to_owned() } else { format!("{base}?{others}") }, tls))
}

/// Where a database is, for errors.
pub(super) struct Place<'a> {
    pub(super) address: &'a str,
    pub(super) database: &'a str,
}

impl Place<'_> {
    fn connect_or_create(&self, opts: OptsBuilder) -> Result<Conn, OpenError> {
        const UNKNOWN_DATABASE: u16 = 1049;
        match Conn::new(opts.clone()) {
            Err(MysqlError::MySqlError(MySqlError { code: UNKNOWN_DATABASE, .. })) => {}
            made => return made.map_err(|error| self.refused(&error)),
        }
        let mut conn = Conn::new(opts.db_name(None::<String>)).map_err(|error| self.refused(&error))?;
        // The name is of letters, digits, _ and - only.
        let create = format!(
            "CREATE DATABASE IF NOT EXISTS `{}` CHARACTER SET utf8mb4 COLLATE utf8mb4_bin",
            self.database
        );
        conn.query_drop(create).map_err(|error| self.refused(&error))?;
        conn.select_db(self.database).map_err(|error| self.refused(&error))?;
        tracing::info!(address = self.address, database = self.database, "database created");
        Ok(conn)
    }

    pub(super) fn refused(&self, error: &MysqlError) -> OpenError {
        let fault = Fault::of(error);
        let code = if let MysqlError::MySqlError(said) = error { said.code } else { 0 };
        let passing = !matches!(fault, Fault::Statement { .. } | Fault::Duplicate { .. });
        let advice = match (code, &fault) {
            (1045 | 1698, _) => {
                "check the user and the password in the URL, and from which hosts the user may connect"
            }
            (1044 | 1142 | 1227, _) => {
                "create the database by hand, or grant the user ALL on it (GRANT ALL ON `name`.* TO user)"
            }
            (1040 | 1203 | 1226, _) => {
                "raise max_connections of the server, or have fewer replicas or fewer connections each"
            }
            (1290 | 1836, _) => "the server is read-only: name the primary in the URL",
            (_, Fault::Lost { .. }) => {
                "check that the server runs and that the host, the port and the TLS options in the URL are right"
            }
            _ => "see the log of the server",
        };
        let database = format!("{} on {}", self.database, self.address);
        let problem = match (error, fault) {
            // It holds host and port, and no more.
            (MysqlError::DriverError(error), _) => error.to_string(),
            (_, Fault::Lost { why, .. }) => why,
            (MysqlError::MySqlError(MySqlError { code, message, .. }), _) => {
                format!("{message} (code {code})")
            }
            (_, fault) => format!("{fault:?}"),
        };
        OpenError::Server { database, problem, advice, passing }
    }
}

/// A server that does not write each commit to its disk loses purchases that were accepted when its machine loses power. That
/// may be wanted, but not without being told.
fn warn_if_not_durable(conn: &mut Conn, at: &Place<'_>) {
    let settings: Result<Option<(u64, u64, u64)>, _> =
        conn.query_first("SELECT @@innodb_flush_log_at_trx_commit, @@log_bin, @@sync_binlog");
    match settings {
        Ok(Some((1, log_bin, sync_binlog))) if log_bin == 0 || sync_binlog == 1 => {}
        Ok(Some((flush, log_bin, sync_binlog))) => tracing::warn!(
            address = at.address,
            innodb_flush_log_at_trx_commit = flush,
            log_bin,
            sync_binlog,
            "the server may lose what it has committed when its machine fails; set innodb_flush_log_at_trx_commit=1 and sync_binlog=1"
        ),
        Ok(None) | Err(_) => {
            tracing::debug!(address = at.address, "the server does not say how durable it is")
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings(url: &str) -> Settings {
        Settings::new(url, "order")
    }

    #[test]
    fn a_url_says_where_the_database_is() {
        let (opts, database) = parse(&settings("mysql://u:p%40ss@h:33/shop?tls=true")).expect("a good URL");
        assert_eq!((opts.get_user(), opts.get_pass()), (Some("u"), Some("p@ss")));
        assert_eq!((database.as_str(), opts.get_tcp_port()), ("shop", 33));
        assert!(opts.get_ssl_opts().is_some() && !opts.get_prefer_socket());
        let (opts, database) = parse(&settings("mysql://u@h")).expect("a good URL");
        assert_eq!(database, "saga_order");
        assert!(opts.get_ssl_opts().is_none());
    }

    #[test]
    fn versions_are_compared_by_their_numbers() {
        assert_eq!(numbers_of("10.11.19-MariaDB-0+deb12u1"), (10, 11, 19));
        assert_eq!(numbers_of("8.4-log"), (8, 4, 0));
        assert!(numbers_of("8.0.4") < OLDEST_MYSQL && numbers_of("9.1.0") >= OLDEST_MYSQL);
        assert!(numbers_of("?") < OLDEST_MYSQL);
    }

    #[test]
    fn what_is_wrong_with_a_url_is_said_without_its_password() {
        for url in [
            "mysql://u:secret@h:port",
            "postgres://u:secret@h",
            "mysql://u:secret@h/a`b",
            "mysql://u:secret@h?tls=maybe",
            "mysql://u:secret@h?no=such",
            "secret",
        ] {
            let wrong = parse(&settings(url)).err().map(|error| error.to_string());
            let told = wrong.unwrap_or_else(|| panic!("{url} was taken"));
            assert!(!told.contains("secret"), "{told}");
        }
        assert!(!format!("{:?}", settings("mysql://u:secret@h")).contains("secret"));
    }

    #[test]
    fn a_file_that_cannot_be_read_is_named() {
        let there = env!("CARGO_MANIFEST_PATH");
        let problem = |options: String| match parse(&settings(&format!("mysql://u@h/d?{options}"))).err() {
            Some(OpenError::Url { problem, .. }) => Some(problem),
            None => None,
            Some(other) => panic!("{other}"),
        };
        assert_eq!(problem(format!("root_cert_path={there}")), None);
        assert_eq!(problem(format!("cert_chain_path={there}&priv_key_path={there}")), None);
        for (options, option) in [
            ("root_cert_path=/no/such.pem".to_owned(), "root_cert_path"),
            (format!("cert_chain_path=/no/such.pem&priv_key_path={there}"), "cert_chain_path"),
            (format!("cert_chain_path={there}&priv_key_path=/no/such.pem"), "priv_key_path"),
        ] {
            let told = problem(options).expect("it cannot be read");
            assert!(told.contains(&format!("{option} names /no/such.pem: No such file")), "{told}");
        }
    }

    #[test]
    fn after_a_failure_nobody_asks_for_a_while_that_grows_to_its_bound() {
        let now = Instant::now();
        let mut gate = Gate::default();
        let fault = || Fault::Full;
        assert_eq!(gate.refusal(now), None);
        let first = gate.fail(fault(), now, 1.0);
        assert_eq!(first.retry_at, now + RECONNECT_PAUSE_MIN);
        assert_eq!(gate.refusal(now), Some(first.clone()));
        assert_eq!(gate.refusal(first.retry_at), None);
        for _ in 0..40 {
            gate.fail(fault(), now, 1.0);
        }
        assert_eq!(gate.fail(fault(), now, 1.0).retry_at, now + RECONNECT_PAUSE_MAX);
        assert_eq!(gate.fail(fault(), now, 0.0).retry_at, now + RECONNECT_PAUSE_MAX / 2);
    }
}

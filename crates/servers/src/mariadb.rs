//! A MariaDB.

use std::fs::{self, File};
use std::io::Read;
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;
use std::{env, io};

use crate::port::{self, Port};
use crate::process::Process;
use crate::program::MariaDbPrograms;
use crate::{Database, Error, MySqlAddress, program, random};

/// How long a start may take: recovery after a kill, on a busy machine.
const START_LIMIT: Duration = Duration::from_secs(60);
/// How long a connection and its greeting may take before it is tried again.
const GREETING_LIMIT: Duration = Duration::from_secs(1);
/// The version of the protocol with which a greeting begins; an error begins with another byte.
const PROTOCOL: u8 = 10;

/// Its settings: as safe as in production, as small and quick to start as that allows. Later ones win.
const SETTINGS: &[&str] = &[
    "--innodb-flush-log-at-trx-commit=1",
    "--innodb-buffer-pool-size=128M",
    "--innodb-log-file-size=64M",
    "--innodb-buffer-pool-dump-at-shutdown=OFF",
    "--innodb-buffer-pool-load-at-startup=OFF",
    "--skip-log-bin",
    "--skip-name-resolve",
    "--max-connections=1000",
    "--performance-schema=OFF",
    "--character-set-server=utf8mb4",
    "--bind-address=127.0.0.1",
];

/// A MariaDB on a free port of 127.0.0.1, with a data directory of its own. It is killed when this is dropped.
#[derive(Debug)]
pub struct MariaDb {
    process: Process,
    port: Port,
    address: MySqlAddress,
}

impl MariaDb {
    /// Starts one and waits until it answers.
    ///
    /// # Errors
    /// [`Error::Missing`] if it is not installed; others when it does not start.
    pub fn start() -> Result<MariaDb, Error> {
        MariaDb::start_with(&[])
    }

    /// Starts one with further settings, such as `--innodb-buffer-pool-size=1G`.
    ///
    /// # Errors
    /// As [`MariaDb::start`].
    pub fn start_with(settings: &[&str]) -> Result<MariaDb, Error> {
        let programs = program::mariadb()?;
        let template = template(&programs)?;
        port::without_clash(|| MariaDb::start_on(Port::take()?, &programs, &template, settings))
    }

    fn start_on(
        port: Port,
        programs: &MariaDbPrograms,
        template: &Path,
        settings: &[&str],
    ) -> Result<MariaDb, Error> {
        let mut process = Process::new("MariaDB", &programs.server)?;
        let path = |name| process.dir().join(name).display().to_string();
        let (data, init) = (path("data"), path("init.sql"));
        run("copy a data directory", Command::new("cp").arg("-R").args([template, Path::new(&data)]))?;
        let password = random::hex(16)?;
        fs::write(&init, accounts(&password)).map_err(Error::io(format!("write {init}")))?;
        let own = [
            format!("--datadir={data}"),
            format!("--socket={}", path("socket")),
            format!("--pid-file={}", path("pid")),
            format!("--init-file={init}"),
            format!("--port={}", port.number()),
        ];
        let mut args = vec!["--no-defaults".to_owned()];
        args.extend(user()?);
        args.extend(SETTINGS.iter().chain(settings).map(|&setting| setting.to_owned()));
        args.extend(own);
        process.set_args(args);
        let address = MySqlAddress::parse(&format!("mysql://root:{password}@127.0.0.1:{}", port.number()))?;
        let server = MariaDb { process, port, address };
        server.restart()?;
        Ok(server)
    }

    /// Where it is, and who may do everything in it.
    pub fn address(&self) -> &MySqlAddress {
        &self.address
    }

    /// `mysql://USER:PASSWORD@127.0.0.1:PORT`, of a user who may do everything.
    pub fn url(&self) -> &str {
        self.address.url()
    }

    /// Where it listens: what a [`Proxy`](crate::Proxy) wants to know.
    pub fn socket_addr(&self) -> SocketAddr {
        (Ipv4Addr::LOCALHOST, self.port.number()).into()
    }

    /// Creates an empty database for one test.
    ///
    /// # Errors
    /// As [`MySqlAddress::run`].
    pub fn database(&self) -> Result<Database, Error> {
        self.address.database()
    }

    /// Its process id, while it runs.
    pub fn pid(&self) -> Option<u32> {
        self.process.pid()
    }

    /// The end of its log.
    pub fn log(&self) -> String {
        self.process.log_end()
    }

    /// SIGKILL. Returns when it is gone.
    ///
    /// # Errors
    /// When the system does not let it.
    pub fn kill(&self) -> Result<(), Error> {
        self.process.kill()
    }

    /// SIGTERM. Returns when it is gone.
    ///
    /// # Errors
    /// When it does not end.
    pub fn stop(&self) -> Result<(), Error> {
        self.process.stop()
    }

    /// Starts it again, on the same port and the same data, and waits until it answers.
    ///
    /// # Errors
    /// [`Error::Running`] if it runs; others when it does not start.
    pub fn restart(&self) -> Result<(), Error> {
        self.process.start(START_LIMIT, || greets(self.socket_addr()).unwrap_or(false))
    }

    /// SIGSTOP: connections stay open, and nobody answers.
    ///
    /// # Errors
    /// [`Error::NotRunning`] if it does not run.
    pub fn pause(&self) -> Result<(), Error> {
        self.process.pause()
    }

    /// SIGCONT.
    ///
    /// # Errors
    /// [`Error::NotRunning`] if it does not run.
    pub fn resume(&self) -> Result<(), Error> {
        self.process.resume()
    }
}

/// Whether who listens there says hello as a MariaDB that lets clients in.
fn greets(address: SocketAddr) -> io::Result<bool> {
    let mut stream = TcpStream::connect_timeout(&address, GREETING_LIMIT)?;
    stream.set_read_timeout(Some(GREETING_LIMIT))?;
    // Three bytes of length, one of sequence, and the first of the packet.
    let mut head = [0; 5];
    stream.read_exact(&mut head)?;
    Ok(head[4] == PROTOCOL)
}

/// Executed at every start, before the first client is let in. With names not resolved, who comes by TCP is no `localhost`.
fn accounts(password: &str) -> String {
    format!(
        "ALTER USER root@localhost IDENTIFIED BY '{password}';\n\
         CREATE OR REPLACE USER root@'127.0.0.1' IDENTIFIED BY '{password}';\n\
         GRANT ALL ON *.* TO root@'127.0.0.1' WITH GRANT OPTION;\n"
    )
}

/// Root has to say that it means it.
fn user() -> Result<Option<String>, Error> {
    let this = fs::metadata("/proc/self").map_err(Error::io("read /proc/self"))?;
    Ok((this.uid() == 0).then(|| "--user=root".to_owned()))
}

/// An initialised data directory of this version, made once: that takes seconds, a copy a fraction of one.
///
/// It stays, in the build's directory, until that is cleaned. A second process waits for the first to have made it.
fn template(programs: &MariaDbPrograms) -> Result<PathBuf, Error> {
    let dir = build_dir().join(format!("mariadb-{}", programs.version));
    let (data, lock, done) = (dir.join("data"), dir.join("lock"), dir.join("done"));
    fs::create_dir_all(&dir).map_err(Error::io(format!("create {}", dir.display())))?;
    let locked = File::create(&lock).and_then(|file| file.lock().map(|()| file));
    // Given back when the file is closed.
    let _lock = locked.map_err(Error::io(format!("lock {}", lock.display())))?;
    if done.exists() {
        return Ok(data);
    }
    // Somebody may have died half-way.
    if data.exists() {
        fs::remove_dir_all(&data).map_err(Error::io(format!("remove {}", data.display())))?;
    }
    let mut install = Command::new(&programs.install_db);
    install.args(["--no-defaults", "--auth-root-authentication-method=normal", "--skip-test-db"]);
    install.args(user()?).arg("--innodb-log-file-size=64M").arg(format!("--datadir={}", data.display()));
    run("initialise a data directory of MariaDB", &mut install)?;
    fs::write(&done, "").map_err(Error::io(format!("write {}", done.display())))?;
    Ok(data)
}

/// The directory of the build that this program is from, or else the one for temporary files.
fn build_dir() -> PathBuf {
    let program = env::current_exe().unwrap_or_default();
    let found = program.ancestors().find(|dir| dir.join("CACHEDIR.TAG").is_file());
    found.map_or_else(|| env::temp_dir().join("sagaline-servers"), |dir| dir.join("servers"))
}

fn run(what: &str, command: &mut Command) -> Result<(), Error> {
    let output = command.output().map_err(Error::io(what))?;
    if output.status.success() {
        return Ok(());
    }
    let text = [output.stdout, output.stderr].concat();
    let stderr = String::from_utf8_lossy(&text).into_owned();
    Err(Error::Command { what: what.to_owned(), status: output.status, stderr })
}

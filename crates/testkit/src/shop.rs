//! A shop as a real process: started on free ports, watched, killed.

use std::fmt;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::{ExitStatus, Stdio};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::io::{AsyncBufReadExt, AsyncRead, BufReader};
use tokio::process::{Child, Command};
use tokio::task::JoinHandle;

use crate::checks::Books;
use crate::client::Client;
use crate::engines::Engines;
use crate::replicas::Replica;

/// How long a start may take, under a tracer or beside other tests, too.
const START_LIMIT: Duration = Duration::from_secs(30);
/// How long the start of many processes may take.
const START_LIMIT_OF_PROCESSES: Duration = Duration::from_secs(120);
/// The pause between two looks at readiness.
const READY_POLL: Duration = Duration::from_millis(5);
/// How long a killed process may take to be gone: it may have to finish a write to a slow disk.
const GONE_LIMIT: Duration = Duration::from_secs(30);
/// How long a process that was told to stop may take; it promises ten seconds itself.
const TERMINATE_LIMIT: Duration = Duration::from_secs(20);
/// How much of what it wrote is kept, in bytes; the oldest goes first.
const KEPT_OUTPUT_BYTES: usize = 8 * 1024 * 1024;
/// The banner is whole with the line that begins so.
const LAST_BANNER_LINE: &str = "  stop ";

/// How to start a shop.
#[derive(Clone, Debug)]
pub struct Options {
    /// The binary `saga`.
    pub binary: PathBuf,
    /// Its data directory.
    pub data_dir: PathBuf,
    /// Further arguments. The addresses are given already: both on 127.0.0.1, free ports.
    pub args: Vec<String>,
    /// Further variables of its environment. It inherits none that begins with `SAGA_`.
    pub env: Vec<(String, String)>,
    /// A command to start it with, such as a tracer. It must become the shop in the end, under the same process id (`strace`
    /// does with `-D`), or signals would go to the wrong one.
    pub wrapper: Vec<String>,
    /// Where its databases are.
    pub books: Books,
    /// How long its start may take.
    pub start_limit: Duration,
}

impl Options {
    /// Nothing beyond what must be.
    pub fn new(binary: impl Into<PathBuf>, data_dir: impl Into<PathBuf>) -> Options {
        let data_dir = data_dir.into();
        Options {
            binary: binary.into(),
            books: Books::Files(data_dir.clone()),
            data_dir,
            args: Vec::new(),
            env: Vec::new(),
            wrapper: Vec::new(),
            start_limit: START_LIMIT,
        }
    }

    /// The same on servers: all services in one process, or `processes` of each, kept alive by a supervisor.
    pub fn on(mut self, engines: &Engines, processes: usize) -> Options {
        self.books = engines.books();
        self.env.extend(engines.variables());
        if processes > 0 {
            self.args.extend(["--processes".to_owned(), processes.to_string()]);
        }
        self.start_limit = START_LIMIT_OF_PROCESSES;
        self
    }

    /// The same with one more argument.
    pub fn arg(mut self, arg: impl Into<String>) -> Options {
        self.args.push(arg.into());
        self
    }

    /// The same with one more variable in its environment.
    pub fn env(mut self, name: impl Into<String>, value: impl Into<String>) -> Options {
        self.env.push((name.into(), value.into()));
        self
    }

    fn command(&self) -> Command {
        let mut words = self.wrapper.iter().map(AsRef::as_ref).chain([self.binary.as_os_str()]);
        let mut command = Command::new(words.next().unwrap_or_default());
        command.args(words);
        command.args(["--listen", "127.0.0.1:0", "--admin-listen", "127.0.0.1:0", "--data-dir"]);
        command.arg(&self.data_dir).args(&self.args);
        for (name, _) in std::env::vars_os() {
            if name.to_string_lossy().starts_with("SAGA_") {
                command.env_remove(name);
            }
        }
        // The end of a log is what a test shows: a panic's message should be in it.
        command.env("RUST_BACKTRACE", "0");
        command.envs(self.env.iter().map(|(name, value)| (name, value)));
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).kill_on_drop(true);
        command
    }
}

/// Why there is no shop. What `unwrap` shows of it can be read.
#[derive(thiserror::Error)]
pub enum StartFailed {
    /// The process cannot be started.
    #[error("cannot start {program}: {source}")]
    Spawn {
        /// What was to be started.
        program: String,
        /// Why not.
        source: std::io::Error,
    },
    /// It ended before it was ready.
    #[error("it ended before it was ready, {status}:\n{stderr}")]
    Ended {
        /// How.
        status: ExitStatus,
        /// What it wrote to standard error.
        stderr: String,
    },
    /// It was not ready in time, and was killed.
    #[error("it was not ready within {limit:?}:\n{stderr}")]
    NotReady {
        /// The limit.
        limit: Duration,
        /// What it wrote to standard error.
        stderr: String,
    },
    /// Its banner does not name an address.
    #[error("no address in the line {line:?} of its banner:\n{banner}")]
    Banner {
        /// The line that was looked for.
        line: &'static str,
        /// The whole banner.
        banner: String,
    },
}

impl fmt::Debug for StartFailed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let text = self.to_string();
        let (what, log) = text.split_once('\n').unwrap_or((&text, ""));
        write!(f, "{what}\n{}", crate::tail(log))
    }
}

/// A running shop. It is killed when this is dropped.
#[derive(Debug)]
pub struct Shop {
    process: Process,
    pid: u32,
    client: Client,
    admin: Client,
    banner: String,
    took: Duration,
    stdout: Output,
    stderr: Output,
}

impl Shop {
    /// Starts a shop and waits until it says that it is ready.
    ///
    /// # Errors
    /// [`StartFailed`]; then no process is left.
    pub async fn start(options: Options) -> Result<Shop, StartFailed> {
        let begun = Instant::now();
        let mut command = options.command();
        let spawned = command.spawn().map_err(|source| StartFailed::Spawn {
            program: command.as_std().get_program().to_string_lossy().into_owned(),
            source,
        });
        let mut process = Process(spawned?);
        let stdout = Output::follow(process.0.stdout.take());
        let stderr = Output::follow(process.0.stderr.take());
        let ready = async {
            process.wait_for_banner(&stdout).await?;
            let banner = stdout.text();
            let client = Client::new(address(&banner, "shop API")?);
            let admin = Client::new(address(&banner, "ready")?);
            process.wait_for_readiness(&admin).await?;
            Ok((banner, client, admin))
        };
        let ready = tokio::time::timeout(options.start_limit, ready).await;
        match ready {
            Ok(Ok((banner, client, admin))) => {
                let pid = process.0.id().unwrap_or_default();
                Ok(Shop { process, pid, client, admin, banner, took: begun.elapsed(), stdout, stderr })
            }
            Ok(Err(NoStart::Ended(status))) => {
                Err(StartFailed::Ended { status, stderr: stderr.whole().await })
            }
            Ok(Err(NoStart::Banner(line))) => Err(StartFailed::Banner { line, banner: stdout.text() }),
            Err(_) => {
                drop(process);
                Err(StartFailed::NotReady { limit: options.start_limit, stderr: stderr.whole().await })
            }
        }
    }

    /// A client of its API.
    pub fn client(&self) -> Client {
        self.client.clone()
    }

    /// A client of its admin listener.
    pub fn admin(&self) -> Client {
        self.admin.clone()
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// The processes that it keeps alive, if it does.
    ///
    /// # Panics
    /// When it does not tell.
    pub async fn replicas(&self) -> Vec<Replica> {
        match self.admin.get("/replicas", None).await {
            Ok(answer) => Replica::all(&answer.json()),
            Err(error) => panic!("/replicas: {error}"),
        }
    }

    /// What it wrote to standard output until it was ready.
    pub fn banner(&self) -> &str {
        &self.banner
    }

    /// The time from its start until it was ready.
    pub fn ready_after(&self) -> Duration {
        self.took
    }

    /// What it has written to standard error so far: its log.
    pub fn stderr(&self) -> String {
        self.stderr.text()
    }

    /// What it has written to standard output so far.
    pub fn stdout(&self) -> String {
        self.stdout.text()
    }

    /// Whether it still runs.
    ///
    /// # Panics
    /// When the system does not tell.
    pub fn is_running(&mut self) -> bool {
        match self.process.0.try_wait() {
            Ok(status) => status.is_none(),
            Err(error) => panic!("cannot look after process {}: {error}", self.pid),
        }
    }

    /// Ends it as a power failure would end its process, and waits until it is gone.
    ///
    /// # Panics
    /// When it cannot be killed.
    pub async fn kill9(&mut self) -> ExitStatus {
        // One that is gone already needs no killing.
        let _ = self.process.0.start_kill();
        match self.wait_exit(GONE_LIMIT).await {
            Some(status) => status,
            None => panic!("process {} is still there {GONE_LIMIT:?} after SIGKILL", self.pid),
        }
    }

    /// Sends a signal, by its name without `SIG`.
    ///
    /// # Panics
    /// When it cannot be sent.
    pub async fn signal(&self, name: &str) {
        // The shell's own kill: a minimal system has no program of this name.
        let line = format!("kill -{name} {}", self.pid);
        let sent = Command::new("sh").args(["-c", &line]).status().await;
        assert!(sent.as_ref().is_ok_and(ExitStatus::success), "{line}: {sent:?}");
    }

    /// Tells it to stop, and waits until it has.
    ///
    /// # Panics
    /// When it has not stopped after twice the time that it promises.
    pub async fn terminate(&mut self) -> ExitStatus {
        self.signal("TERM").await;
        match self.wait_exit(TERMINATE_LIMIT).await {
            Some(status) => status,
            None => panic!("still there {TERMINATE_LIMIT:?} after SIGTERM:\n{}", self.stderr()),
        }
    }

    /// Waits until it has ended by itself; None when it has not within `limit`. What it wrote is then whole.
    ///
    /// # Panics
    /// When the system does not tell.
    pub async fn wait_exit(&mut self, limit: Duration) -> Option<ExitStatus> {
        let status = tokio::time::timeout(limit, self.process.0.wait()).await.ok()?;
        self.stdout.whole().await;
        self.stderr.whole().await;
        match status {
            Ok(status) => Some(status),
            Err(error) => panic!("cannot wait for process {}: {error}", self.pid),
        }
    }
}

/// A process that does not outlive its owner.
#[derive(Debug)]
struct Process(Child);

impl Process {
    async fn wait_for_banner(&mut self, stdout: &Output) -> Result<(), NoStart> {
        loop {
            if stdout.text().lines().any(|line| line.starts_with(LAST_BANNER_LINE)) {
                return Ok(());
            }
            self.check_alive()?;
            tokio::time::sleep(READY_POLL).await;
        }
    }

    async fn wait_for_readiness(&mut self, admin: &Client) -> Result<(), NoStart> {
        while !admin.get("/readyz", None).await.is_ok_and(|answer| answer.status == 200) {
            self.check_alive()?;
            tokio::time::sleep(READY_POLL).await;
        }
        Ok(())
    }

    fn check_alive(&mut self) -> Result<(), NoStart> {
        match self.0.try_wait() {
            Ok(Some(status)) => Err(NoStart::Ended(status)),
            _ => Ok(()),
        }
    }
}

impl Drop for Process {
    /// Waits until the process is gone, so that nobody finds its files or its lock in use.
    fn drop(&mut self) {
        let _ = self.0.start_kill();
        let deadline = Instant::now() + GONE_LIMIT;
        while matches!(self.0.try_wait(), Ok(None)) && Instant::now() < deadline {
            std::thread::park_timeout(READY_POLL);
        }
    }
}

impl Drop for Shop {
    /// A test that fails beside a running shop wants to know what the shop has to say.
    #[allow(clippy::print_stderr, reason = "it is for whoever reads the failed test's output")]
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("the end of the log of process {}:\n{}", self.pid, crate::tail(&self.stderr()));
        }
    }
}

enum NoStart {
    Ended(ExitStatus),
    Banner(&'static str),
}

/// `http://ADDRESS` of the banner's line that begins with this word.
fn address(banner: &str, line: &'static str) -> Result<String, NoStart> {
    let found = banner.lines().find(|text| text.trim_start().starts_with(line));
    let host = found.and_then(|text| text.split("http://").nth(1)?.split('/').next());
    let address = host.and_then(|host| host.trim().parse::<SocketAddr>().ok());
    address.map(|address| format!("http://{address}")).ok_or(NoStart::Banner(line))
}

/// What a process writes, kept while it is read.
#[derive(Debug)]
struct Output {
    text: Arc<Mutex<String>>,
    reader: Mutex<Option<JoinHandle<()>>>,
}

impl Output {
    fn follow(pipe: Option<impl AsyncRead + Send + Unpin + 'static>) -> Output {
        let text = Arc::new(Mutex::new(String::new()));
        let kept = Arc::clone(&text);
        let reader = pipe.map(|pipe| {
            tokio::spawn(async move {
                let mut lines = BufReader::new(pipe);
                let mut line = Vec::new();
                while lines.read_until(b'\n', &mut line).await.is_ok_and(|count| count > 0) {
                    keep(&mut lock(&kept), &String::from_utf8_lossy(&line));
                    line.clear();
                }
            })
        });
        Output { text, reader: Mutex::new(reader) }
    }

    fn text(&self) -> String {
        lock(&self.text).clone()
    }

    /// All of it: waits until the pipe is closed, which it is once the process has ended.
    async fn whole(&self) -> String {
        let reader = lock(&self.reader).take();
        if let Some(reader) = reader {
            // A child of the process may hold the pipe open for longer.
            let _ = tokio::time::timeout(Duration::from_secs(1), reader).await;
        }
        self.text()
    }
}

fn keep(text: &mut String, line: &str) {
    text.push_str(line);
    if text.len() > KEPT_OUTPUT_BYTES {
        let mut cut = text.len() - KEPT_OUTPUT_BYTES / 2;
        while !text.is_char_boundary(cut) {
            cut += 1;
        }
        text.drain(..cut);
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

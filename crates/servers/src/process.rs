//! One server's process: started, paused, killed, started again.

use std::ffi::OsString;
use std::fs::{self, File, OpenOptions};
use std::io::{Read, Seek, SeekFrom};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::nest::{Nest, Place};
use crate::{Error, wait};

/// How long a signal may take to have its effect, on a machine that is busy and with a slow disk.
const SIGNAL_LIMIT: Duration = Duration::from_secs(30);
/// How much of a log is shown, in bytes.
const SHOWN_LOG_BYTES: u64 = 2048;

/// Writes its group's number down, then becomes the server.
const REGISTERED: &str = r#"echo $$ > "$0" && exec "$@""#;

/// A server's process, running or not. It is killed, and its files are removed, when this is dropped.
#[derive(Debug)]
pub(crate) struct Process {
    name: String,
    program: PathBuf,
    args: Vec<OsString>,
    variables: Vec<(OsString, OsString)>,
    place: Place,
    child: Mutex<Option<Child>>,
}

impl Process {
    /// A process that does not run yet, with a directory that is empty yet.
    pub(crate) fn new(name: impl Into<String>, program: &Path) -> Result<Process, Error> {
        Ok(Process {
            name: name.into(),
            program: program.into(),
            args: Vec::new(),
            variables: Vec::new(),
            place: Nest::get()?.place()?,
            child: Mutex::new(None),
        })
    }

    /// What it is to be started with.
    pub(crate) fn set_args(&mut self, args: impl IntoIterator<Item = impl Into<OsString>>) {
        self.args = args.into_iter().map(Into::into).collect();
    }

    /// What its environment is to have beside this process's.
    pub(crate) fn set_variables(
        &mut self,
        variables: impl IntoIterator<Item = (impl Into<OsString>, impl Into<OsString>)>,
    ) {
        self.variables = variables.into_iter().map(|(name, value)| (name.into(), value.into())).collect();
    }

    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    /// Its working directory.
    pub(crate) fn dir(&self) -> &Path {
        &self.place.dir
    }

    /// Starts it, and waits until it is ready.
    ///
    /// # Errors
    /// [`Error::Running`] if it runs already; [`Error::Ended`] or [`Error::Late`], and then it does not run.
    pub(crate) fn start(&self, limit: Duration, ready: impl FnMut() -> bool) -> Result<(), Error> {
        self.spawn()?;
        self.wait_until("it is ready", limit, ready).inspect_err(|_| {
            // What could not be started must not be found running; the first error is the one to tell.
            let _ = self.kill();
        })
    }

    /// Starts it, and waits for nothing.
    pub(crate) fn spawn(&self) -> Result<(), Error> {
        let mut child = self.child();
        if child.is_some() {
            return Err(Error::Running { server: self.name.clone() });
        }
        let log = || OpenOptions::new().create(true).append(true).open(&self.place.log);
        let open = Error::io(format!("open {}", self.place.log.display()));
        let (stdout, stderr) = log().and_then(|stdout| Ok((stdout, log()?))).map_err(open)?;
        let mut command = Command::new("sh");
        command.args(["-c", REGISTERED]).arg(&self.place.group).arg(&self.program).args(&self.args);
        command.envs(self.variables.iter().map(|(name, value)| (name, value)));
        command.current_dir(&self.place.dir).process_group(0);
        command.stdin(Stdio::null()).stdout(stdout).stderr(stderr);
        *child = Some(command.spawn().map_err(Error::io(format!("start {}", self.name)))?);
        Ok(())
    }

    /// Waits for a condition that this server has to bring about.
    pub(crate) fn wait_until(
        &self,
        what: &str,
        limit: Duration,
        mut holds: impl FnMut() -> bool,
    ) -> Result<(), Error> {
        let held = wait::until(limit, || {
            let holds = holds();
            // Looked at last: if it is dead, then somebody else has answered.
            self.check_alive()?;
            Ok(holds)
        })?;
        if held {
            return Ok(());
        }
        Err(Error::Late { what: format!("{}: {what}", self.name), limit, log: self.log_end() })
    }

    /// Whether it runs (or is paused).
    pub(crate) fn is_running(&self) -> bool {
        self.check_alive().is_ok()
    }

    fn check_alive(&self) -> Result<(), Error> {
        let mut child = self.child();
        let Some(process) = &mut *child else {
            return Err(Error::NotRunning { server: self.name.clone() });
        };
        let status = process.try_wait().map_err(Error::io(format!("look after {}", self.name)))?;
        let Some(status) = status else { return Ok(()) };
        self.forget(&mut child);
        Err(Error::Ended { server: self.name.clone(), status, log: self.log_end() })
    }

    /// SIGKILL; returns when it is gone. One that does not run needs no killing.
    pub(crate) fn kill(&self) -> Result<(), Error> {
        self.end("KILL")
    }

    /// SIGTERM; returns when it is gone. One that does not run needs no stopping.
    pub(crate) fn stop(&self) -> Result<(), Error> {
        self.end("TERM")
    }

    fn end(&self, signal: &str) -> Result<(), Error> {
        let mut child = self.child();
        let Some(process) = &mut *child else { return Ok(()) };
        let look = || Error::io(format!("look after {}", self.name));
        if process.try_wait().map_err(look())?.is_none() {
            send(signal, process.id())?;
        }
        if !wait::until(SIGNAL_LIMIT, || Ok(process.try_wait().map_err(look())?.is_some()))? {
            return Err(Error::Late {
                what: format!("the end of {} by SIG{signal}", self.name),
                limit: SIGNAL_LIMIT,
                log: self.log_end(),
            });
        }
        self.forget(&mut child);
        Ok(())
    }

    /// Its number may soon be another's.
    fn forget(&self, child: &mut Option<Child>) {
        *child = None;
        let _ = fs::remove_file(&self.place.group);
    }

    /// SIGSTOP; returns when it stands still. Its connections stay open, and nobody answers.
    pub(crate) fn pause(&self) -> Result<(), Error> {
        self.signal_and_see("STOP", |state| state == "T")
    }

    /// SIGCONT; returns when it goes on.
    pub(crate) fn resume(&self) -> Result<(), Error> {
        self.signal_and_see("CONT", |state| state != "T")
    }

    fn signal_and_see(&self, signal: &str, seen: impl Fn(&str) -> bool) -> Result<(), Error> {
        let child = self.child();
        let Some(process) = &*child else {
            return Err(Error::NotRunning { server: self.name.clone() });
        };
        let pid = process.id();
        send(signal, pid)?;
        let path = format!("/proc/{pid}/stat");
        let held = wait::until(SIGNAL_LIMIT, || {
            let stat = fs::read_to_string(&path).map_err(Error::io(format!("read {path}")))?;
            // PID (NAME) STATE ...; the name may hold anything.
            let state = stat.rsplit(") ").next().and_then(|rest| rest.split(' ').next());
            Ok(state.is_some_and(&seen))
        })?;
        if held {
            return Ok(());
        }
        let what = format!("the effect of SIG{signal} on {}", self.name);
        Err(Error::Late { what, limit: SIGNAL_LIMIT, log: String::new() })
    }

    /// The process id, which is its group's number, too.
    pub(crate) fn pid(&self) -> Option<u32> {
        self.child().as_ref().map(Child::id)
    }

    /// The end of what it wrote to standard output and standard error.
    pub(crate) fn log_end(&self) -> String {
        let read = || {
            let mut file = File::open(&self.place.log)?;
            let length = file.metadata()?.len();
            file.seek(SeekFrom::Start(length.saturating_sub(SHOWN_LOG_BYTES)))?;
            let mut end = Vec::new();
            file.read_to_end(&mut end)?;
            Ok::<_, std::io::Error>(String::from_utf8_lossy(&end).into_owned())
        };
        read().unwrap_or_else(|error| format!("(no log: {error})"))
    }

    fn child(&self) -> MutexGuard<'_, Option<Child>> {
        self.child.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// To the whole group, by the shell's own kill: a minimal system has no program of this name.
fn send(signal: &str, group: u32) -> Result<(), Error> {
    let line = format!("kill -s {signal} -- -{group}");
    let output = Command::new("sh").args(["-c", &line]).output().map_err(Error::io("start sh"))?;
    if output.status.success() {
        return Ok(());
    }
    let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
    Err(Error::Command { what: line, status: output.status, stderr })
}

impl Drop for Process {
    /// A test that fails beside a server wants to know what the server has to say.
    #[allow(clippy::print_stderr, reason = "it is for whoever reads the failed test's output")]
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("the end of the log of {}:\n{}", self.name, self.log_end());
        }
        // What cannot be killed or removed here is left to the janitor.
        if self.kill().is_ok() {
            let _ = fs::remove_dir_all(&self.place.dir);
            let _ = fs::remove_file(&self.place.log);
        }
    }
}

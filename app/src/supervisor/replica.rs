//! One child process, kept alive: started, watched, started again when it dies, told to stop.
//!
//! A child lives as long as its standard input is open. The supervisor closes it to stop the child; if the supervisor itself
//! dies, however it dies, the system closes it. So no child is left behind, and no signal is needed.
//!
//! A child that an operator stops by SIGTERM is started again at once: that is how one is restarted. Only one that dies is waited for.

use std::collections::BTreeMap;
use std::io;
use std::path::PathBuf;
use std::process::{ExitStatus, Stdio};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use serde::Serialize;
use telemetry::logs::Format;
use tokio::process::{Child, Command};
use tokio::sync::mpsc;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::plan::{self, Place};
use super::probe::Probe;
use super::{FatalExit, log};
use crate::cli::SUPERVISED;

/// How often a child is asked that is not ready yet.
const ASK_UNREADY_EVERY: Duration = Duration::from_millis(50);
/// How often one is asked that was ready.
const ASK_READY_EVERY: Duration = Duration::from_millis(500);
/// A child that has lived so long has not died at its start.
const STEADY_AFTER: Duration = Duration::from_secs(30);

/// What is known of a child.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Status {
    /// Its process id; none while there is no process.
    pub pid: Option<u32>,
    /// Whether it is ready.
    pub ready: bool,
    /// Why it is not.
    pub reason: Option<String>,
    /// How often it was started again.
    pub restarts: u64,
}

/// A child, as others see it. Clones are of the same child.
#[derive(Clone)]
pub(super) struct Replica {
    /// Which one.
    pub place: Arc<Place>,
    status: Arc<Mutex<Status>>,
}

/// How children are started.
#[derive(Clone)]
pub(super) struct Launcher {
    /// This binary.
    pub program: PathBuf,
    /// How the log looks.
    pub format: Format,
    /// Asks them whether they are ready.
    pub probe: Probe,
    /// Hears of children that it is of no use to start again.
    pub fatal: mpsc::Sender<FatalExit>,
}

impl Replica {
    /// One that was not started yet.
    pub(super) fn new(place: Place) -> Replica {
        let status =
            Status { pid: None, ready: false, reason: Some("not started yet".to_owned()), restarts: 0 };
        Replica { place: Arc::new(place), status: Arc::new(Mutex::new(status)) }
    }

    /// What is known of it.
    pub(super) fn status(&self) -> Status {
        self.lock().clone()
    }

    fn lock(&self) -> MutexGuard<'_, Status> {
        self.status.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Keeps it alive until `stop`, then stops it. Tells whether it stopped in time.
    pub(super) async fn keep(
        self,
        launcher: Launcher,
        variables: BTreeMap<String, String>,
        stop: CancellationToken,
    ) -> bool {
        let mut deaths = 0;
        loop {
            let started = Instant::now();
            let end = match launcher.spawn(&self.place, &variables) {
                Ok(child) => match self.watch(child, &launcher, &stop).await {
                    Life::Stopped { in_time } => return in_time,
                    // Somebody has told it to stop, and it did so in order: a restart is what he wants.
                    Life::Ended(Ok(status)) if status.success() => None,
                    Life::Ended(Ok(status)) => {
                        if status.code() == Some(i32::from(crate::EXIT_USAGE)) {
                            let exit = FatalExit { name: self.place.name.clone(), status };
                            // Full: the supervisor stops already.
                            let _ = launcher.fatal.try_send(exit);
                        }
                        Some(status.to_string())
                    }
                    Life::Ended(Err(error)) => Some(format!("it cannot be waited for: {error}")),
                },
                Err(error) => Some(format!("it cannot be started: {error}")),
            };
            let (reason, pause) = match end {
                None => {
                    tracing::info!(replica = %self.place.name, "a process was told to stop; it is started again");
                    deaths = 0;
                    ("it was told to stop, and is started again".to_owned(), Duration::ZERO)
                }
                Some(end) => {
                    deaths = if started.elapsed() >= STEADY_AFTER { 1 } else { deaths + 1 };
                    let pause = plan::pause(deaths);
                    tracing::warn!(replica = %self.place.name, %end, ?pause, "a process has died; it is started again");
                    (format!("it has died: {end}"), pause)
                }
            };
            {
                let mut status = self.lock();
                let restarts = status.restarts + 1;
                *status = Status { pid: None, ready: false, reason: Some(reason), restarts };
            }
            tokio::select! {
                () = stop.cancelled() => return true,
                () = tokio::time::sleep(pause) => {}
            }
        }
    }

    async fn watch(&self, mut child: Child, launcher: &Launcher, stop: &CancellationToken) -> Life {
        let stdin = child.stdin.take();
        if let Some(stderr) = child.stderr.take() {
            let (name, format) = (self.place.name.clone(), launcher.format);
            tokio::spawn(async move { log::copy(&name, stderr, format).await });
        }
        self.lock().pid = child.id();
        tokio::select! {
            ended = child.wait() => return Life::Ended(ended),
            never = self.ask_again_and_again(&launcher.probe) => match never {},
            () = stop.cancelled() => {}
        }
        *self.lock() = Status { ready: false, reason: Some("stopping".to_owned()), ..self.status() };
        drop(stdin);
        let limit = plan::stop_within(self.place.service);
        let in_time = tokio::time::timeout(limit, child.wait()).await.is_ok();
        if !in_time {
            tracing::error!(replica = %self.place.name, ?limit, "a process did not stop in time; it is killed");
            // One that is gone by now needs no killing.
            let _ = child.kill().await;
        }
        Life::Stopped { in_time }
    }

    async fn ask_again_and_again(&self, probe: &Probe) -> std::convert::Infallible {
        loop {
            let answer = probe.ask(self.place.admin).await;
            let pause = if answer.is_ok() { ASK_READY_EVERY } else { ASK_UNREADY_EVERY };
            {
                let mut status = self.lock();
                status.ready = answer.is_ok();
                status.reason = answer.err();
            }
            tokio::time::sleep(pause).await;
        }
    }
}

/// How a child's life ended.
enum Life {
    /// By itself, or by somebody who is not the supervisor.
    Ended(io::Result<ExitStatus>),
    /// By the supervisor's word.
    Stopped { in_time: bool },
}

impl Launcher {
    fn spawn(&self, place: &Place, variables: &BTreeMap<String, String>) -> io::Result<Child> {
        let mut command = Command::new(&self.program);
        command.args(["run", place.service.name(), SUPERVISED]);
        // What this process was told is in `variables`, as far as it is for the child.
        let ours = std::env::vars_os().filter(|(name, _)| name.to_string_lossy().starts_with("SAGA_"));
        for (name, _) in ours.filter(|(name, _)| name != failpoint::VARIABLE) {
            command.env_remove(name);
        }
        command.envs(variables);
        // A group of its own: Ctrl-C is for the supervisor, which knows in which order to stop.
        command.process_group(0);
        command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::piped()).kill_on_drop(true);
        command.spawn()
    }
}

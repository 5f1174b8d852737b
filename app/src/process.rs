//! The life of a process that serves: it starts, says that it is ready, and stops when it is told to.
//!
//! What never happens: the banner before everything answers; an exit with 0 after something went wrong; a stop that takes
//! longer than [`STOP_DEADLINE`].

use std::io::{self, Read};
use std::time::{Duration, Instant};

use telemetry::logs::Format;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::oneshot;

use crate::assemble::{self, Hold, Running};
use crate::banner::{Banner, Demo, Layout};
use crate::config::Config;
use crate::config::layers::Loaded;
use crate::config::role::Role;
use crate::config::servers::Service;
use crate::lock::DataDir;
use crate::supervisor::Supervisor;
use crate::{Failure, print};

/// How long a stop may take, so that the process is gone within ten seconds of the signal.
pub(crate) const STOP_DEADLINE: Duration = Duration::from_millis(9_500);

/// The whole shop, in this process.
pub(crate) async fn up(config: &Config, data_dir: &DataDir) -> Result<(), Failure> {
    let begun = Instant::now();
    let mut end = End::listen(Hold::Alone)?;
    let Some(running) = started(assemble::up(config), &mut end).await? else { return Ok(()) };
    let demo = match (config.demo_data, running.seeded) {
        (false, _) => Demo::Off,
        (true, true) => Demo::Added,
        (true, false) => Demo::NotNeeded,
    };
    let banner = Banner {
        http: running.http_addr,
        admin: running.admin_addr,
        layout: Layout::of(config),
        data_dir: data_dir.path(),
        catalog_open: running.catalog_open,
        demo,
        took: begun.elapsed(),
    };
    print(banner.to_string().as_bytes())?;
    serve(running, &mut end).await
}

/// One replica of one service.
pub(crate) async fn run(config: &Config, service: Service, hold: Hold) -> Result<(), Failure> {
    let mut end = End::listen(hold)?;
    match started(assemble::run(config, service, hold), &mut end).await? {
        Some(running) => serve(running, &mut end).await,
        None => Ok(()),
    }
}

/// The whole shop, as processes that this one keeps alive.
pub(crate) async fn supervise(loaded: &Loaded, data_dir: &DataDir, format: Format) -> Result<(), Failure> {
    let begun = Instant::now();
    let config = &loaded.config;
    let mut end = End::listen(Hold::Alone)?;
    let mut supervisor = Supervisor::start(loaded, data_dir, format)?;
    let ready = tokio::select! {
        ready = supervisor.ready() => ready.map(|()| true),
        why = end.next() => {
            tracing::info!(why, "stopped before the shop was ready");
            Ok(false)
        }
    };
    let mut broken = None;
    match ready {
        Ok(false) => {}
        Ok(true) => {
            let banner = Banner {
                http: supervisor.http_addr,
                admin: supervisor.admin_addr,
                layout: Layout::of(config),
                data_dir: data_dir.path(),
                catalog_open: config.catalog_open(Role::Shop),
                demo: if config.demo_data { Demo::Wanted } else { Demo::Off },
                took: begun.elapsed(),
            };
            print(banner.to_string().as_bytes())?;
            tracing::info!(http = %banner.http, admin = %banner.admin, "ready");
            tokio::select! {
                error = supervisor.failed() => broken = Some(error),
                why = end.next() => tracing::info!(why, "stopping; a second signal stops at once"),
            }
        }
        Err(error) => broken = Some(error),
    }
    if let Some(error) = &broken {
        tracing::error!("stopping: {error}");
    }
    let stopped = tokio::select! {
        stopped = tokio::time::timeout(STOP_DEADLINE, supervisor.stop()) => stopped,
        _ = end.next() => return Err(Failure::CutShort),
    };
    if !stopped.unwrap_or(false) {
        return Err(Failure::StopTooSlow);
    }
    tracing::info!("stopped");
    broken.map_or(Ok(()), |error| Err(error.into()))
}

/// Starts, unless it is told to stop before it is ready.
async fn started(
    start: impl Future<Output = Result<Running, assemble::Error>>,
    end: &mut End,
) -> Result<Option<Running>, Failure> {
    tokio::select! {
        running = start => Ok(Some(running?)),
        why = end.next() => {
            tracing::info!(why, "stopped before it was ready");
            Ok(None)
        }
    }
}

async fn serve(mut running: Running, end: &mut End) -> Result<(), Failure> {
    tracing::info!(http = %running.http_addr, admin = %running.admin_addr, "ready");
    let broken = tokio::select! {
        error = running.failed() => Some(error),
        why = end.next() => {
            tracing::info!(why, "stopping; a second signal stops at once");
            None
        }
    };
    if let Some(error) = &broken {
        tracing::error!("stopping: {error}");
    }
    tokio::select! {
        stopped = tokio::time::timeout(STOP_DEADLINE, running.stop()) => {
            stopped.map_err(|_| Failure::StopTooSlow)?;
        }
        _ = end.next() => return Err(Failure::CutShort),
    }
    tracing::info!("stopped");
    broken.map_or(Ok(()), |error| Err(error.into()))
}

/// What tells a process to stop: SIGTERM, SIGINT, and to a supervised one the end of its standard input, which comes when its
/// supervisor wants it to or has died.
struct End {
    terminate: Signal,
    interrupt: Signal,
    supervisor: Option<oneshot::Receiver<()>>,
}

impl End {
    fn listen(hold: Hold) -> Result<End, Failure> {
        let listen = || {
            let (terminate, interrupt) = (SignalKind::terminate(), SignalKind::interrupt());
            let (terminate, interrupt) = (signal(terminate)?, signal(interrupt)?);
            let supervisor = match hold {
                Hold::Alone => None,
                Hold::WithSupervisor => Some(end_of_input()?),
            };
            Ok(End { terminate, interrupt, supervisor })
        };
        listen().map_err(Failure::Runtime)
    }

    /// What came next.
    async fn next(&mut self) -> &'static str {
        let supervisor = async {
            match &mut self.supervisor {
                Some(end) => drop(end.await),
                None => std::future::pending().await,
            }
        };
        let why = tokio::select! {
            _ = self.terminate.recv() => "SIGTERM",
            _ = self.interrupt.recv() => "SIGINT",
            () = supervisor => "the supervisor's word, or its end",
        };
        if why.starts_with("the supervisor") {
            // It ends once.
            self.supervisor = None;
        }
        why
    }
}

/// A thread that waits for the end of standard input. It ends with the process.
fn end_of_input() -> io::Result<oneshot::Receiver<()>> {
    let (ended, told) = oneshot::channel::<()>();
    let wait = move || {
        let (mut input, mut ignored) = (io::stdin().lock(), [0; 64]);
        while matches!(input.read(&mut ignored), Ok(1..)) {}
        drop(ended);
    };
    std::thread::Builder::new().name("standard input".to_owned()).spawn(wait)?;
    Ok(told)
}

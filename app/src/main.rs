//! `saga`: reads its settings, takes the data directory, starts the shop, and stops it when told to.
//!
//! This is the rim: arguments, environment, signals and exit codes are here and nowhere else. What never
//! happens: the banner before the shop answers; an exit with 0 after something went wrong; a stop that takes
//! longer than [`STOP_DEADLINE`].

mod assemble;
mod banner;
mod cli;
mod config;
mod lock;

use std::io::{self, Write};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use clap::{CommandFactory, Parser};
use mimalloc::MiMalloc;
use telemetry::logs;
use tokio::signal::unix::{Signal, SignalKind, signal};

use banner::{Banner, Demo};
use cli::{Cli, Command, ConfigCommand};
use config::layers::{self, Loaded, Source};
use config::{Config, LogFormat, show};
use lock::DataDir;

#[global_allocator]
static ALLOCATOR: MiMalloc = MiMalloc;

/// How long a stop may take, so that the process is gone within ten seconds of the signal.
const STOP_DEADLINE: Duration = Duration::from_millis(9_500);

const EXIT_FAILED: u8 = 1;
const EXIT_USAGE: u8 = 2;
const EXIT_IN_USE: u8 = 3;
const EXIT_CUT_SHORT: u8 = 130;

/// Why the process ends with anything but 0.
#[derive(Debug, thiserror::Error)]
enum Failure {
    #[error(transparent)]
    Config(#[from] layers::Error),
    #[error("log.filter ({from}): {cause}")]
    Log { from: Source, cause: logs::InitError },
    #[error(transparent)]
    DataDir(#[from] lock::Error),
    #[error(transparent)]
    Shop(#[from] assemble::Error),
    #[error("cannot start the runtime's threads or listen for signals: {0}")]
    Runtime(#[source] io::Error),
    #[error("cannot write to standard output: {0}")]
    Output(#[source] io::Error),
    #[error("a setting cannot be shown: {0}")]
    Show(#[from] serde_json::Error),
    #[error(transparent)]
    Load(#[from] load::Error),
    #[error("what was bought does not add up")]
    DoesNotAddUp,
    #[error("not everything ended within {STOP_DEADLINE:?}; the next start goes on from what is on disk")]
    StopTooSlow,
    #[error("a second signal cut the stop short; the next start goes on from what is on disk")]
    CutShort,
}

impl Failure {
    fn exit_code(&self) -> u8 {
        match self {
            Failure::Config(_) | Failure::Log { .. } => EXIT_USAGE,
            Failure::Load(error) if error.is_usage() => EXIT_USAGE,
            Failure::DataDir(lock::Error::InUse { .. }) => EXIT_IN_USE,
            Failure::CutShort => EXIT_CUT_SHORT,
            Failure::DataDir(_)
            | Failure::Shop(_)
            | Failure::Runtime(_)
            | Failure::Output(_)
            | Failure::Show(_)
            | Failure::Load(_)
            | Failure::DoesNotAddUp
            | Failure::StopTooSlow => EXIT_FAILED,
        }
    }

    /// To the log, or as plain text where there is none yet or it is switched off.
    fn report(&self) {
        if tracing::enabled!(tracing::Level::ERROR) {
            tracing::error!("{self}");
            return;
        }
        for line in self.to_string().lines() {
            // Nobody is left to be told.
            let _ = writeln!(io::stderr(), "saga: {line}");
        }
    }
}

fn main() -> ExitCode {
    match run(&Cli::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            failure.report();
            ExitCode::from(failure.exit_code())
        }
    }
}

fn run(cli: &Cli) -> Result<(), Failure> {
    match cli.command.as_ref().unwrap_or(&Command::Up) {
        Command::Completions { shell } => {
            let mut script = Vec::new();
            clap_complete::generate(*shell, &mut Cli::command(), "saga", &mut script);
            print(&script)
        }
        Command::Config(ConfigCommand::Show { json }) => show_settings(&load(cli)?, *json),
        Command::Load(options) => put_under_load(options),
        Command::Up => {
            let (loaded, data_dir) = prepare(cli)?;
            block_on(up(&loaded.config, &data_dir))
        }
        Command::Seed => {
            let (loaded, _data_dir) = prepare(cli)?;
            let added = block_on(async { Ok(assemble::seed(&loaded.config).await?) })?;
            let demo = if added { Demo::Added } else { Demo::NotNeeded };
            print(format!("demo data: {demo}\n").as_bytes())
        }
    }
}

fn load(cli: &Cli) -> Result<Loaded, Failure> {
    Ok(layers::load(cli.settings.config.as_deref(), std::env::vars_os(), cli.settings.given())?)
}

/// What everything that touches data needs first: settings, the log, and the right to the data directory.
fn prepare(cli: &Cli) -> Result<(Loaded, DataDir), Failure> {
    let loaded = load(cli)?;
    let log = &loaded.config.log;
    let format = match log.format {
        LogFormat::Auto => logs::Format::detect(),
        LogFormat::Human => logs::Format::Human,
        LogFormat::Json => logs::Format::Json,
    };
    logs::init(&log.filter, format)
        .map_err(|cause| Failure::Log { from: loaded.source("log.filter"), cause })?;
    let data_dir = DataDir::acquire(&loaded.config.data_dir)?;
    Ok((loaded, data_dir))
}

fn show_settings(loaded: &Loaded, json: bool) -> Result<(), Failure> {
    let settings = show::settings(loaded)?;
    let text = if json { serde_json::to_string_pretty(&settings)? + "\n" } else { show::table(&settings) };
    print(text.as_bytes())
}

fn put_under_load(options: &load::Options) -> Result<(), Failure> {
    let report = load::run(options)?;
    let text = if options.json { serde_json::to_string(&report)? + "\n" } else { report.to_string() };
    print(text.as_bytes())?;
    if report.passed() { Ok(()) } else { Err(Failure::DoesNotAddUp) }
}

/// A reader that has seen enough, such as `head`, is no failure.
fn print(text: &[u8]) -> Result<(), Failure> {
    let mut out = io::stdout().lock();
    match out.write_all(text).and_then(|()| out.flush()) {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => Err(Failure::Output(error)),
        _ => Ok(()),
    }
}

fn block_on<T>(work: impl Future<Output = Result<T, Failure>>) -> Result<T, Failure> {
    let runtime =
        tokio::runtime::Builder::new_multi_thread().enable_all().build().map_err(Failure::Runtime)?;
    let done = runtime.block_on(work);
    // What still runs on a blocking thread is a password being hashed, which nobody waits for any more.
    runtime.shutdown_background();
    done
}

async fn up(config: &Config, data_dir: &DataDir) -> Result<(), Failure> {
    let begun = Instant::now();
    let mut signals = Signals::listen().map_err(Failure::Runtime)?;
    let mut running = tokio::select! {
        running = assemble::up(config) => running?,
        name = signals.next() => {
            tracing::info!(signal = name, "stopped before the shop was ready");
            return Ok(());
        }
    };
    let demo = match (config.demo_data, running.seeded) {
        (false, _) => Demo::Off,
        (true, true) => Demo::Added,
        (true, false) => Demo::NotNeeded,
    };
    let banner = Banner {
        http: running.http_addr,
        admin: running.admin_addr,
        data_dir: data_dir.path(),
        catalog_open: running.catalog_open,
        demo,
        took: begun.elapsed(),
    };
    print(banner.to_string().as_bytes())?;
    tracing::info!(http = %banner.http, admin = %banner.admin, "ready");
    let broken = tokio::select! {
        error = running.failed() => Some(error),
        name = signals.next() => {
            tracing::info!(signal = name, "stopping; a second signal stops at once");
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
        _ = signals.next() => return Err(Failure::CutShort),
    }
    tracing::info!("stopped");
    broken.map_or(Ok(()), |error| Err(error.into()))
}

/// SIGTERM and SIGINT, from the moment of [`Signals::listen`] on.
struct Signals {
    terminate: Signal,
    interrupt: Signal,
}

impl Signals {
    fn listen() -> io::Result<Signals> {
        let (terminate, interrupt) = (SignalKind::terminate(), SignalKind::interrupt());
        Ok(Signals { terminate: signal(terminate)?, interrupt: signal(interrupt)? })
    }

    /// The next signal's name.
    async fn next(&mut self) -> &'static str {
        tokio::select! {
            _ = self.terminate.recv() => "SIGTERM",
            _ = self.interrupt.recv() => "SIGINT",
        }
    }
}

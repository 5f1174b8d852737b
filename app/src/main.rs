//! `saga`: reads its settings, does what it is told to, and says by its exit code how that went.
//!
//! This is the rim: arguments, environment and exit codes are here, signals in [`process`], and neither anywhere else.

mod assemble;
mod banner;
mod cli;
mod config;
mod doctor;
mod lock;
mod process;
mod supervisor;

use std::io::{self, Write};
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::process::ExitCode;

use allocator::Allocator;
use clap::{CommandFactory, Parser};
use serve::random::Random;
use telemetry::logs;
use telemetry::logs::Format;
use wire::time::Clock;

use assemble::Hold;
use banner::Demo;
use cli::{Cli, Command, ConfigCommand, KeysCommand};
use config::layers::{self, Loaded, Source};
use config::role::Role;
use config::{LogFormat, show};
use lock::DataDir;
pub(crate) use process::STOP_DEADLINE;

#[global_allocator]
static ALLOCATOR: Allocator = Allocator;

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
    #[error(transparent)]
    Supervisor(#[from] supervisor::Error),
    #[error("cannot start the runtime's threads or listen for signals: {0}")]
    Runtime(#[source] io::Error),
    #[error("cannot write to standard output: {0}")]
    Output(#[source] io::Error),
    #[error("a setting cannot be shown: {0}")]
    Show(#[from] serde_json::Error),
    #[error(transparent)]
    Load(#[from] load::Error),
    #[error(transparent)]
    Keys(#[from] account::KeyError),
    #[error("not ready: {0}")]
    NotReady(String),
    #[error("the shop would not run like this, or would lose data")]
    Unhealthy,
    #[error("what was bought does not add up, or has not ended")]
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
            | Failure::Supervisor(_)
            | Failure::Runtime(_)
            | Failure::Output(_)
            | Failure::Show(_)
            | Failure::Load(_)
            | Failure::Keys(_)
            | Failure::NotReady(_)
            | Failure::Unhealthy
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
            let prepared = prepare(cli, Role::Shop)?;
            let data_dir = DataDir::acquire(&prepared.loaded.config.data_dir)?;
            let Prepared { loaded, format } = &prepared;
            if loaded.config.processes > 0 {
                block_on(process::supervise(loaded, &data_dir, *format))
            } else {
                block_on(process::up(&loaded.config, &data_dir))
            }
        }
        Command::Run { service, supervised } => {
            let prepared = prepare(cli, Role::Replica(*service))?;
            let hold = if *supervised { Hold::WithSupervisor } else { Hold::Alone };
            block_on(process::run(&prepared.loaded.config, *service, hold))
        }
        Command::Health => block_on(ask_whether_ready(load(cli)?.config.admin_listen)),
        Command::Keys(KeysCommand::New) => {
            let dir = load(cli)?.config.key_dir();
            account::rotate_keys(&dir, &Clock::system(), &Random::secure())?;
            print(format!("a new signing key is in {}\n", dir.display()).as_bytes())
        }
        Command::Doctor { json } => examine(&load(cli)?, *json),
        Command::Seed => {
            let config = prepare(cli, Role::Seeder)?.loaded.config;
            let _data_dir = DataDir::acquire(&config.data_dir)?;
            let added = block_on(async { Ok(assemble::seed(&config).await?) })?;
            let demo = if added { Demo::Added } else { Demo::NotNeeded };
            print(format!("demo data: {demo}\n").as_bytes())
        }
    }
}

/// A process that listens everywhere is asked on the loopback address.
async fn ask_whether_ready(mut admin: SocketAddr) -> Result<(), Failure> {
    if admin.ip().is_unspecified() {
        admin.set_ip(match admin {
            SocketAddr::V4(_) => Ipv4Addr::LOCALHOST.into(),
            SocketAddr::V6(_) => Ipv6Addr::LOCALHOST.into(),
        });
    }
    supervisor::Probe::new().ask(admin).await.map_err(Failure::NotReady)
}

fn load(cli: &Cli) -> Result<Loaded, Failure> {
    Ok(layers::load(cli.settings.config.as_deref(), std::env::vars_os(), cli.settings.given())?)
}

/// Settings that are enough for what is to be done, and a log.
struct Prepared {
    loaded: Loaded,
    format: Format,
}

fn prepare(cli: &Cli, role: Role) -> Result<Prepared, Failure> {
    let loaded = load(cli)?;
    loaded.check_for(role)?;
    let log = &loaded.config.log;
    let format = match log.format {
        LogFormat::Auto => Format::detect(),
        LogFormat::Human => Format::Human,
        LogFormat::Json => Format::Json,
    };
    logs::init(&log.filter, format)
        .map_err(|cause| Failure::Log { from: loaded.source("log.filter"), cause })?;
    Ok(Prepared { loaded, format })
}

fn show_settings(loaded: &Loaded, json: bool) -> Result<(), Failure> {
    let settings = show::settings(loaded)?;
    let text = if json { serde_json::to_string_pretty(&settings)? + "\n" } else { show::table(&settings) };
    print(text.as_bytes())
}

fn examine(loaded: &Loaded, json: bool) -> Result<(), Failure> {
    let findings = block_on(async { Ok(doctor::examine(&loaded.config).await) })?;
    let text = if json { serde_json::to_string_pretty(&findings)? + "\n" } else { doctor::table(&findings) };
    print(text.as_bytes())?;
    if doctor::healthy(&findings) { Ok(()) } else { Err(Failure::Unhealthy) }
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

//! What is asked: files, servers, clocks. Nothing is changed but a file that is written and removed.

use std::io::Write;
use std::path::Path;

use db::Migration;
use wire::time::Clock;

use crate::assemble::engines::{SUBJECTS, bus_limits, mysql_settings, nats_settings, redis_settings};
use crate::config::Config;
use crate::config::servers::Service;

/// What is written to see whether the disk takes it, in bytes.
const TRIAL_BYTES: usize = 1024 * 1024;

/// All that was found.
pub(super) struct Facts {
    /// The data directory; None where the data is on servers and this machine keeps only keys.
    pub data_dir: Option<DataDir>,
    /// The database of each service for which there is one, with what is wrong with it or what it says.
    pub databases: Vec<(Service, Database)>,
    /// The broker; None where none is configured.
    pub nats: Option<Result<Broker, String>>,
    /// Each Redis node; None where none is configured.
    pub redis: Option<Result<Vec<(cache::redis::Inspection, Asked)>, String>>,
}

/// A data directory.
pub(super) struct DataDir {
    /// Where it is.
    pub path: String,
    /// Whether it is there.
    pub exists: bool,
    /// Whether it took a file, down to the disk.
    pub written: Result<(), String>,
}

/// The broker, and what the bus wants of it.
pub(super) struct Broker {
    /// Each server.
    pub servers: Vec<bus::nats::Inspection>,
    /// On how many servers each message is to be kept.
    pub replicas: usize,
    /// Whether streams are to be kept in files.
    pub in_files: bool,
    /// Bytes that all streams may take, on all servers together.
    pub streams_bytes: u64,
}

/// What was found of a database.
pub(super) enum Database {
    /// A file, and the numbers and names of the migrations that it has not; None where there is none yet.
    File(Result<Option<Vec<String>>, String>),
    /// A server's answer, and when it was asked.
    Server(Result<Box<(db::mysql::Inspection, Asked)>, String>),
}

/// Between which instants something was asked, by this machine's clock, in Unix milliseconds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Asked {
    /// Before.
    pub from: i64,
    /// Behind.
    pub to: i64,
}

/// The database of each service that has one, and its migrations.
const DATABASES: [(Service, &[Migration]); 5] = [
    (Service::Account, account::MIGRATIONS),
    (Service::Product, product::MIGRATIONS),
    (Service::Order, order::MIGRATIONS),
    (Service::Payment, payment::MIGRATIONS),
    (Service::Purchase, purchase::MIGRATIONS),
];

/// Asks everything that the settings name.
pub(super) async fn look(config: &Config) -> Facts {
    let embedded = !config.is_distributed();
    let clock = Clock::system();
    let mut databases = Vec::new();
    for (service, migrations) in DATABASES {
        // The settings of one service's replica name no database but its own.
        if embedded || config.mysql.of(service).is_some() {
            databases.push((service, look_at_database(config, service, migrations, &clock).await));
        }
    }
    Facts {
        data_dir: embedded.then(|| look_at_data_dir(&config.data_dir)),
        databases,
        nats: match &config.nats.url {
            None => None,
            Some(url) => Some(look_at_nats(config, url.expose()).await),
        },
        redis: match &config.redis.url {
            None => None,
            Some(url) => Some(look_at_redis(config, url.expose(), &clock).await),
        },
    }
}

async fn look_at_database(
    config: &Config,
    service: Service,
    migrations: &'static [Migration],
    clock: &Clock,
) -> Database {
    let name = service.name();
    let Some(place) = config.mysql.of(service) else {
        let path = config.data_dir.join(name).with_extension("db");
        let named = |migration: &&Migration| format!("{} ({})", migration.number, migration.name);
        let pending = db::Db::pending(&path, migrations).map_err(|error| error.to_string());
        return Database::File(pending.map(|all| all.map(|all| all.iter().map(named).collect())));
    };
    let settings = mysql_settings(&config.mysql, &place, name);
    let clock = clock.clone();
    let ask = move || {
        let from = now(&clock);
        let found = db::mysql::inspect(&settings, migrations).map_err(|error| error.to_string())?;
        Ok(Box::new((found, Asked { from, to: now(&clock) })))
    };
    let asked = tokio::task::spawn_blocking(ask).await;
    Database::Server(asked.unwrap_or_else(|panicked| Err(panicked.to_string())))
}

async fn look_at_nats(config: &Config, url: &str) -> Result<Broker, String> {
    let look = async || {
        let settings = nats_settings(&config.nats, url)?;
        Ok::<_, bus::nats::StartError>(Broker {
            streams_bytes: bus::nats::streams_bytes(&settings, &bus_limits(&config.bus), SUBJECTS)?,
            replicas: settings.replicas,
            in_files: settings.storage == bus::nats::Storage::File,
            servers: bus::nats::inspect(&settings).await?,
        })
    };
    look().await.map_err(|error| error.to_string())
}

async fn look_at_redis(
    config: &Config,
    url: &str,
    clock: &Clock,
) -> Result<Vec<(cache::redis::Inspection, Asked)>, String> {
    let settings = redis_settings(&config.redis, url).map_err(|error| error.to_string())?;
    let from = now(clock);
    let found = cache::redis::inspect(&settings).await;
    let asked = Asked { from, to: now(clock) };
    Ok(found.into_iter().map(|node| (node, asked)).collect())
}

fn look_at_data_dir(path: &Path) -> DataDir {
    // One that is not there yet is made at the first start, below the first folder that is there.
    let existing = path.ancestors().find(|folder| folder.is_dir()).unwrap_or(Path::new("."));
    DataDir {
        path: path.display().to_string(),
        exists: path.is_dir(),
        written: write_trial(existing).map_err(|error| error.to_string()),
    }
}

fn write_trial(folder: &Path) -> std::io::Result<()> {
    let path = folder.join(format!(".saga-doctor-{}", std::process::id()));
    let write = || {
        let mut file = std::fs::File::create_new(&path)?;
        file.write_all(&vec![0; TRIAL_BYTES])?;
        file.sync_all()
    };
    let written = write();
    // If it was not made, it need not be removed.
    let _ = std::fs::remove_file(&path);
    written
}

fn now(clock: &Clock) -> i64 {
    i64::try_from(clock.now()).unwrap_or(i64::MAX)
}

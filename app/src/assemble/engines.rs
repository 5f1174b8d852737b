//! What a process stands on: databases, the bus, Redis. Embedded or on servers, the services cannot tell.
//!
//! Servers may come later than the process, so it waits for them, and [`Progress`] says for what.

use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bus::{Bus, Subject};
use cache::Redis;
use db::{Db, Migration, OpenError};
use shop::purchase::{INVENTORY_COMMANDS, ORCHESTRATOR, ORDER_COMMANDS, PAYMENT_COMMANDS, PURCHASE_PROGRESS};

use super::health::{Engine, Health};
use super::{Error, Tasks};
use crate::config::servers::{Database, Service};
use crate::config::{Config, servers};

/// The pause before a server is tried again.
const TRY_AGAIN_AFTER: Duration = Duration::from_millis(500);

/// How long one attempt to connect with the broker may take, so that [`Progress`] says how it went.
const BROKER_ATTEMPT: Duration = Duration::from_secs(3);

/// Every queue that the shop has.
pub(crate) const SUBJECTS: &[Subject] =
    &[ORCHESTRATOR, INVENTORY_COMMANDS, ORDER_COMMANDS, PAYMENT_COMMANDS, PURCHASE_PROGRESS];

/// Opens what a process needs, and remembers it.
pub(super) struct Engines<'c> {
    config: &'c Config,
    progress: Progress,
    health: Health,
    open: Open,
}

/// What is to be closed in the end.
#[derive(Default)]
pub(super) struct Open {
    databases: Vec<Db>,
    bus: Option<Bus>,
}

impl<'c> Engines<'c> {
    /// Nothing is open yet.
    pub(super) fn new(config: &'c Config, progress: Progress, health: Health) -> Engines<'c> {
        Engines { config, progress, health, open: Open::default() }
    }

    /// A service's database, at its newest migration.
    ///
    /// # Errors
    /// What waiting would not heal.
    pub(super) async fn database(
        &mut self,
        service: Service,
        migrations: &'static [Migration],
        tasks: &Tasks,
    ) -> Result<Db, Error> {
        let name = service.name();
        let Some(place) = self.config.mysql.of(service) else {
            let path = self.config.data_dir.join(name).with_extension("db");
            let settings = db::Settings { readers: self.config.db.readers, ..db::Settings::new(path, name) };
            let db = Db::open(settings, migrations)?;
            self.open.databases.push(db.clone());
            return Ok(db);
        };
        let settings = mysql_settings(&self.config.mysql, &place, name);
        let connect = async || {
            let settings = settings.clone();
            let connected = tokio::task::spawn_blocking(move || Db::connect(settings, migrations)).await;
            connected.unwrap_or_else(|panicked| std::panic::resume_unwind(panicked.into_panic()))
        };
        let db = self.progress.wait_for(connect, OpenError::is_transient).await?;
        self.open.databases.push(db.clone());
        self.watch("database watch", Engine::Database(db.clone()), tasks);
        Ok(db)
    }

    /// The bus, of a process that takes from this queue, if it is one only.
    ///
    /// # Errors
    /// What waiting would not heal.
    pub(super) async fn bus(&mut self, takes: Option<Subject>, tasks: &Tasks) -> Result<Bus, Error> {
        let limits = bus_limits(&self.config.bus);
        let Some(url) = &self.config.nats.url else { return Ok(Bus::embedded(limits)) };
        let settings = bus::nats::Settings { near: takes, ..nats_settings(&self.config.nats, url.expose())? };
        let connect = async || Bus::nats(settings.clone(), limits, SUBJECTS).await;
        let bus = self.progress.wait_for(connect, may_pass).await?;
        self.open.bus = Some(bus.clone());
        self.watch("bus watch", Engine::Bus(bus.clone()), tasks);
        Ok(bus)
    }

    fn watch(&self, name: &'static str, engine: Engine, tasks: &Tasks) {
        tasks.spawn(name, self.health.clone().watch(engine, tasks.stop.clone()));
    }

    /// All that was opened.
    pub(super) fn into_open(self) -> Open {
        self.open
    }
}

impl Open {
    /// Leaves the bus, finishes what the databases have in hand.
    pub(super) async fn close(&self) {
        if let Some(bus) = &self.bus {
            bus.close().await;
        }
        for db in &self.databases {
            db.close().await;
        }
    }
}

/// How a service's database is reached.
pub(crate) fn mysql_settings(
    mysql: &servers::Mysql,
    place: &Database<'_>,
    name: &'static str,
) -> db::mysql::Settings {
    db::mysql::Settings {
        writers: mysql.writers,
        readers: mysql.readers,
        ..db::mysql::Settings::new(place.url(), name)
    }
}

/// What the bus holds.
pub(crate) fn bus_limits(bus: &crate::config::Bus) -> bus::Limits {
    bus::Limits {
        queue_envelopes: bus.queue_envelopes,
        parked_letters: bus.dead_letters,
        ..bus::Limits::default()
    }
}

/// How the broker is reached, and what it keeps.
///
/// # Errors
/// An address that is none.
pub(crate) fn nats_settings(
    nats: &servers::Nats,
    url: &str,
) -> Result<bus::nats::Settings, bus::nats::StartError> {
    let mut settings = bus::nats::Settings::from_urls(url)?;
    settings.prefix.clone_from(&nats.prefix);
    settings.storage = match nats.storage {
        servers::Storage::File => bus::nats::Storage::File,
        servers::Storage::Memory => bus::nats::Storage::Memory,
    };
    settings.replicas = nats.replicas;
    settings.letter_replicas = match nats.dead_letter_replicas {
        0 if settings.servers.len() >= 3 => nats.replicas.max(3),
        0 => nats.replicas,
        replicas => replicas,
    };
    if let Some(file) = &nats.credentials_file {
        settings.login = bus::nats::Login::Credentials(file.clone());
    }
    let identity = nats.client_certificate.clone().zip(nats.client_key.clone());
    if nats.root_certificates.is_some() || identity.is_some() {
        let identity = identity.map(|(certificate, key)| bus::nats::Identity { certificate, key });
        settings.tls = Some(bus::nats::Tls { authorities: nats.root_certificates.clone(), identity });
    }
    settings.queue_bytes = nats.queue_mib * 1024 * 1024;
    settings.ack_wait = Duration::from_secs(nats.ack_wait_seconds);
    settings.max_ack_pending = nats.max_ack_pending;
    settings.publishes_in_flight = nats.publishes_in_flight;
    settings.gathering.at_most = Duration::from_millis(nats.gather_ms);
    settings.start_timeout = BROKER_ATTEMPT;
    Ok(settings)
}

/// How Redis is reached.
///
/// # Errors
/// An address that is none.
pub(crate) fn redis_settings(
    redis: &servers::Redis,
    url: &str,
) -> Result<cache::redis::Settings, cache::redis::SettingsError> {
    let mut settings = cache::redis::Settings::parse(url)?;
    settings.prefix.clone_from(&redis.prefix);
    Ok(settings)
}

/// Begins to connect to Redis, if there is one.
///
/// # Errors
/// An address that is none.
pub(super) fn redis(config: &Config) -> Result<Option<Redis>, Error> {
    let Some(url) = &config.redis.url else { return Ok(None) };
    Ok(Some(Redis::connect(redis_settings(&config.redis, url.expose())?)))
}

/// Whether another attempt to reach the broker may go better.
fn may_pass(error: &bus::nats::StartError) -> bool {
    use bus::nats::StartError;
    // A stream cannot be made on three servers while one of them is away.
    matches!(error, StartError::Unreachable { .. } | StartError::Stream { .. })
}

/// How far a start is. Clones tell the same.
#[derive(Clone, Debug)]
pub(super) struct Progress(Arc<Mutex<Option<String>>>);

impl Progress {
    /// A start that has just begun.
    pub(super) fn new() -> Progress {
        Progress(Arc::new(Mutex::new(Some("starting".to_owned()))))
    }

    /// The start is over.
    pub(super) fn done(&self) {
        *self.lock() = None;
    }

    /// Whether the start is over.
    ///
    /// # Errors
    /// What it waits for, if it is not.
    pub(super) fn check(&self) -> Result<(), String> {
        self.lock().as_ref().map_or(Ok(()), |waits_for| Err(waits_for.clone()))
    }

    /// Tries until it succeeds, or fails for good. The log tells each reason once.
    pub(super) async fn wait_for<T, E: fmt::Display>(
        &self,
        attempt: impl AsyncFn() -> Result<T, E>,
        may_pass: impl Fn(&E) -> bool,
    ) -> Result<T, E> {
        loop {
            match attempt().await {
                Err(error) if may_pass(&error) => {
                    let reason = format!("waiting: {error}");
                    if self.lock().replace(reason.clone()).as_ref() != Some(&reason) {
                        tracing::warn!(%error, "waiting for a server");
                    }
                }
                done => {
                    self.lock().replace("starting".to_owned());
                    return done;
                }
            }
            tokio::time::sleep(TRY_AGAIN_AFTER).await;
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Option<String>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicU32, Ordering};

    #[tokio::test(start_paused = true)]
    async fn a_start_waits_for_what_may_come_and_says_so() {
        let (progress, tries) = (Progress::new(), AtomicU32::new(0));
        let attempt = async || {
            let tries = tries.fetch_add(1, Ordering::Relaxed);
            let told = progress.check();
            match tries {
                0 => assert_eq!(told, Err("starting".to_owned())),
                _ => assert_eq!(told, Err("waiting: connection refused".to_owned())),
            }
            if tries < 3 { Err("connection refused") } else { Ok(tries) }
        };
        assert_eq!(progress.wait_for(attempt, |_| true).await, Ok(3));
        assert_eq!(progress.check(), Err("starting".to_owned()));
        progress.done();
        assert_eq!(progress.check(), Ok(()));
        assert_eq!(progress.wait_for(async || Err::<(), _>("wrong"), |_| false).await, Err("wrong"));
    }

    #[test]
    fn dead_letters_are_kept_on_three_of_three_unless_told_otherwise() {
        let of = |replicas, dead_letter_replicas, url| {
            let nats = servers::Nats { replicas, dead_letter_replicas, ..servers::Nats::default() };
            let settings = nats_settings(&nats, url).unwrap();
            (settings.replicas, settings.letter_replicas)
        };
        let (one, three) = ("nats://a:1", "nats://a:1,nats://b:1,nats://c:1");
        assert_eq!((of(1, 0, one), of(1, 0, three), of(3, 0, three)), ((1, 1), (1, 3), (3, 3)));
        assert_eq!((of(5, 0, three), of(3, 1, three), of(1, 3, one)), ((5, 5), (3, 1), (1, 3)));
    }

    #[test]
    fn what_nobody_sets_is_what_the_bus_has_by_itself() {
        let own = bus::nats::Settings::from_urls("nats://a:1").unwrap();
        let own = bus::nats::Settings { start_timeout: BROKER_ATTEMPT, ..own };
        assert_eq!(nats_settings(&servers::Nats::default(), "nats://a:1"), Ok(own));
        assert_eq!(bus_limits(&crate::config::Bus::default()), bus::Limits::default());
    }

    #[test]
    fn what_is_set_reaches_the_bus() {
        let nats = servers::Nats {
            storage: servers::Storage::Memory,
            queue_mib: 2,
            ack_wait_seconds: 3,
            max_ack_pending: 4,
            publishes_in_flight: 5,
            gather_ms: 6,
            ..servers::Nats::default()
        };
        let settings = nats_settings(&nats, "nats://a:1").unwrap();
        assert_eq!(settings.storage, bus::nats::Storage::Memory);
        assert_eq!((settings.queue_bytes, settings.ack_wait), (2 * 1024 * 1024, Duration::from_secs(3)));
        assert_eq!((settings.max_ack_pending, settings.publishes_in_flight), (4, 5));
        assert_eq!(settings.gathering.at_most, Duration::from_millis(6));
        let limits = bus_limits(&crate::config::Bus { queue_envelopes: 7, dead_letters: 8 });
        assert_eq!((limits.queue_envelopes, limits.parked_letters), (7, 8));
    }

    #[test]
    fn files_of_certificates_protect_connections() {
        let named = |root: Option<&str>, certificate: Option<&str>| {
            let nats = servers::Nats {
                root_certificates: root.map(Into::into),
                client_certificate: certificate.map(Into::into),
                client_key: certificate.map(|_| "key.pem".into()),
                ..servers::Nats::default()
            };
            nats_settings(&nats, "nats://a:1").unwrap().tls
        };
        let identity = bus::nats::Identity { certificate: "own.pem".into(), key: "key.pem".into() };
        let tls = |authorities: Option<&str>, identity| {
            Some(bus::nats::Tls { authorities: authorities.map(Into::into), identity })
        };
        assert_eq!(named(None, None), None);
        assert_eq!(named(Some("ca.pem"), None), tls(Some("ca.pem"), None));
        assert_eq!(named(None, Some("own.pem")), tls(None, Some(identity.clone())));
        assert_eq!(named(Some("ca.pem"), Some("own.pem")), tls(Some("ca.pem"), Some(identity)));
    }
}

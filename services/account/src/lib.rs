//! The account service: who the customers are, and how they prove it.
//!
//! It owns customers, credentials, refresh-token families and the signing keys; nobody else reads their
//! tables. Other services verify access tokens for themselves, with the public keys of [`Account::keys`].
//!
//! What never happens:
//! - A password, a refresh token or a private key in a log line, an error message or a table; a table holds
//!   Argon2id hashes and SHA-256 hashes only.
//! - An answer about credentials from a cache: each login and each refresh reads the database.
//! - A login that tells, by its answer or its time, whether an e-mail address has an account.
//! - A spent refresh token that yields a pair, or that leaves its family alive.
//! - A customer without the refresh family of the sign-up that created it.

mod http;
mod keys;
mod limits;
mod model;
mod password;
mod store;
mod tokens;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use cache::{Fenced, Life, Redis};
use db::Db;
use db::ids::{Ids, IdsError};
use serde::{Deserialize, Serialize};
use serve::auth::{KeySet, Realm, Verifier};
use serve::random::Random;
use telemetry::Registry;
use tokio_util::sync::CancellationToken;
use wire::time::Clock;

pub use keys::{KeyError, PUBLISHED_FIRST, rotate_keys};
pub use limits::LoginLimits;
pub use password::PasswordLimits;

/// The schema of the service's database.
pub const MIGRATIONS: &[db::Migration] = &[
    db::Migration {
        number: 1,
        name: "account",
        sqlite: include_str!("../migrations/sqlite/0001_account.sql"),
        mysql: include_str!("../migrations/mysql/0001_account.sql"),
    },
    db::ids::migration(2),
    db::Migration {
        number: 3,
        name: "version",
        sqlite: include_str!("../migrations/sqlite/0003_version.sql"),
        mysql: include_str!("../migrations/mysql/0003_version.sql"),
    },
    cache::mark::migration(4),
];

/// How many rows one purge of expired tokens deletes at most, so that no write waits long behind it.
pub const PURGE_BATCH_ROWS: u32 = 500;

/// What may be set.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// How long an access token counts.
    pub access_token_seconds: u64,
    /// How long a refresh token may wait to be used.
    pub refresh_token_seconds: u64,
    /// The pause between two looks for expired refresh tokens.
    pub purge_interval_seconds: u64,
    /// The bounds of password hashing.
    pub passwords: PasswordLimits,
    /// How often a login may be tried.
    pub logins: LoginLimits,
}

impl Default for Config {
    fn default() -> Config {
        Config {
            access_token_seconds: 15 * 60,
            refresh_token_seconds: 30 * 24 * 3600,
            purge_interval_seconds: 60,
            passwords: PasswordLimits::default(),
            logins: LoginLimits::default(),
        }
    }
}

/// What the service is made of.
pub struct Parts {
    /// Its database, opened with [`MIGRATIONS`].
    pub db: Db,
    /// Where the replicas share copies of customers' data, if others work on the database, too. All of them must use the same,
    /// or none.
    pub redis: Option<Redis>,
    /// The time.
    pub clock: Clock,
    /// Where tokens and salts come from.
    pub random: Random,
    /// Counts logins and refreshes.
    pub registry: Registry,
    /// The folder of the signing keys, one for all replicas; it is created if it is missing.
    pub key_dir: PathBuf,
    /// Who the access tokens are issued by and for.
    pub realm: Realm,
    /// What may be set.
    pub config: Config,
}

/// Why the service does not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// No worker id for customers' ids could be leased, or the database failed otherwise.
    #[error("account: {0}")]
    Ids(#[from] IdsError),
    /// The signing keys could not be read or made.
    #[error(transparent)]
    Keys(#[from] KeyError),
    /// A value of the configuration is out of its range.
    #[error("account: {name} = {value}: {problem}")]
    Config {
        /// The setting.
        name: &'static str,
        /// Its value.
        value: u64,
        /// What is wrong with it.
        problem: &'static str,
    },
}

/// The service, ready to be reached through its door.
pub struct Account {
    service: Arc<http::Service>,
    key_dir: PathBuf,
    purge_interval: Duration,
}

/// Prepares the service: reads the signing keys, or makes the first one.
///
/// # Errors
/// See [`StartError`].
pub async fn start(parts: Parts) -> Result<Account, StartError> {
    let Parts { db, redis, clock, random, registry, key_dir, realm, config } = parts;
    config.check()?;
    let signing = keys::load_or_create(&key_dir, &clock, &random)?;
    let ids = Ids::lease(db.clone(), clock.clone()).await?;
    let copies = match db.is_shared() {
        true => Some(Fenced::new(Life::start(db.clone(), redis).await.map_err(IdsError::from)?, "customer")),
        false => None,
    };
    let service = http::Service {
        store: store::Store::new(db, copies),
        ids,
        verifier: Verifier::new(&signing.public_keys(), &realm, clock.clone()),
        issuer: tokens::Issuer::new(signing, realm, clock.clone(), random.clone(), &config),
        passwords: password::Passwords::new(&config.passwords, random),
        limiter: limits::Limiter::new(&config.logins, clock),
        metrics: http::Metrics::new(&registry),
    };
    let purge_interval = Duration::from_secs(config.purge_interval_seconds);
    Ok(Account { service: Arc::new(service), key_dir, purge_interval })
}

impl Config {
    fn check(&self) -> Result<(), StartError> {
        for (name, value) in [
            ("access_token_seconds", self.access_token_seconds),
            ("refresh_token_seconds", self.refresh_token_seconds),
            ("purge_interval_seconds", self.purge_interval_seconds),
        ] {
            if value == 0 {
                return Err(StartError::Config { name, value, problem: "must be at least 1" });
            }
        }
        Ok(())
    }
}

impl Account {
    /// Its HTTP routes, under their full paths.
    pub fn router(&self) -> Router {
        http::router(self.service.clone())
    }

    /// Verifies access tokens, for the services of this process.
    pub fn verifier(&self) -> Verifier {
        self.service.verifier.clone()
    }

    /// The public keys, as they are published for services elsewhere.
    pub fn keys(&self) -> KeySet {
        self.service.issuer.public_keys()
    }

    /// Deletes up to [`PURGE_BATCH_ROWS`] expired refresh tokens, and families that have none left. Returns
    /// how many rows went; fewer than the bound means that nothing expired is left.
    ///
    /// # Errors
    /// When the database fails; it may be tried again.
    pub async fn purge_expired(&self) -> Result<u64, db::Error> {
        self.service.store.purge(self.service.issuer.now_seconds(), PURGE_BATCH_ROWS).await
    }

    /// Purges what has expired and follows the folder of the signing keys, until `stop`.
    pub async fn run(self, stop: CancellationToken) {
        tokio::join!(self.purge(&stop), self.follow_keys(&stop));
    }

    async fn purge(&self, stop: &CancellationToken) {
        let mut pause = Duration::ZERO;
        loop {
            tokio::select! {
                biased;
                () = stop.cancelled() => return,
                () = tokio::time::sleep(pause) => {}
            }
            pause = match self.purge_expired().await {
                Ok(purged) if purged >= u64::from(PURGE_BATCH_ROWS) => Duration::ZERO,
                Ok(_) => self.purge_interval,
                Err(error) => {
                    tracing::warn!(%error, "expired refresh tokens could not be purged");
                    self.purge_interval
                }
            };
        }
    }

    async fn follow_keys(&self, stop: &CancellationToken) {
        let (keeper, mut complaint) = (self.service.verifier.keeper(), String::new());
        loop {
            tokio::select! {
                biased;
                () = stop.cancelled() => return,
                () = keeper.wanted() => {}
                () = tokio::time::sleep(keys::REREAD) => {}
            }
            let dir = self.key_dir.clone();
            let read = tokio::task::spawn_blocking(move || keys::load_existing(&dir)).await;
            let problem = match read {
                Ok(Ok(Some(keys))) => {
                    self.service.issuer.replace_keys(&keys);
                    keeper.replace(&keys.public_keys());
                    complaint.clear();
                    continue;
                }
                Ok(Ok(None)) => format!("{} holds no key", self.key_dir.display()),
                Ok(Err(error)) => error.to_string(),
                Err(error) => error.to_string(),
            };
            keeper.retain();
            // Once, not every few seconds.
            if complaint != problem {
                tracing::error!(problem, "the signing keys cannot be read again; those that are known stay");
                complaint = problem;
            }
        }
    }
}

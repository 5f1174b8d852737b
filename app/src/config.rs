//! Every setting there is: its meaning, its unit, its default, its bounds.
//!
//! [`layers`] reads the settings, [`show`] prints them, [`role`] says whether they are enough for what a process is to be.
//! A [`Config`] that came out of [`layers::load`] lies within all bounds, and nothing reads a file or the environment
//! after it. What never happens: a secret is serialized, printed or logged; a setting that is misspelt is ignored; a
//! number is outside of [`BOUNDS`].

pub(crate) mod layers;
#[cfg(test)]
mod page;
pub(crate) mod role;
pub(crate) mod secret;
pub(crate) mod servers;
pub(crate) mod show;

use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use serve::edge::EdgeConfig;

use secret::Secret;
use servers::{Mysql, Nats, Peers, Redis};

/// The settings of one process.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct Config {
    /// Where the shop's API listens. Port 0 lets the system pick one; the banner tells which.
    pub listen: SocketAddr,
    /// Where `/metrics`, `/healthz` and `/readyz` listen. They ask for no token: keep them off the internet.
    pub admin_listen: SocketAddr,
    /// The folder of the databases and the signing keys. A relative one starts at the working directory.
    pub data_dir: PathBuf,
    /// The folder of the signing keys, which all replicas of the account service share; unless set, `keys` in data_dir.
    pub key_dir: Option<PathBuf>,
    /// Replicas of each service that `saga up` starts as processes of their own; 0: all is in one process.
    pub processes: usize,
    /// Whether a shop without products gets some at its first start.
    pub demo_data: bool,
    /// What is logged, and how it looks.
    pub log: Log,
    /// Which purchases and requests are followed through all services, and where to.
    pub trace: Trace,
    /// What the servers allow their clients.
    pub http: Http,
    /// Customers, passwords, tokens.
    pub account: account::Config,
    /// Who may create products.
    pub catalog: Catalog,
    /// Payments.
    pub payment: Payment,
    /// How many purchases are let in, and how long each may take.
    pub purchase: Purchase,
    /// How sagas are driven.
    pub saga: Saga,
    /// What the bus holds.
    pub bus: Bus,
    /// The databases in files, one per service.
    pub db: Db,
    /// Databases on servers.
    pub mysql: Mysql,
    /// The broker between processes.
    pub nats: Nats,
    /// What processes remember together.
    pub redis: Redis,
    /// Where the other processes are.
    pub peers: Peers,
}

/// What is logged, and how it looks.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct Log {
    /// Comma-separated `LEVEL` and `TARGET=LEVEL`, such as `info,purchase=debug`.
    pub filter: String,
    /// How a line looks.
    pub format: LogFormat,
}

/// Which purchases and requests are followed through all services, and where to.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct Trace {
    /// Where spans are sent to by OTLP over gRPC, such as `http://127.0.0.1:4317`. Unset: nothing is recorded.
    pub endpoint: Option<String>,
    /// The part of the traces beginning in this process that is recorded: 0.0 none, 1.0 all. A client that sends a
    /// `traceparent` has decided itself.
    pub sample_ratio: f64,
}

/// How a log line looks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum LogFormat {
    /// Text where standard error is a terminal, JSON otherwise.
    Auto,
    /// Text for people.
    Human,
    /// One JSON object a line.
    Json,
}

/// What the servers allow their clients.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct Http {
    /// The largest request body, in bytes.
    pub body_limit_bytes: usize,
    /// Requests handled at once; further ones are answered 503. An open event stream does not count.
    pub max_in_flight_requests: usize,
    /// Connections open at once; further ones wait in the kernel. Half as many event streams may be open; further ones are answered 503.
    pub max_connections: usize,
    /// Time for a request's head, and how long a kept-alive connection may be idle.
    pub head_timeout_ms: u64,
    /// Time for a request's body.
    pub body_timeout_ms: u64,
    /// Time for which a client may take nothing of what is being sent to it.
    pub write_stall_timeout_ms: u64,
    /// Time that requests in flight get to finish when the process is told to stop.
    pub drain_timeout_ms: u64,
    /// Proxies in front of this process, each of which adds its client's address to X-Forwarded-For; 0: the header is not
    /// believed. Processes that `saga up --processes` starts count its gateway by themselves.
    pub trusted_proxies: usize,
    /// Origins whose pages may call the API from a browser, as scheme://host or scheme://host:port.
    pub cors_allowed_origins: Vec<String>,
}

/// Who may create products.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct Catalog {
    /// Who may call `POST /api/product`.
    pub write: CatalogWrite,
    /// The bearer token that `POST /api/product` asks for unless it is open to all.
    pub admin_token: Option<Secret>,
}

/// Who may create products.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum CatalogWrite {
    /// All while the API listens on loopback only and `http.trusted_proxies` is 0, otherwise who has the admin token. A proxy on the same
    /// machine that it is not told of is not seen.
    Auto,
    /// All who reach the API.
    Open,
    /// Who has the admin token.
    Admin,
}

/// Payments.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct Payment {
    /// A payment above this amount is declined, whatever its currency.
    pub limit: i64,
}

/// How many purchases are let in, and how long each may take.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct Purchase {
    /// Purchases under way at once; further ones are answered 503.
    pub max_in_flight: usize,
    /// Purchases that one customer may have under way; further ones are answered 429.
    pub max_open_per_customer: usize,
    /// Different products in one cart.
    pub max_cart_lines: usize,
    /// After how long a purchase that has not reached its payment is cancelled.
    pub deadline_seconds: u64,
    /// How long a purchase may be silent before it is driven again; the time doubles with each try.
    pub retry_first_seconds: u64,
    /// The longest time between two tries.
    pub retry_max_seconds: u64,
    /// Tries behind its deadline after which a purchase is left to the operator.
    pub max_tries: u32,
    /// Purchases accepted in one commit.
    pub accept_batch: usize,
    /// Purchases that may wait to be accepted; further ones are answered 503.
    pub accept_queue: usize,
    /// How far back the event stream of a client begins that does not say what it has seen: one who buys first
    /// and listens then misses nothing, up to a thousand purchases. A client that resumes gets everything that it missed, whatever its age.
    pub replay_recent_seconds: u64,
    /// How long the services remember at least what they have answered. What a purchase that has not ended may
    /// still ask for is remembered longer.
    pub barrier_retention_hours: u64,
}

/// How sagas are driven.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct Saga {
    /// Messages that the orchestrator and the participants handle together.
    pub batch: usize,
    /// How long a step that is done waits at least, and half of the longest wait, before the purchase's event streams hear of it. If the
    /// purchase has ended by then, they hear of all its steps at once, with its end. 0: at once, which costs a message for each step of a
    /// lone purchase.
    pub report_after_ms: u64,
}

/// What the bus holds, in memory or on NATS.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct Bus {
    /// Messages that one queue holds. Purchases under way are bounded so that it does not fill up; if it does, what
    /// was accepted is driven on later.
    pub queue_envelopes: usize,
    /// Messages that nobody could understand and that are kept for an operator; older ones give way. 0: none.
    pub dead_letters: usize,
}

/// The databases, one per service.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct Db {
    /// Threads that read, per database.
    pub readers: usize,
}

const KIB: i64 = 1024;
const MIB: i64 = 1024 * KIB;
const SECONDS_PER_DAY: i64 = 24 * 60 * 60;
const MILLIS_PER_MINUTE: i64 = 60 * 1000;
const MILLIS_PER_HOUR: i64 = 60 * MILLIS_PER_MINUTE;

/// The largest amount of money: what a JSON number carries through JavaScript.
const MAX_AMOUNT: i64 = (1 << 53) - 1;

/// The largest frame of the bus, in messages: no batch may be larger, no queue smaller.
const FRAME_ENVELOPES: i64 = 1024;

/// The most messages of one saga that wait in one queue, unless it is replayed: the reports of its four steps forward
/// and back that are not the last. What comes behind a saga's end beside that is bounded where it waits, and worth nothing.
const ENVELOPES_PER_SAGA: usize = 4;

/// The shortest admin token, in characters.
pub(crate) const ADMIN_TOKEN_MIN_CHARS: usize = 16;

/// The least and the greatest value of every number.
pub(crate) const BOUNDS: &[(&str, i64, i64)] = &[
    ("http.body_limit_bytes", KIB, 16 * MIB),
    ("http.max_in_flight_requests", 1, 1_000_000),
    ("http.max_connections", 1, 1_000_000),
    ("http.head_timeout_ms", 100, 10 * MILLIS_PER_MINUTE),
    ("http.body_timeout_ms", 100, 10 * MILLIS_PER_MINUTE),
    ("http.write_stall_timeout_ms", 100, 10 * MILLIS_PER_MINUTE),
    // Below the time that the whole process has to stop.
    ("http.drain_timeout_ms", 0, 9_000),
    ("http.trusted_proxies", 0, 8),
    ("account.access_token_seconds", 1, SECONDS_PER_DAY),
    ("account.refresh_token_seconds", 60, 365 * SECONDS_PER_DAY),
    ("account.purge_interval_seconds", 1, SECONDS_PER_DAY),
    ("account.passwords.max_running_hashes", 0, 1024),
    ("account.passwords.max_waiting_hashes", 0, 65_536),
    ("account.logins.burst_per_email", 1, 1_000_000),
    ("account.logins.interval_per_email_ms", 1, MILLIS_PER_HOUR),
    ("account.logins.burst_per_client", 1, 1_000_000),
    ("account.logins.interval_per_client_ms", 1, MILLIS_PER_HOUR),
    ("account.logins.burst_total", 1, 1_000_000),
    ("account.logins.interval_total_ms", 1, MILLIS_PER_HOUR),
    ("payment.limit", 0, MAX_AMOUNT),
    ("purchase.max_in_flight", 1, 1_000_000),
    ("purchase.max_open_per_customer", 1, 1_000_000),
    ("purchase.max_cart_lines", 1, 1_000),
    ("purchase.deadline_seconds", 1, SECONDS_PER_DAY),
    ("purchase.retry_first_seconds", 1, 60 * 60),
    ("purchase.retry_max_seconds", 1, SECONDS_PER_DAY),
    ("purchase.max_tries", 1, 1_000),
    ("purchase.accept_batch", 1, FRAME_ENVELOPES),
    ("purchase.accept_queue", 1, 1_000_000),
    ("purchase.replay_recent_seconds", 0, 60 * 60),
    ("purchase.barrier_retention_hours", 1, 365 * 24),
    ("saga.batch", 1, FRAME_ENVELOPES),
    ("saga.report_after_ms", 0, 10_000),
    ("bus.queue_envelopes", FRAME_ENVELOPES, 4 * MIB),
    // In memory each may have 64 KiB.
    ("bus.dead_letters", 0, 16_384),
    ("db.readers", 1, 64),
    ("processes", 0, 16),
    ("mysql.writers", 1, 256),
    ("mysql.readers", 1, 256),
    ("nats.replicas", 1, 5),
    ("nats.dead_letter_replicas", 0, 5),
    ("nats.queue_mib", 1, 1_048_576),
    ("nats.ack_wait_seconds", 1, 10 * 60),
    ("nats.max_ack_pending", 1, 1_000_000),
    ("nats.publishes_in_flight", 1, 65_536),
    // A quarter of the shortest nats.ack_wait_seconds at most, or what gathers would be given back.
    ("nats.gather_ms", 0, 200),
];

/// The least and the greatest value of every number that need not be whole.
pub(crate) const FRACTIONS: &[(&str, f64, f64)] = &[("trace.sample_ratio", 0.0, 1.0)];

impl Default for Config {
    fn default() -> Config {
        Config {
            listen: (Ipv4Addr::LOCALHOST, 8080).into(),
            admin_listen: (Ipv4Addr::LOCALHOST, 8081).into(),
            data_dir: PathBuf::from("./saga-data"),
            key_dir: None,
            processes: 0,
            demo_data: true,
            log: Log::default(),
            trace: Trace::default(),
            http: Http::default(),
            account: account::Config::default(),
            catalog: Catalog::default(),
            payment: Payment::default(),
            purchase: Purchase::default(),
            saga: Saga::default(),
            bus: Bus::default(),
            db: Db::default(),
            mysql: Mysql::default(),
            nats: Nats::default(),
            redis: Redis::default(),
            peers: Peers::default(),
        }
    }
}

impl Default for Log {
    fn default() -> Log {
        Log { filter: "info".to_owned(), format: LogFormat::Auto }
    }
}

impl Default for Trace {
    fn default() -> Trace {
        Trace { endpoint: None, sample_ratio: 1.0 }
    }
}

impl Default for Http {
    fn default() -> Http {
        Http {
            body_limit_bytes: 64 * 1024,
            max_in_flight_requests: 8_192,
            max_connections: 16_384,
            head_timeout_ms: 10_000,
            body_timeout_ms: 10_000,
            write_stall_timeout_ms: 30_000,
            drain_timeout_ms: 8_000,
            trusted_proxies: 0,
            cors_allowed_origins: Vec::new(),
        }
    }
}

impl Default for Catalog {
    fn default() -> Catalog {
        Catalog { write: CatalogWrite::Auto, admin_token: None }
    }
}

impl Default for Payment {
    fn default() -> Payment {
        Payment { limit: 1_000_000 }
    }
}

impl Default for Purchase {
    fn default() -> Purchase {
        Purchase {
            max_in_flight: 16_384,
            max_open_per_customer: 1_000,
            max_cart_lines: 100,
            deadline_seconds: 60,
            retry_first_seconds: 5,
            retry_max_seconds: 60,
            max_tries: 20,
            accept_batch: 1_024,
            accept_queue: 8_192,
            replay_recent_seconds: 30,
            barrier_retention_hours: 24,
        }
    }
}

impl Default for Saga {
    fn default() -> Saga {
        Saga { batch: 1_024, report_after_ms: 100 }
    }
}

impl Default for Bus {
    fn default() -> Bus {
        Bus { queue_envelopes: 65_536, dead_letters: 1_024 }
    }
}

impl Default for Db {
    fn default() -> Db {
        Db { readers: 2 }
    }
}

/// Settings that are each allowed, but not together.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Conflict {
    /// Two servers on one address.
    #[error("listen and admin_listen are both {0}: each needs an address of its own")]
    SameAddress(SocketAddr),
    /// The backoff would shrink.
    #[error(
        "purchase.retry_first_seconds = {first} is above purchase.retry_max_seconds = {max}: the first pause \
         cannot be longer than the longest"
    )]
    RetryOrder {
        /// The first pause.
        first: u64,
        /// The longest pause.
        max: u64,
    },
    /// Queues that the sagas under way could fill.
    #[error(
        "bus.queue_envelopes = {envelopes} is too small for purchase.max_in_flight = {in_flight}: a saga may have \
         {ENVELOPES_PER_SAGA} messages in one queue, so it must hold at least {ENVELOPES_PER_SAGA} times as many"
    )]
    QueueTooSmall {
        /// What a queue holds.
        envelopes: usize,
        /// Purchases under way.
        in_flight: usize,
    },
    /// A batch that never fills.
    #[error(
        "purchase.accept_batch = {batch} is above purchase.accept_queue = {queue}: no batch can be so large"
    )]
    AcceptOrder {
        /// Purchases in one commit.
        batch: usize,
        /// Purchases that may wait.
        queue: usize,
    },
    /// Copies that outlive no more servers than one fewer would.
    #[error("{setting} = {replicas} is even: it is 1, 3 or 5")]
    EvenReplicas {
        /// The setting.
        setting: &'static str,
        /// Its value.
        replicas: usize,
    },
    /// A certificate without its key, or a key without its certificate.
    #[error("{has} is set, but {lacks} is not: a certificate is shown with its key")]
    HalfIdentity {
        /// What is there.
        has: &'static str,
        /// What is not.
        lacks: &'static str,
    },
    /// A command could be carried out twice.
    #[error(
        "purchase.barrier_retention_hours = {hours} is too short: a purchase may be driven for up to \
         {driven_seconds} s (deadline_seconds + max_tries * retry_max_seconds), and messages of that time may \
         still be under way when it has ended"
    )]
    BarrierTooShort {
        /// How long answers are remembered.
        hours: u64,
        /// How long they may still be asked for.
        driven_seconds: u64,
    },
}

impl Http {
    /// What stands around the API's routes.
    pub(crate) fn edge(&self) -> EdgeConfig {
        EdgeConfig {
            body_limit_bytes: self.body_limit_bytes,
            max_in_flight_requests: self.max_in_flight_requests,
            cors_allowed_origins: self.cors_allowed_origins.clone(),
        }
    }

    /// What each server allows its clients.
    pub(crate) fn limits(&self) -> serve::Limits {
        serve::Limits {
            max_connections: self.max_connections,
            head_timeout_ms: self.head_timeout_ms,
            body_timeout_ms: self.body_timeout_ms,
            write_stall_timeout_ms: self.write_stall_timeout_ms,
            drain_timeout_ms: self.drain_timeout_ms,
            trusted_proxies: self.trusted_proxies,
        }
    }
}

impl Config {
    /// The folder of the signing keys.
    pub(crate) fn key_dir(&self) -> PathBuf {
        self.key_dir.clone().unwrap_or_else(|| self.data_dir.join("keys"))
    }

    /// What does not fit together. Each value is within its bounds.
    fn conflicts(&self) -> Vec<Conflict> {
        let Purchase { accept_batch: batch, accept_queue: queue, .. } = self.purchase;
        let (envelopes, in_flight) = (self.bus.queue_envelopes, self.purchase.max_in_flight);
        let (first, max) = (self.purchase.retry_first_seconds, self.purchase.retry_max_seconds);
        let hours = self.purchase.barrier_retention_hours;
        let driven_seconds = self.purchase.deadline_seconds + u64::from(self.purchase.max_tries) * max;
        let is_even = |replicas: usize| replicas > 0 && replicas.is_multiple_of(2);
        let even = |setting, replicas| (is_even(replicas), Conflict::EvenReplicas { setting, replicas });
        let (certificate, key) = ("nats.client_certificate", "nats.client_key");
        let (has_certificate, has_key) =
            (self.nats.client_certificate.is_some(), self.nats.client_key.is_some());
        let checks = [
            (self.listen == self.admin_listen && self.listen.port() != 0, Conflict::SameAddress(self.listen)),
            (first > max, Conflict::RetryOrder { first, max }),
            (batch > queue, Conflict::AcceptOrder { batch, queue }),
            (envelopes / ENVELOPES_PER_SAGA < in_flight, Conflict::QueueTooSmall { envelopes, in_flight }),
            even("nats.replicas", self.nats.replicas),
            even("nats.dead_letter_replicas", self.nats.dead_letter_replicas),
            (has_certificate && !has_key, Conflict::HalfIdentity { has: certificate, lacks: key }),
            (has_key && !has_certificate, Conflict::HalfIdentity { has: key, lacks: certificate }),
            (hours * 60 * 60 <= driven_seconds, Conflict::BarrierTooShort { hours, driven_seconds }),
        ];
        checks.into_iter().filter_map(|(holds, conflict)| holds.then_some(conflict)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::secret::ServerUrl;
    use super::*;

    #[test]
    fn the_defaults_fit_together() {
        assert_eq!(Config::default().conflicts(), []);
    }

    #[test]
    fn answers_are_remembered_for_longer_than_they_can_be_asked_for() {
        let mut config = Config::default();
        config.purchase.barrier_retention_hours = 1;
        assert_eq!(config.conflicts(), []);
        config.purchase.max_tries = 59;
        assert_eq!(config.conflicts(), [Conflict::BarrierTooShort { hours: 1, driven_seconds: 3600 }]);
    }

    #[test]
    fn what_contradicts_itself_is_all_named() {
        let mut config = Config { admin_listen: Config::default().listen, ..Config::default() };
        config.purchase.retry_first_seconds = 61;
        config.purchase.accept_queue = 511;
        assert_eq!(
            config.conflicts(),
            [
                Conflict::SameAddress(config.listen),
                Conflict::RetryOrder { first: 61, max: 60 },
                Conflict::AcceptOrder { batch: 1_024, queue: 511 },
            ]
        );
    }

    #[test]
    fn copies_are_odd_in_number() {
        let of = |replicas, dead_letter_replicas| {
            let mut config = Config::default();
            (config.nats.replicas, config.nats.dead_letter_replicas) = (replicas, dead_letter_replicas);
            config.conflicts()
        };
        let even = |setting, replicas| Conflict::EvenReplicas { setting, replicas };
        assert_eq!(of(2, 4), [even("nats.replicas", 2), even("nats.dead_letter_replicas", 4)]);
        assert_eq!((of(1, 0), of(3, 1), of(5, 5)), (vec![], vec![], vec![]));
    }

    #[test]
    fn a_certificate_and_its_key_are_named_together() {
        let mut config = Config::default();
        config.nats.client_key = Some("key.pem".into());
        let (has, lacks) = ("nats.client_key", "nats.client_certificate");
        assert_eq!(config.conflicts(), [Conflict::HalfIdentity { has, lacks }]);
        config.nats.client_certificate = config.nats.client_key.take();
        assert_eq!(config.conflicts(), [Conflict::HalfIdentity { has: lacks, lacks: has }]);
        config.nats.client_key = config.nats.client_certificate.clone();
        assert_eq!(config.conflicts(), []);
    }

    #[test]
    fn a_secret_does_not_leak_through_debug_or_serialization() {
        let mut config = Config::default();
        config.catalog.admin_token = Some(Secret::new("open sesame"));
        config.mysql.url = Some(ServerUrl::new("mysql://root:sesame@db"));
        config.nats.url = Some(ServerUrl::new("nats://root:sesame@bus"));
        config.redis.url = Some(ServerUrl::new("redis://:sesame@copies"));
        assert!(!format!("{config:?}").contains("sesame"));
        assert!(!serde_json::to_string(&config).unwrap().contains("sesame"));
    }
}

//! Builds the shop out of its parts: the one file that knows which database, which bus and which process is whose.
//!
//! Read it from top to bottom to see the whole: databases, bus, services, doors. Everything else takes what it is given.
//!
//! It stops in the opposite order of what a purchase passes: first the doors, with the requests that are inside, then the
//! tasks that drive sagas, then the databases. What is under way then stands in the databases and goes on at the next
//! start.

use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use axum::Router;
use axum::routing::get;
use bus::Bus;
use db::Db;
use participant::Settings;
use product::ProductCache;
use serde::Serialize;
use serve::admin::{self, Readiness};
use serve::auth::Realm;
use serve::edge::{self, measured};
use serve::extract::Json;
use serve::random::Random;
use shop::purchase::{ORCHESTRATOR, PURCHASE_PROGRESS, PurchaseStep, purchase_saga};
use telemetry::{HttpMetrics, PubsubMetrics, Registry};
use tokio::net::TcpListener;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use wire::time::Clock;

use crate::config::{self, Config};

/// The folder of the signing keys, in the data directory.
const KEY_DIR: &str = "keys";

/// Why the shop did not start, or could not go on.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    /// An address is taken or not this machine's.
    #[error("cannot listen on {address} ({setting}): {cause}")]
    Listen {
        /// The setting.
        setting: &'static str,
        /// Its value.
        address: SocketAddr,
        /// Why.
        #[source]
        cause: io::Error,
    },
    /// A CORS origin is none.
    #[error("http.{0}")]
    Cors(#[from] edge::InvalidOrigin),
    /// A database cannot be opened.
    #[error(transparent)]
    Open(#[from] db::OpenError),
    /// The account service did not start.
    #[error(transparent)]
    Account(#[from] account::StartError),
    /// The product service did not start.
    #[error("product: {0}")]
    Product(#[from] db::ids::IdsError),
    /// The purchase service did not start.
    #[error("purchase: {0}")]
    Purchase(#[from] purchase::StartError),
    /// The demonstration's products could not be created.
    #[error("demo data: {0}")]
    Seed(#[from] product::SeedError),
    /// A part of the shop has ended that never should.
    #[error("{0} has died; what was under way goes on at the next start")]
    Died(&'static str),
}

/// A shop that answers.
pub(crate) struct Running {
    /// Where the API listens.
    pub http_addr: SocketAddr,
    /// Where the operator's door listens.
    pub admin_addr: SocketAddr,
    /// Whether everybody may create products.
    pub catalog_open: bool,
    /// Whether the demonstration's products were added now.
    pub seeded: bool,
    doors: Tasks,
    workers: Tasks,
    databases: Vec<Db>,
    died: mpsc::Receiver<&'static str>,
}

impl Running {
    /// Ends when a part of the shop has died, and tells why. Until then it waits, and it may be dropped.
    pub(crate) async fn failed(&mut self) -> Error {
        match self.died.recv().await {
            Some(name) => Error::Died(name),
            None => std::future::pending().await,
        }
    }

    /// Stops accepting, finishes what is in flight, closes what is open.
    pub(crate) async fn stop(self) {
        self.doors.stop().await;
        self.workers.stop().await;
        for db in &self.databases {
            db.close().await;
        }
    }
}

/// Tasks that stop together. One that ends before it is told to has died.
struct Tasks {
    stop: CancellationToken,
    tracker: TaskTracker,
    died: mpsc::Sender<&'static str>,
}

impl Tasks {
    fn new(died: mpsc::Sender<&'static str>) -> Tasks {
        Tasks { stop: CancellationToken::new(), tracker: TaskTracker::new(), died }
    }

    fn spawn(&self, name: &'static str, task: impl Future<Output = ()> + Send + 'static) {
        let (stop, died) = (self.stop.clone(), self.died.clone());
        let task = tokio::spawn(task);
        self.tracker.spawn(async move {
            let ended = task.await;
            if ended.is_err() || !stop.is_cancelled() {
                // Full or closed: somebody has been told already.
                let _ = died.try_send(name);
            }
        });
    }

    async fn stop(&self) {
        self.stop.cancel();
        self.tracker.close();
        self.tracker.wait().await;
    }
}

/// The databases, one a service.
struct Databases {
    account: Db,
    product: Db,
    order: Db,
    payment: Db,
    purchase: Db,
}

impl Databases {
    fn open(config: &Config) -> Result<Databases, db::OpenError> {
        let open = |name, migrations| open_database(config, name, migrations);
        Ok(Databases {
            account: open("account", account::MIGRATIONS)?,
            product: open("product", product::MIGRATIONS)?,
            order: open("order", order::MIGRATIONS)?,
            payment: open("payment", payment::MIGRATIONS)?,
            purchase: open("purchase", purchase::MIGRATIONS)?,
        })
    }

    fn all(&self) -> Vec<Db> {
        let Databases { account, product, order, payment, purchase } = self;
        [account, product, order, payment, purchase].into_iter().cloned().collect()
    }
}

fn open_database(
    config: &Config,
    name: &'static str,
    migrations: &'static [db::Migration],
) -> Result<Db, db::OpenError> {
    let path = config.data_dir.join(name).with_extension("db");
    Db::open(db::Settings { readers: config.db.readers, ..db::Settings::new(path, name) }, migrations)
}

/// Starts everything and returns once it answers.
///
/// # Errors
/// What kept it from starting.
pub(crate) async fn up(config: &Config) -> Result<Running, Error> {
    // Before anything is opened: a second shop on the same address should not get far.
    let (http, http_addr) = listen("listen", config.listen).await?;
    let (operator, admin_addr) = listen("admin_listen", config.admin_listen).await?;

    let (clock, random, registry) = (Clock::system(), Random::secure(), Registry::new());
    let databases = Databases::open(config)?;
    let bus =
        Bus::embedded(bus::Limits { queue_envelopes: config.bus.queue_envelopes, ..bus::Limits::default() });
    let pubsub = |app| PubsubMetrics::new(&registry, app);
    let settings = participant_settings(config);

    let (died, died_here) = mpsc::channel(1);
    let (doors, workers) = (Tasks::new(died.clone()), Tasks::new(died));

    let account = account::start(account::Parts {
        db: databases.account.clone(),
        clock: clock.clone(),
        random: random.clone(),
        registry: registry.clone(),
        key_dir: config.data_dir.join(KEY_DIR),
        realm: Realm::default(),
        config: config.account.clone(),
    })
    .await?;
    let verifier = account.verifier();

    let product = product::start(product::Parts {
        db: databases.product.clone(),
        cache: ProductCache::new(),
        bus: bus.clone(),
        clock: clock.clone(),
        write: catalog_write(config),
        metrics: pubsub("product"),
        settings,
    })
    .await?;
    let seeded = config.demo_data && product.seed().await? > 0;

    let order = order::Parts {
        db: databases.order.clone(),
        bus: bus.clone(),
        clock: clock.clone(),
        verifier: verifier.clone(),
        products: product.get_products(),
        metrics: pubsub("order"),
        settings,
    };
    let payment = payment::Parts {
        db: databases.payment.clone(),
        bus: bus.clone(),
        clock: clock.clone(),
        verifier: verifier.clone(),
        limit: config.payment.limit,
        metrics: pubsub("payment"),
        settings,
    };
    let (purchase, purchase_tasks) = purchase::start(purchase::Parts {
        config: purchase_config(config),
        db: databases.purchase.clone(),
        bus: bus.clone(),
        clock,
        random,
        verifier,
        products: product.check_products(),
        registry: registry.clone(),
        metrics: pubsub("purchase"),
        stop_streams: doors.stop.clone(),
        stop: workers.stop.clone(),
    })
    .await?;
    if purchase.adopted > 0 {
        tracing::info!(purchases = purchase.adopted, "purchases were under way; they are driven on");
    }
    let orchestrator = orchestrator::Parts {
        book: orchestrator::Book::new().with(purchase_saga(), PurchaseStep::commands, PURCHASE_PROGRESS),
        bus: bus.clone(),
        subject: ORCHESTRATOR,
        metrics: pubsub("orchestrator"),
        settings: orchestrator::Settings {
            batch_messages: config.saga.batch,
            ..orchestrator::Settings::default()
        },
    };

    let measured = |app, router| measured(router, HttpMetrics::new(&registry, app));
    let api = Router::new()
        .merge(measured("account", account.router()))
        .merge(measured("product", product.router()))
        .merge(measured("order", order::router(&order)))
        .merge(measured("payment", payment::router(&payment)))
        .merge(measured("purchase", purchase.router()));
    let stopping = doors.stop.clone();
    let readiness = Readiness::new()
        .check("shop", move || if stopping.is_cancelled() { Err("stopping".to_owned()) } else { Ok(()) });
    let dead_letters = bus.clone();
    let admin = admin::router(registry.clone(), readiness)
        .merge(purchase.operator_router())
        .route("/bus/parked", get(async move || parked(&dead_letters)));
    let edge = config.http.edge();
    let (api, admin) = (edge::protected(api, &edge)?, edge::protected(admin, &edge)?);

    workers.spawn("account", account.run(workers.stop.clone()));
    workers.spawn("product", product.run(workers.stop.clone()));
    workers.spawn("order", order::run(order, workers.stop.clone()));
    workers.spawn("payment", payment::run(payment, workers.stop.clone()));
    for (name, task) in purchase_tasks {
        workers.spawn(name, task);
    }
    workers.spawn("orchestrator", orchestrator::run(orchestrator, workers.stop.clone()));
    for (name, listener, router) in [("api listener", http, api), ("admin listener", operator, admin)] {
        let (limits, stop) = (config.http.limits(), doors.stop.clone());
        doors.spawn(name, async move {
            let drained = serve::serve(listener, router, &limits, stop).await;
            tracing::debug!(listener = name, cut_off = drained.cut_off, "a listener is closed");
        });
    }
    let catalog_open = config.catalog_open();
    let databases = databases.all();
    Ok(Running { http_addr, admin_addr, catalog_open, seeded, doors, workers, databases, died: died_here })
}

async fn listen(setting: &'static str, address: SocketAddr) -> Result<(TcpListener, SocketAddr), Error> {
    let failed = |cause| Error::Listen { setting, address, cause };
    let listener = TcpListener::bind(address).await.map_err(failed)?;
    let bound = listener.local_addr().map_err(failed)?;
    Ok((listener, bound))
}

/// Adds the demonstration's products if there are none; tells whether it did.
///
/// # Errors
/// What kept it from doing so.
pub(crate) async fn seed(config: &Config) -> Result<bool, Error> {
    let registry = Registry::new();
    let db = open_database(config, "product", product::MIGRATIONS)?;
    let product = product::start(product::Parts {
        db: db.clone(),
        cache: ProductCache::new(),
        bus: Bus::embedded(bus::Limits::default()),
        clock: Clock::system(),
        write: catalog_write(config),
        metrics: PubsubMetrics::new(&registry, "product"),
        settings: participant_settings(config),
    })
    .await?;
    let created = product.seed().await?;
    db.close().await;
    Ok(created > 0)
}

fn catalog_write(config: &Config) -> product::CatalogWrite {
    match &config.catalog.admin_token {
        Some(token) if !config.catalog_open() => {
            product::CatalogWrite::Admin { token: token.expose().to_owned() }
        }
        // Without a token it is open: the configuration does not allow anything else.
        Some(_) | None => product::CatalogWrite::Open,
    }
}

fn participant_settings(config: &Config) -> Settings {
    Settings {
        batch_commands: config.saga.batch,
        barrier_retention: Duration::from_secs(config.purchase.barrier_retention_hours * 60 * 60),
        ..Settings::default()
    }
}

fn purchase_config(config: &Config) -> purchase::Config {
    let config::Purchase {
        max_in_flight,
        max_open_per_customer,
        max_cart_lines,
        deadline_seconds,
        retry_first_seconds,
        retry_max_seconds,
        max_tries,
        accept_batch,
        accept_queue,
        replay_recent_seconds,
        ..
    } = config.purchase;
    purchase::Config {
        max_in_flight,
        max_open_per_customer,
        max_cart_lines,
        deadline: Duration::from_secs(deadline_seconds),
        retry_first: Duration::from_secs(retry_first_seconds),
        retry_max: Duration::from_secs(retry_max_seconds),
        max_tries,
        accept_batch_requests: accept_batch,
        accept_queue_requests: accept_queue,
        look_back: Duration::from_secs(replay_recent_seconds),
        // Streams hold their connections: they must leave some for everybody else.
        max_streams: (config.http.max_connections / 2).max(1),
        result_batch_messages: config.saga.batch,
        ..purchase::Config::default()
    }
}

#[derive(Serialize)]
struct DeadLetter {
    subject: &'static str,
    id: String,
    deliveries: u32,
    bytes: usize,
    reason: String,
}

/// The bus's dead letters, for an operator. They are lost with the process; the purchases behind them are not.
fn parked(bus: &Bus) -> Json<Vec<DeadLetter>> {
    let letter = |parked: bus::Parked| DeadLetter {
        subject: parked.subject.0,
        id: parked.envelope.id.to_string(),
        deliveries: parked.count,
        bytes: parked.envelope.body.len(),
        reason: parked.reason,
    };
    Json(bus.parked().into_iter().map(letter).collect())
}

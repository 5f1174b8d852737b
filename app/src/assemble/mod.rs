//! Builds processes out of the shop's parts: the one place that knows which database, which bus and which process is whose.
//!
//! Read [`up`] and [`run`] from top to bottom to see the whole: engines, services, doors. [`services`] has how each service
//! is made, [`engines`] what it stands on, [`peers`] what others are asked, [`doors`] where it is reached. Everything else takes what it is given.
//!
//! A process stops in the opposite order of what a purchase passes: first the doors, with the requests that are inside, then
//! the tasks that drive sagas, then the databases. What is under way then stands in the databases and goes on
//! elsewhere, or at the next start.

pub(crate) mod doors;
pub(crate) mod engines;
mod health;
mod operator;
mod peers;
mod services;
mod tasks;

use std::io;
use std::net::SocketAddr;

use axum::Router;
use bus::Bus;
use gateway::Gateway;
use serve::edge;
use serve::random::Random;
use shop::purchase::{INVENTORY_COMMANDS, ORCHESTRATOR, ORDER_COMMANDS, PAYMENT_COMMANDS, PURCHASE_PROGRESS};
use telemetry::Registry;
use telemetry::spans::{Collector, InvalidEndpoint, Sampler};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use wire::time::Clock;

use crate::config::role::Role;
use crate::config::servers::Service;
use crate::config::{Config, Trace};
use doors::Doors;
pub(crate) use doors::Hold;
use engines::{Engines, Open, Progress};
use health::Health;
use services::Common;
use tasks::Tasks;

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
    /// The broker cannot be used.
    #[error(transparent)]
    Bus(#[from] bus::nats::StartError),
    /// Redis cannot be used.
    #[error(transparent)]
    Redis(#[from] cache::redis::SettingsError),
    /// Spans cannot be sent there.
    #[error("trace.endpoint: {0}")]
    Trace(#[from] InvalidEndpoint),
    /// A database does not tell the time of its server.
    #[error("the time of a database's server: {0}")]
    Time(#[from] db::Error),
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
    stop: Stop,
    open: Open,
    collector: Option<Collector>,
    died: mpsc::Receiver<&'static str>,
}

/// What is told to stop, in this order.
struct Stop {
    doors: Tasks,
    workers: Tasks,
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
        self.stop.doors.stop().await;
        self.stop.workers.stop().await;
        self.open.close().await;
        if let Some(collector) = &self.collector {
            collector.close().await;
        }
    }
}

/// Starts the whole shop in this process and returns once it answers.
///
/// # Errors
/// What kept it from starting.
pub(crate) async fn up(config: &Config) -> Result<Running, Error> {
    // Before anything is opened: a second shop on the same address should not get far.
    let start = Start::begin(config, Role::Shop, Hold::Alone)?;
    let (common, mut engines) = (&start.common, start.engines());

    let bus = engines.bus(None, &common.workers).await?;
    let db = engines.database(Service::Account, account::MIGRATIONS, &common.workers).await?;
    let account = services::account(common, db).await?;
    let db = engines.database(Service::Product, product::MIGRATIONS, &common.workers).await?;
    let product = services::product(common, db, bus.clone(), config.demo_data).await?;
    let db = engines.database(Service::Order, order::MIGRATIONS, &common.workers).await?;
    let (verifier, products) = (account.verifier.clone(), product.get_products);
    let order = services::order(common, db, bus.clone(), verifier, products).await?;
    let db = engines.database(Service::Payment, payment::MIGRATIONS, &common.workers).await?;
    let payment = services::payment(common, db, bus.clone(), account.verifier.clone()).await?;
    let db = engines.database(Service::Purchase, purchase::MIGRATIONS, &common.workers).await?;
    let (verifier, products) = (account.verifier, product.check_products);
    let purchase = services::purchase(common, db, bus.clone(), verifier, products).await?;
    services::orchestrator(common, bus.clone());

    let api =
        Router::new().merge(account.api).merge(product.api).merge(order).merge(payment).merge(purchase.api);
    let operator = purchase.operator.merge(operator::bus_routes(bus));
    start.finish(engines.into_open(), Api::Routes(api), operator, product.seeded)
}

/// Starts one replica of one service and returns once it answers.
///
/// # Errors
/// What kept it from starting.
pub(crate) async fn run(config: &Config, service: Service, hold: Hold) -> Result<Running, Error> {
    let start = Start::begin(config, Role::Replica(service), hold)?;
    let (common, mut engines) = (&start.common, start.engines());
    let (mut operator, mut seeded) = (Router::new(), false);
    let api = match service {
        Service::Account => {
            let db = engines.database(service, account::MIGRATIONS, &common.workers).await?;
            services::account(common, db).await?.api
        }
        Service::Product => {
            let bus = engines.bus(Some(INVENTORY_COMMANDS), &common.workers).await?;
            let db = engines.database(service, product::MIGRATIONS, &common.workers).await?;
            operator = operator::bus_routes(bus.clone());
            let product = services::product(common, db, bus, config.demo_data).await?;
            seeded = product.seeded;
            product.api
        }
        Service::Order => {
            let bus = engines.bus(Some(ORDER_COMMANDS), &common.workers).await?;
            let db = engines.database(service, order::MIGRATIONS, &common.workers).await?;
            operator = operator::bus_routes(bus.clone());
            services::order(
                common,
                db,
                bus,
                peers::verifier(common, &start.progress).await,
                peers::get_products(common),
            )
            .await?
        }
        Service::Payment => {
            let bus = engines.bus(Some(PAYMENT_COMMANDS), &common.workers).await?;
            let db = engines.database(service, payment::MIGRATIONS, &common.workers).await?;
            operator = operator::bus_routes(bus.clone());
            let verifier = peers::verifier(common, &start.progress).await;
            services::payment(common, db, bus, verifier).await?
        }
        Service::Purchase => {
            let bus = engines.bus(Some(PURCHASE_PROGRESS), &common.workers).await?;
            let db = engines.database(service, purchase::MIGRATIONS, &common.workers).await?;
            let (verifier, products) =
                (peers::verifier(common, &start.progress).await, peers::check_products(common));
            let purchase = services::purchase(common, db, bus.clone(), verifier, products).await?;
            operator = purchase.operator.merge(operator::bus_routes(bus));
            purchase.api
        }
        Service::Orchestrator => {
            let bus = engines.bus(Some(ORCHESTRATOR), &common.workers).await?;
            operator = operator::bus_routes(bus.clone());
            services::orchestrator(common, bus);
            Router::new()
        }
        Service::Gateway => {
            let gateway = peers::gateway(common);
            return start.finish(engines.into_open(), Api::Gateway(gateway), operator, seeded);
        }
    };
    start.finish(engines.into_open(), Api::Routes(api), operator, seeded)
}

/// Who answers at the API's address.
enum Api {
    /// Services.
    Routes(Router),
    /// Replicas elsewhere.
    Gateway(Gateway),
}

impl Api {
    fn gateway(&self) -> Option<Gateway> {
        match self {
            Api::Routes(_) => None,
            Api::Gateway(gateway) => Some(gateway.clone()),
        }
    }
}

/// A process between its first moment and the one when it answers.
struct Start<'c> {
    common: Common<'c>,
    doors: Doors,
    progress: Progress,
    health: Health,
    /// Ends the answers to the operator that tell how far it is.
    starting: CancellationToken,
    died: mpsc::Receiver<&'static str>,
}

impl<'c> Start<'c> {
    fn begin(config: &'c Config, role: Role, hold: Hold) -> Result<Start<'c>, Error> {
        let doors = Doors::open(config, hold)?;
        let (common, died) = Common::new(config, role)?;
        let (progress, health) = (Progress::new(), Health::default());
        let readiness = operator::readiness(&common, &progress, &health, None);
        let routes = operator::routes(&common, readiness);
        let starting = doors.answer_operator(routes, config, &common.doors)?;
        Ok(Start { common, doors, progress, health, starting, died })
    }

    fn engines(&self) -> Engines<'c> {
        Engines::new(self.common.config, self.progress.clone(), self.health.clone())
    }

    fn finish(self, open: Open, api: Api, operator: Router, seeded: bool) -> Result<Running, Error> {
        let Start { common, doors, progress, health, starting, died } = self;
        let readiness = operator::readiness(&common, &progress, &health, api.gateway());
        let operator = operator::routes(&common, readiness.clone()).merge(operator);
        let health = rpc::health(readiness, common.doors.stop.clone());
        let running = Running {
            http_addr: doors.api_address,
            admin_addr: doors.admin_address,
            catalog_open: common.config.catalog_open(common.role),
            seeded,
            stop: Stop { doors: common.doors, workers: common.workers },
            open,
            collector: common.collector,
            died,
        };
        progress.done();
        starting.cancel();
        let edge = common.config.http.edge();
        let api = match api {
            Api::Routes(routes) => edge::protected(routes.merge(rpc::reflection()).merge(health), &edge)?,
            Api::Gateway(gateway) => gateway.protected(health, &edge)?,
        };
        doors.answer(api, operator, common.config, &running.stop.doors)?;
        Ok(running)
    }
}

impl<'c> Common<'c> {
    /// With nothing started, and where to hear of tasks that die.
    fn new(config: &'c Config, role: Role) -> Result<(Common<'c>, mpsc::Receiver<&'static str>), Error> {
        let (died, died_here) = mpsc::channel(1);
        let registry = Registry::new();
        let common = Common {
            config,
            role,
            clock: Clock::system(),
            random: Random::secure(),
            collector: collector(&config.trace, &registry)?,
            registry,
            redis: engines::redis(config)?,
            doors: Tasks::new(died.clone()),
            workers: Tasks::new(died),
        };
        Ok((common, died_here))
    }
}

/// The way to who collects spans, if anybody does.
fn collector(trace: &Trace, registry: &Registry) -> Result<Option<Collector>, Error> {
    let Some(endpoint) = &trace.endpoint else { return Ok(None) };
    Ok(Some(Collector::new(endpoint, Sampler::ratio(trace.sample_ratio), registry)?))
}

/// Adds the demonstration's products if there are none; tells whether it did.
///
/// # Errors
/// What kept it from doing so.
pub(crate) async fn seed(config: &Config) -> Result<bool, Error> {
    let (common, _died) = Common::new(config, Role::Seeder)?;
    let mut engines = Engines::new(config, Progress::new(), Health::default());
    let db = engines.database(Service::Product, product::MIGRATIONS, &common.workers).await?;
    // Nothing is bought through this process.
    let bus = Bus::embedded(bus::Limits::default());
    let product = services::product(&common, db, bus, true).await?;
    common.workers.stop().await;
    engines.into_open().close().await;
    Ok(product.seeded)
}

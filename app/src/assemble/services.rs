//! How each service is started: once, whatever it stands on and whoever is in the process beside it.
//!
//! Each function makes a service of its [`Common`] parts, its database, the bus, and what other services answer. It starts
//! the service's tasks, and gives back its routes and what others may ask it.

use std::time::Duration;

use axum::Router;
use bus::Bus;
use cache::Redis;
use db::{Db, ServerClock};
use drive::Book;
use product::ProductCache;
use serve::auth::{Realm, Verifier};
use serve::edge::{measured, traced_calls};
use serve::random::Random;
use shop::calls::{CheckProducts, GetProducts};
use shop::purchase::{ORCHESTRATOR, PURCHASE_PROGRESS, PurchaseStep, purchase_saga};
use telemetry::spans::Collector;
use telemetry::{HttpMetrics, PubsubMetrics, Registry, Spans};
use wire::time::Clock;

use super::{Error, Tasks};
use crate::config::role::Role;
use crate::config::servers::Service;
use crate::config::{self, Config};

/// What all services of a process share.
pub(super) struct Common<'c> {
    /// The settings.
    pub config: &'c Config,
    /// What the process is.
    pub role: Role,
    /// The time of this machine.
    pub clock: Clock,
    /// Secrets and trace ids.
    pub random: Random,
    /// What is counted.
    pub registry: Registry,
    /// Where spans go to, if any are recorded.
    pub collector: Option<Collector>,
    /// What the processes remember together. It need not answer: it holds copies only.
    pub redis: Option<Redis>,
    /// What talks to clients; it stops first.
    pub doors: Tasks,
    /// What drives sagas; it stops when no client waits any more.
    pub workers: Tasks,
}

impl Common<'_> {
    fn pubsub(&self, app: &str) -> PubsubMetrics {
        PubsubMetrics::new(&self.registry, app)
    }

    /// Where a service's spans are recorded.
    pub(super) fn spans(&self, service: Service) -> Spans {
        self.collector.as_ref().map_or_else(Spans::off, |collector| collector.service(service.name()))
    }

    fn measured(&self, app: &str, router: Router, spans: &Spans) -> Router {
        measured(router, HttpMetrics::new(&self.registry, app), spans.clone())
    }

    /// The time by which a service goes: that of its database's server, so that all its replicas go by one, or this machine's where
    /// nobody else works on the database. `task` is the name of what keeps up with the server.
    async fn clock_of(&self, db: &Db, task: &'static str) -> Result<Clock, Error> {
        if !db.is_shared() {
            return Ok(self.clock.clone());
        }
        let server = ServerClock::read(db.clone(), &self.clock).await?;
        let (clock, stop) = (server.clock(), self.workers.stop.clone());
        self.workers.spawn(task, async move {
            let _ = stop.run_until_cancelled(server.keep()).await;
        });
        Ok(clock)
    }

    fn participant(&self) -> participant::Settings {
        participant::Settings {
            batch_commands: self.config.saga.batch,
            barrier_retention: Duration::from_secs(self.config.purchase.barrier_retention_hours * 60 * 60),
            report_after: Duration::from_millis(self.config.saga.report_after_ms),
            ..participant::Settings::default()
        }
    }
}

/// The sagas of the shop: whoever has a reply of theirs drives them on.
fn book() -> Book {
    Book::new().with(purchase_saga(), PurchaseStep::commands, PURCHASE_PROGRESS)
}

/// The account service.
pub(super) struct Account {
    /// Its routes.
    pub api: Router,
    /// Verifies the tokens that it issues.
    pub verifier: Verifier,
}

/// Starts the account service.
pub(super) async fn account(common: &Common<'_>, db: Db) -> Result<Account, Error> {
    let account = account::start(account::Parts {
        clock: common.clock_of(&db, "account clock").await?,
        db,
        redis: common.redis.clone(),
        random: common.random.clone(),
        registry: common.registry.clone(),
        key_dir: common.config.key_dir(),
        realm: Realm::default(),
        config: common.config.account.clone(),
    })
    .await?;
    let verifier = account.verifier();
    let spans = common.spans(Service::Account);
    let calls = traced_calls(rpc::auth_service(verifier.clone()), spans.clone());
    let api = common.measured("account", account.router(), &spans).merge(calls);
    common.workers.spawn("account", account.run(common.workers.stop.clone()));
    Ok(Account { api, verifier })
}

/// The product service.
pub(super) struct Product {
    /// Its routes.
    pub api: Router,
    /// Answers which products exist.
    pub check_products: CheckProducts,
    /// Answers what is known of them.
    pub get_products: GetProducts,
    /// Whether the demonstration's products were added now.
    pub seeded: bool,
}

/// Starts the product service, with the demonstration's products if it is to have them and has none.
pub(super) async fn product(common: &Common<'_>, db: Db, bus: Bus, seed: bool) -> Result<Product, Error> {
    let spans = common.spans(Service::Product);
    let product = product::start(product::Parts {
        clock: common.clock_of(&db, "product clock").await?,
        db,
        cache: ProductCache::new(),
        redis: common.redis.clone(),
        bus,
        write: catalog_write(common),
        book: book(),
        metrics: common.pubsub("product"),
        spans: spans.clone(),
        settings: common.participant(),
    })
    .await?;
    let seeded = seed && product.seed().await? > 0;
    let (check_products, get_products) = (product.check_products(), product.get_products());
    let questions = rpc::product_service(check_products.clone(), get_products.clone());
    let questions = traced_calls(questions, spans.clone());
    let api = common.measured("product", product.router(), &spans).merge(questions);
    common.workers.spawn("product", product.run(common.workers.stop.clone()));
    Ok(Product { api, check_products, get_products, seeded })
}

/// Starts the order service; gives its routes.
pub(super) async fn order(
    common: &Common<'_>,
    db: Db,
    bus: Bus,
    verifier: Verifier,
    products: GetProducts,
) -> Result<Router, Error> {
    let spans = common.spans(Service::Order);
    let clock = common.clock_of(&db, "order clock").await?;
    let order = order::Parts {
        copies: common
            .redis
            .clone()
            .map(|redis| order::Copies::new(redis, &db, clock.clone(), order::KEPT_FROM_AGE)),
        db,
        bus,
        clock,
        verifier,
        products,
        book: book(),
        metrics: common.pubsub("order"),
        spans: spans.clone(),
        settings: common.participant(),
    };
    let api = common.measured("order", order::router(&order), &spans);
    common.workers.spawn("order", order::run(order, common.workers.stop.clone()));
    Ok(api)
}

/// Starts the payment service; gives its routes.
pub(super) async fn payment(
    common: &Common<'_>,
    db: Db,
    bus: Bus,
    verifier: Verifier,
) -> Result<Router, Error> {
    let spans = common.spans(Service::Payment);
    let payment = payment::Parts {
        copies: common.redis.clone().map(payment::Copies::new),
        clock: common.clock_of(&db, "payment clock").await?,
        db,
        bus,
        verifier,
        limit: common.config.payment.limit,
        book: book(),
        metrics: common.pubsub("payment"),
        spans: spans.clone(),
        settings: common.participant(),
    };
    let api = common.measured("payment", payment::router(&payment), &spans);
    common.workers.spawn("payment", payment::run(payment, common.workers.stop.clone()));
    Ok(api)
}

/// The purchase service.
pub(super) struct Purchase {
    /// Its routes.
    pub api: Router,
    /// Its routes for an operator.
    pub operator: Router,
}

/// Starts the purchase service, whose replicas hear of each other through Redis.
pub(super) async fn purchase(
    common: &Common<'_>,
    db: Db,
    bus: Bus,
    verifier: Verifier,
    products: CheckProducts,
) -> Result<Purchase, Error> {
    let spans = common.spans(Service::Purchase);
    let clock = common.clock_of(&db, "purchase clock").await?;
    let (purchase, tasks) = purchase::start(purchase::Parts {
        config: purchase_config(common.config),
        db,
        bus,
        book: book(),
        feed: common.redis.clone().map_or(purchase::Feed::None, purchase::Feed::Redis),
        clock,
        random: common.random.clone(),
        verifier,
        products,
        registry: common.registry.clone(),
        metrics: common.pubsub("purchase"),
        spans: spans.clone(),
        stop_streams: common.doors.stop.clone(),
        stop: common.workers.stop.clone(),
    })
    .await?;
    if purchase.adopted > 0 {
        tracing::info!(purchases = purchase.adopted, "purchases were under way; they are driven on");
    }
    for (name, task) in tasks {
        common.workers.spawn(name, task);
    }
    let api = common.measured("purchase", purchase.router(), &spans);
    Ok(Purchase { api, operator: purchase.operator_router() })
}

/// Starts the orchestrator.
pub(super) fn orchestrator(common: &Common<'_>, bus: Bus) {
    let orchestrator = orchestrator::Parts {
        book: book(),
        bus,
        subject: ORCHESTRATOR,
        metrics: common.pubsub("orchestrator"),
        spans: common.spans(Service::Orchestrator),
        settings: orchestrator::Settings {
            batch_messages: common.config.saga.batch,
            ..orchestrator::Settings::default()
        },
    };
    common.workers.spawn("orchestrator", orchestrator::run(orchestrator, common.workers.stop.clone()));
}

fn catalog_write(common: &Common<'_>) -> product::CatalogWrite {
    match &common.config.catalog.admin_token {
        Some(token) if !common.config.catalog_open(common.role) => {
            product::CatalogWrite::Admin { token: token.expose().to_owned() }
        }
        // Without a token it is open: the configuration does not allow anything else.
        Some(_) | None => product::CatalogWrite::Open,
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

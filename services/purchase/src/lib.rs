//! The purchase service: what was accepted, how far each saga is, its history.
//!
//! It owns the tables `purchase_*` and `customer_*` and the view `purchase` over them, and it is the initiator of the purchase saga: it
//! starts each and hears of its end. Its parts:
//!
//! - `accept`: a cart is written down, which is the intent and the outbox in one; then its saga is started.
//! - `results`: the end of a saga is written, then announced.
//! - `reconcile`: whatever is open and due is started again.
//! - `live`, `cursor`, `stream`: who watches, and what is sent to whom.
//! - `follow`, `feed`, `news`: what other replicas on the same database do, from the database and from each other.
//! - `http`, `store`, `model`, `admission`, `metrics`.
//!
//! What never happens: an accepted purchase that is not in the database, one that is open and never due, one that
//! ends twice, an event before its effect, an event stream with a gap.

mod accept;
mod admission;
mod cursor;
mod feed;
mod follow;
mod http;
mod live;
mod metrics;
mod model;
mod news;
mod reconcile;
mod results;
mod store;
mod stream;

use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use bus::Bus;
use db::Db;
use db::ids::{Ids, IdsError};
use drive::Book;
use live::Replicas;
use serve::auth::Verifier;
use serve::random::Random;
use shop::calls::CheckProducts;
use shop::purchase::purchase_saga;
use telemetry::metrics::PubsubMetrics;
use telemetry::{Registry, Spans};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use wire::time::Clock;

pub use feed::Feed;

/// The schema of the service's database.
pub const MIGRATIONS: &[db::Migration] = &[
    db::Migration {
        number: 1,
        name: "purchase",
        sqlite: include_str!("../migrations/sqlite/0001_purchase.sql"),
        mysql: include_str!("../migrations/mysql/0001_purchase.sql"),
    },
    db::ids::migration(2),
    db::Migration {
        number: 3,
        name: "lifecycle",
        sqlite: include_str!("../migrations/sqlite/0003_lifecycle.sql"),
        // MySQL came later: its first schema has these tables.
        mysql: "",
    },
];

/// The service's settings.
#[derive(Clone, Debug)]
pub struct Config {
    /// Purchases that may be under way at a time. More are refused with 503.
    pub max_in_flight: usize,
    /// Purchases of one customer that may be under way at a time. More are refused with 429.
    pub max_open_per_customer: usize,
    /// Different products in one cart at most.
    pub max_cart_lines: usize,
    /// The time after which a purchase that has not been paid is cancelled.
    pub deadline: Duration,
    /// The time after which a purchase is looked after for the first time, and the delay before the second try, which
    /// doubles with each.
    pub retry_first: Duration,
    /// The longest delay between two tries.
    pub retry_max: Duration,
    /// After so many tries behind its deadline a purchase is left to an operator.
    pub max_tries: u32,
    /// How often the reconciler looks for purchases that are due. Not zero.
    pub look_interval: Duration,
    /// How often participants are told which barrier rows they may forget. Not zero.
    pub purge_interval: Duration,
    /// What has ended may be forgotten by the participants after this time: longer than any message stays under way.
    pub purge_grace: Duration,
    /// Requests that are accepted in one transaction at most.
    pub accept_batch_requests: usize,
    /// Requests that may wait to be accepted. More are refused with 503.
    pub accept_queue_requests: usize,
    /// How long a batch of purchases may take to be accepted before those who wait behind it are refused with 503.
    pub accept_patience: Duration,
    /// How far back an event stream without a cursor begins.
    pub look_back: Duration,
    /// Event streams at a time. More are refused with 503.
    pub max_streams: usize,
    /// Event streams of one customer at a time. More are refused with 429.
    pub max_streams_per_customer: usize,
    /// Reports of sagas that are written in one transaction at most.
    pub result_batch_messages: usize,
    /// Whether other replicas work on the same database even if it is a file; on a server they may, whatever is said here. A
    /// start then takes nothing over, and what they do is followed.
    pub replicated: bool,
}

impl Default for Config {
    fn default() -> Config {
        Config {
            max_in_flight: 16_384,
            max_open_per_customer: 1_000,
            max_cart_lines: 100,
            deadline: Duration::from_secs(60),
            retry_first: Duration::from_secs(5),
            retry_max: Duration::from_secs(60),
            max_tries: 20,
            look_interval: Duration::from_millis(500),
            purge_interval: Duration::from_secs(60),
            purge_grace: Duration::from_secs(600),
            accept_batch_requests: 1_024,
            accept_queue_requests: 8_192,
            accept_patience: Duration::from_secs(8),
            look_back: Duration::from_secs(30),
            max_streams: 16_384,
            max_streams_per_customer: 32,
            result_batch_messages: 1_024,
            replicated: false,
        }
    }
}

/// What the service is made of.
pub struct Parts {
    /// Its settings.
    pub config: Config,
    /// Its database, opened with [`MIGRATIONS`].
    pub db: Db,
    /// Where what starts sagas goes to, and where reports come from.
    pub bus: Bus,
    /// The sagas that are started here. Of others an orchestrator is told.
    pub book: Book,
    /// How the replicas of the service hear of each other.
    pub feed: Feed,
    /// The time.
    pub clock: Clock,
    /// Where new traces get their ids from.
    pub random: Random,
    /// Checks access tokens.
    pub verifier: Verifier,
    /// Tells which products exist, and at which price.
    pub products: CheckProducts,
    /// Where the series of sagas are registered.
    pub registry: Registry,
    /// Counts the service's messages.
    pub metrics: PubsubMetrics,
    /// Records what the service does for sampled purchases.
    pub spans: Spans,
    /// Ends the event streams, so that a server that drains does not wait for them.
    pub stop_streams: CancellationToken,
    /// Ends the tasks that drive sagas.
    pub stop: CancellationToken,
}

/// A part of the service that must run as long as the service does, under its name.
pub type Task = (&'static str, Pin<Box<dyn Future<Output = ()> + Send>>);

/// Why the service did not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// No worker id for its ids can be had.
    #[error(transparent)]
    Ids(#[from] IdsError),
    /// The database failed.
    #[error(transparent)]
    Database(#[from] db::Error),
}

/// The service, ready to be reached through its doors.
pub struct PurchaseService {
    door: Arc<http::Parts>,
    reconciler: reconcile::Reconciler,
    /// Purchases that were open when the service started.
    pub adopted: usize,
}

/// Prepares the service and adopts what is open. The caller runs the tasks: some end with [`Parts::stop`], the
/// others when the service and everything that was made from it is dropped, with their work done.
///
/// # Errors
/// See [`StartError`].
pub async fn start(parts: Parts) -> Result<(PurchaseService, Vec<Task>), StartError> {
    let Parts { config, db, bus, book, feed, clock, random, verifier, products, .. } = parts;
    let Parts { registry, metrics, spans, stop_streams, stop, .. } = parts;
    let ids = Ids::lease(db.clone(), clock.clone()).await?;
    let definition = Arc::new(purchase_saga());
    let admission = admission::Admission::new(config.max_in_flight, config.max_open_per_customer);
    let sagas = metrics::SagaMetrics::new(&registry, &metrics);
    let mut tasks: Vec<Task> = Vec::new();

    let announced = db.read(store::last_finished_no).await?;
    let bounds = live::Bounds {
        max_streams: config.max_streams,
        max_streams_per_customer: config.max_streams_per_customer,
    };
    let replicas = if config.replicated || db.is_shared() { Replicas::Many } else { Replicas::One };
    let mut live_parts = live::Parts {
        announced,
        bounds,
        admission: admission.clone(),
        others: feed::Outgoing::nobody(),
        reader: None,
    };
    let live = match replicas {
        Replicas::One => start_live(live_parts, &mut tasks),
        Replicas::Many => {
            let metrics = metrics::FeedMetrics::new(&registry);
            let own = news::ReplicaId(u64::from_be_bytes(random.bytes()));
            let (reader, missing) = mpsc::channel(1);
            live_parts.reader = Some(reader);
            let ends = feed.open(own, &metrics);
            if let Some(feed::Ends { outgoing, .. }) = &ends {
                live_parts.others = outgoing.clone();
            }
            let live = start_live(live_parts, &mut tasks);
            if let Some(feed::Ends { sending, hearing, .. }) = ends {
                tasks.push(("purchase news to others", Box::pin(sending.run())));
                tasks.push(("purchase news of others", Box::pin(hearing.run(live.clone(), stop.clone()))));
            }
            let (db, clock) = (db.clone(), clock.clone());
            let follower = follow::Follower { db, live: live.clone(), clock, missing, metrics };
            tasks.push(("purchase follower", Box::pin(follower.run(stop.clone()))));
            live
        }
    };

    let reconciler = reconcile::Reconciler {
        db: db.clone(),
        bus: bus.clone(),
        clock: clock.clone(),
        live: live.clone(),
        admission: admission.clone(),
        metrics: sagas.clone(),
        spans: spans.clone(),
        settings: reconcile::Settings {
            retry_first: config.retry_first,
            retry_max: config.retry_max,
            max_tries: config.max_tries,
            look_interval: config.look_interval,
            purge_interval: config.purge_interval,
            purge_grace: config.purge_grace,
            replicas,
        },
    };
    let adopted = reconciler.adopt().await?;
    tasks.push(("purchase reconciler", Box::pin(reconciler.clone().run(stop.clone()))));

    let (accept, accepting) = accept::start(accept::Parts {
        db: db.clone(),
        ids,
        bus: bus.clone(),
        book,
        clock: clock.clone(),
        live: live.clone(),
        metrics: sagas.clone(),
        spans: spans.clone(),
        settings: accept::Settings {
            batch_requests: config.accept_batch_requests,
            queue_requests: config.accept_queue_requests,
            patience: config.accept_patience,
            deadline: config.deadline,
            first_wake: config.retry_first,
        },
    });
    tasks.push(("purchase acceptance", Box::pin(accepting)));

    let results = results::Parts {
        db: db.clone(),
        bus,
        definition: Arc::clone(&definition),
        live: live.clone(),
        metrics: sagas,
        pubsub: metrics,
        spans,
        batch_messages: config.result_batch_messages,
    };
    tasks.push(("purchase results", Box::pin(results::run(results, stop))));

    let door = Arc::new(http::Parts {
        db,
        clock,
        random: random.for_ids(),
        verifier,
        products,
        definition,
        accept,
        admission,
        live,
        max_cart_lines: config.max_cart_lines,
        look_back: config.look_back,
        stop: stop_streams,
    });
    Ok((PurchaseService { door, reconciler, adopted }, tasks))
}

/// The rest of the start already sends to it, so it runs at once.
fn start_live(parts: live::Parts, tasks: &mut Vec<Task>) -> live::Live {
    let (live, watching) = live::Live::start(parts);
    let watching = tokio::spawn(watching);
    tasks.push(("purchase live view", Box::pin(async move { ended_well(watching.await) })));
    live
}

/// A task that panicked takes whoever waits for it along.
fn ended_well(result: Result<(), tokio::task::JoinError>) {
    if let Err(error) = result
        && let Ok(panic) = error.try_into_panic()
    {
        std::panic::resume_unwind(panic);
    }
}

impl PurchaseService {
    /// Its HTTP routes.
    pub fn router(&self) -> Router {
        http::router(Arc::clone(&self.door))
    }

    /// Routes for the admin listener: what was left to an operator, and trying it again.
    pub fn operator_router(&self) -> Router {
        http::operator_router(self.reconciler.clone())
    }
}

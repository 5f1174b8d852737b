//! The order service: what was ordered.
//!
//! It owns the table `purchase_order` and its barrier. An order is created by a purchase's saga, under the purchase's id, and
//! deleted if the purchase is rolled back.
//!
//! What never happens: an order that anybody but its customer sees, or two orders for one purchase.

mod copies;
mod http;
mod orders;
mod store;

use axum::Router;
use bus::Bus;
use db::Db;
use participant::{Book, barrier};
use serve::auth::Verifier;
use shop::calls::GetProducts;
use shop::purchase::{ORCHESTRATOR, ORDER_COMMANDS};
use telemetry::Spans;
use telemetry::metrics::PubsubMetrics;
use tokio_util::sync::CancellationToken;
use wire::time::Clock;

pub use copies::{Copies, KEPT_FROM_AGE};

/// The schema of the service's database.
pub const MIGRATIONS: &[db::Migration] = &[
    db::Migration {
        number: 1,
        name: "order",
        sqlite: include_str!("../migrations/sqlite/0001_order.sql"),
        mysql: include_str!("../migrations/mysql/0001_order.sql"),
    },
    barrier::migration(2),
    cache::mark::migration(3),
];

/// What the service is made of.
pub struct Parts {
    /// Its database, opened with [`MIGRATIONS`].
    pub db: Db,
    /// Copies of orders; none where the database is as near.
    pub copies: Option<Copies>,
    /// Where its commands come from.
    pub bus: Bus,
    /// The time.
    pub clock: Clock,
    /// Checks access tokens.
    pub verifier: Verifier,
    /// Tells the names of products.
    pub products: GetProducts,
    /// The sagas that its participant drives on when it has recorded a reply.
    pub book: Book,
    /// Counts what its participant does.
    pub metrics: PubsubMetrics,
    /// Records what its participant does for sampled sagas.
    pub spans: Spans,
    /// The bounds of its participant.
    pub settings: participant::Settings,
}

/// Its HTTP routes.
pub fn router(parts: &Parts) -> Router {
    http::router(http::Door {
        db: parts.db.clone(),
        copies: parts.copies.clone(),
        verifier: parts.verifier.clone(),
        products: parts.products.clone(),
    })
}

/// Takes part in purchase sagas until `stop`.
pub async fn run(parts: Parts, stop: CancellationToken) {
    let Parts { db, bus, clock, book, metrics, spans, settings, .. } = parts;
    let participant = participant::Parts {
        participant: orders::Orders,
        db,
        bus,
        commands: ORDER_COMMANDS,
        book,
        replies: ORCHESTRATOR,
        clock,
        metrics,
        spans,
        settings,
    };
    participant::run(participant, stop).await;
}

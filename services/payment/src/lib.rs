//! The payment service: what was paid.
//!
//! It owns the table `payment` and its barrier. A payment is the pivot of its purchase's saga, under the
//! purchase's id: once it is there, the purchase succeeds.
//!
//! What never happens: a payment that anybody but its customer sees, two payments for one purchase, or a payment that is
//! taken back.

mod copies;
mod http;
mod payments;
mod store;

use axum::Router;
use bus::Bus;
use db::Db;
use participant::{Book, barrier};
use serve::auth::Verifier;
use shop::purchase::{ORCHESTRATOR, PAYMENT_COMMANDS};
use telemetry::Spans;
use telemetry::metrics::PubsubMetrics;
use tokio_util::sync::CancellationToken;
use wire::time::Clock;

pub use copies::Copies;

/// The schema of the service's database.
pub const MIGRATIONS: &[db::Migration] = &[
    db::Migration {
        number: 1,
        name: "payment",
        sqlite: include_str!("../migrations/sqlite/0001_payment.sql"),
        mysql: include_str!("../migrations/mysql/0001_payment.sql"),
    },
    barrier::migration(2),
];

/// What the service is made of.
pub struct Parts {
    /// Its database, opened with [`MIGRATIONS`].
    pub db: Db,
    /// Copies of payments; none where the database is as near.
    pub copies: Option<Copies>,
    /// Where its commands come from.
    pub bus: Bus,
    /// The time.
    pub clock: Clock,
    /// Checks access tokens.
    pub verifier: Verifier,
    /// A payment above it is declined, in the currency's unit as given.
    pub limit: i64,
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
    })
}

/// Takes part in purchase sagas until `stop`.
pub async fn run(parts: Parts, stop: CancellationToken) {
    let Parts { db, bus, clock, limit, book, metrics, spans, settings, .. } = parts;
    let participant = participant::Parts {
        participant: payments::Payments { limit },
        db,
        bus,
        commands: PAYMENT_COMMANDS,
        book,
        replies: ORCHESTRATOR,
        clock,
        metrics,
        spans,
        settings,
    };
    participant::run(participant, stop).await;
}

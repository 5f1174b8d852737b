//! The operator's door of a process: metrics, liveness, readiness, the bus's dead letters.

use axum::Router;
use axum::routing::get;
use bus::Bus;
use gateway::Gateway;
use serde::Serialize;
use serve::ApiError;
use serve::admin::{self, Readiness};
use serve::error::RETRY_AFTER_SECONDS;
use serve::extract::Json;

use super::engines::Progress;
use super::health::Health;
use super::services::Common;

/// Whether the process should be sent anything: it has started, is not stopping, and what it stands on answers.
pub(super) fn readiness(
    common: &Common<'_>,
    progress: &Progress,
    health: &Health,
    gateway: Option<Gateway>,
) -> Readiness {
    let (progress, stopping, health) = (progress.clone(), common.doors.stop.clone(), health.clone());
    Readiness::new()
        .check("start", move || progress.check())
        .check("engines", move || health.check())
        .check("replicas", move || gateway.as_ref().map_or(Ok(()), Gateway::ready))
        .check("shop", move || if stopping.is_cancelled() { Err("stopping".to_owned()) } else { Ok(()) })
}

/// Metrics, liveness, and readiness.
pub(super) fn routes(common: &Common<'_>, readiness: Readiness) -> Router {
    admin::router(common.registry.clone(), readiness)
}

/// `/bus/parked`: messages that nobody could understand.
pub(super) fn bus_routes(bus: Bus) -> Router {
    Router::new().route("/bus/parked", get(async move || parked(&bus).await))
}

#[derive(Serialize)]
struct DeadLetter {
    subject: &'static str,
    id: String,
    deliveries: u32,
    bytes: usize,
    reason: String,
}

/// They may be lost with the bus; the purchases behind them are not.
async fn parked(bus: &Bus) -> Result<Json<Vec<DeadLetter>>, ApiError> {
    let letter = |parked: bus::Parked| DeadLetter {
        subject: parked.subject.0,
        id: parked.envelope.id.to_string(),
        deliveries: parked.count,
        bytes: parked.envelope.body.len(),
        reason: parked.reason,
    };
    let unavailable = |error: bus::Unavailable| ApiError::unavailable(error.to_string(), RETRY_AFTER_SECONDS);
    let parked = bus.parked().await.map_err(unavailable)?;
    Ok(Json(parked.into_iter().map(letter).collect()))
}

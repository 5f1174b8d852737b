//! The operator's door: metrics, liveness, readiness. It is bound to an address of its own and asks for no
//! token, so it never shows or changes anything that belongs to a customer.

use std::fmt;
use std::sync::Arc;

use axum::Router;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use http::header::CONTENT_TYPE;
use telemetry::Registry;

use crate::error::{ApiError, Msg, RETRY_AFTER_SECONDS};

type Check = Arc<dyn Fn() -> Result<(), String> + Send + Sync>;

/// The named conditions under which this process can serve.
#[derive(Clone, Default)]
pub struct Readiness(Vec<(&'static str, Check)>);

impl Readiness {
    /// No condition: always ready.
    pub fn new() -> Readiness {
        Readiness::default()
    }

    /// Adds a condition. It is asked at every probe, so it must be quick; its error says what is missing.
    #[must_use]
    pub fn check(
        mut self,
        name: &'static str,
        ready: impl Fn() -> Result<(), String> + Send + Sync + 'static,
    ) -> Readiness {
        self.0.push((name, Arc::new(ready)));
        self
    }

    /// Ok, or what is not ready and why: `bus: full; product: migrating`.
    ///
    /// # Errors
    /// The conditions that do not hold.
    pub fn probe(&self) -> Result<(), String> {
        let missing: Vec<String> = self
            .0
            .iter()
            .filter_map(|(name, check)| check().err().map(|reason| format!("{name}: {reason}")))
            .collect();
        if missing.is_empty() { Ok(()) } else { Err(missing.join("; ")) }
    }
}

impl fmt::Debug for Readiness {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.0.iter().map(|(name, _)| name)).finish()
    }
}

/// `/metrics` (OpenMetrics text), `/healthz` (the process answers), `/readyz` (it can serve; 503 names what
/// is missing).
pub fn router(registry: Registry, readiness: Readiness) -> Router {
    Router::new()
        .route("/metrics", get(metrics).with_state(registry))
        .route("/healthz", get(|| async { Msg::ok() }))
        .route("/readyz", get(readyz).with_state(readiness))
}

async fn metrics(State(registry): State<Registry>) -> Response {
    match registry.encode() {
        Ok(text) => ([(CONTENT_TYPE, telemetry::metrics::CONTENT_TYPE)], text).into_response(),
        Err(error) => ApiError::internal(format_args!("metrics: {error}")).into_response(),
    }
}

async fn readyz(State(readiness): State<Readiness>) -> Response {
    match readiness.probe() {
        Ok(()) => Msg::ok().into_response(),
        Err(missing) => {
            ApiError::unavailable(format!("not ready: {missing}"), RETRY_AFTER_SECONDS).into_response()
        }
    }
}

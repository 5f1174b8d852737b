//! The gateway: one address before all replicas of all services, for the HTTP API and for gRPC.
//!
//! It takes a request in whole (requests are small), sends it to a replica, and passes the answer on as it comes.
//!
//! What never happens:
//! - A request that may have been handled is sent again, unless handling it twice is as good as once: GET and HEAD, a
//!   purchase with an `Idempotency-Key`, a gRPC call that reads.
//! - A refusal with 503 for a request that may have had an effect and may not be sent again: that is 502.
//! - An event stream is held back, gathered, or read faster than its client takes it.
//! - A customer is moved to another replica while its own lives.
//!
//! It verifies no token and knows no body: the services do. CORS is the gateway's affair, and so not the services'.

mod answer;
mod forward;
mod grpc;
mod headers;
mod pool;
mod route;
mod traced;

use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::extract::Request;
use axum::response::Response;
use futures_util::future::join_all;
use peers::{Addresses, Peers};
use serve::edge::{self, EdgeConfig, InvalidOrigin, Protected};
use telemetry::metrics::{HttpMetrics, OutcomeCounter};
use telemetry::{Registry, Spans};
use tokio_util::sync::CancellationToken;
use tower::Service as _;

use crate::pool::Pool;
use crate::route::Service;

/// How long a replica may take until the head of its answer is there. Then the request is answered 504.
pub const HEAD_TIMEOUT: Duration = Duration::from_secs(30);

/// Where the replicas of each service are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Upstreams {
    /// The account service's.
    pub account: Addresses,
    /// The product service's.
    pub product: Addresses,
    /// The order service's.
    pub order: Addresses,
    /// The payment service's.
    pub payment: Addresses,
    /// The purchase service's.
    pub purchase: Addresses,
}

/// What the gateway is made of.
#[derive(Debug)]
pub struct Parts {
    /// Where the replicas are.
    pub upstreams: Upstreams,
    /// How long a replica may take until the head of its answer is there; [`HEAD_TIMEOUT`] unless there is a reason.
    pub head_timeout: Duration,
    /// Counts requests, and what became of them.
    pub registry: Registry,
    /// Records what becomes of sampled requests.
    pub spans: Spans,
    /// Ends the event streams, so that their clients resume elsewhere.
    pub stop_streams: CancellationToken,
}

/// The gateway. Cloning is cheap.
#[derive(Debug, Clone)]
pub struct Gateway(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    /// Indexed by `Service`.
    peers: [Peers<Pool>; Service::ALL.len()],
    stop_streams: CancellationToken,
    requests: HttpMetrics,
    spans: Spans,
    outcomes: Outcomes,
}

impl Inner {
    fn peers(&self, service: Service) -> &Peers<Pool> {
        &self.peers[service as usize]
    }
}

/// `gateway_upstream_total{outcome}`: what became of tries that did not go well.
struct Outcomes(OutcomeCounter);

impl std::fmt::Debug for Outcomes {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Outcomes")
    }
}

/// Prepares a gateway. It finds its replicas once [`Gateway::run`] runs.
pub fn start(parts: Parts) -> Gateway {
    let Parts { upstreams, head_timeout, registry, spans, stop_streams } = parts;
    let Upstreams { account, product, order, payment, purchase } = upstreams;
    let peers = |service: Service, addresses| {
        Peers::new(service.name(), addresses, move |address| Pool::new(address, head_timeout))
    };
    Gateway(Arc::new(Inner {
        peers: [
            peers(Service::Account, account),
            peers(Service::Product, product),
            peers(Service::Order, order),
            peers(Service::Payment, payment),
            peers(Service::Purchase, purchase),
        ],
        stop_streams,
        requests: HttpMetrics::new(&registry, "gateway"),
        spans,
        outcomes: Outcomes(OutcomeCounter::new(&registry, "gateway_upstream", "Tries that did not go well")),
    }))
}

impl Gateway {
    /// What [`serve::serve`] serves, with the limits around it. `health` answers `grpc.health.v1.Health`, for the gateway itself.
    ///
    /// # Errors
    /// [`InvalidOrigin`] for a CORS origin that is none.
    pub fn protected(&self, health: Router, config: &EdgeConfig) -> Result<Protected, InvalidOrigin> {
        let gateway = self.clone();
        edge::protected_handler(move |request| gateway.clone().answer(health.clone(), request), config)
    }

    /// Ok when each service has a replica that answers; otherwise which have none.
    ///
    /// # Errors
    /// What is missing.
    pub fn ready(&self) -> Result<(), String> {
        let missing = self.0.peers.iter().filter(|peers| !peers.any_seen());
        let missing: Vec<String> = missing
            .map(|peers| format!("{}: none of {} replicas answers", peers.service(), peers.addresses().len()))
            .collect();
        if missing.is_empty() { Ok(()) } else { Err(missing.join("; ")) }
    }

    /// Looks for replicas and whether they live, until `stop`.
    pub async fn run(self, stop: CancellationToken) {
        join_all(self.0.peers.iter().map(|peers| peers.clone().run(stop.clone()))).await;
    }

    async fn answer(self, mut health: Router, request: Request) -> Response {
        if !grpc::is_call(&request) {
            self.0.forward(request).await
        } else if route::asks_for_health(request.uri().path()) {
            health.call(request).await.unwrap_or_else(|never| match never {})
        } else {
            self.0.call(request).await
        }
    }
}

//! What an operator sees of the processes: `/replicas`, and how many of them are up, in `/metrics`.

use std::net::SocketAddr;

use axum::Router;
use axum::routing::get;
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric};
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;
use serde::Serialize;
use serve::extract::Json;
use telemetry::Registry;

use super::replica::{Replica, Status};

/// One process.
#[derive(Serialize)]
struct Shown {
    name: String,
    service: &'static str,
    api: SocketAddr,
    admin: SocketAddr,
    #[serde(flatten)]
    status: Status,
}

/// `/replicas`: every process with its name, addresses, process id, readiness and restarts.
pub(super) fn router(replicas: Vec<Replica>) -> Router {
    let show = move || {
        let shown = replicas.iter().map(|replica| Shown {
            name: replica.place.name.clone(),
            service: replica.place.service.name(),
            api: replica.place.api,
            admin: replica.place.admin,
            status: replica.status(),
        });
        Json(shown.collect::<Vec<_>>())
    };
    Router::new().route("/replicas", get(async move || show()))
}

/// Which processes are not ready, and why: `order-1: ...; order-2: ...`. Empty when all are.
pub(super) fn missing(replicas: &[Replica]) -> String {
    let missing = replicas.iter().filter_map(|replica| {
        let status = replica.status();
        let reason = status.reason.unwrap_or_default();
        (!status.ready).then(|| format!("{}: {reason}", replica.place.name))
    });
    missing.collect::<Vec<_>>().join("; ")
}

/// Counts the processes at each scrape.
pub(super) fn register(registry: &Registry, replicas: Vec<Replica>) {
    registry.with(|registry| registry.register_collector(Box::new(Processes(replicas))));
}

struct Processes(Vec<Replica>);

impl std::fmt::Debug for Processes {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Processes")
    }
}

impl Collector for Processes {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), std::fmt::Error> {
        let up = ConstGauge::new(0_i64);
        let mut family = encoder.encode_descriptor(
            "supervisor_process_ready",
            "1 for each process that is ready, else 0",
            None,
            up.metric_type(),
        )?;
        for replica in &self.0 {
            let labels =
                [("process", replica.place.name.as_str()), ("service", replica.place.service.name())];
            let ready = ConstGauge::new(i64::from(replica.status().ready));
            ready.encode(family.encode_family(&labels)?)?;
        }
        let restarts = ConstCounter::new(0_u64);
        let mut family = encoder.encode_descriptor(
            "supervisor_process_restarts",
            "How often each process was started again",
            None,
            restarts.metric_type(),
        )?;
        for replica in &self.0 {
            let labels =
                [("process", replica.place.name.as_str()), ("service", replica.place.service.name())];
            let restarts = ConstCounter::new(replica.status().restarts);
            restarts.encode(family.encode_family(&labels)?)?;
        }
        Ok(())
    }
}

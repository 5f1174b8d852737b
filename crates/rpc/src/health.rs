//! `grpc.health.v1.Health`: whether this process should be sent anything. It is what `/readyz` says, in gRPC's words.

use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use futures_util::Stream;
use futures_util::stream::unfold;
use serve::admin::Readiness;
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status};
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_server::{Health, HealthServer};
use tonic_health::pb::{HealthCheckRequest, HealthCheckResponse};

use crate::server::in_time;

/// How often it is looked whether there is news for somebody who watches. That the process stops is told at once.
const LOOK_EVERY: Duration = Duration::from_millis(500);

/// Who may watch at the same time: each looks by itself. More are refused; they can still ask.
pub const MAX_WATCHERS: usize = 256;

/// Everything that `grpc.health.v1.Health` answers. It knows one service, the whole process, whose name is empty. Whoever watches is
/// told before the process stops, and that is the last that is told.
pub fn health(readiness: Readiness, stop: CancellationToken) -> Router {
    let health =
        HealthServer::new(Process { readiness, stop, watchers: Arc::new(Semaphore::new(MAX_WATCHERS)) });
    in_time(Router::new().route_service("/grpc.health.v1.Health/{method}", health))
}

#[derive(Clone)]
struct Process {
    readiness: Readiness,
    stop: CancellationToken,
    watchers: Arc<Semaphore>,
}

impl Process {
    fn status(&self, service: &str) -> ServingStatus {
        if !service.is_empty() {
            ServingStatus::ServiceUnknown
        } else if self.stop.is_cancelled() || self.readiness.probe().is_err() {
            ServingStatus::NotServing
        } else {
            ServingStatus::Serving
        }
    }

    /// The status, once it is another one than what was told last; none when there will be no other.
    async fn news(&self, service: &str, told: Option<ServingStatus>) -> Option<ServingStatus> {
        loop {
            let stopping = self.stop.is_cancelled();
            let status = self.status(service);
            if told != Some(status) {
                return Some(status);
            }
            if stopping {
                return None;
            }
            tokio::select! {
                () = self.stop.cancelled() => {}
                () = tokio::time::sleep(LOOK_EVERY) => {}
            }
        }
    }
}

#[tonic::async_trait]
impl Health for Process {
    async fn check(
        &self,
        request: Request<HealthCheckRequest>,
    ) -> Result<Response<HealthCheckResponse>, Status> {
        let service = request.into_inner().service;
        match self.status(&service) {
            ServingStatus::ServiceUnknown => {
                Err(Status::not_found(format!("no service {service:?} is known here")))
            }
            status => Ok(Response::new(HealthCheckResponse { status: status.into() })),
        }
    }

    type WatchStream = Pin<Box<dyn Stream<Item = Result<HealthCheckResponse, Status>> + Send>>;

    async fn watch(
        &self,
        request: Request<HealthCheckRequest>,
    ) -> Result<Response<Self::WatchStream>, Status> {
        let place = Arc::clone(&self.watchers).try_acquire_owned().map_err(|_| {
            Status::resource_exhausted(format!("{MAX_WATCHERS} clients watch already; ask with Check"))
        })?;
        let (process, service) = (self.clone(), request.into_inner().service);
        let news = unfold((process, service, None, place), async |(process, service, told, place)| {
            let status = process.news(&service, told).await?;
            let response = HealthCheckResponse { status: status.into() };
            Some((Ok(response), (process, service, Some(status), place)))
        });
        Ok(Response::new(Box::pin(news)))
    }
}

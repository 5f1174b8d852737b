//! Spans reach a collector: one that speaks OTLP, on a port of its own.
#![allow(clippy::disallowed_methods, reason = "spans take the machine's clock")]

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};

use opentelemetry_proto::tonic::collector::trace::v1::trace_service_server::{
    TraceService, TraceServiceServer,
};
use opentelemetry_proto::tonic::collector::trace::v1::{
    ExportTraceServiceRequest, ExportTraceServiceResponse,
};
use opentelemetry_proto::tonic::common::v1::any_value;
use opentelemetry_proto::tonic::trace::v1::Span;
use telemetry::spans::{Collector, Detail, Interval, Kind};
use telemetry::{Registry, TraceContext};
use tokio::net::TcpListener;
use tokio::sync::Notify;
use tokio_stream::wrappers::TcpListenerStream;
use tonic::{Request, Response, Status};

/// Only a failing test waits this long.
const PATIENCE: Duration = Duration::from_secs(20);

/// What has arrived: each span under its service's name.
#[derive(Clone, Default)]
struct Arrived {
    spans: Arc<Mutex<Vec<(String, Span)>>>,
    more: Arc<Notify>,
}

#[tonic::async_trait]
impl TraceService for Arrived {
    async fn export(
        &self,
        request: Request<ExportTraceServiceRequest>,
    ) -> Result<Response<ExportTraceServiceResponse>, Status> {
        let mut spans = self.spans.lock().expect("nobody panics under it");
        for of_resource in request.into_inner().resource_spans {
            let attributes = of_resource.resource.map(|resource| resource.attributes).unwrap_or_default();
            let name = attributes.into_iter().find(|attribute| attribute.key == "service.name");
            let name = match name.and_then(|name| name.value?.value) {
                Some(any_value::Value::StringValue(name)) => name,
                other => panic!("a service has a name, not {other:?}"),
            };
            let all = of_resource.scope_spans.into_iter().flat_map(|of_scope| of_scope.spans);
            spans.extend(all.map(|span| (name.clone(), span)));
        }
        self.more.notify_one();
        Ok(Response::new(ExportTraceServiceResponse::default()))
    }
}

impl Arrived {
    async fn when(&self, count: usize) -> Vec<(String, Span)> {
        let enough = async {
            loop {
                let spans = self.spans.lock().expect("nobody panics under it").clone();
                if spans.len() >= count {
                    return spans;
                }
                self.more.notified().await;
            }
        };
        tokio::time::timeout(PATIENCE, enough).await.expect("the spans should have arrived by now")
    }
}

async fn collector(listener: TcpListener) -> Arrived {
    let arrived = Arrived::default();
    let service = TraceServiceServer::new(arrived.clone());
    let server = tonic::transport::Server::builder().add_service(service);
    tokio::spawn(server.serve_with_incoming(TcpListenerStream::new(listener)));
    arrived
}

async fn listen() -> (TcpListener, String) {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let endpoint = format!("http://{}", listener.local_addr().expect("an address"));
    (listener, endpoint)
}

fn root() -> TraceContext {
    TraceContext::new(0x4bf9_2f35_77b3_4da6_a3ce_929d_0e0e_4736, 0x00f0_67aa_0ba9_02b7, true)
        .expect("a context")
}

#[tokio::test]
async fn spans_arrive_as_a_tree_under_their_services_names() {
    let (listener, endpoint) = listen().await;
    let arrived = collector(listener).await;
    let to = Collector::new(&endpoint, &Registry::new()).expect("an endpoint");
    let (purchase, product) = (to.service("purchase"), to.service("product"));
    let began = SystemTime::now() - Duration::from_millis(5);

    let accepted = purchase.below(&root(), Kind::Server, "accept", Interval::since(began), &[]);
    let details = [("db.rows", Detail::Count(3)), ("saga.step", Detail::Name("RESERVE"))];
    product.below(&accepted, Kind::Consumer, "reserve", Interval::since(began), &details);
    purchase.record(&root(), None, Kind::Server, "buy", Interval::since(began), &[]);
    let unsampled = TraceContext::new(1, 1, false).expect("a context");
    purchase.below(&unsampled, Kind::Internal, "unseen", Interval::since(began), &[]);
    purchase.below(&root(), Kind::Internal, "seen", Interval::since(began), &[]);

    let spans = arrived.when(4).await;
    let names: BTreeSet<(&str, &str)> =
        spans.iter().map(|(service, span)| (service.as_str(), span.name.as_str())).collect();
    let expected =
        [("product", "reserve"), ("purchase", "accept"), ("purchase", "buy"), ("purchase", "seen")];
    assert_eq!(names, BTreeSet::from(expected));
    let span = |name: &str| &spans.iter().find(|(_, span)| span.name == name).expect("it arrived").1;
    assert!(spans.iter().all(|(_, span)| span.trace_id == root().trace_id().to_be_bytes()));
    assert_eq!(span("buy").parent_span_id, Vec::<u8>::new(), "the root has nothing above it");
    assert_eq!(span("accept").parent_span_id, span("buy").span_id);
    assert_eq!(span("reserve").parent_span_id, span("accept").span_id);
    let keys: Vec<&str> = span("reserve").attributes.iter().map(|attribute| attribute.key.as_str()).collect();
    assert_eq!(keys, ["db.rows", "saga.step"]);
    assert!(span("buy").end_time_unix_nano > span("buy").start_time_unix_nano);
}

#[tokio::test]
async fn without_a_collector_nobody_waits_and_what_is_lost_is_counted() {
    let (listener, endpoint) = listen().await;
    drop(listener);
    let registry = Registry::new();
    let spans = Collector::new(&endpoint, &registry).expect("an endpoint").service("purchase");
    for _ in 0..3 {
        spans.below(&root(), Kind::Internal, "lost", Interval::since(SystemTime::now()), &[]);
    }
    let counted = async {
        while !registry.encode().expect("metrics").contains("trace_spans_dropped_total 3") {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(PATIENCE, counted).await.expect("the loss should be counted by now");
}

#[test]
fn an_endpoint_that_is_none_is_named() {
    let error = Collector::new("not an endpoint", &Registry::new()).expect_err("it is none");
    assert!(error.to_string().contains("not an endpoint"), "{error}");
}

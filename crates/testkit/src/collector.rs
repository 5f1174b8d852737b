//! A collector of spans: it speaks OTLP over gRPC, as Jaeger does, on a port of its own, and shows what it got.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use opentelemetry_proto::tonic::collector::trace::v1::trace_service_server::{
    TraceService, TraceServiceServer,
};
use opentelemetry_proto::tonic::collector::trace::v1::{
    ExportTraceServiceRequest, ExportTraceServiceResponse,
};
use opentelemetry_proto::tonic::common::v1::{AnyValue, any_value};
use opentelemetry_proto::tonic::trace::v1 as otlp;
use tokio::net::TcpListener;
use tokio::sync::Notify;
use tokio_stream::wrappers::TcpListenerStream;
use tonic::{Request, Response, Status};

pub use opentelemetry_proto::tonic::trace::v1::span::SpanKind;

/// One span, as it arrived.
#[derive(Clone, Debug, PartialEq)]
pub struct Span {
    /// Who recorded it.
    pub service: String,
    /// Its trace, in hexadecimal digits.
    pub trace: String,
    /// Its id, likewise.
    pub id: String,
    /// The id of the span above it; None for the root.
    pub parent: Option<String>,
    /// What it is to its trace.
    pub kind: SpanKind,
    /// Its name.
    pub name: String,
    /// Unix nanoseconds of its beginning and its end.
    pub times: (u64, u64),
    /// What else it says, as text.
    pub details: BTreeMap<String, String>,
    /// Whether it says that something failed.
    pub failed: bool,
}

impl Span {
    /// A detail's text; empty if there is none of this name.
    pub fn detail(&self, key: &str) -> &str {
        self.details.get(key).map_or("", String::as_str)
    }
}

/// A collector. It ends with the runtime that it was started on.
#[derive(Clone, Debug)]
pub struct Collector {
    endpoint: String,
    arrived: Arc<Arrived>,
}

#[derive(Debug, Default)]
struct Arrived {
    spans: Mutex<Vec<Span>>,
    more: Notify,
}

impl Arrived {
    fn spans(&self) -> MutexGuard<'_, Vec<Span>> {
        self.spans.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Collector {
    /// Listens on a free port.
    ///
    /// # Panics
    /// When there is none.
    pub async fn start() -> Collector {
        let listener = match TcpListener::bind("127.0.0.1:0").await {
            Ok(listener) => listener,
            Err(error) => panic!("no port for a collector: {error}"),
        };
        let endpoint = match listener.local_addr() {
            Ok(address) => format!("http://{address}"),
            Err(error) => panic!("no address of a collector: {error}"),
        };
        let collector = Collector { endpoint, arrived: Arc::default() };
        let service = TraceServiceServer::new(collector.clone());
        let server = tonic::transport::Server::builder().add_service(service);
        tokio::spawn(server.serve_with_incoming(TcpListenerStream::new(listener)));
        collector
    }

    /// Where it listens, as `trace.endpoint` wants it.
    pub fn endpoint(&self) -> &str {
        &self.endpoint
    }

    /// All that has arrived so far.
    pub fn spans(&self) -> Vec<Span> {
        self.arrived.spans().clone()
    }

    /// Looks at what has arrived, again with each arrival, until `look` finds in it what it wants.
    ///
    /// # Panics
    /// With what `look` missed last, when it has not found it within `limit`.
    pub async fn until<T>(&self, limit: Duration, look: impl Fn(&[Span]) -> Result<T, String>) -> T {
        let found = async {
            loop {
                let more = self.arrived.more.notified();
                if let Ok(found) = look(&self.spans()) {
                    return found;
                }
                more.await;
            }
        };
        match tokio::time::timeout(limit, found).await {
            Ok(found) => found,
            Err(_) => match look(&self.spans()) {
                Ok(found) => found,
                Err(missed) => panic!("not within {limit:?}: {missed}"),
            },
        }
    }
}

#[tonic::async_trait]
impl TraceService for Collector {
    async fn export(
        &self,
        request: Request<ExportTraceServiceRequest>,
    ) -> Result<Response<ExportTraceServiceResponse>, Status> {
        for of_resource in request.into_inner().resource_spans {
            let attributes = of_resource.resource.map(|resource| resource.attributes).unwrap_or_default();
            let name = attributes.into_iter().find(|attribute| attribute.key == "service.name");
            let service = text(name.and_then(|name| name.value));
            let all = of_resource.scope_spans.into_iter().flat_map(|of_scope| of_scope.spans);
            self.arrived.spans().extend(all.map(|span| understood(&service, span)));
        }
        self.arrived.more.notify_waiters();
        Ok(Response::new(ExportTraceServiceResponse::default()))
    }
}

fn understood(service: &str, span: otlp::Span) -> Span {
    let details = span.attributes.into_iter().map(|attribute| (attribute.key, text(attribute.value)));
    let status = span.status.map(|status| status.code);
    Span {
        service: service.to_owned(),
        trace: hex(&span.trace_id),
        id: hex(&span.span_id),
        parent: (!span.parent_span_id.is_empty()).then(|| hex(&span.parent_span_id)),
        kind: SpanKind::try_from(span.kind).unwrap_or_default(),
        name: span.name,
        times: (span.start_time_unix_nano, span.end_time_unix_nano),
        details: details.collect(),
        failed: status == Some(otlp::status::StatusCode::Error as i32),
    }
}

fn text(value: Option<AnyValue>) -> String {
    match value.and_then(|value| value.value) {
        Some(any_value::Value::StringValue(text)) => text,
        Some(any_value::Value::IntValue(number)) => number.to_string(),
        other => format!("{other:?}"),
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

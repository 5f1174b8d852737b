//! Spans of sampled purchases, sent to a collector by OTLP (gRPC; Jaeger takes it on port 4317).
//!
//! Work is done in batches of many sagas, so a span is not a scope of the code that runs: whoever has handled a
//! batch records, for each sampled saga in it, what was done for it and how long that took. What is off costs one
//! look at an `Option`; what is on but not sampled costs one look at the last byte of a `traceparent`.
//!
//! What never happens: a request waits for the collector; a queue without a bound (what does not fit is dropped, and
//! counted); a span of a trace that nobody asked to record.
//!
//! [`Serving`] is a request that is answered, [`Current`] on whose behalf the code works that runs now, [`Step`] something
//! that is done for them, [`Handling`] a batch of messages.

mod current;
mod handling;
mod serving;

use std::borrow::Cow;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use opentelemetry::trace::{SpanContext, SpanId, SpanKind, Status, TraceFlags, TraceId, TraceState};
use opentelemetry::{InstrumentationScope, KeyValue};
use opentelemetry_otlp::{WithExportConfig, WithTonicConfig};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::trace::{SpanData, SpanEvents, SpanExporter as _, SpanLinks};
use prometheus_client::metrics::counter::Counter;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tonic::transport::{Channel, Endpoint};

pub use current::{Current, Step, Within, current, step, within};
pub use handling::{Cause, Handling};
pub use serving::{Serving, TRACEPARENT};

use crate::{Registry, TraceContext};

/// Spans of one service that wait to be sent at most. More are dropped, and counted.
pub const QUEUE_SPANS: usize = 16_384;
/// Spans in one message to the collector at most.
const BATCH_SPANS: usize = 512;
/// How long spans wait for others before they are sent.
const LINGER: Duration = Duration::from_millis(500);
/// How long the collector may take to answer, and a connection to be made.
const EXPORT_TIMEOUT: Duration = Duration::from_secs(5);

/// How long what is recorded may take to be sent when the process stops.
pub const FLUSH_TIMEOUT: Duration = Duration::from_millis(500);

/// The attribute that says that something failed, and why (OpenTelemetry, "Recording errors"): its span has the status of an error.
pub const ERROR_TYPE: &str = "error.type";

/// The way to a collector, shared by the services of a process.
#[derive(Clone, Debug)]
pub struct Collector {
    channel: Channel,
    sampler: Sampler,
    dropped: Counter,
    stop: CancellationToken,
    senders: TaskTracker,
}

/// An endpoint that is none.
#[derive(Debug, thiserror::Error)]
#[error("{endpoint:?} is no endpoint such as http://127.0.0.1:4317: {cause}")]
pub struct InvalidEndpoint {
    endpoint: String,
    cause: tonic::transport::Error,
}

impl Collector {
    /// A collector at `endpoint` (`http://host:port`), and which of the traces that begin here it gets. Nothing is connected yet,
    /// and whether somebody answers there matters to nobody but the collector. Must be called on a tokio runtime.
    ///
    /// # Errors
    /// When the endpoint is no URI.
    pub fn new(endpoint: &str, sampler: Sampler, registry: &Registry) -> Result<Collector, InvalidEndpoint> {
        let parsed = Endpoint::from_shared(endpoint.to_owned());
        let parsed = parsed.map_err(|cause| InvalidEndpoint { endpoint: endpoint.to_owned(), cause })?;
        let channel = parsed.connect_timeout(EXPORT_TIMEOUT).timeout(EXPORT_TIMEOUT).connect_lazy();
        let dropped = Counter::default();
        registry.with(|registry| {
            let help = "Spans that were not sent: the queue was full, or the collector did not take them";
            registry.register("trace_spans_dropped", help, dropped.clone());
        });
        let (stop, senders) = (CancellationToken::new(), TaskTracker::new());
        Ok(Collector { channel, sampler, dropped, stop, senders })
    }

    /// Takes no more spans, and sends those that wait, for [`FLUSH_TIMEOUT`] at most.
    pub async fn close(&self) {
        self.stop.cancel();
        self.senders.close();
        // What was not sent by then is lost, as it would be with the process.
        let _ = tokio::time::timeout(FLUSH_TIMEOUT, self.senders.wait()).await;
    }

    /// The spans of one service (the resource attribute `service.name`). What is recorded is sent in the background until the
    /// last handle is dropped.
    pub fn service(&self, name: &'static str) -> Spans {
        let exporter =
            opentelemetry_otlp::SpanExporter::builder().with_tonic().with_channel(self.channel.clone());
        let exporter = exporter.with_timeout(EXPORT_TIMEOUT).build();
        let Ok(mut exporter) = exporter.inspect_err(|error| tracing::error!(%error, "no spans are sent"))
        else {
            return Spans::off();
        };
        exporter.set_resource(&Resource::builder_empty().with_service_name(name).build());
        let (queue, waiting) = mpsc::channel(QUEUE_SPANS);
        self.senders.spawn(send(exporter, waiting, self.dropped.clone(), self.stop.clone()));
        let scope = InstrumentationScope::builder("sagaline").build();
        let (sampler, dropped) = (self.sampler, self.dropped.clone());
        Spans(Some(Arc::new(Sink { queue, sampler, dropped, scope })))
    }
}

/// Sends what is recorded, in batches, until the last handle is gone, or `stop`, and everything was tried once.
async fn send(
    exporter: opentelemetry_otlp::SpanExporter,
    mut waiting: mpsc::Receiver<SpanData>,
    dropped: Counter,
    stop: CancellationToken,
) {
    let mut batch = Vec::new();
    let mut reachable = true;
    loop {
        tokio::select! {
            count = waiting.recv_many(&mut batch, BATCH_SPANS) => if count == 0 {
                return;
            },
            () = stop.cancelled(), if !waiting.is_closed() => {
                waiting.close();
                continue;
            }
        }
        let full = async {
            while batch.len() < BATCH_SPANS && waiting.recv_many(&mut batch, BATCH_SPANS).await > 0 {}
        };
        // Whether it filled up or not: what there is by now is sent.
        tokio::select! {
            () = full => {}
            () = tokio::time::sleep(LINGER) => {}
            () = stop.cancelled() => {}
        }
        let count = batch.len() as u64;
        match exporter.export(std::mem::take(&mut batch)).await {
            Ok(()) => reachable = true,
            Err(error) => {
                dropped.inc_by(count);
                if std::mem::replace(&mut reachable, false) {
                    tracing::warn!(%error, "the trace collector does not take spans; they are dropped until it does");
                }
            }
        }
    }
}

/// Where one service records its spans; off, or on the way to a collector. Cloning is cheap.
#[derive(Clone, Debug, Default)]
pub struct Spans(Option<Arc<Sink>>);

#[derive(Debug)]
struct Sink {
    queue: mpsc::Sender<SpanData>,
    sampler: Sampler,
    dropped: Counter,
    scope: InstrumentationScope,
}

/// What a span is to its trace (OpenTelemetry, "SpanKind").
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A request is answered.
    Server,
    /// A question to a database, a cache or another service.
    Client,
    /// A message is published.
    Producer,
    /// A message is handled.
    Consumer,
    /// Anything within the service.
    Internal,
}

/// When something was done.
#[derive(Clone, Copy, Debug)]
pub struct Interval {
    /// Its beginning.
    pub began: SystemTime,
    /// Its end.
    pub ended: SystemTime,
}

impl Interval {
    /// From then to now.
    pub fn since(began: SystemTime) -> Interval {
        Interval { began, ended: now() }
    }
}

/// Spans are compared with those of other machines: they take the machine's clock, whatever time the logic goes by.
#[expect(clippy::disallowed_methods, reason = "no logic depends on a span's times")]
fn now() -> SystemTime {
    SystemTime::now()
}

/// A number or a text that says more about a span.
#[derive(Clone, Debug, PartialEq)]
pub enum Detail {
    /// A number.
    Count(u64),
    /// A text that is known when the program is compiled.
    Name(&'static str),
    /// Any other text.
    Text(String),
}

impl Spans {
    /// Records nothing.
    pub fn off() -> Spans {
        Spans(None)
    }

    /// Now, if anything is recorded at all; the beginning of an [`Interval`].
    pub fn clock(&self) -> Option<SystemTime> {
        self.0.as_ref().map(|_| now())
    }

    /// The position in a trace that `traceparent` names, if it is to be recorded here.
    pub fn sampled(&self, traceparent: &[u8]) -> Option<TraceContext> {
        // The flags are the last byte: 1 is "sampled" in version 00, and other flags are not sent by us.
        if self.0.is_none() || traceparent.last() != Some(&b'1') {
            return None;
        }
        std::str::from_utf8(traceparent).ok()?.parse().ok().filter(TraceContext::sampled)
    }

    /// Whether nothing is ever recorded.
    pub fn is_off(&self) -> bool {
        self.0.is_none()
    }

    /// Records a new span below `parent`, and gives its position, for what is below it.
    pub fn below(
        &self,
        parent: &TraceContext,
        kind: Kind,
        name: impl Into<Cow<'static, str>>,
        interval: Interval,
        details: &[(&'static str, Detail)],
    ) -> TraceContext {
        let context = parent.child(fastrand::fill);
        self.record(&context, Some(parent.span_id()), kind, name, interval, details);
        context
    }

    /// Records the span at `context`, whose position had to be known before it ended; `parent` is the id of the span
    /// above it, none for the root.
    pub fn record(
        &self,
        context: &TraceContext,
        parent: Option<u64>,
        kind: Kind,
        name: impl Into<Cow<'static, str>>,
        interval: Interval,
        details: &[(&'static str, Detail)],
    ) {
        let Some(sink) = self.0.as_ref().filter(|_| context.sampled()) else { return };
        let span_context = SpanContext::new(
            TraceId::from(context.trace_id()),
            SpanId::from(context.span_id()),
            TraceFlags::SAMPLED,
            false,
            TraceState::NONE,
        );
        let attribute = |(key, detail): &(&'static str, Detail)| match detail {
            Detail::Count(count) => KeyValue::new(*key, i64::try_from(*count).unwrap_or(i64::MAX)),
            Detail::Name(name) => KeyValue::new(*key, *name),
            Detail::Text(text) => KeyValue::new(*key, text.clone()),
        };
        let span = SpanData {
            span_context,
            parent_span_id: parent.map_or(SpanId::INVALID, SpanId::from),
            parent_span_is_remote: false,
            span_kind: match kind {
                Kind::Server => SpanKind::Server,
                Kind::Client => SpanKind::Client,
                Kind::Producer => SpanKind::Producer,
                Kind::Consumer => SpanKind::Consumer,
                Kind::Internal => SpanKind::Internal,
            },
            name: name.into(),
            start_time: interval.began,
            end_time: interval.ended,
            attributes: details.iter().map(attribute).collect(),
            dropped_attributes_count: 0,
            events: SpanEvents::default(),
            links: SpanLinks::default(),
            status: match details.iter().any(|(key, _)| *key == ERROR_TYPE) {
                true => Status::error(""),
                false => Status::Unset,
            },
            instrumentation_scope: sink.scope.clone(),
        };
        if sink.queue.try_send(span).is_err() {
            sink.dropped.inc();
        }
    }
}

/// Which traces are recorded, for traces that begin here; a caller that has begun one has decided already.
///
/// By the trace's id, so that whoever asks decides alike (OpenTelemetry, "TraceIdRatioBased").
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sampler {
    below: u64,
}

impl Sampler {
    /// Records this part of all traces: 0.0 none, 1.0 all.
    pub fn ratio(ratio: f64) -> Sampler {
        // Ids are compared by 63 bits, as OpenTelemetry's libraries do.
        Sampler { below: (ratio.clamp(0.0, 1.0) * (1_u64 << 63) as f64) as u64 }
    }

    /// Whether to record the trace with this id.
    pub fn picks(self, trace_id: u128) -> bool {
        (trace_id as u64) >> 1 < self.below
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_off_takes_no_part_in_anything() {
        let spans = Spans::off();
        assert!(spans.clock().is_none());
        assert!(spans.sampled(b"00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01").is_none());
    }

    #[test]
    fn a_ratio_picks_that_part_of_the_ids_and_always_the_same() {
        let mut random = fastrand::Rng::with_seed(7);
        let ids: Vec<u128> = (0..20_000).map(|_| random.u128(..)).collect();
        let picked = |ratio| ids.iter().filter(|id| Sampler::ratio(ratio).picks(**id)).count();
        assert_eq!((picked(0.0), picked(1.0)), (0, ids.len()));
        assert!((1_800..2_200).contains(&picked(0.1)), "{}", picked(0.1));
        assert_eq!(picked(0.1), picked(0.1));
        assert!(ids.iter().all(|id| !Sampler::ratio(0.1).picks(*id) || Sampler::ratio(0.2).picks(*id)));
    }
}

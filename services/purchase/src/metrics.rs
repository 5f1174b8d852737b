//! What is counted about sagas, under the names of the HTTP API's contract.

use std::sync::Arc;

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use telemetry::Registry;
use telemetry::metrics::PubsubMetrics;

use crate::model::State;

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct Outcome {
    outcome: &'static str,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct What {
    what: &'static str,
}

/// `saga_started_total`, `saga_finished_total{outcome}`, `saga_duration_seconds{outcome}`, `saga_in_flight`,
/// `saga_oldest_unfinished_seconds`, `saga_parked`.
///
/// Of several replicas on one database each counts what it did itself: what it accepted (started, in flight) and whose end it
/// wrote (finished, duration). These add up. The oldest unfinished saga and the parked ones are read from the
/// database: each replica tells the same.
#[derive(Clone)]
pub(crate) struct SagaMetrics(Arc<Series>);

struct Series {
    started: Counter,
    finished: Family<Outcome, Counter>,
    duration: Family<Outcome, Histogram, fn() -> Histogram>,
    in_flight: Gauge,
    oldest_unfinished: Gauge,
    parked: Gauge,
    accept: PubsubMetrics,
}

impl SagaMetrics {
    /// Registers the series. `pubsub` counts the service's messages.
    pub(crate) fn new(registry: &Registry, pubsub: &PubsubMetrics) -> SagaMetrics {
        let series = Series {
            started: Counter::default(),
            finished: Family::default(),
            duration: Family::new_with_constructor(telemetry::metrics::seconds as fn() -> Histogram),
            in_flight: Gauge::default(),
            oldest_unfinished: Gauge::default(),
            parked: Gauge::default(),
            accept: pubsub.named("accept"),
        };
        registry.with(|registry| {
            registry.register("saga_started", "Sagas accepted", series.started.clone());
            registry.register("saga_finished", "Sagas ended, by how", series.finished.clone());
            registry.register(
                "saga_duration_seconds",
                "Time from acceptance to the recorded end, by how the saga ended",
                series.duration.clone(),
            );
            registry.register(
                "saga_in_flight",
                "Sagas accepted here and not ended",
                series.in_flight.clone(),
            );
            registry.register(
                "saga_oldest_unfinished_seconds",
                "Age of the oldest saga that has not ended",
                series.oldest_unfinished.clone(),
            );
            registry.register("saga_parked", "Sagas left to an operator", series.parked.clone());
        });
        SagaMetrics(Arc::new(series))
    }

    pub(crate) fn accept_batch(&self, requests: usize) {
        self.0.accept.batch(requests);
    }

    /// Counts the messages that start sagas.
    pub(crate) fn accept(&self) -> &PubsubMetrics {
        &self.0.accept
    }

    pub(crate) fn started(&self, sagas: usize) {
        self.0.started.inc_by(sagas as u64);
    }

    pub(crate) fn finished(&self, state: State, milliseconds: u64) {
        let outcome = match state {
            State::Succeeded => "succeeded",
            State::Cancelled => "cancelled",
            State::Failed | State::Open | State::NeedsOperator => "failed",
        };
        let labels = Outcome { outcome };
        self.0.finished.get_or_create(&labels).inc();
        self.0.duration.get_or_create(&labels).observe(milliseconds as f64 / 1_000.0);
    }

    pub(crate) fn standing(&self, in_flight: usize, oldest_milliseconds: u64, parked: u64) {
        self.0.in_flight.set(i64::try_from(in_flight).unwrap_or(i64::MAX));
        self.0.oldest_unfinished.set(i64::try_from(oldest_milliseconds / 1_000).unwrap_or(i64::MAX));
        self.0.parked.set(i64::try_from(parked).unwrap_or(i64::MAX));
    }
}

/// What is counted about news between replicas: `saga_news_total{what}` and `saga_ends_missed_total`.
#[derive(Clone, Debug)]
pub(crate) struct FeedMetrics(Arc<FeedSeries>);

#[derive(Debug)]
struct FeedSeries {
    sent: Counter,
    heard: Counter,
    dropped: Counter,
    missed: Counter,
}

impl FeedMetrics {
    /// Registers the series.
    pub(crate) fn new(registry: &Registry) -> FeedMetrics {
        let news: Family<What, Counter> = Family::default();
        let what = |what| news.get_or_create_owned(&What { what });
        let (sent, heard, dropped) = (what("sent"), what("heard"), what("dropped"));
        let series = FeedSeries { sent, heard, dropped, missed: Counter::default() };
        registry.with(|registry| {
            registry.register(
                "saga_news",
                "Messages between the replicas of the purchase service: sent, heard, dropped",
                news,
            );
            registry.register(
                "saga_ends_missed",
                "Ends of sagas read from the database because their news did not come",
                series.missed.clone(),
            );
        });
        FeedMetrics(Arc::new(series))
    }

    pub(crate) fn sent(&self) {
        self.0.sent.inc();
    }

    pub(crate) fn heard(&self) {
        self.0.heard.inc();
    }

    pub(crate) fn dropped(&self) {
        self.0.dropped.inc();
    }

    pub(crate) fn read(&self, ends: usize) {
        self.0.missed.inc_by(ends as u64);
    }
}

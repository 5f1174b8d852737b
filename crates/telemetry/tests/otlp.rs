//! Spans reach a collector: one that speaks OTLP, on a port of its own.
#![allow(clippy::disallowed_methods, reason = "spans take the machine's clock")]

use std::collections::BTreeSet;
use std::time::{Duration, SystemTime};

use telemetry::spans::{Collector, Detail, Interval, Kind, Sampler};
use telemetry::{Registry, TraceContext};
use testkit::Span;
use tokio::net::TcpListener;

/// Only a failing test waits this long.
const PATIENCE: Duration = Duration::from_secs(20);

fn root() -> TraceContext {
    TraceContext::new(0x4bf9_2f35_77b3_4da6_a3ce_929d_0e0e_4736, 0x00f0_67aa_0ba9_02b7, true)
        .expect("a context")
}

#[tokio::test]
async fn spans_arrive_as_a_tree_under_their_services_names() {
    let arrived = testkit::Collector::start().await;
    let to = Collector::new(arrived.endpoint(), Sampler::ratio(1.0), &Registry::new()).expect("an endpoint");
    let (purchase, product) = (to.service("purchase"), to.service("product"));
    let began = SystemTime::now() - Duration::from_millis(5);

    let accepted = purchase.below(&root(), Kind::Server, "accept", Interval::since(began), &[]);
    let details = [("db.rows", Detail::Count(3)), ("saga.step", Detail::Name("RESERVE"))];
    product.below(&accepted, Kind::Consumer, "reserve", Interval::since(began), &details);
    purchase.record(&root(), None, Kind::Server, "buy", Interval::since(began), &[]);
    let unsampled = TraceContext::new(1, 1, false).expect("a context");
    purchase.below(&unsampled, Kind::Internal, "unseen", Interval::since(began), &[]);
    purchase.below(&root(), Kind::Internal, "seen", Interval::since(began), &[]);

    let four = |spans: &[Span]| if spans.len() < 4 { Err(format!("{spans:?}")) } else { Ok(spans.to_vec()) };
    let spans = arrived.until(PATIENCE, four).await;
    let names: BTreeSet<(&str, &str)> =
        spans.iter().map(|span| (span.service.as_str(), span.name.as_str())).collect();
    let expected =
        [("product", "reserve"), ("purchase", "accept"), ("purchase", "buy"), ("purchase", "seen")];
    assert_eq!(names, BTreeSet::from(expected));
    let span = |name: &str| spans.iter().find(|span| span.name == name).expect("it arrived");
    assert!(spans.iter().all(|span| span.trace == format!("{:x}", root().trace_id())));
    assert_eq!(span("buy").parent, None, "the root has nothing above it");
    assert_eq!(span("accept").parent.as_ref(), Some(&span("buy").id));
    assert_eq!(span("reserve").parent.as_ref(), Some(&span("accept").id));
    let keys: Vec<&str> = span("reserve").details.keys().map(String::as_str).collect();
    assert_eq!(keys, ["db.rows", "saga.step"]);
    assert!(span("buy").times.1 > span("buy").times.0);
}

#[tokio::test]
async fn without_a_collector_nobody_waits_and_what_is_lost_is_counted() {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let endpoint = format!("http://{}", listener.local_addr().expect("an address"));
    drop(listener);
    let registry = Registry::new();
    let spans =
        Collector::new(&endpoint, Sampler::ratio(1.0), &registry).expect("an endpoint").service("purchase");
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
    let error =
        Collector::new("not an endpoint", Sampler::ratio(1.0), &Registry::new()).expect_err("it is none");
    assert!(error.to_string().contains("not an endpoint"), "{error}");
}

#[tokio::test]
async fn what_waits_is_sent_when_the_process_stops() {
    let arrived = testkit::Collector::start().await;
    let to = Collector::new(arrived.endpoint(), Sampler::ratio(1.0), &Registry::new()).expect("an endpoint");
    let spans = to.service("purchase");
    spans.below(&root(), Kind::Internal, "last", Interval::since(SystemTime::now()), &[]);
    to.close().await;
    assert_eq!(arrived.spans().len(), 1);
    // And nobody waits for what comes after.
    spans.below(&root(), Kind::Internal, "late", Interval::since(SystemTime::now()), &[]);
    to.close().await;
    assert_eq!(arrived.spans().len(), 1);
}

#[tokio::test]
async fn the_caller_decides_and_otherwise_the_ratio() {
    let arrived = testkit::Collector::start().await;
    let (all, none) = (Sampler::ratio(1.0), Sampler::ratio(0.0));
    let to = |sampler| Collector::new(arrived.endpoint(), sampler, &Registry::new()).expect("an endpoint");
    let sampled = |sampler, traceparent: Option<&str>| {
        let serving = to(sampler).service("gateway").serve(traceparent.map(str::as_bytes), || "buy");
        serving.map(|serving| serving.context().sampled())
    };
    let text = root().to_string();
    assert_eq!(sampled(all, None), Some(true));
    assert_eq!(sampled(none, None), Some(false), "whoever is asked for it must be told");
    assert_eq!(sampled(none, Some(&text)), Some(true));
    assert_eq!(sampled(all, Some(&text.replace("-01", "-00"))), None, "the caller's own says it");
    assert_eq!(sampled(all, Some("nonsense")), Some(true));
}

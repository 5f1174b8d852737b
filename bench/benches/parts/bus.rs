//! The bus, in memory and on a NATS server beside this process: a frame published, taken, acknowledged; one after the other, and many
//! under way at once.

use ::bus::nats::Settings;
use ::bus::{Bus, Envelope, EnvelopeId, Limits, Subject};
use bytes::Bytes;
use criterion::{BatchSize, BenchmarkId, Criterion, Throughput};
use futures_util::future::{join, join_all};
use servers::Nats;
use tokio::runtime::Runtime;

use crate::place::runtime;

const SUBJECT: Subject = Subject("bench");
/// About the size of a command of the purchase saga, in bytes.
const BODY: &[u8] = &[7; 180];
/// Frames that are published at once where many are under way.
const UNDER_WAY: u64 = 32;

pub(crate) fn benches(criterion: &mut Criterion) {
    let runtime = runtime();
    one_by_one(criterion, &runtime, "bus", &Bus::embedded(Limits::default()));
    many(criterion, &runtime, "bus", &Bus::embedded(Limits::default()));

    let nats = Nats::start(1).expect("a NATS server");
    let settings = Settings::from_urls(&nats.urls().join(",")).expect("its address");
    let bus = runtime.block_on(Bus::nats(settings, Limits::default(), &[SUBJECT])).expect("a bus on it");
    one_by_one(criterion, &runtime, "bus on NATS", &bus);
    many(criterion, &runtime, "bus on NATS", &bus);
    runtime.block_on(bus.close());
}

fn frame(envelopes: u64) -> Vec<Envelope> {
    let envelope = |id| Envelope { id: EnvelopeId::of(id, 0), body: Bytes::from_static(BODY) };
    (0..envelopes).map(envelope).collect()
}

/// How long a frame takes from its publisher to its consumer, and what that costs.
fn one_by_one(criterion: &mut Criterion, runtime: &Runtime, name: &str, bus: &Bus) {
    let mut group = criterion.benchmark_group(format!("{name}, publish and consume and acknowledge"));
    for envelopes in [1, 64, 256] {
        group.throughput(Throughput::Elements(envelopes));
        group.bench_function(BenchmarkId::from_parameter(envelopes), |bencher| {
            let mut consumer = bus.subscribe(SUBJECT);
            bencher.iter_batched(
                || frame(envelopes),
                |frame| {
                    runtime.block_on(async {
                        bus.publish(SUBJECT, frame).await.expect("an empty queue has room");
                        let batch = consumer.next(envelopes as usize).await.expect("an open bus");
                        assert_eq!(batch.deliveries().len() as u64, envelopes);
                        batch.ack_all().await.expect("a batch that nobody forgot");
                    });
                },
                BatchSize::SmallInput,
            );
        });
    }
    group.finish();
}

/// How many envelopes pass while many frames are under way.
fn many(criterion: &mut Criterion, runtime: &Runtime, name: &str, bus: &Bus) {
    let mut group = criterion.benchmark_group(format!("{name}, {UNDER_WAY} frames at once"));
    for envelopes in [1, 64, 256] {
        group.throughput(Throughput::Elements(UNDER_WAY * envelopes));
        group.bench_function(BenchmarkId::from_parameter(envelopes), |bencher| {
            let mut consumer = bus.subscribe(SUBJECT);
            bencher.iter_batched(
                || (0..UNDER_WAY).map(|_| frame(envelopes)).collect::<Vec<_>>(),
                |frames| {
                    let publishing = join_all(frames.into_iter().map(|frame| bus.publish(SUBJECT, frame)));
                    let consuming = async {
                        let mut missing = UNDER_WAY * envelopes;
                        while missing > 0 {
                            let batch = consumer.next(512).await.expect("an open bus");
                            missing -= batch.deliveries().len() as u64;
                            batch.ack_all().await.expect("a batch that nobody forgot");
                        }
                    };
                    let (published, ()) = runtime.block_on(join(publishing, consuming));
                    assert!(published.iter().all(Result::is_ok), "{published:?}");
                },
                BatchSize::SmallInput,
            );
        });
    }
    group.finish();
}

//! The embedded bus: a frame published, taken, acknowledged.

use bus::{Bus, Envelope, EnvelopeId, Limits, Subject};
use bytes::Bytes;
use criterion::{BatchSize, BenchmarkId, Criterion, Throughput};

use crate::place::runtime;

const SUBJECT: Subject = Subject("bench");
/// About the size of a command of the purchase saga, in bytes.
const BODY: &[u8] = &[7; 180];

pub(crate) fn benches(criterion: &mut Criterion) {
    let runtime = runtime();
    let mut group = criterion.benchmark_group("bus, publish and consume and acknowledge");
    for envelopes in [1, 64, 256] {
        group.throughput(Throughput::Elements(envelopes));
        group.bench_function(BenchmarkId::from_parameter(envelopes), |bencher| {
            let bus = Bus::embedded(Limits::default());
            let envelope = |id| Envelope { id: EnvelopeId::of(id, 0), body: Bytes::from_static(BODY) };
            let frame = || (0..envelopes).map(envelope).collect::<Vec<_>>();
            let mut consumer = bus.subscribe(SUBJECT);
            bencher.iter_batched(
                frame,
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

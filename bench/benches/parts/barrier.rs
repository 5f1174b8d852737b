//! The barrier with the shop's own stock behind it: a frame of commands goes in, one durable transaction reserves and
//! records, the replies come out.

use bus::{Bus, Envelope, EnvelopeId, Limits};
use criterion::{BatchSize, BenchmarkId, Criterion, Throughput};
use saga::{Phase, StepIndex};
use shop::purchase::{INVENTORY_COMMANDS, ORCHESTRATOR};
use telemetry::Registry;
use telemetry::metrics::PubsubMetrics;
use tokio_util::sync::CancellationToken;
use wire::messages::{Command, ToParticipant};
use wire::time::Clock;

use crate::place::{Folder, carried, purchase, runtime};
use crate::reads::create_product;

/// Products that the commands are spread over.
const PRODUCTS: u64 = 100;
/// The largest batch, which is the largest frame of the bus as well.
const MAX_COMMANDS: usize = 1024;

pub(crate) fn benches(criterion: &mut Criterion) {
    let runtime = runtime();
    let folder = Folder::new("barrier");
    let bus = Bus::embedded(Limits::default());
    let stop = CancellationToken::new();
    let db = folder.open("product", product::MIGRATIONS);
    let (products, stock) = runtime.block_on(async {
        let service = product::start(product::Parts {
            cache: product::ProductCache::new(),
            redis: None,
            db: db.clone(),
            bus: bus.clone(),
            clock: Clock::system(),
            write: product::CatalogWrite::Open,
            book: drive::Book::new(),
            metrics: PubsubMetrics::new(&Registry::new(), "product"),
            spans: telemetry::Spans::off(),
            settings: participant::Settings {
                batch_commands: MAX_COMMANDS,
                ..participant::Settings::default()
            },
        })
        .await
        .expect("a product service");
        let router = service.router();
        let mut products = Vec::new();
        for _ in 0..PRODUCTS {
            products.push(create_product(&router).await);
        }
        (products, tokio::spawn(service.run(stop.clone())))
    });
    let mut replies = bus.subscribe(ORCHESTRATOR);

    let mut group = criterion.benchmark_group("barrier, reserve stock and record");
    let mut saga = 0;
    for commands in [1, 16, 64, 256, MAX_COMMANDS] {
        group.throughput(Throughput::Elements(commands as u64));
        group.bench_function(BenchmarkId::from_parameter(commands), |bencher| {
            let mut frame = || -> Vec<Envelope> {
                let one = |_| {
                    saga += 1;
                    command(saga, products[saga as usize % products.len()])
                };
                (0..commands).map(one).collect()
            };
            bencher.iter_batched(
                &mut frame,
                |frame| {
                    runtime.block_on(async {
                        bus.publish(INVENTORY_COMMANDS, frame).await.expect("an empty queue has room");
                        let mut missing = commands;
                        while missing > 0 {
                            let batch = replies.next(MAX_COMMANDS).await.expect("an open bus");
                            missing -= batch.deliveries().len();
                            batch.ack_all().await.expect("a batch that nobody forgot");
                        }
                    });
                },
                BatchSize::LargeInput,
            );
        });
    }
    group.finish();
    runtime.block_on(async {
        stop.cancel();
        stock.await.expect("the participant has panicked");
        db.close().await;
    });
}

fn command(saga: u64, product: u64) -> Envelope {
    let carried = carried(saga, 0, purchase(product).to_input());
    let command = ToParticipant::Command(Command { carried, step: StepIndex(0), phase: Phase::Action });
    Envelope { id: EnvelopeId::of(saga, 0), body: command.encode() }
}

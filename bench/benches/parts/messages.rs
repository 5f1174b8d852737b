//! Messages: bytes to meaning and back, and what an orchestrator makes of one.

use std::hint::black_box;

use criterion::{Criterion, Throughput};
use drive::Book;
use saga::{Outcome, Phase, StepIndex};
use shop::purchase::{PURCHASE_PROGRESS, PurchaseStep, purchase_saga};
use wire::messages::{Command, Pen, Recorded, Reply, ToOrchestrator, ToParticipant};

use crate::place::{carried, purchase};

const SAGA: u64 = 1 << 52;

pub(crate) fn benches(criterion: &mut Criterion) {
    let input = purchase(SAGA).to_input();
    let command = ToParticipant::Command(Command {
        carried: carried(SAGA, 2, input.clone()),
        step: StepIndex(2),
        phase: Phase::Action,
    });
    let reply = ToOrchestrator::Reply(Reply {
        carried: carried(SAGA, 2, input),
        step: StepIndex(2),
        phase: Phase::Action,
        recorded: Recorded { outcome: Outcome::Done(Vec::new()), at: 1_800_000_000_000 }.encode(),
    });
    let (command_bytes, reply_bytes) = (command.encode(), reply.encode());
    let book = Book::new().with(purchase_saga(), PurchaseStep::commands, PURCHASE_PROGRESS);

    let mut group = criterion.benchmark_group("messages");
    group.throughput(Throughput::Elements(1));
    group.bench_function("encode a command", |bencher| bencher.iter(|| black_box(&command).encode()));
    group.bench_function("decode a command", |bencher| {
        bencher.iter(|| ToParticipant::decode(black_box(&command_bytes).clone()).expect("a command"));
    });
    group.bench_function("encode a reply", |bencher| bencher.iter(|| black_box(&reply).encode()));
    group.bench_function("decode a reply", |bencher| {
        bencher.iter(|| ToOrchestrator::decode(black_box(&reply_bytes).clone()).expect("a reply"));
    });
    group.bench_function("a reply to the messages it calls for", |bencher| {
        // As many as a batch may have.
        let mut pen = Pen::for_messages(1_024);
        bencher.iter(|| book.plan(black_box(&reply_bytes).clone(), &mut pen).expect("a legal reply"));
    });
    group.finish();
}

//! The engine: what a saga does next. Pure, so this is processor time.

use std::hint::black_box;

use criterion::{Criterion, Throughput};
use saga::{Definition, Effects, End, Mode, Outcome, Phase, Reason, Reply, Standing};
use shop::purchase::{PurchaseStep, purchase_saga};

const STEPS: u64 = 3;

pub(crate) fn benches(criterion: &mut Criterion) {
    let definition = purchase_saga();
    let mut group = criterion.benchmark_group("engine");
    group.throughput(Throughput::Elements(STEPS));
    group.bench_function("advance, three steps to the commit", |bencher| {
        bencher.iter(|| drive(black_box(&definition), &|_| Outcome::Done(Vec::new()), End::Committed));
    });
    // Two steps forward, the third says no, two steps back.
    group.throughput(Throughput::Elements(2 * STEPS - 1));
    group.bench_function("advance, a rollback from the third step", |bencher| {
        let declined = |step| match step {
            PurchaseStep::CreatePayment => Outcome::Rejected(Reason::Refused("declined".to_owned())),
            PurchaseStep::UpdateProductInventory | PurchaseStep::CreateOrder => Outcome::Done(Vec::new()),
        };
        bencher.iter(|| drive(black_box(&definition), &declined, End::Aborted));
    });
    group.finish();
}

/// Drives a saga from its start to its end; `act` answers for the participants.
fn drive(definition: &Definition<PurchaseStep>, act: &impl Fn(PurchaseStep) -> Outcome, end: End) {
    let Effects { mut token, mut ask, mut tell } = saga::start(definition, 1, Mode::Execute);
    while let Some(asked) = ask {
        let outcome = match asked.phase {
            Phase::Action | Phase::Cancel => act(asked.step),
            Phase::Compensation => Outcome::Compensated,
        };
        let reply = Reply { step: asked.index, phase: asked.phase, outcome, at: 1_800_000_000_000 };
        Effects { token, ask, tell } =
            saga::advance(definition, token, black_box(reply)).expect("a reply that was asked for");
    }
    assert_eq!(tell, Some(Standing::Ended(end)));
    black_box(token);
}

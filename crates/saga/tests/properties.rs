//! The machine, for any saga and any reply: it never panics, never changes what a path says, and always ends.

use proptest::prelude::*;
use saga::{
    Definition, End, Entry, Event, Kind, MAX_STEPS, Mode, Outcome, Path, Phase, Position, Reason, Reply,
    Standing, Status, StepIndex, Token, advance, events, start,
};

type Step = usize;

/// Any definition of up to a dozen steps.
fn any_definition() -> impl Strategy<Value = Definition<Step>> {
    (0..6usize, any::<bool>(), 0..4usize)
        .prop_filter_map("a saga has a step", |(undoable, pivot, retriable)| {
            definition(undoable, pivot, retriable)
        })
}

fn definition(undoable: usize, pivot: bool, retriable: usize) -> Option<Definition<Step>> {
    assert!(undoable + usize::from(pivot) + retriable <= MAX_STEPS);
    let new = || Definition::new("any", 1);
    // The builder's types change with its stage, so the three kinds of a first step are three ways to begin.
    let decided = if undoable > 0 {
        let undecided =
            (1..undoable).fold(new().compensatable(0), |builder, step| builder.compensatable(step));
        match (pivot, retriable) {
            (false, 0) => return Some(undecided.build()),
            (false, _) => undecided.retriable(undoable),
            (true, _) => undecided.pivot(undoable),
        }
    } else if pivot {
        new().pivot(0)
    } else if retriable > 0 {
        new().retriable(0)
    } else {
        return None;
    };
    let behind = undoable + 1..undoable + usize::from(pivot) + retriable;
    Some(behind.fold(decided, |builder, step| builder.retriable(step)).build())
}

fn any_outcome() -> impl Strategy<Value = Outcome> {
    prop_oneof![
        prop::collection::vec(any::<u8>(), 0..4).prop_map(Outcome::Done),
        Just(Outcome::Rejected(Reason::Cancelled)),
        "[a-z]{0,4}".prop_map(|why| Outcome::Rejected(Reason::Refused(why))),
        Just(Outcome::Compensated),
    ]
}

fn any_phase() -> impl Strategy<Value = Phase> {
    prop_oneof![Just(Phase::Action), Just(Phase::Compensation), Just(Phase::Cancel)]
}

fn any_mode() -> impl Strategy<Value = Mode> {
    prop_oneof![Just(Mode::Execute), Just(Mode::Decide), Just(Mode::Cancel)]
}

fn any_reply() -> impl Strategy<Value = Reply> {
    (0..14u8, any_phase(), any_outcome(), any::<u64>()).prop_map(|(step, phase, outcome, at)| Reply {
        step: StepIndex(step),
        phase,
        outcome,
        at,
    })
}

fn any_path() -> impl Strategy<Value = Path> {
    let entry = (0..14u8, any_outcome(), any::<u64>()).prop_map(|(step, outcome, at)| Entry {
        step: StepIndex(step),
        outcome,
        at,
    });
    prop::collection::vec(entry, 0..8).prop_map(|entries| entries.into_iter().collect())
}

/// Drives a saga of which the steps in `refusing` say no where they may. Returns every path on the way.
fn drive(definition: &Definition<Step>, refusing: &[bool]) -> (Vec<Path>, End) {
    let mut paths = vec![Path::new()];
    let mut effects = start(definition, 7, Mode::Execute);
    for at in 1..=2 * MAX_STEPS as u64 {
        let Some(ask) = effects.ask else {
            let Some(Standing::Ended(end)) = effects.tell else { panic!("it ended untold") };
            return (paths, end);
        };
        let says_no = refusing[ask.step] && definition.kind(ask.index) != Some(Kind::Retriable);
        let outcome = match ask.phase {
            Phase::Compensation => Outcome::Compensated,
            Phase::Action | Phase::Cancel if says_no => Outcome::Rejected(Reason::Refused("no".to_owned())),
            Phase::Action | Phase::Cancel => Outcome::Done(vec![ask.index.0]),
        };
        let reply = Reply { step: ask.index, phase: ask.phase, outcome, at };
        effects = advance(definition, effects.token, reply).expect("an answer to what was asked is legal");
        paths.push(effects.token.path.clone());
    }
    panic!("a saga has more replies than there are steps, there and back");
}

/// What must become of a saga, said without the machine: forward to the first no, then back.
fn expected(definition: &Definition<Step>, refusing: &[bool]) -> (Vec<(Step, Status)>, End) {
    let mut history = Vec::new();
    let no = definition.steps().position(|(_, step, kind)| refusing[step] && kind != Kind::Retriable);
    for step in 0..no.unwrap_or(definition.len()) {
        history.extend([(step, Status::Execute), (step, Status::Success)]);
    }
    let Some(no) = no else { return (history, End::Committed) };
    history.extend([(no, Status::Execute), (no, Status::Failed)]);
    history.extend((0..no).rev().map(|step| (step, Status::RolledBack)));
    (history, End::Aborted)
}

fn line<'p>(event: &Event<'p, Step>) -> (Step, Status, u64, Option<&'p Reason>) {
    (event.step, event.status, event.at, event.reason)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2_000))]

    #[test]
    fn a_saga_goes_forward_to_the_first_no_and_back(
        definition in any_definition(),
        refusing in prop::collection::vec(prop::bool::weighted(0.2), 12),
    ) {
        let (paths, end) = drive(&definition, &refusing);
        let last = paths.last().unwrap();
        let history: Vec<_> =
            events(&definition, 0, last).unwrap().iter().map(|event| (event.step, event.status)).collect();
        prop_assert_eq!((history, end), expected(&definition, &refusing));
        prop_assert_eq!(last.position(&definition), Ok(Position::Ended(end)));
    }

    #[test]
    fn the_history_of_a_path_begins_that_of_every_longer_one(
        definition in any_definition(),
        refusing in prop::collection::vec(prop::bool::weighted(0.2), 12),
        started_at in any::<u64>(),
    ) {
        let (paths, _) = drive(&definition, &refusing);
        let whole = events(&definition, started_at, paths.last().unwrap()).unwrap();
        let whole: Vec<_> = whole.iter().map(line).collect();
        for (length, path) in paths.iter().enumerate() {
            prop_assert_eq!(path.len(), length);
            let begun = events(&definition, started_at, path).unwrap();
            let begun: Vec<_> = begun.iter().map(line).collect();
            prop_assert_eq!(&begun[..], &whole[..begun.len()]);
        }
    }

    /// Whatever comes, it is refused or the path grows by exactly that; what was in it stays.
    #[test]
    fn a_reply_is_refused_or_extends_the_path_by_itself(
        definition in any_definition(),
        refusing in prop::collection::vec(prop::bool::weighted(0.2), 12),
        mode in any_mode(),
        place in prop_oneof![4 => any::<prop::sample::Index>().prop_map(Err), 1 => any_path().prop_map(Ok)],
        mut reply in any_reply(),
        due in prop::bool::weighted(0.8),
    ) {
        let path = place.unwrap_or_else(|index| index.get(&drive(&definition, &refusing).0).clone());
        if due && let Ok(Position::Forward(step) | Position::Backward(step)) = path.position(&definition) {
            reply.step = step;
        }
        let token = Token { saga: 7, mode, path: path.clone() };
        let Ok(effects) = advance(&definition, token, reply.clone()) else { return Ok(()) };
        prop_assert_eq!(effects.token.saga, 7);
        if mode == Mode::Decide {
            prop_assert!(effects.token.path.is_empty() && path.is_empty() && effects.tell.is_none());
            return Ok(());
        }
        prop_assert_eq!(effects.token.mode, mode);
        let (new, old) = effects.token.path.entries().split_last().unwrap();
        prop_assert_eq!(old, path.entries());
        let Reply { step, outcome, at, .. } = reply;
        prop_assert_eq!(new, &Entry { step, outcome, at });
        match effects.tell {
            Some(Standing::Ended(end)) => {
                prop_assert!(effects.ask.is_none());
                prop_assert!(!(mode == Mode::Cancel && end == End::Committed), "a cancelled saga committed");
            }
            Some(Standing::Open) => prop_assert!(effects.ask.is_some()),
            None => prop_assert!(false, "the path grew untold"),
        }
    }

    /// A saga that was driven legally is nowhere illegal: each answer that a step can give is accepted.
    #[test]
    fn every_answer_that_can_be_given_is_accepted(
        definition in any_definition(),
        refusing in prop::collection::vec(prop::bool::weighted(0.2), 12),
        no in any::<bool>(),
    ) {
        let (paths, _) = drive(&definition, &refusing);
        for path in &paths {
            let (step, phase, outcome) = match path.position(&definition).unwrap() {
                Position::Ended(_) => continue,
                Position::Backward(step) => (step, Phase::Compensation, Outcome::Compensated),
                Position::Forward(step) if no && definition.kind(step) != Some(Kind::Retriable) => {
                    (step, Phase::Action, Outcome::Rejected(Reason::Cancelled))
                }
                Position::Forward(step) => (step, Phase::Action, Outcome::Done(Vec::new())),
            };
            let token = Token { saga: 7, mode: Mode::Execute, path: path.clone() };
            let advanced = advance(&definition, token, Reply { step, phase, outcome, at: 1 });
            prop_assert!(advanced.is_ok(), "{:?}", advanced);
        }
    }
}

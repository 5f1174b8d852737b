//! The machine, case by case: what each reply leads to, and each reply that is refused, with what it is refused for.
//!
//! The sagas here are driven by hand; `properties.rs` has the same for any saga and any reply.
#![allow(clippy::unwrap_used, reason = "all of this file is tests, also what carries no test attribute")]

use saga::{
    Ask, Definition, Effects, End, Entry, Illegal, Kind, MAX_STEPS, Mode, Outcome, Path, Phase, Position,
    Reason, Reply, Standing, Status, StepIndex, Token, advance, events, start,
};

const SAGA: u64 = 42;

fn trip() -> Definition<&'static str> {
    Definition::new("trip", 1)
        .compensatable("flight")
        .compensatable("hotel")
        .pivot("card")
        .retriable("mail")
        .build()
}

fn done() -> Outcome {
    Outcome::Done(Vec::new())
}

fn refused() -> Outcome {
    Outcome::Rejected(Reason::Refused("no".to_owned()))
}

fn cancelled() -> Outcome {
    Outcome::Rejected(Reason::Cancelled)
}

/// A path of these outcomes, the times counted from 1.
fn path(entries: &[(u8, Outcome)]) -> Path {
    (1..)
        .zip(entries)
        .map(|(at, (step, outcome))| Entry { step: StepIndex(*step), outcome: outcome.clone(), at })
        .collect()
}

fn token(mode: Mode, entries: &[(u8, Outcome)]) -> Token {
    Token { saga: SAGA, mode, path: path(entries) }
}

fn reply(step: u8, phase: Phase, outcome: Outcome) -> Reply {
    Reply { step: StepIndex(step), phase, outcome, at: 99 }
}

/// Drives a saga with `answer` until it has ended; returns what was asked and how it ended.
fn drive(
    definition: &Definition<&'static str>,
    mode: Mode,
    mut answer: impl FnMut(&Ask<&'static str>) -> Outcome,
) -> (Vec<(Phase, &'static str)>, Path, End) {
    let mut asked = Vec::new();
    let mut effects = start(definition, SAGA, mode);
    let mut told = 0;
    for at in 1.. {
        let Some(ask) = effects.ask else { break };
        asked.push((ask.phase, ask.step));
        let reply = Reply { step: ask.index, phase: ask.phase, outcome: answer(&ask), at };
        effects = advance(definition, effects.token, reply).expect("an answer to what was asked is legal");
        told += usize::from(effects.tell.is_some());
    }
    let Some(Standing::Ended(end)) = effects.tell else { panic!("it ended untold: {effects:?}") };
    assert_eq!(told, effects.token.path.len(), "each entry is told once");
    (asked, effects.token.path, end)
}

fn history(definition: &Definition<&'static str>, path: &Path) -> Vec<(&'static str, Status)> {
    events(definition, 0, path).unwrap().iter().map(|event| (event.step, event.status)).collect()
}

#[test]
fn a_step_that_says_no_takes_back_what_was_before_it_in_reverse_and_itself_never() {
    use Phase::{Action, Compensation};
    let definition = trip();
    let (asked, path, end) = drive(&definition, Mode::Execute, |ask| match (ask.phase, ask.step) {
        (Compensation, _) => Outcome::Compensated,
        (_, "card") => refused(),
        _ => done(),
    });
    assert_eq!(end, End::Aborted);
    assert_eq!(
        asked,
        [
            (Action, "flight"),
            (Action, "hotel"),
            (Action, "card"),
            (Compensation, "hotel"),
            (Compensation, "flight"),
        ]
    );
    assert_eq!(
        history(&definition, &path),
        [
            ("flight", Status::Execute),
            ("flight", Status::Success),
            ("hotel", Status::Execute),
            ("hotel", Status::Success),
            ("card", Status::Execute),
            ("card", Status::Failed),
            ("hotel", Status::RolledBack),
            ("flight", Status::RolledBack),
        ]
    );
}

#[test]
fn a_first_step_that_says_no_leaves_nothing_to_take_back() {
    let definition = trip();
    let (asked, path, end) = drive(&definition, Mode::Execute, |_| refused());
    assert_eq!((end, asked), (End::Aborted, vec![(Phase::Action, "flight")]));
    assert_eq!(history(&definition, &path), [("flight", Status::Execute), ("flight", Status::Failed)]);
}

#[test]
fn rolled_back_is_told_when_the_compensation_is_answered_and_not_before() {
    let definition = trip();
    let rejected = path(&[(0, done()), (1, refused())]);
    assert!(history(&definition, &rejected).iter().all(|(_, status)| *status != Status::RolledBack));
    let effects =
        advance(&definition, token(Mode::Execute, &[(0, done())]), reply(1, Phase::Action, refused()))
            .unwrap();
    assert_eq!(effects.tell, Some(Standing::Open), "it is not over while a compensation is out");
    let ask = Ask { step: "flight", index: StepIndex(0), phase: Phase::Compensation };
    assert_eq!(effects.ask, Some(ask));
    let effects =
        advance(&definition, effects.token, reply(0, Phase::Compensation, Outcome::Compensated)).unwrap();
    assert_eq!((effects.ask, effects.tell), (None, Some(Standing::Ended(End::Aborted))));
    assert_eq!(history(&definition, &effects.token.path).last(), Some(&("flight", Status::RolledBack)));
}

#[test]
fn an_event_has_the_time_of_its_reply_and_the_reason_of_its_rejection() {
    let definition = trip();
    let path = path(&[(0, done()), (1, refused()), (0, Outcome::Compensated)]);
    let events = events(&definition, 1_000, &path).unwrap();
    assert_eq!(events.iter().map(|event| event.at).collect::<Vec<_>>(), [1_000, 1, 1, 2, 3]);
    let no = Reason::Refused("no".to_owned());
    let reasons: Vec<_> = events.iter().filter_map(|event| event.reason).collect();
    assert_eq!(reasons, [&no]);
    assert_eq!(path.rejection(), Some(&no));
}

#[test]
fn steps_hand_data_on_to_those_behind_them() {
    let path = path(&[(0, Outcome::Done(b"seat 12A".to_vec())), (1, refused()), (0, Outcome::Compensated)]);
    assert_eq!(path.data(StepIndex(0)), Some(&b"seat 12A"[..]));
    assert_eq!(path.data(StepIndex(1)), None, "a rejected step has handed nothing on");
    assert_eq!(path.data(StepIndex(7)), None);
}

#[test]
fn to_decide_asks_the_deciding_step_alone_and_tells_nothing() {
    let definition = trip();
    let effects = start(&definition, SAGA, Mode::Decide);
    let ask = Ask { step: "card", index: StepIndex(2), phase: Phase::Cancel };
    assert_eq!((effects.ask, effects.tell), (Some(ask), None));

    let driven_on = |outcome| {
        let effects =
            advance(&definition, token(Mode::Decide, &[]), reply(2, Phase::Cancel, outcome)).unwrap();
        assert_eq!(effects.tell, None, "a decision is no progress");
        assert!(effects.token.path.is_empty(), "its path is the same as everybody's, from its first step");
        (effects.token.mode, effects.ask.map(|ask| (ask.step, ask.phase)))
    };
    assert_eq!(driven_on(done()), (Mode::Execute, Some(("flight", Phase::Action))));
    for no in [refused(), cancelled()] {
        assert_eq!(driven_on(no), (Mode::Cancel, Some(("flight", Phase::Cancel))));
    }
}

#[test]
fn to_cancel_asks_without_acting_and_takes_back_what_is_there() {
    use Phase::{Cancel, Compensation};
    let definition = trip();
    let (asked, path, end) = drive(&definition, Mode::Cancel, |ask| match (ask.phase, ask.step) {
        (Compensation, _) => Outcome::Compensated,
        (_, "flight") => done(),
        _ => cancelled(),
    });
    assert_eq!(end, End::Aborted);
    assert_eq!(asked, [(Cancel, "flight"), (Cancel, "hotel"), (Compensation, "flight")]);
    assert_eq!(path.rejection(), Some(&Reason::Cancelled));
}

#[test]
fn every_mode_drives_a_saga_along_one_path() {
    let definition = trip();
    for rejects in ["flight", "hotel", "card"] {
        let answer = |ask: &Ask<&'static str>| match ask.phase {
            Phase::Compensation => Outcome::Compensated,
            Phase::Action | Phase::Cancel if ask.step == rejects => refused(),
            Phase::Action | Phase::Cancel => done(),
        };
        let (_, executed, _) = drive(&definition, Mode::Execute, answer);
        let (_, cancelled, _) = drive(&definition, Mode::Cancel, answer);
        let statuses = |path: &Path| history(&definition, path);
        assert_eq!(statuses(&executed), statuses(&cancelled), "{rejects}");
    }
}

#[test]
fn a_saga_without_a_pivot_is_decided_by_its_last_compensatable_step() {
    let definition =
        Definition::new("loan", 1).compensatable("book").compensatable("card").retriable("mail").build();
    assert_eq!(definition.decider(), Some(StepIndex(1)));
    assert_eq!(
        start(&definition, SAGA, Mode::Decide).ask.map(|ask| (ask.step, ask.phase)),
        Some(("card", Phase::Cancel))
    );
    let (_, _, end) = drive(&definition, Mode::Execute, |_| done());
    assert_eq!(end, End::Committed);
    let plain = Definition::new("loan", 2).compensatable("book").build();
    assert_eq!(plain.decider(), Some(StepIndex(0)));
    let (asked, _, end) = drive(&plain, Mode::Decide, |_| cancelled());
    assert_eq!((end, asked.len()), (End::Aborted, 2), "asked to decide, and again for its place in the path");
}

#[test]
fn a_saga_that_nothing_can_reject_cannot_be_cancelled() {
    let definition = Definition::new("notice", 1).retriable("mail").retriable("letter").build();
    assert_eq!(definition.decider(), None);
    for mode in [Mode::Execute, Mode::Decide, Mode::Cancel] {
        let effects = start(&definition, SAGA, mode);
        assert_eq!(effects.token.mode, Mode::Execute);
        let (asked, _, end) = drive(&definition, mode, |_| done());
        assert_eq!((end, asked), (End::Committed, vec![(Phase::Action, "mail"), (Phase::Action, "letter")]));
    }
    let undecidable = advance(&definition, token(Mode::Decide, &[]), reply(0, Phase::Cancel, done()));
    assert_eq!(undecidable, Err(Illegal::NoSuchStep { step: StepIndex(0) }));
}

#[test]
fn a_saga_of_one_pivot_is_what_that_says() {
    let definition = Definition::new("payment", 1).pivot("card").build();
    let (_, path, end) = drive(&definition, Mode::Execute, |_| done());
    assert_eq!((end, path.len()), (End::Committed, 1));
    let (_, path, end) = drive(&definition, Mode::Execute, |_| refused());
    assert_eq!((end, path.len()), (End::Aborted, 1));
}

#[test]
fn the_longest_saga_goes_all_the_way_there_and_back() {
    let mut builder = Definition::new("long", 1).compensatable("step");
    for _ in 1..MAX_STEPS {
        builder = builder.compensatable("step");
    }
    let definition = builder.build();
    assert_eq!(definition.len(), MAX_STEPS);
    let last = StepIndex(u8::try_from(MAX_STEPS - 1).unwrap());
    assert_eq!((definition.decider(), definition.kind(last)), (Some(last), Some(Kind::Compensatable)));
    let (_, path, end) = drive(&definition, Mode::Execute, |_| done());
    assert_eq!((end, path.len()), (End::Committed, MAX_STEPS));
    let (_, path, end) = drive(&definition, Mode::Execute, |ask| match ask.phase {
        Phase::Compensation => Outcome::Compensated,
        _ if ask.index == last => refused(),
        _ => done(),
    });
    assert_eq!((end, path.len()), (End::Aborted, 2 * MAX_STEPS - 1));
}

#[test]
#[should_panic(expected = "has more than 64 steps")]
fn one_step_too_many_is_refused_by_the_builder() {
    let mut builder = Definition::new("long", 1).retriable("step");
    for _ in 0..MAX_STEPS {
        builder = builder.retriable("step");
    }
}

/// Each variant of [`Illegal`], and each way to it.
#[test]
fn what_cannot_come_is_refused_by_name() {
    use Mode::{Cancel, Decide, Execute};
    use Outcome::Compensated;
    use Phase::{Action, Compensation};
    let step = StepIndex;
    let back = [(0, done()), (1, refused())];
    let committed = [(0, done()), (1, done()), (2, done()), (3, done())];
    let aborted = [(0, refused())];
    let (expected, got) = (step(0), step(1));
    let cases: &[(&str, Token, Reply, Illegal)] = &[
        (
            "another step's reply",
            token(Execute, &[]),
            reply(1, Action, done()),
            Illegal::WrongStep { expected, got },
        ),
        (
            "another step's compensation",
            token(Execute, &back),
            reply(1, Compensation, Compensated),
            Illegal::WrongStep { expected, got },
        ),
        (
            "a step that does not exist",
            token(Execute, &[]),
            reply(200, Action, done()),
            Illegal::WrongStep { expected, got: step(200) },
        ),
        (
            "a compensation's reply on the way forward",
            token(Execute, &[]),
            reply(0, Compensation, Compensated),
            Illegal::WrongPhase { step: step(0), expected: Action, got: Compensation },
        ),
        (
            "an action's reply in cancel mode",
            token(Cancel, &[]),
            reply(0, Action, done()),
            Illegal::WrongPhase { step: step(0), expected: Phase::Cancel, got: Action },
        ),
        (
            "a cancellation's reply in execute mode",
            token(Execute, &[]),
            reply(0, Phase::Cancel, cancelled()),
            Illegal::WrongPhase { step: step(0), expected: Action, got: Phase::Cancel },
        ),
        (
            "an action's reply on the way back",
            token(Execute, &back),
            reply(0, Action, done()),
            Illegal::WrongPhase { step: step(0), expected: Compensation, got: Action },
        ),
        (
            "compensated, asked to act",
            token(Execute, &[]),
            reply(0, Action, Compensated),
            Illegal::CompensatedWhileForward { step: step(0) },
        ),
        (
            "done, asked to compensate",
            token(Execute, &back),
            reply(0, Compensation, done()),
            Illegal::ActionReplyWhileBackward { step: step(0) },
        ),
        (
            "a compensation that says no",
            token(Execute, &back),
            reply(0, Compensation, refused()),
            Illegal::ActionReplyWhileBackward { step: step(0) },
        ),
        (
            "a retriable step that says no",
            token(Execute, &committed[..3]),
            reply(3, Action, refused()),
            Illegal::RetriableRejected { step: step(3) },
        ),
        (
            "a reply after success",
            token(Execute, &committed),
            reply(0, Action, done()),
            Illegal::AfterTheEnd { end: End::Committed, step: step(0) },
        ),
        (
            "a success after the rollback",
            token(Execute, &aborted),
            reply(2, Action, done()),
            Illegal::AfterTheEnd { end: End::Aborted, step: step(2) },
        ),
        (
            "a decision by another step",
            token(Decide, &[]),
            reply(1, Phase::Cancel, done()),
            Illegal::WrongStep { expected: step(2), got },
        ),
        (
            "a decision that nobody asked for",
            token(Decide, &[]),
            reply(2, Action, done()),
            Illegal::WrongPhase { step: step(2), expected: Phase::Cancel, got: Action },
        ),
        (
            "a decision that is none",
            token(Decide, &[]),
            reply(2, Phase::Cancel, Compensated),
            Illegal::CompensatedWhileForward { step: step(2) },
        ),
        (
            "a decision on the way",
            token(Decide, &[(0, done())]),
            reply(2, Phase::Cancel, cancelled()),
            Illegal::PathBeforeDecision { length: 1 },
        ),
        (
            "a cancelled saga past its pivot",
            token(Cancel, &[(0, done()), (1, done())]),
            reply(2, Phase::Cancel, done()),
            Illegal::CommittedWhileCancelled,
        ),
        (
            "a path that cannot be",
            token(Execute, &[(0, Compensated)]),
            reply(0, Action, done()),
            Illegal::CompensatedWhileForward { step: step(0) },
        ),
    ];
    let definition = trip();
    for (case, token, reply, illegal) in cases {
        let refused = advance(&definition, token.clone(), reply.clone());
        assert_eq!(refused.as_ref(), Err(illegal), "{case}");
        assert!(!illegal.to_string().is_empty(), "{case}");
    }
}

/// Without a retriable step behind the pivot, "past its pivot" is the end.
#[test]
fn a_cancelled_saga_never_commits() {
    let definition = Definition::new("short", 1).compensatable("flight").pivot("card").build();
    let refused = advance(&definition, token(Mode::Cancel, &[(0, done())]), reply(1, Phase::Cancel, done()));
    assert_eq!(refused, Err(Illegal::CommittedWhileCancelled));
}

#[test]
fn a_path_that_cannot_be_has_no_history() {
    let definition = trip();
    let impossible = path(&[(1, done())]);
    let illegal = Illegal::WrongStep { expected: StepIndex(0), got: StepIndex(1) };
    assert_eq!(events(&definition, 0, &impossible).unwrap_err(), illegal);
    assert_eq!(impossible.position(&definition), Err(illegal));
    assert_eq!(Path::new().position(&definition), Ok(Position::START));
    let nowhere = Position::Forward(StepIndex(9));
    let entry = Entry { step: StepIndex(9), outcome: refused(), at: 1 };
    assert_eq!(nowhere.after(&definition, &entry), Err(Illegal::NoSuchStep { step: StepIndex(9) }));
}

/// A message may come again after the saga went on: the token in it is the old one, and calls for the same.
#[test]
fn the_same_reply_calls_for_the_same_effects() {
    let definition = trip();
    let once = || advance(&definition, token(Mode::Execute, &[(0, done())]), reply(1, Phase::Action, done()));
    let Effects { token, ask, .. } = once().unwrap();
    assert_eq!(once(), once());
    assert_eq!((token.path.len(), ask.map(|ask| ask.step)), (2, Some("card")));
}

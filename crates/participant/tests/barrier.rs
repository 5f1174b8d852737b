//! The barrier's table, row by row, on SQLite and on MariaDB; and batches, which must come to the same as their commands one
//! by one.
#![allow(clippy::unwrap_used, reason = "all of this file is tests, also what carries no test attribute")]

mod support;

use bytes::Bytes;
use db::{Db, Error, Value};
use participant::barrier::{self, Decision, Found, Key, PURGE_ROWS, Row};
use participant::{Answer, Command};
use proptest::prelude::*;
use saga::{Outcome, Phase, Reason, StepIndex};
use wire::messages::Recorded;

use support::{
    Counting, Effects, Input, MIGRATIONS, batch, batch_unseen, command, effects, effects_of, recorded, rows,
};
use testdb::TestDb;

use Phase::{Action, Cancel, Compensation};

testdb::on_both! {
    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    the_table_row_by_row,
    the_table_in_one_batch_for_all_its_rows,
    a_reply_is_the_same_bytes_for_ever,
    action_compensation_and_cancellation_of_one_step_in_one_batch_in_every_order,
    what_is_rejected_or_to_be_retried_does_not_spoil_its_neighbours,
    what_was_to_be_retried_can_still_be_done_and_still_be_cancelled,
    a_database_error_rolls_everything_back_and_is_nobodys_answer,
    steps_and_sagas_do_not_mix,
    rows_that_contradict_each_other_are_parked_without_their_neighbours,
    a_purge_keeps_what_may_still_be_asked_for,
    a_saga_is_forgotten_whole_or_not_at_all,
    a_purge_is_bounded_and_comes_to_its_end,
    batches_come_to_the_same_as_their_commands_one_by_one,
    what_is_handled_unseen_comes_to_the_same_or_to_nothing;
}

const NONE: Effects = Effects { acted: 0, undone: 0 };
const LIVE: Effects = Effects { acted: 1, undone: 0 };
const GONE: Effects = Effects { acted: 1, undone: 1 };

fn cancelled() -> Outcome {
    Outcome::Rejected(Reason::Cancelled)
}

fn refused() -> Outcome {
    Outcome::Rejected(Reason::Refused("no".to_owned()))
}

/// One row of the table.
struct Case {
    row: &'static str,
    /// What the step would do.
    input: Input,
    /// What came before.
    before: &'static [Phase],
    arrives: Phase,
    answer: fn(u64) -> Outcome,
    /// Whether it is the answer to one of those before, at its time; or a new one.
    again: bool,
    after: Effects,
}

/// What the counting participant hands on.
fn done(saga: u64) -> Outcome {
    Outcome::Done(format!("3 of {saga}").into_bytes())
}

const TABLE: &[Case] = &[
    Case {
        row: "action, nothing there: the effect",
        input: Input::Accept,
        before: &[],
        arrives: Action,
        answer: done,
        again: false,
        after: LIVE,
    },
    Case {
        row: "action, nothing there: a business answer",
        input: Input::Refuse,
        before: &[],
        arrives: Action,
        answer: |_| refused(),
        again: false,
        after: NONE,
    },
    Case {
        row: "action, its row: the recorded reply",
        input: Input::Accept,
        before: &[Action],
        arrives: Action,
        answer: done,
        again: true,
        after: LIVE,
    },
    Case {
        row: "action, its row that says no: the recorded reply",
        input: Input::Refuse,
        before: &[Action],
        arrives: Action,
        answer: |_| refused(),
        again: true,
        after: NONE,
    },
    Case {
        row: "action after action and compensation: the recorded reply",
        input: Input::Accept,
        before: &[Action, Compensation],
        arrives: Action,
        answer: done,
        again: true,
        after: GONE,
    },
    Case {
        row: "compensation, no action row: a tombstone",
        input: Input::Accept,
        before: &[],
        arrives: Compensation,
        answer: |_| Outcome::Compensated,
        again: false,
        after: NONE,
    },
    Case {
        row: "action, a compensation's tombstone: cancelled",
        input: Input::Accept,
        before: &[Compensation],
        arrives: Action,
        answer: |_| cancelled(),
        again: true,
        after: NONE,
    },
    Case {
        row: "action, a cancellation's tombstone: cancelled",
        input: Input::Accept,
        before: &[Cancel],
        arrives: Action,
        answer: |_| cancelled(),
        again: true,
        after: NONE,
    },
    Case {
        row: "compensation, action done: undone",
        input: Input::Accept,
        before: &[Action],
        arrives: Compensation,
        answer: |_| Outcome::Compensated,
        again: false,
        after: GONE,
    },
    Case {
        row: "compensation, action rejected: nothing to undo",
        input: Input::Refuse,
        before: &[Action],
        arrives: Compensation,
        answer: |_| Outcome::Compensated,
        again: false,
        after: NONE,
    },
    Case {
        row: "compensation, a cancellation's tombstone: nothing to undo",
        input: Input::Accept,
        before: &[Cancel],
        arrives: Compensation,
        answer: |_| Outcome::Compensated,
        again: false,
        after: NONE,
    },
    Case {
        row: "compensation, its row: the recorded reply, and one undoing",
        input: Input::Accept,
        before: &[Action, Compensation],
        arrives: Compensation,
        answer: |_| Outcome::Compensated,
        again: true,
        after: GONE,
    },
    Case {
        row: "compensation, its row beside a tombstone: the recorded reply",
        input: Input::Accept,
        before: &[Compensation, Action],
        arrives: Compensation,
        answer: |_| Outcome::Compensated,
        again: true,
        after: NONE,
    },
    Case {
        row: "cancel, no action row: a tombstone",
        input: Input::Accept,
        before: &[],
        arrives: Cancel,
        answer: |_| cancelled(),
        again: false,
        after: NONE,
    },
    Case {
        row: "cancel, action done: the recorded reply, and no undoing",
        input: Input::Accept,
        before: &[Action],
        arrives: Cancel,
        answer: done,
        again: true,
        after: LIVE,
    },
    Case {
        row: "cancel, action rejected: the recorded reply",
        input: Input::Refuse,
        before: &[Action],
        arrives: Cancel,
        answer: |_| refused(),
        again: true,
        after: NONE,
    },
    Case {
        row: "cancel, its tombstone: the recorded reply",
        input: Input::Accept,
        before: &[Cancel, Action],
        arrives: Cancel,
        answer: |_| cancelled(),
        again: true,
        after: NONE,
    },
    Case {
        row: "cancel, a compensation's tombstone: the recorded reply",
        input: Input::Accept,
        before: &[Compensation],
        arrives: Cancel,
        answer: |_| cancelled(),
        again: true,
        after: NONE,
    },
];

/// The time at which the last command of a case arrives; those before it come before.
const NOW: u64 = 1_000;

/// Brings about what a case finds, each command in a transaction of its own.
async fn prepare(db: &Db, saga: u64, case: &Case) -> Vec<Answer> {
    let mut answers = Vec::new();
    for (at, phase) in (1..).zip(case.before) {
        let given = batch(db, &Counting::default(), vec![command(saga, 3, *phase, case.input)], at).await;
        answers.extend(given.unwrap());
    }
    answers
}

fn check(case: &Case, saga: u64, before: &[Answer], answer: &Answer) {
    let row = case.row;
    assert_eq!(recorded(answer).outcome, (case.answer)(saga), "{row}");
    if case.again {
        // A compensation's tombstone is no reply to anything that came; its time is that of the compensation.
        let known = before.contains(answer) || recorded(answer) == Recorded { outcome: cancelled(), at: 1 };
        assert!(known, "{row}: {answer:?} is none of {before:?}");
    } else {
        assert_eq!(recorded(answer).at, NOW, "{row}");
    }
}

async fn the_table_row_by_row(at: &TestDb) {
    let db = at.open(MIGRATIONS);
    for (saga, case) in (1..).zip(TABLE) {
        let before = prepare(&db, saga, case).await;
        let arrives = vec![command(saga, 3, case.arrives, case.input)];
        let answers = batch(&db, &Counting::default(), arrives, NOW).await.unwrap();
        check(case, saga, &before, &answers[0]);
        assert_eq!(effects_of(&db, saga, 3).await, case.after, "{}", case.row);
    }
}

async fn the_table_in_one_batch_for_all_its_rows(at: &TestDb) {
    let db = at.open(MIGRATIONS);
    let (mut before, mut arrive) = (Vec::new(), Vec::new());
    for (saga, case) in (1..).zip(TABLE) {
        before.push(prepare(&db, saga, case).await);
        arrive.push(command(saga, 3, case.arrives, case.input));
    }
    let answers = batch(&db, &Counting::default(), arrive, NOW).await.unwrap();
    for ((saga, case), (before, answer)) in (1..).zip(TABLE).zip(before.iter().zip(&answers)) {
        check(case, saga, before, answer);
        assert_eq!(effects_of(&db, saga, 3).await, case.after, "{}", case.row);
    }
}

async fn a_reply_is_the_same_bytes_for_ever(at: &TestDb) {
    let ask = || vec![command(1, 3, Action, Input::Accept), command(2, 3, Action, Input::Refuse)];
    let undo =
        || vec![command(1, 3, Compensation, Input::Accept), command(2, 3, Compensation, Input::Accept)];
    let db = at.open(MIGRATIONS);
    let acted = batch(&db, &Counting::default(), ask(), 10).await.unwrap();
    let undone = batch(&db, &Counting::default(), undo(), 20).await.unwrap();
    db.close().await;
    let db = at.open(MIGRATIONS);
    assert_eq!(batch(&db, &Counting::default(), ask(), 30).await.unwrap(), acted);
    assert_eq!(batch(&db, &Counting::default(), undo(), 30).await.unwrap(), undone);
    let times: Vec<u64> = acted.iter().chain(&undone).map(|answer| recorded(answer).at).collect();
    assert_eq!(times, [10, 10, 20, 20], "a repeated reply tells the time of the first");
    assert_eq!(effects_of(&db, 1, 3).await, GONE);
}

/// All orders of these phases.
fn orders(phases: &[Phase]) -> Vec<Vec<Phase>> {
    if phases.is_empty() {
        return vec![Vec::new()];
    }
    let with_first = |first: usize| {
        let mut rest = phases.to_vec();
        let phase = rest.remove(first);
        orders(&rest).into_iter().map(move |mut order| {
            order.insert(0, phase);
            order
        })
    };
    (0..phases.len()).flat_map(with_first).collect()
}

async fn action_compensation_and_cancellation_of_one_step_in_one_batch_in_every_order(at: &TestDb) {
    let other = at.another();
    let (together, apart) = (at.open(MIGRATIONS), other.open(MIGRATIONS));
    let twice = [Action, Action, Compensation, Compensation, Cancel, Cancel];
    for (saga, order) in (1..).zip(orders(&twice)) {
        let commands = || order.iter().map(|phase| command(saga, 3, *phase, Input::Accept));
        let answers = batch(&together, &Counting::default(), commands().collect(), 1).await.unwrap();
        let one_by_one = batch_each(&apart, commands(), 1).await;
        assert_eq!(answers, one_by_one, "{order:?}");
    }
    let all = effects(&together).await;
    assert_eq!(all, effects(&apart).await);
    assert!(all.values().all(|effects| *effects == LIVE || *effects == GONE), "{all:?}");
    assert_eq!(rows(&together).await, rows(&apart).await);
}

/// Each command in a transaction of its own.
async fn batch_each(db: &Db, commands: impl Iterator<Item = Command<Input>>, now: u64) -> Vec<Answer> {
    let mut answers = Vec::new();
    for command in commands {
        answers.extend(batch(db, &Counting::default(), vec![command], now).await.unwrap());
    }
    answers
}

async fn what_is_rejected_or_to_be_retried_does_not_spoil_its_neighbours(at: &TestDb) {
    let db = at.open(MIGRATIONS);
    let inputs = [Input::Accept, Input::Refuse, Input::Later, Input::Accept];
    let commands = (1..).zip(inputs).map(|(saga, input)| command(saga, 3, Action, input)).collect();
    let answers = batch(&db, &Counting::default(), commands, 1).await.unwrap();
    assert_eq!(recorded(&answers[0]).outcome, done(1));
    assert_eq!(recorded(&answers[1]).outcome, refused());
    assert_eq!(answers[2], Answer::Retry("not now".to_owned()));
    assert_eq!(recorded(&answers[3]).outcome, done(4));
    let sagas: Vec<u64> = rows(&db).await.iter().map(|row| row.0).collect();
    assert_eq!(sagas, [1, 2, 4], "what is to be retried has left no trace");
}

async fn what_was_to_be_retried_can_still_be_done_and_still_be_cancelled(at: &TestDb) {
    let db = at.open(MIGRATIONS);
    let later = || (1..=3).map(|saga| command(saga, 3, Action, Input::Later)).collect();
    batch(&db, &Counting::default(), later(), 1).await.unwrap();
    assert_eq!((rows(&db).await, effects(&db).await.len()), (Vec::new(), 0));
    let now = vec![
        command(1, 3, Action, Input::Accept),
        command(2, 3, Cancel, Input::Accept),
        command(3, 3, Compensation, Input::Accept),
    ];
    let answers = batch(&db, &Counting::default(), now, 2).await.unwrap();
    let outcomes: Vec<Outcome> = answers.iter().map(|answer| recorded(answer).outcome).collect();
    assert_eq!(outcomes, [done(1), cancelled(), Outcome::Compensated]);
}

async fn a_database_error_rolls_everything_back_and_is_nobodys_answer(at: &TestDb) {
    let db = at.open(MIGRATIONS);
    let acted =
        batch(&db, &Counting::default(), vec![command(1, 3, Action, Input::Accept)], 1).await.unwrap();
    let before = rows(&db).await;
    let commands = || {
        vec![
            command(1, 3, Action, Input::Accept),
            command(2, 3, Action, Input::Accept),
            command(3, 3, Cancel, Input::Accept),
            command(4, 3, Compensation, Input::Accept),
            command(1, 3, Compensation, Input::Accept),
        ]
    };
    for error in [Error::Full, Error::Unavailable(db::Outage::Busy)] {
        // The first call is the action of saga 2, the second one the undoing of saga 1.
        for failures in [vec![Some(error.clone())], vec![None, Some(error.clone())]] {
            let failing = Counting::default();
            failing.fail_with(failures);
            assert_eq!(batch(&db, &failing, commands(), 2).await, Err(error.clone()));
            assert_eq!(failing.failures_left(), 0);
            assert_eq!(rows(&db).await, before);
            assert_eq!(effects(&db).await.len(), 1);
        }
    }
    let answers = batch(&db, &Counting::default(), commands(), 3).await.unwrap();
    assert_eq!(answers[0], acted[0]);
    let outcomes: Vec<Outcome> = answers[1..].iter().map(|answer| recorded(answer).outcome).collect();
    assert_eq!(outcomes, [done(2), cancelled(), Outcome::Compensated, Outcome::Compensated]);
    assert_eq!((effects_of(&db, 1, 3).await, effects_of(&db, 2, 3).await), (GONE, LIVE));
}

async fn steps_and_sagas_do_not_mix(at: &TestDb) {
    let db = at.open(MIGRATIONS);
    let first = vec![command(1, 3, Action, Input::Accept), command(1, 4, Compensation, Input::Accept)];
    batch(&db, &Counting::default(), first, 1).await.unwrap();
    let second = vec![command(1, 4, Action, Input::Accept), command(2, 3, Action, Input::Accept)];
    let answers = batch(&db, &Counting::default(), second, 2).await.unwrap();
    assert_eq!(recorded(&answers[0]).outcome, cancelled());
    assert_eq!(recorded(&answers[1]).outcome, done(2));
}

async fn rows_that_contradict_each_other_are_parked_without_their_neighbours(at: &TestDb) {
    let db = at.open(MIGRATIONS);
    let compensated = barrier::compensated(1);
    let rows: [(u64, u8, Bytes); 3] =
        [(1, 1, compensated.clone()), (2, 0, compensated), (3, 0, Bytes::from_static(b"\xff\xff"))];
    for (saga, phase, reply) in rows {
        let written = db.write(move |tx| {
            tx.execute(
                "INSERT INTO saga_barrier (saga, step, phase, reply, recorded_at) VALUES (?, 3, ?, ?, 1)",
                &[Value::from(saga), Value::from(phase), Value::from(&reply[..])],
            )
        });
        assert_eq!(written.await, Ok::<_, Error>(1));
    }
    let commands = (1..=4).map(|saga| command(saga, 3, Compensation, Input::Accept)).collect();
    let answers = batch(&db, &Counting::default(), commands, 2).await.unwrap();
    let parked = |answer: &Answer| match answer {
        Answer::Park(why) => why.clone(),
        other => panic!("{other:?}"),
    };
    assert_eq!(parked(&answers[0]), "saga 1 step 3 has a compensation row and no action row");
    assert_eq!(parked(&answers[1]), "saga 2 step 3 has an action row with a compensation's reply");
    assert!(parked(&answers[2]).starts_with("saga 3 step 3 has an unreadable row: "));
    assert_eq!(recorded(&answers[3]).outcome, Outcome::Compensated);
    assert!(effects(&db).await.is_empty());
}

/// Writes the rows of an action, and of its compensation if there was one, at these times.
async fn record(db: &Db, saga: u64, step: u8, action_at: u64, compensation_at: Option<u64>) {
    let written = db.write(move |tx| {
        let mut records = barrier::Records::default();
        let key = Key { saga, step: StepIndex(step) };
        let done = Recorded { outcome: Outcome::Done(Vec::new()), at: action_at }.encode();
        records.push(key, Row::Action, &done, action_at);
        if let Some(at) = compensation_at {
            records.push(key, Row::Compensation, &barrier::compensated(at), at);
        }
        records.write(tx)
    });
    assert_eq!(written.await, Ok::<(), Error>(()));
}

async fn purge(db: &Db, below: u64, recorded_before: u64) -> u64 {
    let purged: Result<u64, Error> = db.write(move |tx| barrier::purge(tx, below, recorded_before)).await;
    purged.unwrap()
}

async fn keys(db: &Db) -> Vec<(u64, u8, u8)> {
    rows(db).await.into_iter().map(|(saga, step, phase, _)| (saga, step, phase)).collect()
}

async fn a_purge_keeps_what_may_still_be_asked_for(at: &TestDb) {
    let db = at.open(MIGRATIONS);
    record(&db, 1, 0, 100, None).await;
    record(&db, 2, 0, 100, Some(120)).await;
    record(&db, 3, 0, 150, None).await;
    record(&db, 9, 0, 100, Some(120)).await;
    assert_eq!(purge(&db, 1, 1_000).await, 0, "saga 1 has not ended");
    assert_eq!(purge(&db, 9, 100).await, 0, "nothing is old enough");
    assert_eq!(purge(&db, 9, 150).await, 3);
    assert_eq!(keys(&db).await, [(3, 0, 0), (9, 0, 0), (9, 0, 1)]);
    assert_eq!(purge(&db, 9, 151).await, 1);
    assert_eq!(keys(&db).await, [(9, 0, 0), (9, 0, 1)]);
}

/// A message about a saga may be under way for as long as after its last reply, so its earlier replies are kept as long.
async fn a_saga_is_forgotten_whole_or_not_at_all(at: &TestDb) {
    let db = at.open(MIGRATIONS);
    record(&db, 1, 0, 100, Some(200)).await;
    record(&db, 2, 0, 100, None).await;
    record(&db, 2, 1, 200, None).await;
    record(&db, 3, 0, 100, None).await;
    assert_eq!(purge(&db, 9, 150).await, 1, "only saga 3 is quiet");
    let asked = vec![command(1, 0, Action, Input::Accept), command(1, 0, Compensation, Input::Accept)];
    let answers = batch(&db, &Counting::default(), asked, 300).await.unwrap();
    assert_eq!(recorded(&answers[0]), Recorded { outcome: Outcome::Done(Vec::new()), at: 100 });
    assert_eq!(recorded(&answers[1]), Recorded { outcome: Outcome::Compensated, at: 200 });
    assert!(effects(&db).await.is_empty(), "nothing was done for the second time");
    assert_eq!(purge(&db, 9, 201).await, 4);
}

async fn a_purge_is_bounded_and_comes_to_its_end(at: &TestDb) {
    let db = at.open(MIGRATIONS);
    let rows_before = u64::from(PURGE_ROWS) + 10;
    let written = db.write(move |tx| {
        let mut records = barrier::Records::default();
        // Two rows a saga, so that a page may end within one.
        for saga in 1..=rows_before / 2 {
            let key = Key { saga, step: StepIndex(0) };
            records.push(key, Row::Action, &barrier::tombstone(1), 1);
            records.push(key, Row::Compensation, &barrier::compensated(1), 1);
        }
        records.write(tx)
    });
    assert_eq!(written.await, Ok::<(), Error>(()));
    let first = purge(&db, u64::from(u32::MAX), 2).await;
    assert!(first <= u64::from(PURGE_ROWS) && first > 0);
    let left = keys(&db).await;
    assert!(left.iter().all(|(saga, _, _)| left.contains(&(*saga, 0, 0)) && left.contains(&(*saga, 0, 1))));
    let mut purged = first;
    while purged < rows_before {
        let more = purge(&db, u64::from(u32::MAX), 2).await;
        assert!(more > 0, "it got stuck with {} rows left", rows_before - purged);
        purged += more;
    }
    assert!(keys(&db).await.is_empty());
}

fn any_phase() -> impl Strategy<Value = Phase> {
    prop_oneof![Just(Action), Just(Compensation), Just(Cancel)]
}

fn any_input() -> impl Strategy<Value = Input> {
    prop_oneof![4 => Just(Input::Accept), 2 => Just(Input::Refuse), 1 => Just(Input::Later)]
}

/// The barrier on no database: the decisions of the table, one after the other.
fn in_memory(found: &mut Found, key: Key, phase: Phase, input: Input, now: u64) -> Answer {
    let reply = |outcome| Recorded { outcome, at: now }.encode();
    match barrier::decide(key, phase, found).unwrap() {
        Decision::Answer(bytes) => return Answer::Reply(bytes),
        Decision::Act => match input {
            Input::Accept => {
                let data = format!("{} of {}", key.step, key.saga).into_bytes();
                found.action = Some(reply(Outcome::Done(data)));
            }
            Input::Refuse => found.action = Some(reply(refused())),
            _ => return Answer::Retry("not now".to_owned()),
        },
        Decision::Bury => found.action = Some(barrier::tombstone(now)),
        Decision::BuryAndCompensate => {
            found.action = Some(barrier::tombstone(now));
            found.compensation = Some(barrier::compensated(now));
        }
        Decision::Undo | Decision::NothingToUndo => found.compensation = Some(barrier::compensated(now)),
    }
    let row = if phase == Compensation { &found.compensation } else { &found.action };
    Answer::Reply(row.clone().unwrap())
}

/// Commands for three sagas of two steps, cut into batches.
type Schedule = Vec<Vec<(u64, u8, Phase, Input)>>;

fn any_schedule(phases: impl Strategy<Value = Phase>) -> impl Strategy<Value = Schedule> {
    let one = (0..3u64, 0..2u8, phases, any_input());
    prop::collection::vec(prop::collection::vec(one, 1..10), 1..5)
}

/// However commands are cut into batches, they are answered as one by one, and have their effects as one by one.
async fn batches_come_to_the_same_as_their_commands_one_by_one(at: &TestDb) {
    let db = at.open(MIGRATIONS);
    let handle =
        async |commands: Commands<'_>, now| batch(&db, &Counting::default(), commands(), now).await.unwrap();
    tokio::task::block_in_place(|| compare_batches(&db, any_phase(), handle));
}

/// What is taken to come for the first time is answered so, if it does; if not it is refused, with nothing left behind.
async fn what_is_handled_unseen_comes_to_the_same_or_to_nothing(at: &TestDb) {
    let db = at.open(MIGRATIONS);
    let (unseen, refused) = (std::cell::Cell::new(0), std::cell::Cell::new(0));
    let handle = async |commands: Commands<'_>, now| {
        let (rows_before, effects_before) = (rows(&db).await, effects(&db).await);
        match batch_unseen(&db, &Counting::default(), commands(), now).await {
            Some(Ok(mut answers)) => {
                unseen.set(unseen.get() + 1);
                // What got no answer comes again, and then it is looked up.
                for (place, answer) in answers.iter_mut().enumerate() {
                    if matches!(answer, Answer::Retry(_)) {
                        let again = vec![commands().remove(place)];
                        *answer = batch(&db, &Counting::default(), again, now).await.unwrap().remove(0);
                    }
                }
                return answers;
            }
            Some(Err(error)) => {
                assert!(error.violates("saga_barrier.saga"), "{error:?}");
                assert_eq!((rows(&db).await, effects(&db).await), (rows_before, effects_before));
                refused.set(refused.get() + 1);
            }
            None => {}
        }
        batch(&db, &Counting::default(), commands(), now).await.unwrap()
    };
    let mostly_actions = prop_oneof![8 => Just(Action), 1 => Just(Compensation), 1 => Just(Cancel)];
    tokio::task::block_in_place(|| compare_batches(&db, mostly_actions, handle));
    assert!(unseen.get() > 20 && refused.get() > 20, "{unseen:?} and {refused:?}");
}

/// Makes the same batch, as often as wanted.
type Commands<'a> = &'a dyn Fn() -> Vec<Command<Input>>;

fn compare_batches(
    db: &Db,
    phases: impl Strategy<Value = Phase>,
    handle: impl AsyncFn(Commands<'_>, u64) -> Vec<Answer>,
) {
    let runtime = tokio::runtime::Handle::current();
    let next_saga = std::cell::Cell::new(1);
    let config = ProptestConfig { cases: 300, failure_persistence: None, ..ProptestConfig::default() };
    proptest!(config, |(schedule in any_schedule(phases))| {
        let first = next_saga.replace(next_saga.get() + 3);
        let mut model: std::collections::HashMap<Key, Found> = std::collections::HashMap::new();
        for (now, commands) in (1..).zip(schedule) {
            let one = |(saga, step, phase, input): &_| command(first + saga, *step, *phase, *input);
            let answers = runtime.block_on(handle(&|| commands.iter().map(one).collect(), now));
            for ((saga, step, phase, input), answer) in commands.into_iter().zip(answers) {
                let key = Key { saga: first + saga, step: StepIndex(step) };
                let expected = in_memory(model.entry(key).or_default(), key, phase, input, now);
                prop_assert_eq!(answer, expected);
            }
        }
        let effects = runtime.block_on(effects(db));
        for (key, found) in model {
            let is_done = |bytes: &Bytes| matches!(Recorded::decode(bytes).unwrap().outcome, Outcome::Done(_));
            let acted = found.action.as_ref().is_some_and(is_done);
            let expected = Effects { acted: acted.into(), undone: (acted && found.compensation.is_some()).into() };
            let got = effects.get(&(key.saga, key.step.0)).copied().unwrap_or_default();
            prop_assert_eq!(got, expected);
        }
    });
}

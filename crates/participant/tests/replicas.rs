//! Two replicas on one MariaDB, with commands of one step in hand at the same time: one effect, and equal replies. On SQLite a
//! database belongs to one process, whose transactions come one after the other; there is nothing to show.
#![allow(clippy::unwrap_used, reason = "all of this file is tests, also what carries no test attribute")]

mod support;

use std::sync::{Arc, Mutex};

use db::{Db, Error};
use participant::{Answer, Command, handle};
use saga::{Outcome, Phase, Reason};
use support::{Counting, Effects, Input, MIGRATIONS, batch, command, effects, effects_of, recorded};
use testdb::TestDb;
use tokio::sync::{mpsc, oneshot};

use Phase::{Action, Cancel, Compensation};

const STEP: u8 = 3;
const LIVE: Effects = Effects { acted: 1, undone: 0 };
const GONE: Effects = Effects { acted: 1, undone: 1 };

fn cancelled() -> Outcome {
    Outcome::Rejected(Reason::Cancelled)
}

fn done(saga: u64) -> Outcome {
    Outcome::Done(format!("{STEP} of {saga}").into_bytes())
}

/// A transaction of a replica that has handled its commands and waits before its commit.
struct Held {
    /// Tells each time that the commands were handled.
    handled: mpsc::UnboundedReceiver<()>,
    go: std::sync::mpsc::Sender<()>,
    answers: tokio::task::JoinHandle<Result<Vec<Answer>, Error>>,
}

impl Held {
    /// Handles the commands and waits in the first run of the transaction, so that another replica's comes in between.
    async fn before_commit(db: &Db, commands: impl Fn() -> Vec<Command<Input>>) -> Held {
        let (tell, handled) = mpsc::unbounded_channel();
        let (go, wait) = std::sync::mpsc::channel();
        let (db, commands, wait) = (db.clone(), commands(), Mutex::new(Some(wait)));
        let answers = tokio::spawn(async move {
            db.write(move |tx| {
                let answers = handle(&Counting::default(), tx, &commands, 20, &mut ())?;
                tell.send(()).unwrap();
                if let Some(wait) = wait.lock().unwrap().take() {
                    wait.recv().unwrap();
                }
                Ok(answers)
            })
            .await
        });
        let mut held = Held { handled, go, answers };
        held.handled.recv().await.unwrap();
        held
    }

    async fn commit(self) -> Vec<Answer> {
        self.go.send(()).unwrap();
        self.answers.await.unwrap().unwrap()
    }
}

/// A replica whose action has had its effect and has not yet recorded it: it waits in `act`, in its first run.
struct Acting {
    go: oneshot::Sender<()>,
    answers: tokio::task::JoinHandle<Result<Vec<Answer>, Error>>,
}

impl Acting {
    async fn on(db: &Db, commands: Vec<Command<Input>>) -> Acting {
        let (tell, began) = oneshot::channel();
        let (go, wait) = oneshot::channel::<()>();
        let participant = Counting::default();
        participant.wait_once_in_act(Box::new(move || {
            tell.send(()).unwrap();
            wait.blocking_recv().unwrap();
        }));
        let db = db.clone();
        let answers = tokio::spawn(async move { batch(&db, &participant, commands, 20).await });
        began.await.unwrap();
        Acting { go, answers }
    }

    async fn goes_on(self) -> Answer {
        self.go.send(()).unwrap();
        self.answers.await.unwrap().unwrap().remove(0)
    }
}

async fn one(db: &Db, saga: u64, phase: Phase) -> Answer {
    batch(db, &Counting::default(), vec![command(saga, STEP, phase, Input::Accept)], 10)
        .await
        .unwrap()
        .remove(0)
}

fn asks(saga: u64, phase: Phase) -> Vec<Command<Input>> {
    vec![command(saga, STEP, phase, Input::Accept)]
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn whatever_overtakes_an_action_that_has_not_been_recorded_decides() {
    let at = TestDb::mariadb();
    let (slow, quick) = (at.open(MIGRATIONS), at.open(MIGRATIONS));
    // What comes in between, and what the action and the step then are.
    let cases: [(u64, Phase, Outcome, Outcome, Effects); 3] = [
        (1, Action, done(1), done(1), LIVE),
        (2, Compensation, Outcome::Compensated, cancelled(), Effects::default()),
        (3, Cancel, cancelled(), cancelled(), Effects::default()),
    ];
    for (saga, phase, overtaker, action, after) in cases {
        let acting = Acting::on(&slow, asks(saga, Action)).await;
        let answer = one(&quick, saga, phase).await;
        assert_eq!(recorded(&answer).outcome, overtaker, "{phase:?}");
        let late = acting.goes_on().await;
        assert_eq!(recorded(&late).outcome, action, "{phase:?}");
        if phase != Compensation {
            assert_eq!(late, answer, "both tell what was recorded, byte for byte");
        }
        assert_eq!(effects_of(&quick, saga, STEP).await, after, "{phase:?}");
        // And so it stays.
        assert_eq!(one(&quick, saga, Action).await, late);
    }
    assert_eq!((slow.stats().reruns, quick.stats().reruns), (3, 0));
}

/// The first transaction holds its rows; the second one waits for them and is then wrong about what there is.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn of_two_that_find_nothing_the_second_waits_and_finds_the_first() {
    let at = TestDb::mariadb();
    let (first, second) = (at.open(MIGRATIONS), at.open(MIGRATIONS));
    let phases = [Action, Compensation, Cancel];
    for (saga, (one_phase, other_phase)) in
        (1..).zip(phases.iter().flat_map(|one| phases.map(|other| (*one, other))))
    {
        let held = Held::before_commit(&first, || asks(saga, one_phase)).await;
        let waiting = {
            let second = second.clone();
            tokio::spawn(async move { one(&second, saga, other_phase).await })
        };
        // Whether it waits already or comes later must make no difference.
        tokio::task::yield_now().await;
        let answers = held.commit().await;
        let other = waiting.await.unwrap();
        let expected = match (one_phase, other_phase) {
            (Action, Action | Cancel) => done(saga),
            (_, Compensation) => Outcome::Compensated,
            (Compensation | Cancel, Action | Cancel) => cancelled(),
        };
        assert_eq!(recorded(&other).outcome, expected, "{one_phase:?} {other_phase:?}");
        let same_row = (one_phase == Compensation) == (other_phase == Compensation);
        assert_eq!(answers[0] == other, same_row, "{one_phase:?} {other_phase:?}");
        let after = match (one_phase, other_phase) {
            (Action, Compensation) => GONE,
            (Action, _) => LIVE,
            _ => Effects::default(),
        };
        assert_eq!(effects_of(&first, saga, STEP).await, after, "{one_phase:?} {other_phase:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_compensation_on_two_replicas_at_once_undoes_once() {
    let at = TestDb::mariadb();
    let (first, second) = (at.open(MIGRATIONS), at.open(MIGRATIONS));
    for saga in 1..=5 {
        one(&first, saga, Action).await;
        let held = Held::before_commit(&first, || asks(saga, Compensation)).await;
        let waiting = {
            let second = second.clone();
            tokio::spawn(async move { one(&second, saga, Compensation).await })
        };
        let answers = held.commit().await;
        assert_eq!(answers[0], waiting.await.unwrap());
        assert_eq!(effects_of(&first, saga, STEP).await, GONE);
    }
}

/// Batches of the same commands in other orders, all at once: whoever is in whose way, each step comes to one end.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn replicas_with_the_same_commands_in_other_orders_agree() {
    const REPLICAS: usize = 4;
    const SAGAS: u64 = 24;
    let at = TestDb::mariadb();
    let replicas: Vec<Db> = (0..REPLICAS).map(|_| at.open(MIGRATIONS)).collect();
    for round in 0..12_u64 {
        let start = Arc::new(tokio::sync::Barrier::new(REPLICAS));
        let tasks: Vec<_> = (0..REPLICAS as u64)
            .map(|replica| {
                let (db, start) = (replicas[replica as usize].clone(), start.clone());
                tokio::spawn(async move {
                    let mut sagas: Vec<u64> = (1..=SAGAS).map(|saga| round * SAGAS + saga).collect();
                    if replica % 2 == 1 {
                        sagas.reverse();
                    }
                    sagas.rotate_left((replica * 5) as usize);
                    // Each asks something else of most sagas.
                    let ask = |saga: &u64| {
                        let phase = [Action, Compensation, Cancel, Action][((saga + replica) % 4) as usize];
                        command(*saga, STEP, phase, Input::Accept)
                    };
                    let commands: Vec<_> = sagas.iter().map(ask).collect();
                    let asked: Vec<(u64, Phase)> =
                        commands.iter().map(|command| (command.token.saga, command.phase)).collect();
                    start.wait().await;
                    let answers = batch(&db, &Counting::default(), commands, 20 + replica).await.unwrap();
                    asked.into_iter().zip(answers).collect::<Vec<_>>()
                })
            })
            .collect();
        let mut all = Vec::new();
        for task in tasks {
            all.extend(task.await.unwrap());
        }
        let effects = effects(&replicas[0]).await;
        for saga in (1..=SAGAS).map(|saga| round * SAGAS + saga) {
            let of_action: Vec<&Answer> = all
                .iter()
                .filter(|((id, phase), _)| *id == saga && *phase != Compensation)
                .map(|(_, answer)| answer)
                .collect();
            assert!(of_action.windows(2).all(|pair| pair[0] == pair[1]), "{of_action:?}");
            let acted = recorded(of_action[0]).outcome == done(saga);
            let compensated = all.iter().any(|((id, phase), _)| *id == saga && *phase == Compensation);
            let expected = Effects { acted: acted.into(), undone: (acted && compensated).into() };
            let got = effects.get(&(saga, STEP)).copied().unwrap_or_default();
            assert_eq!(got, expected, "saga {saga}");
        }
    }
    let reruns: u64 = replicas.iter().map(|db| db.stats().reruns).sum();
    assert!(reruns > 0, "they were never in each other's way");
}

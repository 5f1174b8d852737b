//! What the tests of this crate share: a participant that counts, in a table of a real database.
#![allow(dead_code, unreachable_pub, reason = "each test file uses its part of this module")]
#![allow(clippy::unwrap_used, reason = "what fails here fails the test")]

use std::collections::{HashMap, VecDeque};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};

use bytes::Bytes;
use db::{Db, Error, Migration, Tx, Value};
use participant::{
    Answer, BadInput, Command, Outcome, Participant, Undone, Work, barrier, handle, handle_unseen,
};
use saga::{Mode, Phase, StepIndex, Token};
use wire::messages::Recorded;
use wire::time::UnixMillis;

/// The tables of a counting participant. `effect` has no key: a second effect is a second row.
pub const MIGRATIONS: &[Migration] = &[
    Migration {
        number: 1,
        name: "effect",
        sqlite: "CREATE TABLE effect (saga INTEGER NOT NULL, step INTEGER NOT NULL, undone INTEGER NOT NULL) STRICT;",
        mysql: "CREATE TABLE IF NOT EXISTS effect (saga BIGINT NOT NULL, step INT NOT NULL, undone INT NOT NULL);",
    },
    barrier::migration(2),
];

/// What a command's input asks of the participant.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Input {
    /// To have the effect.
    Accept,
    /// To say no.
    Refuse,
    /// To give no answer.
    Later,
    /// To fail as a bug does: with an error that trying again cannot mend.
    Bug,
    /// To panic.
    Panic,
}

impl Input {
    pub fn bytes(self) -> Bytes {
        Bytes::from_static(match self {
            Input::Accept => b"accept",
            Input::Refuse => b"refuse",
            Input::Later => b"later",
            Input::Bug => b"bug",
            Input::Panic => b"panic",
        })
    }
}

#[derive(Debug, thiserror::Error)]
#[error("no such input")]
struct NoSuchInput;

/// Counts its effects in a table, in the transaction that it is given.
#[derive(Clone, Default)]
pub struct Counting {
    /// What the next calls end with, after they had their effects: an error, or nothing unusual.
    failures: Arc<Mutex<VecDeque<Option<Error>>>>,
    /// What the next call of `act` does once it has had its effects.
    pause: Arc<Mutex<Option<Pause>>>,
    acts: Arc<AtomicU32>,
}

type Pause = Box<dyn FnOnce() + Send>;

impl Counting {
    pub fn fail_with(&self, failures: impl IntoIterator<Item = Option<Error>>) {
        self.failures.lock().unwrap().extend(failures);
    }

    /// The next call of `act` has its effects, and then waits until this returns.
    pub fn wait_once_in_act(&self, pause: Pause) {
        *self.pause.lock().unwrap() = Some(pause);
    }

    /// How often `act` was called, also in transactions that were rolled back.
    pub fn acts(&self) -> u32 {
        self.acts.load(Ordering::Relaxed)
    }

    /// How many of the failures are still to come.
    pub fn failures_left(&self) -> usize {
        self.failures.lock().unwrap().len()
    }

    fn fail(&self) -> Result<(), Error> {
        self.failures.lock().unwrap().pop_front().flatten().map_or(Ok(()), Err)
    }
}

fn count(tx: &mut Tx<'_>, work: &Work<'_, Input>, undo: bool) -> Result<(), Error> {
    let values = [Value::from(work.saga), Value::from(work.step.0), Value::from(undo)];
    tx.execute("INSERT INTO effect (saga, step, undone) VALUES (?, ?, ?)", &values).map(drop)
}

impl Participant for Counting {
    type Input = Input;
    type Changes = ();

    fn read(&self, input: &Bytes) -> Result<Input, BadInput> {
        match &input[..] {
            b"accept" => Ok(Input::Accept),
            b"refuse" => Ok(Input::Refuse),
            b"later" => Ok(Input::Later),
            b"bug" => Ok(Input::Bug),
            b"panic" => Ok(Input::Panic),
            _ => Err(BadInput(Box::new(NoSuchInput))),
        }
    }

    fn act(&self, tx: &mut Tx<'_>, work: &[Work<'_, Input>], (): &mut ()) -> Result<Vec<Outcome>, Error> {
        self.acts.fetch_add(1, Ordering::Relaxed);
        let mut outcomes = Vec::with_capacity(work.len());
        for work in work {
            outcomes.push(match work.input {
                Input::Accept => {
                    count(tx, work, false)?;
                    Outcome::Done(format!("{} of {}", work.step, work.saga).into_bytes())
                }
                Input::Refuse => Outcome::Rejected("no".to_owned()),
                Input::Later => Outcome::Retry("not now".to_owned()),
                Input::Bug => {
                    tx.execute("INSERT INTO effect (saga, step, undone) VALUES (NULL, NULL, NULL)", &[])?;
                    unreachable!("a column is NOT NULL")
                }
                Input::Panic => panic!("a participant panics, as the test wants it"),
            });
        }
        if let Some(pause) = self.pause.lock().unwrap().take() {
            pause();
        }
        self.fail()?;
        Ok(outcomes)
    }

    fn undo(&self, tx: &mut Tx<'_>, work: &[Work<'_, Input>], (): &mut ()) -> Result<Vec<Undone>, Error> {
        for work in work {
            count(tx, work, true)?;
        }
        self.fail()?;
        Ok(vec![Undone::Done; work.len()])
    }
}

/// A command without a path.
pub fn command(saga: u64, step: u8, phase: Phase, input: Input) -> Command<Input> {
    Command {
        token: Token { saga, mode: Mode::Execute, path: saga::Path::new() },
        step: StepIndex(step),
        phase,
        input,
    }
}

/// Handles a batch in a transaction of its own.
pub async fn batch(
    db: &Db,
    participant: &Counting,
    commands: Vec<Command<Input>>,
    now: UnixMillis,
) -> Result<Vec<Answer>, Error> {
    let participant = participant.clone();
    db.write(move |tx| handle(&participant, tx, &commands, now, &mut ())).await
}

/// Handles a batch as one that comes for the first time, in a transaction of its own. None if it cannot be one.
pub async fn batch_unseen(
    db: &Db,
    participant: &Counting,
    commands: Vec<Command<Input>>,
    now: UnixMillis,
) -> Option<Result<Vec<Answer>, Error>> {
    let participant = participant.clone();
    let written = db.write(move |tx| handle_unseen(&participant, tx, &commands, now, &mut ()).transpose());
    written.await.transpose()
}

/// How often a step has had its effect, and how often it was undone.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Effects {
    pub acted: u32,
    pub undone: u32,
}

/// All effects there are, by saga and step.
pub async fn effects(db: &Db) -> HashMap<(u64, u8), Effects> {
    let rows: Result<Vec<(u64, u8, bool)>, Error> = db
        .read(|tx| {
            let row = |row: &db::Row<'_>| Ok((row.get(0)?, row.get(1)?, row.get(2)?));
            tx.query("SELECT saga, step, undone FROM effect", &[], row)
        })
        .await;
    let mut all: HashMap<(u64, u8), Effects> = HashMap::new();
    for (saga, step, undo) in rows.unwrap() {
        let effects = all.entry((saga, step)).or_default();
        if undo { effects.undone += 1 } else { effects.acted += 1 }
    }
    all
}

/// The effects of one step.
pub async fn effects_of(db: &Db, saga: u64, step: u8) -> Effects {
    effects(db).await.get(&(saga, step)).copied().unwrap_or_default()
}

/// The barrier's rows: saga, step, phase, reply.
pub async fn rows(db: &Db) -> Vec<(u64, u8, u8, Vec<u8>)> {
    let rows: Result<_, Error> = db
        .read(|tx| {
            tx.query(
                "SELECT saga, step, phase, reply FROM saga_barrier ORDER BY saga, step, phase",
                &[],
                |row| Ok((row.get(0)?, row.get(1)?, row.get(2)?, row.get(3)?)),
            )
        })
        .await;
    rows.unwrap()
}

/// The recorded reply that is in an answer.
pub fn recorded(answer: &Answer) -> Recorded {
    let Answer::Reply(bytes) = answer else { panic!("not a reply: {answer:?}") };
    Recorded::decode(bytes).unwrap()
}

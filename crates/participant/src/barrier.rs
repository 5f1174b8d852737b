//! The barrier: what a participant has answered, and so what a command that comes now is to get.
//!
//! A row is written in the transaction of the effect, under (saga, step, phase), and holds the reply that was sent. A
//! **tombstone** is the action row of an action that never ran: it is answered `Rejected(cancelled)` for ever,
//! so an action that arrives after its compensation or cancellation does nothing.
//!
//! | arrives | finds | decision |
//! |---|---|---|
//! | action | nothing | [`Decision::Act`] |
//! | action | its row, or a tombstone | [`Decision::Answer`] |
//! | compensation | no action row | [`Decision::BuryAndCompensate`] |
//! | compensation | action done | [`Decision::Undo`] |
//! | compensation | action rejected, or a tombstone | [`Decision::NothingToUndo`] |
//! | compensation | its row | [`Decision::Answer`] |
//! | cancel | no action row | [`Decision::Bury`] |
//! | cancel | action row or tombstone | [`Decision::Answer`] |
//!
//! Two replicas may handle commands of one step at the same time. Each reads the rows that are there, with a lock, so what one of
//! them adds to a row that both have read, the other waits for and sees. Where there is none, both may find nothing; then
//! both write the action's row, whatever they were asked, and its primary key lets one of them pass: the other's
//! transaction is rolled back whole and run again (see `db::mysql`), and finds what the first has written. Who takes it that there is none
//! and does not look (`handle_unseen`) is kept from acting twice by the same key, but does not see a compensation without an action.
//!
//! Rows outlive every message that could still name them, see [`purge`].

use bytes::Bytes;
use db::{Migration, Set, Tx, Value};
use foldhash::{HashMap, HashMapExt};
use saga::{Outcome, Phase, Reason, StepIndex};
use wire::messages::{DecodeError, Recorded};
use wire::time::UnixMillis;

/// The barrier's table, as one of a participant's migrations.
pub const fn migration(number: u32) -> Migration {
    Migration {
        number,
        name: "barrier",
        sqlite: include_str!("../migrations/sqlite/barrier.sql"),
        mysql: include_str!("../migrations/mysql/barrier.sql"),
    }
}

/// Whose rows they are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Key {
    /// The saga.
    pub saga: u64,
    /// Its step.
    pub step: StepIndex,
}

/// Which of a step's two rows. A cancellation has none of its own: it reads and writes the action's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Row {
    /// The answer to the action.
    Action,
    /// The answer to the compensation.
    Compensation,
}

impl Row {
    fn number(self) -> i64 {
        match self {
            Row::Action => 0,
            Row::Compensation => 1,
        }
    }
}

/// What is there of one step: the recorded replies, as they were sent.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Found {
    /// The action's reply, or the tombstone's.
    pub action: Option<Bytes>,
    /// The compensation's reply.
    pub compensation: Option<Bytes>,
}

/// What a command is to get.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Decision {
    /// Have the effect and record the outcome.
    Act,
    /// Undo the effect and record that.
    Undo,
    /// Do nothing; answer these bytes, which were answered before.
    Answer(Bytes),
    /// Write a tombstone, and answer what it says.
    Bury,
    /// Write a tombstone, so that the action can never come after; record the compensation.
    BuryAndCompensate,
    /// Record the compensation: there is no effect.
    NothingToUndo,
}

/// Rows that contradict each other, or cannot be read. An operator has to look.
#[derive(Debug, thiserror::Error)]
pub enum Corrupt {
    /// A compensation without an action or a tombstone: the two are written together.
    #[error("saga {saga} step {step} has a compensation row and no action row")]
    CompensationAlone {
        /// The saga.
        saga: u64,
        /// Its step.
        step: StepIndex,
    },
    /// An action row that says "compensated".
    #[error("saga {saga} step {step} has an action row with a compensation's reply")]
    WrongReply {
        /// The saga.
        saga: u64,
        /// Its step.
        step: StepIndex,
    },
    /// A row that cannot be decoded.
    #[error("saga {saga} step {step} has an unreadable row: {source}")]
    Unreadable {
        /// The saga.
        saga: u64,
        /// Its step.
        step: StepIndex,
        /// What the decoder ran into.
        source: DecodeError,
    },
}

/// The table above, row by row.
///
/// # Errors
/// [`Corrupt`] when the rows contradict each other.
pub fn decide(key: Key, phase: Phase, found: &Found) -> Result<Decision, Corrupt> {
    let Key { saga, step } = key;
    match (phase, &found.action, &found.compensation) {
        (_, None, Some(_)) => Err(Corrupt::CompensationAlone { saga, step }),
        (Phase::Action, None, None) => Ok(Decision::Act),
        (Phase::Action | Phase::Cancel, Some(reply), _) => Ok(Decision::Answer(reply.clone())),
        (Phase::Compensation, None, None) => Ok(Decision::BuryAndCompensate),
        (Phase::Compensation, Some(_), Some(reply)) => Ok(Decision::Answer(reply.clone())),
        (Phase::Compensation, Some(action), None) => {
            let recorded =
                Recorded::decode(action).map_err(|source| Corrupt::Unreadable { saga, step, source })?;
            match recorded.outcome {
                Outcome::Done(_) => Ok(Decision::Undo),
                Outcome::Rejected(_) => Ok(Decision::NothingToUndo),
                Outcome::Compensated => Err(Corrupt::WrongReply { saga, step }),
            }
        }
        (Phase::Cancel, None, None) => Ok(Decision::Bury),
    }
}

/// A tombstone's reply.
pub fn tombstone(now: UnixMillis) -> Bytes {
    Recorded { outcome: Outcome::Rejected(Reason::Cancelled), at: now }.encode()
}

/// A compensation's reply.
pub fn compensated(now: UnixMillis) -> Bytes {
    Recorded { outcome: Outcome::Compensated, at: now }.encode()
}

/// What is there of these steps, read as one set. Steps of which there is nothing are left out. Where the database
/// has row locks, the rows are locked.
///
/// # Errors
/// When the database fails.
pub fn load(tx: &mut Tx<'_>, keys: impl Iterator<Item = Key>) -> Result<HashMap<Key, Found>, db::Error> {
    let mut set = Set::new();
    for key in keys {
        set.push(&[Value::from(key.saga), Value::from(key.step.0)]);
    }
    let rows = tx.query(
        "SELECT b.saga, b.step, b.phase, b.reply
         {from set(saga INT, step INT) AS s join saga_barrier AS b on b.saga = s.saga AND b.step = s.step}
         {for update}",
        &[Value::from(&set)],
        |row| {
            let key = Key { saga: row.get(0)?, step: StepIndex(row.get(1)?) };
            Ok((key, row.get::<u8>(2)?, Bytes::from(row.get::<Vec<u8>>(3)?)))
        },
    )?;
    let mut found: HashMap<Key, Found> = HashMap::with_capacity(rows.len());
    for (key, phase, reply) in rows {
        let entry = found.entry(key).or_default();
        match phase {
            0 => entry.action = Some(reply),
            _ => entry.compensation = Some(reply),
        }
    }
    Ok(found)
}

/// Rows to be written.
#[derive(Debug, Default)]
pub struct Records {
    set: Set,
}

impl Records {
    /// Adds one row.
    pub fn push(&mut self, key: Key, row: Row, reply: &Bytes, now: UnixMillis) {
        self.set.push(&[
            Value::from(key.saga),
            Value::from(key.step.0),
            Value::from(row.number()),
            Value::from(&reply[..]),
            Value::from(now),
        ]);
    }

    /// Writes them as one set. A row that is there already is an error, never a second opinion; where it was written since
    /// [`load`], by another replica, that error has the whole transaction run again.
    ///
    /// # Errors
    /// When the database fails.
    pub fn write(&self, tx: &mut Tx<'_>) -> Result<(), db::Error> {
        if self.set.is_empty() {
            return Ok(());
        }
        tx.execute(
            "{insert into saga_barrier (saga, step, phase, reply, recorded_at)
          from set(saga INT, step INT, phase INT, reply BLOB, recorded_at INT) AS s
          values (s.saga, s.step, s.phase, s.reply, s.recorded_at)}",
            &[Value::from(&self.set)],
        )?;
        Ok(())
    }
}

/// Rows that one [`purge`] looks at and deletes at most, so that it never holds up a batch for long. More than one saga
/// can have with one participant.
pub const PURGE_ROWS: u32 = 2_000;

const _: () = assert!(PURGE_ROWS as usize > 2 * saga::MAX_STEPS);

/// Deletes rows that no message can name any more: their saga has a smaller id than `below`, so it has ended, and all of
/// its rows here were recorded before `recorded_before`, so that every message that was under way when they were written
/// has run out. Returns how many were deleted; if any were, there may be more.
///
/// A saga's rows go together: a compensation's row without the action's would be a contradiction, and an action's row
/// without the compensation's would let the effect be undone again.
///
/// # Errors
/// When the database fails.
pub fn purge(tx: &mut Tx<'_>, below: u64, recorded_before: UnixMillis) -> Result<u64, db::Error> {
    let oldest = tx.query(
        "SELECT saga, step, phase, recorded_at FROM saga_barrier WHERE saga < ? ORDER BY saga, step, phase LIMIT ?
         {for update}",
        &[Value::from(below), Value::from(PURGE_ROWS)],
        |row| Ok((row.get::<u64>(0)?, row.get::<u8>(1)?, row.get::<u8>(2)?, row.get::<u64>(3)?)),
    )?;
    // The last saga of a full page may have more rows behind it.
    let cut = oldest.last().map(|last| last.0).filter(|_| oldest.len() == PURGE_ROWS as usize);
    let mut set = Set::new();
    for rows in oldest.chunk_by(|one, next| one.0 == next.0) {
        let quiet = rows.iter().all(|(_, _, _, recorded_at)| *recorded_at < recorded_before);
        if !quiet || cut == Some(rows[0].0) {
            continue;
        }
        for (saga, step, phase, _) in rows {
            set.push(&[Value::from(*saga), Value::from(*step), Value::from(*phase)]);
        }
    }
    if set.is_empty() {
        return Ok(0);
    }
    tx.execute(
        "{delete from saga_barrier AS b join set(saga INT, step INT, phase INT) AS s
          on b.saga = s.saga AND b.step = s.step AND b.phase = s.phase}",
        &[Value::from(&set)],
    )
}

//! The SQL of purchases, one function a question.

use std::collections::HashMap;

use db::{Error, Row, Set, Tx, Value};
use wire::time::UnixMillis;

use crate::model::State;

/// A purchase to be accepted.
#[derive(Clone, Debug)]
pub(crate) struct NewPurchase {
    pub(crate) id: u64,
    pub(crate) customer_id: u64,
    pub(crate) key: Option<Key>,
    pub(crate) input: bytes::Bytes,
    pub(crate) trace: String,
    pub(crate) created_at: UnixMillis,
    pub(crate) deadline_at: UnixMillis,
    pub(crate) next_wake_at: UnixMillis,
}

/// An idempotency key, and the hash of what was asked for under it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Key {
    pub(crate) key: String,
    pub(crate) request_hash: [u8; 32],
}

/// What an earlier request with the same key was accepted as.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Earlier {
    pub(crate) id: u64,
    pub(crate) request_hash: Vec<u8>,
}

/// The purchases that were accepted under these customers' keys.
pub(crate) fn by_keys<'a>(
    tx: &mut Tx<'_>,
    keys: impl Iterator<Item = (u64, &'a str)>,
) -> Result<HashMap<(u64, String), Earlier>, Error> {
    let mut set = Set::new();
    for (customer_id, key) in keys {
        set.push(&[Value::from(customer_id), Value::from(key)]);
    }
    if set.is_empty() {
        return Ok(HashMap::new());
    }
    let rows = tx.query(
        "SELECT p.customer_id, p.idempotency_key, p.id, p.request_hash
         FROM {set(customer_id INT, k TEXT)} AS s
         JOIN purchase p ON p.customer_id = s.customer_id AND p.idempotency_key = s.k",
        &[Value::from(&set)],
        |row| Ok(((row.get(0)?, row.get(1)?), Earlier { id: row.get(2)?, request_hash: row.get(3)? })),
    )?;
    Ok(rows.into_iter().collect())
}

pub(crate) fn insert<'a>(
    tx: &mut Tx<'_>,
    purchases: impl Iterator<Item = &'a NewPurchase>,
) -> Result<(), Error> {
    let mut set = Set::new();
    for new in purchases {
        set.push(&[
            Value::from(new.id),
            Value::from(new.customer_id),
            Value::from(new.key.as_ref().map(|key| key.key.as_str())),
            Value::from(new.key.as_ref().map(|key| &key.request_hash[..])),
            Value::from(&new.input[..]),
            Value::from(&new.trace),
            Value::from(new.created_at),
            Value::from(new.deadline_at),
            Value::from(new.next_wake_at),
        ]);
    }
    if set.is_empty() {
        return Ok(());
    }
    tx.execute(
        "INSERT INTO purchase (id, customer_id, idempotency_key, request_hash, state, input, trace,
                               created_at, deadline_at, next_wake_at, tries)
         SELECT s.id, s.customer_id, s.k, s.hash, 0, s.input, s.trace,
                s.created_at, s.deadline_at, s.next_wake_at, 0
         FROM {set(id INT, customer_id INT, k TEXT, hash BLOB, input BLOB, trace TEXT,
                   created_at INT, deadline_at INT, next_wake_at INT)} AS s",
        &[Value::from(&set)],
    )?;
    Ok(())
}

/// What there is of a purchase whose saga has ended, or of one that a saga claims to be about.
pub(crate) struct Known {
    pub(crate) id: u64,
    pub(crate) customer_id: u64,
    pub(crate) state: State,
    pub(crate) created_at: UnixMillis,
    pub(crate) path: Option<Vec<u8>>,
}

pub(crate) fn known(tx: &mut Tx<'_>, ids: impl Iterator<Item = u64>) -> Result<Vec<Known>, Error> {
    tx.query(
        "SELECT p.id, p.customer_id, p.state, p.created_at, p.path
         FROM {set(id INT)} AS s JOIN purchase p ON p.id = s.id ORDER BY p.id {for update}",
        &[Value::from(&ids_set(ids))],
        |row| {
            Ok(Known {
                id: row.get(0)?,
                customer_id: row.get(1)?,
                state: state(row, 2)?,
                created_at: row.get(3)?,
                path: row.get(4)?,
            })
        },
    )
}

/// How a purchase ended.
#[derive(Clone, Debug)]
pub(crate) struct Finish {
    pub(crate) id: u64,
    pub(crate) state: State,
    pub(crate) finished_at: UnixMillis,
    pub(crate) reason: Option<String>,
    pub(crate) path: Vec<u8>,
}

/// Ends purchases, in this order, and returns the number that the first of them gets; the others get the ones behind it.
pub(crate) fn finish(tx: &mut Tx<'_>, finishes: &[Finish]) -> Result<u64, Error> {
    let count = finishes.len() as u64;
    tx.execute("UPDATE purchase_finish SET no = no + ? WHERE only = 1", &[Value::from(count)])?;
    let last = last_finished_no(tx)?;
    let first = last + 1 - count;
    let mut set = Set::new();
    for (number, finish) in (first..).zip(finishes) {
        set.push(&[
            Value::from(finish.id),
            Value::from(finish.state.number()),
            Value::from(finish.finished_at),
            Value::from(number),
            Value::from(finish.reason.as_deref()),
            Value::from(&finish.path),
        ]);
    }
    tx.execute(
        "{update purchase AS p
          join set(id INT, state INT, finished_at INT, finished_no INT, reason TEXT, path BLOB) AS s on p.id = s.id
          set state = s.state, next_wake_at = NULL, finished_at = s.finished_at, finished_no = s.finished_no,
              reason = s.reason, path = s.path}",
        &[Value::from(&set)],
    )?;
    Ok(first)
}

/// The number of the purchase that ended last; 0 when none has.
pub(crate) fn last_finished_no(tx: &mut Tx<'_>) -> Result<u64, Error> {
    let no = tx.query_opt("SELECT no FROM purchase_finish WHERE only = 1", &[], |row| row.get(0))?;
    Ok(no.unwrap_or(0))
}

/// An open purchase, as far as it must be known to count and to watch it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct OpenPurchase {
    pub(crate) id: u64,
    pub(crate) customer_id: u64,
    pub(crate) created_at: UnixMillis,
}

/// Makes every open purchase due, with all its tries before it, and returns them all. For a start: whatever was under way
/// is lost.
pub(crate) fn wake_all(tx: &mut Tx<'_>, now: UnixMillis) -> Result<Vec<OpenPurchase>, Error> {
    tx.execute(
        "UPDATE purchase SET next_wake_at = ?, tries = 0 WHERE next_wake_at IS NOT NULL",
        &[Value::from(now)],
    )?;
    tx.query("SELECT id, customer_id, created_at FROM purchase WHERE next_wake_at IS NOT NULL", &[], |row| {
        Ok(OpenPurchase { id: row.get(0)?, customer_id: row.get(1)?, created_at: row.get(2)? })
    })
}

/// An open purchase whose saga is to be started again.
#[derive(Clone, Debug)]
pub(crate) struct Due {
    pub(crate) id: u64,
    pub(crate) customer_id: u64,
    pub(crate) input: Vec<u8>,
    pub(crate) trace: String,
    pub(crate) created_at: UnixMillis,
    pub(crate) deadline_at: UnixMillis,
    pub(crate) next_wake_at: UnixMillis,
    pub(crate) tries: u32,
}

/// What is due: now, or later than `horizon`, where nothing is.
pub(crate) fn due(
    tx: &mut Tx<'_>,
    now: UnixMillis,
    horizon: UnixMillis,
    limit: u32,
) -> Result<Vec<Due>, Error> {
    tx.query(
        "SELECT id, customer_id, input, trace, created_at, deadline_at, next_wake_at, tries FROM purchase
         WHERE next_wake_at <= ? OR next_wake_at > ? ORDER BY next_wake_at LIMIT ? {for update}",
        &[Value::from(now), Value::from(horizon), Value::from(limit)],
        |row| {
            Ok(Due {
                id: row.get(0)?,
                customer_id: row.get(1)?,
                input: row.get(2)?,
                trace: row.get(3)?,
                created_at: row.get(4)?,
                deadline_at: row.get(5)?,
                next_wake_at: row.get(6)?,
                tries: row.get(7)?,
            })
        },
    )
}

/// When each of these is due again, and the number of tries by then.
pub(crate) fn postpone(
    tx: &mut Tx<'_>,
    rows: impl Iterator<Item = (u64, UnixMillis, u32)>,
) -> Result<(), Error> {
    let mut set = Set::new();
    for (id, next_wake_at, tries) in rows {
        set.push(&[Value::from(id), Value::from(next_wake_at), Value::from(tries)]);
    }
    if set.is_empty() {
        return Ok(());
    }
    tx.execute(
        "{update purchase AS p join set(id INT, next_wake_at INT, tries INT) AS s on p.id = s.id
          set next_wake_at = s.next_wake_at, tries = s.tries}",
        &[Value::from(&set)],
    )?;
    Ok(())
}

/// Leaves purchases to an operator, with their paths as far as they are known.
pub(crate) fn give_up<'a>(
    tx: &mut Tx<'_>,
    purchases: impl Iterator<Item = (u64, Option<&'a [u8]>)>,
    reason: &str,
) -> Result<(), Error> {
    let mut set = Set::new();
    for (id, path) in purchases {
        set.push(&[Value::from(id), Value::from(path), Value::from(reason)]);
    }
    if set.is_empty() {
        return Ok(());
    }
    tx.execute(
        "{update purchase AS p join set(id INT, path BLOB, reason TEXT) AS s on p.id = s.id
          set state = 4, next_wake_at = NULL, path = s.path, reason = s.reason}",
        &[Value::from(&set)],
    )?;
    Ok(())
}

/// A purchase that was left to an operator, if it is one.
pub(crate) fn left_to_operator_as(tx: &mut Tx<'_>, id: u64) -> Result<Option<OpenPurchase>, Error> {
    tx.query_opt(
        "SELECT id, customer_id, created_at FROM purchase WHERE id = ? AND state = 4",
        &[Value::from(id)],
        |row| Ok(OpenPurchase { id: row.get(0)?, customer_id: row.get(1)?, created_at: row.get(2)? }),
    )
}

/// Opens a purchase again that was left to an operator; false if it is not such a one.
pub(crate) fn retry(tx: &mut Tx<'_>, id: u64, now: UnixMillis) -> Result<bool, Error> {
    let changed = tx.execute(
        "UPDATE purchase SET state = 0, next_wake_at = ?, tries = 0, reason = NULL WHERE id = ? AND state = 4",
        &[Value::from(now), Value::from(id)],
    )?;
    Ok(changed > 0)
}

/// A purchase that was left to an operator.
pub(crate) struct LeftToOperator {
    pub(crate) id: u64,
    pub(crate) customer_id: u64,
    pub(crate) created_at: UnixMillis,
    pub(crate) reason: Option<String>,
}

/// Purchases left to an operator, oldest first.
pub(crate) fn left_to_operator(tx: &mut Tx<'_>, limit: u32) -> Result<Vec<LeftToOperator>, Error> {
    tx.query(
        "SELECT id, customer_id, created_at, reason FROM purchase
         WHERE finished_no IS NULL AND state = 4 ORDER BY id LIMIT ?",
        &[Value::from(limit)],
        |row| {
            Ok(LeftToOperator {
                id: row.get(0)?,
                customer_id: row.get(1)?,
                created_at: row.get(2)?,
                reason: row.get(3)?,
            })
        },
    )
}

/// How many purchases are left to an operator.
pub(crate) fn count_left_to_operator(tx: &mut Tx<'_>) -> Result<u64, Error> {
    let count =
        tx.query_opt("SELECT COUNT(*) FROM purchase WHERE finished_no IS NULL AND state = 4", &[], |row| {
            row.get(0)
        })?;
    Ok(count.unwrap_or(0))
}

/// An id below which every purchase has ended.
pub(crate) fn all_ended_below(tx: &mut Tx<'_>) -> Result<u64, Error> {
    let oldest =
        tx.query_opt("SELECT id FROM purchase WHERE finished_no IS NULL ORDER BY id LIMIT 1", &[], |row| {
            row.get(0)
        })?;
    let above_all = "SELECT id + 1 FROM purchase ORDER BY id DESC LIMIT 1";
    match oldest {
        Some(id) => Ok(id),
        None => Ok(tx.query_opt(above_all, &[], |row| row.get(0))?.unwrap_or(0)),
    }
}

/// A purchase as its customer may see it.
pub(crate) struct Shown {
    pub(crate) id: u64,
    pub(crate) state: State,
    pub(crate) input: Vec<u8>,
    pub(crate) created_at: UnixMillis,
    pub(crate) finished_at: Option<UnixMillis>,
    pub(crate) reason: Option<String>,
    pub(crate) path: Option<Vec<u8>>,
}

fn shown(row: &Row<'_>) -> Result<Shown, Error> {
    Ok(Shown {
        id: row.get(0)?,
        state: state(row, 1)?,
        input: row.get(2)?,
        created_at: row.get(3)?,
        finished_at: row.get(4)?,
        reason: row.get(5)?,
        path: row.get(6)?,
    })
}

pub(crate) fn by_id(tx: &mut Tx<'_>, id: u64, customer_id: u64) -> Result<Option<Shown>, Error> {
    tx.query_opt(
        "SELECT id, state, input, created_at, finished_at, reason, path FROM purchase
         WHERE id = ? AND customer_id = ?",
        &[Value::from(id), Value::from(customer_id)],
        shown,
    )
}

/// A customer's purchases, newest first.
pub(crate) fn list(tx: &mut Tx<'_>, customer_id: u64, offset: u64, size: u64) -> Result<Vec<Shown>, Error> {
    tx.query(
        "SELECT id, state, input, created_at, finished_at, reason, path FROM purchase
         WHERE customer_id = ? ORDER BY id DESC LIMIT ? OFFSET ?",
        &[Value::from(customer_id), Value::from(size), Value::from(offset)],
        shown,
    )
}

/// A purchase that has ended, for a customer's event stream.
pub(crate) struct Finished {
    pub(crate) id: u64,
    pub(crate) finished_no: u64,
    pub(crate) created_at: UnixMillis,
    pub(crate) path: Vec<u8>,
}

/// A customer's purchases whose finish number is above `after` and not above `up_to`, in that order.
pub(crate) fn finished_between(
    tx: &mut Tx<'_>,
    customer_id: u64,
    after: u64,
    up_to: u64,
    limit: u32,
) -> Result<Vec<Finished>, Error> {
    tx.query(
        "SELECT id, finished_no, created_at, path FROM purchase
         WHERE customer_id = ? AND finished_no > ? AND finished_no <= ? ORDER BY finished_no LIMIT ?",
        &[Value::from(customer_id), Value::from(after), Value::from(up_to), Value::from(limit)],
        |row| {
            Ok(Finished {
                id: row.get(0)?,
                finished_no: row.get(1)?,
                created_at: row.get(2)?,
                path: row.get(3)?,
            })
        },
    )
}

/// Among a customer's last `limit` purchases that ended, the smallest finish number of those that ended at `since` or
/// later; None when there is none.
pub(crate) fn first_finished_since(
    tx: &mut Tx<'_>,
    customer_id: u64,
    since: UnixMillis,
    limit: u32,
) -> Result<Option<u64>, Error> {
    let recent = tx.query(
        "SELECT finished_no, finished_at FROM purchase
         WHERE customer_id = ? AND finished_no IS NOT NULL ORDER BY finished_no DESC LIMIT ?",
        &[Value::from(customer_id), Value::from(limit)],
        |row| Ok((row.get::<u64>(0)?, row.get::<u64>(1)?)),
    )?;
    Ok(recent.into_iter().filter(|(_, finished_at)| *finished_at >= since).map(|(no, _)| no).min())
}

fn ids_set(ids: impl Iterator<Item = u64>) -> Set {
    let mut set = Set::new();
    for id in ids {
        set.push(&[Value::from(id)]);
    }
    set
}

fn state(row: &Row<'_>, index: usize) -> Result<State, Error> {
    let number: u8 = row.get(index)?;
    State::from_number(number).ok_or_else(|| Error::Column {
        column: "state".to_owned(),
        expected: "a purchase's state",
        found: number.to_string(),
    })
}

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
        "SELECT p.customer_id, s.k, p.id, p.request_hash
         {from set(customer_id INT, k TEXT) AS s
          join purchase_accepted AS p by purchase_accepted_key on p.customer_id = s.customer_id AND p.idempotency_key = s.k}",
        &[Value::from(&set)],
        |row| Ok(((row.get(0)?, row.get(1)?), Earlier { id: row.get(2)?, request_hash: row.get(3)? })),
    )?;
    Ok(rows.into_iter().collect())
}

pub(crate) fn insert<'a>(
    tx: &mut Tx<'_>,
    purchases: impl Iterator<Item = &'a NewPurchase>,
) -> Result<(), Error> {
    let (mut accepted, mut open) = (Set::new(), Set::new());
    for new in purchases {
        accepted.push(&[
            Value::from(new.id),
            Value::from(new.customer_id),
            Value::from(new.key.as_ref().map(|key| key.key.as_str())),
            Value::from(new.key.as_ref().map(|key| &key.request_hash[..])),
            Value::from(&new.input[..]),
            Value::from(&new.trace),
            Value::from(new.created_at),
            Value::from(new.deadline_at),
        ]);
        open.push(&[
            Value::from(new.id),
            Value::from(new.customer_id),
            Value::from(new.created_at),
            Value::from(new.next_wake_at),
        ]);
    }
    if accepted.is_empty() {
        return Ok(());
    }
    tx.execute(
        "{insert into purchase_accepted (id, customer_id, idempotency_key, request_hash, input, trace,
                                        created_at, deadline_at)
          from set(id INT, customer_id INT, k TEXT, hash BLOB, input BLOB, trace TEXT,
                   created_at INT, deadline_at INT) AS s
          values (s.id, s.customer_id, s.k, s.hash, s.input, s.trace, s.created_at, s.deadline_at)}",
        &[Value::from(&accepted)],
    )?;
    tx.execute(
        "{insert into purchase_open (id, customer_id, created_at, state, next_wake_at, tries)
          from set(id INT, customer_id INT, created_at INT, next_wake_at INT) AS s
          values (s.id, s.customer_id, s.created_at, 0, s.next_wake_at, 0)}",
        &[Value::from(&open)],
    )?;
    Ok(())
}

/// Whether purchases were not inserted because one of their keys was used in the meantime.
pub(crate) fn is_key_taken(error: &Error) -> bool {
    error.violates("purchase_accepted.idempotency_key")
}

/// Takes purchases out of what is open, and returns how many of them were there: nearly always all. By id: two replicas that hear of
/// the same ends lock in one order.
pub(crate) fn close(tx: &mut Tx<'_>, ids: &[u64]) -> Result<usize, Error> {
    let mut sorted = ids.to_vec();
    sorted.sort_unstable();
    let closed = tx.execute(
        "{delete from purchase_open AS p join set(id INT) AS s on p.id = s.id}",
        &[Value::from(&ids_set(sorted.into_iter()))],
    )?;
    Ok(usize::try_from(closed).unwrap_or(usize::MAX))
}

/// What a purchase is once its transaction has [closed](close) what was open of it.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Known {
    /// It was open: every purchase is, until it has ended.
    Closed,
    /// It had ended before, by this path.
    Ended { path: Vec<u8> },
}

/// What there is of purchases, not all of which were open when they were [closed](close). One of which nothing is known does not exist.
pub(crate) fn known(tx: &mut Tx<'_>, ids: &[u64]) -> Result<HashMap<u64, Known>, Error> {
    let rows = tx.query(
        "SELECT p.id, p.finished_no, p.path {from set(id INT) AS s join view purchase AS p on p.id = s.id}",
        &[Value::from(&ids_set(ids.iter().copied()))],
        |row| {
            let known = match row.get::<Option<u64>>(1)? {
                None => Known::Closed,
                Some(_) => Known::Ended { path: row.get(2)? },
            };
            Ok((row.get(0)?, known))
        },
    )?;
    Ok(rows.into_iter().collect())
}

/// How a purchase ended.
#[derive(Clone, Debug)]
pub(crate) struct Finish {
    pub(crate) id: u64,
    pub(crate) customer_id: u64,
    pub(crate) state: State,
    pub(crate) finished_at: UnixMillis,
    pub(crate) reason: Option<String>,
    pub(crate) path: Vec<u8>,
}

/// Purchases that have ended are listed by customer when there are so many more of them: then a page of that list takes
/// several, where one by one each would write a page of its own. Whoever asks for a customer's purchases reads so many rows
/// at most to find the newest.
pub(crate) const LIST_BEHIND: u64 = 2_048;

/// Ends purchases in this order, and returns the number that the first of them gets; the others get the ones behind it. Each was open
/// until this transaction [closed](close) it.
///
/// The row of the last number is locked from its update to the commit, so numbers are committed in their order and without a
/// gap, and all replicas queue up for it: whatever can be done before is.
pub(crate) fn finish(tx: &mut Tx<'_>, finishes: &[&Finish], list_behind: u64) -> Result<u64, Error> {
    let count = finishes.len() as u64;
    tx.execute("UPDATE purchase_finish SET no = no + ? WHERE only = 1", &[Value::from(count)])?;
    let Numbers { last, indexed } = numbers(tx)?;
    let first = last + 1 - count;
    let mut set = Set::new();
    for (number, finish) in (first..).zip(finishes) {
        set.push(&[
            Value::from(number),
            Value::from(finish.id),
            Value::from(finish.customer_id),
            Value::from(finish.state.number()),
            Value::from(finish.finished_at),
            Value::from(finish.reason.as_deref()),
            Value::from(&finish.path),
        ]);
    }
    tx.execute(
        "{insert into purchase_ended (finished_no, id, customer_id, state, finished_at, reason, path)
          from set(no INT, id INT, customer_id INT, state INT, finished_at INT, reason TEXT, path BLOB) AS s
          values (s.no, s.id, s.customer_id, s.state, s.finished_at, s.reason, s.path)}",
        &[Value::from(&set)],
    )?;
    if last - indexed >= list_behind {
        list_by_customer(tx, indexed, last)?;
    }
    Ok(first)
}

/// Lists what ended behind `after`, up to `last`, by customer.
fn list_by_customer(tx: &mut Tx<'_>, after: u64, last: u64) -> Result<(), Error> {
    let range = [Value::from(after), Value::from(last)];
    tx.execute(
        "{insert many} INTO customer_purchase (customer_id, id)
         SELECT customer_id, id FROM purchase_ended WHERE finished_no > ? AND finished_no <= ?
         ORDER BY customer_id, id",
        &range,
    )?;
    tx.execute(
        "{insert many} INTO customer_ended (customer_id, finished_no)
         SELECT customer_id, finished_no FROM purchase_ended WHERE finished_no > ? AND finished_no <= ?
         ORDER BY customer_id, finished_no",
        &range,
    )?;
    tx.execute("UPDATE purchase_finish SET indexed = ? WHERE only = 1", &[Value::from(last)])?;
    Ok(())
}

/// The order of ends: the last number given out, and the one up to which purchases are listed by customer.
struct Numbers {
    last: u64,
    indexed: u64,
}

fn numbers(tx: &mut Tx<'_>) -> Result<Numbers, Error> {
    let numbers = tx.query_opt("SELECT no, indexed FROM purchase_finish WHERE only = 1", &[], |row| {
        Ok(Numbers { last: row.get(0)?, indexed: row.get(1)? })
    })?;
    Ok(numbers.unwrap_or(Numbers { last: 0, indexed: 0 }))
}

/// The number of the purchase that ended last; 0 when none has.
pub(crate) fn last_finished_no(tx: &mut Tx<'_>) -> Result<u64, Error> {
    Ok(numbers(tx)?.last)
}

/// An open purchase, as far as it must be known to count and to watch it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct OpenPurchase {
    pub(crate) id: u64,
    pub(crate) customer_id: u64,
    pub(crate) created_at: UnixMillis,
}

/// Makes every open purchase due, with all its tries before it, and returns them all. For a start: whatever was under way
/// is lost.
pub(crate) fn wake_all(tx: &mut Tx<'_>, now: UnixMillis) -> Result<Vec<OpenPurchase>, Error> {
    tx.execute("UPDATE purchase_open SET next_wake_at = ?, tries = 0 WHERE state = 0", &[Value::from(now)])?;
    tx.query("SELECT id, customer_id, created_at FROM purchase_open WHERE state = 0", &[], |row| {
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

/// Who else may take what is due.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Take {
    /// Anybody: it is only looked at.
    Look,
    /// Nobody until the transaction ends. What somebody else has taken is left to them.
    Lock,
}

/// What is due: now, or later than `horizon`, where nothing is. By id, behind `after`.
pub(crate) fn due(
    tx: &mut Tx<'_>,
    take: Take,
    now: UnixMillis,
    horizon: UnixMillis,
    after: u64,
    limit: u32,
) -> Result<Vec<Due>, Error> {
    let mut due = tx.query(
        "SELECT o.id, o.customer_id, a.input, a.trace, o.created_at, a.deadline_at, o.next_wake_at, o.tries
         FROM purchase_open AS o JOIN purchase_accepted AS a ON a.id = o.id
         WHERE o.id > ? AND o.state = 0 AND (o.next_wake_at <= ? OR o.next_wake_at > ?)
         ORDER BY o.id LIMIT ?",
        &[Value::from(after), Value::from(now), Value::from(horizon), Value::from(limit)],
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
    )?;
    if take == Take::Lock {
        let locked = lock_due(tx, due.iter().map(|due| due.id), now, horizon)?;
        due.retain_mut(|due| match locked.get(&due.id) {
            Some((next_wake_at, tries)) => {
                (due.next_wake_at, due.tries) = (*next_wake_at, *tries);
                true
            }
            None => false,
        });
    }
    Ok(due)
}

/// Of these purchases, what is still due and not taken by anybody else: when, and after how many tries. Locked by key: a
/// search with locks, as in [`due`], would lock each row that it looks at.
fn lock_due(
    tx: &mut Tx<'_>,
    ids: impl Iterator<Item = u64>,
    now: UnixMillis,
    horizon: UnixMillis,
) -> Result<HashMap<u64, (UnixMillis, u32)>, Error> {
    let locked = tx.query(
        "SELECT o.id, o.next_wake_at, o.tries
         {from set(id INT) AS s join purchase_open AS o
          on o.id = s.id AND o.state = 0 AND (o.next_wake_at <= ? OR o.next_wake_at > ?)}
         {for update skip locked}",
        &[Value::from(&ids_set(ids)), Value::from(now), Value::from(horizon)],
        |row| Ok((row.get(0)?, (row.get(1)?, row.get(2)?))),
    )?;
    Ok(locked.into_iter().collect())
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
        "{update purchase_open AS p join set(id INT, next_wake_at INT, tries INT) AS s on p.id = s.id
          set next_wake_at = s.next_wake_at, tries = s.tries}",
        &[Value::from(&set)],
    )?;
    Ok(())
}

/// A purchase whose try was none.
pub(crate) struct PutBack {
    pub(crate) id: u64,
    /// The tries that were written for it.
    pub(crate) tries: u32,
    /// The tries before that one.
    pub(crate) before: u32,
    pub(crate) next_wake_at: UnixMillis,
}

/// Takes tries back, where nobody has tried again since.
pub(crate) fn put_back(tx: &mut Tx<'_>, rows: impl Iterator<Item = PutBack>) -> Result<(), Error> {
    let mut set = Set::new();
    for PutBack { id, tries, before, next_wake_at } in rows {
        set.push(&[Value::from(id), Value::from(tries), Value::from(before), Value::from(next_wake_at)]);
    }
    if set.is_empty() {
        return Ok(());
    }
    tx.execute(
        "{update purchase_open AS p join set(id INT, tried INT, tries INT, next_wake_at INT) AS s
          on p.id = s.id AND p.state = 0 AND p.tries = s.tried
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
        "{update purchase_open AS p join set(id INT, path BLOB, reason TEXT) AS s on p.id = s.id
          set state = 4, next_wake_at = NULL, path = s.path, reason = s.reason}",
        &[Value::from(&set)],
    )?;
    Ok(())
}

/// A purchase that was left to an operator, if it is one.
pub(crate) fn left_to_operator_as(tx: &mut Tx<'_>, id: u64) -> Result<Option<OpenPurchase>, Error> {
    tx.query_opt(
        "SELECT id, customer_id, created_at FROM purchase_open WHERE id = ? AND state = 4",
        &[Value::from(id)],
        |row| Ok(OpenPurchase { id: row.get(0)?, customer_id: row.get(1)?, created_at: row.get(2)? }),
    )
}

/// Opens a purchase again that was left to an operator; false if it is not such a one.
pub(crate) fn retry(tx: &mut Tx<'_>, id: u64, now: UnixMillis) -> Result<bool, Error> {
    let changed = tx.execute(
        "UPDATE purchase_open SET state = 0, next_wake_at = ?, tries = 0, reason = NULL WHERE id = ? AND state = 4",
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
        "SELECT id, customer_id, created_at, reason FROM purchase_open WHERE state = 4 ORDER BY id LIMIT ?",
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
    let count = tx.query_opt("SELECT COUNT(*) FROM purchase_open WHERE state = 4", &[], |row| row.get(0))?;
    Ok(count.unwrap_or(0))
}

/// When the oldest open purchase was accepted.
pub(crate) fn oldest_open(tx: &mut Tx<'_>) -> Result<Option<UnixMillis>, Error> {
    tx.query_opt("SELECT created_at FROM purchase_open WHERE state = 0 ORDER BY id LIMIT 1", &[], |row| {
        row.get(0)
    })
}

/// Which of these are open.
pub(crate) fn open_among(tx: &mut Tx<'_>, ids: &[u64]) -> Result<Vec<u64>, Error> {
    tx.query(
        "SELECT p.id {from set(id INT) AS s join purchase_open AS p on p.id = s.id} AND p.state = 0",
        &[Value::from(&ids_set(ids.iter().copied()))],
        |row| row.get(0),
    )
}

/// An id below which every purchase has ended.
pub(crate) fn all_ended_below(tx: &mut Tx<'_>) -> Result<u64, Error> {
    let oldest = tx.query_opt("SELECT id FROM purchase_open ORDER BY id LIMIT 1", &[], |row| row.get(0))?;
    let above_all = "SELECT id + 1 FROM purchase_accepted ORDER BY id DESC LIMIT 1";
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
    let mut recent = not_listed_yet(tx, customer_id)?;
    recent.sort_unstable_by(|one, other| other.cmp(one));
    let ahead = recent.len() as u64;
    // At most all of the recent ones stand before a listed one, so the page lies within these.
    let skipped = offset.saturating_sub(ahead);
    let listed = tx.query(
        "SELECT id FROM customer_purchase WHERE customer_id = ? ORDER BY id DESC LIMIT ? OFFSET ?",
        &[Value::from(customer_id), Value::from(size.saturating_add(ahead)), Value::from(skipped)],
        |row| row.get(0),
    )?;
    let page = page(&recent, &listed, skipped, offset, size);
    let mut shown = tx.query(
        "SELECT p.id, p.state, p.input, p.created_at, p.finished_at, p.reason, p.path
         {from set(id INT) AS s join view purchase AS p on p.id = s.id}",
        &[Value::from(&ids_set(page.into_iter()))],
        shown,
    )?;
    shown.sort_unstable_by_key(|shown| std::cmp::Reverse(shown.id));
    Ok(shown)
}

/// A customer's purchases that are open or ended too recently to be listed by customer. Bounded by what may be open, and by
/// [`LIST_BEHIND`].
fn not_listed_yet(tx: &mut Tx<'_>, customer_id: u64) -> Result<Vec<u64>, Error> {
    let customer = [Value::from(customer_id)];
    let mut ids =
        tx.query("SELECT id FROM purchase_open WHERE customer_id = ?", &customer, |row| row.get(0))?;
    ids.extend(tx.query(
        "SELECT id FROM purchase_ended
         WHERE finished_no > (SELECT indexed FROM purchase_finish WHERE only = 1) AND customer_id = ?",
        &customer,
        |row| row.get::<u64>(0),
    )?);
    Ok(ids)
}

/// The page at `offset` of two descending lists merged, given all of `recent` and what of `listed` follows its first `skipped`
/// entries. These are so few that no entry of the page stands before them.
fn page(recent: &[u64], listed: &[u64], skipped: u64, offset: u64, size: u64) -> Vec<u64> {
    let top = if skipped == 0 { u64::MAX } else { listed.first().copied().unwrap_or(u64::MAX) };
    let before = recent.iter().filter(|id| skipped > 0 && **id > top).count();
    let mut merged: Vec<u64> = recent[before..].iter().chain(listed).copied().collect();
    merged.sort_unstable_by(|one, other| other.cmp(one));
    let from = offset - skipped - before as u64;
    merged
        .into_iter()
        .skip(usize::try_from(from).unwrap_or(usize::MAX))
        .take(usize::try_from(size).unwrap_or(usize::MAX))
        .collect()
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
    let finished = |row: &Row<'_>| {
        Ok(Finished { id: row.get(0)?, finished_no: row.get(1)?, created_at: row.get(2)?, path: row.get(3)? })
    };
    let mut page = tx.query(
        "SELECT e.id, e.finished_no, a.created_at, e.path FROM customer_ended AS c
         JOIN purchase_ended AS e ON e.finished_no = c.finished_no
         JOIN purchase_accepted AS a ON a.id = e.id
         WHERE c.customer_id = ? AND c.finished_no > ? AND c.finished_no <= ? ORDER BY c.finished_no LIMIT ?",
        &[Value::from(customer_id), Value::from(after), Value::from(up_to), Value::from(limit)],
        finished,
    )?;
    let rest = limit - u32::try_from(page.len()).unwrap_or(limit);
    if rest > 0 {
        let after = numbers(tx)?.indexed.max(after);
        page.extend(tx.query(
            "SELECT e.id, e.finished_no, a.created_at, e.path
             FROM purchase_ended AS e JOIN purchase_accepted AS a ON a.id = e.id
             WHERE e.finished_no > ? AND e.finished_no <= ? AND e.customer_id = ? ORDER BY e.finished_no LIMIT ?",
            &[Value::from(after), Value::from(up_to), Value::from(customer_id), Value::from(rest)],
            finished,
        )?);
    }
    Ok(page)
}

/// A purchase that has ended, for all who watch.
pub(crate) struct EndedRow {
    pub(crate) customer_id: u64,
    pub(crate) finished_no: u64,
    pub(crate) id: u64,
    pub(crate) created_at: UnixMillis,
    pub(crate) path: Vec<u8>,
}

/// The purchases whose finish numbers are above `after` and not above `up_to`, in that order.
pub(crate) fn ended_between<T: From<EndedRow>>(
    tx: &mut Tx<'_>,
    after: u64,
    up_to: u64,
    limit: u32,
) -> Result<Vec<T>, Error> {
    tx.query(
        "SELECT e.customer_id, e.finished_no, e.id, a.created_at, e.path
         FROM purchase_ended AS e JOIN purchase_accepted AS a ON a.id = e.id
         WHERE e.finished_no > ? AND e.finished_no <= ? ORDER BY e.finished_no LIMIT ?",
        &[Value::from(after), Value::from(up_to), Value::from(limit)],
        |row| {
            let (customer_id, finished_no, id) = (row.get(0)?, row.get(1)?, row.get(2)?);
            let (created_at, path) = (row.get(3)?, row.get(4)?);
            Ok(EndedRow { customer_id, finished_no, id, created_at, path }.into())
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
    let numbered = |row: &Row<'_>| Ok((row.get::<u64>(0)?, row.get::<u64>(1)?));
    let mut recent = tx.query(
        "SELECT finished_no, finished_at FROM purchase_ended
         WHERE finished_no > (SELECT indexed FROM purchase_finish WHERE only = 1) AND customer_id = ?
         ORDER BY finished_no DESC LIMIT ?",
        &[Value::from(customer_id), Value::from(limit)],
        numbered,
    )?;
    let rest = limit - u32::try_from(recent.len()).unwrap_or(limit);
    recent.extend(tx.query(
        "SELECT e.finished_no, e.finished_at FROM customer_ended AS c
         JOIN purchase_ended AS e ON e.finished_no = c.finished_no
         WHERE c.customer_id = ? ORDER BY c.finished_no DESC LIMIT ?",
        &[Value::from(customer_id), Value::from(rest)],
        numbered,
    )?);
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

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use db::Db;
    use testdb::TestDb;

    use super::*;
    use crate::MIGRATIONS;

    testdb::on_both! {
        #[tokio::test]
        purchases_are_found_whether_they_are_listed_yet_or_not,
        a_purchase_from_its_acceptance_to_an_operator_and_back;
        #[tokio::test(flavor = "multi_thread", worker_threads = 4)]
        one_key_is_one_purchase_on_many_replicas,
        replicas_that_end_the_same_purchases_end_each_once_and_number_them_without_a_gap;
    }

    /// Chance that can be repeated: a linear congruential generator (Knuth's MMIX).
    struct Chance(u64);

    impl Chance {
        fn below(&mut self, end: u64) -> u64 {
            self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (self.0 >> 33) % end
        }
    }

    /// A purchase as the model keeps it.
    #[derive(Clone, Debug)]
    struct Bought {
        id: u64,
        customer_id: u64,
        created_at: UnixMillis,
        end: Option<End>,
    }

    #[derive(Clone, Debug)]
    struct End {
        no: u64,
        state: State,
        at: UnixMillis,
    }

    impl Bought {
        fn accepted(id: u64, customer_id: u64) -> Bought {
            Bought { id, customer_id, created_at: 1_000 + id, end: None }
        }

        fn new_purchase(&self) -> NewPurchase {
            NewPurchase {
                id: self.id,
                customer_id: self.customer_id,
                key: None,
                input: bytes::Bytes::from(format!("input {}", self.id)),
                trace: String::new(),
                created_at: self.created_at,
                deadline_at: self.created_at + 100,
                next_wake_at: self.created_at + 10,
            }
        }

        fn finish(&self, state: State, at: UnixMillis) -> Finish {
            let reason = (state != State::Succeeded).then(|| format!("reason {}", self.id));
            let (id, customer_id) = (self.id, self.customer_id);
            Finish { id, customer_id, state, finished_at: at, reason, path: self.path() }
        }

        fn path(&self) -> Vec<u8> {
            format!("path {}", self.id).into_bytes()
        }

        fn shown(&self) -> ShownRow {
            let end = self.end.as_ref();
            let reason =
                end.filter(|end| end.state != State::Succeeded).map(|_| format!("reason {}", self.id));
            ShownRow {
                id: self.id,
                state: end.map_or(State::Open, |end| end.state),
                input: format!("input {}", self.id).into_bytes(),
                created_at: self.created_at,
                finished_at: end.map(|end| end.at),
                reason,
                path: end.map(|_| self.path()),
            }
        }
    }

    /// [`Shown`], to be compared.
    #[derive(Debug, PartialEq, Eq)]
    struct ShownRow {
        id: u64,
        state: State,
        input: Vec<u8>,
        created_at: UnixMillis,
        finished_at: Option<UnixMillis>,
        reason: Option<String>,
        path: Option<Vec<u8>>,
    }

    impl From<Shown> for ShownRow {
        fn from(shown: Shown) -> ShownRow {
            let Shown { id, state, input, created_at, finished_at, reason, path } = shown;
            ShownRow { id, state, input, created_at, finished_at, reason, path }
        }
    }

    /// What an event stream reads: id, finish number, time of acceptance, path.
    type FinishedRow = (u64, u64, UnixMillis, Vec<u8>);

    fn finished_row(finished: Finished) -> FinishedRow {
        (finished.id, finished.finished_no, finished.created_at, finished.path)
    }

    /// What the store says and what the model says must be the same, whatever is asked.
    fn compare(tx: &mut Tx<'_>, model: &[Bought], last: u64, when: &str) -> Result<(), Error> {
        assert_eq!(last_finished_no(tx)?, last, "{when}");
        for customer in CUSTOMERS {
            let mut theirs: Vec<&Bought> = model.iter().filter(|one| one.customer_id == customer).collect();
            theirs.sort_by_key(|one| std::cmp::Reverse(one.id));
            let count = theirs.len();
            for (offset, size) in (0..count + 2).flat_map(|offset| (1..6).map(move |size| (offset, size))) {
                let found = list(tx, customer, offset as u64, size as u64)?;
                let found: Vec<ShownRow> = found.into_iter().map(ShownRow::from).collect();
                let page = theirs.iter().skip(offset).take(size);
                let expected: Vec<ShownRow> = page.map(|one| one.shown()).collect();
                assert_eq!(found, expected, "{when}: customer {customer}, offset {offset}, size {size}");
            }

            let mut ended: Vec<(&Bought, &End)> =
                theirs.iter().filter_map(|one| Some((*one, one.end.as_ref()?))).collect();
            ended.sort_by_key(|(_, end)| end.no);
            for (after, up_to, limit) in ranges(last) {
                let found = finished_between(tx, customer, after, up_to, limit)?;
                let found: Vec<FinishedRow> = found.into_iter().map(finished_row).collect();
                let within = ended.iter().filter(|(_, end)| after < end.no && end.no <= up_to);
                let expected: Vec<FinishedRow> = within
                    .take(limit as usize)
                    .map(|(one, end)| (one.id, end.no, one.created_at, one.path()))
                    .collect();
                assert_eq!(found, expected, "{when}: customer {customer}, {after} to {up_to}, limit {limit}");
            }

            for (since, limit) in
                (0..=TIMES).step_by(3).flat_map(|since| [1, 2, 3, 5, 100].map(|limit| (since, limit)))
            {
                let found = first_finished_since(tx, customer, since, limit)?;
                let newest = ended.iter().rev().take(limit as usize);
                let expected = newest.filter(|(_, end)| end.at >= since).map(|(_, end)| end.no).min();
                assert_eq!(found, expected, "{when}: customer {customer}, since {since}, limit {limit}");
            }
        }
        Ok(())
    }

    /// Questions after `after`, up to `up_to`, at most `limit`.
    fn ranges(last: u64) -> impl Iterator<Item = (u64, u64, u32)> {
        let after =
            (0..=last + 1).flat_map(move |after| [after, after + 2, last].map(|up_to| (after, up_to)));
        after.flat_map(|(after, up_to)| [1, 2, 4, 100].map(|limit| (after, up_to, limit)))
    }

    const CUSTOMERS: [u64; 3] = [7, 8, 9];
    /// Purchases end at times below it, in no order.
    const TIMES: u64 = 30;
    const LIST_BEHIND_FEW: u64 = 3;

    async fn purchases_are_found_whether_they_are_listed_yet_or_not(at: &TestDb) {
        for seed in 0..if at.is_sqlite() { 6 } else { 2 } {
            let fresh = at.another();
            let db = fresh.open(MIGRATIONS);
            let mut chance = Chance(seed);
            // Purchases that end out of their order, and some that never do.
            let (mut next_id, mut last) = (100, 0);
            let mut model: Vec<Bought> = Vec::new();
            let (mut seen_behind, mut seen_listed) = (false, false);
            while next_id < 140 {
                let from = model.len();
                for id in next_id..next_id + 1 + chance.below(4) {
                    let customer = CUSTOMERS[usize::try_from(chance.below(3)).expect("small")];
                    model.push(Bought::accepted(id, customer));
                }
                next_id += (model.len() - from) as u64;
                let accepted: Vec<NewPurchase> = model[from..].iter().map(Bought::new_purchase).collect();

                let mut ends: Vec<Finish> = Vec::new();
                for _ in 0..chance.below(6) {
                    let open: Vec<usize> = (0..model.len()).filter(|at| model[*at].end.is_none()).collect();
                    // The first two stay open.
                    let Some(at) = open.get(2 + usize::try_from(chance.below(6)).expect("small")) else {
                        continue;
                    };
                    let one = &mut model[*at];
                    let state = [State::Succeeded, State::Failed, State::Cancelled]
                        [usize::try_from(chance.below(3)).expect("small")];
                    let at = chance.below(TIMES);
                    ends.push(one.finish(state, at));
                    last += 1;
                    one.end = Some(End { no: last, state, at });
                }

                let (first, now, when) =
                    (last + 1 - ends.len() as u64, model.clone(), format!("seed {seed}, {last} ended"));
                let indexed = db
                    .write(move |tx| {
                        insert(tx, accepted.iter())?;
                        if !ends.is_empty() {
                            assert_eq!(
                                close(tx, &ends.iter().map(|end| end.id).collect::<Vec<_>>())?,
                                ends.len()
                            );
                            let ends: Vec<&Finish> = ends.iter().collect();
                            assert_eq!(finish(tx, &ends, LIST_BEHIND_FEW)?, first, "{when}");
                        }
                        compare(tx, &now, last, &when)?;
                        Ok::<_, Error>(numbers(tx)?.indexed)
                    })
                    .await
                    .expect("a transaction");
                assert!(last - indexed < LIST_BEHIND_FEW, "seed {seed}: {indexed} of {last} are listed");
                seen_behind |= last > indexed && indexed > 0;
                seen_listed |= last == indexed && last > 0;
            }
            assert!(seen_behind && seen_listed, "seed {seed} never saw both");
            db.close().await;
        }
    }

    /// All that one row of `purchase` says, of the table and of the view.
    #[derive(Clone, Debug, PartialEq, Eq)]
    struct WholeRow {
        id: u64,
        customer_id: u64,
        key: Option<String>,
        request_hash: Option<Vec<u8>>,
        state: u8,
        input: Vec<u8>,
        trace: String,
        created_at: u64,
        deadline_at: u64,
        next_wake_at: Option<u64>,
        tries: u32,
        finished_at: Option<u64>,
        finished_no: Option<u64>,
        reason: Option<String>,
        path: Option<Vec<u8>>,
    }

    fn whole_rows(tx: &mut Tx<'_>) -> Result<Vec<WholeRow>, Error> {
        tx.query(
            "SELECT id, customer_id, idempotency_key, request_hash, state, input, trace, created_at, deadline_at,
                    next_wake_at, tries, finished_at, finished_no, reason, path FROM purchase ORDER BY id",
            &[],
            |row| {
                Ok(WholeRow {
                    id: row.get(0)?,
                    customer_id: row.get(1)?,
                    key: row.get(2)?,
                    request_hash: row.get(3)?,
                    state: row.get(4)?,
                    input: row.get(5)?,
                    trace: row.get(6)?,
                    created_at: row.get(7)?,
                    deadline_at: row.get(8)?,
                    next_wake_at: row.get(9)?,
                    tries: row.get(10)?,
                    finished_at: row.get(11)?,
                    finished_no: row.get(12)?,
                    reason: row.get(13)?,
                    path: row.get(14)?,
                })
            },
        )
    }

    /// Every state for each of two customers. They ended in another order than they were accepted in.
    fn old_rows() -> Vec<WholeRow> {
        let row = |id: u64, customer_id: u64, state: u8, finished_no: Option<u64>| {
            let why = matches!(state, 2..=4);
            WholeRow {
                id,
                customer_id,
                key: id.is_multiple_of(2).then(|| format!("key {id}")),
                request_hash: id.is_multiple_of(2).then(|| vec![u8::try_from(id).expect("small"); 32]),
                state,
                input: format!("input {id}").into_bytes(),
                trace: format!("trace {id}"),
                created_at: 1_000 + id,
                deadline_at: 2_000 + id,
                next_wake_at: (state == 0).then_some(3_000 + id),
                tries: if matches!(state, 0 | 4) { 5 } else { 0 },
                finished_at: finished_no.map(|no| 4_000 + no),
                finished_no,
                reason: why.then(|| format!("reason {id}")),
                path: (state != 0).then(|| format!("path {id}").into_bytes()),
            }
        };
        vec![
            row(10, 7, 1, Some(6)),
            row(11, 7, 0, None),
            row(12, 8, 2, Some(1)),
            row(13, 7, 2, Some(3)),
            row(14, 7, 3, Some(2)),
            row(15, 7, 4, None),
            row(16, 8, 1, Some(4)),
            row(17, 8, 3, Some(5)),
            row(18, 8, 0, None),
            row(19, 8, 4, None),
        ]
    }

    fn insert_old(tx: &mut Tx<'_>, row: &WholeRow) -> Result<u64, Error> {
        tx.execute(
            "INSERT INTO purchase (id, customer_id, idempotency_key, request_hash, state, input, trace, created_at,
                                   deadline_at, next_wake_at, tries, finished_at, finished_no, reason, path)
             VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            &[
                Value::from(row.id),
                Value::from(row.customer_id),
                Value::from(row.key.as_deref()),
                Value::from(row.request_hash.as_deref()),
                Value::from(row.state),
                Value::from(&row.input),
                Value::from(&row.trace),
                Value::from(row.created_at),
                Value::from(row.deadline_at),
                Value::from(row.next_wake_at),
                Value::from(row.tries),
                Value::from(row.finished_at),
                Value::from(row.finished_no),
                Value::from(row.reason.as_deref()),
                Value::from(row.path.as_deref()),
            ],
        )
    }

    /// There was never such a database on a server.
    #[tokio::test]
    async fn a_database_of_one_table_says_the_same_after_its_migration() {
        let at = TestDb::sqlite();
        let old = at.open(&MIGRATIONS[..2]);
        let before = old
            .write(|tx| {
                for row in old_rows() {
                    insert_old(tx, &row)?;
                }
                tx.execute("UPDATE purchase_finish SET no = 6 WHERE only = 1", &[])?;
                whole_rows(tx)
            })
            .await
            .expect("the old rows");
        old.close().await;
        assert_eq!(before, old_rows());

        let db = at.open(MIGRATIONS);
        let after = db.read(whole_rows).await.expect("the view");
        assert_eq!(after, before);
        for customer in [7, 8] {
            let listed = db.read(move |tx| list(tx, customer, 0, 100)).await.expect("a list");
            let listed: Vec<(u64, u8)> =
                listed.iter().map(|shown| (shown.id, shown.state.number())).collect();
            let theirs = before.iter().rev().filter(|row| row.customer_id == customer);
            assert_eq!(listed, theirs.map(|row| (row.id, row.state)).collect::<Vec<_>>());

            let finished = db.read(move |tx| finished_between(tx, customer, 1, 6, 100)).await.expect("ends");
            let finished: Vec<FinishedRow> = finished.into_iter().map(finished_row).collect();
            let mut ended: Vec<FinishedRow> = before
                .iter()
                .filter(|row| row.customer_id == customer)
                .filter_map(|row| Some((row.id, row.finished_no?, row.created_at, row.path.clone()?)))
                .filter(|(_, no, ..)| *no > 1)
                .collect();
            ended.sort_by_key(|(_, no, ..)| *no);
            assert_eq!(finished, ended);
        }

        // The order of ends goes on behind the old one.
        let end = Finish {
            id: 11,
            customer_id: 7,
            state: State::Succeeded,
            finished_at: 5_000,
            reason: None,
            path: Vec::new(),
        };
        let number = db.write(move |tx| finish(tx, &[&end], LIST_BEHIND)).await.expect("an end");
        assert_eq!(number, 7);
        db.close().await;
    }

    async fn accept(db: &Db, ids: impl Iterator<Item = u64>) {
        let new: Vec<NewPurchase> = ids.map(|id| Bought::accepted(id, 7).new_purchase()).collect();
        db.write(move |tx| insert(tx, new.iter())).await.expect("purchases");
    }

    async fn ids_due(db: &Db, take: Take, now: UnixMillis, after: u64, limit: u32) -> Vec<u64> {
        let due =
            db.write(move |tx| due(tx, take, now, now + 1_000_000, after, limit)).await.expect("what is due");
        due.iter().map(|due| due.id).collect()
    }

    async fn a_purchase_from_its_acceptance_to_an_operator_and_back(at: &TestDb) {
        let db = at.open(MIGRATIONS);
        accept(&db, 1..=5).await;
        // They are due 10 ms after they were accepted, at 1,001, 1,002, ...
        assert_eq!(ids_due(&db, Take::Lock, 1_013, 0, 9).await, [1, 2, 3]);
        assert_eq!(ids_due(&db, Take::Look, 1_013, 1, 1).await, [2]);
        db.write(|tx| postpone(tx, [(1, 5_000, 1), (2, 6_000, 1)].into_iter())).await.expect("later");
        assert_eq!(ids_due(&db, Take::Lock, 1_013, 0, 9).await, [3]);
        let again = db.write(|tx| due(tx, Take::Lock, 6_000, 7_000, 0, 9)).await.expect("what is due");
        let tries: Vec<(u64, u32, u64)> =
            again.iter().map(|due| (due.id, due.tries, due.next_wake_at)).collect();
        assert_eq!(tries[..2], [(1, 1, 5_000), (2, 1, 6_000)]);
        assert_eq!((again[0].input.as_slice(), again[0].deadline_at), (&b"input 1"[..], 1_101));
        // A clock that was set back: what is due far off is due now.
        let early = db.write(|tx| due(tx, Take::Lock, 10, 5_500, 0, 9)).await.expect("what is due");
        assert_eq!(early.iter().map(|due| due.id).collect::<Vec<_>>(), [2]);

        db.write(|tx| give_up(tx, [(3, Some(&b"path"[..])), (4, None)].into_iter(), "tried"))
            .await
            .expect("given up");
        let left = db.read(|tx| left_to_operator(tx, 9)).await.expect("what is left");
        let told: Vec<_> = left.iter().map(|left| (left.id, left.reason.as_deref())).collect();
        assert_eq!(told, [(3, Some("tried")), (4, Some("tried"))]);
        assert_eq!(db.read(count_left_to_operator).await, Ok(2));
        assert!(db.read(|tx| left_to_operator_as(tx, 3)).await.expect("3").is_some());
        assert!(db.read(|tx| left_to_operator_as(tx, 5)).await.expect("5").is_none());
        let shown = db.read(|tx| by_id(tx, 3, 7)).await.expect("3").expect("it is there");
        assert_eq!((shown.state, shown.path), (State::NeedsOperator, Some(b"path".to_vec())));
        assert!(db.read(|tx| by_id(tx, 3, 8)).await.expect("3").is_none(), "it is somebody else's");
        assert_eq!(db.write(|tx| retry(tx, 3, 9_000)).await, Ok(true));
        assert_eq!(db.write(|tx| retry(tx, 3, 9_000)).await, Ok(false));
        assert_eq!(ids_due(&db, Take::Lock, 20_000, 0, 9).await, [1, 2, 3, 5]);

        assert_eq!(db.read(all_ended_below).await, Ok(1));
        let woken = db.write(|tx| wake_all(tx, 77)).await.expect("all");
        assert_eq!(woken.len(), 4, "what was left to an operator stays so");
        let ends: Vec<Finish> =
            [5, 1, 2, 3].map(|id| Bought::accepted(id, 7).finish(State::Cancelled, 9)).into();
        let ids = [5, 1, 2, 3];
        let first = db.write(move |tx| {
            assert_eq!(close(tx, &ids)?, 4, "3 was left to an operator");
            finish(tx, &ends.iter().collect::<Vec<_>>(), LIST_BEHIND)
        });
        assert_eq!(first.await, Ok(1));
        // Of what is closed again, only 4 was open; the transaction is not kept.
        let known_now = db.write(|tx| {
            let (closed, known) = (close(tx, &[1, 4, 99])?, known(tx, &[1, 4, 99])?);
            assert_eq!(closed, 1);
            let expected = [(1, Known::Ended { path: b"path 1".to_vec() }), (4, Known::Closed)];
            assert_eq!(known, HashMap::from(expected));
            Err::<(), Error>(Error::Panicked)
        });
        assert_eq!(known_now.await, Err(Error::Panicked));
        assert_eq!(db.read(all_ended_below).await, Ok(4));
        assert_eq!(db.read(last_finished_no).await, Ok(4));
    }

    /// Looks the key up and inserts what is new, as the acceptance does; tells which purchase the key belongs to.
    async fn accept_under_key(db: &Db, id: u64, key: &'static str) -> u64 {
        let key = Key { key: key.to_owned(), request_hash: [1; 32] };
        let new = NewPurchase { key: Some(key), ..Bought::accepted(id, 7).new_purchase() };
        let accepted = db.write(move |tx| {
            let key = new.key.as_ref().map(|key| key.key.as_str()).unwrap_or_default();
            let earlier = by_keys(tx, [(7, key)].into_iter())?;
            match earlier.into_values().next() {
                Some(earlier) => Ok(earlier.id),
                None => insert(tx, [&new].into_iter()).map(|()| new.id),
            }
        });
        accepted.await.map_err(|error: Error| error).expect("it is accepted")
    }

    async fn one_key_is_one_purchase_on_many_replicas(at: &TestDb) {
        const REPLICAS: usize = 4;
        let replicas: Vec<Db> = (0..REPLICAS).map(|_| at.open(MIGRATIONS)).collect();
        // What differs by case or by spaces at the end is another key.
        let keys = ["key", "Key", "key ", "k\u{e9}y", "\"key\\", "\u{1F980}"];
        let start = std::sync::Arc::new(tokio::sync::Barrier::new(REPLICAS));
        let mut tasks = Vec::new();
        for (replica, db) in (0..).zip(replicas.clone()) {
            let start = start.clone();
            tasks.push(tokio::spawn(async move {
                let mut accepted = Vec::new();
                for (number, key) in (0..).zip(keys) {
                    start.wait().await;
                    accepted.push(accept_under_key(&db, 100 + number * 10 + replica, key).await);
                }
                accepted
            }));
        }
        let mut all = Vec::new();
        for task in tasks {
            all.push(task.await.expect("a replica"));
        }
        assert!(all.windows(2).all(|pair| pair[0] == pair[1]), "{all:?}");
        let distinct: HashSet<u64> = all[0].iter().copied().collect();
        assert_eq!(distinct.len(), keys.len(), "{all:?}");
        let open = replicas[0].write(|tx| wake_all(tx, 1)).await.expect("what is open");
        assert_eq!(open.len(), keys.len(), "no other purchase was accepted");
    }

    async fn replicas_that_end_the_same_purchases_end_each_once_and_number_them_without_a_gap(at: &TestDb) {
        const REPLICAS: u64 = 3;
        const PURCHASES: u64 = 120;
        let replicas: Vec<Db> = (0..REPLICAS).map(|_| at.open(MIGRATIONS)).collect();
        accept(&replicas[0], 1..=PURCHASES).await;
        let start = std::sync::Arc::new(tokio::sync::Barrier::new(replicas.len()));
        let mut tasks = Vec::new();
        for (replica, db) in (0..).zip(replicas.clone()) {
            let start = start.clone();
            tasks.push(tokio::spawn(async move {
                let mut ended = Vec::new();
                for batch in 0..PURCHASES / 12 {
                    // Each is told of the ends in another order.
                    let mut ids: Vec<u64> = (1..=12).map(|id| batch * 12 + id).collect();
                    ids.rotate_left(replica * 5 % 12);
                    if replica % 2 == 1 {
                        ids.reverse();
                    }
                    start.wait().await;
                    let numbers = db.write(move |tx| {
                        let closed = close(tx, &ids)?;
                        let known = known(tx, &ids)?;
                        let open = |id: &&u64| known.get(*id) == Some(&Known::Closed);
                        assert_eq!(ids.iter().filter(open).count(), closed);
                        let ends: Vec<Finish> = ids
                            .iter()
                            .filter(open)
                            .map(|id| Bought::accepted(*id, 7).finish(State::Succeeded, 9))
                            .collect();
                        if ends.is_empty() {
                            return Ok((0, 0));
                        }
                        let ends: Vec<&Finish> = ends.iter().collect();
                        Ok::<_, Error>((finish(tx, &ends, LIST_BEHIND_FEW)?, ends.len() as u64))
                    });
                    let (first, count) = numbers.await.expect("ends");
                    ended.extend(first..first + count);
                }
                ended
            }));
        }
        let mut numbers = Vec::new();
        for task in tasks {
            numbers.extend(task.await.expect("a replica"));
        }
        numbers.sort_unstable();
        assert_eq!(numbers, (1..=PURCHASES).collect::<Vec<_>>());
        let listed = replicas[0].read(|tx| list(tx, 7, 0, 1_000)).await.expect("a list");
        let listed: Vec<u64> = listed.iter().map(|shown| shown.id).collect();
        assert_eq!(listed, (1..=PURCHASES).rev().collect::<Vec<_>>());
    }

    #[tokio::test]
    async fn what_one_replica_has_in_hand_is_not_due_for_another() {
        let at = TestDb::mariadb();
        let (first, second) = (at.open(MIGRATIONS), at.open(MIGRATIONS));
        accept(&first, 1..=6).await;
        let (tell, taken) = tokio::sync::oneshot::channel();
        let (go, wait) = std::sync::mpsc::channel::<()>();
        let mut tell = Some(tell);
        let holder = first.clone();
        let holding = tokio::spawn(async move {
            holder
                .write(move |tx| {
                    let due = due(tx, Take::Lock, 2_000, 1_000_000, 0, 3)?;
                    if let Some(tell) = tell.take() {
                        tell.send(()).expect("somebody listens");
                        wait.recv().expect("somebody lets it go");
                    }
                    postpone(tx, due.iter().map(|due| (due.id, 9_000, 1)))?;
                    Ok::<_, Error>(due.len())
                })
                .await
        });
        taken.await.expect("it has them");
        // It neither waits for them nor takes them, and looking is free.
        assert_eq!(ids_due(&second, Take::Lock, 2_000, 0, 3).await, [] as [u64; 0]);
        assert_eq!(ids_due(&second, Take::Lock, 2_000, 0, 9).await, [4, 5, 6]);
        assert_eq!(ids_due(&second, Take::Look, 2_000, 0, 9).await, [1, 2, 3, 4, 5, 6]);
        go.send(()).expect("it waits");
        assert_eq!(holding.await.expect("it ends"), Ok(3));
        assert_eq!(ids_due(&second, Take::Lock, 2_000, 0, 9).await, [4, 5, 6]);
    }

    #[test]
    fn a_page_of_two_lists_is_the_page_of_their_merge() {
        // Every way to deal out eight ids to the two lists, every page of each.
        for dealt in 0_u32..256 {
            let (recent, listed): (Vec<u64>, Vec<u64>) = (0..8).rev().partition(|id| dealt >> id & 1 == 1);
            let merged: Vec<u64> = (0..8).rev().collect();
            for (offset, size) in (0..10).flat_map(|offset| (1..4).map(move |size| (offset, size))) {
                let ahead = recent.len();
                let skipped = usize::saturating_sub(offset, ahead);
                let window: Vec<u64> = listed.iter().skip(skipped).take(size + ahead).copied().collect();
                let expected: Vec<u64> = merged.iter().skip(offset).take(size).copied().collect();
                let page = page(&recent, &window, skipped as u64, offset as u64, size as u64);
                assert_eq!(page, expected, "recent {recent:?}, offset {offset}, size {size}");
            }
        }
    }
}

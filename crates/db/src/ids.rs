//! Ids from a leased worker number: the part of [`wire::ids`] that needs a database.
//!
//! Each process leases a worker number in table `id_lease` and reserves seconds there, a window at a time,
//! before it gives out an id of them. What never happens, whatever clocks do and whoever dies:
//! - An id whose second is above what is durably reserved for its worker.
//! - A reservation of seconds that were reserved for that worker before: one begins above the last.
//!
//! Together these make ids unique. The lease's expiry is not part of that argument: it only says which
//! numbers to prefer, so a wrong clock, a paused process or more processes than numbers cost a new lease, never
//! an id given out twice. Whoever takes over a number puts its own token into the row (the fence): the earlier
//! owner's next renewal does not find its token, it gives out nothing more under that number, and leases anew.

use std::hash::{BuildHasher, RandomState};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use tokio::sync::Notify;
use wire::ids::{LAST_SECOND, Sequence, WORKERS, second_of};
use wire::time::{Clock, UnixMillis};

use crate::{Db, Error, Migration, Tx, Value};

/// The table that [`Ids::lease`] needs, as one of a service's migrations.
pub const fn migration(number: u32) -> Migration {
    Migration {
        number,
        name: "id_lease",
        sqlite: "CREATE TABLE id_lease (
    worker INTEGER NOT NULL PRIMARY KEY,
    owner BIGINT NOT NULL,
    expires_at_millis BIGINT NOT NULL,
    reserved_until_second BIGINT NOT NULL
)",
        mysql: "CREATE TABLE IF NOT EXISTS id_lease (
    worker INT NOT NULL PRIMARY KEY,
    owner BIGINT NOT NULL,
    expires_at_millis BIGINT NOT NULL,
    reserved_until_second BIGINT NOT NULL
) ENGINE = InnoDB",
    }
}

/// How far a reservation reaches beyond the clock, or beyond the ids given out if they run ahead of it.
const WINDOW_SECONDS: u32 = 60;
/// Without a renewal for so long, others may take the number without regret.
const LEASE_MILLIS: u64 = 60_000;
/// A third of the lease, so that two renewals in a row may fail.
const RENEWAL_INTERVAL: Duration = Duration::from_millis(LEASE_MILLIS / 3);
/// The pause after a failed renewal.
const RENEWAL_RETRY_PAUSE: Duration = Duration::from_secs(1);
/// How many ids can be taken at once: a third of a window.
pub const MAX_TAKE_IDS: u32 = 20 * 32_768;

/// Gives out ids of a leased worker number. Clones share the lease.
#[derive(Clone)]
pub struct Ids(Arc<Shared>);

struct Shared {
    db: Db,
    clock: Clock,
    /// The fence: which rows are this process's own. Never 0.
    owner: i64,
    state: Mutex<State>,
    /// Held while the database is asked, so that many who wait for a reservation ask for one.
    asking: tokio::sync::Mutex<()>,
    /// Wakes the renewal task: the window is half used, or all handles are gone.
    wake: Arc<Notify>,
}

impl Drop for Shared {
    fn drop(&mut self) {
        self.wake.notify_one();
    }
}

enum State {
    Held(Lease),
    /// Somebody else has the number now; the next reservation leases another.
    Lost,
    Released,
}

struct Lease {
    sequence: Sequence,
    reserved_until_second: u32,
}

impl Lease {
    /// Whether it is time to reserve more, so that nobody has to wait for it.
    fn is_half_used(&self) -> bool {
        self.sequence.next_second() + u64::from(WINDOW_SECONDS / 2) > u64::from(self.reserved_until_second)
    }
}

/// Why there are no ids.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum IdsError {
    /// More seconds had to be reserved, and the database failed.
    #[error("cannot reserve ids: {0}")]
    Db(#[from] Error),
    /// More ids at once than is allowed.
    #[error("{asked} ids were asked for at once; {MAX_TAKE_IDS} is the most")]
    TooMany {
        /// How many were asked for.
        asked: u32,
    },
    /// The number's seconds are used up, or the clock stands beyond 2094.
    #[error("worker {worker} has no ids left before the end of their time in 2094; is the clock right?")]
    Worn {
        /// The worker number.
        worker: u8,
    },
    /// [`Ids::release`] was called.
    #[error("the ids' lease was released: the process is stopping")]
    Released,
}

impl IdsError {
    /// Whether trying again later may help.
    pub fn is_transient(&self) -> bool {
        matches!(self, IdsError::Db(error) if error.is_transient())
    }
}

impl Ids {
    /// Leases a worker number and reserves its first seconds. A task then renews the lease until the last
    /// handle is dropped. Must be called on a tokio runtime.
    ///
    /// # Errors
    /// If the database fails; the table of [`migration`] must be there.
    pub async fn lease(db: Db, clock: Clock) -> Result<Ids, IdsError> {
        let wake = Arc::new(Notify::new());
        let state = Mutex::new(State::Lost);
        let asking = tokio::sync::Mutex::new(());
        let shared = Arc::new(Shared { db, clock, owner: random_owner(), state, asking, wake: wake.clone() });
        shared.reserve(Wanted::Lease).await?;
        tokio::spawn(renew_until_dropped(Arc::downgrade(&shared), wake));
        Ok(Ids(shared))
    }

    /// The next `count` ids, ascending, above all that this handle and its clones gave out before under the same
    /// worker number. Waits for the database only if what is reserved does not suffice.
    ///
    /// # Errors
    /// See [`IdsError`]; no id is given out then.
    pub async fn take(&self, count: u32) -> Result<wire::ids::Ids, IdsError> {
        if count > MAX_TAKE_IDS {
            return Err(IdsError::TooMany { asked: count });
        }
        loop {
            match self.0.take_reserved(count)? {
                Ok(ids) => return Ok(ids),
                Err(wanted) => self.0.reserve(wanted).await?,
            }
        }
    }

    /// One id; see [`Ids::take`].
    ///
    /// # Errors
    /// See [`IdsError`].
    pub async fn next(&self) -> Result<u64, IdsError> {
        let mut one = self.take(1).await?;
        Ok(one.next().expect("one id was taken"))
    }

    /// The worker number that is leased now, if one is.
    pub fn worker(&self) -> Option<u8> {
        match &*self.0.state() {
            State::Held(lease) => Some(lease.sequence.worker()),
            State::Lost | State::Released => None,
        }
    }

    /// Gives the number back, with the seconds that were not used. From now on nothing is given out. For
    /// a process that stops and whose successor should have the same number; without it, the number just stays
    /// unused for a while.
    ///
    /// # Errors
    /// If the database fails; the lease then expires by itself.
    pub async fn release(&self) -> Result<(), Error> {
        let _turn = self.0.asking.lock().await;
        let held = std::mem::replace(&mut *self.0.state(), State::Released);
        let State::Held(lease) = held else { return Ok(()) };
        let used_until = lease.sequence.next_second().min(u64::from(LAST_SECOND)) as u32;
        self.0.update_row(lease.sequence.worker(), used_until, 0).await.map(drop)
    }
}

/// What has to be reserved before ids can be given out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Wanted {
    /// A worker number; there is none.
    Lease,
    /// This second.
    Second(u64),
    /// Whatever is usual by now.
    Renewal,
}

/// What to ask of the database.
#[derive(Debug, PartialEq, Eq)]
enum Step {
    Nothing,
    Lease,
    Extend { worker: u8, until_second: u32 },
}

impl Shared {
    /// No code that can panic runs under the lock, so a poisoned one still guards a whole state.
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn now_second(&self) -> u32 {
        second_of(self.clock.now_seconds())
    }

    fn take_reserved(&self, count: u32) -> Result<Result<wire::ids::Ids, Wanted>, IdsError> {
        let now_second = self.now_second();
        match &mut *self.state() {
            State::Held(lease) => {
                let taken = lease.sequence.take(now_second, count, lease.reserved_until_second);
                if taken.is_ok() && lease.is_half_used() {
                    self.wake.notify_one();
                }
                Ok(taken.map_err(|exhausted| Wanted::Second(exhausted.needed_second)))
            }
            State::Lost => Ok(Err(Wanted::Lease)),
            State::Released => Err(IdsError::Released),
        }
    }

    /// Asks the database for what is wanted, unless somebody else who asked before has brought it.
    async fn reserve(&self, wanted: Wanted) -> Result<(), IdsError> {
        let _turn = self.asking.lock().await;
        let step = next_step(&self.state(), wanted, self.now_second())?;
        match step {
            Step::Nothing => return Ok(()),
            Step::Extend { worker, until_second } => {
                let expires_at = self.clock.now().saturating_add(LEASE_MILLIS);
                if self.update_row(worker, until_second, expires_at).await? {
                    if let State::Held(lease) = &mut *self.state() {
                        lease.reserved_until_second = until_second;
                    }
                    return Ok(());
                }
                tracing::warn!(
                    database = self.db.name(),
                    worker,
                    "the lease of the worker number was taken over"
                );
                *self.state() = State::Lost;
            }
            Step::Lease => {}
        }
        let lease = self.lease_anew().await?;
        *self.state() = State::Held(lease);
        Ok(())
    }

    /// Sets the row, if it is still this owner's own; otherwise false.
    async fn update_row(&self, worker: u8, until_second: u32, expires_at: UnixMillis) -> Result<bool, Error> {
        let owner = self.owner;
        let update = move |tx: &mut Tx<'_>| {
            tx.execute(
                "UPDATE id_lease SET expires_at_millis = ?, reserved_until_second = ?
                 WHERE worker = ? AND owner = ?",
                &[expires_at.into(), until_second.into(), worker.into(), Value::Int(owner)],
            )
        };
        Ok(self.db.write(update).await? == 1)
    }

    async fn lease_anew(&self) -> Result<Lease, IdsError> {
        loop {
            let (owner, now) = (self.owner, self.clock.now());
            if let Some(claim) = self.db.write(move |tx| claim(tx, owner, now)).await? {
                if claim.reserved_until_second < claim.first_second {
                    return Err(IdsError::Worn { worker: claim.worker });
                }
                tracing::debug!(database = self.db.name(), ?claim, "worker number leased");
                let sequence = Sequence::new(claim.worker, claim.first_second);
                return Ok(Lease { sequence, reserved_until_second: claim.reserved_until_second });
            }
        }
    }
}

/// Decides what to ask the database for.
fn next_step(state: &State, wanted: Wanted, now_second: u32) -> Result<Step, IdsError> {
    let lease = match (state, wanted) {
        (State::Released, Wanted::Renewal) => return Ok(Step::Nothing),
        (State::Released, _) => return Err(IdsError::Released),
        (State::Lost, _) => return Ok(Step::Lease),
        (State::Held(_), Wanted::Lease) => return Ok(Step::Nothing),
        (State::Held(lease), Wanted::Second(_) | Wanted::Renewal) => lease,
    };
    let worker = lease.sequence.worker();
    if let Wanted::Second(second) = wanted {
        if second > u64::from(LAST_SECOND) {
            return Err(IdsError::Worn { worker });
        }
        if second <= u64::from(lease.reserved_until_second) {
            return Ok(Step::Nothing);
        }
    }
    let until = lease.sequence.next_second().max(u64::from(now_second)) + u64::from(WINDOW_SECONDS);
    let until = u32::try_from(until).unwrap_or(LAST_SECOND).min(LAST_SECOND);
    // Never less than before: with a clock set back, the row would forget what was given out.
    Ok(Step::Extend { worker, until_second: until.max(lease.reserved_until_second) })
}

/// A row of `id_lease`.
#[derive(Debug, Clone, Copy)]
struct Row {
    worker: u8,
    expires_at: UnixMillis,
    reserved_until_second: u32,
}

/// A number to lease, and where its ids begin.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Claim {
    worker: u8,
    is_new: bool,
    first_second: u32,
    /// Below `first_second`, if the number's seconds are used up.
    reserved_until_second: u32,
}

/// The lowest number whose lease has expired, else the lowest that was never leased, else the one whose owner
/// has been silent for longest; one that has no ids left only if there is no other.
fn choose(rows: &[Row], now: UnixMillis) -> Claim {
    let now_second = second_of(now / 1000);
    let over = |row: &Row| {
        let first_second = row.reserved_until_second.saturating_add(1);
        let until = first_second.max(now_second).saturating_add(WINDOW_SECONDS).min(LAST_SECOND);
        Claim { worker: row.worker, is_new: false, first_second, reserved_until_second: until }
    };
    let has_ids_left = |row: &&Row| row.reserved_until_second < LAST_SECOND;
    if let Some(expired) = rows.iter().filter(has_ids_left).find(|row| row.expires_at <= now) {
        return over(expired);
    }
    let unused = (0..WORKERS).find(|worker| rows.iter().all(|row| row.worker != *worker));
    match (unused, rows.iter().min_by_key(|row| (!has_ids_left(row), row.expires_at))) {
        (None, Some(silent)) => over(silent),
        (unused, _) => Claim {
            worker: unused.unwrap_or(0),
            is_new: true,
            // Not 0, whatever the clock says: an id of 0 is none.
            first_second: 1,
            reserved_until_second: now_second.saturating_add(WINDOW_SECONDS).min(LAST_SECOND),
        },
    }
}

/// Leases a number. None, if another process took the same new one first.
fn claim(tx: &mut Tx<'_>, owner: i64, now: UnixMillis) -> Result<Option<Claim>, Error> {
    let rows = tx.query(
        "SELECT worker, expires_at_millis, reserved_until_second FROM id_lease ORDER BY worker {for update}",
        &[],
        |row| Ok(Row { worker: row.get(0)?, expires_at: row.get(1)?, reserved_until_second: row.get(2)? }),
    )?;
    let claim = choose(&rows, now);
    let expires_at = now.saturating_add(LEASE_MILLIS);
    let statement = if claim.is_new {
        "{insert ignore} INTO id_lease (owner, expires_at_millis, reserved_until_second, worker) VALUES (?, ?, ?, ?)"
    } else {
        "UPDATE id_lease SET owner = ?, expires_at_millis = ?, reserved_until_second = ? WHERE worker = ?"
    };
    // A number that is used up is left as it is: its row must not say less than what was given out.
    if claim.reserved_until_second < claim.first_second {
        return Ok(Some(claim));
    }
    let values =
        [Value::Int(owner), expires_at.into(), claim.reserved_until_second.into(), claim.worker.into()];
    let changed = tx.execute(statement, &values)?;
    Ok((changed == 1).then_some(claim))
}

/// 62 random bits from the system's entropy, by way of the keys that the standard library seeds its maps with.
fn random_owner() -> i64 {
    let random = RandomState::new().hash_one(std::process::id());
    (random >> 2) as i64 | 1
}

/// Renews the lease before it expires and before its seconds are used up.
async fn renew_until_dropped(shared: Weak<Shared>, wake: Arc<Notify>) {
    loop {
        tokio::select! {
            () = wake.notified() => {}
            () = tokio::time::sleep(RENEWAL_INTERVAL) => {}
        }
        let Some(shared) = shared.upgrade() else { return };
        if let Err(error) = shared.reserve(Wanted::Renewal).await {
            tracing::warn!(database = shared.db.name(), %error, "could not renew the lease of the worker number");
            drop(shared);
            tokio::time::sleep(RENEWAL_RETRY_PAUSE).await;
            // Try again at once, not after a whole interval.
            wake.notify_one();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use wire::ids::EPOCH_UNIX_SECONDS;

    fn row(worker: u8, expires_at: UnixMillis, reserved_until_second: u32) -> Row {
        Row { worker, expires_at, reserved_until_second }
    }

    fn at(second: u64) -> UnixMillis {
        (EPOCH_UNIX_SECONDS + second) * 1000
    }

    #[test]
    fn an_expired_number_goes_before_a_new_one_and_a_new_one_before_a_living_one() {
        let now = at(1000);
        let first = choose(&[], now);
        assert_eq!((first.worker, first.is_new, first.reserved_until_second), (0, true, 1060));
        let rows = [row(0, now + 1, 1060), row(1, now, 1050), row(3, now + 1, 1060)];
        let expired = choose(&rows, now);
        assert_eq!((expired.worker, expired.is_new, expired.first_second), (1, false, 1051));
        let new = choose(&[rows[0], rows[2]], now);
        assert_eq!((new.worker, new.is_new), (1, true));
        let all: Vec<_> = (0..WORKERS).map(|worker| row(worker, now + 200 - u64::from(worker), 5)).collect();
        assert_eq!(choose(&all, now).worker, WORKERS - 1);
    }

    #[test]
    fn a_claim_begins_above_what_was_reserved_even_with_a_clock_set_back() {
        let claim = choose(&[row(0, 0, 5000)], at(10));
        assert_eq!((claim.first_second, claim.reserved_until_second), (5001, 5061));
        let beside_a_worn_one = choose(&[row(0, 0, LAST_SECOND)], at(10));
        assert_eq!((beside_a_worn_one.worker, beside_a_worn_one.is_new), (1, true));
        let all_worn: Vec<Row> = (0..WORKERS).map(|worker| row(worker, 0, LAST_SECOND)).collect();
        let worn = choose(&all_worn, at(10));
        assert!(worn.reserved_until_second < worn.first_second);
    }

    #[test]
    fn a_renewal_never_takes_back_what_was_reserved() {
        let state = State::Held(Lease { sequence: Sequence::new(3, 100), reserved_until_second: 5000 });
        let step = next_step(&state, Wanted::Renewal, 10).unwrap();
        assert_eq!(step, Step::Extend { worker: 3, until_second: 5000 });
        assert_eq!(next_step(&state, Wanted::Second(5000), 10).unwrap(), Step::Nothing);
        let worn = next_step(&state, Wanted::Second(u64::from(LAST_SECOND) + 1), 10);
        assert_eq!(worn, Err(IdsError::Worn { worker: 3 }));
        assert_eq!(next_step(&State::Released, Wanted::Lease, 10), Err(IdsError::Released));
    }
}

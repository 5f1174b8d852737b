//! The threads: each takes closures from a queue and runs them on a connection of its own.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use tokio::sync::watch;

use super::Settings;
use super::connect::{Connector, Role};
use super::fault::Fault;
use super::outcome::{self, Mark};
use super::session::{CommitFailed, MysqlTx, Ran, Session};
use super::uniques::Uniques;
use crate::job::{Counters, Job};
use crate::queue::{Queue, Taken};
use crate::{Db, Error, Inner, OpenError, Outage, Tx, spawn};

/// How often a closure is run at most, if each time others are in the way or the connection is lost.
const MAX_RUNS: u32 = 8;

/// The pause before the second run; it doubles with each, up to the bound.
const RERUN_PAUSE_MIN: Duration = Duration::from_millis(2);
const RERUN_PAUSE_MAX: Duration = Duration::from_millis(100);

/// A connection that had nothing to do for so long is closed. Shorter than the server's own patience, so that it is never the
/// server that closes it.
const IDLE_CLOSE: Duration = Duration::from_secs(45);

/// Starts the threads. None of them connects before it has something to do.
pub(super) fn start(
    settings: &Settings,
    connector: Arc<Connector>,
    uniques: Arc<Uniques>,
) -> Result<Db, OpenError> {
    let writes = Arc::new(Queue::new(settings.write_queue_jobs));
    let reads = Arc::new(Queue::new(settings.read_queue_jobs));
    let counters = Arc::new(Counters::default());
    let (alive, ended) = watch::channel(());
    let alive = Arc::new(alive);
    // From here on, an early return drops this and so ends the threads that were already started.
    let db = Db(Arc::new(Inner {
        name: settings.name,
        shared: true,
        writes: writes.clone(),
        reads: reads.clone(),
        counters: counters.clone(),
        ended,
    }));
    let session = |role| Session::new(connector.clone(), uniques.clone(), role);
    for number in 0..settings.writers.max(1) {
        let (queue, alive) = (writes.clone(), alive.clone());
        let mut writer = Writer {
            session: session(Role::Write),
            counters: counters.clone(),
            patience: settings.outcome_patience,
        };
        spawn(settings.name, &format!("write-{number}"), move || {
            while let Some(job) = next(&queue, &mut writer.session) {
                writer.work_off(job);
            }
            drop(alive);
        })?;
    }
    for number in 0..settings.readers.max(1) {
        let (queue, alive) = (reads.clone(), alive.clone());
        let mut session = session(Role::Read);
        spawn(settings.name, &format!("read-{number}"), move || {
            while let Some(job) = next(&queue, &mut session) {
                read(&mut session, job);
            }
            drop(alive);
        })?;
    }
    Ok(db)
}

/// Waits for a closure; none, once the queue is closed and empty. Closes the connection when there is nothing to do.
fn next(queue: &Queue<Box<dyn Job>>, session: &mut Session) -> Option<Box<dyn Job>> {
    let mut waiting = VecDeque::with_capacity(1);
    loop {
        match queue.take_within(1, &mut waiting, IDLE_CLOSE) {
            Taken::Some => return waiting.pop_front(),
            Taken::Nothing => session.disconnect(),
            Taken::Closed => return None,
        }
    }
}

/// Each closure sees one snapshot, that of its first statement.
fn read(session: &mut Session, mut job: Box<dyn Job>) {
    let (_, Ran { began, lost, .. }) = run(session, &mut *job);
    let outcome = match lost {
        Some((fault, statement)) => {
            session.disconnect();
            Err(fault.error(statement, session.connector().address()))
        }
        None => Ok(()),
    };
    let lost = outcome.is_err();
    // The caller need not wait for the end of the snapshot.
    job.answer(outcome);
    if began && !lost {
        session.roll_back();
    }
}

/// Runs a closure. Whether its effects are to be kept, and what is known of its transaction.
fn run(session: &mut Session, job: &mut dyn Job) -> (bool, Ran) {
    let mut tx = Tx::Mysql(MysqlTx::new(session));
    let keep = job.run(&mut tx);
    match tx {
        Tx::Mysql(tx) => (keep, tx.into_ran()),
        Tx::Sqlite(_) => unreachable!("it was made for MySQL"),
    }
}

struct Writer {
    session: Session,
    counters: Arc<Counters>,
    patience: Duration,
}

/// What became of one run of a closure.
enum Outcome {
    /// It is committed, or the closure has refused and everything is rolled back.
    Done,
    /// Nothing was written; the closure may be run again.
    Again(Fault, &'static str),
    /// Nothing was written; another run would come to the same.
    Failed(Fault, &'static str),
    /// Nothing was written. The closure ran into this duplicate key, and refused.
    Duplicate(String),
    Unknown,
}

impl Writer {
    fn work_off(&mut self, mut job: Box<dyn Job>) {
        let outcome = self.run_until_settled(&mut *job);
        job.answer(outcome);
    }

    /// Runs the closure as often as it takes, and is allowed.
    fn run_until_settled(&mut self, job: &mut dyn Job) -> Result<(), Error> {
        let mut duplicate_before = None;
        for runs in 1.. {
            if runs > 1 {
                self.counters.reruns.fetch_add(1, Ordering::Relaxed);
            }
            match self.run_once(job) {
                Outcome::Done => return Ok(()),
                Outcome::Unknown => {
                    return Err(Error::OutcomeUnknown { patience_seconds: self.patience.as_secs() });
                }
                Outcome::Failed(fault, statement) => return Err(self.error(fault, statement, runs)),
                Outcome::Again(fault, statement) if runs == MAX_RUNS => {
                    return Err(self.error(fault, statement, runs));
                }
                Outcome::Again(fault, statement) => {
                    tracing::debug!(?fault, statement, runs, "a transaction is run again");
                    std::thread::park_timeout(pause(runs, fastrand::f64()));
                }
                // Another one may have written the row after the closure looked, and so it would be seen now. The same one twice is
                // no coincidence.
                Outcome::Duplicate(message) => {
                    if runs == MAX_RUNS || duplicate_before.as_ref() == Some(&message) {
                        return Ok(());
                    }
                    duplicate_before = Some(message);
                }
            }
        }
        unreachable!("each run is settled or counted")
    }

    fn run_once(&mut self, job: &mut dyn Job) -> Outcome {
        let (keep, Ran { began, wrote, lost, duplicate }) = run(&mut self.session, job);
        if let Some((fault, statement)) = lost {
            return self.leave(fault, statement);
        }
        if !keep {
            if began {
                self.session.roll_back();
            }
            return duplicate.map_or(Outcome::Done, Outcome::Duplicate);
        }
        if !began {
            return Outcome::Done;
        }
        let started = Instant::now();
        let outcome = match self.session.commit(wrote) {
            Ok(()) => Outcome::Done,
            Err(CommitFailed::NotWritten(fault)) => return self.leave(fault, "COMMIT"),
            Err(CommitFailed::Unknown(mark)) => self.look_up(mark),
        };
        if let Outcome::Done = outcome {
            let micros = u64::try_from(started.elapsed().as_micros()).unwrap_or(u64::MAX);
            self.counters.commit_micros.fetch_add(micros, Ordering::Relaxed);
            self.counters.groups.fetch_add(1, Ordering::Relaxed);
            self.counters.jobs.fetch_add(1, Ordering::Relaxed);
        }
        outcome
    }

    /// Gives a lost transaction up.
    fn leave(&mut self, fault: Fault, statement: &'static str) -> Outcome {
        match &fault {
            Fault::Conflict { .. } => {
                self.session.roll_back();
                Outcome::Again(fault, statement)
            }
            // A server that does not answer in time will not at once.
            Fault::Lost { timed_out: false, .. } if self.session.is_connected() => {
                self.session.disconnect();
                Outcome::Again(fault, statement)
            }
            Fault::Lost { .. } | Fault::Refused { .. } => {
                self.session.disconnect();
                Outcome::Failed(fault, statement)
            }
            Fault::Full | Fault::Duplicate { .. } | Fault::Statement { .. } => {
                self.session.roll_back();
                Outcome::Failed(fault, statement)
            }
        }
    }

    fn look_up(&mut self, mark: Mark) -> Outcome {
        self.counters.lookups.fetch_add(1, Ordering::Relaxed);
        match outcome::find_out(&mut self.session, mark, self.patience) {
            Some(true) => Outcome::Done,
            Some(false) => {
                let why = "it was lost before the transaction was committed".to_owned();
                Outcome::Again(Fault::Lost { why, timed_out: false }, "COMMIT")
            }
            None => Outcome::Unknown,
        }
    }

    fn error(&self, fault: Fault, statement: &'static str, runs: u32) -> Error {
        match fault {
            Fault::Conflict { code } => Error::Unavailable(Outage::Conflict { runs, code: i32::from(code) }),
            other => other.error(statement, self.session.connector().address()),
        }
    }
}

/// The pause before the next run. `chance` is in 0..1: those who were in each other's way should not meet again.
fn pause(runs: u32, chance: f64) -> Duration {
    RERUN_PAUSE_MIN.saturating_mul(1 << (runs - 1).min(16)).min(RERUN_PAUSE_MAX).mul_f64(chance)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_grow_to_their_bound() {
        assert_eq!(pause(1, 1.0), RERUN_PAUSE_MIN);
        assert_eq!(pause(2, 0.5), RERUN_PAUSE_MIN);
        assert_eq!(pause(40, 1.0), RERUN_PAUSE_MAX);
        assert_eq!(pause(40, 0.0), Duration::ZERO);
    }
}

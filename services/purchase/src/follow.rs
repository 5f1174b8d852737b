//! Follows a database that other replicas write to: what ends there is known here, whether or not its news come.
//!
//! - The last finish number is read every [`POLL`], so no end stays unknown.
//! - Ends whose news are missing are read when the live view asks for them.
//! - What has been open for long is looked up: that another replica left it to an operator may not have been heard.
//!
//! What never happens: an end is told that is not committed, or a number is passed over.

use std::collections::HashSet;
use std::time::Duration;

use db::Db;
use tokio::sync::mpsc;
use tokio::time::{MissedTickBehavior, interval};
use tokio_util::sync::CancellationToken;
use wire::time::Clock;

use crate::accept::millis;
use crate::live::{Live, Missing};
use crate::metrics::FeedMetrics;
use crate::news::{Ended, Told};
use crate::store;

/// How often the database is asked for the last finish number.
const POLL: Duration = Duration::from_millis(500);
/// Ends that are read at a time at most.
const PAGE_ENDS: u32 = 512;
/// The pause after a read that failed or found nothing.
const RETRY: Duration = Duration::from_millis(200);
/// How often open purchases are looked up that have been open for [`LONG`].
const LOOK_UP: Duration = Duration::from_secs(2);
/// Most end within milliseconds.
const LONG: Duration = Duration::from_secs(10);
/// Purchases that are looked up at a time at most.
const PAGE_OPEN: usize = 512;

/// What it works with.
pub(crate) struct Follower {
    pub(crate) db: Db,
    pub(crate) live: Live,
    pub(crate) clock: Clock,
    pub(crate) missing: mpsc::Receiver<Missing>,
    pub(crate) metrics: FeedMetrics,
}

impl Follower {
    /// Runs until `stop`.
    pub(crate) async fn run(mut self, stop: CancellationToken) {
        let (mut poll, mut look_up) = (interval(POLL), interval(LOOK_UP));
        poll.set_missed_tick_behavior(MissedTickBehavior::Delay);
        look_up.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut looked_up = 0;
        loop {
            let done = tokio::select! {
                biased;
                () = stop.cancelled() => return,
                Some(missing) = self.missing.recv() => {
                    self.read(missing, &stop).await;
                    Ok(())
                }
                _ = poll.tick() => self.poll().await,
                _ = look_up.tick() => self.look_up(&mut looked_up).await,
            };
            if let Err(error) = done {
                tracing::warn!(%error, "what other replicas do cannot be followed; trying again");
            }
        }
    }

    async fn poll(&self) -> Result<(), db::Error> {
        let last = self.db.read(store::last_finished_no).await?;
        if last > self.live.announced() {
            // An error means that the service is stopping.
            let _ = self.live.given_out(last).await;
        }
        Ok(())
    }

    /// Answers always, or nothing would be asked for any more.
    async fn read(&self, missing: Missing, stop: &CancellationToken) {
        let Missing { after, up_to } = missing;
        let read = self.db.read(move |tx| store::ended_between(tx, after, up_to, PAGE_ENDS)).await;
        let ended: Vec<Ended> = read.unwrap_or_else(|error: db::Error| {
            tracing::warn!(%error, after, up_to, "ends that were not heard of cannot be read; trying again");
            Vec::new()
        });
        if ended.is_empty() {
            let _ = stop.run_until_cancelled(tokio::time::sleep(RETRY)).await;
        }
        self.metrics.read(ended.len());
        let _ = self.live.read(ended).await;
    }

    /// Looks up a page of what has been open for long; those that are not open any more are forgotten.
    async fn look_up(&self, looked_up: &mut u64) -> Result<(), db::Error> {
        let before = self.clock.now().saturating_sub(millis(LONG));
        let Ok(ids) = self.live.older(before, *looked_up, PAGE_OPEN).await else { return Ok(()) };
        // Behind the last one it begins anew.
        *looked_up = ids.last().copied().unwrap_or(0);
        if ids.is_empty() {
            return Ok(());
        }
        let asked = ids.clone();
        let open: HashSet<u64> =
            self.db.read(move |tx| store::open_among(tx, &asked)).await?.into_iter().collect();
        let closed: Vec<u64> = ids.into_iter().filter(|id| !open.contains(id)).collect();
        if !closed.is_empty() {
            let _ = self.live.found_not_open(closed).await;
        }
        Ok(())
    }
}

impl From<store::EndedRow> for Ended {
    fn from(row: store::EndedRow) -> Ended {
        let store::EndedRow { customer_id, finished_no, id, created_at, path } = row;
        Ended { customer_id, finished_no, id, started_at: created_at, path: Told::Encoded(path.into()) }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use db::Error;
    use testdb::TestDb;

    use super::*;
    use crate::MIGRATIONS;
    use crate::model::State;
    use crate::store::{EndedRow, Finish, NewPurchase, PutBack, Take};

    testdb::on_both! {
        #[tokio::test]
        what_follows_asks_the_database;
        #[tokio::test(flavor = "multi_thread", worker_threads = 4)]
        whoever_follows_never_sees_a_hole_while_replicas_end_purchases_and_roll_back;
    }

    fn new(id: u64) -> NewPurchase {
        let (input, trace) = (bytes::Bytes::from_static(b"input"), String::new());
        let (created_at, deadline_at, next_wake_at) = (1_000 + id, 9_000, 5_000);
        NewPurchase { id, customer_id: 7, key: None, input, trace, created_at, deadline_at, next_wake_at }
    }

    fn finish(id: u64) -> Finish {
        let path = format!("path {id}").into_bytes();
        Finish { id, customer_id: 7, state: State::Succeeded, finished_at: 2_000, reason: None, path }
    }

    async fn accept(db: &Db, ids: std::ops::RangeInclusive<u64>) {
        let rows: Vec<NewPurchase> = ids.map(new).collect();
        db.write(move |tx| store::insert(tx, rows.iter())).await.expect("purchases");
    }

    async fn read(db: &Db, after: u64, up_to: u64, limit: u32) -> Vec<EndedRow> {
        db.read(move |tx| store::ended_between(tx, after, up_to, limit)).await.expect("ends")
    }

    async fn what_follows_asks_the_database(at: &TestDb) {
        let db = at.open(MIGRATIONS);
        accept(&db, 1..=6).await;
        assert_eq!(db.read(store::oldest_open).await, Ok(Some(1_001)));
        let end = |ids: [u64; 2]| {
            let ends = ids.map(finish);
            db.write(move |tx| {
                assert_eq!(store::close(tx, &ids)?, 2);
                store::finish(tx, &ends.each_ref(), 1)
            })
        };
        assert_eq!(end([4, 1]).await, Ok(1));
        assert_eq!(end([2, 6]).await, Ok(3));
        let rows = read(&db, 1, 3, 9).await;
        let told: Vec<_> = rows.iter().map(|row| (row.finished_no, row.id, row.created_at)).collect();
        assert_eq!(told, [(2, 1, 1_001), (3, 2, 1_002)]);
        assert_eq!((rows[0].customer_id, rows[0].path.as_slice()), (7, &b"path 1"[..]));
        assert_eq!(read(&db, 0, 9, 3).await.len(), 3);

        db.write(|tx| store::give_up(tx, [(3, None)].into_iter(), "tried")).await.expect("given up");
        let open = db.read(|tx| store::open_among(tx, &[1, 3, 5, 99])).await.expect("what is open");
        assert_eq!(open, [5], "neither what has ended, nor what was left to an operator");
        assert_eq!(db.read(store::oldest_open).await, Ok(Some(1_005)));

        // A try is taken back, unless another one has followed, or it is an operator's.
        accept(&db, 7..=8).await;
        db.write(|tx| store::postpone(tx, [(5, 6_000, 1), (7, 6_000, 1), (8, 6_000, 2)].into_iter()))
            .await
            .expect("later");
        let back = |id| PutBack { id, tries: 1, before: 0, next_wake_at: 1_500 };
        db.write(move |tx| store::put_back(tx, [3, 5, 8, 99].into_iter().map(back))).await.expect("back");
        let due = db.read(|tx| store::due(tx, Take::Look, 9_000, 10_000, 0, 9)).await.expect("what is due");
        let tries: Vec<_> = due.iter().map(|due| (due.id, due.tries, due.next_wake_at)).collect();
        assert_eq!(tries, [(5, 0, 1_500), (7, 1, 6_000), (8, 2, 6_000)]);
    }

    /// What `results` and this module rest on: a number is there with all before it, whoever wrote them, and a transaction that was
    /// rolled back has taken none.
    async fn whoever_follows_never_sees_a_hole_while_replicas_end_purchases_and_roll_back(at: &TestDb) {
        const WRITERS: u64 = 3;
        const BATCHES: u64 = 25;
        const BATCH: u64 = 7;
        const PURCHASES: u64 = WRITERS * BATCHES * BATCH;
        let db = at.open(MIGRATIONS);
        accept(&db, 1..=PURCHASES).await;
        let writing = Arc::new(AtomicUsize::new(WRITERS as usize));
        let mut writers = Vec::new();
        for writer in 0..WRITERS {
            let (db, writing) = (at.open(MIGRATIONS), Arc::clone(&writing));
            writers.push(tokio::spawn(async move {
                for batch in 0..BATCHES {
                    let first = 1 + (writer * BATCHES + batch) * BATCH;
                    let ids: Vec<u64> = (first..first + BATCH).collect();
                    let end = |keep: bool| {
                        let ids = ids.clone();
                        db.write(move |tx| {
                            assert_eq!(store::close(tx, &ids)?, ids.len());
                            let ends: Vec<Finish> = ids.iter().map(|id| finish(*id)).collect();
                            let ends: Vec<&Finish> = ends.iter().collect();
                            store::finish(tx, &ends, 16)?;
                            if keep { Ok(()) } else { Err(Error::Panicked) }
                        })
                    };
                    assert_eq!(end(false).await, Err(Error::Panicked), "numbers are taken and given back");
                    end(true).await.expect("ends");
                }
                writing.fetch_sub(1, Ordering::SeqCst);
            }));
        }
        let reader = at.open(MIGRATIONS);
        let (mut numbers, mut ids) = (0, HashSet::new());
        loop {
            let done = writing.load(Ordering::SeqCst) == 0;
            let last = reader.read(store::last_finished_no).await.expect("a number");
            while numbers < last {
                let rows = read(&reader, numbers, last, 10).await;
                assert!(!rows.is_empty(), "{last} was given out, and nothing is behind {numbers}");
                for row in rows {
                    assert_eq!(row.finished_no, numbers + 1);
                    numbers += 1;
                    assert!(ids.insert(row.id), "purchase {} has ended twice", row.id);
                }
            }
            if done {
                break;
            }
        }
        for writer in writers {
            writer.await.expect("a replica");
        }
        assert_eq!((numbers, ids.len() as u64), (PURCHASES, PURCHASES));
    }
}

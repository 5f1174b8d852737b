//! Ids are unique whatever happens to clocks, processes and leases; on SQLite and on MariaDB.
#![allow(clippy::unwrap_used, reason = "also in the functions that tests share")]

use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use db::ids::{self, Ids, IdsError, MAX_TAKE_IDS};
use db::{Db, Error, Migration};
use testdb::TestDb;
use wire::ids::{EPOCH_UNIX_SECONDS, LAST_SECOND, Parts};
use wire::time::Clock;

const MIGRATIONS: &[Migration] = &[ids::migration(1)];

testdb::on_both! {
    #[tokio::test]
    a_restart_with_a_clock_set_back_begins_above_all_that_was_reserved,
    living_leases_have_different_workers_and_a_released_one_is_used_again,
    more_processes_than_workers_still_never_repeat_an_id,
    who_lost_its_lease_gives_out_nothing_more_under_that_number,
    a_failing_database_refuses_only_what_is_not_reserved,
    a_clock_at_the_end_of_time_is_an_error;
    #[tokio::test(flavor = "multi_thread", worker_threads = 4)]
    ids_never_repeat_across_tasks_restarts_and_clocks_set_back,
    a_lasting_load_borrows_and_stays_within_what_is_reserved,
    sixteen_processes_with_clocks_of_their_own_never_repeat_an_id;
    #[tokio::test(start_paused = true)]
    an_idle_lease_is_renewed;
}

/// A clock that the test turns, in seconds since the ids' epoch.
#[derive(Clone)]
struct Turned(Arc<AtomicU64>);

impl Turned {
    fn at(second: u64) -> Turned {
        Turned(Arc::new(AtomicU64::new(second)))
    }

    fn turn_to(&self, second: u64) {
        self.0.store(second, Ordering::SeqCst);
    }

    fn clock(&self) -> Clock {
        let second = self.0.clone();
        Clock::from_fn(move || (EPOCH_UNIX_SECONDS + second.load(Ordering::SeqCst)) * 1000)
    }
}

fn open(at: &TestDb) -> Db {
    at.open(MIGRATIONS)
}

async fn reserved(db: &Db, worker: u8) -> u32 {
    let sql = "SELECT reserved_until_second FROM id_lease WHERE worker = ?";
    let row = db.read(move |tx| tx.query_opt(sql, &[worker.into()], |row| row.get(0))).await;
    row.map_err(|error: Error| error).unwrap().unwrap()
}

async fn take_one(ids: &Ids) -> Parts {
    Parts::of(ids.take(1).await.unwrap().next().unwrap()).unwrap()
}

async fn ids_never_repeat_across_tasks_restarts_and_clocks_set_back(at: &TestDb) {
    let time = Turned::at(1000);
    let mut seen = HashSet::new();
    for now in [1000, 1000, 400, 5000, 4990, 0, 4000] {
        time.turn_to(now);
        let db = open(at);
        let ids = Ids::lease(db.clone(), time.clock()).await.unwrap();
        let tasks: Vec<_> = (0..4)
            .map(|_| {
                let ids = ids.clone();
                tokio::spawn(async move {
                    let mut taken = Vec::new();
                    for count in 0..200 {
                        taken.extend(ids.take(count).await.unwrap());
                    }
                    assert!(taken.is_sorted());
                    taken
                })
            })
            .collect();
        for task in tasks {
            for id in task.await.unwrap() {
                assert!(id < 1 << 53 && seen.insert(id), "{id} came twice");
            }
        }
        // Killed: nothing is released.
        drop(ids);
        db.close().await;
    }
}

async fn a_lasting_load_borrows_and_stays_within_what_is_reserved(at: &TestDb) {
    let db = open(at);
    let ids = Ids::lease(db.clone(), Turned::at(1000).clock()).await.unwrap();
    let mut last = 0;
    // 4,000,000 ids in one second of the clock: 122 seconds are borrowed, two windows.
    for _ in 0..40 {
        let block = ids.take(100_000).await.unwrap();
        let until = reserved(&db, 0).await;
        for id in block {
            assert!(id > last);
            last = id;
        }
        assert!(Parts::of(last).unwrap().second <= until);
    }
    assert!(Parts::of(last).unwrap().second >= 1122);
    assert_eq!(ids.take(MAX_TAKE_IDS).await.unwrap().len(), MAX_TAKE_IDS as usize);
    let too_many = ids.take(MAX_TAKE_IDS + 1).await;
    assert_eq!(too_many, Err(IdsError::TooMany { asked: MAX_TAKE_IDS + 1 }));
}

async fn a_restart_with_a_clock_set_back_begins_above_all_that_was_reserved(at: &TestDb) {
    let time = Turned::at(5000);
    let db = open(at);
    let ids = Ids::lease(db.clone(), time.clock()).await.unwrap();
    assert_eq!(take_one(&ids).await, Parts { second: 5000, worker: 0, sequence: 0 });
    time.turn_to(100);
    assert_eq!(take_one(&ids).await, Parts { second: 5000, worker: 0, sequence: 1 });
    drop(ids);
    let sql = "UPDATE id_lease SET expires_at_millis = 0";
    db.write(move |tx| tx.execute(sql, &[])).await.map_err(|error: Error| error).unwrap();
    let again = Ids::lease(db.clone(), time.clock()).await.unwrap();
    assert_eq!(take_one(&again).await, Parts { second: 5061, worker: 0, sequence: 0 });
}

async fn living_leases_have_different_workers_and_a_released_one_is_used_again(at: &TestDb) {
    let db = open(at);
    let clock = Turned::at(1000).clock();
    let first = Ids::lease(db.clone(), clock.clone()).await.unwrap();
    let second = Ids::lease(db.clone(), clock.clone()).await.unwrap();
    assert_eq!((first.worker(), second.worker()), (Some(0), Some(1)));
    let last = take_one(&first).await;
    first.release().await.unwrap();
    assert_eq!(first.take(1).await, Err(IdsError::Released));
    let third = Ids::lease(db.clone(), clock).await.unwrap();
    let next = take_one(&third).await;
    assert_eq!(next, Parts { second: last.second + 1, worker: 0, sequence: 0 });
}

async fn more_processes_than_workers_still_never_repeat_an_id(at: &TestDb) {
    let db = open(at);
    let time = Turned::at(1000);
    let mut seen = HashSet::new();
    let mut crowd = Vec::new();
    for _ in 0..140 {
        let ids = Ids::lease(db.clone(), time.clock()).await.unwrap();
        seen.extend(ids.take(3).await.unwrap());
        crowd.push(ids);
    }
    for ids in &crowd {
        seen.extend(ids.take(3).await.unwrap());
    }
    assert_eq!(seen.len(), 2 * 3 * 140);
}

async fn who_lost_its_lease_gives_out_nothing_more_under_that_number(at: &TestDb) {
    let db = open(at);
    let time = Turned::at(1000);
    let paused = Ids::lease(db.clone(), time.clock()).await.unwrap();
    take_one(&paused).await;
    // The process is paused for two minutes; another takes the number over.
    time.turn_to(1120);
    let thief = Ids::lease(db.clone(), time.clock()).await.unwrap();
    assert_eq!(thief.worker(), Some(0));
    let taken = take_one(&thief).await;
    // What it wants now needs a renewal, which finds the fence.
    let after = take_one(&paused).await;
    assert_eq!((after.worker, paused.worker()), (1, Some(1)));
    let reserved_by_thief = reserved(&db, 0).await;
    assert_eq!(reserved_by_thief, taken.second + 60, "its reservation was not touched");
}

async fn a_failing_database_refuses_only_what_is_not_reserved(at: &TestDb) {
    let db = open(at);
    let time = Turned::at(1000);
    let ids = Ids::lease(db.clone(), time.clock()).await.unwrap();
    db.close().await;
    assert_eq!(take_one(&ids).await.second, 1000);
    time.turn_to(1060);
    assert_eq!(take_one(&ids).await.second, 1060);
    time.turn_to(1061);
    let refused = ids.take(1).await.unwrap_err();
    assert!(refused.is_transient(), "{refused}");
}

async fn a_clock_at_the_end_of_time_is_an_error(at: &TestDb) {
    let db = open(at);
    let time = Turned::at(u64::from(LAST_SECOND));
    let ids = Ids::lease(db.clone(), time.clock()).await.unwrap();
    assert_eq!(ids.take(32_768).await.unwrap().len(), 32_768);
    assert_eq!(ids.take(1).await, Err(IdsError::Worn { worker: 0 }));
}

async fn an_idle_lease_is_renewed(at: &TestDb) {
    let db = open(at);
    let time = Turned::at(1000);
    let ids = Ids::lease(db.clone(), time.clock()).await.unwrap();
    assert_eq!(reserved(&db, 0).await, 1060);
    time.turn_to(1030);
    // Lets the renewal task begin its wait, which the paused clock then ends.
    tokio::task::yield_now().await;
    tokio::time::advance(Duration::from_secs(20)).await;
    let asked_at = Instant::now();
    while reserved(&db, 0).await < 1090 {
        assert!(asked_at.elapsed() < Duration::from_secs(20), "not renewed");
    }
    assert_eq!(ids.worker(), Some(0));
}

/// Sixteen handles lease at the same instant, and again each time they are killed; their clocks are an hour apart, and are set
/// back and forth.
async fn sixteen_processes_with_clocks_of_their_own_never_repeat_an_id(at: &TestDb) {
    const PROCESSES: u64 = 16;
    const LIVES: u64 = 4;
    drop(open(at));
    let mut tasks = Vec::new();
    let start = Arc::new(tokio::sync::Barrier::new(PROCESSES as usize));
    for process in 0..PROCESSES {
        let db = open(at);
        let start = start.clone();
        tasks.push(tokio::spawn(async move {
            let mut taken = Vec::new();
            let time = Turned::at(10_000 + process * 3_600);
            for life in 0..LIVES {
                start.wait().await;
                let ids = Ids::lease(db.clone(), time.clock()).await.unwrap();
                for count in 0..20 {
                    taken.extend(ids.take(count).await.unwrap());
                }
                time.turn_to(10_000 + (process * 7 + life * 5) % PROCESSES * 3_600);
                // More than what is reserved: it must be extended.
                taken.extend(ids.take(100_000).await.unwrap().step_by(997));
                taken.extend(ids.take(1).await.unwrap());
            }
            taken
        }));
    }
    let mut seen = HashSet::new();
    for task in tasks {
        for id in task.await.unwrap() {
            assert!(id < 1 << 53 && seen.insert(id), "{id} came twice");
        }
    }
}

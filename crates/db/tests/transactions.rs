//! What callers can rely on, on SQLite and on MariaDB: isolation within a group, visibility, bounds, errors that name
//! their cause.
#![allow(clippy::unwrap_used, reason = "also in the functions that tests share")]

mod support;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc;

use db::{Db, Error, Outage, Set, Tx, Value};
use support::{Hold, ITEMS, ids, insert, queued};
use testdb::{Bounds, TestDb};

testdb::on_both! {
    #[tokio::test]
    a_failed_and_a_panicking_closure_do_not_spoil_their_group,
    a_single_closure_that_fails_or_panics_leaves_nothing,
    a_panicking_read_leaves_the_reader_alive,
    a_closure_runs_to_its_end_when_its_caller_is_gone,
    a_read_is_one_snapshot_and_cannot_write,
    an_error_names_its_cause,
    a_full_queue_refuses_at_once_and_what_it_refused_has_no_effect,
    a_set_is_a_table_of_one_parameter,
    a_set_of_any_size_is_inserted_whole_or_not_at_all,
    a_closure_cannot_end_its_own_transaction,
    closing_finishes_what_is_queued,
    dropping_the_last_handle_midway_loses_nothing_that_was_queued;
    #[tokio::test(flavor = "multi_thread", worker_threads = 4)]
    a_read_sees_every_write_that_was_answered_before;
}

/// So that whatever comes while it is held queues up.
const ONE_WRITER: Bounds = Bounds { writers: 1, readers: 2, write_queue_jobs: 8192, read_queue_jobs: 8192 };

fn insert_now(tx: &mut Tx<'_>, id: u64) -> Result<(), Error> {
    tx.execute("INSERT INTO item (id) VALUES (?)", &[id.into()]).map(drop)
}

/// A service's own error, as closures return it.
#[derive(Debug, PartialEq)]
enum Refusal {
    No,
    Db(Error),
}

impl From<Error> for Refusal {
    fn from(error: Error) -> Refusal {
        Refusal::Db(error)
    }
}

async fn a_failed_and_a_panicking_closure_do_not_spoil_their_group(at: &TestDb) {
    let db = at.open_bounded(ITEMS, ONE_WRITER);
    let hold = Hold::writer(&db).await;
    let mut callers = Vec::new();
    for id in 1..=6 {
        let caller = db.clone();
        callers.push(tokio::spawn(async move {
            caller
                .write(move |tx| {
                    insert_now(tx, id)?;
                    match id {
                        2 => Err(Refusal::No),
                        4 => panic!("as the test wants it"),
                        5 => Ok(insert_now(tx, 1)?),
                        _ => Ok(()),
                    }
                })
                .await
        }));
        queued(&db, id as usize).await;
    }
    let groups = db.stats().groups;
    hold.release().await;
    let mut answers = Vec::new();
    for caller in callers {
        answers.push(caller.await.unwrap());
    }
    let unique = Error::Unique { columns: "item.id".into() };
    assert_eq!(
        answers,
        [
            Ok(()),
            Err(Refusal::No),
            Ok(()),
            Err(Refusal::Db(Error::Panicked)),
            Err(Refusal::Db(unique)),
            Ok(())
        ]
    );
    assert_eq!(ids(&db).await, [1, 3, 6]);
    // The one that held the writer wrote nothing. MySQL commits each by itself.
    let commits = if at.is_sqlite() { 2 } else { 3 };
    assert_eq!(db.stats().groups, groups + commits);
}

async fn a_single_closure_that_fails_or_panics_leaves_nothing(at: &TestDb) {
    let db = at.open_bounded(ITEMS, ONE_WRITER);
    let refused = db
        .write(|tx| {
            insert_now(tx, 1)?;
            Err::<(), _>(Refusal::No)
        })
        .await;
    assert_eq!(refused, Err(Refusal::No));
    let panicked: Result<(), Error> = db
        .write(|tx| {
            insert_now(tx, 2)?;
            panic!("as the test wants it")
        })
        .await;
    assert_eq!(panicked, Err(Error::Panicked));
    insert(&db, 3).await.unwrap();
    assert_eq!(ids(&db).await, [3]);
}

async fn a_panicking_read_leaves_the_reader_alive(at: &TestDb) {
    let db = at.open_bounded(ITEMS, Bounds { readers: 1, ..ONE_WRITER });
    for _ in 0..3 {
        let read: Result<(), Error> = db.read(|_| panic!("as the test wants it")).await;
        assert_eq!(read, Err(Error::Panicked));
    }
    assert!(ids(&db).await.is_empty());
}

async fn a_closure_runs_to_its_end_when_its_caller_is_gone(at: &TestDb) {
    let db = at.open_bounded(ITEMS, ONE_WRITER);
    let hold = Hold::writer(&db).await;
    let caller = db.clone();
    let caller = tokio::spawn(async move { insert(&caller, 7).await });
    queued(&db, 1).await;
    caller.abort();
    assert!(caller.await.unwrap_err().is_cancelled());
    hold.release().await;
    insert(&db, 8).await.unwrap();
    assert_eq!(ids(&db).await, [7, 8]);
}

async fn a_read_sees_every_write_that_was_answered_before(at: &TestDb) {
    let db = at.open_bounded(ITEMS, ONE_WRITER);
    let last = Arc::new(AtomicU64::new(0));
    let writer = {
        let (db, last) = (db.clone(), last.clone());
        tokio::spawn(async move {
            for id in 1..=300 {
                insert(&db, id).await.unwrap();
                last.store(id, Ordering::SeqCst);
            }
        })
    };
    while last.load(Ordering::SeqCst) < 300 {
        let answered = last.load(Ordering::SeqCst);
        let seen = ids(&db).await.len() as u64;
        assert!(seen >= answered, "{answered} were answered, {seen} are seen");
        tokio::task::yield_now().await;
    }
    writer.await.unwrap();
}

async fn a_read_is_one_snapshot_and_cannot_write(at: &TestDb) {
    let db = at.open_bounded(ITEMS, ONE_WRITER);
    let (go, wait) = mpsc::channel::<()>();
    let (started, has_started) = tokio::sync::oneshot::channel();
    let reader = db.clone();
    let counts = tokio::spawn(async move {
        reader
            .read(move |tx| {
                let mut count = || tx.query("SELECT count(*) FROM item", &[], |row| row.get::<u64>(0));
                let before = count()?;
                started.send(()).unwrap();
                wait.recv().unwrap();
                Ok::<_, Error>((before, count()?))
            })
            .await
    });
    has_started.await.unwrap();
    insert(&db, 1).await.unwrap();
    assert_eq!(ids(&db).await, [1], "another reader is not held up");
    go.send(()).unwrap();
    assert_eq!(counts.await.unwrap().unwrap(), (vec![0], vec![0]));

    let written = db.read(|tx| insert_now(tx, 9)).await;
    let refusal = if at.is_sqlite() { "readonly" } else { "READ ONLY" };
    assert!(matches!(&written, Err(Error::Sql { message, .. }) if message.contains(refusal)), "{written:?}");
    assert_eq!(ids(&db).await, [1]);
}

async fn an_error_names_its_cause(at: &TestDb) {
    let db = at.open_bounded(ITEMS, ONE_WRITER);
    let result = db
        .write(|tx| {
            tx.execute("INSERT INTO item (id, name) VALUES (1, 'a')", &[])?;
            tx.execute("INSERT INTO item (id, name) VALUES (2, ?)", &["a".into()]).map(drop)
        })
        .await;
    assert!(result.as_ref().is_err_and(|error| error.violates("item.name")), "{result:?}");

    let statement = "INSERT INTO item (id, stock) VALUES (1, -1)";
    let check: Result<u64, Error> = db.write(|tx| tx.execute(statement, &[])).await;
    assert!(
        matches!(&check, Err(Error::Sql { statement: told, message, .. })
            if *told == statement && message.contains("stock")),
        "{check:?}"
    );
    let foreign: Result<u64, Error> =
        db.write(|tx| tx.execute("INSERT INTO part (item) VALUES (5)", &[])).await;
    assert!(
        matches!(&foreign, Err(Error::Sql { message, .. }) if message.to_uppercase().contains("FOREIGN KEY"))
    );
    let count: Result<u64, Error> = db.write(|tx| tx.execute("DELETE FROM item WHERE id = ?", &[])).await;
    assert!(matches!(count, Err(Error::Sql { .. })), "a missing parameter is not NULL: {count:?}");

    let wrong = |sql: &'static str| {
        let db = db.clone();
        async move { db.read(move |tx| tx.query_opt(sql, &[], |row| row.get::<u32>(0))).await.unwrap_err() }
    };
    let column = |found: &str| Error::Column { column: "x".into(), expected: "a u32", found: found.into() };
    assert_eq!(wrong("SELECT -3 AS x").await, column("-3"));
    assert_eq!(wrong("SELECT 'secret' AS x").await, column("a text of 6 bytes"));
    assert_eq!(wrong("SELECT NULL AS x").await, column("NULL"));
    assert_eq!(wrong("SELECT 1.5 AS x").await, column("the real 1.5"));
}

async fn a_full_queue_refuses_at_once_and_what_it_refused_has_no_effect(at: &TestDb) {
    let bounds = Bounds { writers: 1, readers: 1, write_queue_jobs: 2, read_queue_jobs: 1 };
    let db = at.open_bounded(ITEMS, bounds);
    let hold = Hold::writer(&db).await;
    let mut queued_callers = Vec::new();
    for id in 1..=2 {
        let caller = db.clone();
        queued_callers.push(tokio::spawn(async move { insert(&caller, id).await }));
        queued(&db, id as usize).await;
    }
    let refused = insert(&db, 3).await.unwrap_err();
    assert_eq!(refused, Error::Overloaded { database: "test", queue: "write", bound_jobs: 2 });
    assert!(refused.is_transient());

    let (go, wait) = mpsc::channel::<()>();
    let (started, has_started) = tokio::sync::oneshot::channel();
    let reader = db.clone();
    let busy = tokio::spawn(async move {
        reader
            .read(move |_| {
                started.send(()).unwrap();
                wait.recv().unwrap();
                Ok::<_, Error>(())
            })
            .await
    });
    has_started.await.unwrap();
    let next = db.clone();
    let next = tokio::spawn(async move { ids(&next).await });
    while db.stats().queued_reads < 1 {
        tokio::task::yield_now().await;
    }
    let ran = Arc::new(AtomicBool::new(false));
    let mark = ran.clone();
    let refused = db
        .read(move |_| {
            mark.store(true, Ordering::SeqCst);
            Ok::<_, Error>(())
        })
        .await;
    assert!(matches!(refused, Err(Error::Overloaded { queue: "read", bound_jobs: 1, .. })));

    go.send(()).unwrap();
    hold.release().await;
    busy.await.unwrap().unwrap();
    next.await.unwrap();
    for caller in queued_callers {
        caller.await.unwrap().unwrap();
    }
    assert_eq!(ids(&db).await, [1, 2]);
    assert!(!ran.load(Ordering::SeqCst));
}

async fn a_set_is_a_table_of_one_parameter(at: &TestDb) {
    let db = at.open_bounded(ITEMS, ONE_WRITER);
    let texts = ["", "quote \" backslash \\ newline \n", "ümlaut \u{1F980} \u{1}"];
    let mut rows = Set::new();
    for (id, text) in (1_u64..).zip(texts) {
        let blob: Vec<u8> = (0..=255).collect();
        rows.push(&[id.into(), text.into(), Value::Blob(&blob[..id as usize * 85])]);
    }
    rows.push(&[4_u64.into(), Value::Null, Value::Null]);
    db.write(move |tx| {
        tx.execute(
            "{insert into item (id, name, data, stock) from set(id INT, name TEXT, data BLOB) AS s
              values (s.id, s.name, s.data, 10)}",
            &[Value::from(&rows)],
        )
    })
    .await
    .map(|changed| assert_eq!(changed, 4))
    .map_err(|error: Error| error)
    .unwrap();

    let stored: Vec<(Option<String>, Option<Vec<u8>>)> = db
        .read(|tx| {
            tx.query("SELECT name, data FROM item ORDER BY id", &[], |row| Ok((row.get(0)?, row.get(1)?)))
        })
        .await
        .map_err(|error: Error| error)
        .unwrap();
    for (text, (name, data)) in texts.iter().zip(&stored) {
        assert_eq!(name.as_deref(), Some(*text));
        assert!(data.as_ref().unwrap().iter().copied().eq(0..=data.as_ref().unwrap().len() as u8 - 1));
    }
    assert_eq!(stored[3], (None, None));

    let mut orders = Set::new();
    for (id, quantity) in [(1_u64, 3_u64), (2, 11), (3, 10), (99, 1)] {
        orders.push(&[id.into(), quantity.into()]);
    }
    let stock: Vec<u64> = db
        .write(move |tx| {
            let changed = tx.execute(
                "{update item AS i join set(id INT, quantity INT) AS s
                  on i.id = s.id AND i.stock >= s.quantity AND i.id < ?
                  set stock = i.stock - s.quantity}",
                &[Value::from(&orders), 50_u64.into()],
            )?;
            assert_eq!(changed, 2, "one has too little, one is not there");
            tx.query("SELECT stock FROM item ORDER BY id {for update}", &[], |row| row.get(0))
        })
        .await
        .map_err(|error: Error| error)
        .unwrap();
    assert_eq!(stock, [7, 10, 0, 10]);
    let none = db
        .write(|tx| {
            tx.execute(
                "{delete from item AS i join set(id INT) AS s on i.id = s.id}",
                &[Value::from(&Set::new())],
            )
        })
        .await;
    assert_eq!(none, Ok::<_, Error>(0));
}

/// Sizes on both sides of where SQLite takes several rows at once; a row that fails at each place of such a set.
async fn a_set_of_any_size_is_inserted_whole_or_not_at_all(at: &TestDb) {
    const INSERT: &str = "{insert into item (id, name, stock) from set(id INT, name TEXT, stock INT) AS s
                           values (s.id, s.name, s.stock)}";
    let db = at.open_bounded(ITEMS, ONE_WRITER);
    let set = |first: u64, size: u64, wrong: Option<u64>| {
        let mut set = Set::new();
        for id in first..first + size {
            let stock = if wrong == Some(id - first) { -1_i64 } else { 5 };
            set.push(&[id.into(), (&format!("item {id}")).into(), stock.into()]);
        }
        set
    };
    let mut expected = Vec::new();
    for size in 0..=20_u64 {
        let rows = set(100 * size, size, None);
        let inserted: Result<u64, Error> =
            db.write(move |tx| tx.execute(INSERT, &[Value::from(&rows)])).await;
        assert_eq!(inserted, Ok(size));
        expected.extend(100 * size..100 * size + size);
    }
    assert_eq!(ids(&db).await, expected);
    let names: Vec<String> = db
        .read(|tx| tx.query("SELECT name FROM item ORDER BY id", &[], |row| row.get(0)))
        .await
        .map_err(|error: Error| error)
        .unwrap();
    assert!(names.iter().zip(&expected).all(|(name, id)| *name == format!("item {id}")), "{names:?}");

    for place in 0..20 {
        let rows = set(5_000, 20, Some(place));
        let check: Result<u64, Error> = db.write(move |tx| tx.execute(INSERT, &[Value::from(&rows)])).await;
        assert!(
            matches!(&check, Err(Error::Sql { statement, message, .. }) if *statement == INSERT && message.contains("stock")),
            "{check:?}"
        );
        // Item 2,000 and those behind it are there.
        let rows = set(2_000 - place, 20, None);
        let twice: Result<u64, Error> = db.write(move |tx| tx.execute(INSERT, &[Value::from(&rows)])).await;
        assert!(twice.as_ref().is_err_and(|error| error.violates("item.id")), "{twice:?}");
        assert_eq!(ids(&db).await, expected, "a transaction that failed left something");
    }
}

async fn a_closure_cannot_end_its_own_transaction(at: &TestDb) {
    let db = at.open_bounded(ITEMS, ONE_WRITER);
    let tried = db
        .write(|tx| {
            insert_now(tx, 1)?;
            tx.execute("COMMIT", &[])
        })
        .await;
    assert_eq!(tried, Err(Error::Panicked));
    assert!(ids(&db).await.is_empty());
}

async fn closing_finishes_what_is_queued(at: &TestDb) {
    let db = at.open_bounded(ITEMS, ONE_WRITER);
    let hold = Hold::writer(&db).await;
    let caller = db.clone();
    let queued_before = tokio::spawn(async move { insert(&caller, 1).await });
    queued(&db, 1).await;
    let closer = db.clone();
    let closing = tokio::spawn(async move { closer.close().await });
    // Until the close has begun, writes are still taken: the bound of this loop is the close itself.
    let mut late = 100;
    while insert_is_taken(&db, late) {
        late += 1;
        tokio::task::yield_now().await;
    }
    hold.release().await;
    queued_before.await.unwrap().unwrap();
    closing.await.unwrap();
    assert_eq!(insert(&db, 2).await, Err(Error::Unavailable(Outage::Closed)));
    db.close().await;
    if let TestDb::Sqlite(folder) = at {
        assert!(!folder.path().join("test.db-wal").exists(), "the WAL was emptied");
    }
    assert!(ids(&at.open(ITEMS)).await.contains(&1));
}

/// Whether a write can still be queued; does not wait for it.
fn insert_is_taken(db: &Db, id: u64) -> bool {
    use std::future::Future;
    use std::task::{Context, Poll, Waker};
    let mut write = std::pin::pin!(insert(db, id));
    match write.as_mut().poll(&mut Context::from_waker(Waker::noop())) {
        Poll::Ready(Err(Error::Unavailable(Outage::Closed))) => false,
        Poll::Ready(other) => panic!("{other:?}"),
        Poll::Pending => true,
    }
}

async fn dropping_the_last_handle_midway_loses_nothing_that_was_queued(at: &TestDb) {
    for round in 0..20 {
        let db = at.open_bounded(ITEMS, ONE_WRITER);
        let hold = Hold::writer(&db).await;
        for id in 0..5 {
            assert!(insert_is_taken(&db, round * 5 + id));
        }
        hold.release().await;
        drop(db);
    }
    // The threads of the last round may still be at work; on SQLite, writing waits for their lock.
    let db = at.open(ITEMS);
    insert(&db, 1000).await.unwrap();
    while ids(&db).await.len() < 101 {
        tokio::task::yield_now().await;
    }
    if at.is_sqlite() {
        assert_eq!(support::integrity(&db).await, ["ok"]);
    }
}

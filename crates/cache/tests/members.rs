//! The membership filter beside a database in which others create rows: it never says "no" about a row that is there.

mod support;

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::Receiver;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use cache::Members;
use cache::mark::Mark;
use cache::members::hold_open;
use db::{Db, Error, Tx, Value};
use support::{Database, PATIENCE};
use wire::ids::{EPOCH_UNIX_SECONDS, Parts};
use wire::time::Clock;

fn page(tx: &mut Tx<'_>, above: u64, up_to: u64, limit: u32) -> Result<Vec<u64>, Error> {
    tx.query(
        "SELECT id FROM stock WHERE id > ? AND id <= ? ORDER BY id LIMIT ?",
        &[Value::from(above), Value::from(up_to), Value::from(limit)],
        |row| row.get(0),
    )
}

/// Seconds since the ids' epoch, of a clock in the test's hands.
#[derive(Clone)]
struct Hands(Arc<AtomicU64>);

impl Hands {
    fn at(second: u64) -> Hands {
        Hands(Arc::new(AtomicU64::new(second)))
    }

    fn clock(&self) -> Clock {
        let seconds = self.0.clone();
        Clock::from_fn(move || 1_000 * (EPOCH_UNIX_SECONDS + seconds.load(Ordering::SeqCst)))
    }
}

fn id(second: u32, sequence: u16) -> u64 {
    Parts { second, worker: 3, sequence }.compose()
}

async fn create(db: &Db, id: u64) -> Result<bool, Error> {
    db.write(move |tx| {
        if !hold_open(tx, id)? {
            return Ok(false);
        }
        support::insert(tx, id, 1)?;
        Ok(true)
    })
    .await
}

async fn database() -> Database {
    let database = Database::open().await;
    database.one.write(|tx| Mark::Closed.ensure(tx)).await.expect("the mark");
    database
}

async fn until_complete(members: &Members, up_to: u64) {
    let filling = async {
        while members.complete_up_to() < up_to {
            tokio::time::sleep(Duration::from_millis(20)).await
        }
    };
    tokio::time::timeout(PATIENCE, filling).await.expect("it is not filled");
}

#[tokio::test(flavor = "multi_thread")]
async fn it_knows_what_was_there_at_the_start_and_passes_what_is_newer() {
    let database = database().await;
    // More than a page.
    let db = database.one.clone();
    for first in (0..5_000).step_by(500) {
        let ids: Vec<u64> = (first..first + 500).map(|sequence| id(100, 2 * sequence)).collect();
        db.write(move |tx| ids.iter().try_for_each(|id| support::insert(tx, *id, 1)))
            .await
            .expect("inserted");
    }
    let hands = Hands::at(200);
    let members = Members::start(database.two.clone(), hands.clock(), page);
    // Whatever it knows so far.
    for sequence in 0..5_000 {
        assert!(members.may_have(id(100, 2 * sequence)));
    }
    until_complete(&members, id(190, 0)).await;
    let passed = (0..5_000).filter(|sequence| members.may_have(id(100, 2 * sequence + 1))).count();
    assert!(passed < 100, "{passed} of 5000 that are not there pass");
    assert!((0..5_000).all(|sequence| members.may_have(id(100, 2 * sequence))));
    assert!(!members.may_have(id(150, 0)) && !members.may_have(1));
    assert!(members.may_have(id(195, 0)), "newer than what is closed");

    assert!(create(&database.one, id(195, 7)).await.expect("created"));
    assert!(
        !create(&database.one, id(150, 0)).await.expect("refused"),
        "it was said that this one is not there"
    );
    hands.0.store(300, Ordering::SeqCst);
    until_complete(&members, id(250, 0)).await;
    assert!(members.may_have(id(195, 7)) && !members.may_have(id(195, 8)));
}

/// Closed once the first page has been read, until the test opens it.
static GATE: Mutex<Option<Receiver<()>>> = Mutex::new(None);

/// Reads the second page when it is let.
fn page_at_the_gate(tx: &mut Tx<'_>, above: u64, up_to: u64, limit: u32) -> Result<Vec<u64>, Error> {
    if above > 0
        && let Some(gate) = GATE.lock().expect("no panic").take()
    {
        gate.recv().expect("opened");
    }
    page(tx, above, up_to, limit)
}

#[tokio::test(flavor = "multi_thread")]
async fn while_it_is_built_it_denies_only_what_it_has_passed() {
    let database = database().await;
    let db = database.one.clone();
    for first in (0..4_000).step_by(500) {
        let ids: Vec<u64> = (first..first + 500).map(|sequence| id(100, 2 * sequence)).collect();
        db.write(move |tx| ids.iter().try_for_each(|id| support::insert(tx, *id, 1)))
            .await
            .expect("inserted");
    }
    let (open, gate) = std::sync::mpsc::channel();
    *GATE.lock().expect("no panic") = Some(gate);
    let members = Members::start(database.two.clone(), Hands::at(200).clock(), page_at_the_gate);
    until_complete(&members, 1).await;
    let complete = members.complete_up_to();
    assert!(complete < id(100, 7_000), "it has read one page");
    let passes = |id| members.may_have(id);
    assert!((0..4_000).all(|sequence| passes(id(100, 2 * sequence))), "a row that is there is denied");
    assert!((0..8_000).map(|sequence| id(100, sequence)).all(|id| id <= complete || passes(id)));
    let below = (0..8_000).map(|sequence| id(100, sequence)).filter(|id| *id < complete && id % 2 == 1);
    assert!(below.filter(|id| passes(*id)).count() < 50, "what it has passed is known");
    open.send(()).expect("it waits");
    until_complete(&members, id(190, 0)).await;
    assert!((0..4_000).all(|sequence| passes(id(100, 2 * sequence))));
    assert!(!passes(id(150, 0)));
}

/// Whoever holds an id before it is closed is waited for, however long it takes.
#[tokio::test(flavor = "multi_thread")]
async fn a_creation_that_takes_long_is_never_denied() {
    let database = database().await;
    let hands = Hands::at(100);
    let (go, wait) = std::sync::mpsc::channel::<()>();
    let (held, is_held) = tokio::sync::oneshot::channel();
    let (mut held, db) = (Some(held), database.one.clone());
    let creating = tokio::spawn(async move {
        db.write(move |tx| {
            assert!(hold_open(tx, id(100, 7))?, "nothing is closed yet");
            if let Some(held) = held.take() {
                held.send(()).expect("somebody waits");
                wait.recv().expect("told to go on");
            }
            support::insert(tx, id(100, 7), 1)
        })
        .await
    });
    is_held.await.expect("it is held");
    hands.0.store(1_000, Ordering::SeqCst);
    let members = Members::start(database.two.clone(), hands.clock(), page);
    // The ids cannot be closed while one of them is being used.
    let impatient = database.impatient().await;
    let closing =
        impatient.write(|tx| Mark::Closed.raise(tx, i64::try_from(id(900, 0)).expect("an id"))).await;
    assert!(matches!(closing, Err(Error::Unavailable(_))), "{closing:?}");
    assert!(members.may_have(id(100, 7)));
    go.send(()).expect("it waits");
    creating.await.expect("no panic").expect("created");
    until_complete(&members, id(900, 0)).await;
    assert!(members.may_have(id(100, 7)) && !members.may_have(id(100, 8)));
}

/// Creations through one connection, with ids that are used late and out of order, and a filter that is filled and asked all the time.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn whatever_was_created_is_never_denied() {
    let database = database().await;
    let hands = Hands::at(100);
    let stop = Arc::new(AtomicBool::new(false));
    let filters: Vec<Members> =
        (0..3).map(|_| Members::start(database.two.clone(), hands.clock(), page)).collect();
    let creators = (0..4_u16).map(|number| {
        let (db, hands, stop, filters) = (database.one.clone(), hands.clone(), stop.clone(), filters.clone());
        tokio::spawn(async move {
            let (mut created, mut refused) = (Vec::new(), 0);
            for sequence in 0_u16.. {
                if stop.load(Ordering::SeqCst) {
                    break;
                }
                let now = hands.0.load(Ordering::SeqCst);
                // Taken up to twenty seconds before it is used.
                let second = u32::try_from(now - u64::from(fastrand::u8(0..20))).expect("a second");
                let id = id(second, 4 * (sequence % 8_000) + number);
                match create(&db, id).await {
                    Ok(true) => created.push(id),
                    Ok(false) => refused += 1,
                    Err(error) => assert!(matches!(error, Error::Unique { .. }), "{error}"),
                }
                for id in created.iter().rev().take(50).chain(created.iter().take(50)) {
                    assert!(
                        filters.iter().all(|filter| filter.may_have(*id)),
                        "{id} was created and is denied"
                    );
                }
            }
            (created.len(), refused)
        })
    });
    let creators: Vec<_> = creators.collect();
    // Three fillings, each of later ids.
    for round in 1..=3 {
        hands.0.fetch_add(15, Ordering::SeqCst);
        let closed = 100 + 15 * round - 10;
        for filter in &filters {
            until_complete(filter, id(closed - 1, 0)).await;
        }
    }
    stop.store(true, Ordering::SeqCst);
    let (mut created, mut refused) = (0, 0);
    for creator in creators {
        let (some, others) = creator.await.expect("nothing was denied");
        created += some;
        refused += others;
    }
    assert!(created > 0 && refused > 0, "{created} were created, {refused} were too late");
}

//! What only a server can do to its clients: others in the way, connections that break, errors of its own; and how a database on
//! it is found, created or refused.
#![allow(clippy::unwrap_used, reason = "also in the functions that tests share")]

mod support;

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use db::mysql::Settings;
use db::{Db, Error, Migration, OpenError, Outage, Set, Tx, Value};
use proptest::prelude::*;
use servers::{Database, Proxy};
use support::{ITEMS, ids, insert};
use testdb::TestDb;

fn database() -> Database {
    servers::shared::mariadb().database().unwrap()
}

fn settings(url: &str) -> Settings {
    Settings::new(url, "test")
}

/// The database through a proxy.
fn through(proxy: &Proxy, database: &Database) -> Settings {
    let (address, host) = (database.url().rsplit_once('@').unwrap(), proxy.socket_addr());
    settings(&format!("{}@{host}/{}", address.0, database.name()))
}

fn proxy(database: &Database) -> Proxy {
    let host = database.url().rsplit_once('@').unwrap().1.split('/').next().unwrap();
    Proxy::start(host.parse().unwrap()).unwrap()
}

/// A MariaDB's own error, from a statement.
fn signal(tx: &mut Tx<'_>, code: &'static str) -> Result<u64, Error> {
    tx.execute(code, &[])
}

const DEADLOCK: &str =
    "SIGNAL SQLSTATE '40001' SET MYSQL_ERRNO = 1213, MESSAGE_TEXT = 'as the test wants it'";
const READ_ONLY: &str =
    "SIGNAL SQLSTATE 'HY000' SET MYSQL_ERRNO = 1290, MESSAGE_TEXT = 'as the test wants it'";
const FULL: &str = "SIGNAL SQLSTATE 'HY000' SET MYSQL_ERRNO = 1114, MESSAGE_TEXT = 'as the test wants it'";

/// A closure that inserts an item and then, in its first runs, fails with this error; whatever it is told, it goes on and says that
/// all is well.
async fn insert_but(db: &Db, id: u64, error: &'static str, failing_runs: u32) -> (Result<(), Error>, u32) {
    let runs = Arc::new(AtomicU32::new(0));
    let counted = runs.clone();
    let result = db
        .write(move |tx| {
            tx.execute("INSERT INTO item (id) VALUES (?)", &[id.into()])?;
            if counted.fetch_add(1, Ordering::SeqCst) < failing_runs {
                let failed = signal(tx, error);
                assert!(failed.is_err());
                let after = tx.execute("INSERT INTO item (id) VALUES (?)", &[(id + 1000).into()]);
                assert_eq!(after, failed, "the transaction is lost");
            }
            Ok(())
        })
        .await;
    (result, runs.load(Ordering::SeqCst))
}

#[tokio::test]
async fn who_was_in_a_conflict_is_run_again_a_bounded_number_of_times() {
    let at = TestDb::mariadb();
    let db = at.open(ITEMS);
    assert_eq!(insert_but(&db, 1, DEADLOCK, 3).await, (Ok(()), 4));
    assert_eq!(db.stats().reruns, 3);
    let (refused, runs) = insert_but(&db, 2, DEADLOCK, u32::MAX).await;
    assert_eq!((&refused, runs), (&Err(Error::Unavailable(Outage::Conflict { runs: 8, code: 1213 })), 8));
    assert!(refused.unwrap_err().is_transient());
    assert_eq!(ids(&db).await, [1]);
}

#[tokio::test]
async fn what_the_server_refuses_for_now_is_transient_and_leaves_nothing() {
    let at = TestDb::mariadb();
    let db = at.open(ITEMS);
    let (refused, runs) = insert_but(&db, 1, READ_ONLY, u32::MAX).await;
    assert_eq!(runs, 1);
    assert!(
        matches!(&refused, Err(Error::Unavailable(Outage::System { code: 1290, message })) if message.contains("as the test")),
        "{refused:?}"
    );
    assert_eq!(insert_but(&db, 2, FULL, u32::MAX).await, (Err(Error::Full), 1));
    assert_eq!(ids(&db).await, [0; 0]);
    insert(&db, 3).await.unwrap();
    assert_eq!(ids(&db).await, [3]);
}

#[tokio::test]
async fn a_duplicate_is_believed_when_it_comes_twice() {
    let at = TestDb::mariadb();
    let (db, other) = (at.open(ITEMS), at.open(ITEMS));
    insert(&db, 1).await.unwrap();
    assert_eq!(insert(&db, 1).await, Err(Error::Unique { columns: "item.id".into() }));
    assert_eq!(db.stats().reruns, 1);

    // It looks, another one inserts, it inserts: run again, it sees the row.
    let runtime = tokio::runtime::Handle::current();
    let seen = db
        .write(move |tx| {
            let found = tx.query_opt("SELECT id FROM item WHERE id = 2", &[], |row| row.get::<u64>(0))?;
            if found.is_none() {
                let other = other.clone();
                let inserted = runtime.spawn(async move { insert(&other, 2).await });
                while !inserted.is_finished() {
                    std::thread::yield_now();
                }
                tx.execute("INSERT INTO item (id) VALUES (2)", &[])?;
            }
            Ok::<_, Error>(found)
        })
        .await;
    assert_eq!(seen, Ok(Some(2)));
    assert_eq!(db.stats().reruns, 2);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_real_deadlock_ends_well_for_both() {
    let at = TestDb::mariadb();
    let db = at.open(ITEMS);
    for id in [1, 2] {
        insert(&db, id).await.unwrap();
    }
    let meet = Arc::new(std::sync::Barrier::new(2));
    let add = |first: u64, second: u64| {
        let (db, meet, mut met) = (at.open(ITEMS), meet.clone(), false);
        tokio::spawn(async move {
            let update = "UPDATE item SET stock = stock + 1 WHERE id = ?";
            let added = db
                .write(move |tx| {
                    tx.execute(update, &[first.into()])?;
                    if !met {
                        met = true;
                        meet.wait();
                    }
                    tx.execute(update, &[second.into()]).map(drop)
                })
                .await;
            (added, db.stats().reruns)
        })
    };
    let (one, other) = tokio::join!(add(1, 2), add(2, 1));
    let ((one, one_reruns), (other, other_reruns)) = (one.unwrap(), other.unwrap());
    assert_eq!((one, other, one_reruns + other_reruns), (Ok(()), Ok(()), 1));
    let stock = db.read(|tx| tx.query("SELECT stock FROM item", &[], |row| row.get::<i64>(0))).await;
    assert_eq!(stock, Ok::<_, Error>(vec![2, 2]));
}

#[tokio::test]
async fn a_connection_that_died_while_it_was_idle_is_not_noticed() {
    let database = database();
    let proxy = proxy(&database);
    let settings = Settings { writers: 1, readers: 1, ..through(&proxy, &database) };
    let db = Db::connect(settings, ITEMS).unwrap();
    for id in 1..=4 {
        insert(&db, id).await.unwrap();
        assert_eq!(ids(&db).await.len() as u64, id);
        proxy.drop_connections();
    }
    assert_eq!((db.stats().reruns, db.stats().lookups), (0, 0));
}

#[tokio::test]
async fn a_connection_lost_in_a_transaction_means_another_run_or_a_transient_error() {
    let database = database();
    let proxy = Arc::new(proxy(&database));
    let db = Db::connect(Settings { writers: 1, readers: 1, ..through(&proxy, &database) }, ITEMS).unwrap();
    let (breaker, mut runs) = (proxy.clone(), 0);
    let written = db.write(move |tx| {
        tx.execute("INSERT INTO item (id) VALUES (1)", &[])?;
        runs += 1;
        if runs == 1 {
            breaker.drop_connections();
        }
        tx.execute("INSERT INTO item (id) VALUES (2)", &[]).map(|_| runs)
    });
    assert_eq!(written.await, Ok::<_, Error>(2));
    assert_eq!(ids(&db).await, [1, 2]);

    let breaker = proxy.clone();
    let written = db
        .write(move |tx| {
            tx.execute("INSERT INTO item (id) VALUES (3)", &[])?;
            breaker.cut();
            tx.execute("INSERT INTO item (id) VALUES (4)", &[]).map(drop)
        })
        .await;
    let error: Error = written.unwrap_err();
    assert!(
        matches!(error, Error::Unavailable(Outage::Disconnected { .. })) && error.is_transient(),
        "{error:?}"
    );
    assert!(insert(&db, 5).await.unwrap_err().is_transient());
    assert!(
        db.read(|tx| tx.query("SELECT 1", &[], |_| Ok(())))
            .await
            .is_err_and(|error: Error| error.is_transient())
    );

    proxy.heal().unwrap();
    // For up to a second nobody tries to connect.
    while let Err(error) = insert(&db, 6).await {
        assert!(error.is_transient(), "{error:?}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    assert_eq!(ids(&db).await, [1, 2, 6]);
}

#[tokio::test]
async fn a_server_that_says_nothing_is_given_up() {
    let database = database();
    let proxy = proxy(&database);
    let settings = Settings { io_timeout: Duration::from_millis(300), ..through(&proxy, &database) };
    let db = Db::connect(settings, ITEMS).unwrap();
    insert(&db, 1).await.unwrap();
    proxy.stall().unwrap();
    let error = insert(&db, 2).await.unwrap_err();
    assert!(
        matches!(&error, Error::Unavailable(Outage::Disconnected { why, .. }) if why.contains("in time")),
        "{error:?}"
    );
    drop(db);
}

/// Any text that Rust has, and mostly what has a meaning to JSON, SQL or MySQL.
fn any_text() -> impl Strategy<Value = String> {
    let awkward = prop::sample::select(vec![
        "\0",
        "\u{1}",
        "\u{1f}",
        "\u{7f}",
        "\\",
        "\"",
        "'",
        "`",
        "\n",
        "\r\n",
        "\t",
        " ",
        "%",
        "_",
        "?",
        "$[*]",
        "null",
        "\\u0000",
        "\u{feff}",
        "\u{2028}",
        "\u{ffff}",
        "\u{10ffff}",
        "e\u{301}",
        "ß",
        "İ",
        "\u{1F469}\u{200D}\u{1F4BB}",
        "[",
        "]",
        "{",
        "}",
        ",",
    ]);
    let part = prop_oneof![3 => awkward.prop_map(str::to_owned), 1 => any::<String>(), 1 => "[a-zA-Z ]{0,5}"];
    prop::collection::vec(part, 0..6).prop_map(|parts| parts.concat())
}

type Item = (Option<String>, Option<Vec<u8>>, i64);

fn any_item() -> impl Strategy<Value = Item> {
    let blob = prop::collection::vec(any::<u8>(), 0..40);
    let number =
        prop_oneof![Just(i64::MAX), Just(i64::MIN), Just(-1), Just(0), Just((1 << 53) + 1), any::<i64>()];
    (prop::option::of(any_text()), prop::option::of(blob), number)
}

/// What a statement over a set stores is what was in the set, and what a set is compared with is found if and only if it is the same.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sets_of_awkward_values_come_through() {
    const TABLE: &[Migration] = &[Migration {
        number: 1,
        name: "any",
        sqlite: "",
        mysql: "CREATE TABLE anything (id BIGINT NOT NULL PRIMARY KEY, k VARBINARY(700), t MEDIUMTEXT, b MEDIUMBLOB, n BIGINT,
                                       KEY anything_k (k)) DEFAULT CHARSET = utf8mb4 COLLATE = utf8mb4_bin",
    }];
    let at = TestDb::mariadb();
    if let TestDb::MariaDb(database) = &at {
        // Somebody else has created it, long ago.
        let old = format!("ALTER DATABASE {} CHARACTER SET latin1", database.name());
        database.address().run(&old).unwrap();
    }
    let db = at.open(TABLE);
    let runtime = tokio::runtime::Handle::current();
    let config = ProptestConfig { cases: 150, failure_persistence: None, ..ProptestConfig::default() };
    tokio::task::block_in_place(|| {
        proptest!(config, |(items in prop::collection::vec(any_item(), 1..12))| {
            let stored = runtime.block_on(store_and_read(&db, items.clone()));
            let expected: Vec<(u64, Item)> = (0..).zip(items.clone()).collect();
            prop_assert_eq!(&stored.0, &expected);
            // Each is found with all that have the same text.
            for (id, (text, ..)) in &expected {
                let same = |(_, (other, ..)): &&(u64, Item)| text.is_some() && other == text;
                let found: Vec<u64> = expected.iter().filter(same).map(|(id, _)| *id).collect();
                prop_assert_eq!(stored.1.get(id).cloned().unwrap_or_default(), found, "of {}", id);
            }
        });
    });
}

async fn store_and_read(
    db: &Db,
    items: Vec<Item>,
) -> (Vec<(u64, Item)>, std::collections::HashMap<u64, Vec<u64>>) {
    let stored = db.write(move |tx| {
        tx.execute("DELETE FROM anything", &[])?;
        let mut set = Set::new();
        for (id, (text, blob, number)) in (0_u64..).zip(&items) {
            let text = Value::from(text.as_deref());
            set.push(&[id.into(), text, Value::from(blob.as_ref()), Value::Int(*number)]);
        }
        tx.execute(
            "{insert into anything (id, k, t, b, n) from set(id INT, t TEXT, b BLOB, n INT) AS s
              values (s.id, s.t, s.t, s.b, s.n)}",
            &[Value::from(&set)],
        )?;
        let rows = tx.query("SELECT id, k, t, b, n FROM anything ORDER BY id", &[], |row| {
            let (key, text): (Option<String>, Option<String>) = (row.get(1)?, row.get(2)?);
            assert_eq!(key, text);
            Ok((row.get(0)?, (text, row.get(3)?, row.get(4)?)))
        })?;
        let mut matches: std::collections::HashMap<u64, Vec<u64>> = std::collections::HashMap::new();
        let pairs = tx.query(
            "SELECT s.id, a.id {from set(id INT, t TEXT, b BLOB, n INT) AS s join anything AS a by anything_k on a.k = s.t}",
            &[Value::from(&set)],
            |row| Ok((row.get(0)?, row.get(1)?)),
        )?;
        for (asked, found) in pairs {
            matches.entry(asked).or_default().push(found);
        }
        matches.values_mut().for_each(|found| found.sort_unstable());
        Ok::<_, Error>((rows, matches))
    });
    stored.await.unwrap()
}

#[tokio::test]
async fn a_set_larger_than_a_packet_is_sent_in_parts() {
    let at = TestDb::mariadb();
    let db = at.open(ITEMS);
    const ROWS: u64 = 40;
    let blob = vec![0xab_u8; 700_000];
    let mut set = Set::new();
    for id in 1..=ROWS {
        set.push(&[id.into(), Value::Blob(&blob)]);
    }
    let written = db
        .write(move |tx| {
            tx.execute(
                "{insert into item (id, data, stock) from set(id INT, data BLOB) AS s values (s.id, s.data, 1)}",
                &[Value::from(&set)],
            )
        })
        .await;
    assert_eq!(written, Ok::<_, Error>(ROWS));
    let sizes = "SELECT length(data) FROM item";
    let sizes = db.read(move |tx| tx.query(sizes, &[], |row| row.get::<u64>(0))).await;
    assert_eq!(sizes, Ok::<_, Error>(vec![700_000; ROWS as usize]));
}

#[tokio::test]
async fn a_database_is_created_where_it_may_be_and_else_it_is_said_what_to_do() {
    let server = servers::shared::mariadb();
    let database = database();
    let (name, unique) = (database.name(), servers::unique_name());
    let host = database.url().rsplit_once('@').unwrap().1.split('/').next().unwrap().to_owned();
    let created = format!("{unique}_new");
    let connected = Db::connect(settings(&server.database_url(&created)), ITEMS).unwrap();
    assert!(connected.is_shared());
    insert(&connected, 1).await.unwrap();
    connected.close().await;
    server.run(&format!("DROP DATABASE {created}")).unwrap();

    // Somebody who may use one database, and create none.
    let user = format!("u_{}", &unique[unique.len() - 8..]);
    server
        .run(&format!(
            "CREATE USER {user}@'%' IDENTIFIED BY 'sesame-7'; GRANT SELECT, INSERT, UPDATE, DELETE ON {name}.* TO {user}@'%'"
        ))
        .unwrap();
    let as_user =
        |password: &str, database: &str| settings(&format!("mysql://{user}:{password}@{host}/{database}"));
    let refusals = [
        (as_user("sesame-8", name), "check the user and the password"),
        (as_user("sesame-7", &created), "create the database by hand, or grant"),
        // It may not create tables.
        (as_user("sesame-7", name), "create the database by hand, or grant"),
        (settings("mysql://u:sesame-7@127.0.0.1:1/x"), "check that the server runs"),
    ];
    for (settings, advice) in refusals {
        let refused = Db::connect(settings, ITEMS).err().unwrap();
        let told = refused.to_string();
        assert!(told.contains(advice) && !told.contains("sesame"), "{told}");
        assert!(!format!("{refused:?}").contains("sesame"), "{refused:?}");
        assert_eq!(refused.is_transient(), advice.contains("server runs"), "{told}");
    }
    // Where there is nothing to migrate, it need not create anything.
    Db::connect(settings(database.url()), ITEMS).unwrap().close().await;
    let modest = Db::connect(as_user("sesame-7", name), ITEMS).unwrap();
    insert(&modest, 2).await.unwrap();
    assert_eq!(ids(&modest).await, [2]);
    server.run(&format!("DROP USER {user}@'%'")).unwrap();
    let wrong = Db::connect(settings("mysql://u:sesame-7@h:port"), ITEMS).err();
    assert!(matches!(wrong, Some(OpenError::Url { .. })), "{wrong:?}");
}

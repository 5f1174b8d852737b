//! Migrations are applied once, whoever opens, and never over something that is not known.
#![allow(clippy::unwrap_used, reason = "also in the functions that tests share")]

use db::{Db, Error, Migration, OpenError};
use testdb::{Bounds, TestDb};

testdb::on_both! {
    #[tokio::test]
    each_is_applied_once,
    a_newer_database_is_refused,
    a_changed_text_and_a_number_out_of_turn_are_refused,
    a_failed_one_is_rolled_back_and_those_before_stay,
    many_threads_open_a_new_database_at_once,
    many_processes_open_a_new_database_at_once;
}

/// A migration whose text is the same for both.
const fn migration(number: u32, name: &'static str, text: &'static str) -> Migration {
    Migration { number, name, sqlite: text, mysql: text }
}

const ONE: Migration = migration(
    1,
    "one",
    "CREATE TABLE IF NOT EXISTS a (x INTEGER NOT NULL); INSERT INTO a VALUES (1);\n-- a comment; with a semicolon\nINSERT INTO a VALUES (2);",
);
const TWO: Migration = migration(2, "two", "UPDATE a SET x = x + 10");
const TWO_CHANGED: Migration = migration(2, "two", "UPDATE a SET x = x + 11");
const BROKEN: Migration = migration(3, "broken", "DELETE FROM a; INSERT INTO nowhere VALUES (1)");

async fn rows(db: &Db) -> Vec<i64> {
    let rows = db.read(|tx| tx.query("SELECT x FROM a ORDER BY x", &[], |row| row.get(0))).await;
    rows.map_err(|error: Error| error).unwrap()
}

fn open(at: &TestDb, migrations: &'static [Migration]) -> Result<Db, OpenError> {
    at.try_open(migrations, Bounds::default())
}

async fn each_is_applied_once(at: &TestDb) {
    assert_eq!(rows(&open(at, &[ONE]).unwrap()).await, [1, 2]);
    for _ in 0..2 {
        assert_eq!(rows(&open(at, &[ONE, TWO]).unwrap()).await, [11, 12]);
    }
}

async fn a_newer_database_is_refused(at: &TestDb) {
    open(at, &[ONE, TWO]).unwrap().close().await;
    let refused = open(at, &[ONE]).err();
    assert!(matches!(refused, Some(OpenError::Newer { found: 2, known: 1, .. })), "{refused:?}");
    assert!(open(at, &[]).is_err());
}

async fn a_changed_text_and_a_number_out_of_turn_are_refused(at: &TestDb) {
    open(at, &[ONE, TWO]).unwrap().close().await;
    let changed = open(at, &[ONE, TWO_CHANGED]).err();
    assert!(matches!(changed, Some(OpenError::Changed { number: 2, .. })), "{changed:?}");
    let skipped = open(at, &[TWO, BROKEN]).err();
    assert!(matches!(skipped, Some(OpenError::Changed { number: 2, .. })), "{skipped:?}");
    assert_eq!(rows(&open(at, &[ONE, TWO]).unwrap()).await, [11, 12]);
}

async fn a_failed_one_is_rolled_back_and_those_before_stay(at: &TestDb) {
    let failed = open(at, &[ONE, TWO, BROKEN]).err();
    assert!(matches!(failed, Some(OpenError::Migration { number: 3, .. })), "{failed:?}");
    assert_eq!(rows(&open(at, &[ONE, TWO]).unwrap()).await, [11, 12]);
}

async fn many_threads_open_a_new_database_at_once(at: &TestDb) {
    for _ in 0..if at.is_sqlite() { 100 } else { 20 } {
        let fresh = at.another();
        let start = std::sync::Barrier::new(6);
        std::thread::scope(|scope| {
            for _ in 0..6 {
                scope.spawn(|| {
                    start.wait();
                    open(&fresh, &[ONE, TWO]).unwrap();
                });
            }
        });
        assert_eq!(rows(&open(&fresh, &[ONE, TWO]).unwrap()).await, [11, 12]);
    }
}

const CHILD_FILE: &str = "DB_TEST_OPEN_FILE";
const CHILD_URL: &str = "DB_TEST_OPEN_URL";

/// Only does something as a child process of the next test.
#[test]
fn opened_by_a_child_process() {
    if let Some(path) = std::env::var_os(CHILD_FILE) {
        Db::open(db::Settings::new(path, "child"), &[ONE, TWO]).unwrap();
    }
    if let Ok(url) = std::env::var(CHILD_URL) {
        Db::connect(db::mysql::Settings::new(url, "child"), &[ONE, TWO]).unwrap();
    }
}

async fn many_processes_open_a_new_database_at_once(at: &TestDb) {
    for _ in 0..if at.is_sqlite() { 20 } else { 5 } {
        let fresh = at.another();
        let children: Vec<_> = (0..4)
            .map(|_| {
                let mut child = std::process::Command::new(std::env::current_exe().unwrap());
                child.args(["--exact", "opened_by_a_child_process"]).stdout(std::process::Stdio::piped());
                match &fresh {
                    TestDb::Sqlite(folder) => child.env(CHILD_FILE, folder.path().join("test.db")),
                    TestDb::MariaDb(database) => child.env(CHILD_URL, database.url()),
                };
                child.spawn().unwrap()
            })
            .collect();
        for child in children {
            let output = child.wait_with_output().unwrap();
            assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
        }
        assert_eq!(rows(&open(&fresh, &[ONE, TWO]).unwrap()).await, [11, 12]);
    }
}

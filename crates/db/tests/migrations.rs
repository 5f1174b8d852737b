//! Migrations are applied once, whoever opens, and never over something that is not known.
#![allow(clippy::unwrap_used, reason = "also in the functions that tests share")]

mod support;

use db::{Db, Error, Migration, OpenError};
use support::Folder;

const ONE: Migration = Migration {
    number: 1,
    name: "one",
    sql: "CREATE TABLE a (x INTEGER NOT NULL); INSERT INTO a VALUES (1);\n-- a comment; with a semicolon\nINSERT INTO a VALUES (2);",
};
const TWO: Migration = Migration { number: 2, name: "two", sql: "UPDATE a SET x = x + 10" };
const TWO_CHANGED: Migration = Migration { number: 2, name: "two", sql: "UPDATE a SET x = x + 11" };
const BROKEN: Migration =
    Migration { number: 3, name: "broken", sql: "DELETE FROM a; INSERT INTO nowhere VALUES (1)" };

async fn rows(db: &Db) -> Vec<i64> {
    let rows = db.read(|tx| tx.query("SELECT x FROM a ORDER BY x", &[], |row| row.get(0))).await;
    rows.map_err(|error: Error| error).unwrap()
}

fn open(folder: &Folder, migrations: &'static [Migration]) -> Result<Db, OpenError> {
    Db::open(folder.settings(), migrations)
}

#[tokio::test]
async fn each_is_applied_once() {
    let folder = Folder::new("migrate-once");
    assert_eq!(rows(&open(&folder, &[ONE]).unwrap()).await, [1, 2]);
    for _ in 0..2 {
        assert_eq!(rows(&open(&folder, &[ONE, TWO]).unwrap()).await, [11, 12]);
    }
}

#[tokio::test]
async fn a_newer_database_is_refused() {
    let folder = Folder::new("migrate-newer");
    open(&folder, &[ONE, TWO]).unwrap().close().await;
    let refused = open(&folder, &[ONE]).err();
    assert!(matches!(refused, Some(OpenError::Newer { found: 2, known: 1, .. })), "{refused:?}");
    assert!(open(&folder, &[]).is_err());
}

#[tokio::test]
async fn a_changed_text_and_a_number_out_of_turn_are_refused() {
    let folder = Folder::new("migrate-changed");
    open(&folder, &[ONE, TWO]).unwrap().close().await;
    let changed = open(&folder, &[ONE, TWO_CHANGED]).err();
    assert!(matches!(changed, Some(OpenError::Changed { number: 2, .. })), "{changed:?}");
    let skipped = open(&folder, &[TWO, BROKEN]).err();
    assert!(matches!(skipped, Some(OpenError::Changed { number: 2, .. })), "{skipped:?}");
    assert_eq!(rows(&open(&folder, &[ONE, TWO]).unwrap()).await, [11, 12]);
}

#[tokio::test]
async fn a_failed_one_is_rolled_back_and_those_before_stay() {
    let folder = Folder::new("migrate-broken");
    let failed = open(&folder, &[ONE, TWO, BROKEN]).err();
    assert!(matches!(failed, Some(OpenError::Migration { number: 3, .. })), "{failed:?}");
    assert_eq!(rows(&open(&folder, &[ONE, TWO]).unwrap()).await, [11, 12]);
}

#[test]
fn many_threads_open_a_new_database_at_once() {
    for round in 0..100 {
        let folder = Folder::new(&format!("migrate-threads-{round}"));
        let start = std::sync::Barrier::new(6);
        std::thread::scope(|scope| {
            for _ in 0..6 {
                scope.spawn(|| {
                    start.wait();
                    open(&folder, &[ONE, TWO]).unwrap();
                });
            }
        });
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        assert_eq!(runtime.block_on(rows(&open(&folder, &[ONE, TWO]).unwrap())), [11, 12]);
    }
}

const CHILD_FOLDER: &str = "DB_TEST_OPEN_IN";

/// Only does something as a child process of the next test.
#[test]
fn opened_by_a_child_process() {
    if let Some(folder) = std::env::var_os(CHILD_FOLDER) {
        let path = std::path::PathBuf::from(folder).join("test.db");
        Db::open(db::Settings::new(path, "child"), &[ONE, TWO]).unwrap();
    }
}

#[tokio::test]
async fn many_processes_open_a_new_database_at_once() {
    for round in 0..20 {
        let folder = Folder::new(&format!("migrate-processes-{round}"));
        let children: Vec<_> = (0..4)
            .map(|_| {
                std::process::Command::new(std::env::current_exe().unwrap())
                    .args(["--exact", "opened_by_a_child_process"])
                    .env(CHILD_FOLDER, folder.path())
                    .stdout(std::process::Stdio::piped())
                    .spawn()
                    .unwrap()
            })
            .collect();
        for child in children {
            let output = child.wait_with_output().unwrap();
            assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
        }
        assert_eq!(rows(&open(&folder, &[ONE, TWO]).unwrap()).await, [11, 12]);
    }
}

//! What the tests of this crate share: folders of their own, and a writer that waits for a word.
#![allow(dead_code, unreachable_pub, reason = "each test file uses its part of this module")]
#![allow(clippy::unwrap_used, reason = "what fails here fails the test")]

use std::path::{Path, PathBuf};
use std::sync::mpsc;

use db::{Db, Error, Migration, Settings};

pub const ITEMS: &[Migration] = &[Migration {
    number: 1,
    name: "items",
    sqlite: "CREATE TABLE item (id INTEGER NOT NULL PRIMARY KEY, name TEXT UNIQUE, data BLOB,
                                stock INTEGER NOT NULL DEFAULT 0 CHECK (stock >= 0));
             CREATE TABLE part (item INTEGER NOT NULL REFERENCES item (id));",
    mysql: "CREATE TABLE IF NOT EXISTS item (id BIGINT NOT NULL PRIMARY KEY, name VARBINARY(255) UNIQUE, data MEDIUMBLOB,
                                             stock BIGINT NOT NULL DEFAULT 0, CONSTRAINT item_stock CHECK (stock >= 0));
            CREATE TABLE IF NOT EXISTS part (item BIGINT NOT NULL, FOREIGN KEY (item) REFERENCES item (id));",
}];

/// A folder that is gone with its test.
pub struct Folder(PathBuf);

impl Folder {
    pub fn new(test: &str) -> Folder {
        let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("db-{test}-{}", std::process::id()));
        let _ = std::fs::remove_dir_all(&path);
        std::fs::create_dir_all(&path).unwrap();
        Folder(path)
    }

    pub fn path(&self) -> &Path {
        &self.0
    }

    pub fn settings(&self) -> Settings {
        Settings::new(self.0.join("test.db"), "test")
    }

    pub fn open(&self) -> Db {
        Db::open(self.settings(), ITEMS).unwrap()
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// Holds the writer inside a transaction, so that whatever comes next queues up into one group.
pub struct Hold {
    go: mpsc::Sender<()>,
    held: tokio::task::JoinHandle<Result<(), Error>>,
}

impl Hold {
    pub async fn writer(db: &Db) -> Hold {
        let (go, wait) = mpsc::channel();
        let (started, has_started) = tokio::sync::oneshot::channel();
        let mut started = Some(started);
        let db = db.clone();
        let held = tokio::spawn(async move {
            db.write(move |_| {
                started.take().unwrap().send(()).unwrap();
                wait.recv().unwrap();
                Ok(())
            })
            .await
        });
        has_started.await.unwrap();
        Hold { go, held }
    }

    pub async fn release(self) {
        self.go.send(()).unwrap();
        self.held.await.unwrap().unwrap();
    }
}

/// Waits until so many writes are queued behind a [`Hold`].
pub async fn queued(db: &Db, writes: usize) {
    while db.stats().queued_writes < writes {
        tokio::task::yield_now().await;
    }
}

pub async fn insert(db: &Db, id: u64) -> Result<(), Error> {
    db.write(move |tx| tx.execute("INSERT INTO item (id) VALUES (?)", &[id.into()]).map(drop)).await
}

pub async fn ids(db: &Db) -> Vec<u64> {
    db.read(|tx| tx.query("SELECT id FROM item ORDER BY id", &[], |row| row.get(0)))
        .await
        .map_err(|error: Error| error)
        .unwrap()
}

pub async fn integrity(db: &Db) -> Vec<String> {
    db.read(|tx| tx.query("PRAGMA integrity_check", &[], |row| row.get(0)))
        .await
        .map_err(|error: Error| error)
        .unwrap()
}

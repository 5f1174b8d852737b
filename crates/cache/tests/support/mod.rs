//! What the tests share: a database with a stock in it, links to Redis.

#![allow(dead_code, reason = "each test binary uses a part of it")]

use std::sync::Arc;
use std::time::Duration;

use cache::record::{Reader, Record, Writer};
use cache::redis::{Redis, Settings};
use db::{Db, Error, Migration, Tx, Value};

/// How long a server, or a cluster, may take to be there again on a busy machine.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

const MIGRATIONS: &[Migration] = &[
    cache::mark::migration(1),
    Migration {
        number: 2,
        name: "stock",
        sqlite: "CREATE TABLE stock (id INTEGER PRIMARY KEY, version INTEGER NOT NULL, amount INTEGER NOT NULL)",
        mysql: "CREATE TABLE IF NOT EXISTS stock (id BIGINT PRIMARY KEY, version BIGINT NOT NULL, amount BIGINT NOT NULL)",
    },
];

/// A database of its own on a server, as two processes open it.
pub(crate) struct Database {
    pub(crate) one: Db,
    pub(crate) two: Db,
    database: Arc<servers::Database>,
}

impl Database {
    pub(crate) async fn open() -> Database {
        let creating = || servers::shared::mariadb().database().expect("a database");
        let database = Arc::new(tokio::task::spawn_blocking(creating).await.expect("created"));
        let one = open(&database, |_| {}).await;
        let two = open(&database, |_| {}).await;
        Database { one, two, database }
    }

    /// As one opens it who waits for a lock for a second only.
    pub(crate) async fn impatient(&self) -> Db {
        open(&self.database, |settings| settings.lock_timeout = Duration::from_secs(1)).await
    }
}

async fn open(database: &Arc<servers::Database>, change: fn(&mut db::mysql::Settings)) -> Db {
    let mut settings = db::mysql::Settings::new(database.url(), "stock");
    change(&mut settings);
    let opening = move || Db::connect(settings, MIGRATIONS).expect("a database");
    tokio::task::spawn_blocking(opening).await.expect("opened")
}

/// What is left of something.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Left {
    pub(crate) amount: i64,
}

impl Record for Left {
    const FORMAT: u8 = 1;

    fn write(&self, to: &mut Writer) {
        to.signed(self.amount);
    }

    fn read(from: &mut Reader<'_>) -> Option<Left> {
        Some(Left { amount: from.signed()? })
    }
}

pub(crate) fn insert(tx: &mut Tx<'_>, id: u64, amount: i64) -> Result<(), Error> {
    let values = [Value::from(id), Value::from(amount)];
    tx.execute("INSERT INTO stock (id, version, amount) VALUES (?, 0, ?)", &values)?;
    Ok(())
}

/// The version and the amount.
pub(crate) fn row(tx: &mut Tx<'_>, id: u64) -> Result<(u64, i64), Error> {
    let sql = "SELECT version, amount FROM stock WHERE id = ?";
    let row = tx.query_opt(sql, &[Value::from(id)], |row| Ok((row.get(0)?, row.get(1)?)))?;
    Ok(row.expect("the row is there"))
}

/// The same, and it stays so until the transaction ends.
pub(crate) fn lock_row(tx: &mut Tx<'_>, id: u64) -> Result<(u64, i64), Error> {
    let sql = "SELECT version, amount FROM stock WHERE id = ? {for update}";
    let row = tx.query_opt(sql, &[Value::from(id)], |row| Ok((row.get(0)?, row.get(1)?)))?;
    Ok(row.expect("the row is there"))
}

pub(crate) fn set(tx: &mut Tx<'_>, id: u64, version: u64, amount: i64) -> Result<(), Error> {
    let values = [Value::from(version), Value::from(amount), Value::from(id)];
    tx.execute("UPDATE stock SET version = ?, amount = ? WHERE id = ?", &values)?;
    Ok(())
}

/// Patient settings, for a debug build on a busy machine.
pub(crate) fn settings(urls: &str, prefix: &str) -> Settings {
    let mut settings = Settings::parse(urls).expect("an address");
    prefix.clone_into(&mut settings.prefix);
    settings.command_timeout = Duration::from_secs(2);
    settings
}

pub(crate) async fn connected(settings: Settings) -> Redis {
    let redis = Redis::connect(settings);
    assert!(redis.wait_until_up(PATIENCE).await, "{:?} does not answer", redis.settings());
    redis
}

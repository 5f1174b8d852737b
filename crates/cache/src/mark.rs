//! Marks: single numbers in a service's own database that its replicas have to agree on, so that what they keep outside of it is right.

use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::Duration;

use db::{Db, Error, Migration, Tx, Value};
use tokio_util::sync::{CancellationToken, DropGuard};

/// The table of marks, as one of a service's migrations.
pub const fn migration(number: u32) -> Migration {
    Migration {
        number,
        name: "cache_mark",
        sqlite: "CREATE TABLE cache_mark (number INTEGER NOT NULL PRIMARY KEY, value INTEGER NOT NULL) STRICT;",
        mysql: "CREATE TABLE IF NOT EXISTS cache_mark (
    number INT NOT NULL PRIMARY KEY,
    value BIGINT NOT NULL
) ENGINE = InnoDB;",
    }
}

/// Which number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mark {
    /// Which life shared copies have, see [`crate::life`].
    Life,
    /// Up to which id no row is created any more, see [`crate::members`].
    Closed,
    /// Below which id every saga has ended, for good.
    EndedBelow,
}

impl Mark {
    fn number(self) -> i64 {
        match self {
            Mark::Life => 0,
            Mark::Closed => 1,
            Mark::EndedBelow => 2,
        }
    }

    /// Its value, 0 before it was first set.
    ///
    /// # Errors
    /// When the database fails.
    pub fn read(self, tx: &mut Tx<'_>) -> Result<i64, Error> {
        Ok(self.find(tx)?.unwrap_or(0))
    }

    /// Its value, which nobody changes before this transaction has ended. The mark must be there, see [`Mark::ensure`].
    ///
    /// # Errors
    /// When the database fails.
    pub fn hold(self, tx: &mut Tx<'_>) -> Result<i64, Error> {
        let number = Value::from(self.number());
        let value =
            tx.query_opt("SELECT value FROM cache_mark WHERE number = ? {for share}", &[number], |row| {
                row.get(0)
            })?;
        Ok(value.unwrap_or(0))
    }

    /// Makes sure that it is there.
    ///
    /// # Errors
    /// When the database fails.
    pub fn ensure(self, tx: &mut Tx<'_>) -> Result<(), Error> {
        let number = Value::from(self.number());
        tx.execute("{insert ignore} INTO cache_mark (number, value) VALUES (?, 0)", &[number])?;
        Ok(())
    }

    /// Sets it, if it still has this value; tells whether it had.
    ///
    /// # Errors
    /// When the database fails.
    pub fn replace(self, tx: &mut Tx<'_>, old: i64, new: i64) -> Result<bool, Error> {
        let values = [Value::from(new), Value::from(self.number()), Value::from(old)];
        Ok(tx.execute("UPDATE cache_mark SET value = ? WHERE number = ? AND value = ?", &values)? == 1)
    }

    /// Sets it, unless it is higher already. Looked at without a lock first: it is raised once and asked for often, and of two who have
    /// a shared lock, as whoever makes sure that it is there, neither could raise it.
    ///
    /// # Errors
    /// When the database fails.
    pub fn raise(self, tx: &mut Tx<'_>, value: i64) -> Result<(), Error> {
        match self.find(tx)? {
            Some(found) if found >= value => return Ok(()),
            Some(_) => {}
            None => self.ensure(tx)?,
        }
        let values = [Value::from(value), Value::from(self.number()), Value::from(value)];
        tx.execute("UPDATE cache_mark SET value = ? WHERE number = ? AND value < ?", &values)?;
        Ok(())
    }

    fn find(self, tx: &mut Tx<'_>) -> Result<Option<i64>, Error> {
        let number = Value::from(self.number());
        tx.query_opt("SELECT value FROM cache_mark WHERE number = ?", &[number], |row| row.get(0))
    }
}

/// A mark that only rises, read every now and then: what is known of it may be behind, never ahead.
#[derive(Clone)]
pub struct Watched {
    value: Arc<AtomicI64>,
    _stop: Arc<DropGuard>,
}

impl Watched {
    /// Reads it now and then every `interval`, until the last clone is dropped. Must be called on a tokio runtime.
    pub fn start(db: Db, mark: Mark, interval: Duration) -> Watched {
        let value = Arc::new(AtomicI64::new(0));
        let stop = CancellationToken::new();
        let (kept, stopped) = (value.clone(), stop.clone());
        let reading = async move {
            loop {
                match db.read(move |tx| mark.read(tx)).await {
                    Ok(read) => kept.store(read, Ordering::Relaxed),
                    Err(error) => tracing::debug!(%error, ?mark, "a mark was not read"),
                }
                tokio::time::sleep(interval).await;
            }
        };
        tokio::spawn(async move { stopped.run_until_cancelled(reading).await });
        Watched { value, _stop: Arc::new(stop.drop_guard()) }
    }

    /// What it was when last read; 0 before that.
    pub fn value(&self) -> i64 {
        self.value.load(Ordering::Relaxed)
    }
}

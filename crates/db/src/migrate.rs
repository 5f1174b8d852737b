//! Numbered migrations, applied when a database is opened: which one is next, and how SQLite applies it.
//!
//! On SQLite each runs in one transaction together with its row in `schema_migrations`, so it is never applied half or
//! twice, whoever else opens the database at the same time. How MySQL does it is in `mysql/migrate.rs`. What was applied is
//! never changed: a database that is newer than the program, or that has another text under the same number, is
//! refused.

use std::path::Path;

use rusqlite::{Connection, OpenFlags, OptionalExtension, TransactionBehavior};

use crate::OpenError;
use crate::dialect::Dialect;

/// One step of a database's schema. Its texts may have many statements, and never change once they were released. The
/// markers of [`crate::dialect`] are not translated here.
#[derive(Debug, Clone, Copy)]
pub struct Migration {
    /// Ascends through the list.
    pub number: u32,
    /// For people.
    pub name: &'static str,
    /// The statements for SQLite. They run in one transaction.
    pub sqlite: &'static str,
    /// The statements for MySQL and MariaDB; empty, if there is nothing to do. A server commits each change of a schema by
    /// itself, so after a crash in the middle the text is run again from its beginning: it must be written so that
    /// this is right (`IF NOT EXISTS`, `INSERT IGNORE`, ...).
    pub mysql: &'static str,
}

impl Migration {
    pub(crate) fn text(&self, dialect: Dialect) -> &'static str {
        match dialect {
            Dialect::Sqlite => self.sqlite,
            Dialect::Mysql => self.mysql,
        }
    }

    /// FNV-1a, 64 bits: it finds an accidental change, which is all that it is for.
    pub(crate) fn checksum(&self, dialect: Dialect) -> String {
        let hash = self.text(dialect).bytes().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
            (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3)
        });
        format!("{hash:016x}")
    }
}

/// A row of `schema_migrations`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Applied {
    pub(crate) number: u32,
    pub(crate) name: String,
    pub(crate) checksum: String,
}

/// A program's migrations for one database.
#[derive(Clone, Copy)]
pub(crate) struct Plan<'p> {
    pub(crate) dialect: Dialect,
    /// Where the database is, for errors.
    pub(crate) database: &'p str,
    pub(crate) migrations: &'static [Migration],
}

impl<'p> Plan<'p> {
    pub(crate) fn new(dialect: Dialect, database: &'p str, migrations: &'static [Migration]) -> Plan<'p> {
        let ascend = migrations.is_sorted_by(|a, b| a.number < b.number);
        assert!(ascend, "migrations must ascend: {migrations:?}");
        Plan { dialect, database, migrations }
    }

    /// The first migration that is not applied. What is applied must be the beginning of the program's list.
    pub(crate) fn next_missing(&self, applied: &[Applied]) -> Result<Option<&'static Migration>, OpenError> {
        let database = || self.database.to_owned();
        let found = applied.last().map_or(0, |last| last.number);
        let known = self.migrations.last().map_or(0, |last| last.number);
        if found > known {
            return Err(OpenError::Newer { database: database(), found, known });
        }
        for (there, here) in applied.iter().zip(self.migrations) {
            if there.number != here.number || there.checksum != here.checksum(self.dialect) {
                return Err(OpenError::Changed {
                    database: database(),
                    number: here.number,
                    name: here.name,
                    applied: format!("{} ({})", there.number, there.name),
                });
            }
        }
        Ok(self.migrations.get(applied.len()))
    }

    pub(crate) fn failed(
        &self,
        migration: &Migration,
        source: impl Into<Box<dyn std::error::Error + Send + Sync>>,
    ) -> OpenError {
        OpenError::Migration {
            database: self.database.to_owned(),
            number: migration.number,
            name: migration.name,
            source: source.into(),
        }
    }
}

/// Applies what is missing on SQLite.
pub(crate) fn migrate(
    conn: &mut Connection,
    path: &Path,
    migrations: &'static [Migration],
) -> Result<(), OpenError> {
    let database = path.display().to_string();
    let plan = Plan::new(Dialect::Sqlite, &database, migrations);
    while apply_next(conn, plan)? {}
    Ok(())
}

/// What of `migrations` the database in this file has not; None when there is no file. Changes nothing.
pub(crate) fn pending(
    path: &Path,
    migrations: &'static [Migration],
) -> Result<Option<Vec<&'static Migration>>, OpenError> {
    if !path.exists() {
        return Ok(None);
    }
    let database = path.display().to_string();
    let at = |source| OpenError::Sqlite { path: database.clone(), source };
    let conn = Connection::open_with_flags(path, OpenFlags::SQLITE_OPEN_READ_ONLY).map_err(at)?;
    let applied = applied(&conn).map_err(at)?;
    Plan::new(Dialect::Sqlite, &database, migrations).next_missing(&applied)?;
    Ok(Some(migrations[applied.len()..].iter().collect()))
}

/// Applies the first missing migration, if there is one. The lock is taken before looking, so what was found
/// missing is still missing when it is applied.
fn apply_next(conn: &mut Connection, plan: Plan<'_>) -> Result<bool, OpenError> {
    let at = |source| OpenError::Sqlite { path: plan.database.to_owned(), source };
    let Some(_) = plan.next_missing(&applied(conn).map_err(at)?)? else { return Ok(false) };

    let tx = conn.transaction_with_behavior(TransactionBehavior::Immediate).map_err(at)?;
    let Some(next) = plan.next_missing(&applied(&tx).map_err(at)?)? else { return Ok(false) };
    let failed = |source: rusqlite::Error| plan.failed(next, source);
    tx.execute_batch(next.sqlite).map_err(failed)?;
    record(&tx, next).map_err(failed)?;
    tx.commit().map_err(failed)?;
    tracing::info!(path = plan.database, number = next.number, name = next.name, "migration applied");
    Ok(true)
}

fn applied(conn: &Connection) -> rusqlite::Result<Vec<Applied>> {
    const EXISTS: &str = "SELECT 1 FROM sqlite_schema WHERE type = 'table' AND name = 'schema_migrations'";
    if conn.query_row(EXISTS, (), |_| Ok(())).optional()?.is_none() {
        return Ok(Vec::new());
    }
    let mut all = conn.prepare("SELECT number, name, checksum FROM schema_migrations ORDER BY number")?;
    let rows = all
        .query_map((), |row| Ok(Applied { number: row.get(0)?, name: row.get(1)?, checksum: row.get(2)? }))?;
    rows.collect()
}

fn record(conn: &Connection, migration: &Migration) -> rusqlite::Result<()> {
    conn.execute_batch(
        "CREATE TABLE IF NOT EXISTS schema_migrations (
             number INTEGER NOT NULL PRIMARY KEY, name TEXT NOT NULL, checksum TEXT NOT NULL)",
    )?;
    conn.execute(
        "INSERT INTO schema_migrations (number, name, checksum) VALUES (?, ?, ?)",
        (migration.number, migration.name, migration.checksum(Dialect::Sqlite)),
    )?;
    Ok(())
}

//! Numbered migrations, applied when a database is opened.
//!
//! Each runs in one transaction together with its row in `schema_migrations`, so it is never applied half or
//! twice, whoever else opens the database at the same time. What was applied is never changed: a database
//! that is newer than the program, or that has another text under the same number, is refused.

use std::path::Path;

use rusqlite::{Connection, OptionalExtension, TransactionBehavior};

use crate::OpenError;

/// One step of a database's schema. Its text may have many statements, and never changes once it was released.
#[derive(Debug, Clone, Copy)]
pub struct Migration {
    /// Ascends through the list.
    pub number: u32,
    /// For people.
    pub name: &'static str,
    /// The statements, in this database's own SQL: the markers of [`crate::dialect`] are not translated here.
    pub sql: &'static str,
}

impl Migration {
    /// FNV-1a, 64 bits: it finds an accidental change, which is all that it is for.
    fn checksum(&self) -> String {
        let hash = self.sql.bytes().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
            (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3)
        });
        format!("{hash:016x}")
    }
}

/// A row of `schema_migrations`.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Applied {
    number: u32,
    name: String,
    checksum: String,
}

/// Applies what is missing.
pub(crate) fn migrate(
    conn: &mut Connection,
    path: &Path,
    migrations: &'static [Migration],
) -> Result<(), OpenError> {
    assert!(migrations.is_sorted_by(|a, b| a.number < b.number), "migrations must ascend: {migrations:?}");
    while apply_next(conn, path, migrations)? {}
    Ok(())
}

/// Applies the first missing migration, if there is one. The lock is taken before looking, so what was found
/// missing is still missing when it is applied.
fn apply_next(
    conn: &mut Connection,
    path: &Path,
    migrations: &'static [Migration],
) -> Result<bool, OpenError> {
    let at = |source| OpenError::Sqlite { path: path.display().to_string(), source };
    let Some(_) = next_missing(&applied(conn).map_err(at)?, path, migrations)? else { return Ok(false) };

    let tx = conn.transaction_with_behavior(TransactionBehavior::Immediate).map_err(at)?;
    let Some(next) = next_missing(&applied(&tx).map_err(at)?, path, migrations)? else { return Ok(false) };
    let failed = |source| OpenError::Migration {
        path: path.display().to_string(),
        number: next.number,
        name: next.name,
        source,
    };
    tx.execute_batch(next.sql).map_err(failed)?;
    record(&tx, next).map_err(failed)?;
    tx.commit().map_err(failed)?;
    tracing::info!(path = %path.display(), number = next.number, name = next.name, "migration applied");
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
        (migration.number, migration.name, migration.checksum()),
    )?;
    Ok(())
}

/// The first migration that is not applied. What is applied must be the beginning of the program's list.
fn next_missing<'m>(
    applied: &[Applied],
    path: &Path,
    migrations: &'m [Migration],
) -> Result<Option<&'m Migration>, OpenError> {
    let path = || path.display().to_string();
    let found = applied.last().map_or(0, |last| last.number);
    let known = migrations.last().map_or(0, |last| last.number);
    if found > known {
        return Err(OpenError::Newer { path: path(), found, known });
    }
    for (there, here) in applied.iter().zip(migrations) {
        if there.number != here.number || there.checksum != here.checksum() {
            return Err(OpenError::Changed {
                path: path(),
                number: here.number,
                name: here.name,
                applied: format!("{} ({})", there.number, there.name),
            });
        }
    }
    Ok(migrations.get(applied.len()))
}

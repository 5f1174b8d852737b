//! Reading a shop's databases: rows as they are, without judging them.

use std::path::{Path, PathBuf};

use rusqlite::{Connection, OpenFlags, Row};

use super::violation::{Database, Table};

/// How long to wait for the shop's own lock.
const BUSY_TIMEOUT: std::time::Duration = std::time::Duration::from_secs(10);

/// A database cannot be read.
#[derive(Debug, thiserror::Error)]
#[error("{path}: {source}")]
pub struct CheckError {
    /// The database's file.
    pub path: PathBuf,
    /// Why.
    pub source: rusqlite::Error,
}

/// Everything that is judged.
#[derive(Clone, Debug, Default)]
pub(crate) struct Rows {
    /// What SQLite itself finds wrong.
    pub damaged: Vec<(Database, String)>,
    pub customers: Vec<u64>,
    pub products: Vec<Product>,
    pub orders: Vec<Order>,
    pub payments: Vec<Payment>,
    pub purchases: Vec<Purchase>,
    pub last_finished_no: u64,
    pub files: Files,
    pub barrier: Vec<Reply>,
}

/// The tables behind the view `purchase`, which hides where they contradict each other.
#[derive(Clone, Debug, Default)]
pub(crate) struct Files {
    pub accepted: Vec<Filed>,
    pub open: Vec<Filed>,
    pub ended: Vec<Filed>,
    /// Rows of the two lists by customer.
    pub listed: Vec<Listed>,
    /// The finish number up to which there should be such rows.
    pub indexed: u64,
}

/// A purchase's row in one table.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Filed {
    pub id: u64,
    pub customer: u64,
    /// 0 where the table has none.
    pub finished_no: u64,
}

/// A row of a list by customer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Listed {
    pub table: Table,
    pub customer: u64,
    /// A purchase's id or its finish number, as the table has it.
    pub number: u64,
}

#[derive(Clone, Debug)]
pub(crate) struct Product {
    pub id: u64,
    pub inventory: i64,
}

#[derive(Clone, Debug)]
pub(crate) struct Order {
    pub id: u64,
    pub customer: u64,
    pub items: String,
}

#[derive(Clone, Debug)]
pub(crate) struct Payment {
    pub id: u64,
    pub customer: u64,
    pub currency: String,
    pub amount: i64,
}

#[derive(Clone, Debug)]
pub(crate) struct Purchase {
    pub id: u64,
    pub customer: u64,
    pub key: Option<String>,
    pub state: i64,
    pub input: Vec<u8>,
    pub created_at: u64,
    pub next_wake_at: Option<u64>,
    pub finished_no: Option<u64>,
    pub reason: Option<String>,
    pub path: Option<Vec<u8>>,
}

/// A barrier row.
#[derive(Clone, Debug)]
pub(crate) struct Reply {
    pub database: Database,
    pub saga: u64,
    pub step: u8,
    pub phase: u8,
    pub reply: Vec<u8>,
}

/// Reads it all.
pub(crate) fn read(data_dir: &Path) -> Result<Rows, CheckError> {
    let mut rows = Rows::default();
    // Purchases last: what is accepted while the others are read is then not taken for nobody's.
    for (database, read) in [
        (Database::Account, read_account as fn(&Connection, &mut Rows) -> rusqlite::Result<()>),
        (Database::Product, read_product),
        (Database::Order, read_order),
        (Database::Payment, read_payment),
        (Database::Purchase, read_purchase),
    ] {
        let path = data_dir.join(database.name()).with_extension("db");
        read_database(&path, database, read, &mut rows).map_err(|source| CheckError { path, source })?;
    }
    Ok(rows)
}

fn read_database(
    path: &Path,
    database: Database,
    read: fn(&Connection, &mut Rows) -> rusqlite::Result<()>,
    rows: &mut Rows,
) -> rusqlite::Result<()> {
    let conn = Connection::open_with_flags(path, OpenFlags::SQLITE_OPEN_READ_ONLY)?;
    conn.busy_timeout(BUSY_TIMEOUT)?;
    // One snapshot for all that follows.
    conn.execute_batch("BEGIN")?;
    let found = all(&conn, "PRAGMA quick_check", |row| row.get::<_, String>(0))?;
    rows.damaged.extend(found.into_iter().filter(|what| what != "ok").map(|what| (database, what)));
    if has_barrier(&conn)? {
        rows.barrier.extend(read_barrier(&conn, database)?);
    }
    read(&conn, rows)
}

fn has_barrier(conn: &Connection) -> rusqlite::Result<bool> {
    let sql = "SELECT EXISTS (SELECT 1 FROM sqlite_schema WHERE type = 'table' AND name = 'saga_barrier')";
    conn.query_row(sql, (), |row| row.get(0))
}

fn read_barrier(conn: &Connection, database: Database) -> rusqlite::Result<Vec<Reply>> {
    all(conn, "SELECT saga, step, phase, reply FROM saga_barrier ORDER BY saga, step, phase", |row| {
        Ok(Reply { database, saga: id(row, 0)?, step: row.get(1)?, phase: row.get(2)?, reply: row.get(3)? })
    })
}

fn read_account(conn: &Connection, rows: &mut Rows) -> rusqlite::Result<()> {
    rows.customers = all(conn, "SELECT id FROM customer ORDER BY id", |row| id(row, 0))?;
    Ok(())
}

fn read_product(conn: &Connection, rows: &mut Rows) -> rusqlite::Result<()> {
    rows.products = all(conn, "SELECT id, inventory FROM product ORDER BY id", |row| {
        Ok(Product { id: id(row, 0)?, inventory: row.get(1)? })
    })?;
    Ok(())
}

fn read_order(conn: &Connection, rows: &mut Rows) -> rusqlite::Result<()> {
    rows.orders = all(conn, "SELECT id, customer_id, items FROM purchase_order ORDER BY id", |row| {
        Ok(Order { id: id(row, 0)?, customer: id(row, 1)?, items: row.get(2)? })
    })?;
    Ok(())
}

fn read_payment(conn: &Connection, rows: &mut Rows) -> rusqlite::Result<()> {
    let sql = "SELECT id, customer_id, currency_code, amount FROM payment ORDER BY id";
    rows.payments = all(conn, sql, |row| {
        Ok(Payment { id: id(row, 0)?, customer: id(row, 1)?, currency: row.get(2)?, amount: row.get(3)? })
    })?;
    Ok(())
}

fn read_purchase(conn: &Connection, rows: &mut Rows) -> rusqlite::Result<()> {
    let sql = "SELECT id, customer_id, idempotency_key, state, input, created_at, next_wake_at, finished_no,
                      reason, path
               FROM purchase ORDER BY id";
    rows.purchases = all(conn, sql, |row| {
        Ok(Purchase {
            id: id(row, 0)?,
            customer: id(row, 1)?,
            key: row.get(2)?,
            state: row.get(3)?,
            input: row.get(4)?,
            created_at: id(row, 5)?,
            next_wake_at: optional(row, 6)?,
            finished_no: optional(row, 7)?,
            reason: row.get(8)?,
            path: row.get(9)?,
        })
    })?;
    let sql = "SELECT no, indexed FROM purchase_finish WHERE only = 1";
    (rows.last_finished_no, rows.files.indexed) =
        conn.query_row(sql, (), |row| Ok((id(row, 0)?, id(row, 1)?)))?;
    read_files(conn, &mut rows.files)
}

fn read_files(conn: &Connection, files: &mut Files) -> rusqlite::Result<()> {
    let filed =
        |row: &Row<'_>| Ok(Filed { id: id(row, 0)?, customer: id(row, 1)?, finished_no: id(row, 2)? });
    files.accepted = all(conn, "SELECT id, customer_id, 0 FROM purchase_accepted ORDER BY id", filed)?;
    files.open = all(conn, "SELECT id, customer_id, 0 FROM purchase_open ORDER BY id", filed)?;
    files.ended = all(conn, "SELECT id, customer_id, finished_no FROM purchase_ended ORDER BY id", filed)?;
    for (table, sql) in [
        (Table::CustomerPurchase, "SELECT customer_id, id FROM customer_purchase"),
        (Table::CustomerEnded, "SELECT customer_id, finished_no FROM customer_ended"),
    ] {
        files
            .listed
            .extend(all(conn, sql, |row| Ok(Listed { table, customer: id(row, 0)?, number: id(row, 1)? }))?);
    }
    Ok(())
}

/// A negative number is read as one far above 2^53: out of range it is either way.
fn id(row: &Row<'_>, index: usize) -> rusqlite::Result<u64> {
    row.get::<_, i64>(index).map(i64::cast_unsigned)
}

fn optional(row: &Row<'_>, index: usize) -> rusqlite::Result<Option<u64>> {
    Ok(row.get::<_, Option<i64>>(index)?.map(i64::cast_unsigned))
}

fn all<T>(
    conn: &Connection,
    sql: &str,
    each: impl FnMut(&Row<'_>) -> rusqlite::Result<T>,
) -> rusqlite::Result<Vec<T>> {
    conn.prepare(sql)?.query_map((), each)?.collect()
}

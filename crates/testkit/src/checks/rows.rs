//! Reading a shop's databases: rows as they are, without judging them.

use super::source::{Books, Cells, CheckError, ReadError, Source};
use super::violation::{Database, Table};

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
pub(crate) fn read(books: &Books) -> Result<Rows, CheckError> {
    let mut rows = Rows::default();
    // Purchases last: what is accepted while the others are read is then not taken for nobody's.
    for (database, read) in [
        (Database::Account, read_account as fn(&mut Source, &mut Rows) -> Result<(), ReadError>),
        (Database::Product, read_product),
        (Database::Order, read_order),
        (Database::Payment, read_payment),
        (Database::Purchase, read_purchase),
    ] {
        let at = |why| CheckError { database: books.name_of(database), why };
        read_database(books, database, read, &mut rows).map_err(at)?;
    }
    Ok(rows)
}

fn read_database(
    books: &Books,
    database: Database,
    read: fn(&mut Source, &mut Rows) -> Result<(), ReadError>,
    rows: &mut Rows,
) -> Result<(), ReadError> {
    let mut source = books.open(database)?;
    rows.damaged.extend(source.damages()?.into_iter().map(|what| (database, what)));
    if source.has_table("saga_barrier")? {
        rows.barrier.extend(read_barrier(&mut source, database)?);
    }
    read(&mut source, rows)
}

fn read_barrier(source: &mut Source, database: Database) -> Result<Vec<Reply>, ReadError> {
    source.all("SELECT saga, step, phase, reply FROM saga_barrier ORDER BY saga, step, phase", |row| {
        let (step, phase) = (row.small(1)?, row.small(2)?);
        Ok(Reply { database, saga: row.id(0)?, step, phase, reply: row.bytes(3)? })
    })
}

fn read_account(source: &mut Source, rows: &mut Rows) -> Result<(), ReadError> {
    rows.customers = source.all("SELECT id FROM customer ORDER BY id", |row| row.id(0))?;
    Ok(())
}

fn read_product(source: &mut Source, rows: &mut Rows) -> Result<(), ReadError> {
    rows.products = source.all("SELECT id, inventory FROM product ORDER BY id", |row| {
        Ok(Product { id: row.id(0)?, inventory: row.integer(1)? })
    })?;
    Ok(())
}

fn read_order(source: &mut Source, rows: &mut Rows) -> Result<(), ReadError> {
    rows.orders = source.all("SELECT id, customer_id, items FROM purchase_order ORDER BY id", |row| {
        Ok(Order { id: row.id(0)?, customer: row.id(1)?, items: row.text(2)? })
    })?;
    Ok(())
}

fn read_payment(source: &mut Source, rows: &mut Rows) -> Result<(), ReadError> {
    let sql = "SELECT id, customer_id, currency_code, amount FROM payment ORDER BY id";
    rows.payments = source.all(sql, |row| {
        Ok(Payment { id: row.id(0)?, customer: row.id(1)?, currency: row.text(2)?, amount: row.integer(3)? })
    })?;
    Ok(())
}

fn read_purchase(source: &mut Source, rows: &mut Rows) -> Result<(), ReadError> {
    let sql = "SELECT id, customer_id, idempotency_key, state, input, created_at, next_wake_at, finished_no,
                      reason, path
               FROM purchase ORDER BY id";
    rows.purchases = source.all(sql, |row| {
        Ok(Purchase {
            id: row.id(0)?,
            customer: row.id(1)?,
            key: row.optional(2, Cells::text)?,
            state: row.integer(3)?,
            input: row.bytes(4)?,
            created_at: row.id(5)?,
            next_wake_at: row.optional(6, Cells::id)?,
            finished_no: row.optional(7, Cells::id)?,
            reason: row.optional(8, Cells::text)?,
            path: row.optional(9, Cells::bytes)?,
        })
    })?;
    let sql = "SELECT no, indexed FROM purchase_finish WHERE only = 1";
    let finish = source.all(sql, |row| Ok((row.id(0)?, row.id(1)?)))?;
    (rows.last_finished_no, rows.files.indexed) = finish.first().copied().unwrap_or_default();
    read_files(source, &mut rows.files)
}

fn read_files(source: &mut Source, files: &mut Files) -> Result<(), ReadError> {
    let filed = |row: &Cells| Ok(Filed { id: row.id(0)?, customer: row.id(1)?, finished_no: row.id(2)? });
    files.accepted = source.all("SELECT id, customer_id, 0 FROM purchase_accepted ORDER BY id", filed)?;
    files.open = source.all("SELECT id, customer_id, 0 FROM purchase_open ORDER BY id", filed)?;
    files.ended = source.all("SELECT id, customer_id, finished_no FROM purchase_ended ORDER BY id", filed)?;
    for (table, sql) in [
        (Table::CustomerPurchase, "SELECT customer_id, id FROM customer_purchase"),
        (Table::CustomerEnded, "SELECT customer_id, finished_no FROM customer_ended"),
    ] {
        let listed = |row: &Cells| Ok(Listed { table, customer: row.id(0)?, number: row.id(1)? });
        files.listed.extend(source.all(sql, listed)?);
    }
    Ok(())
}

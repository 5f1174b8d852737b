//! The SQL of products and stock, one function a question.

use db::{Error, Row, Set, Tx, Value};

/// A product as it is sold.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Product {
    pub(crate) id: u64,
    pub(crate) name: String,
    pub(crate) description: String,
    pub(crate) brand_name: String,
    pub(crate) price: i64,
    pub(crate) inventory: i64,
}

/// A line of the catalogue.
pub(crate) struct Listed {
    pub(crate) id: u64,
    pub(crate) name: String,
    pub(crate) inventory: i64,
    pub(crate) price: i64,
}

pub(crate) fn insert(tx: &mut Tx<'_>, product: &Product) -> Result<(), Error> {
    tx.execute(
        "INSERT INTO product (id, name, description, brand_name, price, inventory) VALUES (?, ?, ?, ?, ?, ?)",
        &[
            Value::from(product.id),
            Value::from(&product.name),
            Value::from(&product.description),
            Value::from(&product.brand_name),
            Value::from(product.price),
            Value::from(product.inventory),
        ],
    )?;
    Ok(())
}

pub(crate) fn is_empty(tx: &mut Tx<'_>) -> Result<bool, Error> {
    Ok(tx.query_opt("SELECT 1 FROM product LIMIT 1", &[], |_| Ok(()))?.is_none())
}

pub(crate) fn by_id(tx: &mut Tx<'_>, id: u64) -> Result<Option<Product>, Error> {
    tx.query_opt(
        "SELECT id, name, description, brand_name, price, inventory FROM product WHERE id = ?",
        &[Value::from(id)],
        product,
    )
}

fn product(row: &Row<'_>) -> Result<Product, Error> {
    Ok(Product {
        id: row.get(0)?,
        name: row.get(1)?,
        description: row.get(2)?,
        brand_name: row.get(3)?,
        price: row.get(4)?,
        inventory: row.get(5)?,
    })
}

pub(crate) fn list(tx: &mut Tx<'_>, offset: u64, size: u64) -> Result<Vec<Listed>, Error> {
    tx.query(
        "SELECT id, name, inventory, price FROM product ORDER BY id LIMIT ? OFFSET ?",
        &[Value::from(size), Value::from(offset)],
        |row| Ok(Listed { id: row.get(0)?, name: row.get(1)?, inventory: row.get(2)?, price: row.get(3)? }),
    )
}

pub(crate) fn products(tx: &mut Tx<'_>, ids: &[u64]) -> Result<Vec<Product>, Error> {
    tx.query(
        "SELECT p.id, p.name, p.description, p.brand_name, p.price, p.inventory
         {from set(id INT) AS s join product AS p on p.id = s.id}",
        &[Value::from(&id_set(ids.iter().copied()))],
        product,
    )
}

/// What is left of these products, locked where the database has row locks. Ids that do not
/// exist are left out. The ids must be sorted, so that two transactions lock in one order.
pub(crate) fn lock_stock(tx: &mut Tx<'_>, ids: impl Iterator<Item = u64>) -> Result<Vec<(u64, i64)>, Error> {
    tx.query(
        "SELECT p.id, p.inventory {from set(id INT) AS s join product AS p on p.id = s.id} {for update}",
        &[Value::from(&id_set(ids))],
        |row| Ok((row.get(0)?, row.get(1)?)),
    )
}

/// Writes what is left of these products.
pub(crate) fn set_stock(tx: &mut Tx<'_>, left: impl Iterator<Item = (u64, i64)>) -> Result<(), Error> {
    let mut set = Set::new();
    for (id, inventory) in left {
        set.push(&[Value::from(id), Value::from(inventory)]);
    }
    if !set.is_empty() {
        tx.execute(
            "{update product AS p join set(id INT, inventory INT) AS s on p.id = s.id set inventory = s.inventory}",
            &[Value::from(&set)],
        )?;
    }
    Ok(())
}

fn id_set(ids: impl Iterator<Item = u64>) -> Set {
    let mut set = Set::new();
    for id in ids {
        set.push(&[Value::from(id)]);
    }
    set
}

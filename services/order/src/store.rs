//! The SQL of orders, one function a question.

use db::{Error, Set, Tx, Value};

/// One line of an order: product id, amount, and the price of one when it was bought.
pub(crate) type Line = (u64, i64, i64);

/// An order to be created.
pub(crate) struct NewOrder {
    pub(crate) id: u64,
    pub(crate) customer_id: u64,
    /// The lines, as JSON.
    pub(crate) items: String,
    pub(crate) created_at: u64,
}

pub(crate) fn insert(tx: &mut Tx<'_>, orders: impl Iterator<Item = NewOrder>) -> Result<(), Error> {
    let mut set = Set::new();
    for order in orders {
        set.push(&[
            Value::from(order.id),
            Value::from(order.customer_id),
            Value::from(&order.items),
            Value::from(order.created_at),
        ]);
    }
    tx.execute(
        "{insert into purchase_order (id, customer_id, items, created_at)
          from set(id INT, customer_id INT, items TEXT, created_at INT) AS s
          values (s.id, s.customer_id, s.items, s.created_at)}",
        &[Value::from(&set)],
    )?;
    Ok(())
}

pub(crate) fn delete(tx: &mut Tx<'_>, ids: impl Iterator<Item = u64>) -> Result<(), Error> {
    let mut set = Set::new();
    for id in ids {
        set.push(&[Value::from(id)]);
    }
    tx.execute(
        "{delete from purchase_order AS o join set(id INT) AS s on o.id = s.id}",
        &[Value::from(&set)],
    )?;
    Ok(())
}

/// The lines of an order, as JSON, if it is this customer's.
pub(crate) fn items(tx: &mut Tx<'_>, id: u64, customer_id: u64) -> Result<Option<String>, Error> {
    tx.query_opt(
        "SELECT items FROM purchase_order WHERE id = ? AND customer_id = ?",
        &[Value::from(id), Value::from(customer_id)],
        |row| row.get(0),
    )
}

//! The SQL of orders, one function a question.

use db::{Error, Set, Tx, Value};
use wire::time::UnixMillis;

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

/// An order that was created.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Order {
    pub(crate) customer_id: u64,
    /// The lines, as JSON.
    pub(crate) items: String,
    pub(crate) created_at: UnixMillis,
}

/// An order, whoever's it is.
pub(crate) fn by_id(tx: &mut Tx<'_>, id: u64) -> Result<Option<Order>, Error> {
    tx.query_opt(
        "SELECT customer_id, items, created_at FROM purchase_order WHERE id = ?",
        &[Value::from(id)],
        |row| Ok(Order { customer_id: row.get(0)?, items: row.get(1)?, created_at: row.get(2)? }),
    )
}

#[cfg(test)]
mod tests {
    use testdb::TestDb;

    use super::*;
    use crate::MIGRATIONS;

    testdb::on_both! {
        #[tokio::test]
        orders_are_inserted_found_and_deleted;
    }

    async fn orders_are_inserted_found_and_deleted(at: &TestDb) {
        let db = at.open(MIGRATIONS);
        let order = |id| NewOrder { id, customer_id: 7, items: format!("[[{id},2,3]]"), created_at: 9 };
        db.write(move |tx| insert(tx, (1..=3).map(order))).await.expect("orders");
        let again = db.write(move |tx| insert(tx, [4, 2].map(order).into_iter())).await;
        assert!(again.as_ref().is_err_and(|error| error.violates("purchase_order.id")), "{again:?}");
        db.write(|tx| delete(tx, [1, 3, 99].into_iter())).await.expect("deleted");
        let mut found = Vec::new();
        for id in 1..=4 {
            let order = db.read(move |tx| by_id(tx, id)).await.expect("an answer");
            found.push(order.map(|order| (order.customer_id, order.items)));
        }
        assert_eq!(found, [None, Some((7, "[[2,2,3]]".to_owned())), None, None]);
    }
}

//! The SQL of payments, one function a question.

use db::{Error, Set, Tx, Value};

/// A payment to be taken.
pub(crate) struct NewPayment<'a> {
    pub(crate) id: u64,
    pub(crate) customer_id: u64,
    pub(crate) currency_code: &'a str,
    pub(crate) amount: i64,
    pub(crate) created_at: u64,
}

/// A payment that was taken.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Payment {
    pub(crate) customer_id: u64,
    pub(crate) currency_code: String,
    pub(crate) amount: i64,
}

pub(crate) fn insert<'a>(
    tx: &mut Tx<'_>,
    payments: impl Iterator<Item = NewPayment<'a>>,
) -> Result<(), Error> {
    let mut set = Set::new();
    for payment in payments {
        set.push(&[
            Value::from(payment.id),
            Value::from(payment.customer_id),
            Value::from(payment.currency_code),
            Value::from(payment.amount),
            Value::from(payment.created_at),
        ]);
    }
    if set.is_empty() {
        return Ok(());
    }
    tx.execute(
        "{insert into payment (id, customer_id, currency_code, amount, created_at)
          from set(id INT, customer_id INT, currency_code TEXT, amount INT, created_at INT) AS s
          values (s.id, s.customer_id, s.currency_code, s.amount, s.created_at)}",
        &[Value::from(&set)],
    )?;
    Ok(())
}

/// A payment, whoever's it is.
pub(crate) fn by_id(tx: &mut Tx<'_>, id: u64) -> Result<Option<Payment>, Error> {
    tx.query_opt(
        "SELECT customer_id, currency_code, amount FROM payment WHERE id = ?",
        &[Value::from(id)],
        |row| Ok(Payment { customer_id: row.get(0)?, currency_code: row.get(1)?, amount: row.get(2)? }),
    )
}

#[cfg(test)]
mod tests {
    use testdb::TestDb;

    use super::*;
    use crate::MIGRATIONS;

    testdb::on_both! {
        #[tokio::test]
        payments_are_inserted_and_found;
    }

    async fn payments_are_inserted_and_found(at: &TestDb) {
        let db = at.open(MIGRATIONS);
        let payment =
            |id, amount| NewPayment { id, customer_id: 7, currency_code: "EUR", amount, created_at: 9 };
        db.write(move |tx| insert(tx, [payment(1, 0), payment(2, i64::MAX)].into_iter()))
            .await
            .expect("payments");
        db.write(|tx| insert(tx, std::iter::empty())).await.expect("nothing is nothing");
        let negative = db.write(move |tx| insert(tx, [payment(3, 5), payment(4, -1)].into_iter())).await;
        assert!(matches!(negative, Err(Error::Sql { .. })), "{negative:?}");
        let mut found = Vec::new();
        for id in 1..=3 {
            let payment = db.read(move |tx| by_id(tx, id)).await.expect("an answer");
            found.push(payment.map(|payment| (payment.customer_id, payment.currency_code, payment.amount)));
        }
        assert_eq!(found, [Some((7, "EUR".to_owned(), 0)), Some((7, "EUR".to_owned(), i64::MAX)), None]);
    }
}

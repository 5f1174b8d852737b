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
pub(crate) struct Payment {
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

/// A payment, if it is this customer's.
pub(crate) fn by_id(tx: &mut Tx<'_>, id: u64, customer_id: u64) -> Result<Option<Payment>, Error> {
    tx.query_opt(
        "SELECT currency_code, amount FROM payment WHERE id = ? AND customer_id = ?",
        &[Value::from(id), Value::from(customer_id)],
        |row| Ok(Payment { currency_code: row.get(0)?, amount: row.get(1)? }),
    )
}

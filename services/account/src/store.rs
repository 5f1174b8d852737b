//! The SQL of customers and refresh tokens, one function a question.

use db::{Db, Error, Tx, Value};

use crate::model::{Person, Shipping};
use crate::tokens::{Known, NewToken, TokenHash, Verdict, judge};

/// The database behind its questions.
pub(crate) struct Store(Db);

/// A customer to be created, with the refresh family of its sign-up.
#[derive(Clone)]
pub(crate) struct SignUp {
    pub(crate) customer_id: u64,
    pub(crate) family_id: u64,
    pub(crate) person: Person,
    pub(crate) shipping: Shipping,
    pub(crate) password_hash: String,
    pub(crate) token: NewToken,
    /// Unix seconds.
    pub(crate) now: u64,
}

/// Who logs in, and what proves it.
pub(crate) struct Credentials {
    pub(crate) customer_id: u64,
    pub(crate) password_hash: String,
}

/// A stored name.
pub(crate) struct StoredPerson {
    pub(crate) firstname: String,
    pub(crate) lastname: String,
    pub(crate) email: String,
}

/// A stored address.
pub(crate) struct StoredShipping {
    pub(crate) address: String,
    pub(crate) phone_number: String,
}

/// Whether an error says that the e-mail address or the phone number is taken.
pub(crate) fn is_duplicate(error: &Error) -> bool {
    error.violates("customer.email_key") || error.violates("customer.phone_key")
}

impl Store {
    pub(crate) fn new(db: Db) -> Store {
        Store(db)
    }

    /// Creates the customer and its first refresh family, both or neither.
    pub(crate) async fn sign_up(&self, new: SignUp) -> Result<(), Error> {
        self.0
            .write(move |tx| {
                insert_customer(tx, &new)?;
                insert_family(tx, new.family_id, new.customer_id, &new.token)
            })
            .await
    }

    pub(crate) async fn credentials(&self, email_key: String) -> Result<Option<Credentials>, Error> {
        self.0
            .read(move |tx| {
                tx.query_opt(
                    "SELECT id, password_hash FROM customer WHERE email_key = ?",
                    &[Value::from(&email_key)],
                    |row| Ok(Credentials { customer_id: row.get(0)?, password_hash: row.get(1)? }),
                )
            })
            .await
    }

    /// Begins a refresh family, for a login.
    pub(crate) async fn begin_family(
        &self,
        family_id: u64,
        customer_id: u64,
        token: NewToken,
    ) -> Result<(), Error> {
        self.0.write(move |tx| insert_family(tx, family_id, customer_id, &token)).await
    }

    /// Judges a presented refresh token and carries the verdict out. A refusal is an `Ok`: what it changed
    /// must be committed.
    pub(crate) async fn rotate(
        &self,
        presented: TokenHash,
        successor: NewToken,
        now: u64,
    ) -> Result<Verdict, Error> {
        self.0
            .write(move |tx| {
                let verdict = judge(find_token(tx, &presented)?, now);
                match verdict {
                    Verdict::Rotate { family_id, .. } => {
                        spend(tx, &presented, now)?;
                        insert_token(tx, family_id, &successor)?;
                        extend_family(tx, family_id, successor.expires_at)?;
                    }
                    Verdict::Reuse { family_id } => revoke(tx, family_id, now)?,
                    Verdict::Expired | Verdict::Invalid => {}
                }
                Ok(verdict)
            })
            .await
    }

    /// Revokes the token's family if it is the customer's own; tells whether it is. A family that was
    /// revoked before stays so.
    pub(crate) async fn log_out(
        &self,
        presented: TokenHash,
        customer_id: u64,
        now: u64,
    ) -> Result<bool, Error> {
        self.0
            .write(move |tx| {
                let own = find_token(tx, &presented)?.filter(|token| token.customer_id == customer_id);
                if let Some(token) = own {
                    revoke(tx, token.family_id, now)?;
                }
                Ok(own.is_some())
            })
            .await
    }

    pub(crate) async fn person(&self, customer_id: u64) -> Result<Option<StoredPerson>, Error> {
        self.0
            .read(move |tx| {
                tx.query_opt(
                    "SELECT firstname, lastname, email FROM customer WHERE id = ?",
                    &[Value::from(customer_id)],
                    |row| {
                        Ok(StoredPerson { firstname: row.get(0)?, lastname: row.get(1)?, email: row.get(2)? })
                    },
                )
            })
            .await
    }

    pub(crate) async fn shipping(&self, customer_id: u64) -> Result<Option<StoredShipping>, Error> {
        self.0
            .read(move |tx| {
                tx.query_opt(
                    "SELECT address, phone_number FROM customer WHERE id = ?",
                    &[Value::from(customer_id)],
                    |row| Ok(StoredShipping { address: row.get(0)?, phone_number: row.get(1)? }),
                )
            })
            .await
    }

    /// Tells whether there is such a customer.
    pub(crate) async fn set_person(&self, customer_id: u64, person: Person) -> Result<bool, Error> {
        self.0
            .write(move |tx| {
                let changed = tx.execute(
                    "UPDATE customer SET firstname = ?, lastname = ?, email = ?, email_key = ? WHERE id = ?",
                    &[
                        Value::from(&person.firstname),
                        Value::from(&person.lastname),
                        Value::from(person.email.text()),
                        Value::from(person.email.key()),
                        Value::from(customer_id),
                    ],
                )?;
                Ok(changed == 1)
            })
            .await
    }

    /// Tells whether there is such a customer.
    pub(crate) async fn set_shipping(&self, customer_id: u64, shipping: Shipping) -> Result<bool, Error> {
        self.0
            .write(move |tx| {
                let changed = tx.execute(
                    "UPDATE customer SET address = ?, phone_number = ?, phone_key = ? WHERE id = ?",
                    &[
                        Value::from(&shipping.address),
                        Value::from(shipping.phone.text()),
                        Value::from(shipping.phone.key()),
                        Value::from(customer_id),
                    ],
                )?;
                Ok(changed == 1)
            })
            .await
    }

    /// Deletes at most `max_rows` expired tokens, and as many expired families without tokens.
    pub(crate) async fn purge(&self, now: u64, max_rows: u32) -> Result<u64, Error> {
        self.0
            .write(move |tx| {
                let bounds = [Value::from(now), Value::from(max_rows)];
                let tokens = tx.execute(
                    "DELETE FROM refresh_token WHERE token_hash IN
                     (SELECT token_hash FROM refresh_token WHERE expires_at <= ? ORDER BY expires_at LIMIT ?)",
                    &bounds,
                )?;
                let families = tx.execute(
                    "DELETE FROM refresh_family WHERE id IN
                     (SELECT f.id FROM refresh_family f WHERE f.expires_at <= ?
                      AND NOT EXISTS (SELECT 1 FROM refresh_token t WHERE t.family_id = f.id)
                      ORDER BY f.expires_at LIMIT ?)",
                    &bounds,
                )?;
                Ok(tokens.max(families))
            })
            .await
    }
}

fn insert_customer(tx: &mut Tx<'_>, new: &SignUp) -> Result<(), Error> {
    tx.execute(
        "INSERT INTO customer (id, firstname, lastname, email, email_key, address, phone_number, phone_key,
                               password_hash, created_at)
         VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
        &[
            Value::from(new.customer_id),
            Value::from(&new.person.firstname),
            Value::from(&new.person.lastname),
            Value::from(new.person.email.text()),
            Value::from(new.person.email.key()),
            Value::from(&new.shipping.address),
            Value::from(new.shipping.phone.text()),
            Value::from(new.shipping.phone.key()),
            Value::from(&new.password_hash),
            Value::from(new.now),
        ],
    )?;
    Ok(())
}

fn insert_family(tx: &mut Tx<'_>, family_id: u64, customer_id: u64, token: &NewToken) -> Result<(), Error> {
    tx.execute(
        "INSERT INTO refresh_family (id, customer_id, expires_at) VALUES (?, ?, ?)",
        &[Value::from(family_id), Value::from(customer_id), Value::from(token.expires_at)],
    )?;
    insert_token(tx, family_id, token)
}

fn insert_token(tx: &mut Tx<'_>, family_id: u64, token: &NewToken) -> Result<(), Error> {
    tx.execute(
        "INSERT INTO refresh_token (token_hash, family_id, expires_at) VALUES (?, ?, ?)",
        &[Value::Blob(&token.hash.0), Value::from(family_id), Value::from(token.expires_at)],
    )?;
    Ok(())
}

/// The token and its family, locked where the database has row locks: of two that present it at once, the
/// second sees what the first did.
fn find_token(tx: &mut Tx<'_>, hash: &TokenHash) -> Result<Option<Known>, Error> {
    tx.query_opt(
        "SELECT f.id, f.customer_id, t.expires_at, t.spent_at IS NOT NULL, f.revoked_at IS NOT NULL
         FROM refresh_token t JOIN refresh_family f ON f.id = t.family_id WHERE t.token_hash = ? {for update}",
        &[Value::Blob(&hash.0)],
        |row| {
            Ok(Known {
                family_id: row.get(0)?,
                customer_id: row.get(1)?,
                expires_at: row.get(2)?,
                spent: row.get(3)?,
                revoked: row.get(4)?,
            })
        },
    )
}

fn spend(tx: &mut Tx<'_>, hash: &TokenHash, now: u64) -> Result<(), Error> {
    tx.execute(
        "UPDATE refresh_token SET spent_at = ? WHERE token_hash = ?",
        &[Value::from(now), Value::Blob(&hash.0)],
    )?;
    Ok(())
}

fn extend_family(tx: &mut Tx<'_>, family_id: u64, expires_at: u64) -> Result<(), Error> {
    tx.execute(
        "UPDATE refresh_family SET expires_at = ? WHERE id = ?",
        &[Value::from(expires_at), Value::from(family_id)],
    )?;
    Ok(())
}

fn revoke(tx: &mut Tx<'_>, family_id: u64, now: u64) -> Result<(), Error> {
    tx.execute(
        "UPDATE refresh_family SET revoked_at = ? WHERE id = ? AND revoked_at IS NULL",
        &[Value::from(now), Value::from(family_id)],
    )?;
    Ok(())
}

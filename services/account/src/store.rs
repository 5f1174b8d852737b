//! The SQL of customers and refresh tokens, one function a question.

use std::time::Duration;

use cache::life::SETTLE;
use cache::record::{Reader, Record, Writer};
use cache::{Fenced, Looked};
use db::{Db, Error, Set, Tx, Value};
use tokio::time::Instant;

use crate::model::{Person, Shipping};
use crate::tokens::{Known, NewToken, TokenHash, Verdict, judge};

/// How long a change waits, at most, until those who keep copies have given them up.
const PUT_OFF_FOR: Duration = SETTLE.saturating_mul(3);
/// How often it is tried meanwhile.
const PUT_OFF_STEP: Duration = Duration::from_millis(50);

/// The database behind its questions.
pub(crate) struct Store {
    db: Db,
    /// Copies of customers that the replicas share; none where nobody else works on the database.
    copies: Option<Fenced<StoredCustomer>>,
}

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

/// What is stored of a customer, without credentials.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct StoredCustomer {
    pub(crate) firstname: String,
    pub(crate) lastname: String,
    pub(crate) email: String,
    pub(crate) address: String,
    pub(crate) phone_number: String,
}

impl Record for StoredCustomer {
    const FORMAT: u8 = 1;

    fn write(&self, to: &mut Writer) {
        let StoredCustomer { firstname, lastname, email, address, phone_number } = self;
        for text in [firstname, lastname, email, address, phone_number] {
            to.text(text);
        }
    }

    fn read(from: &mut Reader<'_>) -> Option<StoredCustomer> {
        Some(StoredCustomer {
            firstname: from.text()?,
            lastname: from.text()?,
            email: from.text()?,
            address: from.text()?,
            phone_number: from.text()?,
        })
    }
}

/// Whether an error says that the e-mail address or the phone number is taken.
pub(crate) fn is_duplicate(error: &Error) -> bool {
    error.violates("customer.email_key") || error.violates("customer.phone_key")
}

impl Store {
    pub(crate) fn new(db: Db, copies: Option<Fenced<StoredCustomer>>) -> Store {
        Store { db, copies }
    }

    /// Creates the customer and its first refresh family, both or neither.
    pub(crate) async fn sign_up(&self, new: SignUp) -> Result<(), Error> {
        self.db
            .write(move |tx| {
                insert_customer(tx, &new)?;
                insert_family(tx, new.family_id, new.customer_id, &new.token)
            })
            .await
    }

    pub(crate) async fn credentials(&self, email_key: String) -> Result<Option<Credentials>, Error> {
        self.db
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
        self.db.write(move |tx| insert_family(tx, family_id, customer_id, &token)).await
    }

    /// Judges a presented refresh token and carries the verdict out. A refusal is an `Ok`: what it changed
    /// must be committed.
    pub(crate) async fn rotate(
        &self,
        presented: TokenHash,
        successor: NewToken,
        now: u64,
    ) -> Result<Verdict, Error> {
        self.db
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
        self.db
            .write(move |tx| {
                let own = find_token(tx, &presented)?.filter(|token| token.customer_id == customer_id);
                if let Some(token) = own {
                    revoke(tx, token.family_id, now)?;
                }
                Ok(own.is_some())
            })
            .await
    }

    /// What is stored of a customer. That there is none is never remembered.
    pub(crate) async fn customer(&self, id: u64) -> Result<Option<StoredCustomer>, Error> {
        let Some(copies) = &self.copies else {
            return Ok(self.db.read(move |tx| find_customer(tx, id)).await?.map(|(_, customer)| customer));
        };
        let ticket = match copies.look(id).await {
            Looked::Found(customer) => return Ok(Some(customer)),
            Looked::Ask(ticket) => ticket,
        };
        let found = self.db.read(move |tx| find_customer(tx, id)).await?;
        Ok(found.map(|(version, customer)| {
            copies.keep(ticket, id, version, &customer);
            customer
        }))
    }

    /// Tells whether there is such a customer.
    pub(crate) async fn set_person(&self, customer_id: u64, person: Person) -> Result<bool, Error> {
        self.change(customer_id, move |tx| {
            tx.execute(
                "UPDATE customer SET firstname = ?, lastname = ?, email = ?, email_key = ?, version = version + 1
                 WHERE id = ?",
                &[
                    Value::from(&person.firstname),
                    Value::from(&person.lastname),
                    Value::from(person.email.text()),
                    Value::from(person.email.key()),
                    Value::from(customer_id),
                ],
            )
        })
        .await
    }

    /// Tells whether there is such a customer.
    pub(crate) async fn set_shipping(&self, customer_id: u64, shipping: Shipping) -> Result<bool, Error> {
        self.change(customer_id, move |tx| {
            tx.execute(
                "UPDATE customer SET address = ?, phone_number = ?, phone_key = ?, version = version + 1
                 WHERE id = ?",
                &[
                    Value::from(&shipping.address),
                    Value::from(shipping.phone.text()),
                    Value::from(shipping.phone.key()),
                    Value::from(customer_id),
                ],
            )
        })
        .await
    }

    /// Changes a customer, and tells those who keep copies before it is committed. Tells whether there is such a customer.
    async fn change(
        &self,
        id: u64,
        update: impl Fn(&mut Tx<'_>) -> Result<u64, Error> + Clone + Send + 'static,
    ) -> Result<bool, Error> {
        let until = Instant::now() + PUT_OFF_FOR;
        loop {
            let (update, copies) = (update.clone(), self.copies.clone());
            let changed = self.db.write(move |tx| {
                if update(tx)? == 0 {
                    return Ok(false);
                }
                if let (Some(copies), Some((version, _))) = (&copies, find_customer(tx, id)?) {
                    copies.announce(tx, std::iter::once((id, version)))?;
                }
                Ok(true)
            });
            match changed.await {
                Err(Error::PutOff { .. }) if Instant::now() < until => tokio::time::sleep(PUT_OFF_STEP).await,
                other => return other,
            }
        }
    }

    /// Deletes at most `max_rows` expired tokens, and as many expired families without tokens.
    pub(crate) async fn purge(&self, now: u64, max_rows: u32) -> Result<u64, Error> {
        self.db
            .write(move |tx| {
                let tokens = purge_tokens(tx, now, max_rows)?;
                let families = purge_families(tx, now, max_rows)?;
                Ok(tokens.max(families))
            })
            .await
    }
}

/// A customer, with the version of the row.
fn find_customer(tx: &mut Tx<'_>, id: u64) -> Result<Option<(u64, StoredCustomer)>, Error> {
    tx.query_opt(
        "SELECT version, firstname, lastname, email, address, phone_number FROM customer WHERE id = ?",
        &[Value::from(id)],
        |row| {
            let customer = StoredCustomer {
                firstname: row.get(1)?,
                lastname: row.get(2)?,
                email: row.get(3)?,
                address: row.get(4)?,
                phone_number: row.get(5)?,
            };
            Ok((row.get(0)?, customer))
        },
    )
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

/// Looks first and deletes by key: MySQL takes no limit on what it reads from the table that it deletes from. By key, so that two
/// replicas that purge at once lock in one order.
fn purge_tokens(tx: &mut Tx<'_>, now: u64, max_rows: u32) -> Result<u64, Error> {
    let mut expired = tx.query(
        "SELECT token_hash FROM refresh_token WHERE expires_at <= ? ORDER BY expires_at LIMIT ?",
        &[Value::from(now), Value::from(max_rows)],
        |row| row.get::<Vec<u8>>(0),
    )?;
    expired.sort_unstable();
    let mut set = Set::new();
    for hash in &expired {
        set.push(&[Value::from(hash)]);
    }
    tx.execute(
        "{delete from refresh_token AS t join set(hash BLOB) AS s on t.token_hash = s.hash}",
        &[Value::from(&set)],
    )
}

fn purge_families(tx: &mut Tx<'_>, now: u64, max_rows: u32) -> Result<u64, Error> {
    let mut expired = tx.query(
        "SELECT f.id FROM refresh_family f WHERE f.expires_at <= ?
         AND NOT EXISTS (SELECT 1 FROM refresh_token t WHERE t.family_id = f.id)
         ORDER BY f.expires_at LIMIT ?",
        &[Value::from(now), Value::from(max_rows)],
        |row| row.get::<u64>(0),
    )?;
    expired.sort_unstable();
    let mut set = Set::new();
    for id in expired {
        set.push(&[Value::from(id)]);
    }
    tx.execute(
        "{delete from refresh_family AS f join set(id INT) AS s on f.id = s.id AND f.expires_at <= ?}",
        &[Value::from(&set), Value::from(now)],
    )
}

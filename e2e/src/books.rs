//! What all databases say at one moment, and the invariants of the design, checked on it.
//!
//! The numbers are those of the design: I1 stock, I2 accepted, I3 effects and replies, I4 all or nothing, I5 money, I6
//! every purchase ends, I12 events. To be asked when all is quiet.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use bytes::Bytes;
use db::{Db, Error, Row};
use saga::{Outcome, Path};
use shop::purchase::Purchase;
use testkit::until;
use wire::messages::{Recorded, decode_path};

use crate::api::{Event, is_terminal};
use crate::{LIMIT, Shop};

/// A purchase's state as a number, as it is in the database.
const SUCCEEDED: u8 = 1;
const NEEDS_OPERATOR: u8 = 4;

/// One purchase's row.
#[derive(Debug)]
struct Accepted {
    customer_id: u64,
    state: u8,
    input: Purchase,
    next_wake_at: Option<u64>,
    tries: u32,
    finished_no: Option<u64>,
    path: Option<Path>,
}

/// A saga, a step of it, and 0 for the reply to its action or 1 for that to its compensation.
type ReplyKey = (u64, u8, u8);

/// What all databases say.
#[derive(Debug)]
pub struct Books {
    stock: BTreeMap<u64, i64>,
    initial_stock: BTreeMap<u64, i64>,
    orders: BTreeMap<u64, u64>,
    payments: BTreeMap<u64, (u64, i64)>,
    purchases: BTreeMap<u64, Accepted>,
    replies: BTreeMap<ReplyKey, Recorded>,
    accepted: BTreeMap<u64, u64>,
    max_keys_of_one_customer: u64,
}

async fn read<T: Send + 'static>(
    db: &Db,
    sql: &'static str,
    each: impl FnMut(&Row<'_>) -> Result<T, Error> + Send + 'static,
) -> Vec<T> {
    db.read(move |tx| tx.query(sql, &[], each)).await.unwrap()
}

async fn replies(db: &Db) -> Vec<(ReplyKey, Recorded)> {
    let sql = "SELECT saga, step, phase, reply FROM saga_barrier";
    let rows = read(db, sql, |row| Ok(((row.get(0)?, row.get(1)?, row.get(2)?), row.get::<Vec<u8>>(3)?)));
    let decoded = |(key, reply): (ReplyKey, Vec<u8>)| (key, Recorded::decode(&Bytes::from(reply)).unwrap());
    rows.await.into_iter().map(decoded).collect()
}

impl Books {
    /// Reads them.
    pub async fn of(shop: &Shop) -> Books {
        let databases = &shop.databases;
        let mut all_replies = BTreeMap::new();
        for db in [&databases.product, &databases.order, &databases.payment] {
            all_replies.extend(replies(db).await);
        }
        let stock = read(&databases.product, "SELECT id, inventory FROM product", |row| {
            Ok((row.get(0)?, row.get(1)?))
        });
        let orders = read(&databases.order, "SELECT id, customer_id FROM purchase_order", |row| {
            Ok((row.get(0)?, row.get(1)?))
        });
        let payments = read(&databases.payment, "SELECT id, customer_id, amount FROM payment", |row| {
            Ok((row.get(0)?, (row.get(1)?, row.get(2)?)))
        });
        let purchases = read(
            &databases.purchase,
            "SELECT id, customer_id, state, input, next_wake_at, finished_no, path, tries FROM purchase",
            |row| {
                let input = Purchase::from_input(&row.get::<Vec<u8>>(3)?.into()).unwrap();
                let path = row.get::<Option<Vec<u8>>>(6)?.map(|path| decode_path(&path).unwrap());
                let (customer_id, state) = (row.get(1)?, row.get(2)?);
                let (next_wake_at, finished_no, tries) = (row.get(4)?, row.get(5)?, row.get(7)?);
                Ok((
                    row.get(0)?,
                    Accepted { customer_id, state, input, next_wake_at, tries, finished_no, path },
                ))
            },
        );
        let keys = read(
            &databases.purchase,
            "SELECT COUNT(*) FROM purchase WHERE idempotency_key IS NOT NULL GROUP BY customer_id, idempotency_key",
            |row| row.get(0),
        );
        let initial_stock = shop.initial_stock.lock().unwrap().clone();
        let accepted = shop.accepted.lock().unwrap().clone();
        Books {
            stock: stock.await.into_iter().collect(),
            initial_stock,
            orders: orders.await.into_iter().collect(),
            payments: payments.await.into_iter().collect(),
            purchases: purchases.await.into_iter().collect(),
            replies: all_replies,
            accepted,
            max_keys_of_one_customer: keys.await.into_iter().max().unwrap_or(0),
        }
    }

    /// The purchases that were accepted.
    pub fn purchases(&self) -> BTreeSet<u64> {
        self.purchases.keys().copied().collect()
    }

    /// The purchases that succeeded.
    pub fn succeeded(&self) -> BTreeSet<u64> {
        let succeeded = self.purchases.iter().filter(|(_, accepted)| accepted.state == SUCCEEDED);
        succeeded.map(|(id, _)| *id).collect()
    }

    /// The purchases that are left to an operator.
    pub fn needs_operator(&self) -> BTreeSet<u64> {
        let left = self.purchases.iter().filter(|(_, accepted)| accepted.state == NEEDS_OPERATOR);
        left.map(|(id, _)| *id).collect()
    }

    /// How often the reconciler has tried all purchases together.
    pub fn tries(&self) -> u32 {
        self.purchases.values().map(|accepted| accepted.tries).sum()
    }

    /// When the first of the open purchases is due; the end of time when none is open.
    pub fn next_wake_at(&self) -> u64 {
        self.purchases.values().filter_map(|accepted| accepted.next_wake_at).min().unwrap_or(u64::MAX)
    }

    /// How many replies are recorded for this purchase, by all participants.
    pub fn replies_of(&self, id: u64) -> usize {
        self.replies.keys().filter(|(saga, _, _)| *saga == id).count()
    }

    /// Whether an order stands under this purchase's id.
    pub fn has_order(&self, id: u64) -> bool {
        self.orders.contains_key(&id)
    }

    /// Whether a payment stands under this purchase's id.
    pub fn has_payment(&self, id: u64) -> bool {
        self.payments.contains_key(&id)
    }

    /// What was recorded as the reply to a step's action (phase 0) or compensation (phase 1).
    pub fn reply(&self, id: u64, step: u8, phase: u8) -> Option<&Recorded> {
        self.replies.get(&(id, step, phase))
    }

    /// Whether stock is reserved for this purchase.
    pub fn has_reservation(&self, id: u64) -> bool {
        let action = self.reply(id, 0, 0).map(|reply| &reply.outcome);
        matches!(action, Some(Outcome::Done(_))) && self.reply(id, 0, 1).is_none()
    }

    /// Checks I1 to I6 on purchases that have all ended or are left to an operator.
    ///
    /// # Panics
    /// With the invariant that does not hold.
    pub fn check(&self) {
        self.check_accepted();
        self.check_stock();
        for (id, accepted) in &self.purchases {
            if accepted.state != NEEDS_OPERATOR {
                self.check_all_or_nothing(*id, accepted);
                self.check_path(*id, accepted);
            }
        }
    }

    fn check_accepted(&self) {
        for (id, customer_id) in &self.accepted {
            let row = self.purchases.get(id).unwrap_or_else(|| panic!("I2: purchase {id} was lost"));
            assert_eq!(row.customer_id, *customer_id, "I2: purchase {id} is somebody else's");
        }
        assert!(self.max_keys_of_one_customer <= 1, "I2: two purchases under one key");
        let mut numbers = BTreeSet::new();
        for (id, accepted) in &self.purchases {
            assert_eq!(accepted.next_wake_at, None, "I6: purchase {id} is still open: {accepted:?}");
            let ended = accepted.finished_no.is_some_and(|number| numbers.insert(number));
            assert!(ended || accepted.state == NEEDS_OPERATOR, "I6: purchase {id} has no end of its own");
        }
    }

    fn check_stock(&self) {
        let mut left = self.initial_stock.clone();
        for (_, accepted) in self.purchases.iter().filter(|(id, accepted)| {
            accepted.state == SUCCEEDED || accepted.state == NEEDS_OPERATOR && self.has_reservation(**id)
        }) {
            for item in &accepted.input.items {
                *left.get_mut(&item.product_id).unwrap() -= item.amount;
            }
        }
        assert_eq!(self.stock, left, "I1: what is in stock is not what was not sold");
        assert!(self.stock.values().all(|left| *left >= 0), "I1: negative stock");
    }

    fn check_all_or_nothing(&self, id: u64, accepted: &Accepted) {
        let committed = accepted.state == SUCCEEDED;
        assert_eq!(self.has_order(id), committed, "I4: the order of purchase {id}: {accepted:?}");
        assert_eq!(self.has_payment(id), committed, "I4: the payment of purchase {id}: {accepted:?}");
        if committed {
            let sum: i64 = accepted.input.items.iter().map(|item| item.amount * item.price).sum();
            assert_eq!(self.payments[&id], (accepted.customer_id, sum), "I5: the payment of purchase {id}");
        }
    }

    /// The history of a purchase is what its participants have recorded, and nothing else. (Where they still know it: what
    /// has been purged cannot be compared.)
    fn check_path(&self, id: u64, accepted: &Accepted) {
        let path = accepted.path.as_ref().unwrap_or_else(|| panic!("I6: purchase {id} has no history"));
        for entry in path.entries() {
            let phase = u8::from(entry.outcome == Outcome::Compensated);
            if let Some(recorded) = self.reply(id, entry.step.0, phase) {
                let told = Recorded { outcome: entry.outcome.clone(), at: entry.at };
                assert_eq!(*recorded, told, "I3: step {} of purchase {id}", entry.step);
            }
        }
    }
}

impl Shop {
    /// Waits until no purchase is open.
    pub async fn quiet(&self) {
        until("all purchases have ended", LIMIT, async || self.open_purchases().await == 0).await;
    }

    /// Waits until no purchase is open, turning the clock while it waits: whatever is due comes up.
    pub async fn quiet_by_turning(&self, by: Duration) {
        until("all purchases have ended", LIMIT, async || {
            self.clock.turn(by);
            self.open_purchases().await == 0
        })
        .await;
    }

    /// How many purchases are open.
    pub async fn open_purchases(&self) -> u64 {
        let sql = "SELECT COUNT(*) FROM purchase WHERE next_wake_at IS NOT NULL";
        read(&self.databases.purchase, sql, |row| row.get(0)).await[0]
    }

    /// Waits until all is quiet, and checks all invariants; those of the events on a stream that is read from its
    /// beginning, for each customer.
    pub async fn check(&self) -> Books {
        self.quiet().await;
        let books = Books::of(self).await;
        books.check();
        let mut of_customer: BTreeMap<u64, Vec<u64>> = BTreeMap::new();
        for (id, accepted) in &books.purchases {
            if accepted.state != NEEDS_OPERATOR {
                of_customer.entry(accepted.customer_id).or_default().push(*id);
            }
        }
        let api = self.api();
        for (customer_id, ids) in of_customer {
            let customer = self.customer(customer_id);
            let mut watch = api.watch(&customer, Some("0")).await.unwrap();
            let events = watch.until_ended(&ids).await;
            assert_eq!(watch.ready().await, [], "I12: events behind the last one");
            check_events(&events, &ids);
            for id in ids {
                let purchase = api.purchase(&customer, id).await;
                let told = events.iter().filter(|event| event.purchase_id() == id);
                let told: Vec<_> = told.map(Event::what).collect();
                let steps = purchase["steps"].as_array().unwrap().iter();
                let steps: Vec<_> = steps
                    .map(|step| (step["step"].as_str().unwrap(), step["status"].as_str().unwrap()))
                    .collect();
                assert_eq!(told, steps, "I12: the events of purchase {id} are its steps");
            }
        }
        books
    }
}

/// I12: exactly these purchases, each from its first event to its one terminal event, none missing, none twice.
///
/// # Panics
/// Where that is not so.
pub fn check_events(events: &[Event], ids: &[u64]) {
    let mut histories: BTreeMap<u64, Vec<&Event>> = BTreeMap::new();
    for event in events {
        assert_eq!(event.name, "data");
        histories.entry(event.purchase_id()).or_default().push(event);
    }
    let wanted: BTreeSet<u64> = ids.iter().copied().collect();
    assert_eq!(histories.keys().copied().collect::<BTreeSet<_>>(), wanted, "I12: the purchases of a stream");
    for (id, history) in histories {
        let seqs: Vec<u64> = history.iter().map(|event| event.seq()).collect();
        let expected: Vec<u64> = (1..=history.len() as u64).collect();
        assert_eq!(seqs, expected, "I12: the events of purchase {id}");
        let ends = history.iter().filter(|event| is_terminal(event.what().0, event.what().1)).count();
        assert_eq!(ends, 1, "I12: the ends of purchase {id}");
        let (step, status) = history.last().unwrap().what();
        assert!(is_terminal(step, status), "I12: purchase {id} goes on behind its end");
    }
}

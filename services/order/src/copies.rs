//! Copies of orders, in this process and in Redis: of those whose saga has ended. Before that an order may still be deleted, because the
//! payment is declined; after it, it neither changes nor goes.
//!
//! The purchase service tells the participants below which id every saga has ended, about ten minutes after it has. One replica hears
//! of it and writes it down ([`Mark::EndedBelow`]); all read it there. Ids are in the order of time only where clocks are: one whose clock is
//! behind accepts purchases with ids below that. So an order must also be old: younger ones are
//! those that a saga may still undo, but for one that waits for an operator.

use std::time::Duration;

use cache::mark::{Mark, Watched};
use cache::record::{Reader, Record, Writer};
use cache::{Loaded, Redis};
use db::{Db, Error};
use wire::time::{Clock, UnixMillis};

use crate::store::{self, Order};

/// The copies kept in this process, in bytes.
const LOCAL_BYTES: u64 = 16 << 20;
/// How often the mark is read. It rises once in a while.
const MARK_EVERY: Duration = Duration::from_secs(10);

/// How old an order must be to be kept, in the time of the processes that create them and of this one.
pub const KEPT_FROM_AGE: Duration = Duration::from_secs(60 * 60);

/// Copies of orders. Clones share them.
#[derive(Clone)]
pub struct Copies {
    orders: cache::Copies<Order>,
    ended_below: Watched,
    clock: Clock,
    kept_from_age: Duration,
}

impl Copies {
    /// Copies that the replicas share in Redis, of orders in this database; [`KEPT_FROM_AGE`] where no test is in a hurry. Must be called
    /// on a tokio runtime.
    pub fn new(redis: Redis, db: &Db, clock: Clock, kept_from_age: Duration) -> Copies {
        Copies {
            clock,
            kept_from_age,
            orders: cache::Copies::new(Some(redis), "order", LOCAL_BYTES),
            ended_below: Watched::start(db.clone(), Mark::EndedBelow, MARK_EVERY),
        }
    }

    /// An order, whoever's it is.
    pub(crate) async fn order(&self, db: &Db, id: u64) -> Result<Option<Order>, Error> {
        let is_final = u64::try_from(self.ended_below.value()).is_ok_and(|below| id < below);
        if !is_final {
            return db.read(move |tx| store::by_id(tx, id)).await;
        }
        let load = || async {
            let found = db.read(move |tx| store::by_id(tx, id)).await?;
            let now = self.clock.now();
            Ok(match found {
                None => Loaded::Missing,
                Some(order) if is_old(&order, now, self.kept_from_age) => Loaded::Final(order),
                Some(order) => Loaded::Passing(order),
            })
        };
        Ok(self.orders.get(id, load).await?.map(|order| (*order).clone()))
    }
}

/// One that was created later than now, by another's clock, is not.
fn is_old(order: &Order, now: UnixMillis, from_age: Duration) -> bool {
    now.checked_sub(order.created_at).is_some_and(|age| u128::from(age) >= from_age.as_millis())
}

impl Record for Order {
    const FORMAT: u8 = 2;

    fn write(&self, to: &mut Writer) {
        to.number(self.customer_id);
        to.text(&self.items);
        to.number(self.created_at);
    }

    fn read(from: &mut Reader<'_>) -> Option<Order> {
        Some(Order { customer_id: from.number()?, items: from.text()?, created_at: from.number()? })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_order_is_old_from_an_hour_on_and_not_before_it_was_created() {
        let order = Order { customer_id: 7, items: String::new(), created_at: 5_000 };
        let is_old = |now| is_old(&order, now, KEPT_FROM_AGE);
        assert!(!is_old(4_999) && !is_old(5_000) && !is_old(3_604_999));
        assert!(is_old(3_605_000));
    }
}

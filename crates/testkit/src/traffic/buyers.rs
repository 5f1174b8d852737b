//! Buying: one purchase after the other, with and without a key, and again with the same key.

use std::sync::Arc;

use super::{Address, Cart, Catalogue, Customer, Ledger};
use crate::dice::Dice;

/// What a buyer puts up with, and how many there are.
#[derive(Clone, Copy, Debug)]
pub struct Habits {
    /// 503 with Retry-After is an answer that may come, such as while the disk is full. What has a key is then sent again.
    pub refusals_are_fine: bool,
    /// Purchases that one customer asks for at a time.
    pub buyers_per_customer: usize,
}

impl Default for Habits {
    fn default() -> Habits {
        Habits { refusals_are_fine: false, buyers_per_customer: 3 }
    }
}

/// Out of a hundred purchases, those with a key.
const WITH_KEY_PERCENT: u64 = 70;
/// Out of a hundred answered keys, those that are sent again; and those sent again with another cart.
const REPEAT_PERCENT: u64 = 25;
const MISUSE_PERCENT: u64 = 5;

/// Buys, until nothing new is to be begun. A key is sent again until it is answered, however often the shop dies.
pub async fn buy_until_last_call(
    mut address: Address,
    customer: Customer,
    catalogue: Arc<Catalogue>,
    ledger: Arc<Ledger>,
    mut dice: Dice,
    habits: Habits,
) {
    while address.for_something_new().await.is_some() {
        let ended = ledger.ended.notified();
        if !ledger.has_room(customer.number) {
            tokio::select! {
                () = ended => {}
                _ = address.0.changed() => {}
            }
            continue;
        }
        let cart = catalogue.cart(&mut dice);
        let key = dice.chance(WITH_KEY_PERCENT).then(|| format!("{}-{:016x}", customer.number, dice.throw()));
        let buyer = Buyer { customer: &customer, ledger: &ledger, habits };
        let answered = buyer.buy(&mut address, &cart, key.as_deref()).await;
        if let (Some(_), Some(key)) = (answered, &key) {
            if dice.chance(REPEAT_PERCENT) {
                buyer.buy(&mut address, &cart, Some(key)).await;
            }
            if dice.chance(MISUSE_PERCENT) {
                buyer.misuse(&mut address, &cart, key).await;
            }
        }
    }
}

struct Buyer<'a> {
    customer: &'a Customer,
    ledger: &'a Ledger,
    habits: Habits,
}

impl Buyer<'_> {
    /// The purchase's id. None if the request was refused, or has no key and no answer.
    async fn buy(&self, address: &mut Address, cart: &Cart, key: Option<&str>) -> Option<u64> {
        let Buyer { customer, ledger, habits } = self;
        loop {
            let client = address.for_something_begun().await?;
            match customer.buy(&client, cart, key).await {
                Ok(answer) if answer.status == 201 => {
                    let id = answer.json()["purchase_id"].as_u64().unwrap_or_default();
                    ledger.acknowledge(customer.number, id, key, cart);
                    return Some(id);
                }
                // A gateway lost the replica in the middle of it: as if the connection had broken.
                Ok(answer) if answer.status == 502 => {
                    ledger.unanswered(key);
                    address.moved().await;
                    key?;
                }
                Ok(answer) if answer.status == 503 && habits.refusals_are_fine => {
                    if !answer.headers.contains_key("retry-after") {
                        ledger.fault(format!("a 503 without Retry-After: {}", answer.body));
                    }
                    ledger.refused();
                    key?;
                    address.moved().await;
                }
                Ok(answer) => {
                    let (status, body) = (answer.status, answer.body);
                    ledger.fault(format!("customer {} was answered {status} {body}", customer.number));
                    return None;
                }
                Err(_) => {
                    ledger.unanswered(key);
                    address.moved().await;
                    key?;
                }
            }
        }
    }

    /// The key with another cart must be refused.
    async fn misuse(&self, address: &mut Address, cart: &Cart, key: &str) {
        let Buyer { customer, ledger, .. } = self;
        let mut other = cart.clone();
        other.lines[0].1 += 1;
        let Some(client) = address.for_something_begun().await else { return };
        match customer.buy(&client, &other, Some(key)).await {
            Ok(answer) if answer.status == 422 => {}
            Ok(answer) if answer.status == 503 && self.habits.refusals_are_fine => ledger.refused(),
            Ok(answer) if answer.status == 502 => ledger.unanswered(Some(key)),
            Ok(answer) => {
                let (status, body) = (answer.status, answer.body);
                ledger.fault(format!("I2: key {key:?} with another cart was answered {status} {body}"));
            }
            Err(_) => ledger.unanswered(Some(key)),
        }
    }
}

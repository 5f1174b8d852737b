//! Asking a quiet shop about everything, over its API.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::Value;

use super::ledger::{Bought, Step, Told};
use super::{Catalogue, Customer, Ledger, Product};
use crate::client::{Answer, Client};

/// Purchases that are listed at a time.
const PAGE_PURCHASES: usize = 100;
/// One purchase in so many is asked for with a stranger's token, and one key in so many is sent again.
const SAMPLE: usize = 7;

/// How the purchases ended, as the API tells.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Totals {
    /// Purchases, whether they were acknowledged or not.
    pub purchases: usize,
    /// State SUCCEEDED.
    pub succeeded: usize,
    /// State FAILED.
    pub failed: usize,
    /// State CANCELLED.
    pub cancelled: usize,
}

/// Every purchase of these customers, by its id, as the list has it. None when there is no answer or one is not terminal.
pub async fn all_ended(client: &Client, customers: &[Customer]) -> Option<BTreeSet<u64>> {
    let mut ids = BTreeSet::new();
    for customer in customers {
        for purchase in listed(client, customer).await? {
            let state = purchase["state"].as_str()?;
            if !matches!(state, "SUCCEEDED" | "FAILED" | "CANCELLED") {
                return None;
            }
            ids.insert(purchase["id"].as_u64()?);
        }
    }
    Some(ids)
}

/// Checks I1, I2, I4, I5, I6, I7, I10, I11 and I12 over the API of a shop in which nothing is under way.
///
/// # Panics
/// With every fault that was found, if there is one.
pub async fn audit(
    client: &Client,
    customers: &[Customer],
    catalogue: &Catalogue,
    ledger: &Ledger,
) -> Totals {
    let mut audit = Audit {
        client,
        ledger,
        bought: ledger.bought(),
        told: ledger.all_told(),
        orders_missing: ledger.orders_missing(),
        prices: catalogue.products().map(|product| (product.id, product.price)).collect(),
        sold: BTreeMap::new(),
        totals: Totals::default(),
    };
    let mut listed_ids = BTreeSet::new();
    for (place, customer) in customers.iter().enumerate() {
        let stranger = &customers[(place + 1) % customers.len()];
        let Some(list) = listed(client, customer).await else {
            ledger.fault(format!("I7: the purchases of customer {} cannot be listed", customer.number));
            continue;
        };
        for (count, entry) in list.iter().enumerate() {
            let id = entry["id"].as_u64().unwrap_or_default();
            if !listed_ids.insert(id) {
                ledger.fault(format!("I10: purchase {id} is listed twice"));
            }
            audit.purchase(customer, id, entry).await;
            if count % SAMPLE == 0 && stranger.number != customer.number {
                audit.as_stranger(stranger, id).await;
            }
        }
    }
    for id in audit.bought.keys().filter(|id| !listed_ids.contains(id)) {
        ledger.fault(format!("I2: purchase {id} was answered 201 and is not listed"));
    }
    for id in audit.told.keys().filter(|id| !listed_ids.contains(id)) {
        ledger.fault(format!("I12: events of purchase {id} were sent, and it is not listed"));
    }
    audit.stock(catalogue).await;
    audit.keys(customers).await;
    ledger.assert_no_faults();
    audit.totals
}

async fn listed(client: &Client, customer: &Customer) -> Option<Vec<Value>> {
    let mut all = Vec::new();
    loop {
        let path = format!("/api/purchases?offset={}&size={PAGE_PURCHASES}", all.len());
        let answer = client.get(&path, Some(&customer.token)).await.ok().filter(|it| it.status == 200)?;
        let page = answer.json()["purchases"].as_array()?.clone();
        let last = page.len() < PAGE_PURCHASES;
        all.extend(page);
        if last {
            return Some(all);
        }
    }
}

struct Audit<'a> {
    client: &'a Client,
    ledger: &'a Ledger,
    bought: BTreeMap<u64, Bought>,
    told: BTreeMap<u64, Told>,
    orders_missing: BTreeSet<u64>,
    prices: BTreeMap<u64, i64>,
    sold: BTreeMap<u64, i64>,
    totals: Totals,
}

impl Audit<'_> {
    async fn get(&self, path: &str, customer: &Customer) -> Option<Answer> {
        match self.client.get(path, Some(&customer.token)).await {
            Ok(answer) => Some(answer),
            Err(error) => {
                self.ledger.fault(format!("I7: GET {path}: {error}"));
                None
            }
        }
    }

    /// One purchase with its order and its payment.
    async fn purchase(&mut self, customer: &Customer, id: u64, entry: &Value) {
        let ledger = self.ledger;
        let Some(answer) = self.get(&format!("/api/purchase/{id}"), customer).await else { return };
        if answer.status != 200 {
            return ledger.fault(format!("I7: purchase {id} is listed and answered {}", answer.status));
        }
        let shown = answer.json();
        let state = shown["state"].as_str().unwrap_or_default().to_owned();
        if entry["state"] != shown["state"] || entry["items"] != shown["items"] {
            ledger.fault(format!("purchase {id} is listed as {entry} and shown as {shown}"));
        }
        self.totals.purchases += 1;
        let committed = match state.as_str() {
            "SUCCEEDED" => {
                self.totals.succeeded += 1;
                true
            }
            "FAILED" => {
                self.totals.failed += 1;
                false
            }
            "CANCELLED" => {
                self.totals.cancelled += 1;
                false
            }
            _ => return ledger.fault(format!("I6: purchase {id} has not ended: {state}")),
        };
        if shown["finished_at"].is_null() || committed != shown["reason"].is_null() {
            ledger.fault(format!("purchase {id} has no end or a wrong reason: {shown}"));
        }
        let sums = sums(&shown["items"]);
        if let Some(bought) = self.bought.get(&id)
            && (bought.cart.sums() != sums || bought.customer != customer.number)
        {
            ledger.fault(format!("I2: purchase {id} was {bought:?} and is {shown}"));
        }
        let total: i64 = sums.iter().map(|(product, amount)| amount * self.prices[product]).sum();
        if shown["payment"]["amount"].as_i64() != Some(total) {
            ledger.fault(format!("I5: purchase {id} should cost {total}: {shown}"));
        }
        if committed {
            sums.iter().for_each(|(product, amount)| *self.sold.entry(*product).or_default() += amount);
        }
        self.effects(customer, id, committed, total, &sums).await;
        self.history(id, &shown);
    }

    async fn effects(
        &self,
        customer: &Customer,
        id: u64,
        committed: bool,
        total: i64,
        ordered: &BTreeMap<u64, i64>,
    ) {
        let wanted = if committed { 200 } else { 404 };
        let (order, payment) = (format!("/api/order/{id}"), format!("/api/payment/{id}"));
        let answers = tokio::join!(self.get(&order, customer), self.get(&payment, customer));
        let (Some(order), Some(payment)) = answers else { return };
        if (order.status, payment.status) != (wanted, wanted) {
            let found = (order.status, payment.status);
            return self.ledger.fault(format!(
                "I4: purchase {id}, committed: {committed}; its order and payment are answered {found:?}"
            ));
        }
        if committed {
            if self.orders_missing.contains(&id) {
                self.ledger
                    .fault(format!("I12: the order of purchase {id} was announced before it was there"));
            }
            if sums(&order.json()["purchased_items"]) != *ordered {
                self.ledger.fault(format!("I5: the order of purchase {id} is {}", order.body));
            }
            if payment.json()["amount"].as_i64() != Some(total) {
                self.ledger
                    .fault(format!("I5: the payment of purchase {id} is {}, not {total}", payment.body));
            }
        }
    }

    /// What the stream told is the history, word for word.
    fn history(&self, id: u64, shown: &Value) {
        let text = |step: &Value, field: &str| step[field].as_str().unwrap_or_default().to_owned();
        let step = |step: &Value| Step {
            step: text(step, "step"),
            status: text(step, "status"),
            timestamp: step["timestamp"].as_u64().unwrap_or_default(),
        };
        let history: Vec<Step> = shown["steps"].as_array().into_iter().flatten().map(step).collect();
        match self.told.get(&id) {
            Some(told) if told.ended && told.steps == history => {}
            other => self.ledger.fault(format!(
                "I12: the history of purchase {id} is {history:?}; its stream told {other:?}"
            )),
        }
    }

    /// I11.
    async fn as_stranger(&self, stranger: &Customer, id: u64) {
        for path in [format!("/api/purchase/{id}"), format!("/api/order/{id}"), format!("/api/payment/{id}")]
        {
            match self.get(&path, stranger).await {
                Some(answer) if answer.status == 404 => {}
                other => self.ledger.fault(format!("I11: {path} is shown to a stranger: {other:?}")),
            }
        }
    }

    /// I1, as the API tells.
    async fn stock(&self, catalogue: &Catalogue) {
        for product in catalogue.products() {
            let path = format!("/api/product/{}", product.id);
            let left = match self.client.get(&path, None).await {
                Ok(answer) if answer.status == 200 => answer.json()["inventory"].as_i64(),
                other => return self.ledger.fault(format!("I7: GET {path}: {other:?}")),
            };
            let sold = self.sold.get(&product.id).copied().unwrap_or_default();
            if left != Some(product.stock - sold) {
                let Product { id, stock, .. } = product;
                self.ledger.fault(format!("I1: product {id} has {left:?} left of {stock}, {sold} are sold"));
            }
        }
    }

    /// I2: a key names its purchase for ever.
    async fn keys(&self, customers: &[Customer]) {
        for (key, id) in self.ledger.keys().into_iter().step_by(SAMPLE) {
            let Some(bought) = self.bought.get(&id) else { continue };
            let customer = customers.iter().find(|customer| customer.number == bought.customer);
            let Some(customer) = customer else { continue };
            match customer.buy(self.client, &bought.cart, Some(&key)).await {
                Ok(answer) if answer.status == 201 && answer.json()["purchase_id"].as_u64() == Some(id) => {}
                other => self.ledger.fault(format!("I2: key {key:?} of purchase {id} is answered {other:?}")),
            }
        }
    }
}

fn sums(items: &Value) -> BTreeMap<u64, i64> {
    let mut sums = BTreeMap::new();
    for item in items.as_array().into_iter().flatten() {
        let (product, amount) = (item["product_id"].as_u64(), item["amount"].as_i64());
        *sums.entry(product.unwrap_or_default()).or_default() += amount.unwrap_or_default();
    }
    sums
}

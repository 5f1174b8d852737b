//! Whether it all adds up, asked over the API when nothing is under way.
//!
//! - I1: what is left of a product is what there was, less what committed purchases took; never below zero.
//! - I4: a purchase has an order and a payment if and only if it was committed.
//! - I5: a payment is the sum of amount times price.
//! - I10: no id is given to two purchases.

use std::fmt;
use std::time::{Duration, Instant};

use futures_util::future::join_all;
use http::{HeaderValue, StatusCode};
use serde::{Deserialize, Serialize};

use crate::ask::{Asker, path_of};
use crate::carts::Product;
use crate::desk::Plan;
use crate::ledger::{Entry, Ledger, Sales};

/// Connections that are asked on.
const ASKERS: usize = 16;
/// How long a question is asked again before it has no answer.
const PATIENCE: Duration = Duration::from_secs(10);
/// How long a shop may show a stock that is not the newest.
const STALE: Duration = Duration::from_secs(3);
/// The pause between two looks at a stock that does not add up.
const LOOK_AGAIN: Duration = Duration::from_millis(200);
/// Violations that are listed. All are counted.
const LISTED: usize = 20;

/// What was found.
#[derive(Debug, Serialize)]
pub(crate) struct Verdict {
    products_checked: usize,
    purchases_checked: usize,
    /// Purchases whose outcome is known: more than were checked if that is an even sample.
    purchases_known: u64,
    violations: u64,
    /// The first of them.
    violations_listed: Vec<String>,
}

impl Verdict {
    pub(crate) fn passed(&self) -> bool {
        self.violations == 0
    }
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let sample = match self.purchases_checked as u64 == self.purchases_known {
            true => "all".to_owned(),
            false => format!("an even sample of {}", self.purchases_known),
        };
        writeln!(
            f,
            "{:>24}  {}: the stock of {} products, order and payment of {} purchases ({sample})",
            "verified",
            if self.passed() { "it adds up".to_owned() } else { format!("violations: {}", self.violations) },
            self.products_checked,
            self.purchases_checked,
        )?;
        self.violations_listed.iter().try_for_each(|violation| writeln!(f, "{:>26}{violation}", ""))
    }
}

#[derive(Default)]
struct Findings {
    count: u64,
    listed: Vec<String>,
}

impl Findings {
    fn add(&mut self, found: impl IntoIterator<Item = String>) {
        for violation in found {
            self.count += 1;
            if self.listed.len() < LISTED {
                self.listed.push(violation);
            }
        }
    }
}

/// Asks for everything that the ledger knows of. `bearers` are those of all customers, by their places.
pub(crate) async fn verify(plan: &Plan, ledger: &Ledger, bearers: &[HeaderValue]) -> Verdict {
    let mut findings = Findings::default();
    findings.add(ledger.same_ids.iter().map(|id| format!("I10: {id} is the id of two purchases")));
    let expected = expected_stock(plan, ledger.sales());
    let mut askers: Vec<Asker> =
        (0..ASKERS).map(|_| Asker::new(&plan.options.url, plan.options.request_timeout)).collect();

    let part = expected.len().div_ceil(ASKERS).max(1);
    let found = join_all(askers.iter_mut().zip(expected.chunks(part)).map(async |(asker, part)| {
        let mut found = Findings::default();
        for stock in part {
            found.add(check_stock(asker, stock).await);
        }
        found
    }));
    found.await.into_iter().for_each(|found| findings.join(found));

    let part = ledger.entries().len().div_ceil(ASKERS).max(1);
    let found = join_all(askers.iter_mut().zip(ledger.entries().chunks(part)).map(async |(asker, part)| {
        let mut found = Findings::default();
        for entry in part {
            let total = plan.carts.all()[entry.cart as usize].total;
            found.add(check_purchase(asker, *entry, total, &bearers[entry.customer() as usize]).await);
        }
        found
    }));
    found.await.into_iter().for_each(|found| findings.join(found));

    Verdict {
        products_checked: expected.len(),
        purchases_checked: ledger.entries().len(),
        purchases_known: ledger.ended_count(),
        violations: findings.count,
        violations_listed: findings.listed,
    }
}

impl Findings {
    fn join(&mut self, other: Findings) {
        let room = LISTED - self.listed.len();
        self.listed.extend(other.listed.into_iter().take(room));
        self.count += other.count;
    }
}

/// What should be left of a product.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Stock {
    product: Product,
    /// What committed purchases took.
    sold: i128,
    /// What purchases of unknown outcome took, or did not.
    perhaps: i128,
}

fn expected_stock(plan: &Plan, sales: &[Sales]) -> Vec<Stock> {
    let stock = |product: &Product| Stock { product: *product, sold: 0, perhaps: 0 };
    let mut stocks: Vec<Stock> = plan.products.all().iter().map(stock).collect();
    let amount = i128::from(plan.carts.amount());
    for (cart, sales) in plan.carts.all().iter().zip(sales) {
        for place in &cart.products {
            stocks[*place as usize].sold += amount * i128::from(sales.committed);
            stocks[*place as usize].perhaps += amount * i128::from(sales.unsure);
        }
    }
    stocks
}

impl Stock {
    /// What is wrong with so much left.
    fn wrong(&self, left: i128) -> Option<String> {
        let Stock { product: Product { id, stock, .. }, sold, perhaps } = *self;
        let most = i128::from(stock) - sold;
        let fits = left >= 0 && left <= most && left >= most - perhaps;
        let unsure = if perhaps > 0 { format!(" and perhaps {perhaps} more") } else { String::new() };
        (!fits).then(|| format!("I1: product {id} has {left} left of {stock}, and {sold} were sold{unsure}"))
    }
}

#[derive(Deserialize)]
struct ShownProduct {
    inventory: i128,
}

#[derive(Deserialize)]
struct ShownPayment {
    amount: u128,
}

async fn check_stock(asker: &mut Asker, stock: &Stock) -> Option<String> {
    let begun = Instant::now();
    let path = path_of("product", stock.product.id);
    loop {
        let answer = match asker.get_patiently(&path, None, PATIENCE).await {
            Ok(answer) if answer.status == StatusCode::OK => answer,
            Ok(answer) => return Some(format!("I1: GET {path} is answered {}", answer.status)),
            Err(failure) => return Some(format!("I1: GET {path}: {failure}")),
        };
        let Ok(ShownProduct { inventory }) = serde_json::from_slice(&answer.body) else {
            return Some(format!("I1: GET {path}: {:?}", String::from_utf8_lossy(&answer.body)));
        };
        match stock.wrong(inventory) {
            Some(_) if begun.elapsed() < STALE => tokio::time::sleep(LOOK_AGAIN).await,
            wrong => return wrong,
        }
    }
}

async fn check_purchase(
    asker: &mut Asker,
    entry: Entry,
    total: u128,
    bearer: &HeaderValue,
) -> Option<String> {
    let mut statuses = [StatusCode::OK; 2];
    let mut paid = None;
    for (kind, status) in ["order", "payment"].into_iter().zip(&mut statuses) {
        let path = path_of(kind, entry.id);
        let answer = match asker.get_patiently(&path, Some(bearer), PATIENCE).await {
            Ok(answer) => answer,
            Err(failure) => return Some(format!("I4: GET {path}: {failure}")),
        };
        *status = answer.status;
        if kind == "payment" && answer.status == StatusCode::OK {
            paid = serde_json::from_slice::<ShownPayment>(&answer.body).ok().map(|shown| shown.amount);
        }
    }
    wrong_purchase(entry, total, statuses, paid)
}

/// What is wrong with a purchase whose order and payment are answered so.
fn wrong_purchase(
    entry: Entry,
    total: u128,
    statuses: [StatusCode; 2],
    paid: Option<u128>,
) -> Option<String> {
    let (id, committed) = (entry.id, entry.committed());
    let wanted = if committed { StatusCode::OK } else { StatusCode::NOT_FOUND };
    if statuses != [wanted; 2] {
        let [order, payment] = statuses.map(|status| status.as_u16());
        let end = if committed { "committed" } else { "aborted" };
        return Some(format!(
            "I4: purchase {id} was {end}; its order is answered {order}, its payment {payment}"
        ));
    }
    (committed && paid != Some(total)).then(|| {
        let paid = paid.map_or("something else".to_owned(), |paid| paid.to_string());
        format!("I5: purchase {id} costs {total}, and {paid} was paid")
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stock_adds_up_or_is_named() {
        let product = Product { id: 9, price: 1, stock: 10 };
        let stock = Stock { product, sold: 4, perhaps: 0 };
        assert_eq!(stock.wrong(6), None);
        for left in [5, 7, -1] {
            let wrong = stock.wrong(left).expect("it does not add up");
            assert!(wrong.contains("product 9") && wrong.contains(&left.to_string()), "{wrong}");
        }
        let unsure = Stock { product, sold: 4, perhaps: 8 };
        for (left, fits) in [(7, false), (6, true), (3, true), (0, true), (-1, false)] {
            assert_eq!(unsure.wrong(left).is_none(), fits, "{left}");
        }
    }

    #[test]
    fn a_purchase_is_all_or_nothing() {
        let (yes, no) = (StatusCode::OK, StatusCode::NOT_FOUND);
        let committed = Entry::new(7, 0, 0, true);
        assert_eq!(wrong_purchase(committed, 30, [yes, yes], Some(30)), None);
        for (statuses, paid, named) in [
            ([yes, no], None, "I4"),
            ([no, yes], Some(30), "I4"),
            ([no, no], None, "I4"),
            ([yes, yes], Some(29), "I5"),
            ([yes, yes], None, "I5"),
        ] {
            let wrong = wrong_purchase(committed, 30, statuses, paid).expect(named);
            assert!(wrong.contains(named) && wrong.contains('7'), "{wrong}");
        }
        let aborted = Entry::new(8, 0, 0, false);
        assert_eq!(wrong_purchase(aborted, 30, [no, no], None), None);
        for statuses in [[yes, no], [no, yes], [yes, yes], [StatusCode::INTERNAL_SERVER_ERROR, no]] {
            assert!(wrong_purchase(aborted, 30, statuses, Some(30)).is_some(), "{statuses:?}");
        }
    }

    #[test]
    fn few_are_listed_and_all_are_counted() {
        let mut findings = Findings::default();
        findings.add((0..30).map(|number| number.to_string()));
        let mut more = Findings::default();
        more.add((30..70).map(|number| number.to_string()));
        findings.join(more);
        assert_eq!((findings.count, findings.listed.len()), (70, LISTED));
    }
}

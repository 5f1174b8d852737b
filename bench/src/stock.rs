//! What left the stock, asked through the API: the count of purchases that no load generator has to be believed for.

use std::collections::BTreeSet;
use std::time::Duration;

use serde::Deserialize;
use serde_json::json;
use testkit::Client;

use crate::Error;
use crate::wrk::Requests;

/// What there is of each product that is created here.
const PLENTY: i64 = 1_000_000_000;
/// The pause between two looks.
const LOOK: Duration = Duration::from_millis(20);
/// The most lines that a page of the catalogue may have.
const PAGE: usize = 500;

/// Products and customers that exist for a measurement.
pub(crate) struct Market {
    pub(crate) products: Vec<u64>,
    tokens: Vec<String>,
}

impl Market {
    /// Creates them.
    ///
    /// # Errors
    /// When the server refuses.
    pub(crate) async fn open(client: &Client, products: usize, customers: usize) -> Result<Market, Error> {
        let mut market = Market { products: Vec::new(), tokens: Vec::new() };
        for number in 0..products {
            let product = json!({
                "name": format!("Product number {number:04}"), "description": "A product of a measurement",
                "brand_name": "Sagaline", "price": 100, "inventory": PLENTY,
            });
            let answer = client.post("/api/product", None, &product).await?;
            let id = answer.json()["id"].as_u64().ok_or_else(|| format!("no product: {}", answer.body))?;
            market.products.push(id);
        }
        for number in 0..customers {
            let person = json!({
                "password": "abcd5432", "firstname": "a", "lastname": "b", "address": "c",
                "email": format!("witness{number}@example.com"), "phone_number": format!("07{number:08}"),
            });
            let answer = client.post("/api/account/auth/signup", None, &person).await?;
            let token = answer.json()["access_token"].as_str().map(str::to_owned);
            market.tokens.push(token.ok_or_else(|| format!("no customer: {}", answer.body))?);
        }
        Ok(market)
    }

    /// Purchases of each product by each customer.
    pub(crate) fn purchases(&self) -> Requests<'_> {
        Requests::Purchases { tokens: &self.tokens, products: &self.products }
    }
}

#[derive(Deserialize)]
struct Catalogs {
    catalogs: Vec<Line>,
}

#[derive(Deserialize)]
struct Line {
    id: u64,
    inventory: i64,
}

/// What is left of all products. Products that somebody creates in between are no matter: their stock counts from
/// then on.
///
/// # Errors
/// When the server does not tell.
pub(crate) async fn left(client: &Client) -> Result<Left, Error> {
    let mut left = Left::default();
    loop {
        let path = format!("/api/products?offset={}&size={PAGE}", left.seen.len());
        let answer = client.get(&path, None).await?;
        let Catalogs { catalogs } = serde_json::from_str(&answer.body)?;
        let page = catalogs.len();
        for Line { id, inventory } in catalogs {
            if left.seen.insert(id) {
                left.units += inventory;
            }
        }
        if page < PAGE {
            return Ok(left);
        }
    }
}

/// Waits until something is sold; what is left then.
///
/// # Errors
/// When the server does not tell.
pub(crate) async fn first_sale(client: &Client) -> Result<Left, Error> {
    let mut last = left(client).await?;
    loop {
        tokio::time::sleep(LOOK).await;
        let now = left(client).await?;
        if last.sold_until(&now).is_some_and(|sold| sold > 0) {
            return Ok(now);
        }
        last = now;
    }
}

/// What is left of all products.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Left {
    seen: BTreeSet<u64>,
    units: i64,
}

impl Left {
    /// Units sold between two looks; none when products were created in between.
    pub(crate) fn sold_until(&self, later: &Left) -> Option<i64> {
        (self.seen == later.seen).then_some(self.units - later.units)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_sold_is_told_for_the_same_products_only() {
        let left = |ids: &[u64], units| Left { seen: ids.iter().copied().collect(), units };
        assert_eq!(left(&[1, 2], 50).sold_until(&left(&[1, 2], 20)), Some(30));
        assert_eq!(left(&[1], 50).sold_until(&left(&[1, 2], 70)), None);
    }
}

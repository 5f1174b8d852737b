//! What there is to buy, and who buys.

use std::collections::BTreeMap;
use std::time::Duration;

use serde_json::json;

use crate::client::{Client, ClientError};
use crate::dice::Dice;
use crate::until;

/// The largest payment that is not declined: the default of the setting `payment.limit`.
pub const PAYMENT_LIMIT: i64 = 1_000_000;

/// How long an account may take: on a busy machine its service refuses what it cannot hash in time.
const SIGN_UP_WITHIN: Duration = Duration::from_secs(30);

/// Products of which there is enough for any test.
const PLENTY: usize = 4;
const PLENTY_STOCK: i64 = 1_000_000;
/// A product that is soon sold out.
const SCARCE_STOCK: i64 = 25;

/// A product as it was created.
#[derive(Clone, Copy, Debug)]
pub struct Product {
    /// Its id.
    pub id: u64,
    /// What one costs.
    pub price: i64,
    /// How many there were.
    pub stock: i64,
}

/// Everything that there is to buy.
#[derive(Clone, Debug)]
pub struct Catalogue {
    /// Never sold out.
    pub plenty: Vec<Product>,
    /// Soon sold out.
    pub scarce: Product,
    /// Above the limit of a payment, so that its purchase is rolled back from the last step.
    pub dear: Product,
}

impl Catalogue {
    /// Creates the products.
    ///
    /// # Panics
    /// When the shop does not.
    pub async fn create(client: &Client) -> Catalogue {
        let mut plenty = Vec::new();
        for number in 0..PLENTY {
            plenty.push(
                Product::create(client, &format!("plenty {number}"), 7 + number as i64, PLENTY_STOCK).await,
            );
        }
        let scarce = Product::create(client, "scarce", 100, SCARCE_STOCK).await;
        let dear = Product::create(client, "dear", PAYMENT_LIMIT + 1, PLENTY_STOCK).await;
        Catalogue { plenty, scarce, dear }
    }

    /// Every product with the stock that it was created with.
    pub fn stock(&self) -> BTreeMap<u64, i64> {
        self.products().map(|product| (product.id, product.stock)).collect()
    }

    /// Every product.
    pub fn products(&self) -> impl Iterator<Item = &Product> {
        self.plenty.iter().chain([&self.scarce, &self.dear])
    }

    /// A cart that succeeds.
    pub fn plenty_of_one(&self) -> Cart {
        Cart { lines: vec![(self.plenty[0].id, 1)] }
    }

    /// A cart of the usual mix: mostly plain, some with a product twice, some with what is scarce, some too dear.
    pub fn cart(&self, dice: &mut Dice) -> Cart {
        let any = |dice: &mut Dice| self.plenty[dice.below(self.plenty.len() as u64) as usize].id;
        let amount = |dice: &mut Dice| 1 + dice.below(3).cast_signed();
        let first = any(dice);
        let mut lines = vec![(first, amount(dice))];
        match dice.below(10) {
            0 => lines.push((first, amount(dice))),
            1 | 2 => lines.push((self.scarce.id, 1)),
            3 => lines.push((self.dear.id, 1)),
            // What is scarce must come back.
            4 => lines.extend([(self.dear.id, 1), (self.scarce.id, 1)]),
            5 | 6 => lines.push((any(dice), amount(dice))),
            _ => {}
        }
        Cart { lines }
    }
}

impl Product {
    /// Creates it.
    ///
    /// # Panics
    /// When the shop does not.
    pub async fn create(client: &Client, name: &str, price: i64, stock: i64) -> Product {
        let body = json!({
            "name": name, "description": "for tests", "brand_name": "testkit", "price": price, "inventory": stock,
        });
        match client.post("/api/product", None, &body).await {
            Ok(answer) if answer.status == 201 => {
                Product { id: answer.json()["id"].as_u64().unwrap_or_default(), price, stock }
            }
            other => panic!("product {name:?} was not created: {other:?}"),
        }
    }
}

/// What is bought at once: products with amounts, a product possibly twice.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cart {
    /// The lines as they are sent.
    pub lines: Vec<(u64, i64)>,
}

impl Cart {
    /// The request's body.
    pub fn body(&self) -> serde_json::Value {
        let line = |(product_id, amount): &(u64, i64)| json!({ "product_id": product_id, "amount": amount });
        let items: Vec<_> = self.lines.iter().map(line).collect();
        json!({ "purchase_items": items, "payment": { "currency_code": "US" } })
    }

    /// Each product once, with its sum.
    pub fn sums(&self) -> BTreeMap<u64, i64> {
        let mut sums = BTreeMap::new();
        for (product, amount) in &self.lines {
            *sums.entry(*product).or_default() += amount;
        }
        sums
    }
}

/// Somebody with an account.
#[derive(Clone, Debug)]
pub struct Customer {
    /// Their place among the customers of a test.
    pub number: usize,
    /// Their access token, good for the default of `account.access_token_seconds`: 15 minutes.
    pub token: String,
}

impl Customer {
    /// Opens an account, whose service may be too busy for it at first.
    ///
    /// # Panics
    /// When the shop does not let it.
    pub async fn sign_up(client: &Client, number: usize) -> Customer {
        let body = json!({
            "password": "correct horse battery", "firstname": "Ann", "lastname": "Lee",
            "email": format!("ann{number}@example.org"), "address": "1 Quay",
            "phone_number": format!("0900-000-{number:03}"),
        });
        let mut token = None;
        until("there is an account", SIGN_UP_WITHIN, async || {
            match client.post("/api/account/auth/signup", None, &body).await {
                Ok(answer) if answer.status == 201 => {
                    token = answer.json()["access_token"].as_str().map(str::to_owned);
                    true
                }
                // It had no effect, and a client tries again.
                Ok(answer) if answer.status == 503 => false,
                other => panic!("customer {number} has no account: {other:?}"),
            }
        })
        .await;
        Customer { number, token: token.unwrap_or_default() }
    }

    /// Tries to buy, once.
    ///
    /// # Errors
    /// When there is no answer; whether it was bought is then not known.
    pub async fn buy(
        &self,
        client: &Client,
        cart: &Cart,
        key: Option<&str>,
    ) -> Result<crate::Answer, ClientError> {
        let bearer = format!("bearer {}", self.token);
        let mut headers = vec![("authorization", bearer.as_str())];
        headers.extend(key.map(|key| ("idempotency-key", key)));
        client.request("POST", "/api/purchase", &headers, Some(cart.body().to_string().into_bytes())).await
    }
}

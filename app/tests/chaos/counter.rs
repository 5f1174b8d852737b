//! A shop in which only the test buys, so that what is in whose hands is known.

use std::time::Instant;

use bus::Bus;
use futures_util::future::join_all;
use testkit::checks::{self, Expected, Report};
use testkit::traffic::{Cart, Customer, Product, all_ended};
use testkit::{Client, Engines, Shop, until};

use super::tap::{join, until_idle};
use super::{SOON, accepted};

/// Who buy.
const CUSTOMERS: usize = 10;

/// A shop in which nobody else buys, and what was bought.
pub(crate) struct Counter {
    pub(crate) engines: Engines,
    pub(crate) client: Client,
    pub(crate) bus: Bus,
    pub(crate) customers: Vec<Customer>,
    pub(crate) expected: Expected,
    begun: Instant,
}

impl Counter {
    /// With customers who have bought nothing yet.
    pub(crate) async fn open(shop: &Shop, engines: Engines) -> Counter {
        let (client, bus) = (shop.client(), join(&engines).await);
        let signing_up = (0..CUSTOMERS).map(|number| Customer::sign_up(&client, number));
        let customers = join_all(signing_up).await;
        Counter { engines, client, bus, customers, expected: Expected::default(), begun: Instant::now() }
    }

    /// One product more, and its id.
    pub(crate) async fn product(&mut self, name: &str, price: i64, stock: i64) -> u64 {
        let product = Product::create(&self.client, name, price, stock).await;
        self.expected.stock.insert(product.id, stock);
        product.id
    }

    /// These carts, at once, each under a key of its own.
    pub(crate) async fn sell(&mut self, what: &str, carts: &[Cart]) {
        self.sell_at(&self.client.clone(), what, carts).await;
    }

    /// The same at one door.
    pub(crate) async fn sell_at(&mut self, door: &Client, what: &str, carts: &[Cart]) {
        let keys: Vec<String> = (0..carts.len()).map(|number| format!("{what} {number}")).collect();
        let customers = &self.customers;
        let buying = carts.iter().zip(&keys).enumerate();
        let buying =
            buying.map(|(number, (cart, key))| accepted(door, &customers[number % CUSTOMERS], cart, key));
        let ids = join_all(buying).await;
        self.expected.acknowledged.extend(&ids);
        self.expected.keys.extend(keys.into_iter().zip(ids));
    }

    /// Whether nothing of what was bought is under way.
    pub(crate) async fn have_all_ended(&self) -> bool {
        let ended = all_ended(&self.client, &self.customers).await;
        ended.is_some_and(|ended| ended.is_superset(&self.expected.acknowledged))
    }

    /// Everything ends, and nothing is left on the way.
    pub(crate) async fn is_quiet(&self) {
        until("every purchase has ended", SOON, async || self.have_all_ended().await).await;
        until_idle(&self.bus).await;
    }

    /// The same, and everything adds up.
    pub(crate) async fn adds_up(&self, what: &str) -> Report {
        self.is_quiet().await;
        let report = self.check(what);
        report.assert_clean();
        report
    }

    /// What there is to say of the databases.
    pub(crate) fn check(&self, what: &str) -> Report {
        let report = checks::check(self.engines.books(), &self.expected).unwrap();
        println!("{what}, after {:.1?}: {report}", self.begun.elapsed());
        report
    }
}

/// A cart with one of this product.
pub(crate) fn one_of(product: u64) -> Cart {
    Cart { lines: vec![(product, 1)] }
}

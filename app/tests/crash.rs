//! kill -9, at every named point and at random instants, under load, again and again on the same data directory.
//!
//! Customers buy all the while, with carts that succeed, that are sold out, that are declined, that name a product twice; they
//! send their keys again until they are answered, and follow their streams through every crash. In the end the shop
//! is asked about everything over its API, and its databases are checked row by row.
//!
//! A run can be repeated as far as chance goes: `SAGALINE_TEST_SEED` takes the seed that it prints.

#![allow(clippy::unwrap_used, reason = "what fails here fails the test")]

use std::os::unix::process::ExitStatusExt;
use std::process::ExitStatus;
use std::time::{Duration, Instant};

use testkit::checks::{self, Expected};
use testkit::traffic::{Cart, Customer, Habits, Product};
use testkit::{Client, Options, Ordeal, Shop, TempDir, tail, until};

/// Rounds that end at an instant of chance.
const RANDOM_ROUNDS: usize = 40;
/// The longest that a shop lives in such a round.
const LONGEST_LIFE_MICROS: u64 = 800_000;
/// About the time that a start takes here: a round may end before the shop is ready.
const START_MICROS: u64 = 150_000;

/// A point is passed within this time, or it is never passed.
const REACHED_WITHIN: Duration = Duration::from_secs(30);
/// A purchase has ended so long after the last start.
const ENDED_WITHIN: Duration = Duration::from_secs(60);
/// What the process promises to whoever sends SIGTERM.
const STOP_WITHIN: Duration = Duration::from_secs(10);

const SIGABRT: i32 = 6;

fn options(dir: &TempDir) -> Options {
    Options::new(env!("CARGO_BIN_EXE_saga"), dir.path().join("data"))
        .arg("--no-demo-data")
        .env("SAGA_PURCHASE__RETRY_FIRST_SECONDS", "1")
        .env("SAGA_PURCHASE__RETRY_MAX_SECONDS", "2")
}

fn armed(options: &Options, point: &str, hit: u64) -> Options {
    const { assert!(failpoint::ENABLED, "the binary was built without its failpoints") };
    options.clone().env(failpoint::VARIABLE, format!("{point}={hit}"))
}

/// The shop dies at the `hit`th time that it passes this point.
async fn dies_at(ordeal: &mut Ordeal, point: &'static str, hit: u64) {
    let options = armed(ordeal.options(), point, hit);
    let (status, log) = ordeal.dies_by_itself(&format!("{point}={hit}"), options).await;
    assert_eq!(status.signal(), Some(SIGABRT), "{point}={hit}: {status}:\n{}", tail(&log));
}

/// The shop dies when a participant has been asked something: whose saga that is of is open, and each start takes it up again.
async fn something_is_open(ordeal: &mut Ordeal) {
    dies_at(ordeal, "participant.received", 1).await;
}

/// The shop dies at any instant, now and then before it has started.
async fn dies_at_random(ordeal: &mut Ordeal) {
    let dice = ordeal.dice();
    let (while_it_starts, start, life) =
        (dice.chance(20), dice.below(START_MICROS), dice.below(LONGEST_LIFE_MICROS));
    if while_it_starts {
        ordeal.is_killed_while_it_starts(Duration::from_micros(start)).await;
    } else {
        ordeal.is_killed_after(Duration::from_micros(life)).await;
    }
}

/// The points whose names begin so.
fn points(prefix: &str) -> impl Iterator<Item = &'static str> {
    failpoint::POINTS.iter().copied().filter(move |name| name.starts_with(prefix))
}

/// The first time, one of the first times, and one when all is in full swing.
fn hits(ordeal: &mut Ordeal, swing: u64) -> [u64; 3] {
    [1, 2 + ordeal.dice().below(8), 10 + ordeal.dice().below(swing)]
}

#[tokio::test(flavor = "multi_thread")]
async fn row_1_a_participant_dies_at_every_boundary() {
    let dir = TempDir::new();
    let mut ordeal = Ordeal::begin("row 1", options(&dir), Habits::default()).await;
    for point in points("participant.") {
        for hit in hits(&mut ordeal, 120) {
            dies_at(&mut ordeal, point, hit).await;
        }
    }
    ordeal.end().await;
}

/// What the orchestrator is told of is what a start takes up again.
#[tokio::test(flavor = "multi_thread")]
async fn row_2_the_orchestrator_dies_before_and_after_it_publishes() {
    let dir = TempDir::new();
    let mut ordeal = Ordeal::begin("row 2", options(&dir), Habits::default()).await;
    for _ in 0..3 {
        for point in points("orchestrator.") {
            let life = Duration::from_micros(ordeal.dice().below(LONGEST_LIFE_MICROS));
            ordeal.is_killed_after(life).await;
            something_is_open(&mut ordeal).await;
            for _ in 0..2 {
                dies_at(&mut ordeal, point, 1).await;
            }
        }
    }
    ordeal.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn row_3_purchase_dies_at_every_boundary() {
    let dir = TempDir::new();
    let mut ordeal = Ordeal::begin("row 3", options(&dir), Habits::default()).await;
    for point in points("purchase.accept.").chain(points("purchase.result.")) {
        for hit in hits(&mut ordeal, 40) {
            dies_at(&mut ordeal, point, hit).await;
        }
    }
    for point in points("purchase.reconcile.") {
        something_is_open(&mut ordeal).await;
        for _ in 0..3 {
            dies_at(&mut ordeal, point, 1).await;
        }
    }
    ordeal.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn kill_9_at_random_instants() {
    let dir = TempDir::new();
    let mut ordeal = Ordeal::begin("random", options(&dir), Habits::default()).await;
    for _ in 0..RANDOM_ROUNDS {
        dies_at_random(&mut ordeal).await;
    }
    let totals = ordeal.end().await;
    assert!(totals.succeeded > 0 && totals.failed > 0, "{totals:?}");
}

/// Purchases that no start gets done in time are cancelled, wherever they were, and the shop dies while it cancels them.
#[tokio::test(flavor = "multi_thread")]
async fn kill_9_past_the_deadline() {
    let dir = TempDir::new();
    let options = options(&dir).env("SAGA_PURCHASE__DEADLINE_SECONDS", "1");
    let mut ordeal = Ordeal::begin("deadline", options, Habits::default()).await;
    let points: Vec<_> = points("participant.").chain(points("orchestrator.")).collect();
    for _ in 0..4 {
        ordeal.is_killed_after(Duration::from_millis(200)).await;
        // Each of these lives ends before a participant has handled anything: what is open stays as it is.
        something_is_open(&mut ordeal).await;
        let stuck = Instant::now();
        while stuck.elapsed() < Duration::from_millis(1_200) {
            something_is_open(&mut ordeal).await;
        }
        for _ in 0..3 {
            let point = points[ordeal.dice().below(points.len() as u64) as usize];
            // An orchestrator is told once at a start: of all that is to be taken up again.
            let hits = if point.starts_with("orchestrator.") { 1 } else { 12 };
            let hit = 1 + ordeal.dice().below(hits);
            dies_at(&mut ordeal, point, hit).await;
        }
    }
    let totals = ordeal.end().await;
    assert!(totals.cancelled > 0, "nothing was cancelled: {totals:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn sigterm_under_load_ends_in_order_and_loses_nothing() {
    let dir = TempDir::new();
    // Whoever asks while the shop stops is refused.
    let habits = Habits { refusals_are_fine: true, ..Habits::default() };
    let mut ordeal = Ordeal::begin("sigterm", options(&dir), habits).await;
    for _ in 0..3 {
        let mut shop = ordeal.open().await;
        let before = ordeal.ledger().figures().acknowledged;
        until("the shop is busy", REACHED_WITHIN, async || {
            ordeal.ledger().figures().acknowledged > before + 50
        })
        .await;
        let token = ordeal.customers()[0].token.clone();
        let mut events = shop.client().events(&token, None).await.unwrap();
        let told = Instant::now();
        shop.signal("TERM").await;
        let status = shop.wait_exit(STOP_WITHIN).await;
        let took = told.elapsed();
        let status = status.unwrap_or_else(|| panic!("it still runs:\n{}", tail(&shop.stderr())));
        assert_eq!(status.code(), Some(0), "{status}:\n{}", tail(&shop.stderr()));
        while events.next(STOP_WITHIN).await.is_some() {}
        assert!(events.ended(), "the stream is still open");
        ordeal.died(&format!("SIGTERM, stopped after {took:.1?}"));
    }
    ordeal.end().await;
}

#[test]
fn every_failpoint_is_walked_through() {
    let walked =
        ["participant.", "orchestrator.", "purchase.accept.", "purchase.result.", "purchase.reconcile."];
    for point in failpoint::POINTS {
        assert!(walked.iter().any(|prefix| point.starts_with(prefix)), "nothing dies at {point}");
    }
}

/// One customer, one product, one cart.
struct Corner {
    dir: TempDir,
    options: Options,
    customer: Customer,
    cart: Cart,
    product: Product,
}

impl Corner {
    async fn new(client: &Client, dir: TempDir, options: Options) -> Corner {
        let customer = Customer::sign_up(client, 0).await;
        let product = Product::create(client, "lamp", 3, 1_000).await;
        Corner { dir, options, customer, cart: Cart { lines: vec![(product.id, 2)] }, product }
    }

    /// A shop that was prepared and is gone.
    async fn prepared() -> Corner {
        let dir = TempDir::new();
        let options = options(&dir);
        let mut shop = Shop::start(options.clone()).await.unwrap();
        let corner = Corner::new(&shop.client(), dir, options).await;
        shop.kill9().await;
        corner
    }

    async fn purchases(&self, client: &Client) -> Vec<u64> {
        let answer = client.get("/api/purchases?size=500", Some(&self.customer.token)).await.unwrap();
        let list = answer.json()["purchases"].as_array().unwrap().clone();
        list.iter().map(|purchase| purchase["id"].as_u64().unwrap()).collect()
    }

    /// Posts the cart so many times at once, under one key. The ids that were answered.
    async fn post_at_once(&self, client: &Client, count: usize, key: &str) -> Vec<u64> {
        let posts: Vec<_> = (0..count)
            .map(|_| {
                let (client, customer) = (client.clone(), self.customer.clone());
                let (cart, key) = (self.cart.clone(), key.to_owned());
                tokio::spawn(async move { customer.buy(&client, &cart, Some(&key)).await })
            })
            .collect();
        let mut ids = Vec::new();
        for post in posts {
            if let Ok(answer) = post.await.unwrap() {
                assert_eq!(answer.status, 201, "{}", answer.body);
                ids.push(answer.json()["purchase_id"].as_u64().unwrap());
            }
        }
        ids
    }

    /// All has ended with exactly this one purchase, under this key.
    async fn has_only(&self, shop: &mut Shop, id: u64, key: &str) {
        let client = shop.client();
        until("the purchase has succeeded", ENDED_WITHIN, async || {
            let path = format!("/api/purchase/{id}");
            let answer = client.get(&path, Some(&self.customer.token)).await.unwrap();
            answer.status == 200 && answer.json()["state"] == "SUCCEEDED"
        })
        .await;
        assert_eq!(self.purchases(&client).await, [id]);
        assert!(shop.terminate().await.success());
        let expected = Expected {
            stock: [(self.product.id, self.product.stock)].into(),
            acknowledged: [id].into(),
            keys: [(key.to_owned(), id)].into(),
            ..Expected::default()
        };
        let report = checks::check(&self.dir.path().join("data"), &expected).unwrap();
        report.assert_clean();
        assert_eq!((report.accepted, report.committed), (1, 1));
    }
}

async fn abort_of(shop: &mut Shop) -> ExitStatus {
    shop.wait_exit(REACHED_WITHIN).await.expect("the failpoint is reached")
}

#[tokio::test(flavor = "multi_thread")]
async fn row_3_after_a_kill_between_commit_and_answer_the_key_returns_the_same_id() {
    let corner = Corner::prepared().await;
    let mut shop = Shop::start(armed(&corner.options, "purchase.accept.committed", 1)).await.unwrap();
    let answer = corner.customer.buy(&shop.client(), &corner.cart, Some("key")).await;
    assert!(answer.is_err(), "it was answered before the kill: {answer:?}");
    assert_eq!(abort_of(&mut shop).await.signal(), Some(SIGABRT));

    let mut shop = Shop::start(corner.options.clone()).await.unwrap();
    let kept = corner.purchases(&shop.client()).await;
    assert_eq!(kept.len(), 1, "what was committed is there before anybody asks again");
    assert_eq!(corner.post_at_once(&shop.client(), 1, "key").await, kept);
    corner.has_only(&mut shop, kept[0], "key").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn row_3_after_a_kill_before_the_commit_there_is_nothing() {
    let corner = Corner::prepared().await;
    for key in [None, Some("key")] {
        let mut shop = Shop::start(armed(&corner.options, "purchase.accept.before_commit", 1)).await.unwrap();
        let answer = corner.customer.buy(&shop.client(), &corner.cart, key).await;
        assert!(answer.is_err(), "it was answered before the commit: {answer:?}");
        assert_eq!(abort_of(&mut shop).await.signal(), Some(SIGABRT));
    }
    let mut shop = Shop::start(corner.options.clone()).await.unwrap();
    assert!(corner.purchases(&shop.client()).await.is_empty());
    let ids = corner.post_at_once(&shop.client(), 1, "key").await;
    corner.has_only(&mut shop, ids[0], "key").await;
}

const AT_ONCE: usize = 50;

#[tokio::test(flavor = "multi_thread")]
async fn row_13_fifty_posts_with_one_key_are_one_purchase() {
    let corner = Corner::prepared().await;
    let mut shop = Shop::start(corner.options.clone()).await.unwrap();
    let ids = corner.post_at_once(&shop.client(), AT_ONCE, "key").await;
    assert_eq!(ids, vec![ids[0]; AT_ONCE]);
    corner.has_only(&mut shop, ids[0], "key").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn row_13_fifty_posts_with_one_key_and_a_kill_between_commit_and_answer_are_one_purchase() {
    for hit in 1..=2 {
        let corner = Corner::prepared().await;
        let mut shop = Shop::start(armed(&corner.options, "purchase.accept.committed", hit)).await.unwrap();
        let before = corner.post_at_once(&shop.client(), AT_ONCE, "key").await;
        if before.len() == AT_ONCE {
            // All fitted into fewer transactions than it takes.
            corner.post_at_once(&shop.client(), 1, "key").await;
        }
        assert_eq!(abort_of(&mut shop).await.signal(), Some(SIGABRT));
        let mut shop = Shop::start(corner.options.clone()).await.unwrap();
        let kept = corner.purchases(&shop.client()).await;
        assert_eq!(kept.len(), 1, "hit {hit}");
        let after = corner.post_at_once(&shop.client(), AT_ONCE, "key").await;
        println!("hit {hit}: {} of {AT_ONCE} answered before the kill", before.len());
        assert!(before.iter().chain(&after).all(|id| *id == kept[0]), "hit {hit}: {before:?} {after:?}");
        corner.has_only(&mut shop, kept[0], "key").await;
    }
}

//! Many at once: rows 11, 12 and 13 of the list of faults.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use futures_util::future::join_all;
use testkit::traffic::Cart;
use testkit::{Client, Engines, Shop, TempDir, until};
use tokio::task::spawn_blocking;
use tokio_util::sync::CancellationToken;

use super::annex::{Annex, received};
use super::counter::{Counter, one_of};
use super::{SOON, accepted, options, turn};

/// There is enough of most products.
const PLENTY: i64 = 1_000_000;
/// Who want the last ones of something, and how many there are.
const RUSH: usize = 500;
const LAST_ONES: i64 = 100;
/// Requests with one key.
const SAME: usize = 50;
/// Purchases of two products, one way round or the other.
const CROSSING: usize = 200;
/// They are bought until a deadlock has rolled one of the shop's transactions back, so many times at most; the first time has always been enough.
const MAX_ROUNDS: usize = 20;
/// How much a transaction must have changed for the server to find the other one of a deadlock cheaper.
const WEIGHT: usize = 1_000;

/// Row 11: more want something than there is.
async fn a_rush_for_the_last_ones(counter: &mut Counter) {
    let ring = counter.product("ring", 500, LAST_ONES).await;
    let before = counter.adds_up("before the rush").await;
    counter.sell("rush", &vec![one_of(ring); RUSH]).await;
    let after = counter.adds_up("row 11: the rush").await;
    assert_eq!(after.committed - before.committed, LAST_ONES as usize);
    assert_eq!(after.aborted - before.aborted, RUSH - LAST_ONES as usize);
}

/// Transactions that were rolled back because of a deadlock, since the server was started.
fn deadlocks(engines: &Engines) -> u64 {
    let count = "SELECT count FROM information_schema.innodb_metrics WHERE name = 'lock_deadlocks'";
    engines.mysql().run(count).unwrap().trim().parse().unwrap()
}

/// Row 12: carts with two products, one way round and the other. The shop locks both in one order, so somebody else sees to the deadlocks: it locks
/// them in the other order, and has done so much that it is the shop's transaction that is rolled back.
async fn crossing_carts(counter: &mut Counter, products: &[Client]) {
    let mut both = [counter.product("salt", 1, PLENTY).await, counter.product("pepper", 2, PLENTY).await];
    both.sort_unstable();
    let [first, second] = both;
    let take = |id: u64| format!("UPDATE product SET inventory = inventory + 1 WHERE id = {id}; ");
    let crossing = format!(
        "USE {}; START TRANSACTION; {}{}ROLLBACK",
        counter.engines.database("product"),
        take(second).repeat(WEIGHT),
        take(first)
    );
    let (stop, mysql) = (CancellationToken::new(), counter.engines.mysql().clone());
    // A test that fails here does not wait for the thread for ever.
    let (stopped, stop) = (stop.clone(), stop.drop_guard());
    let given_back = async || {
        let counts = join_all(products.iter().map(|product| received(product, "product", "nacked"))).await;
        counts.iter().sum::<u64>()
    };
    let before = (counter.adds_up("before the crossing carts").await, deadlocks(&counter.engines));
    let given_back_before = given_back().await;
    // How often it was the one that was rolled back.
    let victim = Arc::new(AtomicU64::new(0));
    let rolled_back = Arc::clone(&victim);
    let crossing = spawn_blocking(move || {
        while !stopped.is_cancelled() {
            rolled_back.fetch_add(u64::from(mysql.run(&crossing).is_err()), Ordering::SeqCst);
        }
    });
    let lines = [vec![(first, 1), (second, 1)], vec![(second, 1), (first, 1)]];
    let carts: Vec<Cart> = lines.into_iter().cycle().take(CROSSING).map(|lines| Cart { lines }).collect();
    let mut rounds = 0;
    let of_the_shop = |engines: &Engines| {
        let found = deadlocks(engines) - before.1;
        found.saturating_sub(victim.load(Ordering::SeqCst))
    };
    while of_the_shop(&counter.engines) == 0 {
        assert!(rounds < MAX_ROUNDS, "no transaction of the shop was rolled back in {rounds} rounds");
        counter.sell(&format!("crossing {rounds}"), &carts).await;
        until("they have ended", SOON, async || counter.have_all_ended().await).await;
        rounds += 1;
    }
    drop(stop);
    crossing.await.unwrap();
    let after = counter.adds_up("row 12: crossing carts").await;
    let lost = of_the_shop(&counter.engines);
    println!("{lost} times in {rounds} rounds it was the shop's transaction that was rolled back");
    assert!(lost > 0, "it was always the other one");
    assert_eq!(
        given_back().await,
        given_back_before,
        "its transaction is run again, and no message has to come again"
    );
    assert_eq!(after.committed - before.0.committed, rounds * CROSSING, "each succeeds");
}

/// Row 13: one key, many requests, to all replicas and past the gateway.
async fn one_key_many_requests(counter: &mut Counter, shop: &Shop) {
    let bell = counter.product("bell", 7, PLENTY).await;
    let replicas = shop.replicas().await;
    let purchases = replicas.iter().filter(|replica| replica.service == "purchase");
    let doors: Vec<Client> = purchases.map(|replica| replica.client()).chain([shop.client()]).collect();
    let before = counter.adds_up("before the one key").await;
    let (customer, cart) = (&counter.customers[0], one_of(bell));
    let asking =
        (0..SAME).map(|number| accepted(&doors[number % doors.len()], customer, &cart, "the one key"));
    let ids = join_all(asking).await;
    assert_eq!(ids, vec![ids[0]; SAME]);
    counter.expected.acknowledged.insert(ids[0]);
    counter.expected.keys.insert("the one key".to_owned(), ids[0]);
    let after = counter.adds_up("row 13: one key").await;
    assert_eq!((after.accepted, after.committed), (before.accepted + 1, before.committed + 1));
}

#[tokio::test(flavor = "multi_thread")]
async fn many_at_once_buy_no_more_than_there_is_and_nothing_twice() {
    let _turn = turn().await;
    let (dir, engines) = (TempDir::new(), Engines::shared());
    let mut shop = Shop::start(options(&dir, &engines)).await.unwrap();
    let annex = Annex::of(&shop, &dir, &engines).await;
    // Four replicas sell.
    let two_more = join_all([(); 2].map(|()| annex.start("product", &[]))).await;
    let replicas = shop.replicas().await;
    let products =
        replicas.iter().filter(|replica| replica.service == "product").map(|replica| replica.admin());
    let products: Vec<Client> = products.chain(two_more.iter().map(|extra| extra.admin().clone())).collect();
    let mut counter = Counter::open(&shop, engines).await;
    a_rush_for_the_last_ones(&mut counter).await;
    crossing_carts(&mut counter, &products).await;
    one_key_many_requests(&mut counter, &shop).await;
    let status = shop.terminate().await;
    assert!(status.success(), "{status}:\n{}", testkit::tail(&shop.stderr()));
}

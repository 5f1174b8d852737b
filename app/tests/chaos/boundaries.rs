//! kill -9 at every boundary between a commit, a publish and an acknowledgement: rows 1, 2 and 3 of the list of faults.
//!
//! Processes join a shop at work and die with what they have in hand. Those that remain get it from the broker, once nobody has spoken of it for
//! as long as that takes, or are told again by the reconciler before that; and so what was done already comes again.

use std::collections::{BTreeMap, BTreeSet};

use futures_util::future::join_all;
use testkit::traffic::Habits;
use testkit::{Engines, Ordeal, Shop, TempDir};

use super::annex::{Annex, Standstill, armed};
use super::{accepted, all_are_ready, much_is_bought, options, turn};

/// As many as keep everybody at work: what they have bought is all asked for in the end.
const BUYERS: Habits = Habits { refusals_are_fine: true, buyers_per_customer: 3 };
/// Purchases between two deaths.
const SOME: usize = 20;
/// Purchases that one who dies is asked for at once.
const AT_ONCE: usize = 6;
/// A participant dies at one of so many first batches.
const FIRST_HITS: u64 = 6;

/// The points whose names begin so.
fn points(prefix: &str) -> impl Iterator<Item = &'static str> {
    failpoint::POINTS.iter().copied().filter(move |name| name.starts_with(prefix))
}

/// A process of each of these services joins, and dies at its point while customers buy, the `hit`th time that it passes it.
async fn they_die(annex: &Annex, ordeal: &Ordeal, dying: &[(&'static str, &'static str)], hit: u64) {
    join_all(dying.iter().map(|(service, point)| annex.dies_at(service, point, hit))).await;
    println!("{dying:?} died at hit {hit}");
    ordeal.ledger().assert_no_faults();
}

/// A replica of purchase joins and dies with purchases that it was asked for. Under their keys another one has those that were committed, and
/// accepts those that were not.
async fn purchase_dies_accepting(
    annex: &Annex,
    ordeal: &Ordeal,
    shop: &Shop,
    engines: &Engines,
    point: &'static str,
) {
    let (client, customer) = (shop.client(), &ordeal.customers()[0]);
    let cart = ordeal.catalogue().plenty_of_one();
    let dying = annex.start("purchase", &[(failpoint::VARIABLE, &armed(point, 1))]).await;
    let keys: Vec<String> = (0..AT_ONCE).map(|number| format!("{point} {number}")).collect();
    let asked = join_all(keys.iter().map(|key| customer.buy(dying.client(), &cart, Some(key)))).await;
    dying.dies(point).await;

    let kept = kept_under(engines, point);
    let told = keys.iter().zip(asked).filter_map(|(key, answer)| Some((key, answer.ok()?)));
    for (key, answer) in told {
        assert_eq!(point, "purchase.accept.published", "{key:?} was answered before that: {answer:?}");
        assert_eq!((answer.status, answer.json()["purchase_id"].as_u64()), (201, kept.get(key).copied()));
    }
    assert_eq!(kept.is_empty(), point == "purchase.accept.before_commit", "{point}: {kept:?}");

    let again = join_all(keys.iter().map(|key| accepted(&client, customer, &cart, key))).await;
    let again: BTreeMap<String, u64> = keys.into_iter().zip(again).collect();
    for (key, id) in &kept {
        assert_eq!(again[key], *id, "{key:?} was committed");
    }
    assert_eq!(kept_under(engines, point), again);
    assert_eq!(again.values().collect::<BTreeSet<_>>().len(), AT_ONCE);
    println!("{point}: {} of {AT_ONCE} were committed before the death", kept.len());
}

/// The purchases in the database whose keys begin so.
fn kept_under(engines: &Engines, keys: &str) -> BTreeMap<String, u64> {
    let database = engines.database("purchase");
    let rows = format!(
        "SELECT id, idempotency_key FROM {database}.purchase_accepted WHERE idempotency_key LIKE '{keys} %'"
    );
    let rows = engines.mysql().run(&rows).unwrap();
    let row = |line: &str| {
        let (id, key) = line.split_once('\t').unwrap();
        (key.to_owned(), id.parse().unwrap())
    };
    rows.lines().map(row).collect()
}

/// Nothing is paid for a while, so what is open is due, again and again. Who takes it up dies of it, and so does who is told.
async fn who_takes_up_dies(annex: &Annex, ordeal: &Ordeal, shop: &Shop) {
    let replicas = shop.replicas().await;
    let payments = replicas.iter().filter(|replica| replica.service == "payment");
    let _unpaid = Standstill::of(payments.filter_map(|replica| replica.pid));
    let told = points("orchestrator.").map(|point| ("orchestrator", point));
    let dying: Vec<_> = told.chain([("purchase", "purchase.reconcile.committed")]).collect();
    they_die(annex, ordeal, &dying, 1).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn whoever_dies_at_a_boundary_leaves_nothing_undone_and_nothing_done_twice() {
    let _turn = turn().await;
    let (dir, engines) = (TempDir::new(), Engines::shared());
    let mut ordeal = Ordeal::begin("boundaries", options(&dir, &engines), BUYERS).await;
    let shop = ordeal.open().await;
    let annex = Annex::of(&shop, &dir, &engines).await;
    let pids: Vec<_> = shop.replicas().await.into_iter().map(|replica| replica.pid).collect();

    for point in points("participant.") {
        let dying = ["product", "order", "payment"].map(|service| (service, point));
        let hit = 1 + ordeal.dice().below(FIRST_HITS);
        they_die(&annex, &ordeal, &dying, hit).await;
        much_is_bought(&ordeal, SOME).await;
        ordeal.reckon(&shop, &format!("row 1: {point}")).await;
    }

    // What these have in hand comes again while the next ones die: the broker waits for ten seconds.
    who_takes_up_dies(&annex, &ordeal, &shop).await;
    much_is_bought(&ordeal, SOME).await;
    ordeal.reckon(&shop, "rows 2 and 3: orchestrator and reconciler").await;

    let dying: Vec<_> = points("purchase.result.").map(|point| ("purchase", point)).collect();
    they_die(&annex, &ordeal, &dying, 1).await;
    much_is_bought(&ordeal, SOME).await;
    ordeal.reckon(&shop, "row 3: purchase, with reports in hand").await;

    for point in points("purchase.accept.") {
        purchase_dies_accepting(&annex, &ordeal, &shop, &engines, point).await;
        much_is_bought(&ordeal, SOME).await;
    }
    ordeal.reckon(&shop, "row 3: purchase, accepting").await;

    all_are_ready(&shop).await;
    let now: Vec<_> = shop.replicas().await.into_iter().map(|replica| replica.pid).collect();
    assert_eq!(now, pids, "nobody else has died");
    let totals = ordeal.end_in(shop).await;
    assert!(totals.succeeded > 0 && totals.failed > 0, "{totals:?}");
}

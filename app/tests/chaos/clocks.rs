//! Clocks that are wrong, and that are set back under load, on many replicas of one service: row 20 of the list of faults.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::time::Duration;

use testkit::checks::{self, Expected};
use testkit::traffic::{Cart, Customer, Product};
use testkit::{Engines, Shop, TempDir, until};
use tokio::process::Command;

use super::annex::{Annex, Extra};
use super::{options, turn};

/// Replicas of purchase beside those of the shop, all on one database.
const REPLICAS: usize = 16;
/// Everything has ended within this time: nearly thirty processes share what a small machine has.
const ENDED_WITHIN: Duration = Duration::from_secs(180);
/// Longer than a slow machine takes for a purchase, and much shorter than clocks are off.
const DEADLINE: (&str, &str) = ("SAGA_PURCHASE__DEADLINE_SECONDS", "600");
/// Purchases that each is asked for at a time.
const AT_ONCE: usize = 6;
/// How wrong the clocks are, by replica: some are right, some are wrong all the time.
const ALWAYS: [&str; 4] = ["+0", "-10", "-3600", "+3600"];
/// What becomes of the others' clocks in the middle of it.
const LATER: [&str; 4] = ["-10", "-3600", "+3600", "-86400"];

/// A replica of the purchase service, whose clock is what a file says.
struct Replica {
    process: Extra,
    clock: PathBuf,
}

/// `libfaketime`, as the program of its package knows where it is.
async fn library() -> String {
    let line = ["-f", "+0", "sh", "-c", "echo $LD_PRELOAD"];
    let output =
        Command::new("faketime").args(line).output().await.expect("the package faketime is installed");
    String::from_utf8(output.stdout).unwrap().trim().to_owned()
}

fn set(clock: &Path, offset: &str) {
    // As a whole: it is read all the time.
    let new = clock.with_extension("new");
    std::fs::write(&new, format!("{offset}\n")).unwrap();
    std::fs::rename(new, clock).unwrap();
}

/// Where they are started.
struct Site<'s> {
    dir: &'s Path,
    library: String,
    annex: Annex,
}

impl Site<'_> {
    async fn start(&self, number: usize) -> Replica {
        let clock = self.dir.join(format!("clock-{number}"));
        if !clock.exists() {
            set(&clock, ALWAYS[number % ALWAYS.len()]);
        }
        Replica { process: self.start_by("purchase", &clock).await, clock }
    }

    /// A replica of this service that reads this clock.
    async fn start_by(&self, service: &str, clock: &Path) -> Extra {
        let file = clock.to_string_lossy();
        let further = [
            ("LD_PRELOAD", &*self.library),
            ("FAKETIME_TIMESTAMP_FILE", &*file),
            ("FAKETIME_NO_CACHE", "1"),
            (DEADLINE.0, DEADLINE.1),
            // Time that only goes on does so, whatever is done to the clock on the wall.
            ("FAKETIME_DONT_FAKE_MONOTONIC", "1"),
            ("DONT_FAKE_MONOTONIC", "1"),
        ];
        self.annex.start(service, &further).await
    }
}

/// Each replica is asked for purchases by many at the same time; every id is a new one.
async fn buy_everywhere(replicas: &[Replica], customer: &Customer, cart: &Cart, ids: &mut BTreeSet<u64>) {
    let round = ids.len();
    let asking = replicas.iter().enumerate().flat_map(|(number, replica)| {
        (0..AT_ONCE).map(move |place| async move {
            let key = format!("{round}-{number}-{place}");
            loop {
                // A connection that was kept for the next request may have been closed meanwhile.
                if let Ok(answer) = customer.buy(replica.process.client(), cart, Some(&key)).await {
                    return answer;
                }
            }
        })
    });
    let answers = tokio::time::timeout(ENDED_WITHIN, futures_util::future::join_all(asking)).await;
    for answer in answers.expect("every replica answers") {
        assert_eq!(answer.status, 201, "{}", answer.body);
        let id = answer.json()["purchase_id"].as_u64().unwrap();
        assert!(id < 1 << 53 && ids.insert(id), "id {id} came twice");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn ids_stay_unique_on_sixteen_replicas_and_nothing_is_overdue_whatever_their_clocks_say() {
    let _turn = turn().await;
    let (dir, engines) = (TempDir::new(), Engines::shared());
    // A token is good on a replica whose clock is hours off.
    let options = options(&dir, &engines)
        .env("SAGA_ACCOUNT__ACCESS_TOKEN_SECONDS", "86400")
        .env(DEADLINE.0, DEADLINE.1);
    let mut shop = Shop::start(options).await.unwrap();
    let client = shop.client();
    let customer = Customer::sign_up(&client, 1).await;
    let kettle = Product::create(&client, "kettle", 100, 1_000_000).await;
    let cart = Cart { lines: vec![(kettle.id, 1)] };

    let annex = Annex::of(&shop, &dir, &engines).await;
    let site = Site { dir: dir.path(), library: library().await, annex };
    // It closes the ids of a few seconds ago to all of them: by their common clock, not by its own.
    let ahead = dir.path().join("clock-of-product");
    set(&ahead, "+3600");
    let ahead = site.start_by("product", &ahead).await;
    let mut stock = BTreeMap::from([(kettle.id, kettle.stock)]);
    for client in [ahead.client(), &client, &client] {
        let lamp = Product::create(client, "lamp", 100, 1).await;
        stock.insert(lamp.id, lamp.stock);
    }
    let mut replicas = Vec::new();
    for starting in (0..REPLICAS).collect::<Vec<_>>().chunks(4) {
        let started = starting.iter().map(|number| site.start(*number));
        replicas.extend(futures_util::future::join_all(started).await);
    }

    let mut ids = BTreeSet::new();
    for _ in 0..2 {
        buy_everywhere(&replicas, &customer, &cart, &mut ids).await;
    }
    for (number, replica) in replicas.iter().enumerate().skip(REPLICAS / 2) {
        set(&replica.clock, LATER[number % LATER.len()]);
    }
    for _ in 0..2 {
        buy_everywhere(&replicas, &customer, &cart, &mut ids).await;
    }
    // Some die, and come back with their clocks as wrong as they were.
    for number in (0..REPLICAS).step_by(3) {
        replicas[number].process.kill().await;
        replicas[number] = site.start(number).await;
    }
    for _ in 0..2 {
        buy_everywhere(&replicas, &customer, &cart, &mut ids).await;
    }

    until("every purchase has ended", ENDED_WITHIN, async || {
        let ended = testkit::traffic::all_ended(&client, std::slice::from_ref(&customer)).await;
        ended.is_some_and(|ended| ended.is_superset(&ids))
    })
    .await;
    let expected = Expected { stock, acknowledged: ids.clone(), ..Expected::default() };
    let report = checks::check(engines.books(), &expected).unwrap();
    report.assert_clean();
    assert_eq!(report.accepted, ids.len());
    assert_eq!(report.committed, ids.len(), "none is overdue, whatever a clock says: {report}");
    println!("{report}");
    drop((replicas, ahead));
    assert!(shop.terminate().await.success());
}

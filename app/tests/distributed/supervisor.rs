//! Processes die, and the supervisor itself.

use std::collections::BTreeSet;

use testkit::traffic::Habits;
use testkit::{Engines, Ordeal, Shop, TempDir, is_alive, until};

use super::{ALL_PROCESSES, BACK_WITHIN, GONE_WITHIN, PROCESSES, all_are_ready, options};

/// One process of each kind is killed while customers buy, then the supervisor, and everything still adds up.
#[tokio::test(flavor = "multi_thread")]
async fn whoever_is_killed_comes_back_and_nothing_is_lost() {
    let (dir, engines) = (TempDir::new(), Engines::shared());
    let mut ordeal = Ordeal::begin(
        "processes",
        options(&dir, &engines, PROCESSES),
        Habits { refusals_are_fine: true, ..Habits::default() },
    )
    .await;
    let shop = ordeal.open().await;
    let replicas = shop.replicas().await;
    let services: BTreeSet<&str> = replicas.iter().map(|replica| replica.service.as_str()).collect();
    assert_eq!(services.len(), 7, "{services:?}");
    for service in services {
        let victim = replicas.iter().find(|replica| replica.service == service).unwrap();
        victim.signal("KILL").await;
        until(&format!("{} is back", victim.name), BACK_WITHIN, async || {
            let now = shop.replicas().await;
            let again = now.iter().find(|replica| replica.name == victim.name).unwrap();
            again.restarts == 1 && again.ready && again.pid != victim.pid && again.api == victim.api
        })
        .await;
        ordeal.ledger().assert_no_faults();
    }
    let metrics = shop.admin().get("/metrics", None).await.unwrap().body;
    for replica in &replicas {
        let counted = metrics.lines().any(|line| {
            let one = format!("process=\"{}\"", replica.name);
            line.starts_with("supervisor_process_restarts_total") && line.contains(&one)
        });
        assert!(counted, "{}: {metrics}", replica.name);
    }
    all_are_ready(&shop).await;
    let totals = ordeal.end_in(shop).await;
    assert!(totals.succeeded > 0 && totals.failed > 0, "{totals:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn nobody_outlives_a_supervisor_that_is_killed() {
    let (dir, engines) = (TempDir::new(), Engines::shared());
    let mut shop = Shop::start(options(&dir, &engines, PROCESSES)).await.unwrap();
    let pids: Vec<u32> = shop.replicas().await.iter().filter_map(|replica| replica.pid).collect();
    assert_eq!(pids.len(), ALL_PROCESSES);
    assert!(pids.iter().all(|pid| is_alive(*pid)));
    shop.kill9().await;
    until("all processes are gone", GONE_WITHIN, async || !pids.iter().any(|pid| is_alive(*pid))).await;
}

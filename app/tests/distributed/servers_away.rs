//! Servers that are not there yet, or not any more.

use servers::{MariaDb, Nats};
use testkit::traffic::Habits;
use testkit::{Engines, Ordeal, Shop, TempDir, until};

use super::{BACK_WITHIN, options};

async fn unready(shop: &Shop, because: &str) {
    until(&format!("it is not ready because of {because}"), BACK_WITHIN, async || {
        let answer = shop.admin().get("/readyz", None).await;
        answer.is_ok_and(|answer| answer.status == 503 && answer.body.contains(because))
    })
    .await;
}

/// The start waits for both servers, whichever comes first; a server that goes is named, and comes back by itself; so does what
/// was bought meanwhile.
#[tokio::test(flavor = "multi_thread")]
async fn servers_may_come_late_and_go_and_come_back() {
    let (dir, mariadb, nats) = (TempDir::new(), MariaDb::start().unwrap(), Nats::start(1).unwrap());
    let engines = Engines::new(mariadb.address().clone(), &nats.urls(), None);
    mariadb.stop().unwrap();
    nats.kill().unwrap();
    let starting = tokio::spawn(Shop::start(options(&dir, &engines, 0)));
    nats.restart().unwrap();
    mariadb.restart().unwrap();
    let shop = starting.await.unwrap().unwrap();

    mariadb.kill().unwrap();
    unready(&shop, "database").await;
    mariadb.restart().unwrap();
    super::all_are_ready(&shop).await;
    nats.kill().unwrap();
    unready(&shop, "bus").await;
    nats.restart().unwrap();
    super::all_are_ready(&shop).await;
    drop(shop);

    // And nothing of what is bought now is the worse for it.
    let mut ordeal = Ordeal::begin(
        "servers",
        options(&dir, &engines, 0),
        Habits { refusals_are_fine: true, ..Habits::default() },
    )
    .await;
    let shop = ordeal.open().await;
    until("much is bought", BACK_WITHIN, async || ordeal.ledger().acknowledged().len() > 50).await;
    mariadb.kill().unwrap();
    nats.kill().unwrap();
    nats.restart().unwrap();
    mariadb.restart().unwrap();
    let before = ordeal.ledger().acknowledged().len();
    until("more is bought", BACK_WITHIN, async || ordeal.ledger().acknowledged().len() > before + 50).await;
    ordeal.end_in(shop).await;
}

//! Each server dies under load, loses what it holds, or does not answer: rows 7, 9, 17, 18 and 19 of the list of faults. One shop
//! lives through all of it: nothing of it is ever started again.

use std::time::Instant;

use servers::{MariaDb, Nats, Proxy, RedisCluster};
use testkit::traffic::{Cart, Customer};
use testkit::{Engines, Options, Ordeal, Shop, TempDir, until};

use super::{CROWD, SOON, all_are_ready, much_is_bought, options, turn};

/// Purchases that make an act.
const MUCH: usize = 50;
/// As a client sends it; the session's settings have the word, too.
const COMMIT: &[u8] = b"\x03COMMIT";
/// Commits of each service whose answers are lost.
const LOST_COMMITS: u64 = 6;
/// How often everything in Redis is deleted.
const FLUSHES: usize = 5;

/// Servers of the test's own, with a proxy between each service and its database.
struct Site {
    mariadb: MariaDb,
    nats: Nats,
    redis: RedisCluster,
    engines: Engines,
    links: [(&'static str, Proxy); 4],
}

impl Site {
    fn open() -> Site {
        let (mariadb, nats, redis) = std::thread::scope(|scope| {
            let mariadb = scope.spawn(|| MariaDb::start().unwrap());
            let nats = scope.spawn(|| Nats::start(3).unwrap());
            let redis = scope.spawn(|| RedisCluster::start().unwrap());
            (mariadb.join().unwrap(), nats.join().unwrap(), redis.join().unwrap())
        });
        let engines = Engines::new(mariadb.address().clone(), &nats.urls(), Some(&redis.urls()));
        let links = ["product", "order", "payment", "purchase"]
            .map(|service| (service, Proxy::start(mariadb.socket_addr()).unwrap()));
        Site { mariadb, nats, redis, engines, links }
    }

    fn options(&self, dir: &TempDir) -> Options {
        let (account, _) = self.mariadb.url().rsplit_once('@').unwrap();
        self.links.iter().fold(options(dir, &self.engines), |options, (service, proxy)| {
            let url = format!("{account}@{}/{}", proxy.socket_addr(), self.engines.database(service));
            options.env(format!("SAGA_MYSQL__{}", service.to_uppercase()), url)
        })
    }

    async fn mariadb_is_killed(&self, ordeal: &Ordeal) {
        self.mariadb.kill().unwrap();
        let before = ordeal.ledger().figures().refused;
        until("purchases are refused", SOON, async || ordeal.ledger().figures().refused > before + 5).await;
        self.mariadb.restart().unwrap();
    }

    /// Two of three go on, and what only the third had is made again on one of them.
    async fn a_nats_node_stays_away(&self, ordeal: &Ordeal, node: usize) {
        self.nats.nodes()[node].kill().unwrap();
        much_is_bought(ordeal, MUCH).await;
        self.nats.restart().unwrap();
    }

    fn a_nats_node_is_killed(&self, node: usize) {
        self.nats.nodes()[node].kill().unwrap();
        self.nats.restart().unwrap();
    }

    /// Accepting needs no broker; nothing is left of what it held.
    async fn the_broker_loses_everything(&self, ordeal: &Ordeal) {
        self.nats.kill().unwrap();
        self.nats.wipe().unwrap();
        // As many as these customers may have open; further ones they keep to themselves.
        until("it is accepted without a broker", SOON, async || {
            let now = ordeal.ledger().figures();
            now.acknowledged >= now.ended + MUCH
        })
        .await;
        self.nats.restart().unwrap();
    }

    async fn a_redis_primary_is_killed(&self, ordeal: &Ordeal) {
        self.redis.primaries().unwrap()[0].kill().unwrap();
        much_is_bought(ordeal, MUCH).await;
        self.redis.restart().unwrap();
    }

    async fn redis_is_wiped(&self, ordeal: &Ordeal) {
        for _ in 0..FLUSHES {
            self.redis.flush_all().unwrap();
            much_is_bought(ordeal, MUCH / FLUSHES).await;
        }
    }

    async fn commits_are_lost(&self) {
        for (service, proxy) in &self.links {
            for count in 1..=LOST_COMMITS {
                proxy.cut_after(COMMIT);
                let cut = async || proxy.trapped() == count;
                until(&format!("a commit of {service} is cut off"), SOON, cut).await;
            }
        }
    }

    /// Half-open connections: nobody answers on them, and nobody closes them.
    async fn databases_do_not_answer(&self, shop: &Shop) {
        self.links.iter().for_each(|(_, proxy)| proxy.stall().unwrap());
        until("it is seen that the databases do not answer", SOON, async || {
            shop.admin().get("/readyz", None).await.is_ok_and(|answer| answer.body.contains("database"))
        })
        .await;
        self.links.iter().for_each(|(_, proxy)| proxy.heal().unwrap());
    }
}

/// A purchase of now, from its request to its end.
async fn one_is_served(shop: &Shop, customer: &Customer, cart: &Cart) {
    let (client, begun) = (shop.client(), Instant::now());
    let answer = customer.buy(&client, cart, Some("served at once")).await.unwrap();
    assert_eq!(answer.status, 201, "{}", answer.body);
    let path = format!("/api/purchase/{}", answer.json()["purchase_id"]);
    until("it has succeeded", SOON, async || {
        let shown = client.get(&path, Some(&customer.token)).await.unwrap();
        shown.status == 200 && shown.json()["state"] == "SUCCEEDED"
    })
    .await;
    println!("one that came after it had ended after {:.1?}", begun.elapsed());
}

#[tokio::test(flavor = "multi_thread")]
async fn servers_die_one_after_the_other_and_everything_ends_by_itself() {
    let _turn = turn().await;
    let (dir, site) = (TempDir::new(), Site::open());
    let mut ordeal = Ordeal::begin("servers die", site.options(&dir), CROWD).await;
    let shop = ordeal.open().await;
    let pids: Vec<_> = shop.replicas().await.into_iter().map(|replica| replica.pid).collect();
    much_is_bought(&ordeal, MUCH).await;

    site.mariadb_is_killed(&ordeal).await;
    much_is_bought(&ordeal, MUCH).await;
    ordeal.reckon(&shop, "row 17: MariaDB killed").await;

    site.a_nats_node_stays_away(&ordeal, 0).await;
    much_is_bought(&ordeal, MUCH).await;
    ordeal.reckon(&shop, "row 17: a NATS node killed, and away for long").await;

    for node in 1..site.nats.nodes().len() {
        site.a_nats_node_is_killed(node);
        much_is_bought(&ordeal, MUCH).await;
        ordeal.reckon(&shop, &format!("row 17: NATS node {node} killed and started")).await;
    }

    site.a_redis_primary_is_killed(&ordeal).await;
    much_is_bought(&ordeal, MUCH).await;
    ordeal.reckon(&shop, "row 17: a Redis primary killed").await;

    site.redis_is_wiped(&ordeal).await;
    ordeal.reckon(&shop, "row 19: Redis wiped").await;

    site.commits_are_lost().await;
    much_is_bought(&ordeal, MUCH).await;
    ordeal.reckon(&shop, "row 18: cut off behind COMMIT").await;

    site.databases_do_not_answer(&shop).await;
    much_is_bought(&ordeal, MUCH).await;
    ordeal.reckon(&shop, "rows 7 and 18: half-open connections to the databases").await;

    let (customer, cart) = (ordeal.customers()[0].clone(), ordeal.catalogue().plenty_of_one());
    site.the_broker_loses_everything(&ordeal).await;
    one_is_served(&shop, &customer, &cart).await;
    ordeal.reckon(&shop, "row 9: the broker lost everything").await;

    all_are_ready(&shop).await;
    let now: Vec<_> = shop.replicas().await.into_iter().map(|replica| replica.pid).collect();
    assert_eq!(now, pids, "nothing was started again");
    let totals = ordeal.end_in(shop).await;
    assert!(totals.succeeded > 0 && totals.failed > 0, "{totals:?}");
}

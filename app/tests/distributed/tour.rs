//! What a customer sees is what the shop in one process shows; and nobody sees a password.

use serde_json::{Value, json};
use testkit::checks::{self, Expected};
use testkit::traffic::{Customer, PAYMENT_LIMIT, Product};
use testkit::{Client, Engines, Events, Shop, TempDir, is_alive, until};

use super::{ALL_PROCESSES, ENDED_WITHIN, PROCESSES, options};

const STOCK: &str = "UPDATE_PRODUCT_INVENTORY";
const ORDER: &str = "CREATE_ORDER";
const PAYMENT: &str = "CREATE_PAYMENT";

async fn buy(client: &Client, token: &str, product: u64, amount: i64) -> u64 {
    let cart = json!({"purchase_items": [{"product_id": product, "amount": amount}],
                      "payment": {"currency_code": "NT"}});
    let answer = client.post("/api/purchase", Some(token), &cart).await.unwrap();
    assert_eq!(answer.status, 201, "{}", answer.body);
    answer.json()["purchase_id"].as_u64().unwrap()
}

/// A purchase's events up to the one that is its last: `step status`, without the `STATUS_`.
async fn events_of(events: &mut Events, purchase: u64, last: (&str, &str)) -> Vec<(String, String)> {
    let mut seen = Vec::new();
    let last = (last.0.to_owned(), last.1.to_owned());
    while seen.last() != Some(&last) {
        let event = events.next(ENDED_WITHIN).await;
        let event = event.unwrap_or_else(|| panic!("no event behind {seen:?}; ended: {}", events.ended()));
        let data: Value = serde_json::from_str(&event.data).unwrap();
        if data["purchase_id"] == purchase {
            let text = |name: &str| data[name].as_str().unwrap().trim_start_matches("STATUS_").to_owned();
            seen.push((text("step"), text("status")));
        }
    }
    seen
}

fn pairs(of: &[(&str, &str)]) -> Vec<(String, String)> {
    of.iter().map(|(step, status)| ((*step).to_owned(), (*status).to_owned())).collect()
}

async fn answer(client: &Client, path: &str, token: &str) -> (u16, Value) {
    let answer = client.get(path, Some(token)).await.unwrap();
    (answer.status, answer.json())
}

/// A purchase that succeeds, one that the stock refuses, one that is rolled back from the last step.
pub(super) async fn tour(shop: &Shop, engines: &Engines) {
    let client = shop.client();
    let customer = Customer::sign_up(&client, 1).await;
    let token = &customer.token;
    let kettle = Product::create(&client, "kettle", 100, 10).await;
    let ring = Product::create(&client, "ring", PAYMENT_LIMIT + 1, 10).await;
    let mut events = client.events(token, None).await.unwrap();

    let good = buy(&client, token, kettle.id, 2).await;
    let expected = pairs(&[
        (STOCK, "EXECUTE"),
        (STOCK, "SUCCESS"),
        (ORDER, "EXECUTE"),
        (ORDER, "SUCCESS"),
        (PAYMENT, "EXECUTE"),
        (PAYMENT, "SUCCESS"),
    ]);
    assert_eq!(events_of(&mut events, good, (PAYMENT, "SUCCESS")).await, expected);
    let (status, order) = answer(&client, &format!("/api/order/{good}"), token).await;
    assert_eq!((status, &order["purchased_items"][0]["name"]), (200, &json!("kettle")), "{order}");
    let (status, payment) = answer(&client, &format!("/api/payment/{good}"), token).await;
    assert_eq!((status, &payment["amount"]), (200, &json!(200)), "{payment}");
    let (_, purchase) = answer(&client, &format!("/api/purchase/{good}"), token).await;
    assert_eq!(purchase["state"], "SUCCEEDED", "{purchase}");

    let too_many = buy(&client, token, kettle.id, 9).await;
    let expected = pairs(&[(STOCK, "EXECUTE"), (STOCK, "FAILED")]);
    assert_eq!(events_of(&mut events, too_many, (STOCK, "FAILED")).await, expected);
    assert_eq!(answer(&client, &format!("/api/order/{too_many}"), token).await.0, 404);

    let too_dear = buy(&client, token, ring.id, 1).await;
    let expected = pairs(&[
        (STOCK, "EXECUTE"),
        (STOCK, "SUCCESS"),
        (ORDER, "EXECUTE"),
        (ORDER, "SUCCESS"),
        (PAYMENT, "EXECUTE"),
        (PAYMENT, "FAILED"),
        (ORDER, "ROLLBACKED"),
        (STOCK, "ROLLBACKED"),
    ]);
    assert_eq!(events_of(&mut events, too_dear, (STOCK, "ROLLBACKED")).await, expected);
    for path in ["order", "payment"] {
        assert_eq!(answer(&client, &format!("/api/{path}/{too_dear}"), token).await.0, 404);
    }

    // A second at most, whichever replica is asked: what others wrote may be seen that much later.
    for (product, left) in [(kettle, 8), (ring, 10)] {
        until("the stock is seen", ENDED_WITHIN, async || {
            answer(&client, &format!("/api/product/{}", product.id), token).await.1["inventory"] == left
        })
        .await;
    }
    let (_, list) = answer(&client, "/api/purchases?size=10", token).await;
    assert_eq!(list["purchases"].as_array().map(Vec::len), Some(3), "{list}");

    let expected = Expected {
        stock: [(kettle.id, 10), (ring.id, 10)].into(),
        acknowledged: [good, too_many, too_dear].into(),
        ..Expected::default()
    };
    checks::check(engines.books(), &expected).unwrap().assert_clean();
    // And what is wrong would have been seen there.
    let wrong = Expected { stock: [(kettle.id, 11), (ring.id, 10)].into(), ..expected };
    let report = checks::check(engines.books(), &wrong).unwrap();
    assert_eq!(report.violations.len(), 1, "{report}");
}

#[tokio::test(flavor = "multi_thread")]
async fn many_processes_are_one_shop() {
    let (dir, engines) = (TempDir::new(), Engines::shared());
    let mut shop = Shop::start(options(&dir, &engines, PROCESSES)).await.unwrap();
    let replicas = shop.replicas().await;
    assert_eq!(replicas.len(), ALL_PROCESSES, "{replicas:?}");
    tour(&shop, &engines).await;

    let url = engines.mysql().url();
    let password = url.split_once("root:").unwrap().1.split_once('@').unwrap().0;
    for replica in &replicas {
        let arguments = replica.arguments();
        assert!(arguments.contains(&replica.service) && !arguments.contains(password), "{arguments}");
    }
    assert!(!shop.banner().contains(password), "{}", shop.banner());

    let status = shop.terminate().await;
    assert!(status.success(), "{status}:\n{}", testkit::tail(&shop.stderr()));
    let left: Vec<_> = replicas.iter().filter(|replica| replica.pid.is_some_and(is_alive)).collect();
    assert!(left.is_empty(), "{left:?}");
    let log = shop.stderr();
    assert!(!log.contains(password));
    for replica in &replicas {
        let name = format!("\"replica\":\"{}\"", replica.name);
        // The library tells of the end of its connection whenever it comes to it.
        let mut own = log.lines().filter(|line| line.contains(&name) && !line.contains("async_nats"));
        let last: Value = serde_json::from_str(own.next_back().unwrap()).unwrap();
        assert_eq!(last["message"], "stopped", "{}: {last}", replica.name);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn one_process_on_servers_is_the_same_shop() {
    let (dir, engines) = (TempDir::new(), Engines::shared());
    let mut shop = Shop::start(options(&dir, &engines, 0)).await.unwrap();
    tour(&shop, &engines).await;
    let status = shop.terminate().await;
    assert!(status.success(), "{status}:\n{}", testkit::tail(&shop.stderr()));
}

/// Six nodes are for many; one without a cluster will do, and is used.
#[tokio::test(flavor = "multi_thread")]
async fn a_plain_redis_will_do() {
    let redis = servers::Redis::start().unwrap();
    let (mysql, nats) = (servers::shared::mariadb().clone(), servers::shared::nats());
    let (dir, engines) = (TempDir::new(), Engines::new(mysql, nats, Some(&[redis.url()])));
    let mut shop = Shop::start(options(&dir, &engines, PROCESSES)).await.unwrap();
    tour(&shop, &engines).await;
    let kept = redis.call(&["DBSIZE"]).unwrap();
    assert!(matches!(kept, servers::Reply::Number(1..)), "{kept:?}");
    for replica in shop.replicas().await {
        let ready = replica.admin().get("/readyz", None).await.unwrap();
        assert_eq!(ready.status, 200, "{}: {}", replica.name, ready.body);
    }
    let status = shop.terminate().await;
    assert!(status.success(), "{status}:\n{}", testkit::tail(&shop.stderr()));
}

//! One purchase is one trace: the spans that arrive at a collector make up one tree, from the customer's request to the last report.

#![allow(clippy::unwrap_used, reason = "what fails here fails the test")]

mod tree;

use std::time::Duration;

use serde_json::json;
use testkit::traffic::{Customer, PAYMENT_LIMIT, Product};
use testkit::{Client, Collector, Engines, Options, Shop, Span, TempDir, until};

use tree::Tree;

/// A purchase has ended, and all of its spans have arrived, within this time.
const ARRIVED_WITHIN: Duration = Duration::from_secs(60);

/// So many purchases are not all recorded at a half, nor none of them.
const PURCHASES: usize = 30;

/// A trace that a client has begun.
const OUTSIDE: (&str, &str) = ("4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7");

fn options(dir: &TempDir, collector: &Collector, ratio: &str) -> Options {
    Options::new(env!("CARGO_BIN_EXE_saga"), dir.path().join("data"))
        .arg("--no-demo-data")
        // On a machine that is busy with other tests nobody is to be taken for lost.
        .env("SAGA_PURCHASE__RETRY_FIRST_SECONDS", "60")
        .env("SAGA_TRACE__ENDPOINT", collector.endpoint())
        .env("SAGA_TRACE__SAMPLE_RATIO", ratio)
}

struct Buyer {
    client: Client,
    customer: Customer,
    kettle: Product,
    ring: Product,
}

impl Buyer {
    async fn of(shop: &Shop) -> Buyer {
        let client = shop.client();
        let customer = Customer::sign_up(&client, 1).await;
        let kettle = Product::create(&client, "kettle", 100, 10).await;
        let ring = Product::create(&client, "ring", PAYMENT_LIMIT + 1, 10).await;
        Buyer { client, customer, kettle, ring }
    }

    /// Buys one; gives the purchase's id. A process that has just started may not be asked yet: then nothing was bought.
    async fn buy(&self, product: Product, traceparent: Option<&str>) -> String {
        let cart = json!({"purchase_items": [{"product_id": product.id, "amount": 1}],
                          "payment": {"currency_code": "NT"}});
        let bearer = format!("bearer {}", self.customer.token);
        let mut headers = vec![("authorization", bearer.as_str())];
        headers.extend(traceparent.map(|value| ("traceparent", value)));
        let mut bought = None;
        until("it is bought", ARRIVED_WITHIN, async || {
            let body = Some(cart.to_string().into_bytes());
            let answer = self.client.request("POST", "/api/purchase", &headers, body).await.unwrap();
            assert!([201, 503].contains(&answer.status), "{}: {}", answer.status, answer.body);
            bought = (answer.status == 201).then(|| answer.json()["purchase_id"].as_u64().unwrap());
            bought.is_some()
        })
        .await;
        bought.unwrap().to_string()
    }
}

/// The tree of a purchase, once all of these are in it: each is a path of `service/name` from above.
async fn tree(collector: &Collector, purchase: &str, paths: &[Vec<&str>]) -> Tree {
    let whole = |spans: &[Span]| {
        let tree = Tree::of_purchase(spans, purchase)?;
        tree.check()?;
        paths.iter().try_for_each(|path| tree.has(path))?;
        Ok(tree)
    };
    collector.until(ARRIVED_WITHIN, whole).await
}

/// Who accepts a purchase asks the first step; from then on whoever has recorded a reply asks the next one.
const START: [&str; 2] = ["purchase/accept", "purchase/publish saga.purchase.inventory"];
const RESERVE: [&str; 1] = ["product/process saga.purchase.inventory"];
const ORDER: [&str; 2] = ["product/publish saga.purchase.order", "order/process saga.purchase.order"];
const PAY: [&str; 2] = ["order/publish saga.purchase.payment", "payment/process saga.purchase.payment"];
const TAKE_ORDER_BACK: [&str; 2] =
    ["payment/publish saga.purchase.order", "order/process saga.purchase.order"];
const GIVE_STOCK_BACK: [&str; 2] =
    ["order/publish saga.purchase.inventory", "product/process saga.purchase.inventory"];
const REPORT_SUCCESS: [&str; 2] =
    ["payment/publish saga.purchase.progress", "purchase/process saga.purchase.progress"];
const REPORT_FAILURE: [&str; 2] =
    ["product/publish saga.purchase.progress", "purchase/process saga.purchase.progress"];

/// From the request through these steps.
fn through(from: &[&'static str], steps: &[&[&'static str]], to: &[&'static str]) -> Vec<&'static str> {
    [from, &START, &RESERVE, &steps.concat(), to].concat()
}

/// The paths of a purchase that succeeds, wherever its request came in.
fn succeeded(from: &[&'static str]) -> Vec<Vec<&'static str>> {
    vec![
        [from, &["purchase/accept", "purchase/write purchase"]].concat(),
        through(from, &[], &["product/write product"]),
        // Reports of steps wait, but not those of a recorded purchase.
        through(from, &[], &["product/publish saga.purchase.progress"]),
        through(from, &[&ORDER], &["order/write order"]),
        through(from, &[&ORDER], &["order/publish saga.purchase.progress"]),
        through(from, &[&ORDER, &PAY], &["payment/write payment"]),
        through(from, &[&ORDER, &PAY, &REPORT_SUCCESS], &["purchase/write purchase"]),
    ]
}

/// Likewise of one whose payment is declined: the order and the stock are given back.
fn declined(from: &[&'static str]) -> Vec<Vec<&'static str>> {
    let order_is_back: [&[_]; 3] = [&ORDER, &PAY, &TAKE_ORDER_BACK];
    let stock_is_back: [&[_]; 4] = [&ORDER, &PAY, &TAKE_ORDER_BACK, &GIVE_STOCK_BACK];
    let reported: [&[_]; 5] = [&ORDER, &PAY, &TAKE_ORDER_BACK, &GIVE_STOCK_BACK, &REPORT_FAILURE];
    vec![
        through(from, &order_is_back, &["order/write order"]),
        through(from, &stock_is_back, &["product/write product"]),
        through(from, &reported, &["purchase/write purchase"]),
    ]
}

/// The phases in which a service was asked, in their order.
fn phases(tree: &Tree, service: &str) -> Vec<String> {
    let name = format!("process saga.purchase.{}", if service == "product" { "inventory" } else { service });
    tree.spans(service, &name).iter().map(|span| span.detail("saga.phase").to_owned()).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_purchase_through_many_processes_is_one_tree() {
    let (dir, engines, collector) = (TempDir::new(), Engines::shared(), Collector::start().await);
    let shop = Shop::start(options(&dir, &collector, "1.0").on(&engines, 1)).await.unwrap();
    let buyer = Buyer::of(&shop).await;
    let gate = ["gateway/POST /api/purchase", "gateway/POST", "purchase/POST /api/purchase"];

    let mut expected = succeeded(&gate);
    let question = "product.ProductService/CheckProducts";
    let (asks, answers) = (format!("purchase/{question}"), format!("product/{question}"));
    expected.push([&gate[..], &[&asks, &answers, "product/read product"]].concat());
    // What is announced to the copies before the stock changes, within the transaction.
    let fence = ["product/write product", "product/EVALSHA"];
    expected.push(through(&gate, &[], &fence));
    // And what the replicas tell each other.
    expected.push([&gate[..], &["purchase/accept", "purchase/XADD"]].concat());
    expected.push(through(&gate, &[&ORDER, &PAY, &REPORT_SUCCESS], &["purchase/XADD"]));
    let good = buyer.buy(buyer.kettle, None).await;
    let good = tree(&collector, &good, &expected).await;
    assert_eq!(good.root().parent, None);
    for service in ["product", "order", "payment"] {
        assert_eq!(phases(&good, service), ["action"], "{good}");
    }

    let dear = buyer.buy(buyer.ring, None).await;
    let dear = tree(&collector, &dear, &declined(&gate)).await;
    assert_ne!(dear.trace(), good.trace());
    assert_eq!(phases(&dear, "product"), ["action", "compensation"], "{dear}");
    assert_eq!(phases(&dear, "order"), ["action", "compensation"], "{dear}");
    assert_eq!(phases(&dear, "payment"), ["action"], "{dear}");

    let (trace, span) = OUTSIDE;
    let theirs = buyer.buy(buyer.kettle, Some(&format!("00-{trace}-{span}-01"))).await;
    let theirs = tree(&collector, &theirs, &succeeded(&gate)).await;
    assert_eq!((theirs.trace(), theirs.root().parent.as_deref()), (trace, Some(span)));

    for tree in [good, dear, theirs] {
        assert!(tree.failed().is_empty(), "{:?} in\n{tree}", tree.failed());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_purchase_in_one_process_is_one_tree() {
    let (dir, collector) = (TempDir::new(), Collector::start().await);
    let shop = Shop::start(options(&dir, &collector, "1.0")).await.unwrap();
    let buyer = Buyer::of(&shop).await;
    let door = ["purchase/POST /api/purchase"];
    let good = buyer.buy(buyer.kettle, None).await;
    let good = tree(&collector, &good, &succeeded(&door)).await;
    assert_eq!(good.root().parent, None);
    let dear = buyer.buy(buyer.ring, None).await;
    let dear = tree(&collector, &dear, &declined(&door)).await;
    assert_eq!(phases(&dear, "order"), ["action", "compensation"], "{dear}");
    let metrics = shop.admin().get("/metrics", None).await.unwrap().body;
    assert!(metrics.contains("trace_spans_dropped_total 0"), "{metrics}");
}

/// Whatever is done without one, nothing is sent of it; a client that has begun a trace gets its spans all the same.
#[tokio::test(flavor = "multi_thread")]
async fn at_a_ratio_of_zero_only_what_a_client_asks_for_is_recorded() {
    let (dir, collector) = (TempDir::new(), Collector::start().await);
    let mut shop = Shop::start(options(&dir, &collector, "0")).await.unwrap();
    let buyer = Buyer::of(&shop).await;
    buyer.buy(buyer.kettle, None).await;
    let (trace, span) = OUTSIDE;
    buyer.buy(buyer.kettle, Some(&format!("00-{trace}-{span}-00"))).await;
    let theirs = buyer.buy(buyer.kettle, Some(&format!("00-{trace}-{span}-01"))).await;
    let theirs = tree(&collector, &theirs, &succeeded(&["purchase/POST /api/purchase"])).await;
    assert_eq!(theirs.root().parent.as_deref(), Some(span));
    shop.terminate().await;
    let accepted = collector.spans().iter().filter(|span| span.name == "accept").count();
    assert_eq!(accepted, 1, "of three purchases");
    assert!(collector.spans().iter().all(|span| span.trace == trace));
}

/// The gateway decides, and all others keep to it: of half of the purchases everything arrives, of the others nothing.
#[tokio::test(flavor = "multi_thread")]
async fn what_the_gateway_does_not_record_nobody_does() {
    let (dir, engines, collector) = (TempDir::new(), Engines::shared(), Collector::start().await);
    let mut shop = Shop::start(options(&dir, &collector, "0.5").on(&engines, 1)).await.unwrap();
    let buyer = Buyer::of(&shop).await;
    for _ in 0..PURCHASES {
        buyer.buy(buyer.kettle, None).await;
    }
    // Whatever waits is sent by then.
    shop.terminate().await;
    let spans = collector.spans();
    let by = |service: &str, name: &str| -> Vec<&Span> {
        spans.iter().filter(|span| span.service == service && span.name == name).collect()
    };
    let (asked, tries) = (by("purchase", "POST /api/purchase"), by("gateway", "POST"));
    let known = |span: &Span| tries.iter().any(|asked| Some(&asked.id) == span.parent.as_ref());
    assert!(asked.iter().all(|span| known(span)), "a service has begun a trace of its own: {asked:?}");
    assert!((1..PURCHASES).contains(&asked.len()), "{} of {PURCHASES}", asked.len());
}

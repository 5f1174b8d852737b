//! `saga load` as its users run it: against the real shop, through its death, against books that are cooked, and against a shop
//! that has no more than the original's API.

#![allow(clippy::unwrap_used, reason = "what fails here fails the test")]

mod door;
mod original;

use std::collections::BTreeMap;
use std::time::Duration;

use serde_json::{Value, json};
use testkit::{Client, Options, Shop, TempDir, until};
use tokio::process::Command;

use door::Door;
use original::Original;

/// Something that happens within moments happens within this, on a busy machine too.
const SOON: Duration = Duration::from_secs(60);
/// What the load generator puts on the shelves, unless it is told otherwise.
const STOCK: i64 = 1_000_000_000;

struct Ended {
    code: Option<i32>,
    stdout: String,
    stderr: String,
}

impl Ended {
    /// The one JSON object on standard output.
    fn json(&self) -> Value {
        serde_json::from_str(&self.stdout).unwrap_or_else(|error| panic!("{error}: {self:?}"))
    }
}

impl std::fmt::Debug for Ended {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "exit code {:?}\n{}\n{}", self.code, self.stdout, self.stderr)
    }
}

fn command(line: &str) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_saga"));
    for (name, _) in std::env::vars_os().filter(|(name, _)| name.to_string_lossy().starts_with("SAGA_")) {
        command.env_remove(name);
    }
    command.arg("load").args(line.split_whitespace()).stdin(std::process::Stdio::null()).kill_on_drop(true);
    command
}

/// Runs `saga load` with these words behind it.
async fn load(line: &str) -> Ended {
    let output = command(line).output().await.unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    Ended { code: output.status.code(), stdout: text(output.stdout), stderr: text(output.stderr) }
}

fn shop_in(dir: &TempDir) -> Options {
    Options::new(env!("CARGO_BIN_EXE_saga"), dir.path().join("data"))
        .arg("--no-demo-data")
        .env("SAGA_PURCHASE__RETRY_FIRST_SECONDS", "1")
        .env("SAGA_PURCHASE__RETRY_MAX_SECONDS", "2")
}

/// What is left of each product, as the shop says.
async fn stocks(client: &Client) -> BTreeMap<u64, i64> {
    let answer = client.get("/api/products?offset=0&size=500", None).await.unwrap();
    let list = answer.json()["catalogs"].as_array().unwrap().clone();
    let line = |line: &Value| (line["id"].as_u64().unwrap(), line["inventory"].as_i64().unwrap());
    list.iter().map(line).collect()
}

fn number(report: &Value, path: &str) -> i64 {
    let found = report.pointer(path);
    found.and_then(Value::as_i64).unwrap_or_else(|| panic!("no number {path} in {report:#}"))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_closed_loop_adds_up() {
    let dir = TempDir::new();
    let shop = Shop::start(shop_in(&dir)).await.unwrap();
    let series = dir.path().join("series");
    let ended = load(&format!(
        "{} --duration 1s --warm-up 200ms --buyers 8 --customers 4 --products 10 --cart-size 2 --amount 3 \
         --out-of-stock 0.2 --declined 0.2 --threads 2 --streams 4 --verify --json --series {}",
        shop.client().base(),
        series.display(),
    ))
    .await;
    assert_eq!(ended.code, Some(0), "{ended:?}");
    let report = ended.json();
    let n = |path: &str| number(&report, path);

    assert!(n("/total/committed") > 0 && n("/measured/committed") > 0, "{report:#}");
    assert!(
        n("/total/aborted/UPDATE_PRODUCT_INVENTORY") > 0 && n("/total/aborted/CREATE_PAYMENT") > 0,
        "{report:#}"
    );
    let aborted: i64 =
        report["total"]["aborted"].as_object().unwrap().values().map(|it| it.as_i64().unwrap()).sum();
    assert_eq!(n("/total/committed") + aborted, n("/total/completed"));
    assert_eq!(n("/total/completed"), n("/total/accepted"));
    assert_eq!(n("/total/accepted"), n("/total/offered"));
    assert_eq!((n("/unresolved"), n("/total/unknown"), n("/verify/violations")), (0, 0, 0));
    assert_eq!(n("/verify/purchases_checked"), n("/total/completed"));
    assert_eq!(n("/verify/products_checked"), 10 + 10 + 10);
    assert_eq!(report["total"]["errors"], json!({}));
    for latencies in ["acceptance_us", "completion_us"] {
        let of = |name| n(&format!("/{latencies}/{name}"));
        let places = ["p50", "p90", "p99", "p99_9", "max"].map(of);
        assert!(places[0] > 0 && places.is_sorted(), "{latencies}: {places:?}");
    }
    assert!(report["load_generator_cores"].as_f64().unwrap() > 0.0);

    // The shop itself, asked by somebody else.
    let left = stocks(&shop.client()).await;
    let sold: i64 = left.values().map(|left| if *left == 0 { 0 } else { STOCK - left }).sum();
    assert_eq!(sold, n("/total/committed") * 2 * 3);

    let lines = std::fs::read_to_string(series).unwrap();
    let seconds: Vec<Value> = lines.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    for (field, total) in [("accepted", "/total/accepted"), ("completed", "/total/completed")] {
        let sum: i64 = seconds.iter().map(|second| second[field].as_i64().unwrap()).sum();
        assert_eq!(sum, n(total), "{field} of {lines}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_buyer_can_wait_for_the_end() {
    let dir = TempDir::new();
    let shop = Shop::start(shop_in(&dir)).await.unwrap();
    let line = "--duration 500ms --warm-up 0s --buyers 2 --until completed --declined 0.5 --verify --json";
    let ended = load(&format!("{} {line}", shop.client().base())).await;
    assert_eq!(ended.code, Some(0), "{ended:?}");
    let report = ended.json();
    assert!(number(&report, "/total/completed") > 0, "{report:#}");
    assert_eq!(number(&report, "/total/completed"), number(&report, "/total/accepted"));
    assert!(number(&report, "/acceptance_us/p50") <= number(&report, "/completion_us/p50"));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_open_loop_sends_what_is_due() {
    let dir = TempDir::new();
    let shop = Shop::start(shop_in(&dir)).await.unwrap();
    let line = "--rate 200 --duration 1s --warm-up 500ms --buyers 8 --verify";
    let ended = load(&format!("{} {line} --json", shop.client().base())).await;
    assert_eq!(ended.code, Some(0), "{ended:?}");
    let report = ended.json();
    assert_eq!(number(&report, "/total/offered"), 300);
    assert_eq!(number(&report, "/measured/offered"), 200);
    assert_eq!(number(&report, "/total/completed"), 300);
    assert_eq!(number(&report, "/completion_us/count"), 200);

    // The same as a table.
    let ended = load(&format!("{} {line}", shop.client().base())).await;
    assert_eq!(ended.code, Some(0), "{ended:?}");
    for text in
        ["open loop, 200 due a second", "accepted", "completed", "p99.9", "errors  none", "it adds up"]
    {
        assert!(ended.stdout.contains(text), "no {text:?} in {ended:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_lost_when_the_shop_is_killed() {
    let dir = TempDir::new();
    let mut shop = Shop::start(shop_in(&dir)).await.unwrap();
    let door = Door::open(shop.client().base()).await;
    let line = "--duration 3s --warm-up 0s --buyers 8 --products 5 --declined 0.1 --retry --verify --json";
    let running = tokio::spawn({
        let line = format!("{} {line}", door.base());
        async move { load(&line).await }
    });
    let client = shop.client();
    until("something is sold", SOON, async || stocks(&client).await.values().any(|left| *left < STOCK)).await;
    shop.kill9().await;
    let shop = Shop::start(shop_in(&dir)).await.unwrap();
    door.leads_to(shop.client().base());

    let ended = running.await.unwrap();
    assert_eq!(ended.code, Some(0), "{ended:?}");
    let report = ended.json();
    assert!(number(&report, "/total/resent") > 0, "{report:#}");
    assert!(number(&report, "/total/errors/connection_lost") > 0, "{report:#}");
    assert!(number(&report, "/total/errors/stream_cut") > 0, "{report:#}");
    assert_eq!(number(&report, "/total/accepted"), number(&report, "/total/offered"));
    assert_eq!(number(&report, "/total/completed"), number(&report, "/total/offered"));
    assert_eq!(number(&report, "/total/unknown"), 0);
}

/// A connection that dies between request and answer leaves open whether there is a purchase: the stream tells.
#[tokio::test(flavor = "multi_thread")]
async fn what_got_no_answer_is_found_out_about() {
    let dir = TempDir::new();
    let shop = Shop::start(shop_in(&dir)).await.unwrap();
    let door = Door::open(shop.client().base()).await;
    let line = "--duration 3s --warm-up 0s --buyers 4 --products 3 --verify --json";
    let running = tokio::spawn({
        let line = format!("{} {line}", door.base());
        async move { load(&line).await }
    });
    let client = shop.client();
    until("something is sold", SOON, async || stocks(&client).await.values().any(|left| *left < STOCK)).await;
    door.keeps_next_purchase_answers(3);
    let ended = running.await.unwrap();
    assert_eq!(ended.code, Some(0), "{ended:?}");
    let report = ended.json();
    assert_eq!(number(&report, "/total/unknown"), 3, "{report:#}");
    assert_eq!(number(&report, "/resolved"), 3, "{report:#}");
    assert_eq!(number(&report, "/verify/purchases_checked"), number(&report, "/total/completed") + 3);
}

#[tokio::test(flavor = "multi_thread")]
async fn cooked_books_are_found_and_named() {
    let dir = TempDir::new();
    let shop = Shop::start(shop_in(&dir)).await.unwrap();
    let client = shop.client();
    let line = format!("{} --duration 3s --warm-up 0s --buyers 4 --products 3 --verify", client.base());
    let running = tokio::spawn(async move { load(&line).await });
    until("something is sold", SOON, async || stocks(&client).await.values().any(|left| *left < STOCK)).await;
    // Somebody else takes five from the shelf.
    let client = shop.client();
    let product = *stocks(&client).await.keys().next().unwrap();
    let stranger = json!({"password": "abcd5432", "firstname": "a", "lastname": "b", "email": "a@example.com",
                          "address": "c", "phone_number": "0912345678"});
    let answer = client.post("/api/account/auth/signup", None, &stranger).await.unwrap();
    let token = answer.json()["access_token"].as_str().unwrap().to_owned();
    let cart =
        json!({"purchase_items": [{"product_id": product, "amount": 5}], "payment": {"currency_code": "NT"}});
    let answer = client.post("/api/purchase", Some(&token), &cart).await.unwrap();
    assert_eq!(answer.status, 201, "{}", answer.body);

    let ended = running.await.unwrap();
    assert_eq!(ended.code, Some(1), "{ended:?}");
    assert!(ended.stdout.contains("violations: 1"), "{ended:?}");
    assert!(ended.stdout.contains(&format!("I1: product {product} has")), "{ended:?}");
    assert!(ended.stderr.contains("does not add up"), "{ended:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn reading_is_measured_too() {
    let dir = TempDir::new();
    let shop = Shop::start(shop_in(&dir)).await.unwrap();
    for scenario in ["product", "catalogue"] {
        let line = format!(
            "{} --scenario {scenario} --duration 300ms --warm-up 0s --buyers 4 --json",
            shop.client().base()
        );
        let ended = load(&line).await;
        assert_eq!(ended.code, Some(0), "{ended:?}");
        let report = ended.json();
        assert!(number(&report, "/total/accepted") > 0, "{report:#}");
        assert_eq!(report["total"]["errors"], json!({}));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn only_the_answers_can_be_measured() {
    let dir = TempDir::new();
    let shop = Shop::start(shop_in(&dir)).await.unwrap();
    let line = "--completion none --duration 300ms --warm-up 0s --buyers 4 --json";
    let ended = load(&format!("{} {line}", shop.client().base())).await;
    assert_eq!(ended.code, Some(0), "{ended:?}");
    let report = ended.json();
    assert!(number(&report, "/total/accepted") > 0, "{report:#}");
    assert_eq!(number(&report, "/total/completed"), 0);
}

/// A shop that refuses is counted by kind, and its refusals are timed apart.
#[tokio::test(flavor = "multi_thread")]
async fn refusals_are_counted() {
    let dir = TempDir::new();
    let options = shop_in(&dir).env("SAGA_PURCHASE__MAX_OPEN_PER_CUSTOMER", "1");
    let shop = Shop::start(options).await.unwrap();
    let line = "--rate 500 --duration 1s --warm-up 0s --buyers 16 --customers 1 --verify --json";
    let ended = load(&format!("{} {line}", shop.client().base())).await;
    assert_eq!(ended.code, Some(0), "{ended:?}");
    let report = ended.json();
    let refused = number(&report, "/total/errors/429");
    assert!(refused > 0, "{report:#}");
    assert_eq!(number(&report, "/refused_us/count"), refused);
    assert_eq!(number(&report, "/total/accepted") + refused, 500);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_shop_with_the_originals_api_is_enough() {
    let original = Original::start().await;
    let line = "--duration 1s --warm-up 0s --buyers 4 --customers 2 --products 3 --event-timeout 200ms --verify --json";
    let ended = load(&format!("{} {line}", original.base())).await;
    assert_eq!(ended.code, Some(0), "{ended:?}");
    let report = ended.json();
    assert!(number(&report, "/total/committed") > 0, "{report:#}");
    assert_eq!(number(&report, "/total/completed"), number(&report, "/total/accepted"));
    assert!(number(&report, "/total/polled") > 0, "every tenth purchase has no events: {report:#}");
    assert!(number(&report, "/verify/purchases_checked") > 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_shop_that_is_not_there_is_named() {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    drop(listener);
    let ended = load(&url).await;
    assert_eq!(ended.code, Some(1), "{ended:?}");
    assert!(ended.stdout.is_empty() && ended.stderr.contains(&url), "{ended:?}");
    assert!(ended.stderr.contains("no connection"), "{ended:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_refused_is_named() {
    for (line, named) in [
        ("https://shop.example", "https://shop.example"),
        ("--rate 0", "'0'"),
        ("--duration soon", "'soon'"),
        ("--declined 2", "'2'"),
        ("--cart-size 9 --products 8", "--cart-size 9"),
        ("--verify --completion none", "--completion none"),
    ] {
        let ended = load(line).await;
        assert_eq!(ended.code, Some(2), "{line}: {ended:?}");
        assert!(ended.stdout.is_empty() && ended.stderr.contains(named), "{line}: {ended:?}");
    }
}

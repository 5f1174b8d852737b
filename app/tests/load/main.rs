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
use tokio::task::JoinHandle;

use door::Door;
use original::Original;

/// Something that happens within moments happens within this, on a busy machine too.
const SOON: Duration = Duration::from_secs(60);
/// What the load generator puts on the shelves, unless it is told otherwise.
const STOCK: i64 = 1_000_000_000;

/// Answers that get lost on their way, so that it is not left to chance whether any do.
const LOST_ANSWERS: usize = 3;

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

/// A shop to put under load, with a folder of its own.
struct Place {
    shop: Shop,
    dir: TempDir,
}

impl Place {
    async fn open() -> Place {
        Place::with(|options| options).await
    }

    async fn with(change: impl FnOnce(Options) -> Options) -> Place {
        let dir = TempDir::new();
        let shop = Shop::start(change(Place::options(&dir))).await.unwrap();
        Place { shop, dir }
    }

    fn options(dir: &TempDir) -> Options {
        Options::new(env!("CARGO_BIN_EXE_saga"), dir.path().join("data"))
            .arg("--no-demo-data")
            .env("SAGA_PURCHASE__RETRY_FIRST_SECONDS", "1")
            .env("SAGA_PURCHASE__RETRY_MAX_SECONDS", "2")
    }

    /// What `saga load` with these words says of this shop.
    async fn report(&self, line: &str) -> Value {
        good(load(&format!("{} {line} --json", self.shop.client().base())).await)
    }

    async fn until_something_is_sold(&self) {
        let client = self.shop.client();
        let sold = async || stocks(&client).await.values().any(|left| *left < STOCK);
        until("something is sold", SOON, sold).await;
    }
}

/// The report of a run that went well.
fn good(ended: Ended) -> Value {
    assert_eq!(ended.code, Some(0), "{ended:?}");
    ended.json()
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
    let place = Place::open().await;
    let series = place.dir.path().join("series");
    let line = format!(
        "--duration 1s --warm-up 200ms --buyers 8 --customers 4 --products 10 --cart-size 2 --amount 3 \
         --out-of-stock 0.2 --declined 0.2 --threads 2 --streams 4 --verify --series {}",
        series.display(),
    );
    let report = place.report(&line).await;
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
    let left = stocks(&place.shop.client()).await;
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
    let place = Place::open().await;
    let line = "--duration 500ms --warm-up 0s --buyers 2 --until completed --declined 0.5 --verify";
    let report = place.report(line).await;
    assert!(number(&report, "/total/completed") > 0, "{report:#}");
    assert_eq!(number(&report, "/total/completed"), number(&report, "/total/accepted"));
    assert!(number(&report, "/acceptance_us/p50") <= number(&report, "/completion_us/p50"));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_open_loop_sends_what_is_due() {
    let place = Place::open().await;
    let line = "--rate 200 --duration 1s --warm-up 500ms --buyers 64 --verify";
    let report = place.report(line).await;
    assert_eq!(number(&report, "/total/offered"), 300);
    assert_eq!(number(&report, "/measured/offered"), 200);
    assert_eq!(number(&report, "/total/completed"), 300);
    assert_eq!(number(&report, "/completion_us/count"), 200);

    // The same as a table.
    let ended = load(&format!("{} {line}", place.shop.client().base())).await;
    assert_eq!(ended.code, Some(0), "{ended:?}");
    for text in ["open loop, 200 due a second", "accepted", "completed", "p99.9", "errors none", "it adds up"]
    {
        assert!(ended.stdout.contains(text), "no {text:?} in {ended:?}");
    }
}

/// A run behind a door whose answers get lost, and the door.
async fn behind_a_door(place: &Place, line: &str) -> (Door, JoinHandle<Ended>) {
    let door = Door::open(place.shop.client().base()).await;
    let line = format!("{} {line} --json", door.base());
    let running = tokio::spawn(async move { load(&line).await });
    place.until_something_is_sold().await;
    // These are accepted, and nobody is told.
    door.keeps_next_purchase_answers(LOST_ANSWERS);
    (door, running)
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_lost_when_the_shop_is_killed() {
    let place = Place::open().await;
    let line = "--duration 3s --warm-up 0s --buyers 8 --products 5 --declined 0.1 --retry --verify";
    // Without their keys the purchases that nobody was told of would be made twice.
    let (door, running) = behind_a_door(&place, line).await;
    until("answers are lost", SOON, async || door.left_to_keep() == 0).await;
    let Place { mut shop, dir } = place;
    shop.kill9().await;
    let shop = Shop::start(Place::options(&dir)).await.unwrap();
    door.leads_to(shop.client().base());

    let report = good(running.await.unwrap());
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
    let place = Place::open().await;
    let line = "--duration 3s --warm-up 0s --buyers 4 --products 3 --verify";
    let (_door, running) = behind_a_door(&place, line).await;
    let report = good(running.await.unwrap());
    assert_eq!(number(&report, "/total/unknown"), LOST_ANSWERS as i64, "{report:#}");
    assert_eq!(number(&report, "/resolved"), LOST_ANSWERS as i64, "{report:#}");
    assert_eq!(
        number(&report, "/verify/purchases_checked"),
        number(&report, "/total/completed") + LOST_ANSWERS as i64
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn cooked_books_are_found_and_named() {
    let place = Place::open().await;
    let client = place.shop.client();
    let line = format!("{} --duration 3s --warm-up 0s --buyers 4 --products 3 --verify", client.base());
    let running = tokio::spawn(async move { load(&line).await });
    place.until_something_is_sold().await;
    // Somebody else takes five from the shelf.
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
    let place = Place::open().await;
    for scenario in ["product", "catalogue"] {
        let line = format!("--scenario {scenario} --duration 300ms --warm-up 0s --buyers 4");
        let report = place.report(&line).await;
        assert!(number(&report, "/total/accepted") > 0, "{report:#}");
        assert_eq!(report["total"]["errors"], json!({}));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn only_the_answers_can_be_measured() {
    let place = Place::open().await;
    let report = place.report("--completion none --duration 300ms --warm-up 0s --buyers 4").await;
    assert!(number(&report, "/total/accepted") > 0, "{report:#}");
    assert_eq!(number(&report, "/total/completed"), 0);
}

/// A token is good for a second here, and the run takes longer.
#[tokio::test(flavor = "multi_thread")]
async fn a_token_that_expires_is_renewed() {
    let place = Place::with(|options| options.env("SAGA_ACCOUNT__ACCESS_TOKEN_SECONDS", "1")).await;
    let line = "--duration 3s --warm-up 0s --rate 100 --buyers 4 --customers 2 --verify";
    let report = place.report(line).await;
    assert_eq!(number(&report, "/total/accepted"), 300, "{report:#}");
    assert_eq!(report["total"]["errors"], json!({}));
}

/// A shop that refuses is counted by kind, and its refusals are timed apart.
#[tokio::test(flavor = "multi_thread")]
async fn refusals_are_counted() {
    let place = Place::with(|options| options.env("SAGA_PURCHASE__MAX_OPEN_PER_CUSTOMER", "1")).await;
    let line = "--rate 500 --duration 1s --warm-up 0s --buyers 16 --customers 1 --verify";
    let report = place.report(line).await;
    let refused = number(&report, "/total/errors/429");
    assert!(refused > 0, "{report:#}");
    assert_eq!(number(&report, "/refused_us/count"), refused);
    assert_eq!(number(&report, "/total/accepted") + refused, 500);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_shop_with_the_originals_api_is_enough() {
    let original = Original::start().await;
    let line = "--duration 1s --warm-up 0s --buyers 4 --customers 2 --products 3 --event-timeout 200ms --verify --json";
    let report = good(load(&format!("{} {line}", original.base())).await);
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

//! A page in a Chromium follows a customer's purchases with `event-source-polyfill`, as the front ends do whose event streams ask for a
//! token. The library is what npm has, unmodified.
//!
//! The page and the shop are of two origins, as they are when a front end is served by somebody else: so the shop's own CORS is what
//! lets the page in, and nothing stands between the library and the shop but a proxy that can cut connections.

use std::collections::{BTreeMap, BTreeSet};

use axum::Router;
use axum::extract::State;
use axum::http::header::CONTENT_TYPE;
use axum::response::Html;
use axum::routing::{get, post};
use serde_json::{Value, json};
use servers::{Chromium, Proxy, program};
use testkit::traffic::{Cart, Customer, PAYMENT_LIMIT, Product};
use testkit::{Client, Engines, Shop, TempDir, until};
use tokio::sync::mpsc;
use tokio_util::sync::{CancellationToken, DropGuard};
use wire::time::Clock;

use super::{PATIENCE, many_processes, one_process};

const STOCK: &str = "UPDATE_PRODUCT_INVENTORY";
const ORDER: &str = "CREATE_ORDER";
const PAYMENT: &str = "CREATE_PAYMENT";

/// All steps of a purchase that succeeds.
const SUCCESS: [(&str, &str); 6] = [
    (STOCK, "STATUS_EXECUTE"),
    (STOCK, "STATUS_SUCCESS"),
    (ORDER, "STATUS_EXECUTE"),
    (ORDER, "STATUS_SUCCESS"),
    (PAYMENT, "STATUS_EXECUTE"),
    (PAYMENT, "STATUS_SUCCESS"),
];
/// And of one whose payment is declined, behind the first five.
const DECLINED: [(&str, &str); 3] =
    [(PAYMENT, "STATUS_FAILED"), (ORDER, "STATUS_ROLLBACKED"), (STOCK, "STATUS_ROLLBACKED")];

/// `EventSource.readyState`.
const CONNECTING: u64 = 0;
const OPEN: u64 = 1;
const CLOSED: u64 = 2;

/// Serves the page, and hears what the page tells.
struct Site {
    origin: String,
    told: mpsc::UnboundedReceiver<Value>,
    _stop: DropGuard,
}

impl Site {
    async fn serve() -> Site {
        let script = program::event_source_polyfill().unwrap_or_else(|missing| panic!("{missing}"));
        let script = tokio::fs::read(script).await.unwrap();
        let (tell, told) = mpsc::unbounded_channel();
        let hear = async |State(tell): State<mpsc::UnboundedSender<Value>>, what: String| {
            tell.send(serde_json::from_str(&what).unwrap()).unwrap();
        };
        let router = Router::new()
            .route("/", get(async || Html(include_str!("page.html"))))
            .route("/eventsource.js", get(async || ([(CONTENT_TYPE, "text/javascript")], script)))
            .route("/told", post(hear))
            .with_state(tell);
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let origin = format!("http://{}", listener.local_addr().unwrap());
        let stop = CancellationToken::new();
        let stopped = stop.clone();
        tokio::spawn(async move {
            tokio::select! {
                served = axum::serve(listener, router) => served.unwrap(),
                () = stopped.cancelled() => {}
            }
        });
        Site { origin, told, _stop: stop.drop_guard() }
    }

    /// Opens the page in a browser, for a shop's address and the holder of a token. With a cart the page buys that once its stream is open.
    fn open(&self, shop: &str, token: &str, cart: Option<&Value>) -> Chromium {
        let cart = cart.map(|cart| format!("&cart={}", escaped(&cart.to_string())));
        let url = format!(
            "{}/?shop={}&token={}{}",
            self.origin,
            escaped(shop),
            escaped(token),
            cart.unwrap_or_default()
        );
        Chromium::open(&url).unwrap_or_else(|error| panic!("{error}"))
    }

    /// What the page tells next.
    async fn next(&mut self) -> Value {
        let told = tokio::time::timeout(PATIENCE, self.told.recv()).await;
        let told = told.unwrap_or_else(|_| panic!("the page is silent for {PATIENCE:?}")).unwrap();
        assert!(told["broken"].is_null() && told["unnamed"].is_null(), "{told}");
        told
    }

    /// The next events, and nothing else.
    async fn events(&mut self, count: usize) -> Vec<Value> {
        let mut events = Vec::new();
        while events.len() < count {
            let told = self.next().await;
            assert!(told["data"].is_string(), "behind {} events: {told}", events.len());
            events.push(told);
        }
        events
    }

    async fn opened(&mut self) {
        assert_eq!(self.next().await, json!({"open": OPEN}));
    }

    /// Waits until the stream is open again. Until then the library finds that it is not, and goes on trying.
    async fn opened_again(&mut self) {
        let trying = json!({"error": CONNECTING, "status": null});
        let mut told = self.next().await;
        while told == trying {
            told = self.next().await;
        }
        assert_eq!(told, json!({"open": OPEN}));
    }
}

/// A text as a part of a query.
fn escaped(text: &str) -> String {
    let escape = |byte: u8| match byte {
        b'0'..=b'9' | b'A'..=b'Z' | b'a'..=b'z' => char::from(byte).to_string(),
        other => format!("%{other:02X}"),
    };
    text.bytes().map(escape).collect()
}

/// A page's origin may call the shop.
fn welcome(site: &Site) -> [(&'static str, &str); 1] {
    [("SAGA_HTTP__CORS_ALLOWED_ORIGINS", &site.origin)]
}

/// A proxy in front of a shop, and the address that its customers know.
fn proxy_of(shop: &Shop) -> (Proxy, String) {
    let address = shop.client().base().trim_start_matches("http://").parse().unwrap();
    let proxy = Proxy::start(address).unwrap();
    let url = format!("http://{}", proxy.socket_addr());
    (proxy, url)
}

fn data(told: &Value) -> Value {
    serde_json::from_str(told["data"].as_str().unwrap()).unwrap()
}

/// A purchase's events as the contract has them, each shown behind the one before, the last of them the last.
#[track_caller]
fn assert_told(events: &[Value], purchase: u64, steps: &[(&str, &str)]) {
    let now = Clock::system().now() / 1000;
    let (mut time, mut lines) = (now - PATIENCE.as_secs(), events[0]["lines"].as_u64().unwrap() - 1);
    assert_eq!(events.len(), steps.len());
    for (index, (event, (step, status))) in events.iter().zip(steps).enumerate() {
        let data = data(event);
        let timestamp = data["timestamp"].as_u64().unwrap();
        assert!((time..=now).contains(&timestamp), "{timestamp} behind {time}");
        let mut expected = json!({"purchase_id": purchase, "step": step, "status": status, "timestamp": timestamp,
            "seq": index + 1});
        if *status == "STATUS_FAILED" {
            assert!(data["reason"].is_string(), "{data}");
            expected["reason"] = data["reason"].clone();
        }
        assert_eq!(data, expected);
        lines += 1;
        assert_eq!((&event["shown"], &event["lines"]), (&json!(format!("{step} {status}")), &json!(lines)));
        assert!(event["id"].as_str().is_some_and(|id| !id.is_empty()), "{event}");
        time = timestamp;
    }
}

/// Buys past the page, and past what stands between it and the shop.
async fn buy(shop: &Client, customer: &Customer, product: Product) -> u64 {
    let answer = customer.buy(shop, &Cart { lines: vec![(product.id, 1)] }, None).await.unwrap();
    assert_eq!(answer.status, 201, "{}", answer.body);
    answer.json()["purchase_id"].as_u64().unwrap()
}

async fn ended(shop: &Client, customer: &Customer, purchase: u64) {
    until("the purchase ends", PATIENCE, async || {
        let told =
            shop.get(&format!("/api/purchase/{purchase}"), Some(&customer.token)).await.unwrap().json();
        told["finished_at"].is_u64()
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_page_buys_and_shows_what_becomes_of_it() {
    let (mut site, dir) = (Site::serve().await, TempDir::new());
    let shop = one_process(&dir, &welcome(&site)).await;
    let client = shop.client();
    let customer = Customer::sign_up(&client, 1).await;
    let kettle = Product::create(&client, "kettle", 100, 10).await;
    let ring = Product::create(&client, "ring", PAYMENT_LIMIT + 1, 10).await;
    let cart = Cart { lines: vec![(kettle.id, 2)] }.body();
    let _browser = site.open(client.base(), &customer.token, Some(&cart));

    site.opened().await;
    // It may hear of its purchase before the answer to it.
    let (mut events, mut bought) = (Vec::new(), None);
    while events.len() < SUCCESS.len() || bought.is_none() {
        let told = site.next().await;
        if told["data"].is_string() {
            events.push(told);
        } else {
            assert_eq!(told["bought"], 201, "{told}");
            bought = told["purchase"].as_u64();
        }
    }
    assert_told(&events, bought.unwrap(), &SUCCESS);

    let dear = buy(&client, &customer, ring).await;
    assert_told(&site.events(8).await, dear, &[&SUCCESS[..5], &DECLINED].concat());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_page_that_is_cut_off_comes_back_and_misses_nothing() {
    let (mut site, dir) = (Site::serve().await, TempDir::new());
    let shop = one_process(&dir, &welcome(&site)).await;
    let (proxy, door) = proxy_of(&shop);
    let client = shop.client();
    let customer = Customer::sign_up(&client, 1).await;
    let kettle = Product::create(&client, "kettle", 100, 10).await;
    let _browser = site.open(&door, &customer.token, None);
    site.opened().await;
    let first = buy(&client, &customer, kettle).await;
    assert_told(&site.events(6).await, first, &SUCCESS);

    // Nobody is there for a while, in which something happens.
    proxy.cut();
    assert_eq!(site.next().await, json!({"error": CONNECTING, "status": null}));
    let second = buy(&client, &customer, kettle).await;
    ended(&client, &customer, second).await;
    proxy.heal().unwrap();
    site.opened_again().await;
    assert_told(&site.events(6).await, second, &SUCCESS);

    // And once more, for a moment. What was told is told once.
    proxy.drop_connections();
    let third = buy(&client, &customer, kettle).await;
    site.opened_again().await;
    assert_told(&site.events(6).await, third, &SUCCESS);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_page_without_a_good_token_is_told_so_and_gives_up() {
    let (mut site, dir) = (Site::serve().await, TempDir::new());
    let shop = one_process(&dir, &welcome(&site)).await;
    let (proxy, door) = proxy_of(&shop);
    let _browser = site.open(&door, "forged", None);
    assert_eq!(site.next().await, json!({"error": CLOSED, "status": 401}));
    // What has given up tries no more: this would be an error to it.
    proxy.cut();
    proxy.heal().unwrap();
    let customer = Customer::sign_up(&shop.client(), 1).await;
    let _another = site.open(&door, &customer.token, None);
    site.opened().await;
}

/// A page whose origin the shop was not told of gets nothing, whatever its token.
#[tokio::test(flavor = "multi_thread")]
async fn a_page_of_a_stranger_is_not_let_in() {
    let (mut site, dir) = (Site::serve().await, TempDir::new());
    let shop = one_process(&dir, &[("SAGA_HTTP__CORS_ALLOWED_ORIGINS", "http://another.example")]).await;
    let customer = Customer::sign_up(&shop.client(), 1).await;
    let _browser = site.open(shop.client().base(), &customer.token, None);
    assert_eq!(site.next().await, json!({"error": CONNECTING, "status": null}));
}

/// Each replica that serves streams is killed while the customer buys.
#[tokio::test(flavor = "multi_thread")]
async fn a_page_follows_its_purchases_from_one_replica_to_another() {
    let (mut site, dir, engines) = (Site::serve().await, TempDir::new(), Engines::shared());
    let shop = many_processes(&dir, &engines, &welcome(&site)).await;
    let client = shop.client();
    let customer = Customer::sign_up(&client, 1).await;
    let kettle = Product::create(&client, "kettle", 100, 1_000_000).await;
    let _browser = site.open(client.base(), &customer.token, None);
    site.opened().await;

    let replicas = shop.replicas().await;
    let mut bought = BTreeSet::new();
    for victim in replicas.iter().filter(|replica| replica.service == "purchase") {
        victim.signal("KILL").await;
        until(&format!("{} is back", victim.name), PATIENCE, async || {
            bought.insert(buy_whatever_it_takes(&client, &customer, kettle, bought.len()).await);
            let now = shop.replicas().await;
            let again = now.iter().find(|replica| replica.name == victim.name).unwrap();
            again.restarts == 1 && again.ready
        })
        .await;
    }
    assert!(bought.len() > 1, "{bought:?}");
    let mut heard = Heard::default();
    heard.all_of(&mut site, &bought).await;
    assert!(heard.reopened > 0);

    // One more, behind which a second telling of those before would have come.
    bought.insert(buy(&client, &customer, kettle).await);
    heard.all_of(&mut site, &bought).await;
    assert!(heard.told.keys().eq(&bought), "{:?} and not {bought:?}", heard.told.keys());
    for (id, events) in heard.told {
        let steps: Vec<Value> = events.iter().map(data).collect();
        let steps: Vec<_> = steps
            .iter()
            .map(|data| (data["step"].as_str().unwrap(), data["status"].as_str().unwrap()))
            .collect();
        assert_eq!(steps, SUCCESS, "{id}");
    }
}

/// What a page tells of a stream that moves.
#[derive(Default)]
struct Heard {
    told: BTreeMap<u64, Vec<Value>>,
    reopened: usize,
}

impl Heard {
    /// Listens until all is told of these purchases.
    async fn all_of(&mut self, site: &mut Site, purchases: &BTreeSet<u64>) {
        while !purchases.iter().all(|id| self.told.get(id).is_some_and(|told| told.len() >= SUCCESS.len())) {
            let next = site.next().await;
            if next["data"].is_string() {
                self.told.entry(data(&next)["purchase_id"].as_u64().unwrap()).or_default().push(next);
            } else if next == json!({"open": OPEN}) {
                self.reopened += 1;
            } else {
                assert_eq!(next, json!({"error": CONNECTING, "status": null}));
            }
        }
    }
}

/// Buys by a key, again and again until there is an answer.
async fn buy_whatever_it_takes(shop: &Client, customer: &Customer, product: Product, number: usize) -> u64 {
    let (key, cart) = (format!("purchase {number}"), Cart { lines: vec![(product.id, 1)] });
    let mut bought = None;
    until("it is bought", PATIENCE, async || {
        let answer = customer.buy(shop, &cart, Some(&key)).await.ok().filter(|answer| answer.status == 201);
        bought = answer.and_then(|answer| answer.json()["purchase_id"].as_u64());
        bought.is_some()
    })
    .await;
    bought.unwrap()
}

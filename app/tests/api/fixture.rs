//! A running shop for a test, its customers, and the two ways to talk to it: [`Ask`] for well-formed requests,
//! [`Wire`] for what no HTTP library would send.

use std::future::Future;
use std::io::{ErrorKind, Read, Write};
use std::net::TcpStream;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, LazyLock, Weak};
use std::time::Duration;

use serde_json::{Value, json};
use testkit::{Answer, Client, Events, Options, SseEvent, TempDir, until};
use tokio::runtime::Runtime;
use tokio::sync::Mutex;

/// How long anything may take that takes milliseconds.
pub(crate) const PATIENCE: Duration = Duration::from_secs(10);

/// The largest id, price, amount and total: 2^53 - 1.
pub(crate) const MAX: u64 = 9_007_199_254_740_991;

/// One runtime for all tests, because a shop and its clients' connections outlive the test that made them.
static RUNTIME: LazyLock<Runtime> = LazyLock::new(|| Runtime::new().unwrap());

/// Runs a test.
pub(crate) fn run<T>(test: impl Future<Output = T>) -> T {
    RUNTIME.block_on(test)
}

/// A shop of this test run. It ends with its last user: a static one would outlive the run.
#[derive(Debug)]
pub(crate) struct Shop {
    // Before its folder: fields are dropped in this order.
    shop: testkit::Shop,
    _data: TempDir,
}

/// The shop with the default settings, shared by all tests.
pub(crate) async fn shop() -> Arc<Shop> {
    static SHARED: LazyLock<Mutex<Weak<Shop>>> = LazyLock::new(Mutex::default);
    let mut shared = SHARED.lock().await;
    if let Some(shop) = shared.upgrade() {
        return shop;
    }
    let shop = Arc::new(shop_with(&[]).await);
    *shared = Arc::downgrade(&shop);
    shop
}

/// A shop of its own, with these settings: `(name of the variable without SAGA_, value)`.
pub(crate) async fn shop_with(settings: &[(&str, &str)]) -> Shop {
    let data = TempDir::new();
    let options = Options::new(env!("CARGO_BIN_EXE_saga"), data.path()).arg("--no-demo-data");
    let options = settings
        .iter()
        .fold(options, |options, (name, value)| options.env(format!("SAGA_{name}"), (*value).to_owned()));
    let shop = testkit::Shop::start(options).await.unwrap_or_else(|failed| panic!("{failed}"));
    Shop { shop, _data: data }
}

/// A customer who has just signed up.
#[derive(Clone, Debug)]
pub(crate) struct Customer {
    pub(crate) email: String,
    pub(crate) phone: String,
    pub(crate) token: String,
    pub(crate) refresh: String,
}

pub(crate) const PASSWORD: &str = "abcd5432";

/// A number that no other test has.
pub(crate) fn unique() -> u64 {
    static NEXT: AtomicU64 = AtomicU64::new(100_000);
    NEXT.fetch_add(1, Ordering::Relaxed)
}

/// A body for a sign-up that nobody has used.
pub(crate) fn new_customer() -> Value {
    let number = unique();
    json!({
        "password": PASSWORD, "firstname": "ming", "lastname": "hsu", "email": format!("ming-{number}@ming.com"),
        "address": "taipei", "phone_number": number.to_string(),
    })
}

/// A cart with one line.
pub(crate) fn cart(product_id: u64, amount: i64) -> Value {
    json!({"purchase_items": [{"product_id": product_id, "amount": amount}], "payment": {"currency_code": "NT"}})
}

impl Shop {
    pub(crate) fn api(&self) -> Client {
        self.shop.client()
    }

    pub(crate) fn admin(&self) -> Client {
        self.shop.admin()
    }

    /// A request to the API.
    pub(crate) fn ask(&self, method: &str, path: &str) -> Ask {
        Ask::new(self.api(), method, path)
    }

    /// A request to the operator's door.
    pub(crate) fn ask_admin(&self, method: &str, path: &str) -> Ask {
        Ask::new(self.admin(), method, path)
    }

    pub(crate) async fn get(&self, path: &str) -> Answer {
        self.ask("GET", path).send().await
    }

    pub(crate) async fn post(&self, path: &str, body: &Value) -> Answer {
        self.ask("POST", path).json(body).send().await
    }

    /// A connection without a library around it.
    pub(crate) fn wire(&self) -> Wire {
        Wire::connect(self.api().base())
    }

    pub(crate) async fn sign_up(&self) -> Customer {
        let body = new_customer();
        let answer = self.post("/api/account/auth/signup", &body).await;
        assert_eq!(answer.status, 201, "{}", answer.body);
        let pair = answer.json();
        let text = |value: &Value| value.as_str().unwrap().to_owned();
        Customer {
            email: text(&body["email"]),
            phone: text(&body["phone_number"]),
            token: text(&pair["access_token"]),
            refresh: text(&pair["refresh_token"]),
        }
    }

    pub(crate) async fn new_product(&self, price: u64, inventory: u64) -> u64 {
        let body = json!({"name": "product", "description": "a product", "brand_name": "brand", "price": price,
            "inventory": inventory});
        let answer = self.post("/api/product", &body).await;
        assert_eq!(answer.status, 201, "{}", answer.body);
        answer.json()["id"].as_u64().unwrap()
    }

    pub(crate) async fn stock(&self, product_id: u64) -> i64 {
        let answer = self.get(&format!("/api/product/{product_id}")).await;
        assert_eq!(answer.status, 200, "{}", answer.body);
        answer.json()["inventory"].as_i64().unwrap()
    }

    pub(crate) fn ask_to_buy(&self, customer: &Customer, cart: &Value) -> Ask {
        self.ask("POST", "/api/purchase").bearer(&customer.token).json(cart)
    }

    /// Buys, and returns the purchase's id.
    pub(crate) async fn buy(&self, customer: &Customer, cart: &Value) -> u64 {
        bought(&self.ask_to_buy(customer, cart).send().await)
    }

    pub(crate) async fn get_as(&self, customer: &Customer, path: &str) -> Answer {
        self.ask("GET", path).bearer(&customer.token).send().await
    }

    /// The customer's purchases, newest first.
    pub(crate) async fn purchases(&self, customer: &Customer) -> Vec<Value> {
        let answer = self.get_as(customer, "/api/purchases?size=500").await;
        assert_eq!(answer.status, 200, "{}", answer.body);
        answer.json()["purchases"].as_array().unwrap().clone()
    }

    /// Waits for a purchase's end and returns it.
    pub(crate) async fn ended(&self, customer: &Customer, purchase_id: u64) -> Value {
        let path = format!("/api/purchase/{purchase_id}");
        let mut purchase = Value::Null;
        until("the purchase has ended", PATIENCE, async || {
            purchase = self.get_as(customer, &path).await.json();
            !purchase["finished_at"].is_null()
        })
        .await;
        purchase
    }

    /// Waits until none of the customer's purchases is under way.
    pub(crate) async fn all_ended(&self, customer: &Customer) {
        until("all purchases have ended", PATIENCE, async || {
            self.purchases(customer).await.iter().all(|purchase| !purchase["finished_at"].is_null())
        })
        .await;
    }

    pub(crate) async fn events(&self, customer: &Customer, last_event_id: Option<&str>) -> Events {
        self.api().events(&customer.token, last_event_id).await.unwrap()
    }
}

/// The id of an accepted purchase.
#[track_caller]
pub(crate) fn bought(answer: &Answer) -> u64 {
    assert_eq!(answer.status, 201, "{}", answer.body);
    let body = answer.json();
    let id = body["purchase_id"].as_u64().unwrap();
    assert_eq!(body, json!({ "purchase_id": id }));
    assert!((1..=MAX).contains(&id), "{id}");
    id
}

/// The next events of a stream.
pub(crate) async fn take(events: &mut Events, count: usize) -> Vec<SseEvent> {
    let mut taken = Vec::new();
    for number in 1..=count {
        let event = events.next(PATIENCE).await;
        taken.push(event.unwrap_or_else(|| panic!("no event {number} of {count} behind {taken:?}")));
    }
    taken
}

/// A well-formed request.
#[must_use]
pub(crate) struct Ask {
    client: Client,
    method: String,
    path: String,
    headers: Vec<(String, String)>,
    body: Option<Vec<u8>>,
}

impl Ask {
    fn new(client: Client, method: &str, path: &str) -> Ask {
        Ask { client, method: method.to_owned(), path: path.to_owned(), headers: Vec::new(), body: None }
    }

    pub(crate) fn header(mut self, name: &str, value: &str) -> Ask {
        self.headers.push((name.to_owned(), value.to_owned()));
        self
    }

    pub(crate) fn bearer(self, token: &str) -> Ask {
        self.header("authorization", &format!("bearer {token}"))
    }

    pub(crate) fn json(self, body: &Value) -> Ask {
        self.body(body.to_string())
    }

    pub(crate) fn body(mut self, body: impl Into<Vec<u8>>) -> Ask {
        self.body = Some(body.into());
        self
    }

    pub(crate) async fn send(self) -> Answer {
        let Ask { client, method, path, headers, body } = self;
        let headers: Vec<(&str, &str)> = headers.iter().map(|(n, v)| (n.as_str(), v.as_str())).collect();
        let answer = client.request(&method, &path, &headers, body).await;
        answer.unwrap_or_else(|error| panic!("{method} {path}: {error}"))
    }

    /// Sends it and sees that it is refused, so and not otherwise.
    pub(crate) async fn refused(self, status: u16, msg: &str) -> Answer {
        let what = format!("{} {}", self.method, self.path);
        let answer = self.send().await;
        assert_refused(&what, &answer, status, msg);
        answer
    }
}

/// The form of every refusal: `{"msg": ...}` and nothing else, a challenge with 401, a time with 429 and 503.
pub(crate) fn assert_refused(what: &str, answer: &Answer, status: u16, msg: &str) {
    let expected = json!({ "msg": msg }).to_string();
    assert_eq!((answer.status, answer.body.as_str()), (status, expected.as_str()), "{what}");
    assert_eq!(answer.headers["content-type"], "application/json", "{what}");
    assert_eq!(answer.headers.contains_key("www-authenticate"), status == 401, "{what}");
    assert_eq!(answer.headers.contains_key("retry-after"), matches!(status, 429 | 503), "{what}");
}

/// A connection, byte by byte. It blocks, but only the thread of its own test.
pub(crate) struct Wire(TcpStream);

/// What came over a [`Wire`].
#[derive(Debug)]
pub(crate) struct Raw {
    pub(crate) status: u16,
    /// In lower case.
    pub(crate) head: String,
    pub(crate) body: String,
}

impl Wire {
    fn connect(base: &str) -> Wire {
        let stream = TcpStream::connect(base.trim_start_matches("http://")).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.set_nodelay(true).unwrap();
        Wire(stream)
    }

    pub(crate) fn send(&mut self, bytes: impl AsRef<[u8]>) -> &mut Wire {
        self.0.write_all(bytes.as_ref()).unwrap();
        self
    }

    /// As [`Wire::send`], where the server may have had enough before the end.
    pub(crate) fn try_send(&mut self, bytes: &[u8]) -> std::io::Result<()> {
        self.0.write_all(bytes)
    }

    /// Reads until this text is there.
    pub(crate) fn read_until(&mut self, text: &str) -> String {
        let mut read = Vec::new();
        let mut byte = [0];
        while !read.ends_with(text.as_bytes()) {
            match self.0.read(&mut byte) {
                Ok(0) => panic!("the connection ended before {text:?}: {}", String::from_utf8_lossy(&read)),
                Ok(_) => read.push(byte[0]),
                Err(error) => panic!("{error} before {text:?}: {}", String::from_utf8_lossy(&read)),
            }
        }
        String::from_utf8(read).unwrap()
    }

    /// Reads one answer that says its length.
    pub(crate) fn answer(&mut self) -> Raw {
        let head = self.read_until("\r\n\r\n").to_ascii_lowercase();
        let status = head.split(' ').nth(1).unwrap().parse().unwrap();
        let length = head.lines().find_map(|line| line.strip_prefix("content-length: ")).unwrap();
        let mut body = vec![0; length.parse().unwrap()];
        self.0.read_exact(&mut body).unwrap();
        Raw { status, head, body: String::from_utf8(body).unwrap() }
    }

    /// Reads until the server closes the connection.
    pub(crate) fn rest(&mut self) -> String {
        let mut rest = String::new();
        match self.0.read_to_string(&mut rest) {
            Ok(_) => rest,
            // It closed while bytes of ours were still under way.
            Err(error) if error.kind() == ErrorKind::ConnectionReset => rest,
            Err(error) => panic!("the connection was not closed: {error}, after {rest:?}"),
        }
    }

    /// Sends one byte after the other, slowly, until the server says something or closes; returns that. Bounded by
    /// [`PATIENCE`].
    pub(crate) fn drip(&mut self) -> String {
        const PAUSE: Duration = Duration::from_millis(20);
        self.0.set_read_timeout(Some(PAUSE)).unwrap();
        let mut byte = [0];
        for _ in 0..PATIENCE.as_millis() / PAUSE.as_millis() {
            let written = self.0.write_all(b" ");
            match self.0.read(&mut byte) {
                Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {
                    assert!(written.is_ok(), "{written:?}");
                }
                Ok(0) | Err(_) => return String::new(),
                Ok(_) => {
                    self.0.set_read_timeout(Some(PATIENCE)).unwrap();
                    return format!("{}{}", char::from(byte[0]), self.rest());
                }
            }
        }
        panic!("after {PATIENCE:?} the server still listens to a client that sends a byte now and then");
    }
}

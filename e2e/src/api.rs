//! A client of the shop's doors that needs no socket: requests go straight into the routers.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::future::Future;
use std::sync::{Arc, Mutex};
use std::task::Poll;

use axum::Router;
use axum::body::{Body, Bytes};
use http::{HeaderMap, Method, Request};
use http_body_util::BodyExt;
use hyper::body::Frame;
use serde_json::{Value, json};
use tower::ServiceExt;

use crate::LIMIT;

/// A client. Clones are independent requests to the same shop. While one is kept, the purchase service cannot end.
#[derive(Clone)]
pub struct Api {
    pub(crate) router: Router,
    pub(crate) operator: Router,
    pub(crate) initial_stock: Arc<Mutex<BTreeMap<u64, i64>>>,
    pub(crate) accepted: Arc<Mutex<BTreeMap<u64, u64>>>,
}

/// Somebody with an access token.
#[derive(Clone, Debug)]
pub struct Customer {
    /// The customer's id.
    pub id: u64,
    pub(crate) token: String,
}

/// What a door answered.
#[derive(Clone, Debug)]
pub struct Answer {
    /// The HTTP status.
    pub status: u16,
    /// The headers.
    pub headers: HeaderMap,
    /// The body.
    pub body: Value,
}

impl Answer {
    /// The id of the purchase that was accepted.
    ///
    /// # Panics
    /// When none was.
    pub fn purchase_id(&self) -> u64 {
        assert_eq!(self.status, 201, "{}", self.body);
        self.body["purchase_id"].as_u64().unwrap()
    }

    /// The `msg` of an error.
    pub fn msg(&self) -> &str {
        self.body["msg"].as_str().unwrap_or_default()
    }

    /// What `Retry-After` says, in seconds.
    pub fn retry_after(&self) -> Option<u64> {
        self.headers.get("retry-after")?.to_str().ok()?.parse().ok()
    }
}

impl Api {
    /// Adds a product.
    pub async fn product(&self, price: i64, inventory: i64) -> u64 {
        let product = json!({
            "name": "thing", "description": "a thing", "brand_name": "brand", "price": price, "inventory": inventory,
        });
        let answer = self.request(Method::POST, "/api/product", None, &[], Some(product)).await;
        assert_eq!(answer.status, 201, "{}", answer.body);
        let id = answer.body["id"].as_u64().unwrap();
        self.initial_stock.lock().unwrap().insert(id, inventory);
        id
    }

    /// What is left of a product, as everybody sees it.
    pub async fn stock(&self, product_id: u64) -> i64 {
        let answer = self.request(Method::GET, &format!("/api/product/{product_id}"), None, &[], None).await;
        answer.body["inventory"].as_i64().unwrap()
    }

    /// Tries to buy.
    pub async fn try_buy(&self, who: &Customer, items: &[(u64, i64)], key: Option<&str>) -> Answer {
        let item = |(product_id, amount): &(u64, i64)| json!({"product_id": product_id, "amount": amount});
        let cart = json!({
            "purchase_items": items.iter().map(item).collect::<Vec<_>>(),
            "payment": {"currency_code": "EUR"},
        });
        let headers: Vec<_> = key.map(|key| ("idempotency-key", key)).into_iter().collect();
        let answer = self.request(Method::POST, "/api/purchase", Some(who), &headers, Some(cart)).await;
        if answer.status == 201 {
            self.accepted.lock().unwrap().insert(answer.purchase_id(), who.id);
        }
        answer
    }

    /// Buys; the purchase is accepted.
    pub async fn buy(&self, who: &Customer, items: &[(u64, i64)]) -> u64 {
        self.try_buy(who, items, None).await.purchase_id()
    }

    /// A GET on the API.
    pub async fn get(&self, who: &Customer, path: &str) -> Answer {
        self.request(Method::GET, path, Some(who), &[], None).await
    }

    /// A purchase as its customer sees it.
    pub async fn purchase(&self, who: &Customer, id: u64) -> Value {
        let answer = self.get(who, &format!("/api/purchase/{id}")).await;
        assert_eq!(answer.status, 200, "{}", answer.body);
        answer.body
    }

    /// A purchase's state as its customer sees it.
    pub async fn state(&self, who: &Customer, id: u64) -> String {
        self.purchase(who, id).await["state"].as_str().unwrap().to_owned()
    }

    /// A request to the operator's door.
    pub async fn operator(&self, method: Method, path: &str) -> Answer {
        let request = Request::builder().method(method).uri(path).body(Body::empty()).unwrap();
        answer(self.operator.clone().oneshot(request).await.unwrap()).await
    }

    /// Opens an event stream.
    ///
    /// # Errors
    /// The answer, where it is another one than a stream.
    pub async fn watch(&self, who: &Customer, last_event_id: Option<&str>) -> Result<Watch, Answer> {
        let headers: Vec<_> = last_event_id.map(|id| ("last-event-id", id)).into_iter().collect();
        let request = request(Method::GET, "/api/purchase/result", Some(who), &headers, None);
        let response = self.router.clone().oneshot(request).await.unwrap();
        if response.status() != 200 {
            return Err(answer(response).await);
        }
        let (parts, body) = response.into_parts();
        Ok(Watch { headers: parts.headers, body, text: String::new(), blocks: VecDeque::new(), over: false })
    }

    /// Any request to the API.
    pub async fn request(
        &self,
        method: Method,
        path: &str,
        who: Option<&Customer>,
        headers: &[(&str, &str)],
        body: Option<Value>,
    ) -> Answer {
        let request = request(method, path, who, headers, body);
        answer(self.router.clone().oneshot(request).await.unwrap()).await
    }
}

fn request(
    method: Method,
    path: &str,
    who: Option<&Customer>,
    headers: &[(&str, &str)],
    body: Option<Value>,
) -> Request<Body> {
    let mut request = Request::builder().method(method).uri(path);
    if let Some(Customer { token, .. }) = who {
        request = request.header("authorization", format!("Bearer {token}"));
    }
    for (name, value) in headers {
        request = request.header(*name, *value);
    }
    request.body(body.map_or_else(Body::empty, |body| Body::from(body.to_string()))).unwrap()
}

async fn answer(response: http::Response<Body>) -> Answer {
    let (parts, body) = response.into_parts();
    let bytes = body.collect().await.unwrap().to_bytes();
    let body = serde_json::from_slice(&bytes).unwrap_or_else(|_| panic!("not JSON: {bytes:?}"));
    Answer { status: parts.status.as_u16(), headers: parts.headers, body }
}

/// One event of a stream.
#[derive(Clone, Debug, PartialEq)]
pub struct Event {
    /// What `Last-Event-ID` would bring back.
    pub id: String,
    /// Its name.
    pub name: String,
    /// Its data.
    pub data: Value,
}

impl Event {
    /// The purchase that it is about.
    pub fn purchase_id(&self) -> u64 {
        self.data["purchase_id"].as_u64().unwrap()
    }

    /// Its place in the history of its purchase, from 1.
    pub fn seq(&self) -> u64 {
        self.data["seq"].as_u64().unwrap()
    }

    /// Its step and status, in one word each.
    pub fn what(&self) -> (&str, &str) {
        (self.data["step"].as_str().unwrap(), self.data["status"].as_str().unwrap())
    }
}

/// Whether a step's status is the last that there is to tell of a purchase.
pub fn is_terminal(step: &str, status: &str) -> bool {
    match status {
        "STATUS_SUCCESS" => step == "CREATE_PAYMENT",
        "STATUS_FAILED" | "STATUS_ROLLBACKED" => step == "UPDATE_PRODUCT_INVENTORY",
        _ => false,
    }
}

/// An open event stream. Dropping it cuts the connection. As long as it is not asked, it reads nothing.
pub struct Watch {
    /// The headers that it came with.
    pub headers: HeaderMap,
    body: Body,
    text: String,
    blocks: VecDeque<String>,
    over: bool,
}

impl Watch {
    /// The next event; none when the stream is over.
    pub async fn next(&mut self) -> Option<Event> {
        let next = async {
            loop {
                let block = self.next_block().await?;
                if let Some(event) = event(&block) {
                    return Some(event);
                }
            }
        };
        // The comments that keep a stream awake are no events.
        tokio::time::timeout(LIMIT, next).await.expect("no event comes")
    }

    /// The next block of lines, as it came: an event or a comment.
    pub async fn next_block(&mut self) -> Option<String> {
        loop {
            if let Some(block) = self.blocks.pop_front() {
                return Some(block);
            }
            if self.over {
                return None;
            }
            let frame = tokio::time::timeout(LIMIT, self.body.frame()).await.expect("the stream is silent");
            self.take(frame.map(data));
        }
    }

    /// The events that are there now, without waiting for any.
    pub async fn ready(&mut self) -> Vec<Event> {
        while !self.over {
            let mut frame = std::pin::pin!(self.body.frame());
            let polled = std::future::poll_fn(|context| Poll::Ready(frame.as_mut().poll(context))).await;
            let Poll::Ready(frame) = polled else { break };
            self.take(frame.map(data));
        }
        self.blocks.drain(..).filter_map(|block| event(&block)).collect()
    }

    /// All events up to the one with which the last of these purchases ends.
    pub async fn until_ended(&mut self, ids: &[u64]) -> Vec<Event> {
        let mut open: BTreeSet<u64> = ids.iter().copied().collect();
        let mut events = Vec::new();
        while !open.is_empty() {
            let event =
                self.next().await.unwrap_or_else(|| panic!("over with {} purchases open", open.len()));
            let (step, status) = event.what();
            if is_terminal(step, status) {
                open.remove(&event.purchase_id());
            }
            events.push(event);
        }
        events
    }

    fn take(&mut self, data: Option<Bytes>) {
        match data {
            None => self.over = true,
            Some(data) => {
                self.text.push_str(std::str::from_utf8(&data).unwrap());
                while let Some(end) = self.text.find("\n\n") {
                    let block: String = self.text.drain(..end + 2).collect();
                    self.blocks.push_back(block.trim_end().to_owned());
                }
            }
        }
    }
}

fn data(frame: Result<Frame<Bytes>, axum::Error>) -> Bytes {
    frame.unwrap().into_data().unwrap_or_default()
}

/// An event out of its lines; none where they are a comment.
fn event(block: &str) -> Option<Event> {
    if block.starts_with(':') {
        return None;
    }
    let field = |name: &str| {
        let found = block.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(": "));
        found.unwrap_or_else(|| panic!("an event without {name}: {block:?}")).to_owned()
    };
    Some(Event { id: field("id"), name: field("event"), data: serde_json::from_str(&field("data")).unwrap() })
}

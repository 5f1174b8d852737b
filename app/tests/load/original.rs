//! A shop with the manners of the original, as far as a load generator meets them: a first event `null`, a misspelt status, ids
//! above 2^53, no way to ask for a purchase. It sells at once, and tells nothing at all about every tenth purchase.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::sync::{Arc, Mutex, MutexGuard};

use axum::extract::{Path, State};
use axum::http::{HeaderMap, StatusCode};
use axum::response::sse::{Event, Sse};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use serde_json::{Value, json};
use tokio::sync::mpsc;
use tokio_util::sync::{CancellationToken, DropGuard};

/// The first id.
const FIRST_ID: u64 = (1 << 60) + 1;

#[derive(Default)]
struct Books {
    last_id: u64,
    /// Price and stock.
    products: BTreeMap<u64, (i64, i64)>,
    /// What was paid.
    payments: BTreeMap<u64, i64>,
    /// By customer.
    streams: BTreeMap<String, Vec<mpsc::UnboundedSender<Value>>>,
}

impl Books {
    fn next_id(&mut self) -> u64 {
        self.last_id = self.last_id.max(FIRST_ID) + 1;
        self.last_id
    }
}

#[derive(Clone, Default)]
struct Shop(Arc<Mutex<Books>>);

impl Shop {
    fn books(&self) -> MutexGuard<'_, Books> {
        self.0.lock().unwrap()
    }
}

/// It is there until it is dropped.
pub(crate) struct Original {
    base: String,
    _stop: DropGuard,
}

impl Original {
    pub(crate) async fn start() -> Original {
        let router = Router::new()
            .route("/api/account/auth/signup", post(sign_up))
            .route("/api/product", post(create))
            .route("/api/product/{id}", get(product))
            .route("/api/purchase", post(buy))
            .route("/api/purchase/result", get(results))
            .route("/api/order/{id}", get(order))
            .route("/api/payment/{id}", get(payment))
            .with_state(Shop::default());
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let base = format!("http://{}", listener.local_addr().unwrap());
        let stop = CancellationToken::new();
        let stopped = stop.clone();
        tokio::spawn(async move {
            tokio::select! {
                served = axum::serve(listener, router).into_future() => served.unwrap(),
                () = stopped.cancelled() => {}
            }
        });
        Original { base, _stop: stop.drop_guard() }
    }

    pub(crate) fn base(&self) -> &str {
        &self.base
    }
}

async fn sign_up(State(shop): State<Shop>) -> Response {
    let id = shop.books().next_id();
    let tokens = json!({"access_token": format!("customer-{id}"), "refresh_token": format!("refresh-{id}")});
    (StatusCode::CREATED, Json(tokens)).into_response()
}

async fn create(State(shop): State<Shop>, Json(new): Json<Value>) -> Response {
    let mut books = shop.books();
    let id = books.next_id();
    books.products.insert(id, (new["price"].as_i64().unwrap(), new["inventory"].as_i64().unwrap()));
    (StatusCode::CREATED, Json(json!({ "id": id }))).into_response()
}

async fn product(State(shop): State<Shop>, Path(id): Path<u64>) -> Response {
    let (price, inventory) = shop.books().products[&id];
    Json(json!({"id": id, "name": "", "price": price, "inventory": inventory})).into_response()
}

async fn buy(State(shop): State<Shop>, headers: HeaderMap, Json(cart): Json<Value>) -> Response {
    let mut books = shop.books();
    let id = books.next_id();
    let mut total = 0;
    for item in cart["purchase_items"].as_array().unwrap() {
        let (product, amount) = (item["product_id"].as_u64().unwrap(), item["amount"].as_i64().unwrap());
        let (price, stock) = books.products.get_mut(&product).unwrap();
        *stock -= amount;
        total += *price * amount;
    }
    books.payments.insert(id, total);
    if id % 10 != 0 {
        for step in ["UPDATE_PRODUCT_INVENTORY", "CREATE_ORDER", "CREATE_PAYMENT"] {
            for status in ["STATUS_EXUCUTE", "STATUS_SUCCESS"] {
                let event = json!({"purchase_id": id, "step": step, "status": status, "timestamp": 1});
                for stream in books.streams.get(&customer(&headers)).into_iter().flatten() {
                    let _ = stream.send(event.clone());
                }
            }
        }
    }
    (StatusCode::CREATED, Json(json!({ "purchase_id": id }))).into_response()
}

async fn results(
    State(shop): State<Shop>,
    headers: HeaderMap,
) -> Sse<impl futures_util::Stream<Item = Result<Event, Infallible>>> {
    let (sender, receiver) = mpsc::unbounded_channel();
    sender.send(Value::Null).unwrap();
    shop.books().streams.entry(customer(&headers)).or_default().push(sender);
    Sse::new(futures_util::stream::unfold(receiver, async |mut receiver| {
        let data = receiver.recv().await?;
        Some((Ok(Event::default().event("data").data(data.to_string())), receiver))
    }))
}

async fn order(State(shop): State<Shop>, Path(id): Path<u64>) -> Response {
    match shop.books().payments.contains_key(&id) {
        true => Json(json!({"id": id, "purchased_items": []})).into_response(),
        false => StatusCode::NOT_FOUND.into_response(),
    }
}

async fn payment(State(shop): State<Shop>, Path(id): Path<u64>) -> Response {
    match shop.books().payments.get(&id) {
        Some(amount) => Json(json!({"id": id, "currency_code": "NT", "amount": amount})).into_response(),
        None => StatusCode::NOT_FOUND.into_response(),
    }
}

fn customer(headers: &HeaderMap) -> String {
    headers["authorization"].to_str().unwrap().to_owned()
}

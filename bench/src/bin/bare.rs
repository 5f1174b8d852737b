//! `bare`: the server that the shop is measured against. It does nothing but HTTP and JSON.
//!
//! It is the upper bound of what a server on this HTTP stack can do with the shop's requests: it reads the same
//! bytes, parses the same JSON into the same types, and answers with as many bytes. It runs like the shop: axum on
//! hyper, HTTP/1.1, tokio's threads, mimalloc, `TCP_NODELAY`.
//!
//! Everything that makes a shop of it is missing, on purpose: no token is checked, no price looked up, nothing is stored,
//! nothing happens after the answer, no limit or time-out protects it. Accounts and products are stubs, so that a load
//! generator finds what it needs before it can buy.

use std::convert::Infallible;
use std::io::{self, Write};
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};

use allocator::Allocator;
use axum::Router;
use axum::body::Body;
use axum::extract::{Path, Query};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use bytes::Bytes;
use clap::Parser;
use http::header::{CONTENT_TYPE, HeaderValue};
use http::{Request, StatusCode};
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use serde::{Deserialize, Serialize};
use tokio::net::{TcpListener, TcpStream};
use tower::Service;

#[global_allocator]
static ALLOCATOR: Allocator = Allocator;

/// The bare server that the shop is measured against: HTTP and JSON, and nothing else.
#[derive(Parser)]
struct Arguments {
    /// Where it listens; port 0 takes a free one
    #[arg(long, value_name = "IP:PORT", default_value = "127.0.0.1:8090")]
    listen: SocketAddr,
}

#[tokio::main]
async fn main() -> io::Result<()> {
    let listener = TcpListener::bind(Arguments::parse().listen).await?;
    writeln!(io::stdout(), "listening on http://{}", listener.local_addr()?)?;
    let router = router();
    loop {
        let (stream, _) = listener.accept().await?;
        tokio::spawn(converse(stream, router.clone()));
    }
}

/// One connection, to its end; how it ends is the client's affair.
async fn converse(stream: TcpStream, router: Router) {
    let _ = stream.set_nodelay(true);
    let answer = service_fn(|request: Request<Incoming>| {
        let mut router = router.clone();
        async move { Ok::<_, Infallible>(answer(&mut router, request).await) }
    });
    let _ = http1::Builder::new().serve_connection(TokioIo::new(stream), answer).await;
}

async fn answer(router: &mut Router, request: Request<Incoming>) -> Response {
    match router.call(request.map(Body::new)).await {
        Ok(response) => response,
        Err(never) => match never {},
    }
}

fn router() -> Router {
    Router::new()
        .route("/api/purchase", post(buy))
        .route("/api/product/{id}", get(product))
        .route("/api/products", get(products))
        .route("/api/product", post(new_product))
        .route("/api/account/auth/signup", post(sign_up))
        .route("/api/account/auth/login", post(sign_up))
}

/// A value as JSON, serialized for each request.
struct Json<T>(T);

impl<T: Serialize> IntoResponse for Json<T> {
    fn into_response(self) -> Response {
        match serde_json::to_vec(&self.0) {
            Ok(text) => {
                ([(CONTENT_TYPE, HeaderValue::from_static("application/json"))], text).into_response()
            }
            Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, error.to_string()).into_response(),
        }
    }
}

/// The next of the numbers that stand for ids. They begin where the shop's ids are as long as they ever get, so that
/// answers have the shop's size.
fn next_id() -> u64 {
    static NEXT: AtomicU64 = AtomicU64::new(1 << 52);
    NEXT.fetch_add(1, Ordering::Relaxed)
}

#[derive(Deserialize)]
struct Purchase {
    purchase_items: Vec<Item>,
    payment: Payment,
}

#[derive(Deserialize)]
struct Item {
    product_id: u64,
    amount: i64,
}

#[derive(Deserialize)]
struct Payment {
    currency_code: String,
}

#[derive(Serialize)]
struct Bought {
    purchase_id: u64,
}

async fn buy(body: Bytes) -> Response {
    let Purchase { purchase_items, payment } = match serde_json::from_slice(&body) {
        Ok(purchase) => purchase,
        Err(error) => return (StatusCode::BAD_REQUEST, error.to_string()).into_response(),
    };
    // What is never looked at, a compiler may never parse.
    for Item { product_id, amount } in &purchase_items {
        std::hint::black_box((product_id, amount));
    }
    std::hint::black_box(&payment.currency_code);
    (StatusCode::CREATED, Json(Bought { purchase_id: next_id() })).into_response()
}

#[derive(Serialize)]
struct Product {
    id: u64,
    name: String,
    description: String,
    brand_name: String,
    price: i64,
    inventory: i64,
}

async fn product(Path(id): Path<u64>) -> Response {
    // Owned strings: the shop has them from its database.
    let product = Product {
        id,
        name: "Product number 1234".to_owned(),
        description: "A product of a measurement".to_owned(),
        brand_name: "Sagaline".to_owned(),
        price: 100,
        inventory: 1_000_000_000,
    };
    Json(product).into_response()
}

#[derive(Deserialize)]
struct Page {
    size: u64,
}

#[derive(Serialize)]
struct Catalogs {
    catalogs: Vec<Line>,
}

#[derive(Serialize)]
struct Line {
    id: u64,
    name: String,
    inventory: i64,
    price: i64,
}

async fn products(Query(Page { size }): Query<Page>) -> Response {
    let line = |number| Line {
        id: (1 << 52) + number,
        name: "Product number 1234".to_owned(),
        inventory: 1_000_000_000,
        price: 100,
    };
    Json(Catalogs { catalogs: (0..size.min(500)).map(line).collect() }).into_response()
}

#[derive(Serialize)]
struct Created {
    id: u64,
}

async fn new_product() -> Response {
    (StatusCode::CREATED, Json(Created { id: next_id() })).into_response()
}

#[derive(Serialize)]
struct Tokens {
    refresh_token: String,
    access_token: String,
}

/// Tokens of the shop's lengths, in bytes: they travel with each request.
const ACCESS_TOKEN_BYTES: usize = 400;
const REFRESH_TOKEN_BYTES: usize = 43;

async fn sign_up() -> Response {
    let token = |bytes| format!("{:0>bytes$}", next_id());
    let tokens =
        Tokens { refresh_token: token(REFRESH_TOKEN_BYTES), access_token: token(ACCESS_TOKEN_BYTES) };
    (StatusCode::CREATED, Json(tokens)).into_response()
}

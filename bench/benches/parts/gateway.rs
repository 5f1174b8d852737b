//! What the gateway costs: a request over a kept-alive connection, asked of a server that does nothing, and of a gateway before that
//! server. The difference is the gateway and its own connection. Alone among these benches it needs sockets: they are what it is about.

use std::net::SocketAddr;
use std::time::Instant;

use axum::Router;
use axum::routing::{get, post};
use criterion::{Criterion, Throughput};
use gateway::{Gateway, HEAD_TIMEOUT, Parts, Upstreams};
use serve::edge::{EdgeConfig, Protected, protected};
use serve::{Json, Limits};
use telemetry::Registry;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio_util::sync::CancellationToken;

use crate::place::runtime;

/// What the server answers.
const ANSWER: &str = "[1,2,3]";

pub(crate) fn benches(criterion: &mut Criterion) {
    let runtime = runtime();
    let stop = CancellationToken::new();
    let (server, gateway) = runtime.block_on(async {
        let router = Router::new()
            .route("/api/purchases", get(async || Json([1, 2, 3])))
            .route("/api/purchase", post(async |Json(_): Json<serde_json::Value>| Json([1, 2, 3])));
        let server = listen(protected(router, &EdgeConfig::default()).expect("no origins"), &stop).await;
        let gateway = before(server, &stop).await;
        let gateway =
            listen(gateway.protected(Router::new(), &EdgeConfig::default()).expect("no origins"), &stop)
                .await;
        (server, gateway)
    });
    let body = r#"{"purchase_items":[{"product_id":1,"amount":1}],"payment":{"currency_code":"NT"}}"#;
    let read =
        "GET /api/purchases?size=10 HTTP/1.1\r\nhost: shop\r\nauthorization: bearer x\r\n\r\n".to_owned();
    let purchase = format!(
        "POST /api/purchase HTTP/1.1\r\nhost: shop\r\nauthorization: bearer x\r\nidempotency-key: k\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    );

    let mut group = criterion.benchmark_group("gateway");
    group.throughput(Throughput::Elements(1));
    for (what, request) in [("a read", &read), ("a purchase", &purchase)] {
        for (how, address) in [("asked directly", server), ("forwarded", gateway)] {
            group.bench_function(format!("{what} {how}"), |bencher| {
                bencher.to_async(&runtime).iter_custom(async |times| {
                    let mut connection = TcpStream::connect(address).await.expect("it listens");
                    connection.set_nodelay(true).expect("a socket");
                    let begun = Instant::now();
                    for _ in 0..times {
                        ask(&mut connection, request).await;
                    }
                    begun.elapsed()
                });
            });
        }
    }
    group.finish();
    stop.cancel();
}

/// Serves on a free port until it is told to stop.
async fn listen(api: Protected, stop: &CancellationToken) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let address = listener.local_addr().expect("an address");
    let stop = stop.clone();
    tokio::spawn(async move { serve::serve(listener, api, &Limits::default(), stop).await });
    address
}

/// A gateway that has found this server, as each of the services.
async fn before(server: SocketAddr, stop: &CancellationToken) -> Gateway {
    let at = || server.to_string().parse().expect("an address");
    let gateway = gateway::start(Parts {
        upstreams: Upstreams { account: at(), product: at(), order: at(), payment: at(), purchase: at() },
        head_timeout: HEAD_TIMEOUT,
        registry: Registry::new(),
        spans: telemetry::Spans::off(),
        stop_streams: stop.clone(),
    });
    tokio::spawn(gateway.clone().run(stop.clone()));
    while gateway.ready().is_err() {
        tokio::task::yield_now().await;
    }
    gateway
}

/// Asks, and reads the whole answer.
async fn ask(connection: &mut TcpStream, request: &str) {
    connection.write_all(request.as_bytes()).await.expect("an open connection");
    let (mut read, mut answer) = (0, [0; 1024]);
    while !answer[..read].ends_with(ANSWER.as_bytes()) {
        let count = connection.read(&mut answer[read..]).await.expect("an open connection");
        assert!(count > 0, "half an answer: {}", String::from_utf8_lossy(&answer[..read]));
        read += count;
    }
    assert!(answer.starts_with(b"HTTP/1.1 200 "), "{}", String::from_utf8_lossy(&answer[..read]));
}

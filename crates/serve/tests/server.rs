//! The server over real sockets: its limits against slow, silent and greedy clients, and its shutdown.

#![allow(clippy::unwrap_used, reason = "a test panics where something is not as it should be")]

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::extract::ConnectInfo;
use axum::routing::{get, post};
use bytes::Bytes;
use serve::edge::{EdgeConfig, protected};
use serve::server::Drained;
use serve::{Json, Limits, serve};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Notify;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

/// Longer than any of these tests may take; a wait that reaches it has failed.
const PATIENCE: Duration = Duration::from_secs(20);

struct Running {
    address: SocketAddr,
    shutdown: CancellationToken,
    ended: JoinHandle<Drained>,
}

async fn start(router: Router, limits: Limits) -> Running {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let shutdown = CancellationToken::new();
    let router = protected(router, &EdgeConfig::default()).unwrap();
    let token = shutdown.clone();
    let ended = tokio::spawn(async move { serve(listener, router, &limits, token).await });
    Running { address, shutdown, ended }
}

impl Running {
    async fn connect(&self) -> TcpStream {
        TcpStream::connect(self.address).await.unwrap()
    }

    async fn send(&self, text: &str) -> TcpStream {
        let mut stream = self.connect().await;
        stream.write_all(text.as_bytes()).await.unwrap();
        stream
    }

    async fn stop(self) -> Drained {
        self.shutdown.cancel();
        within(self.ended).await.unwrap()
    }
}

async fn within<F: Future>(future: F) -> F::Output {
    tokio::time::timeout(PATIENCE, future).await.expect("it takes too long")
}

/// All that the server sends until it closes the connection.
async fn read_all(stream: &mut TcpStream) -> String {
    let mut bytes = Vec::new();
    // A reset after the answer is as good as an end.
    let _ = within(stream.read_to_end(&mut bytes)).await;
    String::from_utf8(bytes).unwrap()
}

/// Reads until `text` has arrived.
async fn read_until(stream: &mut TcpStream, text: &str) -> String {
    let mut seen = String::new();
    while !seen.contains(text) {
        let mut bytes = [0; 4096];
        let n = within(stream.read(&mut bytes)).await.unwrap();
        assert_ne!(n, 0, "closed after {seen:?}");
        seen.push_str(std::str::from_utf8(&bytes[..n]).unwrap());
    }
    seen
}

fn quick() -> Limits {
    Limits { head_timeout_ms: 100, body_timeout_ms: 100, write_stall_timeout_ms: 100, ..Limits::default() }
}

fn echo() -> Router {
    Router::new()
        .route("/", get(|ConnectInfo(peer): ConnectInfo<SocketAddr>| async move { peer.ip().to_string() }))
        .route("/", post(|Json(value): Json<serde_json::Value>| async move { Json(value) }))
}

#[tokio::test]
async fn a_request_is_answered_and_its_handler_knows_the_peer() {
    let server = start(echo(), Limits::default()).await;
    let mut stream = server.send("GET / HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n").await;
    let answer = read_all(&mut stream).await;
    assert!(answer.starts_with("HTTP/1.1 200") && answer.ends_with("127.0.0.1"), "{answer}");
    assert!(answer.contains("x-content-type-options: nosniff"), "{answer}");
    assert_eq!(server.stop().await, Drained { cut_off: 0 });
}

#[tokio::test]
async fn a_slow_head_closes_the_connection() {
    let server = start(echo(), quick()).await;
    let mut stream = server.send("GET / HTTP/1.1\r\nhost: ").await;
    assert_eq!(read_all(&mut stream).await, "");
    // So does one that never starts, and one that is idle between two requests.
    assert_eq!(read_all(&mut server.connect().await).await, "");
    let mut stream = server.send("GET / HTTP/1.1\r\nhost: x\r\n\r\n").await;
    assert!(read_all(&mut stream).await.ends_with("127.0.0.1"));
}

#[tokio::test]
async fn a_slow_body_is_answered_408() {
    let server = start(echo(), Limits { head_timeout_ms: 60_000, ..quick() }).await;
    let mut stream = server.send("POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 10\r\n\r\n{\"a\"").await;
    let answer = read_all(&mut stream).await;
    assert!(answer.starts_with("HTTP/1.1 408"), "{answer}");
    assert!(answer.ends_with(r#"{"msg":"the request's body did not arrive in time"}"#), "{answer}");
}

#[tokio::test]
async fn a_body_above_the_limit_is_413_whether_or_not_it_says_its_length() {
    let server = start(echo(), Limits::default()).await;
    let refused = r#"{"msg":"the request's body is larger than 65536 bytes"}"#;

    let mut stream = server.send("POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 65537\r\n\r\n").await;
    let answer = read_all(&mut stream).await;
    assert!(answer.starts_with("HTTP/1.1 413") && answer.ends_with(refused), "{answer}");

    let mut stream = server.send("POST / HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n").await;
    let chunk = format!("10001\r\n{}\r\n", "1".repeat(0x10001));
    let _ = stream.write_all(chunk.as_bytes()).await;
    let answer = read_until(&mut stream, refused).await;
    assert!(answer.starts_with("HTTP/1.1 413"), "{answer}");

    let body = format!("\"{}\"", "1".repeat(65534));
    let head = "POST / HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: 65536\r\n\r\n";
    let answer = read_all(&mut server.send(&format!("{head}{body}")).await).await;
    assert!(answer.starts_with("HTTP/1.1 200") && answer.ends_with(&body));
}

#[tokio::test]
async fn a_client_that_takes_nothing_is_dropped() {
    let chunks = Arc::new(Notify::new());
    let dropped = chunks.clone();
    let router = Router::new().route(
        "/",
        get(|| async move {
            let guard = NotifyOnDrop(dropped);
            let endless = futures_util::stream::repeat_with(move || {
                let _held = &guard;
                Ok::<_, std::convert::Infallible>(Bytes::from_static(&[b'x'; 16 * 1024]))
            });
            Body::from_stream(endless)
        }),
    );
    let server = start(router, quick()).await;
    let stream = server.send("GET / HTTP/1.1\r\nhost: x\r\n\r\n").await;
    within(chunks.notified()).await;
    drop(stream);
}

struct NotifyOnDrop(Arc<Notify>);

impl Drop for NotifyOnDrop {
    fn drop(&mut self) {
        self.0.notify_one();
    }
}

#[tokio::test]
async fn connections_beyond_the_bound_wait_for_a_place() {
    let server = start(echo(), Limits { max_connections: 1, ..Limits::default() }).await;
    let mut first = server.send("GET / HTTP/1.1\r\nhost: x\r\n\r\n").await;
    read_until(&mut first, "127.0.0.1").await;
    let mut second = server.send("GET / HTTP/1.1\r\nhost: x\r\n\r\n").await;
    let mut byte = [0];
    let early = tokio::time::timeout(Duration::from_millis(100), second.peek(&mut byte)).await;
    assert!(early.is_err(), "the second connection was served beside the first");
    drop(first);
    read_until(&mut second, "127.0.0.1").await;
}

/// A handler that says when it is in, and answers when told.
fn held(entered: Arc<Notify>, release: Arc<Notify>) -> Router {
    Router::new().route(
        "/",
        get(|| async move {
            entered.notify_one();
            release.notified().await;
            "done"
        }),
    )
}

#[tokio::test]
async fn a_shutdown_lets_the_request_in_flight_finish_and_takes_no_new_one() {
    let (entered, release) = (Arc::new(Notify::new()), Arc::new(Notify::new()));
    let server = start(held(entered.clone(), release.clone()), Limits::default()).await;
    let mut busy = server.send("GET / HTTP/1.1\r\nhost: x\r\n\r\n").await;
    within(entered.notified()).await;
    let mut idle = server.connect().await;

    let address = server.address;
    server.shutdown.cancel();
    // The idle connection's end shows that the server has heard; then nobody listens any more.
    assert_eq!(read_all(&mut idle).await, "");
    within(async { while TcpStream::connect(address).await.is_ok() {} }).await;
    assert!(!server.ended.is_finished());

    release.notify_one();
    let answer = read_all(&mut busy).await;
    assert!(answer.starts_with("HTTP/1.1 200") && answer.ends_with("done"), "{answer}");
    assert_eq!(server.stop().await, Drained { cut_off: 0 });
}

/// Who sends a request at the moment of a shutdown is answered, and told that it is the last; who has connected and sent nothing yet may
/// send one; who is idle is closed.
#[tokio::test]
async fn a_kept_connection_is_told_to_go_before_it_is_closed() {
    const REQUEST: &str = "GET / HTTP/1.1\r\nhost: x\r\n\r\n";
    let server = start(echo(), Limits::default()).await;
    let (mut busy, mut idle) = (server.send(REQUEST).await, server.send(REQUEST).await);
    for stream in [&mut busy, &mut idle] {
        assert!(!read_until(stream, "127.0.0.1").await.contains("connection: close"));
    }
    let mut new = server.connect().await;
    server.shutdown.cancel();
    let nobody_is_taken = async { while TcpStream::connect(server.address).await.is_ok() {} };
    within(nobody_is_taken).await;
    for stream in [&mut busy, &mut new] {
        stream.write_all(REQUEST.as_bytes()).await.unwrap();
        let answer = read_all(stream).await;
        assert!(answer.starts_with("HTTP/1.1 200") && answer.contains("connection: close"), "{answer}");
    }
    assert_eq!(read_all(&mut idle).await, "");
    assert_eq!(server.stop().await, Drained { cut_off: 0 });
}

#[tokio::test]
async fn a_shutdown_does_not_wait_beyond_its_deadline() {
    let (entered, release) = (Arc::new(Notify::new()), Arc::new(Notify::new()));
    let limits = Limits { drain_timeout_ms: 50, ..Limits::default() };
    let server = start(held(entered.clone(), release), limits).await;
    let mut busy = server.send("GET / HTTP/1.1\r\nhost: x\r\n\r\n").await;
    within(entered.notified()).await;
    assert_eq!(server.stop().await, Drained { cut_off: 1 });
    assert_eq!(read_all(&mut busy).await, "");
}

async fn over_http2(address: SocketAddr) -> (http::StatusCode, String) {
    let stream = TcpStream::connect(address).await.unwrap();
    let handshake = hyper::client::conn::http2::handshake(
        hyper_util::rt::TokioExecutor::new(),
        hyper_util::rt::TokioIo::new(stream),
    );
    let (mut sender, connection) = handshake.await.unwrap();
    tokio::spawn(connection);
    let request = http::Request::get(format!("http://{address}/")).body(String::new()).unwrap();
    let response = within(sender.send_request(request)).await.unwrap();
    let (head, body) = response.into_parts();
    let body = within(http_body_util::BodyExt::collect(body)).await.unwrap().to_bytes();
    (head.status, String::from_utf8(body.to_vec()).unwrap())
}

#[tokio::test]
async fn one_port_takes_both_versions_of_http() {
    let server = start(echo(), Limits::default()).await;
    assert_eq!(over_http2(server.address).await, (http::StatusCode::OK, "127.0.0.1".to_owned()));
    let mut stream = server.send("GET / HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n").await;
    assert!(read_all(&mut stream).await.ends_with("127.0.0.1"));
    // In pieces, as nobody sends it, and half of it, which is no HTTP.
    let mut stream = server.send("PRI * HTTP/2.0\r\n").await;
    stream.write_all(b"\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0").await.unwrap();
    let mut settings = [0; 9];
    within(stream.read_exact(&mut settings)).await.unwrap();
    assert_eq!(settings[3], 4, "a frame of settings answers");
    drop(stream);
    let mut stream = server.send("PRI * HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n").await;
    assert!(read_all(&mut stream).await.starts_with("HTTP/1.1 404"));
    drop(stream);
    assert_eq!(server.stop().await.cut_off, 0);
}

#[tokio::test]
async fn a_connection_that_says_nothing_or_half_a_preface_is_closed() {
    let server = start(echo(), quick()).await;
    for begun in ["", "PRI * HTTP/2.0\r\n"] {
        assert_eq!(read_all(&mut server.send(begun).await).await, "");
    }
}

#[tokio::test]
async fn the_client_is_whom_a_trusted_proxy_names() {
    let named = "GET / HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\
                 x-forwarded-for: 6.6.6.6, 10.0.0.1\r\nx-forwarded-for: 10.0.0.2\r\n\r\n";
    for (trusted_proxies, client) in [(0, "127.0.0.1"), (1, "10.0.0.2"), (2, "10.0.0.1"), (4, "127.0.0.1")] {
        let server = start(echo(), Limits { trusted_proxies, ..Limits::default() }).await;
        let answer = read_all(&mut server.send(named).await).await;
        assert!(answer.ends_with(&format!("\r\n\r\n{client}")), "{trusted_proxies}: {answer}");
    }
}

//! A gateway, the replicas behind it, and somebody who asks.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use axum::Router;
use axum::extract::Request;
use axum::routing::any;
use bytes::Bytes;
use gateway::{Gateway, Parts, Upstreams};
use http::{HeaderMap, Method, StatusCode};
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::server::conn::http2;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use peers::Addresses;
use serve::Limits;
use serve::edge::{EdgeConfig, protected};
use serve::server::Drained;
use telemetry::Registry;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Notify;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

/// Longer than any of these tests may take; a wait that reaches it has failed.
const PATIENCE: Duration = Duration::from_secs(60);

pub(crate) async fn within<F: Future>(future: F) -> F::Output {
    tokio::time::timeout(PATIENCE, future).await.expect("it takes too long")
}

/// Waits until something holds.
pub(crate) async fn until(what: &str, mut holds: impl AsyncFnMut() -> bool) {
    let wait = async {
        while !holds().await {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(PATIENCE, wait).await.unwrap_or_else(|_| panic!("never: {what}"));
}

/// A replica, or any other server of ours.
pub(crate) struct Server {
    pub(crate) address: SocketAddr,
    shutdown: CancellationToken,
    ended: JoinHandle<Drained>,
}

impl Server {
    pub(crate) async fn start(router: Router) -> Server {
        Server::start_at("127.0.0.1:0".parse().unwrap(), router, Limits::default()).await
    }

    pub(crate) async fn start_at(address: SocketAddr, router: Router, limits: Limits) -> Server {
        let listener = TcpListener::bind(address).await.unwrap();
        let address = listener.local_addr().unwrap();
        let shutdown = CancellationToken::new();
        let api = protected(router, &EdgeConfig::default()).unwrap();
        let token = shutdown.clone();
        let ended = tokio::spawn(async move { serve::serve(listener, api, &limits, token).await });
        Server { address, shutdown, ended }
    }

    /// Stops it as its limits say: with `drain_timeout_ms: 0`, its connections break.
    pub(crate) async fn stop(self) {
        self.shutdown.cancel();
        let _ = within(self.ended).await.unwrap();
    }
}

/// A replica whose connections break when it stops, as if it had been killed.
pub(crate) async fn mortal(address: SocketAddr, router: Router) -> Server {
    Server::start_at(address, router, Limits { drain_timeout_ms: 0, ..Limits::default() }).await
}

/// Tells what it was asked, and by which replica it was answered.
pub(crate) fn echo(name: &'static str) -> Router {
    Router::new().route(
        "/{*path}",
        any(async move |request: Request| {
            let (parts, body) = request.into_parts();
            let body = body.collect().await.unwrap().to_bytes();
            let mut told = vec![format!("{name}: {} {}", parts.method, parts.uri)];
            told.extend(
                parts.headers.iter().map(|(name, value)| format!("{name}: {}", value.to_str().unwrap())),
            );
            told.push(String::from_utf8(body.to_vec()).unwrap());
            told.join("\n")
        }),
    )
}

/// Tells that it is the gateway's own.
fn health() -> Router {
    Router::new().route("/grpc.health.v1.Health/{method}", any(async || "the gateway's own health"))
}

/// What a [`Raw`] replica does when it is asked something.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Deed {
    /// It breaks the connection.
    Break,
    /// It says nothing, for ever.
    Hang,
}

/// A replica that does to its connections what no server of ours does.
pub(crate) struct Raw {
    pub(crate) address: SocketAddr,
    /// Requests other than those that ask whether it lives.
    pub(crate) requests: Arc<AtomicUsize>,
    task: JoinHandle<()>,
}

impl Raw {
    pub(crate) async fn start(deed: Deed) -> Raw {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let requests = Arc::new(AtomicUsize::new(0));
        let counted = requests.clone();
        let task = tokio::spawn(async move {
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                tokio::spawn(misbehave(stream, deed, counted.clone()));
            }
        });
        Raw { address, requests, task }
    }

    pub(crate) fn requests(&self) -> usize {
        self.requests.load(Ordering::SeqCst)
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn misbehave(mut stream: TcpStream, deed: Deed, requests: Arc<AtomicUsize>) {
    let mut start = [0; 7];
    let Ok(1..) = stream.peek(&mut start).await else { return };
    if start.starts_with(b"OPTIONS") {
        let _ = stream.write_all(b"HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\n\r\n").await;
        // Read, so that closing does not take the answer back.
        let _ = stream.read(&mut [0; 4096]).await;
        return;
    }
    let asked = Arc::new(Notify::new());
    let asked_again = asked.clone();
    let answer = service_fn(move |_| {
        requests.fetch_add(1, Ordering::SeqCst);
        asked_again.notify_one();
        std::future::pending::<Result<http::Response<String>, std::convert::Infallible>>()
    });
    let http = http2::Builder::new(TokioExecutor::new());
    let connection = http.serve_connection(TokioIo::new(stream), answer);
    tokio::select! {
        _ = connection => {}
        () = asked.notified(), if deed == Deed::Break => {}
    }
}

/// A gateway and its server.
pub(crate) struct Door {
    pub(crate) gateway: Gateway,
    pub(crate) address: SocketAddr,
    pub(crate) stop: CancellationToken,
    ended: JoinHandle<Drained>,
    run: JoinHandle<()>,
}

pub(crate) fn places(addresses: &[SocketAddr]) -> Addresses {
    addresses.to_vec().into()
}

/// Nobody anywhere.
pub(crate) fn nowhere() -> Upstreams {
    let nobody = || places(&[]);
    Upstreams { account: nobody(), product: nobody(), order: nobody(), payment: nobody(), purchase: nobody() }
}

impl Door {
    pub(crate) async fn open(upstreams: Upstreams) -> Door {
        Door::open_with(upstreams, gateway::HEAD_TIMEOUT).await
    }

    pub(crate) async fn open_with(upstreams: Upstreams, head_timeout: Duration) -> Door {
        Door::open_for(upstreams, head_timeout, Limits::default()).await
    }

    /// `limits` are those of the gateway's clients.
    pub(crate) async fn open_for(upstreams: Upstreams, head_timeout: Duration, limits: Limits) -> Door {
        let stop = CancellationToken::new();
        let parts = Parts {
            upstreams,
            head_timeout,
            registry: Registry::new(),
            spans: telemetry::Spans::off(),
            stop_streams: stop.clone(),
        };
        let gateway = gateway::start(parts);
        let run = tokio::spawn(gateway.clone().run(stop.clone()));
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let api = gateway.protected(health(), &EdgeConfig::default()).unwrap();
        let token = stop.clone();
        let ended = tokio::spawn(async move { serve::serve(listener, api, &limits, token).await });
        Door { gateway, address, stop, ended, run }
    }

    /// A gateway before purchase replicas only.
    pub(crate) async fn before(replicas: &[SocketAddr]) -> Door {
        Door::open(Upstreams { purchase: places(replicas), ..nowhere() }).await
    }

    /// Waits until so many services have a replica that answers.
    pub(crate) async fn lacks(&self, services: usize) {
        until("the replicas are found", async || {
            let missing = self.gateway.ready().err().map_or(0, |missing| missing.split(';').count());
            missing == services
        })
        .await;
    }

    pub(crate) async fn get(&self, path: &str, token: &str) -> Answer {
        ask(self.address, Method::GET, path, &[("authorization", token)], "").await
    }

    pub(crate) async fn post(&self, path: &str, headers: &[(&str, &str)]) -> Answer {
        ask(self.address, Method::POST, path, headers, "{}").await
    }

    /// Stops it, which must not cut anybody off.
    pub(crate) async fn close(self) {
        self.stop.cancel();
        within(self.run).await.unwrap();
        assert_eq!(within(self.ended).await.unwrap(), Drained { cut_off: 0 });
    }
}

#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) status: StatusCode,
    pub(crate) headers: HeaderMap,
    pub(crate) body: String,
}

/// Asks by a connection of its own.
pub(crate) async fn ask(
    address: SocketAddr,
    method: Method,
    path: &str,
    headers: &[(&str, &str)],
    body: &'static str,
) -> Answer {
    let response = within(send(address, method, path, headers, body)).await;
    let (head, body) = response.into_parts();
    let body = within(body.collect()).await.unwrap().to_bytes();
    let body = String::from_utf8(body.to_vec()).unwrap();
    Answer { status: head.status, headers: head.headers, body }
}

/// Asks by a connection of its own, and leaves the answer's body to the caller.
pub(crate) async fn send(
    address: SocketAddr,
    method: Method,
    path: &str,
    headers: &[(&str, &str)],
    body: &'static str,
) -> http::Response<Incoming> {
    let stream = TcpStream::connect(address).await.unwrap();
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.unwrap();
    tokio::spawn(connection);
    let mut request = http::Request::builder().method(method).uri(path).header("host", "shop.example");
    for (name, value) in headers {
        request = request.header(*name, *value);
    }
    let request = request.body(Full::new(Bytes::from_static(body.as_bytes()))).unwrap();
    let response = sender.send_request(request).await.unwrap();
    // The connection lives as long as its sender.
    tokio::spawn(async move {
        let _ = sender.ready().await;
    });
    response
}

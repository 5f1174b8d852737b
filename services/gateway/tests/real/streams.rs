//! Event streams through the gateway.

use std::convert::Infallible;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::response::IntoResponse;
use axum::routing::{MethodRouter, get};
use bytes::Bytes;
use futures_util::stream;
use gateway::{HEAD_TIMEOUT, Upstreams};
use http::Method;
use http::header::CONTENT_TYPE;
use http_body_util::BodyExt;
use serve::Limits;
use tokio::sync::Semaphore;

use crate::fixture::{Door, Server, mortal, nowhere, places, send, until, within};

const PATH: &str = "/api/purchase/result";

/// A stream that gives one event for each permit, and tells when it is dropped.
#[derive(Clone)]
struct Source {
    events: Arc<Semaphore>,
    open: Arc<AtomicUsize>,
}

struct Open(Arc<AtomicUsize>);

impl Drop for Open {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

impl Source {
    fn new() -> Source {
        Source { events: Arc::new(Semaphore::new(0)), open: Arc::default() }
    }

    fn router(&self, event: &'static str) -> Router {
        Router::new().route(PATH, self.events(event))
    }

    fn events(&self, event: &'static str) -> MethodRouter {
        let source = self.clone();
        get(async move || {
            source.open.fetch_add(1, Ordering::SeqCst);
            let open = Open(source.open.clone());
            let events = stream::unfold((source.events.clone(), open), async move |(events, open)| {
                events.acquire().await.unwrap().forget();
                Some((Ok::<_, Infallible>(Bytes::from_static(event.as_bytes())), (events, open)))
            });
            ([(CONTENT_TYPE, "text/event-stream")], Body::from_stream(events)).into_response()
        })
    }

    async fn is_open(&self, n: usize) {
        until("the streams are as many", async || self.open.load(Ordering::SeqCst) == n).await;
    }
}

async fn listen(door: &Door) -> hyper::body::Incoming {
    let response = within(send(door.address, Method::GET, PATH, &[("authorization", "bearer x")], "")).await;
    assert_eq!(response.headers()[CONTENT_TYPE], "text/event-stream");
    response.into_body()
}

#[tokio::test]
async fn an_event_is_passed_on_at_once_and_a_client_that_goes_ends_the_stream_behind() {
    let source = Source::new();
    let replica = Server::start(source.router("data: 1\n\n")).await;
    let door = Door::before(&[replica.address]).await;
    let mut body = listen(&door).await;
    for _ in 0..3 {
        source.events.add_permits(1);
        // The next one is not there yet, so nothing can have waited for it.
        let frame = within(body.frame()).await.unwrap().unwrap();
        assert_eq!(frame.into_data().unwrap(), "data: 1\n\n");
    }
    source.is_open(1).await;
    drop(body);
    source.is_open(0).await;
    door.close().await;
}

#[tokio::test]
async fn a_stream_ends_cleanly_when_the_gateway_stops() {
    let source = Source::new();
    let replica = Server::start(source.router("data: 1\n\n")).await;
    let door = Door::before(&[replica.address]).await;
    let mut body = listen(&door).await;
    source.events.add_permits(1);
    within(body.frame()).await.unwrap().unwrap();
    let ended = tokio::spawn(async move { body.collect().await });
    door.close().await;
    assert_eq!(within(ended).await.unwrap().unwrap().to_bytes(), "");
    source.is_open(0).await;
}

#[tokio::test]
async fn a_stream_ends_cleanly_when_its_replica_dies() {
    let source = Source::new();
    let replica = mortal("127.0.0.1:0".parse().unwrap(), source.router("data: 1\n\n")).await;
    let door = Door::before(&[replica.address]).await;
    let mut body = listen(&door).await;
    source.events.add_permits(1);
    within(body.frame()).await.unwrap().unwrap();
    replica.stop().await;
    assert_eq!(within(body.collect()).await.unwrap().to_bytes(), "");
    door.close().await;
}

/// More than the sockets on the way may hold.
const BIG: &str = match std::str::from_utf8(&[b'x'; 64 * 1024]) {
    Ok(text) => text,
    Err(_) => panic!("it is ASCII"),
};

#[tokio::test]
async fn what_a_client_does_not_take_is_not_taken_from_the_replica() {
    let source = Source::new();
    source.events.add_permits(1_000_000);
    let replica = Server::start(source.router(BIG)).await;
    // The gateway gives up a client that takes nothing, and then the replica hears of it.
    let limits = Limits { write_stall_timeout_ms: 200, ..Limits::default() };
    let upstreams = Upstreams { purchase: places(&[replica.address]), ..nowhere() };
    let door = Door::open_for(upstreams, HEAD_TIMEOUT, limits).await;
    let body = listen(&door).await;
    source.is_open(0).await;
    assert!(source.events.available_permits() > 900_000, "it was gathered somewhere");
    drop(body);
}

/// All of them share one connection to the replica.
#[tokio::test]
async fn clients_that_take_nothing_hold_nobody_up() {
    let (slow, quick) = (Source::new(), Source::new());
    slow.events.add_permits(1_000_000);
    let router = slow.router(BIG).route("/api/purchases", quick.events("data: 1\n\n"));
    let replica = Server::start(router).await;
    let door = Door::before(&[replica.address]).await;
    let mut idlers = Vec::new();
    for _ in 0..8 {
        idlers.push(listen(&door).await);
    }
    // Nothing more goes to any of them when all on the way to them is full.
    let mut left = slow.events.available_permits();
    until("they are full", async || {
        tokio::time::sleep(Duration::from_millis(100)).await;
        left == std::mem::replace(&mut left, slow.events.available_permits())
    })
    .await;
    let response = within(send(door.address, Method::GET, "/api/purchases", &[], "")).await;
    let mut body = response.into_body();
    for _ in 0..3 {
        quick.events.add_permits(1);
        within(body.frame()).await.unwrap().unwrap();
    }
    slow.is_open(8).await;
}

#[tokio::test]
async fn clients_that_all_go_at_once_cost_those_who_stay_nothing() {
    const CLIENTS: usize = 300;
    let source = Source::new();
    let replica = Server::start(source.router("data: 1\n\n")).await;
    let door = Door::before(&[replica.address]).await;
    let mut stays = listen(&door).await;
    let mut go = Vec::new();
    for _ in 1..CLIENTS {
        go.push(listen(&door).await);
    }
    // More than one connection may carry.
    source.is_open(CLIENTS).await;
    source.events.add_permits(100_000);
    for body in &mut go {
        within(body.frame()).await.unwrap().unwrap();
    }
    drop(go);
    source.is_open(1).await;
    source.events.add_permits(100_000);
    for _ in 0..1_000 {
        within(stays.frame()).await.expect("it goes on").unwrap();
    }
    drop(stays);
    door.close().await;
}

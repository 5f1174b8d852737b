//! Event streams through the gateway.

use std::convert::Infallible;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use axum::Router;
use axum::body::Body;
use axum::response::IntoResponse;
use axum::routing::get;
use bytes::Bytes;
use futures_util::stream;
use http::Method;
use http::header::CONTENT_TYPE;
use http_body_util::BodyExt;
use serve::Limits;
use tokio::sync::Semaphore;

use crate::fixture::{Door, Server, mortal, send, until, within};

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
        let source = self.clone();
        Router::new().route(
            PATH,
            get(async move || {
                source.open.fetch_add(1, Ordering::SeqCst);
                let open = Open(source.open.clone());
                let events = stream::unfold((source.events.clone(), open), async move |(events, open)| {
                    events.acquire().await.unwrap().forget();
                    Some((Ok::<_, Infallible>(Bytes::from_static(event.as_bytes())), (events, open)))
                });
                ([(CONTENT_TYPE, "text/event-stream")], Body::from_stream(events)).into_response()
            }),
        )
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

#[tokio::test]
async fn what_a_client_does_not_take_is_not_taken_from_the_replica() {
    const BIG: &str = match std::str::from_utf8(&[b'x'; 64 * 1024]) {
        Ok(text) => text,
        Err(_) => panic!("it is ASCII"),
    };
    let source = Source::new();
    source.events.add_permits(1_000_000);
    // The replica gives up a client that takes nothing; it can only see the gateway.
    let limits = Limits { write_stall_timeout_ms: 200, ..Limits::default() };
    let replica = Server::start_at("127.0.0.1:0".parse().unwrap(), source.router(BIG), limits).await;
    let door = Door::before(&[replica.address]).await;
    let body = listen(&door).await;
    source.is_open(0).await;
    assert!(source.events.available_permits() > 900_000, "it was gathered somewhere");
    drop(body);
}

//! Calls that take longer than they may: whoever asks goes elsewhere, whoever is asked stops. In memory, on a clock that stands still
//! while there is anything to do.

use std::convert::Infallible;
use std::future::pending;
use std::net::SocketAddr;
use std::ops::Range;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::routing::any;
use http::{HeaderMap, Request, Uri};
use http_body_util::BodyExt;
use hyper::server::conn::http2;
use hyper_util::rt::{TokioExecutor, TokioIo};
use peers::Peers;
use rpc::CALL_TIMEOUT;
use serve::admin::Readiness;
use shop::calls::{CheckProducts, GetProducts};
use tokio::io::{DuplexStream, duplex};
use tokio::time::{Instant, timeout};
use tokio_util::sync::CancellationToken;
use tonic::transport::{Channel, Endpoint};
use tower::{ServiceExt, service_fn};

/// What a wait may take beyond what it should: timers count milliseconds.
const SOON: Duration = Duration::from_millis(20);

/// Longer than anything here may take; the clock gets there in no time.
const FOREVER: Duration = Duration::from_secs(3_600);

/// Room for what is on its way, in bytes.
const PIPE_BYTES: usize = 64 * 1024;

fn about(wait: Duration) -> Range<Duration> {
    wait..wait + SOON
}

/// What a replica does with whoever connects.
#[derive(Clone)]
enum Replica {
    /// It says nothing, not even that it speaks HTTP/2.
    Silent,
    /// It answers calls by these.
    Serves(Router),
}

impl Replica {
    /// One that takes calls, answers none, and notes how long each might have taken.
    fn that_hangs() -> (Replica, Arc<Mutex<Vec<String>>>) {
        let told = Arc::new(Mutex::new(Vec::new()));
        let noted = told.clone();
        let hang = any(async move |headers: HeaderMap| -> String {
            let time = headers["grpc-timeout"].to_str().expect("a time").to_owned();
            noted.lock().expect("nobody has panicked").push(time);
            pending().await
        });
        (Replica::Serves(Router::new().route("/{service}/{method}", hang)), told)
    }

    /// One that knows no product.
    fn that_answers() -> Replica {
        let check = CheckProducts::new(async |ids: Vec<u64>| Ok(vec![None; ids.len()]));
        Replica::Serves(rpc::product_service(check, GetProducts::new(async |_| Ok(Vec::new()))))
    }

    async fn converse(self, stream: DuplexStream) {
        let Replica::Serves(routes) = self else {
            let _held = stream;
            return pending().await;
        };
        let answer = hyper::service::service_fn(move |call: Request<hyper::body::Incoming>| {
            routes.clone().oneshot(call.map(Body::new))
        });
        let http = http2::Builder::new(TokioExecutor::new());
        http.serve_connection(TokioIo::new(stream), answer).await.expect("a client that keeps to HTTP/2");
    }

    fn link(self) -> Channel {
        let connect = move |_: Uri| {
            let (ours, theirs) = duplex(PIPE_BYTES);
            tokio::spawn(self.clone().converse(theirs));
            async { Ok::<_, Infallible>(TokioIo::new(ours)) }
        };
        Endpoint::from_static("http://replica").connect_with_connector_lazy(service_fn(connect))
    }
}

/// Asks replicas that are these, in no order.
fn check_products(replicas: Vec<Replica>) -> CheckProducts {
    let address = |n| SocketAddr::from(([127, 0, 0, 1], n));
    let places: Vec<SocketAddr> = (1..).take(replicas.len()).map(address).collect();
    let link = move |at: SocketAddr| replicas[usize::from(at.port()) - 1].clone().link();
    rpc::check_products(Peers::new("product", places.into(), link))
}

/// Asks once; tells whether there was an answer, and how long that took.
async fn ask(check: &CheckProducts) -> (bool, Duration) {
    let begun = Instant::now();
    let answer = timeout(FOREVER, check.ask(vec![7])).await.expect("it takes too long");
    (answer.is_ok_and(|known| known == [None]), begun.elapsed())
}

#[tokio::test(start_paused = true)]
async fn of_a_replica_that_never_answers_one_call_is_lost_and_no_question() {
    let (hanging, told) = Replica::that_hangs();
    for hanging in [hanging, Replica::Silent] {
        let check = check_products(vec![hanging, Replica::that_answers()]);
        // One at random is asked first.
        let waited = loop {
            let (answered, took) = ask(&check).await;
            assert!(answered);
            if took > SOON {
                break took;
            }
        };
        assert!(about(CALL_TIMEOUT).contains(&waited), "{waited:?}");
        for _ in 0..50 {
            let (answered, took) = ask(&check).await;
            assert!(answered && took < SOON, "it is left out from now on: {took:?}");
        }
    }
    assert_eq!(*told.lock().expect("nobody has panicked"), ["2000000u"]);
}

#[tokio::test(start_paused = true)]
async fn where_no_replica_answers_each_is_waited_for_once() {
    let (hanging, told) = Replica::that_hangs();
    let check = check_products(vec![hanging.clone(), Replica::Silent, hanging]);
    let (answered, took) = ask(&check).await;
    assert!(!answered && about(3 * CALL_TIMEOUT).contains(&took), "{took:?}");
    assert_eq!(told.lock().expect("nobody has panicked").len(), 2);
}

/// A call with an empty message.
fn call(method: &str, time: &str) -> Request<Body> {
    let request = Request::post(method).header("content-type", "application/grpc");
    request.header("grpc-timeout", time).body(Body::from(vec![0; 5])).expect("a request")
}

/// The bytes of a call's answer, its status, and how long it took.
async fn answer(routes: &Router, method: &str, time: &str) -> (usize, String, Duration) {
    let begun = Instant::now();
    let answer = timeout(FOREVER, routes.clone().oneshot(call(method, time))).await;
    let answer = answer.expect("it takes too long").unwrap_or_else(|never| match never {});
    let (mut head, body) = answer.into_parts();
    let body = timeout(FOREVER, body.collect()).await.expect("it takes too long").expect("messages");
    head.headers.extend(body.trailers().cloned().unwrap_or_default());
    let status = head.headers["grpc-status"].to_str().expect("a number").to_owned();
    (body.to_bytes().len(), status, begun.elapsed())
}

#[tokio::test(start_paused = true)]
async fn who_is_asked_stops_when_the_time_is_over() {
    let (check, get) = (CheckProducts::new(|_| pending()), GetProducts::new(async |_| Ok(Vec::new())));
    let routes = rpc::product_service(check, get);
    for (time, wait) in
        [("300m", Duration::from_millis(300)), ("2M", Duration::from_secs(120)), ("0n", Duration::ZERO)]
    {
        let (bytes, status, took) = answer(&routes, "/product.ProductService/CheckProducts", time).await;
        assert_eq!((bytes, status.as_str()), (0, "4"), "{time}");
        assert!(about(wait).contains(&took), "{time}: {took:?}");
    }
    let (bytes, status, _) = answer(&routes, "/product.ProductService/GetProducts", "1S").await;
    assert_eq!((bytes, status.as_str()), (5, "0"));
    let (bytes, status, _) = answer(&routes, "/product.ProductService/GetProducts", "+1S").await;
    assert_eq!((bytes, status.as_str()), (0, "3"), "that is no time");
}

/// One that had begun, too.
#[tokio::test(start_paused = true)]
async fn an_answer_that_goes_on_ends_when_the_time_is_over() {
    let routes = rpc::health(Readiness::new(), CancellationToken::new());
    let (bytes, status, took) = answer(&routes, "/grpc.health.v1.Health/Watch", "90S").await;
    assert_eq!((bytes, status.as_str()), (7, "4"), "one message, and the end");
    assert!(about(Duration::from_secs(90)).contains(&took), "{took:?}");
}

//! gRPC calls through the gateway, with messages that nobody here understands.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use axum::Router;
use axum::body::Body;
use axum::extract::Request;
use axum::response::Response;
use axum::routing::post;
use bytes::Bytes;
use gateway::Upstreams;
use http::{HeaderMap, HeaderValue, Version};
use http_body_util::{BodyExt, Full};
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::net::TcpStream;

use crate::fixture::{Deed, Door, Raw, Server, mortal, nowhere, places, within};

/// Answers a call with its own message, its path, the time that it has if that is limited, and the trailers of success.
fn mirror() -> Router {
    Router::new().route(
        "/{service}/{method}",
        post(async |request: Request| {
            assert_eq!(request.version(), Version::HTTP_2);
            assert_eq!(request.headers()["te"], "trailers");
            let path = request.uri().path().to_owned();
            let time =
                request.headers().get("grpc-timeout").map(|time| format!(" {}", time.to_str().unwrap()));
            let body = request.into_body().collect().await.unwrap().to_bytes();
            let told = format!("{path} {}{}", String::from_utf8_lossy(&body), time.unwrap_or_default());
            let trailers = async {
                Some(Ok(HeaderMap::from_iter([(
                    "grpc-status".parse().unwrap(),
                    HeaderValue::from_static("0"),
                )])))
            };
            let mut response = Response::new(Body::new(Full::new(Bytes::from(told)).with_trailers(trailers)));
            response.headers_mut().insert("content-type", HeaderValue::from_static("application/grpc"));
            response
        }),
    )
}

/// The body, and the headers with the trailers.
pub(crate) async fn exchange(
    address: SocketAddr,
    request: http::request::Builder,
    body: &'static str,
) -> (String, HeaderMap) {
    let stream = TcpStream::connect(address).await.unwrap();
    let handshake = hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(stream));
    let (mut sender, connection) = handshake.await.unwrap();
    tokio::spawn(connection);
    let request = request.body(Full::new(Bytes::from_static(body.as_bytes()))).unwrap();
    let response = within(sender.send_request(request)).await.unwrap();
    let (mut head, body) = response.into_parts();
    let body = within(body.collect()).await.unwrap();
    if let Some(trailers) = body.trailers() {
        head.headers.extend(trailers.clone());
    }
    (String::from_utf8(body.to_bytes().to_vec()).unwrap(), head.headers)
}

async fn call(door: &Door, path: &str) -> (String, HeaderMap) {
    exchange(door.address, to(path), "message").await
}

/// A call that may take so long.
async fn call_within(door: &Door, path: &str, time: &str) -> (String, HeaderMap) {
    exchange(door.address, to(path).header("grpc-timeout", time), "message").await
}

fn to(path: &str) -> http::request::Builder {
    let uri = format!("http://shop.example{path}");
    let request = http::Request::post(uri).version(Version::HTTP_2).header("te", "trailers");
    request.header("content-type", "application/grpc+proto")
}

#[tokio::test]
async fn a_call_and_its_trailers_go_through() {
    let (account, product) = tokio::join!(Server::start(mirror()), Server::start(mirror()));
    let upstreams =
        Upstreams { account: places(&[account.address]), product: places(&[product.address]), ..nowhere() };
    let door = Door::open(upstreams).await;
    for path in [
        "/auth.AuthService/Auth",
        "/product.ProductService/CheckProducts",
        "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
        "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
    ] {
        let (body, headers) = call(&door, path).await;
        assert_eq!(body, format!("{path} message"));
        assert_eq!(headers["grpc-status"], "0");
    }
    assert_eq!(call(&door, "/grpc.health.v1.Health/Check").await.0, "the gateway's own health");
    account.stop().await;
    let (_, headers) = call(&door, "/auth.AuthService/Auth").await;
    assert_eq!(
        (&headers["grpc-status"], &headers["content-type"]),
        (&14.into(), &"application/grpc".parse().unwrap())
    );
    let (_, headers) = call(&door, "/shop.Unknown/Call").await;
    assert_eq!(headers["grpc-status"], "12");
    product.stop().await;
    door.close().await;
}

#[tokio::test]
async fn a_call_that_reads_is_made_again_elsewhere() {
    // One of them breaks every connection that brings it a call.
    let (liar, good) = tokio::join!(Raw::start(Deed::Break), Server::start(mirror()));
    let door = Door::open(Upstreams { product: places(&[liar.address, good.address]), ..nowhere() }).await;
    for _ in 0..20 {
        let (body, _) = call(&door, "/product.ProductService/GetProducts").await;
        assert_eq!(body, "/product.ProductService/GetProducts message");
    }
    door.close().await;
}

#[tokio::test]
async fn a_replica_that_returns_is_called_again() {
    let replica = mortal("127.0.0.1:0".parse().unwrap(), mirror()).await;
    let address = replica.address;
    let door = Door::open(Upstreams { product: places(&[address]), ..nowhere() }).await;
    assert_eq!(call(&door, "/product.ProductService/GetProducts").await.1["grpc-status"], "0");
    replica.stop().await;
    assert_eq!(call(&door, "/product.ProductService/GetProducts").await.1["grpc-status"], "14");
    let _replica = mortal(address, mirror()).await;
    assert_eq!(call(&door, "/product.ProductService/GetProducts").await.1["grpc-status"], "0");
    door.close().await;
}

#[tokio::test]
async fn what_is_left_of_a_call_s_time_is_passed_on() {
    let product = Server::start(mirror()).await;
    let door = Door::open(Upstreams { product: places(&[product.address]), ..nowhere() }).await;
    let left = async |time| {
        let (body, _) = call_within(&door, "/product.ProductService/GetProducts", time).await;
        body.rsplit(' ').next().unwrap().to_owned()
    };
    let micros: u32 = left("60S").await.strip_suffix('u').unwrap().parse().unwrap();
    assert!((1..60_000_000).contains(&micros), "{micros}");
    assert_eq!(left("60x").await, "60x", "that is for the service to refuse");
    door.close().await;
}

#[tokio::test]
async fn a_call_ends_when_its_time_is_over_and_nobody_is_blamed() {
    let begun = || Body::from_stream(futures_util::stream::pending::<Result<Bytes, Infallible>>());
    let begins = Router::new().route("/{service}/{method}", post(async move || begun()));
    let (hanging, begins) = tokio::join!(Raw::start(Deed::Hang), Server::start(begins));
    let upstreams =
        Upstreams { product: places(&[hanging.address]), account: places(&[begins.address]), ..nowhere() };
    let door = Door::open(upstreams).await;
    door.lacks(3).await;
    for path in ["/product.ProductService/GetProducts", "/auth.AuthService/Auth"] {
        let start = Instant::now();
        let (_, headers) = call_within(&door, path, "1S").await;
        assert_eq!(headers["grpc-status"], "4", "{path}");
        assert!((Duration::from_secs(1)..gateway::HEAD_TIMEOUT).contains(&start.elapsed()), "{path}");
    }
    assert_eq!(hanging.requests(), 1);
    // One that is given up is missing until it answers again.
    let missing = door.gateway.ready().unwrap_err();
    assert!(!missing.contains("product"), "{missing}");
}

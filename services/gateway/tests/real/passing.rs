//! What arrives at a replica, and what comes back.

use std::convert::Infallible;

use axum::Router;
use axum::body::Body;
use axum::routing::any;
use bytes::Bytes;
use futures_util::stream;
use gateway::Upstreams;
use http::{Method, StatusCode};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::fixture::{Door, Server, ask, echo, places, within};

#[tokio::test]
async fn each_path_goes_to_its_service() {
    let (account, product, order, payment, purchase) = tokio::join!(
        Server::start(echo("account")),
        Server::start(echo("product")),
        Server::start(echo("order")),
        Server::start(echo("payment")),
        Server::start(echo("purchase")),
    );
    let door = Door::open(Upstreams {
        account: places(&[account.address]),
        product: places(&[product.address]),
        order: places(&[order.address]),
        payment: places(&[payment.address]),
        purchase: places(&[purchase.address]),
    })
    .await;
    door.lacks(0).await;
    for (path, service) in [
        ("/.well-known/jwks.json", "account"),
        ("/api/account/info/person", "account"),
        ("/api/products?offset=0&size=3", "product"),
        ("/api/product/7", "product"),
        ("/api/order/7", "order"),
        ("/api/payment/7", "payment"),
        ("/api/purchases?size=3", "purchase"),
        ("/api/purchase/result?last_event_id=7", "purchase"),
    ] {
        let answer = door.get(path, "bearer x").await;
        assert!(
            answer.body.starts_with(&format!("{service}: GET http://shop.example{path}\n")),
            "{answer:?}"
        );
    }
    for path in ["/", "/api", "/metrics", "/purchases/parked", "/api/operator"] {
        let answer = door.get(path, "bearer x").await;
        assert_eq!(
            (answer.status.as_u16(), answer.body.as_str()),
            (404, r#"{"msg":"no such path"}"#),
            "{path}"
        );
    }
    door.close().await;
}

#[tokio::test]
async fn a_request_arrives_as_it_was_but_for_what_concerns_one_connection() {
    let purchase = Server::start(echo("purchase")).await;
    let door = Door::before(&[purchase.address]).await;
    door.lacks(4).await;
    let trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
    let headers = [
        ("connection", "keep-alive, x-mine"),
        ("x-mine", "1"),
        ("te", "gzip"),
        ("expect", "100-continue"),
        ("x-forwarded-for", "10.1.1.1"),
        ("traceparent", trace),
        ("authorization", "bearer x"),
    ];
    let answer = ask(door.address, Method::POST, "/api/purchase", &headers, "{\"a\":1}").await;
    let mut lines: Vec<&str> = answer.body.lines().collect();
    lines.sort_unstable();
    let trace = format!("traceparent: {trace}");
    assert_eq!(
        lines,
        [
            "authorization: bearer x",
            "content-length: 7",
            "purchase: POST http://shop.example/api/purchase",
            &trace,
            "x-forwarded-for: 10.1.1.1, 127.0.0.1",
            "{\"a\":1}",
        ]
    );
    assert_eq!(answer.headers["x-content-type-options"], "nosniff");
    door.close().await;
}

#[tokio::test]
async fn an_answer_comes_back_as_it_was_but_for_what_concerns_one_connection() {
    let teapot = any(async || {
        let pieces = stream::iter(["abc", "de"].map(|piece| Ok::<_, Infallible>(Bytes::from(piece))));
        (StatusCode::IM_A_TEAPOT, [("x-accel-buffering", "no")], Body::from_stream(pieces))
    });
    let replica = Server::start(Router::new().route("/{*path}", teapot)).await;
    let door = Door::before(&[replica.address]).await;
    for _ in 0..3 {
        let answer = door.get("/api/purchases", "bearer x").await;
        assert_eq!((answer.status, answer.body.as_str()), (StatusCode::IM_A_TEAPOT, "abcde"));
        assert_eq!(answer.headers["x-accel-buffering"], "no");
        assert_eq!(answer.headers["transfer-encoding"], "chunked", "as the client speaks HTTP/1.1");
    }
    door.close().await;
}

#[tokio::test]
async fn a_body_in_pieces_arrives_whole_and_one_too_large_does_not() {
    let purchase = Server::start(echo("purchase")).await;
    let door = Door::before(&[purchase.address]).await;
    let mut stream = TcpStream::connect(door.address).await.unwrap();
    let head =
        "POST /api/purchase HTTP/1.1\r\nhost: x\r\nconnection: close\r\ntransfer-encoding: chunked\r\n\r\n";
    stream.write_all(format!("{head}3\r\nabc\r\n2\r\nde\r\n0\r\n\r\n").as_bytes()).await.unwrap();
    let mut answer = String::new();
    within(stream.read_to_string(&mut answer)).await.unwrap();
    assert!(answer.contains("content-length: 5") && answer.contains("abcde"), "{answer}");
    assert!(!answer.contains("transfer-encoding"), "{answer}");

    let mut stream = TcpStream::connect(door.address).await.unwrap();
    let chunk = format!("{head}10001\r\n{}\r\n", "1".repeat(0x10001));
    let _ = stream.write_all(chunk.as_bytes()).await;
    let mut answer = [0; 12];
    within(stream.read_exact(&mut answer)).await.unwrap();
    assert_eq!(&answer, b"HTTP/1.1 413");
    door.close().await;
}

#[tokio::test]
async fn http2_reaches_the_api_too() {
    let purchase = Server::start(echo("purchase")).await;
    let door = Door::before(&[purchase.address]).await;
    let request = http::Request::post("http://shop.example/api/purchase?x=1").version(http::Version::HTTP_2);
    let answer = crate::grpc::exchange(door.address, request, "{}").await;
    assert!(answer.0.starts_with("purchase: POST http://shop.example/api/purchase?x=1\n"), "{answer:?}");
    door.close().await;
}

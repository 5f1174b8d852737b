//! The edge around a router, in process: refusals in the API's form, the bound on requests in flight, CORS,
//! metrics, the admin door.

#![allow(clippy::unwrap_used, reason = "a test panics where something is not as it should be")]

use std::convert::Infallible;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::response::Response;
use axum::routing::{get, post};
use http::{HeaderMap, Request, StatusCode};
use http_body_util::BodyExt;
use serve::admin::{self, Readiness};
use serve::edge::{EdgeConfig, InvalidOrigin, Protected, measured, protected};
use serve::{ApiError, Id, Json, Page};
use telemetry::{HttpMetrics, Registry, Spans};
use tokio::sync::Notify;
use tower::{Service, ServiceExt};

/// Longer than a refusal may take.
const PATIENCE: Duration = Duration::from_secs(20);

fn request(method: &str, path: &str) -> Request<Body> {
    Request::builder().method(method).uri(path).body(Body::empty()).unwrap()
}

async fn text(response: Response) -> String {
    String::from_utf8(response.into_body().collect().await.unwrap().to_bytes().to_vec()).unwrap()
}

async fn ask<S>(api: &S, request: Request<Body>) -> (StatusCode, HeaderMap, String)
where
    S: Service<Request<Body>, Response = Response, Error = Infallible> + Clone,
{
    let response = api.clone().oneshot(request).await.unwrap();
    (response.status(), response.headers().clone(), text(response).await)
}

fn shop() -> Router {
    Router::new()
        .route("/thing/{id}", get(|Id(id): Id| async move { Json(id) }))
        .route("/things", get(|page: Page| async move { Json([page.offset, page.size]) }))
        .route(
            "/panic",
            post(|| async {
                if true {
                    panic!("secret")
                }
            }),
        )
        .route("/fail", get(|| async { ApiError::internal("secret") }))
        .route("/busy", get(|| async { ApiError::from(db::Error::Full) }))
        .route("/broken", get(|| async { ApiError::from(db::Error::Panicked) }))
}

fn edge(config: EdgeConfig) -> Protected {
    protected(shop(), &config).unwrap()
}

#[tokio::test]
async fn every_refusal_has_the_form_of_the_api() {
    let router = edge(EdgeConfig::default());
    for (method, path, status, body) in [
        ("GET", "/nothing", 404, r#"{"msg":"no such path"}"#),
        ("POST", "/things", 405, r#"{"msg":"method not allowed on this path"}"#),
        (
            "GET",
            "/thing/x",
            400,
            r#"{"msg":"invalid parameter: id: \"x\", expected an integer from 0 to 9007199254740991"}"#,
        ),
        (
            "GET",
            "/thing/9007199254740992",
            400,
            r#"{"msg":"invalid parameter: id: \"9007199254740992\", expected an integer from 0 to 9007199254740991"}"#,
        ),
        (
            "GET",
            "/things?size=0",
            400,
            r#"{"msg":"invalid parameter: size: \"0\", expected an integer from 1 to 500"}"#,
        ),
        ("GET", "/fail", 500, r#"{"msg":"internal error"}"#),
        ("POST", "/panic", 500, r#"{"msg":"internal error"}"#),
        ("GET", "/busy", 503, r#"{"msg":"temporarily unavailable, try again"}"#),
        ("GET", "/broken", 500, r#"{"msg":"internal error"}"#),
        ("GET", "/thing/9007199254740991", 200, "9007199254740991"),
        ("GET", "/things?size=2&offset=1", 200, "[1,2]"),
    ] {
        let (got, headers, text) = ask(&router, request(method, path)).await;
        assert_eq!((got.as_u16(), text.as_str()), (status, body), "{method} {path}");
        assert_eq!(headers["content-type"], "application/json", "{method} {path}");
        assert_eq!(headers["x-content-type-options"], "nosniff", "{method} {path}");
        assert_eq!(headers.contains_key("retry-after"), status == 503, "{method} {path}");
    }
}

#[tokio::test]
async fn a_wrong_method_is_told_the_right_one() {
    let (_, headers, _) = ask(&edge(EdgeConfig::default()), request("DELETE", "/panic")).await;
    assert_eq!(headers["allow"], "POST");
}

#[tokio::test]
async fn requests_beyond_the_bound_are_refused_and_open_streams_do_not_count() {
    let (entered, release) = (Arc::new(Notify::new()), Arc::new(Notify::new()));
    let (e, r) = (entered.clone(), release.clone());
    let router =
        Router::new()
            .route(
                "/held",
                get(|| async move {
                    e.notify_one();
                    r.notified().await;
                }),
            )
            .route(
                "/stream",
                get(|| async {
                    Body::from_stream(futures_util::stream::pending::<
                        Result<axum::body::Bytes, std::io::Error>,
                    >())
                }),
            );
    let config = EdgeConfig { max_in_flight_requests: 1, ..EdgeConfig::default() };
    let router = protected(router, &config).unwrap();

    // The stream stays open to the end of the test.
    let _stream = router.clone().oneshot(request("GET", "/stream")).await.unwrap();
    let held = tokio::spawn(router.clone().oneshot(request("GET", "/held")));
    entered.notified().await;
    let refused = tokio::time::timeout(PATIENCE, ask(&router, request("GET", "/held"))).await;
    let (status, headers, body) = refused.expect("it waits instead of being refused");
    assert_eq!(status, 503);
    assert_eq!(headers["retry-after"], "1");
    assert_eq!(body, r#"{"msg":"too many requests in flight, try again"}"#);
    release.notify_one();
    assert_eq!(held.await.unwrap().unwrap().status(), 200);
    assert_eq!(router.oneshot(request("GET", "/stream")).await.unwrap().status(), 200);
}

#[tokio::test]
async fn cors_is_for_the_origins_on_the_list_only() {
    let config =
        EdgeConfig { cors_allowed_origins: vec!["https://shop.example".to_owned()], ..EdgeConfig::default() };
    let allow = "access-control-allow-origin";
    let from = |origin: &str, method: &str| {
        let mut request = request(method, "/things?size=1");
        request.headers_mut().insert("origin", origin.parse().unwrap());
        request.headers_mut().insert("access-control-request-method", "GET".parse().unwrap());
        request
    };

    let router = edge(config);
    let (status, headers, _) = ask(&router, from("https://shop.example", "GET")).await;
    assert_eq!((status.as_u16(), headers[allow].to_str().unwrap()), (200, "https://shop.example"));
    let (status, headers, _) = ask(&router, from("https://shop.example", "OPTIONS")).await;
    assert_eq!(status, 200);
    assert!(headers["access-control-allow-headers"].to_str().unwrap().contains("idempotency-key"));
    let (_, headers, _) = ask(&router, from("https://evil.example", "GET")).await;
    assert!(!headers.contains_key(allow));

    let (_, headers, _) = ask(&edge(EdgeConfig::default()), from("https://shop.example", "GET")).await;
    assert!(!headers.keys().any(|name| name.as_str().starts_with("access-control")));
}

#[test]
fn what_is_no_origin_is_refused_at_start() {
    for origin in
        ["*", "shop.example", "https://shop.example/", "https://SHOP.example", "https://a@b.example", ""]
    {
        let config = EdgeConfig { cors_allowed_origins: vec![origin.to_owned()], ..EdgeConfig::default() };
        assert_eq!(protected(shop(), &config).unwrap_err(), InvalidOrigin(origin.to_owned()));
    }
}

#[tokio::test]
async fn metrics_are_labelled_by_the_matched_route() {
    let registry = Registry::new();
    let router = protected(
        measured(shop(), HttpMetrics::new(&registry, "product"), Spans::off()),
        &EdgeConfig::default(),
    );
    let router = router.unwrap();
    for path in ["/thing/1", "/thing/2", "/thing/x", "/no/such/path"] {
        ask(&router, request("GET", path)).await;
    }
    let (_, headers, text) =
        ask(&admin::router(registry, Readiness::new()), request("GET", "/metrics")).await;
    assert!(headers["content-type"].to_str().unwrap().starts_with("application/openmetrics-text"));
    let count = "product_http_request_duration_seconds_count";
    assert!(
        text.contains(&format!("{count}{{code=\"200\",handler=\"/thing/{{id}}\",method=\"GET\"}} 2")),
        "{text}"
    );
    assert!(
        text.contains(&format!("{count}{{code=\"400\",handler=\"/thing/{{id}}\",method=\"GET\"}} 1")),
        "{text}"
    );
    assert!(!text.contains("such"), "{text}");
}

#[tokio::test]
async fn readiness_names_what_is_missing() {
    let up = Arc::new(AtomicBool::new(false));
    let seen = up.clone();
    let readiness = Readiness::new().check("db", || Ok(())).check("bus", move || {
        if seen.load(Ordering::SeqCst) { Ok(()) } else { Err("not connected".to_owned()) }
    });
    let router = admin::router(Registry::new(), readiness);
    let (status, _, body) = ask(&router, request("GET", "/readyz")).await;
    assert_eq!((status.as_u16(), body.as_str()), (503, r#"{"msg":"not ready: bus: not connected"}"#));
    assert_eq!(ask(&router, request("GET", "/healthz")).await.0, 200);
    up.store(true, Ordering::SeqCst);
    assert_eq!(ask(&router, request("GET", "/readyz")).await.0, 200);
}

//! The read path: a row from the database's reader threads, and a product through its router, without a socket.

use axum::Router;
use axum::body::Body;
use bus::{Bus, Limits};
use criterion::{Criterion, Throughput};
use futures_util::future::join_all;
use http::{Request, StatusCode};
use http_body_util::BodyExt;
use telemetry::Registry;
use telemetry::metrics::PubsubMetrics;
use tower::ServiceExt;
use wire::time::Clock;

use crate::place::{Folder, runtime};

const TOGETHER: u64 = 64;

pub(crate) fn benches(criterion: &mut Criterion) {
    let runtime = runtime();
    let folder = Folder::new("reads");
    let db = folder.open("product", product::MIGRATIONS);
    let (router, id) = runtime.block_on(async {
        let service = product::start(product::Parts {
            cache: product::ProductCache::new(),
            redis: None,
            db: db.clone(),
            bus: Bus::embedded(Limits::default()),
            clock: Clock::system(),
            write: product::CatalogWrite::Open,
            book: drive::Book::new(),
            metrics: PubsubMetrics::new(&Registry::new(), "product"),
            spans: telemetry::Spans::off(),
            settings: participant::Settings::default(),
        })
        .await
        .expect("a product service");
        let id = create_product(&service.router()).await;
        (service.router(), id)
    });
    let path = format!("/api/product/{id}");

    let mut group = criterion.benchmark_group("reads");
    group.throughput(Throughput::Elements(1));
    group.bench_function("one row of the database", |bencher| {
        bencher.to_async(&runtime).iter(|| async {
            let row = db.read(move |tx| {
                tx.query_opt("SELECT price FROM product WHERE id = ?", &[db::Value::from(id)], |row| {
                    row.get::<i64>(0)
                })
            });
            assert_eq!(row.await, Ok::<_, db::Error>(Some(100)));
        });
    });
    group.bench_function("a product through its router", |bencher| {
        bencher.to_async(&runtime).iter(|| get(&router, &path));
    });
    group.throughput(Throughput::Elements(TOGETHER));
    group.bench_function("64 products at once through their router", |bencher| {
        bencher.to_async(&runtime).iter(|| join_all((0..TOGETHER).map(|_| get(&router, &path))));
    });
    group.finish();
    runtime.block_on(db.close());
}

async fn get(router: &Router, path: &str) {
    let request = Request::get(path).body(Body::empty()).expect("a request");
    let answer = router.clone().oneshot(request).await.expect("a router always answers");
    assert_eq!(answer.status(), StatusCode::OK);
    answer.into_body().collect().await.expect("a whole body");
}

/// Adds a product of which there is more than a bench can sell; returns its id.
pub(crate) async fn create_product(router: &Router) -> u64 {
    let product = r#"{"name":"Product number 1234","description":"A product of a measurement","brand_name":"Sagaline",
        "price":100,"inventory":1000000000}"#;
    let request = Request::post("/api/product").body(Body::from(product)).expect("a request");
    let answer = router.clone().oneshot(request).await.expect("a router always answers");
    assert_eq!(answer.status(), StatusCode::CREATED);
    let body = answer.into_body().collect().await.expect("a whole body").to_bytes();
    let body: serde_json::Value = serde_json::from_slice(&body).expect("an id");
    body["id"].as_u64().expect("an id")
}

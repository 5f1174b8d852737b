//! The accept path: from the request at the router to the 201, when the purchase is on disk. The sagas go no further:
//! their first commands are taken from the bus and dropped.

use axum::Router;
use axum::body::Body;
use bus::{Bus, Limits};
use criterion::{BenchmarkId, Criterion, Throughput};
use drive::Book;
use futures_util::future::join_all;
use http::{Request, StatusCode};
use serve::random::Random;
use shop::calls::CheckProducts;
use shop::purchase::{INVENTORY_COMMANDS, PURCHASE_PROGRESS, PurchaseStep, purchase_saga};
use telemetry::Registry;
use telemetry::metrics::PubsubMetrics;
use tokio_util::sync::CancellationToken;
use tower::ServiceExt;
use wire::time::Clock;

use crate::place::{Folder, runtime};
use crate::tokens::{Issued, issue};

/// More purchases than a run of this bench makes: none of them ends.
const UNDER_WAY: usize = 100_000_000;

pub(crate) fn benches(criterion: &mut Criterion) {
    let runtime = runtime();
    let folder = Folder::new("accept");
    let db = folder.open("purchase", purchase::MIGRATIONS);
    let bus = Bus::embedded(Limits::default());
    let stop = CancellationToken::new();
    let (router, authorization) = runtime.block_on(async {
        let Issued { token, verifier, .. } = issue(&folder).await;
        let registry = Registry::new();
        let config = purchase::Config {
            max_in_flight: UNDER_WAY,
            max_open_per_customer: UNDER_WAY,
            // Nothing is driven again while it is measured.
            retry_first: std::time::Duration::from_secs(3_600),
            retry_max: std::time::Duration::from_secs(3_600),
            ..purchase::Config::default()
        };
        let (service, tasks) = purchase::start(purchase::Parts {
            feed: purchase::Feed::None,
            config,
            db: db.clone(),
            bus: bus.clone(),
            book: Book::new().with(purchase_saga(), PurchaseStep::commands, PURCHASE_PROGRESS),
            clock: Clock::system(),
            random: Random::secure(),
            verifier,
            products: CheckProducts::new(async |ids: Vec<u64>| Ok(vec![Some(100); ids.len()])),
            registry: registry.clone(),
            metrics: PubsubMetrics::new(&registry, "purchase"),
            spans: telemetry::Spans::off(),
            stop_streams: stop.clone(),
            stop: stop.clone(),
        })
        .await
        .expect("a purchase service");
        for (_, task) in tasks {
            tokio::spawn(task);
        }
        tokio::spawn(drop_commands(bus.clone()));
        (service.router(), format!("Bearer {token}"))
    });

    let mut group = criterion.benchmark_group("accept, requests at once");
    for requests in [1, 16, 64, 256, 1024] {
        group.throughput(Throughput::Elements(requests));
        group.bench_function(BenchmarkId::from_parameter(requests), |bencher| {
            bencher
                .to_async(&runtime)
                .iter(|| join_all((0..requests).map(|product| buy(&router, &authorization, product))));
        });
    }
    group.finish();
    drop(router);
    runtime.block_on(async {
        stop.cancel();
        bus.close().await;
        db.close().await;
    });
}

async fn drop_commands(bus: Bus) {
    let mut commands = bus.subscribe(INVENTORY_COMMANDS);
    while let Ok(batch) = commands.next(1024).await {
        // An error: the bus is gone, and the next look says so.
        let _ = batch.ack_all().await;
    }
}

async fn buy(router: &Router, authorization: &str, product: u64) {
    let cart = format!(
        r#"{{"purchase_items":[{{"product_id":{product},"amount":1}}],"payment":{{"currency_code":"NT"}}}}"#
    );
    let request = Request::post("/api/purchase")
        .header("authorization", authorization)
        .body(Body::from(cart))
        .expect("a request");
    let answer = router.clone().oneshot(request).await.expect("a router always answers");
    assert_eq!(answer.status(), StatusCode::CREATED);
}

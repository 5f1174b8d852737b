//! Access tokens, made by the account service itself: verified for the first time, and again.

use std::hint::black_box;
use std::net::SocketAddr;

use axum::body::Body;
use axum::extract::ConnectInfo;
use criterion::{BatchSize, Criterion, Throughput};
use http::{Request, StatusCode};
use http_body_util::BodyExt;
use serve::auth::{KeySet, Realm, Verifier};
use serve::random::Random;
use telemetry::Registry;
use tower::ServiceExt;
use wire::time::Clock;

use crate::place::{Folder, runtime};

pub(crate) fn benches(criterion: &mut Criterion) {
    let folder = Folder::new("tokens");
    let Issued { token, keys, .. } = runtime().block_on(issue(&folder));
    let mut group = criterion.benchmark_group("tokens");
    group.throughput(Throughput::Elements(1));
    group.bench_function("verify, first time", |bencher| {
        bencher.iter_batched_ref(
            // One that remembers nothing yet.
            || Verifier::new(&keys, &Realm::default(), Clock::system()),
            |verifier| verifier.verify(black_box(&token)).expect("a token of this hour"),
            BatchSize::LargeInput,
        );
    });
    group.bench_function("verify, remembered", |bencher| {
        let verifier = Verifier::new(&keys, &Realm::default(), Clock::system());
        bencher.iter(|| verifier.verify(black_box(&token)).expect("a token of this hour"));
    });
    group.finish();
}

/// A customer's access token, and what it is verified with.
pub(crate) struct Issued {
    pub(crate) token: String,
    pub(crate) keys: KeySet,
    pub(crate) verifier: Verifier,
}

/// Signs a customer up at an account service in this folder.
pub(crate) async fn issue(folder: &Folder) -> Issued {
    let account = account::start(account::Parts {
        redis: None,
        db: folder.open("account", account::MIGRATIONS),
        clock: Clock::system(),
        random: Random::secure(),
        registry: Registry::new(),
        key_dir: folder.path().join("keys"),
        realm: Realm::default(),
        config: account::Config::default(),
    })
    .await
    .expect("an account service");
    let person = r#"{"password":"abcd5432","firstname":"a","lastname":"b","email":"a@example.com","address":"c",
        "phone_number":"0912345678"}"#;
    let mut request = Request::post("/api/account/auth/signup").body(Body::from(person)).expect("a request");
    request.extensions_mut().insert(ConnectInfo(SocketAddr::from(([127, 0, 0, 1], 1))));
    let answer = account.router().oneshot(request).await.expect("a router always answers");
    assert_eq!(answer.status(), StatusCode::CREATED);
    let body = answer.into_body().collect().await.expect("a whole body").to_bytes();
    let body: serde_json::Value = serde_json::from_slice(&body).expect("a token pair");
    let token = body["access_token"].as_str().expect("a token pair").to_owned();
    Issued { token, keys: account.keys().clone(), verifier: account.verifier() }
}

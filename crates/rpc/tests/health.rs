//! Health and reflection, asked of the routes themselves.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use serve::admin::Readiness;
use tokio_util::sync::CancellationToken;
use tonic::Code;
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_client::HealthClient;

fn of(service: &str) -> HealthCheckRequest {
    HealthCheckRequest { service: service.to_owned() }
}

#[tokio::test(start_paused = true)]
async fn a_process_serves_while_it_is_ready_and_says_when_it_stops() {
    let (up, stop) = (Arc::new(AtomicBool::new(true)), CancellationToken::new());
    let database = up.clone();
    let readiness = Readiness::new().check("database", move || {
        if database.load(Ordering::SeqCst) { Ok(()) } else { Err("no answer".to_owned()) }
    });
    let mut health = HealthClient::new(rpc::health(readiness, stop.clone()));
    let mut watched = health.watch(of("")).await.expect("a stream").into_inner();
    let mut stranger = health.watch(of("shop.Unknown")).await.expect("a stream").into_inner();

    for (ready, status) in
        [(true, ServingStatus::Serving), (false, ServingStatus::NotServing), (true, ServingStatus::Serving)]
    {
        up.store(ready, Ordering::SeqCst);
        assert_eq!(health.check(of("")).await.expect("a status").into_inner().status(), status);
        assert_eq!(watched.message().await.expect("news").map(|news| news.status()), Some(status));
    }
    stop.cancel();
    let told = health.check(of("")).await.expect("a status").into_inner().status();
    assert_eq!(told, ServingStatus::NotServing);
    let told = watched.message().await.expect("news").map(|news| news.status());
    assert_eq!(told, Some(ServingStatus::NotServing));
    assert_eq!(watched.message().await.expect("an end"), None, "nobody waits for a process that is gone");

    let refused = health.check(of("shop.Unknown")).await.expect_err("there is none");
    assert_eq!(
        (refused.code(), refused.message()),
        (Code::NotFound, r#"no service "shop.Unknown" is known here"#)
    );
    let told = stranger.message().await.expect("news").map(|news| news.status());
    assert_eq!(told, Some(ServingStatus::ServiceUnknown));
    assert_eq!(stranger.message().await.expect("an end"), None);
}

#[tokio::test(start_paused = true)]
async fn so_many_may_watch_and_one_who_leaves_makes_room() {
    let mut health = HealthClient::new(rpc::health(Readiness::new(), CancellationToken::new()));
    let mut watching = Vec::new();
    for _ in 0..rpc::MAX_WATCHERS {
        watching.push(health.watch(of("")).await.expect("a stream"));
    }
    let refused = health.watch(of("")).await.expect_err("one too many");
    assert_eq!(refused.code(), Code::ResourceExhausted, "{refused}");
    assert_eq!(
        health.check(of("")).await.expect("a status").into_inner().status(),
        ServingStatus::Serving,
        "asking is free"
    );
    drop(watching.pop());
    health.watch(of("")).await.expect("a stream");
}

/// What the services are called, as asked by this version of the protocol.
macro_rules! services {
    ($version:ident) => {{
        use tonic_reflection::pb::$version::server_reflection_client::ServerReflectionClient;
        use tonic_reflection::pb::$version::server_reflection_request::MessageRequest;
        use tonic_reflection::pb::$version::server_reflection_response::MessageResponse;
        let mut client = ServerReflectionClient::new(rpc::reflection());
        let question = tonic_reflection::pb::$version::ServerReflectionRequest {
            host: String::new(),
            message_request: Some(MessageRequest::ListServices("*".to_owned())),
        };
        let answers = client.server_reflection_info(tokio_stream::once(question)).await.expect("a stream");
        let answer = answers.into_inner().message().await.expect("an answer").expect("one");
        let Some(MessageResponse::ListServicesResponse(listed)) = answer.message_response else {
            panic!("{answer:?}");
        };
        let mut names: Vec<String> = listed.service.into_iter().map(|service| service.name).collect();
        names.sort();
        names
    }};
}

#[tokio::test]
async fn old_and_new_clients_are_told_what_is_offered() {
    let offered = [
        "auth.AuthService",
        "grpc.health.v1.Health",
        "grpc.reflection.v1.ServerReflection",
        "grpc.reflection.v1alpha.ServerReflection",
        "product.ProductService",
    ];
    assert_eq!(services!(v1), offered);
    assert_eq!(services!(v1alpha), offered);
}

//! Replicas that die, come back, stall, stop and lie.

use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use axum::Router;
use axum::http::StatusCode as Status;
use axum::routing::any;
use gateway::Upstreams;
use http::Method;

use crate::fixture::{Deed, Door, Raw, Server, ask, echo, mortal, nowhere, places, until, within};

#[tokio::test]
async fn a_customer_stays_with_its_replica_while_that_lives() {
    let (a, b) = tokio::join!(Server::start(echo("a")), Server::start(echo("b")));
    let door = Door::before(&[a.address, b.address]).await;
    until("both are found", async || {
        let mut seen = HashSet::new();
        for n in 0..40 {
            seen.insert(door.get("/api/purchases", &format!("bearer {n}")).await.body[..1].to_owned());
        }
        seen.len() == 2
    })
    .await;
    let who = async || {
        let mut all = Vec::new();
        for n in 0..40 {
            all.push(door.get("/api/purchases", &format!("bearer {n}")).await.body[..1].to_owned());
        }
        all
    };
    let before = who().await;
    assert_eq!(who().await, before);
    // Who shows no token is known by its address, whatever connection it comes by.
    let mut nameless = HashSet::new();
    for _ in 0..10 {
        let answer = ask(door.address, Method::GET, "/api/purchases", &[], "").await;
        nameless.insert(answer.body[..1].to_owned());
    }
    assert_eq!(nameless.len(), 1);

    let address = b.address;
    b.stop().await;
    assert!(who().await.iter().all(|replica| replica == "a"));
    let b = mortal(address, echo("b")).await;
    until("its customers are back", async || who().await == before).await;
    b.stop().await;
    door.close().await;
}

#[tokio::test]
async fn nobody_there_is_503_until_somebody_is() {
    let replica = mortal("127.0.0.1:0".parse().unwrap(), echo("purchase")).await;
    let address = replica.address;
    let door = Door::before(&[address]).await;
    door.lacks(4).await;
    replica.stop().await;
    for path in ["/api/purchases", "/api/order/7"] {
        let answer = door.get(path, "bearer x").await;
        assert_eq!((answer.status.as_u16(), &answer.headers["retry-after"]), (503, &"1".parse().unwrap()));
        assert!(answer.body.contains("service is not available, try again"), "{answer:?}");
    }
    assert_eq!(door.post("/api/purchase", &[]).await.status, 503);
    assert_eq!(
        door.gateway.ready().unwrap_err(),
        "account: none of 0 replicas answers; product: none of 0 replicas answers; \
         order: none of 0 replicas answers; payment: none of 0 replicas answers; \
         purchase: none of 1 replicas answers"
    );
    let _replica = mortal(address, echo("purchase")).await;
    // The very next request finds it.
    assert_eq!(door.post("/api/purchase", &[]).await.status, 200);
    door.lacks(4).await;
    door.close().await;
}

#[tokio::test]
async fn replicas_die_and_return_and_nobody_notices_who_may_ask_again() {
    let mut replicas = Vec::new();
    for name in ["a", "b", "c"] {
        replicas.push(mortal("127.0.0.1:0".parse().unwrap(), echo(name)).await);
    }
    let addresses: Vec<_> = replicas.iter().map(|replica| replica.address).collect();
    let door = Arc::new(Door::before(&addresses).await);
    door.lacks(4).await;
    let (answered, stop) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicBool::new(false)));
    let customers: Vec<_> = (0..8)
        .map(|n| {
            let (door, answered, stop) = (door.clone(), answered.clone(), stop.clone());
            tokio::spawn(async move {
                let token = format!("bearer {n}");
                let mut asked = 0;
                while !stop.load(Ordering::SeqCst) {
                    asked += 1;
                    let answer = if asked % 2 == 0 {
                        door.get("/api/purchases", &token).await
                    } else {
                        let key = format!("{n}-{asked}");
                        door.post("/api/purchase", &[("authorization", &token), ("idempotency-key", &key)])
                            .await
                    };
                    assert_eq!(answer.status, 200, "{answer:?}");
                    answered.fetch_add(1, Ordering::SeqCst);
                }
            })
        })
        .collect();
    let further = async |n: usize| {
        let goal = answered.load(Ordering::SeqCst) + n;
        until("requests are answered", async || answered.load(Ordering::SeqCst) >= goal).await;
    };
    for round in 0..12 {
        let index = round % 3;
        further(30).await;
        replicas.remove(index).stop().await;
        further(30).await;
        replicas.insert(index, mortal(addresses[index], echo("again")).await);
    }
    further(30).await;
    stop.store(true, Ordering::SeqCst);
    for customer in customers {
        within(customer).await.unwrap();
    }
}

#[tokio::test]
async fn what_may_have_been_handled_is_not_sent_again_without_a_key() {
    let (a, b) = tokio::join!(Raw::start(Deed::Break), Raw::start(Deed::Break));
    let door = Door::before(&[a.address, b.address]).await;
    door.lacks(4).await;
    let sent = || a.requests() + b.requests();
    let answer = door.post("/api/purchase", &[]).await;
    assert_eq!((answer.status.as_u16(), sent()), (502, 1), "{answer:?}");
    assert!(answer.body.contains("whether the request was handled is not known"), "{answer:?}");
    // Another path's key means nothing to us, and an empty body is no excuse.
    let answer = ask(door.address, Method::PUT, "/api/purchase/7", &[("idempotency-key", "k")], "").await;
    assert_eq!((answer.status.as_u16(), sent()), (502, 2), "{answer:?}");
    let answer = door.post("/api/purchase", &[("idempotency-key", "k")]).await;
    assert_eq!((answer.status.as_u16(), sent()), (503, 6), "{answer:?}");
    let answer = door.get("/api/purchases", "bearer x").await;
    assert_eq!((answer.status.as_u16(), sent()), (503, 10), "{answer:?}");
    door.close().await;
}

#[tokio::test]
async fn a_stalled_replica_costs_its_own_customers_one_wait() {
    let (stalled, good) = tokio::join!(Raw::start(Deed::Hang), Server::start(echo("good")));
    let upstreams = Upstreams { purchase: places(&[stalled.address, good.address]), ..nowhere() };
    let door = Arc::new(Door::open_with(upstreams, Duration::from_millis(300)).await);
    until("both live", async || {
        let mut seen = HashSet::new();
        for n in 0..10 {
            let token = format!("bearer {n}");
            let door = door.clone();
            seen.insert(
                tokio::spawn(async move { door.get("/api/purchases", &token).await.status }).await.unwrap(),
            );
        }
        seen.contains(&Status::GATEWAY_TIMEOUT)
    })
    .await;
    // It still tells that it lives, so its customers try it again; the others never wait for it.
    let mut asked = Vec::new();
    for n in 0..40 {
        let door = door.clone();
        asked.push(tokio::spawn(async move { door.get("/api/purchases", &format!("bearer {n}")).await }));
    }
    let mut good = 0;
    for answer in asked {
        let answer = within(answer).await.unwrap();
        match answer.status.as_u16() {
            200 => good += 1,
            504 => assert!(answer.body.contains("did not answer in time"), "{answer:?}"),
            status => panic!("{status}"),
        }
    }
    assert!(good >= 10, "{good}");
}

#[tokio::test]
async fn another_replica_is_asked_when_one_has_no_time() {
    let busy = Router::new().route("/{*path}", any(|| async { (Status::SERVICE_UNAVAILABLE, "stopping") }));
    let (busy, good) = tokio::join!(Server::start(busy), Server::start(echo("good")));
    let door = Door::before(&[busy.address, good.address]).await;
    door.lacks(4).await;
    until("both are found", async || {
        door.post("/api/purchase", &[("authorization", "bearer x")]).await;
        let mut refused = 0;
        for n in 0..20 {
            let token = format!("bearer {n}");
            refused +=
                usize::from(door.post("/api/purchase", &[("authorization", &token)]).await.status == 503);
        }
        refused > 0
    })
    .await;
    for n in 0..20 {
        let token = format!("bearer {n}");
        assert_eq!(door.get("/api/purchases", &token).await.status, 200);
        let headers = [("authorization", token.as_str()), ("idempotency-key", "k")];
        assert_eq!(door.post("/api/purchase", &headers).await.status, 200);
    }
    good.stop().await;
    // Its own words, when there is nobody else.
    assert_eq!(door.get("/api/purchases", "bearer x").await.body, "stopping");
    door.close().await;
}

#[tokio::test]
async fn a_name_is_looked_up() {
    let replica = Server::start(echo("purchase")).await;
    let purchase = format!("localhost:{}", replica.address.port()).parse().unwrap();
    let door = Door::open(Upstreams { purchase, ..nowhere() }).await;
    door.lacks(4).await;
    assert_eq!(door.get("/api/purchases", "bearer x").await.status, 200);
    door.close().await;
}

//! Replicas on real sockets: lost, back, hanging, behind names.

#![allow(clippy::unwrap_used, reason = "a test panics where something is not as it should be")]

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::time::Duration;

use peers::{Choice, Peers};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;
use tokio::task::JoinHandle;
use tokio_util::sync::{CancellationToken, DropGuard};

/// Longer than any of these tests may take; a wait that reaches it has failed.
const PATIENCE: Duration = Duration::from_secs(20);

async fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let wait = async {
        while !holds() {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    };
    tokio::time::timeout(PATIENCE, wait).await.unwrap_or_else(|_| panic!("never: {what}"));
}

async fn free_address() -> SocketAddr {
    TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap()
}

/// Answers whatever it is sent, or only takes connections.
async fn replica(address: SocketAddr, answers: bool) -> JoinHandle<()> {
    let listener = TcpListener::bind(address).await.unwrap();
    tokio::spawn(async move {
        let mut held = Vec::new();
        loop {
            let (mut stream, _) = listener.accept().await.unwrap();
            if answers {
                let _ = stream.read(&mut [0; 1024]).await;
                let _ = stream.write_all(b"HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\n\r\n").await;
            } else {
                held.push(stream);
            }
        }
    })
}

fn start(list: &str) -> (Peers<()>, DropGuard) {
    let peers = Peers::new("shop", list.parse().unwrap(), |_| ());
    let stop = CancellationToken::new();
    tokio::spawn(peers.clone().run(stop.clone()));
    (peers, stop.drop_guard())
}

fn picked(peers: &Peers<()>) -> BTreeSet<SocketAddr> {
    let pick = |_| peers.pick(Choice::LeastBusy, &[]).map(|picked| picked.address());
    (0..100).filter_map(pick).collect()
}

#[tokio::test]
async fn one_that_is_lost_is_left_out_until_it_answers_again() {
    let (a, b) = (free_address().await, free_address().await);
    let (_a, gone) = (replica(a, true).await, replica(b, true).await);
    let (peers, _stop) = start(&format!("{a},{b}"));
    assert!(!peers.any_seen(), "nobody was asked yet");
    until("one has answered", || peers.any_seen()).await;
    assert_eq!(picked(&peers), BTreeSet::from([a, b]));
    gone.abort();
    let _ = gone.await;
    peers.pick(Choice::LeastBusy, &[a]).unwrap().unreachable();
    assert_eq!(picked(&peers), BTreeSet::from([a]));
    assert!(peers.pick(Choice::LeastBusy, &[a]).is_none(), "a tried one is not picked again");
    assert_eq!(peers.pick_lost(Choice::LeastBusy, &[]).unwrap().address(), b);
    assert!(peers.pick_lost(Choice::LeastBusy, &[b]).is_none());

    // One that takes connections and hangs is not back.
    let hanging = replica(b, false).await;
    let mut tries = 0;
    until("it was asked whether it is back", || {
        tries += 1;
        tries > 300
    })
    .await;
    assert_eq!(picked(&peers), BTreeSet::from([a]));
    hanging.abort();
    let _ = hanging.await;
    let _b = replica(b, true).await;
    until("both are picked", || picked(&peers) == BTreeSet::from([a, b])).await;
}

#[tokio::test]
async fn with_all_of_them_lost_there_is_none() {
    let a = free_address().await;
    let (peers, _stop) = start(&a.to_string());
    until("it was asked in vain", || !peers.any_up()).await;
    assert!(picked(&peers).is_empty() && !peers.any_seen());
    // Who asks it all the same may find it before it is asked again.
    let lost = peers.pick_lost(Choice::LeastBusy, &[]).unwrap();
    let _a = replica(a, true).await;
    lost.reached();
    assert!(peers.any_up() && peers.any_seen());
    lost.unreachable();
    until("it is back", || peers.any_up()).await;
}

#[tokio::test]
async fn one_that_stops_answering_is_found_out_without_anybody_who_needs_it() {
    let a = free_address().await;
    let stopped = replica(a, true).await;
    let (peers, _stop) = start(&a.to_string());
    until("it has answered", || peers.any_seen()).await;
    stopped.abort();
    let _ = stopped.await;
    let _hanging = replica(a, false).await;
    until("it is lost", || !peers.any_up()).await;
}

#[tokio::test]
async fn the_same_customer_gets_the_same_replica_while_it_lives() {
    let (a, b) = (free_address().await, free_address().await);
    let (_a, _b) = (replica(a, true).await, replica(b, true).await);
    let (peers, _stop) = start(&format!("{a},{b}"));
    let of = |customer: u64| peers.pick(Choice::same_for(customer), &[]).unwrap();
    let first: Vec<SocketAddr> = (0..50).map(|customer| of(customer).address()).collect();
    assert_eq!(first.iter().collect::<BTreeSet<_>>().len(), 2);
    assert_eq!((0..50).map(|customer| of(customer).address()).collect::<Vec<_>>(), first);
    let lost = of(7);
    lost.unreachable();
    for (customer, before) in (0..).zip(first) {
        let now = of(customer).address();
        assert!(now != lost.address() && (now == before || before == lost.address()));
    }
}

#[tokio::test]
async fn a_name_is_all_its_addresses_and_one_that_is_unknown_spoils_nothing() {
    let (by_name, _stop) = start("localhost:4711");
    assert!(!by_name.any_up(), "it is not resolved yet");
    until("the name is resolved", || !by_name.addresses().is_empty()).await;
    assert!(by_name.addresses().contains(&"127.0.0.1:4711".parse().unwrap()));

    let (mixed, _stop) = start("127.0.0.1:4712,no-such-host.invalid:80");
    let known = vec!["127.0.0.1:4712".parse::<SocketAddr>().unwrap()];
    assert_eq!(mixed.addresses(), known);
    until("it was resolved in vain", || mixed.addresses() == known).await;
}

#[tokio::test]
async fn busy_ones_are_spared() {
    let (a, b) = (free_address().await, free_address().await);
    let (_a, _b) = (replica(a, true).await, replica(b, true).await);
    let (peers, _stop) = start(&format!("{a},{b}"));
    let held: Vec<_> = (0..5).map(|_| peers.pick(Choice::LeastBusy, &[b]).unwrap()).collect();
    let next: Vec<_> = (0..5).map(|_| peers.pick(Choice::LeastBusy, &[]).unwrap()).collect();
    assert!(next.iter().all(|picked| picked.address() == b));
    drop((held, next));
    assert_eq!(picked(&peers), BTreeSet::from([a, b]));
}

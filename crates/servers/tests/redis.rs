//! A Redis and a Redis Cluster start, answer, are killed, fail over, and come back.

#![allow(clippy::unwrap_used, reason = "what fails here fails the test")]

use std::time::{Duration, Instant};

use servers::{Error, Redis, RedisCluster, Reply, shared};

/// How long a replica may take to follow.
const LIMIT: Duration = Duration::from_secs(30);

fn get(node: &Redis, key: &str) -> Reply {
    node.call(&["GET", key]).unwrap()
}

#[test]
fn a_single_one_comes_back_empty() {
    let redis = Redis::start().unwrap();
    redis.call(&["SET", "key", "value"]).unwrap();
    assert_eq!(get(&redis, "key"), Reply::Text("value".into()));
    redis.kill().unwrap();
    assert!(matches!(redis.call(&["PING"]), Err(Error::Io { .. })));
    redis.restart().unwrap();
    assert_eq!(get(&redis, "key"), Reply::Nil);

    redis.call(&["SET", "key", "value"]).unwrap();
    redis.flush_all().unwrap();
    assert_eq!(get(&redis, "key"), Reply::Nil);
    redis.pause().unwrap();
    redis.resume().unwrap();
    redis.stop().unwrap();
    redis.restart().unwrap();
    assert!(matches!(redis.call(&["NONSENSE"]), Err(Error::Refused { .. })));
}

#[test]
fn a_replica_takes_over_from_a_primary_that_dies() {
    let cluster = RedisCluster::start().unwrap();
    assert_eq!(cluster.nodes().len(), 6);
    assert_eq!(cluster.primaries().unwrap().len(), 3);
    let primary = cluster.primary_of("key").unwrap();
    primary.call(&["SET", "key", "value"]).unwrap();
    // Its replica has it. (WAIT is for what the same connection has written.)
    let others = || cluster.nodes().iter().filter(|node| node.url() != primary.url());
    let deadline = Instant::now() + LIMIT;
    while !others().any(|node| node.call(&["DBSIZE"]).unwrap() == Reply::Number(1)) {
        assert!(Instant::now() < deadline, "nobody replicates it");
        std::thread::park_timeout(Duration::from_millis(10));
    }

    primary.kill().unwrap();
    cluster.wait_until_ready().unwrap();
    let successor = cluster.primary_of("key").unwrap();
    assert_ne!(successor.url(), primary.url());
    assert_eq!(get(successor, "key"), Reply::Text("value".into()));

    cluster.restart().unwrap();
    assert_eq!(cluster.primaries().unwrap().len(), 3);
    cluster.flush_all().unwrap();
    assert_eq!(get(successor, "key"), Reply::Nil);

    cluster.kill().unwrap();
    assert!(matches!(cluster.wait_until_ready(), Err(Error::NotRunning { .. })));
    cluster.restart().unwrap();
    let primary = cluster.primary_of("key").unwrap();
    assert_eq!(primary.call(&["SET", "key", "again"]).unwrap(), Reply::Text("OK".into()));
}

#[test]
fn the_shared_ones_answer() {
    assert!(!shared::redis_cluster().is_empty());
    assert!(shared::redis().starts_with("redis://127.0.0.1:"));
    assert_eq!(shared::redis(), shared::redis());
}

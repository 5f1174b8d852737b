//! A cluster of NATS starts, keeps what it is told to, loses a node, loses everything, and comes back.

#![allow(clippy::unwrap_used, reason = "what fails here fails the test")]

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::time::Duration;

use servers::{Error, Nats, NatsNode, shared};

const STREAM: &str = r#"{"name":"kept","subjects":["kept.>"],"num_replicas":3,"storage":"file"}"#;

/// Asks JetStream's API by hand; None while nobody answers.
fn ask(node: &NatsNode, subject: &str, body: &str) -> Option<String> {
    let mut stream = TcpStream::connect(node.socket_addr()).ok()?;
    stream.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
    let connect = r#"CONNECT {"verbose":false,"headers":true,"no_responders":true}"#;
    let length = body.len();
    write!(stream, "{connect}\r\nSUB answer 1\r\nPUB {subject} answer {length}\r\n{body}\r\n").ok()?;
    let mut lines = BufReader::new(stream);
    loop {
        let mut line = String::new();
        lines.read_line(&mut line).ok().filter(|count| *count > 0)?;
        if let Some(message) = line.strip_prefix("MSG ") {
            let length: usize = message.split_whitespace().last()?.parse().ok()?;
            let mut body = vec![0; length];
            lines.read_exact(&mut body).ok()?;
            return String::from_utf8(body).ok();
        }
        if line.starts_with("HMSG ") {
            return None;
        }
    }
}

/// How many messages the stream holds, once somebody knows.
fn held(node: &NatsNode) -> u64 {
    loop {
        let info = ask(node, "$JS.API.STREAM.INFO.kept", "").unwrap_or_default();
        if let Some((_, rest)) = info.split_once("\"messages\":") {
            return rest.split(',').next().unwrap().parse().unwrap();
        }
        assert!(!info.contains("stream not found"), "{info}");
    }
}

#[test]
fn a_cluster_keeps_its_messages_when_a_node_dies_and_loses_them_with_its_stores() {
    let nats = Nats::start(3).unwrap();
    let [first, second, _] = nats.nodes() else { panic!("three were started") };
    let created = ask(first, "$JS.API.STREAM.CREATE.kept", STREAM).unwrap();
    assert!(created.contains("\"num_replicas\":3"), "{created}");
    assert!(ask(first, "kept.one", "hello").unwrap().contains("\"seq\":1"));

    let leader = nats.leader().unwrap();
    leader.kill().unwrap();
    assert!(!leader.is_running());
    let survivor = nats.nodes().iter().find(|node| node.is_running()).unwrap();
    assert_eq!(held(survivor), 1);
    leader.restart().unwrap();
    nats.wait_until_ready().unwrap();
    assert_eq!(held(leader), 1);

    nats.kill().unwrap();
    nats.restart().unwrap();
    assert_eq!(held(second), 1);

    assert!(matches!(second.wipe(), Err(Error::Running { .. })));
    nats.kill().unwrap();
    nats.wipe().unwrap();
    nats.restart().unwrap();
    let info = ask(first, "$JS.API.STREAM.INFO.kept", "").unwrap();
    assert!(info.contains("stream not found"), "{info}");
}

#[test]
fn a_single_one_is_ready_without_a_cluster_and_may_be_told_more() {
    let nats = Nats::start_with(1, "max_payload: 2MB").unwrap();
    let [node] = nats.nodes() else { panic!("one was started") };
    let mut info = String::new();
    BufReader::new(TcpStream::connect(node.socket_addr()).unwrap()).read_line(&mut info).unwrap();
    assert!(info.contains("\"max_payload\":2097152"), "{info}");
    assert!(nats.leader().is_none());
    node.pause().unwrap();
    node.resume().unwrap();
    assert!(ask(node, "$JS.API.INFO", "").unwrap().contains("\"streams\":0"));
    node.stop().unwrap();
    node.restart().unwrap();
    nats.wait_until_ready().unwrap();
}

#[test]
fn the_shared_ones_have_addresses() {
    let urls = shared::nats();
    assert!(!urls.is_empty());
    assert!(urls.iter().all(|url| url.starts_with("nats://")), "{urls:?}");
}

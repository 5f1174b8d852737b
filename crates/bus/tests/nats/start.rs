//! How a bus starts, and why it does not.

use std::path::PathBuf;

use bus::nats::{Login, StartError, Storage, Tls};
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};
use servers::Nats;

use super::*;

async fn refused(settings: Settings, limits: Limits) -> StartError {
    Bus::nats(settings, limits, &[WORK]).await.expect_err("it cannot work")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn servers_that_are_not_there_are_named_after_a_while() {
    let settings = Settings {
        start_timeout: QUIET,
        ..Settings::from_urls("nats://somebody:secret@127.0.0.1:1").unwrap()
    };
    let refused = refused(settings, LIMITS).await;
    let StartError::Unreachable { servers, why, .. } = &refused else { panic!("{refused}") };
    assert_eq!(servers, &["127.0.0.1:1"]);
    assert!(why.contains("refused"), "{why}");
    assert!(!refused.to_string().contains("secret"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_login_is_needed_where_the_servers_ask_for_one() {
    let nats = Nats::start_with(1, r#"authorization { user: "saga", password: "s3cr3t/" }"#).unwrap();
    let settings = settings(&nats.urls());
    let locked_out = Settings { start_timeout: QUIET, ..settings.clone() };
    let why = refused(locked_out, LIMITS).await.to_string();
    assert!(why.contains("authorization"), "{why}");

    let address = nats.nodes()[0].socket_addr();
    let known = Settings::from_urls(&format!("nats://saga:s3cr3t%2F@{address}")).unwrap();
    let bus = open(&known).await;
    bus.publish(WORK, frame([1])).await.unwrap();
    finish(&mut bus.subscribe(WORK), [1]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_token_is_a_login() {
    let nats = Nats::start_with(1, r#"authorization { token: "t0k3n" }"#).unwrap();
    let settings = Settings { login: Login::Token("t0k3n".to_owned()), ..settings(&nats.urls()) };
    let bus = open(&settings).await;
    bus.publish(WORK, frame([1])).await.unwrap();
}

/// An authority, and a server's certificate and key, as files.
fn certificates(folder: &std::path::Path) -> [PathBuf; 3] {
    let authority_key = KeyPair::generate().unwrap();
    let mut authority = CertificateParams::new(Vec::new()).unwrap();
    authority.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let authority = CertifiedIssuer::self_signed(authority, authority_key).unwrap();
    let key = KeyPair::generate().unwrap();
    let server = CertificateParams::new(vec!["127.0.0.1".to_owned()]).unwrap();
    let server = server.signed_by(&key, &authority).unwrap();
    let files =
        [("authority.pem", authority.pem()), ("server.pem", server.pem()), ("key.pem", key.serialize_pem())];
    std::fs::create_dir_all(folder).unwrap();
    files.map(|(name, text)| {
        let path = folder.join(name);
        std::fs::write(&path, text).unwrap();
        path
    })
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn connections_are_protected_where_it_is_asked_for() {
    let folder = std::env::temp_dir().join(servers::unique_name());
    let [authority, certificate, key] = certificates(&folder);
    let tls = format!("tls {{ cert_file: {certificate:?}, key_file: {key:?} }}");
    let nats = Nats::start_with(1, &tls).unwrap();
    let address = nats.nodes()[0].socket_addr();
    let settings = Settings::from_urls(&format!("tls://{address}")).unwrap();
    assert_eq!(settings.tls, Some(Tls::default()));

    let stranger = Settings { start_timeout: QUIET, ..settings.clone() };
    let why = refused(stranger, LIMITS).await.to_string();
    assert!(why.contains("certificate"), "{why}");

    let tls = Tls { authorities: Some(authority), identity: None };
    let bus = open(&Settings { tls: Some(tls), ..settings }).await;
    bus.publish(WORK, frame([1])).await.unwrap();
    finish(&mut bus.subscribe(WORK), [1]).await;
    std::fs::remove_dir_all(folder).unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stream_that_differs_is_changed_or_refused_by_name() {
    let settings = shared();
    let bus = open(&settings).await;
    bus.publish(WORK, frame([1])).await.unwrap();
    drop(bus);

    let smaller = Settings { queue_bytes: 1024 * 1024, ack_wait: Duration::from_secs(7), ..settings.clone() };
    let bus = open(&smaller).await;
    let operator = operator(&settings).await;
    let found = operator.get_stream(stream(&settings)).await.unwrap();
    assert_eq!(found.cached_info().config.max_bytes, 1024 * 1024);
    finish(&mut bus.subscribe(WORK), [1]).await;
    drop(bus);

    let elsewhere = Settings { storage: Storage::Memory, ..settings.clone() };
    let refused = refused(elsewhere, LIMITS).await;
    let StartError::Stream { stream: named, why } = &refused else { panic!("{refused}") };
    assert!(named.starts_with(&settings.prefix), "{named}");
    assert!(why.contains("storage") && why.contains("File where Memory is wanted"), "{why}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bounds_that_the_servers_cannot_keep_are_refused() {
    let large = Limits { body_bytes: 64 * 1024 * 1024, ..LIMITS };
    let refused_body = refused(shared(), large).await.to_string();
    assert!(refused_body.contains("body_bytes = 67108864"), "{refused_body}");
    assert!(refused_body.contains("max_payload"), "{refused_body}");
    let none = Limits { frame_envelopes: 0, ..LIMITS };
    assert!(refused(shared(), none).await.to_string().contains("frame_envelopes = 0"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_may_start_at_once() {
    let settings = Settings { replicas: 3, ..shared() };
    let starting = (0..8).map(|_| tokio::spawn(Bus::nats(settings.clone(), LIMITS, &[WORK])));
    let buses = futures_util::future::join_all(starting).await;
    for (n, bus) in buses.into_iter().enumerate() {
        let bus = bus.unwrap().unwrap();
        bus.publish(WORK, frame([n as u64])).await.unwrap();
        finish(&mut bus.subscribe(WORK), [n as u64]).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[should_panic(expected = "other is not among the subjects of this bus")]
async fn a_subject_that_was_not_announced_is_a_bug() {
    let bus = open(&shared()).await;
    drop(bus.subscribe(Subject("other")));
}

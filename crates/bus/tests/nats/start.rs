//! How a bus starts, and why it does not.

use std::path::PathBuf;

use bus::nats::{Identity, Login, StartError, Storage, Tls};
use servers::{Certificates, Nats};

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

/// A key of the documentation of NATS, which opens nothing.
const SEED: &str = "SUACSSL3UAHUDXKFSNVUZRF5UHPMWZ6BFDTJ7M6USDXIEDNPPQYYYCU3VY";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_key_is_a_login() {
    let user = "UDXU4RCSJNZOIQHZNWXHXORDPRTGNJAHAHFRGZNEEJCPQTT2M7NLCNF4";
    let nats = Nats::start_with(1, &format!("authorization {{ users: [{{ nkey: {user} }}] }}")).unwrap();
    let settings = Settings { login: Login::Nkey(SEED.to_owned()), ..settings(&nats.urls()) };
    let bus = open(&settings).await;
    bus.publish(WORK, frame([1])).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn connections_are_protected_where_it_is_asked_for() {
    let Certificates { authority, server, client, .. } = &Certificates::make().unwrap();
    let tls = format!(
        "tls {{ cert_file: {:?}, key_file: {:?}, ca_file: {authority:?}, verify: true }}",
        server.certificate, server.key
    );
    let nats = Nats::start_with(1, &tls).unwrap();
    let address = nats.nodes()[0].socket_addr();
    let settings = Settings::from_urls(&format!("tls://{address}")).unwrap();
    assert_eq!(settings.tls, Some(Tls::default()));

    let unknown = Tls { authorities: Some(authority.clone()), identity: None };
    for (stranger, expected) in
        [(Tls::default(), "invalid peer certificate"), (unknown.clone(), "CertificateRequired")]
    {
        let stranger = Settings { start_timeout: QUIET, tls: Some(stranger), ..settings.clone() };
        let why = refused(stranger, LIMITS).await.to_string();
        assert!(why.contains(expected), "{why}");
    }

    let identity = Identity { certificate: client.certificate.clone(), key: client.key.clone() };
    let known = Tls { identity: Some(identity), ..unknown };
    let bus = open(&Settings { tls: Some(known), ..settings }).await;
    bus.publish(WORK, frame([1])).await.unwrap();
    finish(&mut bus.subscribe(WORK), [1]).await;
}

/// Nobody is asked: no server is there.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_file_that_is_no_certificate_or_key_is_named() {
    let (ours, others) = (Certificates::make().unwrap(), Certificates::make().unwrap());
    let identity = |certificate: &PathBuf, key: &PathBuf| {
        let identity = Identity { certificate: certificate.clone(), key: key.clone() };
        Tls { authorities: Some(ours.authority.clone()), identity: Some(identity) }
    };
    let missing = ours.authority.with_extension("missing");
    let authorities = |path: &PathBuf| Tls { authorities: Some(path.clone()), identity: None };
    for (tls, setting, file, why) in [
        (authorities(&missing), "tls.authorities", &missing, "No such file"),
        (authorities(&ours.client.key), "tls.authorities", &ours.client.key, "no certificate"),
        (identity(&missing, &ours.client.key), "tls.identity.certificate", &missing, "No such file"),
        (identity(&ours.client.certificate, &missing), "tls.identity.key", &missing, "No such file"),
        (
            identity(&ours.client.certificate, &ours.client.certificate),
            "tls.identity.key",
            &ours.client.certificate,
            "no key",
        ),
        (
            identity(&ours.client.certificate, &others.client.key),
            "tls.identity.key",
            &others.client.key,
            "not the key of",
        ),
    ] {
        let settings = Settings { tls: Some(tls), ..Settings::from_urls("127.0.0.1:1").unwrap() };
        let refused = refused(settings, LIMITS).await;
        let StartError::BadSetting { setting: named, value, why: told } = &refused else {
            panic!("{refused}")
        };
        assert_eq!((*named, value), (setting, &file.display().to_string()));
        assert!(told.contains(why), "{refused}");
    }
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

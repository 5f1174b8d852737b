//! Signing keys over replicas: two account services on one folder, and somebody elsewhere who verifies their tokens.

#![allow(clippy::unwrap_used, reason = "a test panics where something is not as it should be")]

use std::fs;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use account::{Config, LoginLimits, MIGRATIONS, PUBLISHED_FIRST, Parts, rotate_keys};
use axum::Router;
use axum::body::Body;
use axum::routing::get;
use db::{Db, Settings};
use futures_util::future::join_all;
use http::Request;
use http_body_util::BodyExt;
use peers::Peers;
use serde_json::{Value, json};
use serve::auth::{AuthError, KeySet, LOOK_PAUSE, Realm, Verifier};
use serve::edge::{EdgeConfig, protected};
use serve::keys::{JWKS_PATH, follow};
use serve::random::Random;
use serve::{Json, Limits};
use telemetry::Registry;
use tokio::net::TcpListener;
use tokio_util::sync::{CancellationToken, DropGuard};
use tower::ServiceExt;
use wire::time::Clock;

const NOW_MILLIS: u64 = 1_800_000_000_000;

/// Longer than any of these tests may take; a wait that reaches it has failed.
const PATIENCE: Duration = Duration::from_secs(90);

async fn until(what: &str, mut holds: impl AsyncFnMut() -> bool) {
    let wait = async {
        while !holds().await {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(PATIENCE, wait).await.unwrap_or_else(|_| panic!("never: {what}"));
}

/// What the replicas have in common: a clock and a folder of keys. It goes with the test.
struct Place {
    path: PathBuf,
    millis: Arc<AtomicU64>,
}

impl Place {
    fn new() -> Place {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let unique =
            format!("sagaline-rotation-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let path = std::env::temp_dir().join(unique);
        fs::create_dir_all(&path).unwrap();
        Place { path, millis: Arc::new(AtomicU64::new(NOW_MILLIS)) }
    }

    fn clock(&self) -> Clock {
        let millis = self.millis.clone();
        Clock::from_fn(move || millis.load(Ordering::SeqCst))
    }

    fn advance(&self, by: Duration) {
        self.millis.fetch_add(u64::try_from(by.as_millis()).unwrap(), Ordering::SeqCst);
    }

    fn keys(&self) -> PathBuf {
        self.path.join("keys")
    }

    fn key_files(&self) -> Vec<PathBuf> {
        let paths = fs::read_dir(self.keys()).unwrap().map(|entry| entry.unwrap().path());
        let mut files: Vec<_> = paths.filter(|path| path.extension().is_some_and(|e| e == "pk8")).collect();
        files.sort();
        files
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.path);
    }
}

/// A replica of the account service, on a socket.
struct Replica {
    address: SocketAddr,
    router: Router,
    /// A customer's refresh token.
    refresh: tokio::sync::Mutex<String>,
    stop: DropGuard,
}

impl Replica {
    async fn start(place: &Place, name: &str) -> Replica {
        let db = Db::open(Settings::new(place.path.join(name).with_extension("db"), "account"), MIGRATIONS);
        let account = account::start(Parts {
            redis: None,
            db: db.unwrap(),
            clock: place.clock(),
            random: Random::secure(),
            registry: Registry::new(),
            key_dir: place.keys(),
            realm: Realm::default(),
            config: Config {
                logins: LoginLimits { burst_per_email: 1000, ..LoginLimits::default() },
                ..Config::default()
            },
        });
        let account = account.await.unwrap();
        let router = account.router();
        let stop = CancellationToken::new();
        tokio::spawn(account.run(stop.clone()));
        let address = serve(router.clone(), stop.clone()).await;
        let replica =
            Replica { address, router, refresh: tokio::sync::Mutex::default(), stop: stop.drop_guard() };
        let person = json!({
            "password": "correct horse", "firstname": "Ada", "lastname": "L", "email": format!("{name}@x.example"),
            "address": "1 Road", "phone_number": "+31 6 1234 5678",
        });
        *replica.refresh.lock().await =
            replica.post("signup", person).await["refresh_token"].as_str().unwrap().to_owned();
        replica
    }

    async fn post(&self, path: &str, body: Value) -> Value {
        let request = Request::post(format!("/api/account/auth/{path}")).body(Body::from(body.to_string()));
        let response = self.router.clone().oneshot(request.unwrap()).await.unwrap();
        assert!(response.status().is_success(), "{response:?}");
        serde_json::from_slice(&response.into_body().collect().await.unwrap().to_bytes()).unwrap()
    }

    /// A new access token.
    async fn token(&self) -> String {
        let mut refresh = self.refresh.lock().await;
        let pair = self.post("refresh", json!({ "refresh_token": *refresh })).await;
        *refresh = pair["refresh_token"].as_str().unwrap().to_owned();
        pair["access_token"].as_str().unwrap().to_owned()
    }

    /// How many keys it publishes.
    async fn published(&self) -> usize {
        let request = Request::get(JWKS_PATH).body(Body::empty()).unwrap();
        let response = self.router.clone().oneshot(request).await.unwrap();
        let body = response.into_body().collect().await.unwrap().to_bytes();
        KeySet::from_jwks(&serde_json::from_slice(&body).unwrap()).keys().len()
    }
}

async fn serve(router: Router, stop: CancellationToken) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let api = protected(router, &EdgeConfig::default()).unwrap();
    tokio::spawn(async move {
        let _ = serve::serve(listener, api, &Limits::default(), stop).await;
    });
    address
}

/// A verifier in another process, as it were.
fn elsewhere(place: &Place, replicas: &[SocketAddr]) -> (Verifier, DropGuard) {
    let verifier = Verifier::new(&KeySet::default(), &Realm::default(), place.clock());
    let stop = CancellationToken::new();
    let account = Peers::new("account", replicas.to_vec().into(), |_| ());
    tokio::spawn(follow(verifier.clone(), account, stop.clone()));
    (verifier, stop.drop_guard())
}

fn kid(token: &str) -> String {
    jsonwebtoken::decode_header(token).unwrap().kid.unwrap()
}

#[tokio::test]
async fn a_rotation_refuses_nobody() {
    let place = Place::new();
    let (a, b) = tokio::join!(Replica::start(&place, "a"), Replica::start(&place, "b"));
    assert_eq!(place.key_files().len(), 1, "they began at once, and one of them made the key");
    let (verifier, _following) = elsewhere(&place, &[a.address, b.address]);
    let replicas = [&a, &b];
    let mut tokens = Vec::new();
    // One more token of each, and all that there are: each is good everywhere, whoever made it.
    let mut buy = async || {
        for replica in replicas {
            tokens.push(replica.token().await);
        }
        for token in &tokens {
            verifier.authenticate(token).await.unwrap();
        }
        let last = &tokens[tokens.len() - 2..];
        (kid(&last[0]), kid(&last[1]))
    };
    let (first, same) = buy().await;
    assert_eq!(first, same);

    // Keys sort by the time at which they were made.
    place.advance(Duration::from_millis(1));
    rotate_keys(&place.keys(), &place.clock(), &Random::secure()).unwrap();
    until("both publish the new key", async || {
        assert_eq!(
            buy().await,
            (first.clone(), first.clone()),
            "nobody signs with a key that is not known yet"
        );
        a.published().await == 2 && b.published().await == 2
    })
    .await;
    place.advance(PUBLISHED_FIRST);
    let (second, same) = buy().await;
    assert!(second == same && second != first);

    place.advance(Duration::from_secs(Config::default().access_token_seconds));
    tokens.clear();
    fs::remove_file(&place.key_files()[0]).unwrap();
    let buy = async || {
        for replica in replicas {
            verifier.authenticate(&replica.token().await).await.unwrap();
        }
    };
    until("the old key is gone", async || {
        buy().await;
        a.published().await == 1 && b.published().await == 1
    })
    .await;
    buy().await;
}

#[tokio::test]
async fn a_withdrawn_keys_tokens_count_no_more_remembered_or_not() {
    let place = Place::new();
    let a = Replica::start(&place, "a").await;
    let (verifier, _following) = elsewhere(&place, &[a.address]);
    until("it has keys", async || verifier.ready().is_ok()).await;
    let (stolen, unseen) = (a.token().await, a.token().await);
    verifier.authenticate(&stolen).await.unwrap();

    place.advance(Duration::from_millis(1));
    // The key's file is replaced: the new one is alone, and signs at once.
    rotate_keys(&place.keys(), &place.clock(), &Random::secure()).unwrap();
    fs::remove_file(&place.key_files()[0]).unwrap();
    until("it signs with the new key", async || kid(&a.token().await) != kid(&stolen)).await;
    // Whoever shows a token of the new key makes the verifier look.
    until("the new key is known", async || verifier.authenticate(&a.token().await).await.is_ok()).await;
    assert_eq!(verifier.verify(&stolen), Err(AuthError::UnknownKey));
    assert_eq!(verifier.authenticate(&unseen).await, Err(AuthError::UnknownKey));
}

#[tokio::test]
async fn what_is_known_stays_when_nobody_answers() {
    let place = Place::new();
    let (a, b) = tokio::join!(Replica::start(&place, "a"), Replica::start(&place, "b"));
    let nobody = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
    let (alone, _following) = elsewhere(&place, &[nobody]);
    let (verifier, _following_too) = elsewhere(&place, &[a.address, b.address]);
    let token = a.token().await;
    let stranger = Replica::start(&Place::new(), "c").await.token().await;
    assert!(alone.ready().unwrap_err().contains("no keys"));
    assert_eq!(alone.authenticate(&token).await, Err(AuthError::UnknownKey));
    until("it has keys", async || verifier.ready().is_ok()).await;

    drop(a.stop);
    until("one is enough", async || tokio::net::TcpStream::connect(a.address).await.is_err()).await;
    assert_eq!(verifier.authenticate(&stranger).await, Err(AuthError::UnknownKey));
    verifier.authenticate(&b.token().await).await.unwrap();
    drop(b.stop);
    until("nobody is left", async || tokio::net::TcpStream::connect(b.address).await.is_err()).await;
    assert_eq!(verifier.authenticate(&stranger).await, Err(AuthError::UnknownKey));
    verifier.authenticate(&token).await.unwrap();
}

#[tokio::test]
async fn tokens_that_nobody_signed_do_not_make_anybody_look_again_and_again() {
    let place = Place::new();
    let asked = Arc::new(AtomicUsize::new(0));
    let count = asked.clone();
    let key = serve::PublicKey::new([7; 32]);
    let set = KeySet::new([key]).to_jwks();
    let router = Router::new().route(
        JWKS_PATH,
        get(async move || {
            count.fetch_add(1, Ordering::SeqCst);
            Json(set)
        }),
    );
    let stop = CancellationToken::new();
    let account = serve(router, stop.clone()).await;
    let _stop = stop.drop_guard();
    let (verifier, _following) = elsewhere(&place, &[account]);
    until("it has keys", async || verifier.ready().is_ok()).await;
    let stranger = Replica::start(&place, "c").await.token().await;
    let (before, began) = (asked.load(Ordering::SeqCst), Instant::now());
    let looks = || asked.load(Ordering::SeqCst) - before;
    until("somebody looked", async || {
        let checks = join_all((0..50).map(|_| verifier.authenticate(&stranger))).await;
        assert!(checks.iter().all(|check| *check == Err(AuthError::UnknownKey)));
        looks() > 0
    })
    .await;
    for _ in 0..20 {
        let checks = join_all((0..50).map(|_| verifier.authenticate(&stranger))).await;
        assert!(checks.iter().all(|check| *check == Err(AuthError::UnknownKey)));
    }
    let due = 1 + began.elapsed().as_secs() / LOOK_PAUSE.as_secs();
    assert!(looks() <= usize::try_from(due).unwrap(), "{} looks, at most {due} were due", looks());
}

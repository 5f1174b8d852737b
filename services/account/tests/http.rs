//! The account service's door, in process, on a real database: every answer of the contract, and what somebody with bad
//! intentions would try. On SQLite; `http_on_mariadb.rs` is the same on MariaDB.

#![allow(clippy::unwrap_used, reason = "a test panics where something is not as it should be")]

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use account::{
    Account, Config, LoginLimits, MIGRATIONS, PURGE_BATCH_ROWS, Parts, PasswordLimits, StartError,
};
use axum::Router;
use axum::body::Body;
use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use db::Db;
use http::{HeaderMap, HeaderValue, Request};
use http_body_util::BodyExt;
use jsonwebtoken::{Algorithm, EncodingKey, Header};
use serde_json::{Value, json};
use serve::auth::Realm;
use serve::random::Random;
use telemetry::Registry;
use testdb::TestDb;
use tower::ServiceExt;
use wire::time::Clock;

const NOW_MILLIS: u64 = 1_800_000_000_000;

/// A database, and a folder for keys, which go with the test.
struct Place {
    database: TestDb,
    folder: PathBuf,
}

impl Place {
    fn new() -> Place {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let unique =
            format!("sagaline-account-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let path = std::env::temp_dir().join(unique);
        fs::create_dir_all(&path).unwrap();
        let on_mariadb = module_path!().starts_with("http_on_mariadb");
        let database = if on_mariadb { TestDb::mariadb() } else { TestDb::sqlite() };
        Place { database, folder: path }
    }

    fn keys(&self) -> PathBuf {
        self.folder.join("keys")
    }

    fn key_files(&self) -> impl Iterator<Item = PathBuf> {
        let paths = fs::read_dir(self.keys()).unwrap().map(|entry| entry.unwrap().path());
        paths.filter(|path| path.extension().is_some_and(|extension| extension == "pk8"))
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.folder);
    }
}

struct Shop {
    place: Place,
    db: Db,
    account: Account,
    router: Router,
    millis: Arc<AtomicU64>,
    config: Config,
}

/// Tests log in more often than people do.
fn unlimited() -> Config {
    let logins = LoginLimits { burst_per_email: 1000, ..LoginLimits::default() };
    Config { logins, ..Config::default() }
}

async fn open(place: &Place, millis: &Arc<AtomicU64>, config: Config) -> (Db, Result<Account, StartError>) {
    let db = place.database.open(MIGRATIONS);
    let read = millis.clone();
    let parts = Parts {
        redis: None,
        db: db.clone(),
        clock: Clock::from_fn(move || read.load(Ordering::SeqCst)),
        random: Random::secure(),
        registry: Registry::new(),
        key_dir: place.keys(),
        realm: Realm::default(),
        config,
    };
    (db, account::start(parts).await)
}

impl Shop {
    async fn new() -> Shop {
        Shop::with(unlimited()).await
    }

    async fn with(config: Config) -> Shop {
        Shop::start(Place::new(), Arc::new(AtomicU64::new(NOW_MILLIS)), config).await
    }

    async fn start(place: Place, millis: Arc<AtomicU64>, config: Config) -> Shop {
        let (db, account) = open(&place, &millis, config.clone()).await;
        let account = account.unwrap();
        Shop { place, db, router: account.router(), account, millis, config }
    }

    async fn restart(self) -> Shop {
        drop((self.account, self.router));
        self.db.close().await;
        Shop::start(self.place, self.millis, self.config).await
    }

    fn advance_seconds(&self, seconds: u64) {
        self.millis.fetch_add(seconds * 1000, Ordering::SeqCst);
    }

    fn now_seconds(&self) -> u64 {
        self.millis.load(Ordering::SeqCst) / 1000
    }

    async fn send(&self, request: Request<Body>) -> (u16, HeaderMap, Value) {
        let response = self.router.clone().oneshot(request).await.unwrap();
        let (status, headers) = (response.status().as_u16(), response.headers().clone());
        let body = response.into_body().collect().await.unwrap().to_bytes();
        let body = serde_json::from_slice(&body).unwrap_or_else(|_| panic!("not JSON: {body:?}"));
        assert_eq!(headers["content-type"], "application/json");
        assert_eq!(headers["cache-control"], "no-store");
        (status, headers, body)
    }

    /// What the original's clients send: JSON under a form's content type.
    async fn call(
        &self,
        method: &str,
        path: &str,
        token: Option<&str>,
        body: &str,
    ) -> (u16, HeaderMap, Value) {
        let mut request = Request::builder()
            .method(method)
            .uri(format!("/api/account/{path}"))
            .header("content-type", "application/x-www-form-urlencoded");
        if let Some(token) = token {
            request = request.header("authorization", format!("bearer {token}"));
        }
        self.send(request.body(Body::from(body.to_owned())).unwrap()).await
    }

    async fn post(&self, path: &str, body: Value) -> (u16, Value) {
        let (status, _, body) = self.call("POST", path, None, &body.to_string()).await;
        (status, body)
    }

    async fn post_as(&self, token: &str, path: &str, body: Value) -> (u16, Value) {
        let (status, _, body) = self.call("POST", path, Some(token), &body.to_string()).await;
        (status, body)
    }

    async fn get_as(&self, token: &str, path: &str) -> (u16, Value) {
        let (status, _, body) = self.call("GET", path, Some(token), "").await;
        (status, body)
    }

    async fn put_as(&self, token: &str, path: &str, body: Value) -> (u16, Value) {
        let (status, _, body) = self.call("PUT", path, Some(token), &body.to_string()).await;
        (status, body)
    }

    async fn sign_up(&self, n: u32) -> Pair {
        let (status, body) = self.post("auth/signup", ming(n)).await;
        assert_eq!(status, 201, "{body}");
        Pair::of(&body)
    }

    async fn log_in(&self, n: u32) -> Pair {
        let (status, body) = self.post("auth/login", login(&format!("ming{n}@ming.com"), "abcd5432")).await;
        assert_eq!(status, 200, "{body}");
        Pair::of(&body)
    }

    async fn refresh(&self, token: &str) -> (u16, Value) {
        self.post("auth/refresh", json!({ "refresh_token": token })).await
    }

    async fn count(&self, sql: &'static str) -> i64 {
        let counted = self.db.read(move |tx| tx.query_opt(sql, &[], |row| row.get::<i64>(0)));
        counted.await.unwrap().unwrap()
    }
}

#[derive(Debug, Clone)]
struct Pair {
    access: String,
    refresh: String,
}

impl Pair {
    fn of(body: &Value) -> Pair {
        let text =
            |name: &str| body[name].as_str().unwrap_or_else(|| panic!("no {name} in {body}")).to_owned();
        assert_eq!(body.as_object().unwrap().len(), 2);
        Pair { access: text("access_token"), refresh: text("refresh_token") }
    }
}

fn ming(n: u32) -> Value {
    json!({
        "password": "abcd5432", "firstname": "ming", "lastname": "hsu", "email": format!("ming{n}@ming.com"),
        "address": "taipei", "phone_number": format!("{}", 923_456_000 + n),
    })
}

fn login(email: &str, password: &str) -> Value {
    json!({ "email": email, "password": password })
}

fn msg(text: &str) -> Value {
    json!({ "msg": text })
}

// Signing up.

#[tokio::test]
async fn a_sign_up_yields_a_pair_that_works() {
    let shop = Shop::new().await;
    let pair = shop.sign_up(1).await;
    let person = json!({ "firstname": "ming", "lastname": "hsu", "email": "ming1@ming.com" });
    assert_eq!(shop.get_as(&pair.access, "info/person").await, (200, person));
    let shipping = json!({ "address": "taipei", "phone_number": "923456001" });
    assert_eq!(shop.get_as(&pair.access, "info/shipping").await, (200, shipping));
    assert_eq!(shop.refresh(&pair.refresh).await.0, 200);
    let claims = shop.account.verifier().verify(&pair.access).unwrap();
    assert_eq!(claims.expires_at, shop.now_seconds() + 900);
    assert!(claims.customer_id < 1 << 53);
}

#[tokio::test]
async fn an_email_or_a_phone_number_can_be_taken_once() {
    let shop = Shop::new().await;
    shop.sign_up(1).await;
    for (field, taken) in
        [("email", "ming1@ming.com"), ("email", "MING1@Ming.COM"), ("phone_number", "923-456-001")]
    {
        let mut body = ming(2);
        body[field] = taken.into();
        assert_eq!(shop.post("auth/signup", body).await, (400, msg("duplicate entry")), "{taken}");
    }
    assert_eq!(shop.count("SELECT COUNT(*) FROM customer").await, 1);
    assert_eq!(shop.count("SELECT COUNT(*) FROM refresh_family").await, 1, "a refused sign-up left nothing");
    shop.sign_up(2).await;
}

#[tokio::test]
async fn a_sign_up_needs_every_field_and_each_within_its_bounds() {
    let shop = Shop::new().await;
    for field in ["password", "firstname", "lastname", "email", "address", "phone_number"] {
        let mut body = ming(1);
        body.as_object_mut().unwrap().remove(field);
        let (status, body) = shop.post("auth/signup", body).await;
        let text = body["msg"].as_str().unwrap();
        assert_eq!(status, 400);
        assert!(text.starts_with(&format!("invalid parameter: body: missing field `{field}`")), "{text}");

        let mut body = ming(1);
        body[field] = json!(12_345_678);
        let (status, body) = shop.post("auth/signup", body).await;
        let text = body["msg"].as_str().unwrap();
        assert_eq!(status, 400);
        assert!(text.starts_with(&format!("invalid parameter: {field}: expected a string")), "{text}");
        assert!(!text.contains("12345678"), "a value may be a password: {text}");
    }
    for (field, value, problem) in [
        ("password", "1234567".to_owned(), "must have at least 8 characters"),
        ("password", "x".repeat(129), "must have at most 128 characters"),
        ("firstname", " ".to_owned(), "must not be empty"),
        ("lastname", "x".repeat(101), "must have at most 100 characters"),
        ("email", "ming".to_owned(), "is not an e-mail address"),
        ("address", "x".repeat(301), "must have at most 300 characters"),
        (
            "phone_number",
            "call me".to_owned(),
            "is not a phone number: 3 to 15 digits, with spaces, '-', '.', '(', ')' or a leading '+'",
        ),
    ] {
        let mut body = ming(1);
        body[field] = value.into();
        let expected = msg(&format!("invalid parameter: {field}: {problem}"));
        assert_eq!(shop.post("auth/signup", body).await, (400, expected));
    }
    assert_eq!(shop.count("SELECT COUNT(*) FROM customer").await, 0);
}

#[tokio::test]
async fn what_is_not_json_is_refused_and_unknown_fields_bind_to_nothing() {
    let shop = Shop::new().await;
    for (body, start) in [
        ("", "the request's body is empty"),
        ("email=a", "the request's body is not JSON"),
        ("{\"email\":", "the request's body is not JSON"),
        ("[]", "the request's body is an array"),
        ("null", "invalid parameter: body: expected an object (line 1, column 4)"),
    ] {
        for path in ["auth/signup", "auth/login", "auth/refresh"] {
            let (status, _, answer) = shop.call("POST", path, None, body).await;
            assert_eq!(status, 400);
            assert!(answer["msg"].as_str().unwrap().starts_with(start), "{path} {body:?}: {answer}");
        }
    }
    let mut body = ming(1);
    body["id"] = json!(7);
    body["customer_id"] = json!(7);
    let (status, answer) = shop.post("auth/signup", body).await;
    assert_eq!(status, 201);
    let id = shop.account.verifier().verify(&Pair::of(&answer).access).unwrap().customer_id;
    assert_ne!(id, 7);
}

// Logging in.

#[tokio::test]
async fn a_login_takes_the_right_password_only_and_answers_the_same_for_nobody() {
    let shop = Shop::new().await;
    let first = shop.sign_up(1).await;
    let (status, body) = shop.post("auth/login", login("Ming1@MING.com", "abcd5432")).await;
    assert_eq!(status, 200);
    let id = |pair: &Pair| shop.account.verifier().verify(&pair.access).unwrap().customer_id;
    assert_eq!(id(&Pair::of(&body)), id(&first));

    let failed = (401, msg("authentication failed"));
    assert_eq!(shop.post("auth/login", login("ming1@ming.com", "abcd5433")).await, failed);
    assert_eq!(shop.post("auth/login", login("ming1@ming.com", "short")).await, failed);
    assert_eq!(shop.post("auth/login", login("nobody@ming.com", "abcd5432")).await, failed);
    let (_, headers, _) = shop.call("POST", "auth/login", None, &login("a@b", "abcd5432").to_string()).await;
    assert_eq!(headers["www-authenticate"], "Bearer");

    let long = msg("invalid parameter: password: must have at most 128 characters");
    assert_eq!(shop.post("auth/login", login("ming1@ming.com", &"x".repeat(129))).await, (400, long));
    let shape = msg("invalid parameter: email: is not an e-mail address");
    assert_eq!(shop.post("auth/login", login("ming1", "abcd5432")).await, (400, shape));
}

/// Where the line of those who hash is full, who asks for an unknown customer is sent away like anybody else: so a
/// hash is computed for them, too, and they wait as long.
#[tokio::test]
async fn an_unknown_email_stands_in_the_line_for_a_hash() {
    const LINE: u32 = 20;
    let passwords = PasswordLimits { max_running_hashes: 1, max_waiting_hashes: LINE as usize - 1 };
    let shop = Shop::with(Config { passwords, ..unlimited() }).await;
    // A server's connections are made when they are needed, which takes longer than the line.
    for _ in 0..2 {
        shop.post("auth/login", login("nobody@ming.com", "abcd5433")).await;
    }
    let sign_ups = async {
        let all = (1..=LINE).map(|n| shop.post("auth/signup", ming(n)));
        futures_util::future::join_all(all).await
    };
    let login = shop.post("auth/login", login("nobody@ming.com", "abcd5433"));
    let (signed_up, refused) = tokio::join!(sign_ups, login);
    assert!(signed_up.iter().all(|(status, _)| *status == 201), "{signed_up:?}");
    assert_eq!(refused, (503, msg("too many logins at once, try again")));
}

#[tokio::test]
async fn somebody_who_was_not_there_can_sign_up_after_a_failed_login() {
    let shop = Shop::new().await;
    assert_eq!(shop.post("auth/login", login("ming1@ming.com", "abcd5432")).await.0, 401);
    shop.sign_up(1).await;
    shop.log_in(1).await;
}

#[tokio::test]
async fn logins_are_limited_by_email_and_the_limit_passes() {
    let shop = Shop::with(Config::default()).await;
    shop.sign_up(1).await;
    shop.sign_up(2).await;
    for _ in 0..10 {
        assert_eq!(shop.post("auth/login", login("ming1@ming.com", "abcd5433")).await.0, 401);
    }
    let body = login("MING1@ming.com", "abcd5432").to_string();
    let (status, headers, body) = shop.call("POST", "auth/login", None, &body).await;
    assert_eq!((status, body), (429, msg("too many requests, try again later")));
    assert_eq!(headers["retry-after"], "6");
    shop.log_in(2).await;
    shop.advance_seconds(6);
    shop.log_in(1).await;
    assert_eq!(shop.post("auth/login", login("ming1@ming.com", "abcd5432")).await.0, 429);
}

#[tokio::test]
async fn more_hashes_than_may_wait_are_refused_and_had_no_effect() {
    let passwords = PasswordLimits { max_running_hashes: 1, max_waiting_hashes: 1 };
    let shop = Shop::with(Config { passwords, ..unlimited() }).await;
    let answers = futures_util::future::join_all((0..8).map(|n| shop.post("auth/signup", ming(n)))).await;
    let created = answers.iter().filter(|(status, _)| *status == 201).count();
    let refused = answers.iter().filter(|a| **a == (503, msg("too many logins at once, try again"))).count();
    assert_eq!((created, refused), (2, 6));
    assert_eq!(shop.count("SELECT COUNT(*) FROM customer").await, 2);
}

// Refreshing.

#[tokio::test]
async fn a_refresh_spends_the_token_and_a_second_use_ends_the_family() {
    let shop = Shop::new().await;
    let first = shop.sign_up(1).await;
    let other = shop.log_in(1).await;
    let (status, body) = shop.refresh(&first.refresh).await;
    assert_eq!(status, 200);
    let second = Pair::of(&body);
    assert_ne!(second.refresh, first.refresh);
    assert_eq!(shop.get_as(&second.access, "info/person").await.0, 200);

    assert_eq!(shop.refresh(&first.refresh).await, (401, msg("invalid token")));
    assert_eq!(shop.refresh(&second.refresh).await, (401, msg("invalid token")), "its family is revoked");
    assert_eq!(shop.refresh(&other.refresh).await.0, 200, "another login's family lives");
}

#[tokio::test]
async fn of_parallel_refreshes_one_yields_a_pair_and_the_family_is_revoked() {
    let shop = Shop::new().await;
    let pair = shop.sign_up(1).await;
    let answers = futures_util::future::join_all((0..8).map(|_| shop.refresh(&pair.refresh))).await;
    let won: Vec<_> = answers.iter().filter(|(status, _)| *status == 200).collect();
    let lost = answers.iter().filter(|answer| **answer == (401, msg("invalid token"))).count();
    assert_eq!((won.len(), lost), (1, 7));
    assert_eq!(shop.refresh(&Pair::of(&won[0].1).refresh).await, (401, msg("invalid token")));
}

#[tokio::test]
async fn a_refresh_token_expires_and_what_is_none_is_invalid() {
    let shop = Shop::new().await;
    let pair = shop.sign_up(1).await;
    shop.advance_seconds(30 * 24 * 3600 - 1);
    let (status, body) = shop.refresh(&pair.refresh).await;
    assert_eq!(status, 200);
    let next = Pair::of(&body);
    shop.advance_seconds(30 * 24 * 3600);
    assert_eq!(shop.refresh(&next.refresh).await, (401, msg("token expired")));
    for none in ["", "x", &URL_SAFE_NO_PAD.encode([7; 32]), &pair.access] {
        assert_eq!(shop.refresh(none).await, (401, msg("invalid token")), "{none}");
    }
    let (status, body) = shop.post("auth/refresh", json!({})).await;
    assert_eq!(status, 400);
    assert!(body["msg"].as_str().unwrap().contains("missing field `refresh_token`"), "{body}");
}

/// SQLite's file, or all rows of a server's tables.
fn everything_stored(database: &TestDb) -> Vec<u8> {
    match database {
        TestDb::Sqlite(folder) => fs::read(folder.path().join("test.db")).unwrap(),
        TestDb::MariaDb(database) => {
            let name = database.name();
            let rows = format!(
                "SELECT * FROM {name}.customer; SELECT * FROM {name}.refresh_family;
                 SELECT *, HEX(token_hash) FROM {name}.refresh_token"
            );
            database.address().run(&rows).unwrap().into_bytes()
        }
    }
}

#[tokio::test]
async fn only_hashes_of_tokens_and_passwords_are_stored() {
    let shop = Shop::new().await;
    let pair = shop.sign_up(1).await;
    shop.db.close().await;
    let stored = everything_stored(&shop.place.database);
    let holds = |secret: &[u8]| stored.windows(secret.len()).any(|window| window == secret);
    assert!(!holds(b"abcd5432") && !holds(pair.refresh.as_bytes()));
    let token = URL_SAFE_NO_PAD.decode(&pair.refresh).unwrap();
    let hexadecimal: String = token.iter().map(|byte| format!("{byte:02X}")).collect();
    assert!(!holds(&token) && !holds(hexadecimal.as_bytes()));
    assert!(holds(b"$argon2id$"));
}

#[tokio::test]
async fn expired_tokens_are_purged_in_batches_and_live_ones_are_not() {
    let shop = Shop::new().await;
    shop.sign_up(1).await;
    for _ in 0..3 {
        shop.log_in(1).await;
    }
    shop.advance_seconds(29 * 24 * 3600);
    let live = shop.log_in(1).await;
    assert_eq!(shop.account.purge_expired().await.unwrap(), 0);
    shop.advance_seconds(2 * 24 * 3600);
    let purged = shop.account.purge_expired().await.unwrap();
    assert_eq!(purged, 4);
    assert!(purged < u64::from(PURGE_BATCH_ROWS));
    assert_eq!(shop.count("SELECT COUNT(*) FROM refresh_token").await, 1);
    assert_eq!(shop.count("SELECT COUNT(*) FROM refresh_family").await, 1);
    assert_eq!(shop.refresh(&live.refresh).await.0, 200);
}

#[tokio::test]
async fn the_purge_runs_until_it_is_stopped() {
    let shop = Shop::new().await;
    shop.sign_up(1).await;
    shop.advance_seconds(31 * 24 * 3600);
    let stop = tokio_util::sync::CancellationToken::new();
    let running = tokio::spawn(shop.account.run(stop.clone()));
    let sql = "SELECT COUNT(*) FROM refresh_family";
    while shop.db.read(move |tx| tx.query_opt(sql, &[], |row| row.get::<i64>(0))).await.unwrap() != Some(0) {
        tokio::task::yield_now().await;
    }
    stop.cancel();
    running.await.unwrap();
}

// Logging out.

#[tokio::test]
async fn a_logout_ends_its_family_and_no_other() {
    let shop = Shop::new().await;
    let (here, there) = (shop.sign_up(1).await, shop.log_in(1).await);
    let body = json!({ "refresh_token": here.refresh });
    assert_eq!(shop.post_as(&here.access, "auth/logout", body.clone()).await, (200, msg("ok")));
    assert_eq!(
        shop.post_as(&here.access, "auth/logout", body).await,
        (200, msg("ok")),
        "once more is no error"
    );
    assert_eq!(shop.refresh(&here.refresh).await, (401, msg("invalid token")));
    assert_eq!(shop.refresh(&there.refresh).await.0, 200);
}

#[tokio::test]
async fn nobody_logs_somebody_else_out() {
    let shop = Shop::new().await;
    let (mine, theirs) = (shop.sign_up(1).await, shop.sign_up(2).await);
    let body = json!({ "refresh_token": theirs.refresh });
    assert_eq!(shop.post_as(&mine.access, "auth/logout", body.clone()).await, (401, msg("invalid token")));
    assert_eq!(shop.post("auth/logout", body).await, (401, msg("missing access token")));
    let none = json!({ "refresh_token": "x" });
    assert_eq!(shop.post_as(&mine.access, "auth/logout", none).await, (401, msg("invalid token")));
    assert_eq!(shop.refresh(&theirs.refresh).await.0, 200);
}

// Personal data.

#[tokio::test]
async fn personal_data_is_changed_and_read_back() {
    let shop = Shop::new().await;
    let pair = shop.sign_up(1).await;
    let person = json!({ "firstname": "new", "lastname": "name", "email": "New@ming.com" });
    assert_eq!(shop.put_as(&pair.access, "info/person", person.clone()).await, (200, msg("ok")));
    assert_eq!(shop.get_as(&pair.access, "info/person").await, (200, person.clone()));
    assert_eq!(
        shop.put_as(&pair.access, "info/person", person).await,
        (200, msg("ok")),
        "the same once more"
    );
    let shipping = json!({ "address": "japan", "phone_number": "+81 3 1234 5678" });
    assert_eq!(shop.put_as(&pair.access, "info/shipping", shipping.clone()).await, (200, msg("ok")));
    assert_eq!(shop.get_as(&pair.access, "info/shipping").await, (200, shipping));
}

#[tokio::test]
async fn after_a_change_of_email_only_the_new_one_logs_in() {
    let shop = Shop::new().await;
    let pair = shop.sign_up(1).await;
    shop.log_in(1).await;
    let person = json!({ "firstname": "ming", "lastname": "hsu", "email": "new@ming.com" });
    assert_eq!(shop.put_as(&pair.access, "info/person", person).await.0, 200);
    let old = shop.post("auth/login", login("ming1@ming.com", "abcd5432")).await;
    assert_eq!(old, (401, msg("authentication failed")));
    assert_eq!(shop.post("auth/login", login("new@ming.com", "abcd5432")).await.0, 200);

    let mut next = ming(2);
    next["email"] = "ming1@ming.com".into();
    assert_eq!(shop.post("auth/signup", next).await.0, 201, "the old one is free");
}

#[tokio::test]
async fn a_change_may_not_take_what_is_somebody_else_s() {
    let shop = Shop::new().await;
    let pair = shop.sign_up(1).await;
    shop.sign_up(2).await;
    let person = json!({ "firstname": "ming", "lastname": "hsu", "email": "MING2@ming.com" });
    let duplicate = (400, msg("duplicate entry"));
    assert_eq!(shop.put_as(&pair.access, "info/person", person).await, duplicate);
    let shipping = json!({ "address": "taipei", "phone_number": "923 456 002" });
    assert_eq!(shop.put_as(&pair.access, "info/shipping", shipping).await, duplicate);
    assert_eq!(shop.get_as(&pair.access, "info/person").await.1["email"], "ming1@ming.com");
    assert_eq!(shop.get_as(&pair.access, "info/shipping").await.1["phone_number"], "923456001");
}

#[tokio::test]
async fn a_change_is_checked_as_a_sign_up_is() {
    let shop = Shop::new().await;
    let token = shop.sign_up(1).await.access;
    let expected = msg("invalid parameter: email: is not an e-mail address");
    let person = json!({ "firstname": "ming", "lastname": "hsu", "email": "ming" });
    assert_eq!(shop.put_as(&token, "info/person", person).await, (400, expected));
    let (status, body) = shop.put_as(&token, "info/person", json!({ "firstname": "ming" })).await;
    assert_eq!(status, 400);
    assert!(body["msg"].as_str().unwrap().contains("missing field `lastname`"), "{body}");
    let (status, body) = shop.put_as(&token, "info/shipping", json!({ "address": 1 })).await;
    assert_eq!(status, 400);
    assert!(
        body["msg"].as_str().unwrap().starts_with("invalid parameter: address: expected a string"),
        "{body}"
    );
}

// Access tokens.

#[tokio::test]
async fn every_door_to_personal_data_asks_for_a_token() {
    let shop = Shop::new().await;
    let (person, shipping) = (r#"{"firstname":"a","lastname":"b","email":"a@b"}"#, "{}");
    for (method, path, body) in [
        ("GET", "info/person", ""),
        ("PUT", "info/person", person),
        ("GET", "info/shipping", ""),
        ("PUT", "info/shipping", shipping),
        ("POST", "auth/logout", "{}"),
    ] {
        let (status, headers, answer) = shop.call(method, path, None, body).await;
        assert_eq!((status, answer), (401, msg("missing access token")), "{method} {path}");
        assert_eq!(headers["www-authenticate"], "Bearer");
        let (status, headers, answer) = shop.call(method, path, Some("nonsense"), body).await;
        assert_eq!((status, answer), (401, msg("invalid token")), "{method} {path}");
        assert_eq!(headers["www-authenticate"], "Bearer error=\"invalid_token\"");
    }
}

#[tokio::test]
async fn the_scheme_may_be_written_in_any_case_and_must_be_bearer() {
    let shop = Shop::new().await;
    let token = shop.sign_up(1).await.access;
    let with = |headers: &[String]| {
        let mut request = Request::builder().uri("/api/account/info/person");
        for value in headers {
            request = request.header("authorization", value);
        }
        shop.send(request.body(Body::empty()).unwrap())
    };
    for scheme in ["bearer", "Bearer", "BEARER"] {
        assert_eq!(with(&[format!("{scheme} {token}")]).await.0, 200);
    }
    assert_eq!(with(&[format!("Basic {token}")]).await.2, msg("missing access token"));
    assert_eq!(with(std::slice::from_ref(&token)).await.2, msg("invalid token"));
    let twice = [format!("Bearer {token}"), format!("Bearer {token}")];
    assert_eq!(with(&twice).await.2, msg("invalid token"));
}

#[tokio::test]
async fn an_access_token_expires_also_when_it_was_verified_before() {
    let shop = Shop::new().await;
    let pair = shop.sign_up(1).await;
    shop.advance_seconds(899);
    assert_eq!(shop.get_as(&pair.access, "info/person").await.0, 200);
    shop.advance_seconds(1);
    assert_eq!(shop.get_as(&pair.access, "info/person").await, (401, msg("token expired")));
    assert_eq!(shop.get_as(&pair.access, "info/person").await, (401, msg("token expired")));
}

#[tokio::test]
async fn a_forged_token_is_invalid() {
    let shop = Shop::new().await;
    let good = shop.sign_up(1).await.access;
    let id = shop.account.verifier().verify(&good).unwrap().customer_id;

    let realm = Realm::default();
    let claims = json!({
        "iss": realm.issuer, "aud": realm.audience, "sub": id.to_string(),
        "iat": shop.now_seconds(), "exp": shop.now_seconds() + 900,
    });
    let key_file = shop.place.key_files().next().unwrap();
    let ours = EncodingKey::from_ed_der(&fs::read(key_file).unwrap());
    let public = shop.account.keys().keys()[0].clone();
    let header = |algorithm| {
        let mut header = Header::new(algorithm);
        header.typ = Some("at+jwt".to_owned());
        header.kid = Some(public.kid().to_owned());
        header
    };
    let ed = || header(Algorithm::EdDSA);
    let sign = |header: &Header, claims: &Value, key: &EncodingKey| {
        jsonwebtoken::encode(header, claims, key).unwrap()
    };
    let without = |name: &str| {
        let mut claims = claims.clone();
        claims.as_object_mut().unwrap().remove(name);
        sign(&ed(), &claims, &ours)
    };
    let with = |name: &str, value: Value| {
        let mut claims = claims.clone();
        claims[name] = value;
        sign(&ed(), &claims, &ours)
    };
    assert_eq!(
        shop.get_as(&sign(&ed(), &claims, &ours), "info/person").await.0,
        200,
        "the recipe itself is right"
    );

    let part = |value: &Value| URL_SAFE_NO_PAD.encode(value.to_string());
    let none = json!({ "alg": "none", "typ": "at+jwt", "kid": public.kid() });
    let signature = good.rsplit('.').next().unwrap();
    let pkcs8 = aws_lc_rs::signature::Ed25519KeyPair::generate().unwrap();
    let pkcs8 = pkcs8.to_pkcs8().unwrap();
    let theirs = EncodingKey::from_ed_der(pkcs8.as_ref());
    let (mut no_kid, mut other_kid, mut jwt, mut critical) = (ed(), ed(), ed(), ed());
    no_kid.kid = None;
    other_kid.kid = Some("x".to_owned());
    jwt.typ = Some("JWT".to_owned());
    critical.crit = Some(vec!["x".to_owned()]);
    let mut tampered = good.clone().into_bytes();
    let middle = good.find('.').unwrap() + 20;
    tampered[middle] = if tampered[middle] == b'A' { b'B' } else { b'A' };

    let forged = [
        ("alg none, no signature", format!("{}.{}.", part(&none), part(&claims))),
        ("alg none, a signature", format!("{}.{}.{signature}", part(&none), part(&claims))),
        (
            "HS256 with the public key",
            sign(&header(Algorithm::HS256), &claims, &EncodingKey::from_secret(public.bytes())),
        ),
        (
            "HS256 with the key's id",
            sign(&header(Algorithm::HS256), &claims, &EncodingKey::from_secret(public.kid().as_bytes())),
        ),
        ("another key", sign(&ed(), &claims, &theirs)),
        ("no key id", sign(&no_kid, &claims, &ours)),
        ("another key id", sign(&other_kid, &claims, &ours)),
        ("an ID token's type", sign(&jwt, &claims, &ours)),
        ("a critical extension", sign(&critical, &claims, &ours)),
        ("tampered with", String::from_utf8(tampered).unwrap()),
        (
            "another's signature",
            format!("{}.{signature}", sign(&ed(), &claims, &ours).rsplit_once('.').unwrap().0),
        ),
        ("no exp", without("exp")),
        ("no iss", without("iss")),
        ("no aud", without("aud")),
        ("no sub", without("sub")),
        ("another issuer", with("iss", json!("somebody"))),
        ("another audience", with("aud", json!("something"))),
        ("a subject that is no customer", with("sub", json!("admin"))),
        ("a subject above 2^53", with("sub", json!("9007199254740992"))),
        ("an expiry that is no number", with("exp", json!("tomorrow"))),
        ("a huge one", "x".repeat(5000)),
        ("two dots", "..".to_owned()),
    ];
    for (what, token) in forged {
        for _ in 0..2 {
            let answer = shop.get_as(&token, "info/person").await;
            assert_eq!(answer, (401, msg("invalid token")), "{what}: {token}");
        }
    }
    let expired = with("exp", json!(shop.now_seconds()));
    assert_eq!(shop.get_as(&expired, "info/person").await, (401, msg("token expired")));
}

#[tokio::test]
async fn a_token_of_a_customer_that_is_not_there_is_invalid() {
    let shop = Shop::new().await;
    let token = shop.sign_up(1).await.access;
    shop.db
        .write(|tx| {
            tx.execute("DELETE FROM refresh_token", &[])?;
            tx.execute("DELETE FROM refresh_family", &[])?;
            tx.execute("DELETE FROM customer", &[])
        })
        .await
        .unwrap();
    let invalid = (401, msg("invalid token"));
    assert_eq!(shop.get_as(&token, "info/person").await, invalid);
    assert_eq!(shop.get_as(&token, "info/shipping").await, invalid);
    let person = json!({ "firstname": "a", "lastname": "b", "email": "a@b" });
    assert_eq!(shop.put_as(&token, "info/person", person).await, invalid);
}

// Keys.

#[tokio::test]
async fn keys_are_private_and_tokens_survive_a_restart() {
    let shop = Shop::new().await;
    let pair = shop.sign_up(1).await;
    let keys = shop.account.keys();
    let files = || shop.place.key_files();
    assert_eq!(files().count(), 1);
    assert_eq!(fs::metadata(files().next().unwrap()).unwrap().permissions().mode() & 0o7777, 0o600);

    let shop = shop.restart().await;
    assert_eq!(shop.account.keys(), keys);
    assert_eq!(shop.get_as(&pair.access, "info/person").await.0, 200);
    assert_eq!(shop.refresh(&pair.refresh).await.0, 200);
    shop.log_in(1).await;
}

#[tokio::test]
async fn after_a_rotation_old_tokens_still_count_and_new_ones_have_the_new_key() {
    let shop = Shop::new().await;
    let old = shop.sign_up(1).await.access;
    let later = Clock::from_fn(|| NOW_MILLIS + 1);
    account::rotate_keys(&shop.place.keys(), &later, &Random::secure()).unwrap();
    let shop = shop.restart().await;
    let kid = |token: &str| jsonwebtoken::decode_header(token).unwrap().kid.unwrap();
    assert_eq!(kid(&old), kid(&shop.log_in(1).await.access), "the new key is not known everywhere yet");
    shop.advance_seconds(account::PUBLISHED_FIRST.as_secs() + 1);
    let new = shop.log_in(1).await.access;
    assert_ne!(kid(&old), kid(&new));
    assert_eq!(shop.get_as(&old, "info/person").await.0, 200);
    assert_eq!(shop.get_as(&new, "info/person").await.0, 200);
    let request = Request::get("/.well-known/jwks.json").body(Body::empty()).unwrap();
    let response = shop.router.clone().oneshot(request).await.unwrap();
    assert_eq!(
        (response.status().as_u16(), &response.headers()["cache-control"]),
        (200, &HeaderValue::from_static("no-cache"))
    );
    let body = response.into_body().collect().await.unwrap().to_bytes();
    let published = serve::KeySet::from_jwks(&serde_json::from_slice(&body).unwrap());
    assert_eq!(published, shop.account.keys());
    assert_eq!(published.keys().len(), 2);
}

#[tokio::test]
async fn a_key_that_others_may_read_stops_the_start() {
    let place = Place::new();
    let millis = Arc::new(AtomicU64::new(NOW_MILLIS));
    let (db, account) = open(&place, &millis, unlimited()).await;
    drop(account);
    db.close().await;
    let file = place.key_files().next().unwrap();
    fs::set_permissions(&file, fs::Permissions::from_mode(0o604)).unwrap();
    let (_, account) = open(&place, &millis, unlimited()).await;
    let Err(error) = account else { panic!("it started") };
    assert!(matches!(error, StartError::Keys(account::KeyError::Mode { mode: 0o604, .. })), "{error}");
}

#[tokio::test]
async fn a_life_of_no_time_is_refused_at_start() {
    let place = Place::new();
    let millis = Arc::new(AtomicU64::new(NOW_MILLIS));
    let (_, account) = open(&place, &millis, Config { access_token_seconds: 0, ..unlimited() }).await;
    let Err(error) = account else { panic!("it started") };
    assert_eq!(error.to_string(), "account: access_token_seconds = 0: must be at least 1");
}

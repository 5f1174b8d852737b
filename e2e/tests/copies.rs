//! Two replicas of account, product, order and payment on one MariaDB, sharing copies in Redis: whatever becomes of Redis, nobody is
//! shown less than is there, anything that is older than what was shown before, or anything that is somebody else's.

#![allow(clippy::unwrap_used, reason = "a test panics where something is not as it should be")]

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use bus::{Bus, Consumer, Envelope, EnvelopeId, Limits, Subject};
use cache::Redis;
use db::{Db, Value};
use http::Request;
use http_body_util::BodyExt;
use saga::{Entry, Mode, Outcome, Phase, StepIndex, Token};
use serde_json::{Value as Json, json};
use serve::auth::{Realm, Verifier};
use serve::random::Random;
use servers::{Proxy, unique_name};
use shop::calls::{CheckProducts, GetProducts};
use shop::purchase::{
    INVENTORY_COMMANDS, ORCHESTRATOR, ORDER_COMMANDS, PAYMENT_COMMANDS, PURCHASE_SAGA, PURCHASE_SAGA_VERSION,
    Purchase, PurchasedItem,
};
use telemetry::{PubsubMetrics, Registry};
use testkit::TempDir;
use tokio_util::sync::{CancellationToken, DropGuard};
use tower::ServiceExt as _;
use wire::messages::{self, About, Carried, Command, Recorded, ToOrchestrator, ToParticipant};
use wire::time::Clock;

/// How long something may take that has to happen. Only a failing test waits as long.
const PATIENCE: Duration = Duration::from_secs(60);

/// What the replicas have in common.
struct Place {
    databases: Arc<[servers::Database; 4]>,
    keys: TempDir,
    bus: Bus,
    /// The beginning of their keys in Redis.
    prefix: String,
}

impl Place {
    async fn new() -> Place {
        let creating = || std::array::from_fn(|_| servers::shared::mariadb().database().unwrap());
        let databases = tokio::task::spawn_blocking(creating).await.unwrap();
        Place {
            databases: Arc::new(databases),
            keys: TempDir::new(),
            bus: Bus::embedded(Limits::default()),
            prefix: unique_name(),
        }
    }

    async fn redis(&self, urls: &str, command_timeout: Duration) -> Redis {
        let mut settings = cache::redis::Settings::parse(urls).unwrap();
        settings.prefix.clone_from(&self.prefix);
        settings.command_timeout = command_timeout;
        let redis = Redis::connect(settings);
        assert!(redis.wait_until_up(PATIENCE).await, "{urls} does not answer");
        redis
    }

    async fn open(&self, number: usize, name: &'static str, migrations: &'static [db::Migration]) -> Db {
        let settings = db::mysql::Settings::new(self.databases[number].url(), name);
        tokio::task::spawn_blocking(move || Db::connect(settings, migrations).unwrap()).await.unwrap()
    }

    /// Starts a replica; its participants run if it `sells`.
    async fn replica(&self, redis: Redis, sells: bool) -> Replica {
        let account = self.open(0, "account", account::MIGRATIONS).await;
        let product = self.open(1, "product", product::MIGRATIONS).await;
        let order = self.open(2, "order", order::MIGRATIONS).await;
        let payment = self.open(3, "payment", payment::MIGRATIONS).await;
        let (bus, clock) = (self.bus.clone(), Clock::system());
        let metrics = || PubsubMetrics::new(&Registry::new(), "test");
        let settings = participant::Settings::default();
        let account = account::start(account::Parts {
            db: account,
            redis: Some(redis.clone()),
            clock: clock.clone(),
            random: Random::secure(),
            registry: Registry::new(),
            key_dir: self.keys.path().join("keys"),
            realm: Realm::default(),
            config: account::Config::default(),
        })
        .await
        .unwrap();
        let verifier = account.verifier();
        let product_service = product::start(product::Parts {
            db: product.clone(),
            cache: product::ProductCache::new(),
            redis: Some(redis.clone()),
            bus: bus.clone(),
            clock: clock.clone(),
            write: product::CatalogWrite::Open,
            book: drive::Book::new(),
            metrics: metrics(),
            spans: telemetry::Spans::off(),
            settings,
        })
        .await
        .unwrap();
        let (check, details) = (product_service.check_products(), product_service.get_products());
        let orders = order::Parts {
            db: order.clone(),
            copies: Some(order::Copies::new(redis.clone(), &order, clock.clone(), Duration::ZERO)),
            bus: bus.clone(),
            clock: clock.clone(),
            verifier: verifier.clone(),
            products: details.clone(),
            book: drive::Book::new(),
            metrics: metrics(),
            spans: telemetry::Spans::off(),
            settings,
        };
        let payments = payment::Parts {
            db: payment.clone(),
            copies: Some(payment::Copies::new(redis.clone())),
            bus: bus.clone(),
            clock,
            verifier: verifier.clone(),
            limit: i64::MAX,
            book: drive::Book::new(),
            metrics: metrics(),
            spans: telemetry::Spans::off(),
            settings,
        };
        let router = account
            .router()
            .merge(product_service.router())
            .merge(order::router(&orders))
            .merge(payment::router(&payments));
        let stop = CancellationToken::new();
        if sells {
            tokio::spawn(product_service.run(stop.clone()));
            tokio::spawn(order::run(orders, stop.clone()));
            tokio::spawn(payment::run(payments, stop.clone()));
        }
        Replica { router, check, details, verifier, order, payment, _stop: Arc::new(stop.drop_guard()) }
    }
}

#[derive(Clone)]
struct Replica {
    router: Router,
    check: CheckProducts,
    details: GetProducts,
    verifier: Verifier,
    order: Db,
    payment: Db,
    _stop: Arc<DropGuard>,
}

impl Replica {
    async fn send(&self, method: &str, path: &str, token: Option<&str>, body: Json) -> (u16, Json) {
        let mut request = Request::builder().method(method).uri(path);
        if let Some(token) = token {
            request = request.header("authorization", format!("bearer {token}"));
        }
        let body = if body.is_null() { Body::empty() } else { Body::from(body.to_string()) };
        let response = self.router.clone().oneshot(request.body(body).unwrap()).await.unwrap();
        let status = response.status().as_u16();
        let body = response.into_body().collect().await.unwrap().to_bytes();
        (status, serde_json::from_slice(&body).unwrap())
    }

    async fn get(&self, path: &str, token: Option<&str>) -> (u16, Json) {
        self.send("GET", path, token, Json::Null).await
    }

    async fn create_product(&self, inventory: i64) -> u64 {
        let body = json!({
            "name": "lamp", "description": "gives light", "brand_name": "Sol", "price": 30, "inventory": inventory,
        });
        let (status, created) = self.send("POST", "/api/product", None, body).await;
        assert_eq!(status, 201, "{created}");
        created["id"].as_u64().unwrap()
    }

    async fn left(&self, id: u64) -> i64 {
        let (status, product) = self.get(&format!("/api/product/{id}"), None).await;
        assert_eq!(status, 200, "{product}");
        assert_eq!((&product["name"], &product["price"]), (&json!("lamp"), &json!(30)));
        product["inventory"].as_i64().unwrap()
    }

    /// As the catalogue's pages say, which are read from the database.
    async fn listed(&self, id: u64) -> i64 {
        let (status, page) = self.get("/api/products?size=500", None).await;
        assert_eq!(status, 200, "{page}");
        let lines = page["catalogs"].as_array().unwrap();
        lines.iter().find(|line| line["id"] == id).unwrap()["inventory"].as_i64().unwrap()
    }

    /// A new customer's token and id.
    async fn sign_up(&self) -> (String, u64) {
        let unique = unique_name();
        let digits: String = unique.bytes().map(|byte| char::from(b'0' + byte % 10)).collect();
        let body = json!({
            "password": "correct horse", "firstname": "Ada", "lastname": "L", "email": format!("{unique}@example.org"),
            "address": "1 Main Street", "phone_number": format!("+49{}", &digits[digits.len() - 10..]),
        });
        let (status, tokens) = self.send("POST", "/api/account/auth/signup", None, body).await;
        assert_eq!(status, 201, "{tokens}");
        let token = tokens["access_token"].as_str().unwrap().to_owned();
        let id = self.verifier.verify(&token).unwrap().customer_id;
        (token, id)
    }
}

/// An orchestrator's part, as far as these tests need one.
struct Commands {
    bus: Bus,
    replies: Consumer,
}

impl Commands {
    fn new(place: &Place) -> Commands {
        Commands { bus: place.bus.clone(), replies: place.bus.subscribe(ORCHESTRATOR) }
    }

    /// Commands a step of a purchase of one lamp, and waits for the reply.
    async fn command(
        &mut self,
        saga: u64,
        step: u8,
        phase: Phase,
        customer_id: u64,
        product_id: u64,
    ) -> Outcome {
        let purchase = Purchase {
            customer_id,
            items: vec![PurchasedItem { product_id, amount: 1, price: 30 }],
            currency_code: "NT".to_owned(),
            total: 30,
        };
        let done = |step| Entry { step: StepIndex(step), outcome: Outcome::Done(Vec::new()), at: 1 };
        let (mode, steps) = match phase {
            Phase::Compensation => (Mode::Execute, step + 1),
            _ => (Mode::Execute, step),
        };
        let carried = Carried {
            token: Token { saga, mode, path: (0..steps).map(done).collect() },
            about: About::new(PURCHASE_SAGA, PURCHASE_SAGA_VERSION, 1, &purchase.to_input(), b""),
        };
        let command = ToParticipant::Command(Command { carried, step: StepIndex(step), phase });
        let subject = [INVENTORY_COMMANDS, ORDER_COMMANDS, PAYMENT_COMMANDS][usize::from(step)];
        self.publish(subject, Envelope { id: EnvelopeId::of(saga, phase as u64), body: command.encode() })
            .await;
        loop {
            let batch =
                tokio::time::timeout(PATIENCE, self.replies.next(100)).await.expect("a reply").unwrap();
            let replies: Vec<_> = batch
                .deliveries()
                .iter()
                .map(|delivery| ToOrchestrator::decode(delivery.envelope.body.clone()).unwrap())
                .collect();
            batch.ack_all().await.unwrap();
            for reply in replies {
                let ToOrchestrator::Reply(reply) = reply else { panic!("a service starts a saga") };
                if reply.carried.token.saga == saga {
                    return Recorded::decode(&reply.recorded).unwrap().outcome;
                }
            }
        }
    }

    async fn publish(&self, subject: Subject, envelope: Envelope) {
        self.bus.publish(subject, vec![envelope]).await.unwrap();
    }
}

/// Sessions that ask both replicas and the catalogue's pages, and know what the others were shown.
struct Watchers {
    lowest: Arc<AtomicI64>,
    stop: Arc<AtomicBool>,
    tasks: Vec<tokio::task::JoinHandle<()>>,
}

impl Watchers {
    fn start(one: &Replica, two: &Replica, id: u64) -> Watchers {
        let (lowest, stop) = (Arc::new(AtomicI64::new(i64::MAX)), Arc::new(AtomicBool::new(false)));
        let tasks = (0..3).map(|number| {
            let (one, two, lowest, stop) = (one.clone(), two.clone(), lowest.clone(), stop.clone());
            tokio::spawn(async move {
                for round in number.. {
                    if stop.load(Ordering::SeqCst) {
                        return;
                    }
                    let before = lowest.load(Ordering::SeqCst);
                    let (shown, by) = match round % 5 {
                        0 | 2 => (one.left(id).await, "a replica"),
                        1 | 3 => (two.left(id).await, "the other replica"),
                        _ => (one.listed(id).await, "the catalogue"),
                    };
                    assert!(shown <= before, "{shown} are shown by {by}, and {before} were before");
                    lowest.fetch_min(shown, Ordering::SeqCst);
                }
            })
        });
        Watchers { tasks: tasks.collect(), lowest, stop }
    }

    /// A client was told that so many are left.
    fn told(&self, left: i64) {
        self.lowest.fetch_min(left, Ordering::SeqCst);
    }

    async fn finish(self) {
        self.stop.store(true, Ordering::SeqCst);
        for task in self.tasks {
            task.await.expect("nobody is shown an older amount");
        }
    }
}

/// Sells one after the other, each told to the sessions; `disturb` comes in the middle of each round.
async fn sell_under(
    place: &Place,
    (one, two): (&Replica, &Replica),
    disturb: impl AsyncFn(usize),
    rounds: usize,
) {
    const STOCK: i64 = 100_000;
    let id = one.create_product(STOCK).await;
    let watchers = Watchers::start(one, two, id);
    let (mut commands, mut left) = (Commands::new(place), STOCK);
    for round in 0..rounds {
        for time in 0..40 {
            if time == 20 {
                disturb(round).await;
            }
            let saga = u64::try_from(STOCK - left).unwrap() + 1;
            let outcome = commands.command(saga, 0, Phase::Action, 7, id).await;
            assert_eq!(outcome, Outcome::Done(Vec::new()));
            left -= 1;
            watchers.told(left);
            assert_eq!((one.left(id).await, two.left(id).await), (left, left));
        }
    }
    watchers.finish().await;
    assert_eq!((one.left(id).await, two.left(id).await, two.listed(id).await), (left, left, left));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn no_amount_comes_back_while_both_replicas_sell_and_redis_is_emptied() {
    let place = Place::new().await;
    let server = servers::Redis::start().unwrap();
    let one = place.replica(place.redis(&server.url(), Duration::from_secs(2)).await, true).await;
    let two = place.replica(place.redis(&server.url(), Duration::from_secs(2)).await, true).await;
    sell_under(&place, (&one, &two), async |_| server.flush_all().unwrap(), 3).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn no_amount_comes_back_when_a_primary_of_the_cluster_dies() {
    let place = Place::new().await;
    let cluster = servers::RedisCluster::start().unwrap();
    let urls = cluster.urls().join(",");
    let one = place.replica(place.redis(&urls, Duration::from_millis(500)).await, true).await;
    let two = place.replica(place.redis(&urls, Duration::from_millis(500)).await, true).await;
    // Every primary once, whichever has the product.
    let kill = async |_| {
        cluster.wait_until_ready().unwrap();
        cluster.primaries().unwrap()[0].kill().unwrap();
        cluster.restart().unwrap();
    };
    sell_under(&place, (&one, &two), kill, 3).await;
}

/// The replica that sells cannot reach Redis, and the one that is asked can.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn no_amount_comes_back_when_redis_is_cut_off_from_the_selling_replica() {
    let place = Place::new().await;
    let server = servers::Redis::start().unwrap();
    let proxy = Proxy::start(server.socket_addr()).unwrap();
    let through = format!("redis://{}", proxy.socket_addr());
    let seller = place.replica(place.redis(&through, Duration::from_millis(300)).await, true).await;
    let other = place.replica(place.redis(&server.url(), Duration::from_secs(2)).await, false).await;
    let disturb = async |round| match round % 3 {
        0 => proxy.stall().unwrap(),
        1 => {
            proxy.heal().unwrap();
            proxy.drop_connections();
        }
        _ => proxy.cut(),
    };
    sell_under(&place, (&seller, &other), disturb, 3).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn what_is_created_at_one_replica_is_there_at_the_other() {
    let place = Place::new().await;
    let urls = servers::shared::redis_cluster().join(",");
    let one = place.replica(place.redis(&urls, Duration::from_secs(2)).await, false).await;
    let two = place.replica(place.redis(&urls, Duration::from_secs(2)).await, false).await;
    let mut all = Vec::new();
    for number in 0..50 {
        let (creator, other) = if number % 2 == 0 { (&one, &two) } else { (&two, &one) };
        let id = creator.create_product(5).await;
        assert_eq!(other.left(id).await, 5);
        assert_eq!(other.get(&format!("/api/product/{}", id + 1_000_000), None).await.0, 404);
        all.push(id);
    }
    let unknown = 3;
    for replica in [&one, &two] {
        let asked: Vec<u64> = all.iter().copied().chain([unknown]).collect();
        let prices = replica.check.ask(asked.clone()).await.unwrap();
        assert_eq!(prices.iter().filter(|price| **price == Some(30)).count(), 50);
        assert_eq!(prices.last(), Some(&None));
        assert_eq!(replica.details.ask(asked).await.unwrap().len(), 50);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_customers_change_is_seen_at_every_replica_at_once() {
    let place = Place::new().await;
    let server = servers::Redis::start().unwrap();
    let proxy = Proxy::start(server.socket_addr()).unwrap();
    let through = format!("redis://{}", proxy.socket_addr());
    let one = place.replica(place.redis(&through, Duration::from_millis(300)).await, false).await;
    let two = place.replica(place.redis(&server.url(), Duration::from_secs(2)).await, false).await;
    let (token, _) = one.sign_up().await;
    let (_, person) = one.get("/api/account/info/person", Some(&token)).await;
    for number in 0..60 {
        match number {
            20 => proxy.stall().unwrap(),
            35 => proxy.heal().unwrap(),
            45 => server.flush_all().unwrap(),
            50 => proxy.cut(),
            _ => {}
        }
        // Once reads are answered by copies, changes come from the replica that may have lost Redis.
        let mut changed = person.clone();
        changed["firstname"] = json!(format!("Ada {number}"));
        let (status, answer) =
            one.send("PUT", "/api/account/info/person", Some(&token), changed.clone()).await;
        assert_eq!(status, 200, "{answer}");
        for _ in 0..3 {
            for replica in [&two, &one] {
                assert_eq!(
                    replica.get("/api/account/info/person", Some(&token)).await,
                    (200, changed.clone())
                );
            }
        }
        let shipping = json!({"address": format!("{number} Main Street"), "phone_number": "+491234567890"});
        assert_eq!(
            two.send("PUT", "/api/account/info/shipping", Some(&token), shipping.clone()).await.0,
            200
        );
        assert_eq!(one.get("/api/account/info/shipping", Some(&token)).await, (200, shipping));
        assert_eq!(one.get("/api/account/info/person", Some(&token)).await, (200, changed));
    }
}

/// Takes a row away behind a service's back and puts it there again: what is answered meanwhile is a copy.
async fn while_gone<T>(
    db: &Db,
    take: &'static str,
    put: &'static str,
    id: u64,
    answer: impl Future<Output = T>,
) -> T {
    let change = async |sql: &'static str| {
        assert_eq!(db.write(move |tx| tx.execute(sql, &[Value::from(id)])).await, Ok(1));
    };
    change(take).await;
    let answer = answer.await;
    change(put).await;
    answer
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_payment_is_copied_and_shown_to_its_customer_alone() {
    let place = Place::new().await;
    let redis = place.redis(servers::shared::redis(), Duration::from_secs(2)).await;
    let one = place.replica(redis.clone(), true).await;
    let two = place.replica(redis, false).await;
    let ((own, customer), (others, _)) = (one.sign_up().await, two.sign_up().await);
    let paid = (200, json!({"id": 5, "currency_code": "NT", "amount": 30}));
    assert_eq!(one.get("/api/payment/5", Some(&own)).await.0, 404);
    let outcome = Commands::new(&place).command(5, 2, Phase::Action, customer, 9).await;
    assert_eq!(outcome, Outcome::Done(Vec::new()));
    assert_eq!(one.get("/api/payment/5", Some(&own)).await, paid, "that there was none is not remembered");
    let shown = |replica: &Replica, token: &str| {
        let (replica, token) = (replica.clone(), token.to_owned());
        async move { replica.get("/api/payment/5", Some(&token)).await }
    };
    let without = async |replica: &Replica, token: &str| {
        let take = "UPDATE payment SET id = id + 1000 WHERE id = ?";
        let put = "UPDATE payment SET id = id - 1000 WHERE id = ? + 1000";
        while_gone(&one.payment, take, put, 5, shown(replica, token)).await
    };
    // The first one has a copy of its own, the other one is told by Redis.
    for replica in [&one, &two] {
        assert_eq!(without(replica, &others).await.0, 404, "it is nobody else's");
        let copied = async { while without(replica, &own).await != paid {} };
        tokio::time::timeout(PATIENCE, copied).await.expect("it is answered from a copy");
        assert_eq!(without(replica, &others).await.0, 404, "it is nobody else's");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn an_order_is_copied_once_nothing_can_undo_it() {
    let place = Place::new().await;
    let redis = place.redis(servers::shared::redis(), Duration::from_secs(2)).await;
    let one = place.replica(redis.clone(), true).await;
    let ((own, customer), (others, _)) = (one.sign_up().await, one.sign_up().await);
    let product = one.create_product(5).await;
    let mut commands = Commands::new(&place);
    for order in [5, 6] {
        let outcome = commands.command(order, 1, Phase::Action, customer, product).await;
        assert_eq!(outcome, Outcome::Done(Vec::new()));
        let (status, shown) = one.get(&format!("/api/order/{order}"), Some(&own)).await;
        assert_eq!((status, &shown["purchased_items"][0]["name"]), (200, &json!("lamp")));
    }
    // It was shown, and the purchase is rolled back.
    assert_eq!(commands.command(6, 1, Phase::Compensation, customer, product).await, Outcome::Compensated);
    assert_eq!(one.get("/api/order/6", Some(&own)).await.0, 404);

    // Now every saga below 7 has ended, for good.
    commands
        .publish(ORDER_COMMANDS, Envelope { id: EnvelopeId::of(7, u64::MAX), body: messages::purge(7) })
        .await;
    let written = async {
        let mark = || one.order.read(|tx| cache::mark::Mark::EndedBelow.read(tx));
        while mark().await != Ok(7) {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(PATIENCE, written).await.expect("a replica writes it down");
    let two = place.replica(redis, false).await;
    let without_row = async |token: &str| {
        let take = "UPDATE purchase_order SET id = id + 1000 WHERE id = ?";
        let put = "UPDATE purchase_order SET id = id - 1000 WHERE id = ? + 1000";
        while_gone(&two.order, take, put, 5, two.get("/api/order/5", Some(token))).await.0
    };
    let copied = async {
        // It reads the mark in the background, and keeps a copy of what it shows after that.
        while without_row(&own).await != 200 {
            assert_eq!(two.get("/api/order/5", Some(&own)).await.0, 200);
        }
    };
    tokio::time::timeout(PATIENCE, copied).await.expect("it is copied");
    assert_eq!(without_row(&others).await, 404, "it is nobody else's");
    assert_eq!(two.get("/api/order/6", Some(&own)).await.0, 404);
}

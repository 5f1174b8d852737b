//! The services, put together as `app/src/assemble.rs` does it, with every part in the hands of the test.

mod replicas;

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use aws_lc_rs::encoding::{AsDer, Pkcs8V2Der};
use aws_lc_rs::signature::{Ed25519KeyPair, KeyPair};
use axum::Router;
use bus::{Bus, Limits};
use db::Db;
use drive::{Book, Bounds};
use jsonwebtoken::{Algorithm, EncodingKey, Header};
use serve::auth::{KeySet, PublicKey, Realm, TOKEN_TYPE, Verifier};
use serve::random::Random;
use shop::purchase::{
    INVENTORY_COMMANDS, ORCHESTRATOR, ORDER_COMMANDS, PAYMENT_COMMANDS, PURCHASE_PROGRESS, PurchaseStep,
    purchase_saga,
};
use telemetry::{PubsubMetrics, Registry};
use testdb::TestDb;
use testkit::TempDir;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use crate::api::{Api, Customer};
use crate::clock::TestClock;
use crate::courier::{Courier, Line};
use crate::herald::Herald;

/// How the services reach each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wiring {
    /// All share one embedded bus, as in the binary.
    OneBus,
    /// Each has a bus of its own, and a [`Courier`] carries every message.
    Carried,
}

/// Who starts a saga, and drives it on when a reply has been recorded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Drivers {
    /// The purchase service, and the participant that has recorded the reply: as in the binary.
    Participants,
    /// An orchestrator that is told of both, as with sagas that the others do not know.
    Orchestrators,
    /// An orchestrator where the reply is about an order, else as in the binary: as between two versions.
    Both,
}

impl Drivers {
    /// All of them.
    pub const ALL: [Drivers; 3] = [Drivers::Participants, Drivers::Orchestrators, Drivers::Both];

    /// The book of a participant.
    fn book_of(self, part: Part) -> Book {
        match (self, part) {
            (_, Part::Orchestrator) | (Drivers::Participants, _) => book(),
            (Drivers::Orchestrators, _) | (Drivers::Both, Part::Orders) => Book::new(),
            (Drivers::Both, Part::Stock | Part::Payments) => book(),
        }
    }

    /// The book of the purchase service.
    fn book_of_purchases(self) -> Book {
        match self {
            Drivers::Participants | Drivers::Both => book(),
            Drivers::Orchestrators => Book::new(),
        }
    }
}

/// The sagas of the shop.
fn book() -> Book {
    Book::new().with(purchase_saga(), PurchaseStep::commands, PURCHASE_PROGRESS)
}

/// A part that takes messages, and can be started and stopped while the shop is open.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Part {
    /// Reserves stock.
    Stock,
    /// Creates orders.
    Orders,
    /// Takes payments.
    Payments,
    /// Drives sagas.
    Orchestrator,
}

/// All of them.
const PARTS: [Part; 4] = [Part::Stock, Part::Orders, Part::Payments, Part::Orchestrator];

/// What a shop under test is made of.
#[derive(Clone, Debug)]
pub struct Settings {
    /// The purchase service's settings.
    pub purchase: purchase::Config,
    /// The bounds of the bus, or of each bus.
    pub bus: Limits,
    /// How the services reach each other.
    pub wiring: Wiring,
    /// Who drives sagas on.
    pub drivers: Drivers,
    /// Replicas of each [`Part`] that are started with the shop; 0 starts none.
    pub replicas: usize,
    /// A payment above it is declined.
    pub payment_limit: i64,
    /// How long barrier rows are kept at least.
    pub barrier_retention: Duration,
    /// How news travel between replicas of the purchase service.
    pub news: News,
    /// Where the purchase service's database is. All others are files.
    pub purchases_on: PurchasesOn,
}

/// How news travel between replicas of the purchase service.
#[derive(Clone)]
pub enum News {
    /// They do not.
    Nowhere,
    /// By a herald.
    Herald(Herald),
    /// Through Redis.
    Redis(cache::Redis),
}

impl News {
    fn feed(&self) -> purchase::Feed {
        match self {
            News::Nowhere => purchase::Feed::None,
            News::Herald(herald) => herald.feed(),
            News::Redis(redis) => purchase::Feed::Redis(redis.clone()),
        }
    }
}

impl std::fmt::Debug for News {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            News::Nowhere => "Nowhere",
            News::Herald(_) => "Herald",
            News::Redis(_) => "Redis",
        })
    }
}

/// Where a database is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PurchasesOn {
    /// In the shop's folder.
    File,
    /// On the server that all tests share.
    MariaDb,
}

impl Default for Settings {
    /// One replica of each part on one bus, a reconciler that looks all the time, barrier rows for a day.
    fn default() -> Settings {
        Settings {
            purchase: purchase::Config {
                look_interval: Duration::from_millis(5),
                purge_interval: Duration::from_secs(3_600),
                ..purchase::Config::default()
            },
            bus: Limits::default(),
            wiring: Wiring::OneBus,
            drivers: Drivers::Participants,
            replicas: 1,
            payment_limit: 1_000_000,
            barrier_retention: Duration::from_secs(24 * 60 * 60),
            news: News::Nowhere,
            purchases_on: PurchasesOn::File,
        }
    }
}

/// The databases, one a service.
#[derive(Clone)]
pub(crate) struct Databases {
    pub(crate) product: Db,
    pub(crate) order: Db,
    pub(crate) payment: Db,
    pub(crate) purchase: Db,
}

/// The bus of each service: the same one, or one each.
#[derive(Clone, Debug)]
struct Buses {
    purchase: Bus,
    orchestrator: Bus,
    stock: Bus,
    orders: Bus,
    payments: Bus,
}

/// A running replica, or any task that ends when it is told to.
struct Running {
    stop: CancellationToken,
    task: JoinHandle<()>,
}

impl Running {
    async fn stop(self) {
        self.stop.cancel();
        self.task.await.expect("a part has panicked");
    }
}

/// A database whose writes wait until this is dropped.
#[derive(Debug)]
pub struct HeldWrites {
    _release: std::sync::mpsc::Sender<()>,
}

/// The purchase service, which can be restarted alone.
struct Purchases {
    api: Api,
    registry: Registry,
    streams: CancellationToken,
    stop: CancellationToken,
    tasks: Vec<JoinHandle<()>>,
}

impl Purchases {
    /// Ends it, with its work done.
    async fn stop(self) {
        let Purchases { api, streams, stop, tasks, .. } = self;
        streams.cancel();
        stop.cancel();
        drop(api);
        for task in tasks {
            task.await.expect("a task of the purchase service has panicked");
        }
    }

    /// Ends it in the middle of whatever it does.
    fn kill(self) {
        self.tasks.iter().for_each(JoinHandle::abort);
        self.streams.cancel();
        self.stop.cancel();
    }

    /// The value of a metric; of one with labels, its name is that in braces.
    fn metric(&self, name: &str) -> f64 {
        let text = self.registry.encode().unwrap();
        let value = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        value.unwrap_or_else(|| panic!("there is no metric {name} in:\n{text}")).parse().unwrap()
    }
}

/// An open shop.
pub struct Shop {
    /// Copies of products, shared by all who sell.
    copies: product::ProductCache,
    /// The time in it.
    pub clock: TestClock,
    /// Its settings.
    pub settings: Settings,
    pub(crate) databases: Databases,
    pub(crate) initial_stock: Arc<Mutex<BTreeMap<u64, i64>>>,
    pub(crate) accepted: Arc<Mutex<BTreeMap<u64, u64>>>,
    buses: Buses,
    courier: Option<Courier>,
    verifier: Verifier,
    mint: Mint,
    front: product::ProductService,
    purchases: Option<Purchases>,
    /// Its database, if it is on a server.
    on_server: Option<TestDb>,
    /// Further replicas of it.
    others: Vec<Option<(Purchases, Db)>>,
    running: Vec<(Part, Running)>,
    stop: CancellationToken,
    // Last, so that it is removed when nothing uses it any more.
    folder: TempDir,
}

impl Shop {
    /// Opens a shop on empty databases.
    pub async fn open(settings: Settings) -> Shop {
        let folder = TempDir::new();
        let clock = TestClock::new();
        let stop = CancellationToken::new();
        let on_server = match settings.purchases_on {
            PurchasesOn::File => None,
            PurchasesOn::MariaDb => Some(TestDb::mariadb()),
        };
        let databases = Databases {
            product: open(&folder, "product", product::MIGRATIONS),
            order: open(&folder, "order", order::MIGRATIONS),
            payment: open(&folder, "payment", payment::MIGRATIONS),
            purchase: open_purchases(on_server.as_ref(), &folder),
        };
        let (buses, courier) = wire(&settings, &stop);
        let mint = Mint::new();
        let verifier = Verifier::new(&KeySet::new([mint.public.clone()]), &Realm::default(), clock.clock());
        let copies = product::ProductCache::new();
        let front = product_service(&settings, &databases.product, &copies, &buses.stock, &clock).await;
        let mut shop = Shop {
            copies,
            clock,
            settings,
            databases,
            initial_stock: Arc::default(),
            accepted: Arc::default(),
            buses,
            courier,
            verifier,
            mint,
            front,
            purchases: None,
            on_server,
            others: Vec::new(),
            running: Vec::new(),
            stop,
            folder,
        };
        shop.start_purchases().await;
        for part in PARTS {
            for _ in 0..shop.settings.replicas {
                shop.start(part).await;
            }
        }
        shop
    }

    /// A client of its doors.
    pub fn api(&self) -> Api {
        self.purchases.as_ref().unwrap().api.clone()
    }

    /// A customer with a token of ten years.
    pub fn customer(&self, id: u64) -> Customer {
        Customer { id, token: self.mint.token(id, self.clock.now() / 1000 + 10 * 365 * 86_400) }
    }

    /// The bus, where there is one.
    pub fn bus(&self) -> &Bus {
        assert_eq!(self.settings.wiring, Wiring::OneBus, "this shop has several buses");
        &self.buses.purchase
    }

    /// The bus that a part takes its messages from.
    pub fn bus_of(&self, part: Part) -> &Bus {
        match part {
            Part::Stock => &self.buses.stock,
            Part::Orders => &self.buses.orders,
            Part::Payments => &self.buses.payments,
            Part::Orchestrator => &self.buses.orchestrator,
        }
    }

    /// The courier, where there is one.
    pub fn courier(&self) -> &Courier {
        self.courier.as_ref().expect("this shop has one bus and no courier")
    }

    /// Everything that is under way anywhere is lost.
    pub async fn lose_all_messages(&self) {
        let Buses { purchase, orchestrator, stock, orders, payments } = &self.buses;
        for bus in [purchase, orchestrator, stock, orders, payments] {
            bus.clear().await.expect("a bus in memory forgets whenever it is told to");
        }
        if let Some(courier) = &self.courier {
            courier.forget();
        }
    }

    /// The bus that the purchase service takes its messages from.
    pub fn bus_of_purchases(&self) -> &Bus {
        &self.buses.purchase
    }

    /// The dead letters of all buses.
    pub async fn parked(&self) -> Vec<bus::Parked> {
        let Buses { purchase, orchestrator, stock, orders, payments } = &self.buses;
        let buses = match self.settings.wiring {
            Wiring::OneBus => vec![purchase],
            Wiring::Carried => vec![purchase, orchestrator, stock, orders, payments],
        };
        let mut parked = Vec::new();
        for bus in buses {
            parked.extend(bus.parked().await.expect("an embedded bus"));
        }
        parked
    }

    /// The value of one of the purchase service's metrics that has no labels.
    pub fn metric(&self, name: &str) -> f64 {
        self.purchases.as_ref().unwrap().metric(name)
    }

    /// From now on, whatever the purchase service writes waits.
    pub async fn hold_purchase_writes(&self) -> HeldWrites {
        hold_writes(&self.databases.purchase).await
    }

    /// From now on, whatever is written to the products waits, for every process.
    pub async fn hold_stock_writes(&self) -> HeldWrites {
        hold_writes(&self.databases.product).await
    }

    /// How many of the purchase service's writes wait.
    pub fn waiting_purchase_writes(&self) -> usize {
        self.databases.purchase.stats().queued_writes
    }

    /// Starts one more replica of a part.
    pub async fn start(&mut self, part: Part) {
        let database = match part {
            Part::Stock => self.databases.product.clone(),
            Part::Orders => self.databases.order.clone(),
            Part::Payments => self.databases.payment.clone(),
            Part::Orchestrator => self.databases.purchase.clone(),
        };
        self.start_on(part, database).await;
    }

    /// Starts one more replica of a part, with connections of its own to the part's database: as another process has.
    pub async fn start_apart(&mut self, part: Part) {
        let database = match part {
            Part::Stock => open(&self.folder, "product", product::MIGRATIONS),
            Part::Orders => open(&self.folder, "order", order::MIGRATIONS),
            Part::Payments => open(&self.folder, "payment", payment::MIGRATIONS),
            Part::Orchestrator => panic!("an orchestrator has no database"),
        };
        self.start_on(part, database).await;
    }

    async fn start_on(&mut self, part: Part, db: Db) {
        let (bus, clock, stop) = (self.bus_of(part).clone(), self.clock.clock(), self.stop.child_token());
        let metrics = PubsubMetrics::new(&Registry::new(), "test");
        let settings = participant_settings(&self.settings);
        let verifier = self.verifier.clone();
        let task = match part {
            Part::Stock => {
                let service = product_service(&self.settings, &db, &self.copies, &bus, &self.clock).await;
                tokio::spawn(service.run(stop.clone()))
            }
            Part::Orders => {
                let products = self.front.get_products();
                let parts = order::Parts {
                    db,
                    copies: None,
                    bus,
                    clock,
                    verifier,
                    products,
                    book: self.settings.drivers.book_of(part),
                    metrics,
                    spans: telemetry::Spans::off(),
                    settings,
                };
                tokio::spawn(order::run(parts, stop.clone()))
            }
            Part::Payments => {
                let limit = self.settings.payment_limit;
                let parts = payment::Parts {
                    db,
                    copies: None,
                    bus,
                    clock,
                    verifier,
                    limit,
                    book: self.settings.drivers.book_of(part),
                    metrics,
                    spans: telemetry::Spans::off(),
                    settings,
                };
                tokio::spawn(payment::run(parts, stop.clone()))
            }
            Part::Orchestrator => {
                let settings = orchestrator::Settings { bounds: BOUNDS, ..orchestrator::Settings::default() };
                let parts = orchestrator::Parts {
                    book: self.settings.drivers.book_of(part),
                    bus,
                    subject: ORCHESTRATOR,
                    metrics,
                    spans: telemetry::Spans::off(),
                    settings,
                };
                tokio::spawn(orchestrator::run(parts, stop.clone()))
            }
        };
        self.running.push((part, Running { stop, task }));
    }

    /// Stops every replica of a part, each with its batch finished.
    pub async fn stop(&mut self, part: Part) {
        let (stopped, others) =
            std::mem::take(&mut self.running).into_iter().partition(|(of, _)| *of == part);
        self.running = others;
        for (_, running) in stopped {
            running.stop().await;
        }
    }

    /// Restarts the purchase service on its database.
    pub async fn restart_purchases(&mut self) {
        self.stop_purchases().await;
        self.databases.purchase.close().await;
        self.databases.purchase = open_purchases(self.on_server.as_ref(), &self.folder);
        self.start_purchases().await;
    }

    /// Stops the purchase service. [`Api`]s of before keep it from ending, so there must be none.
    async fn stop_purchases(&mut self) {
        self.purchases.take().unwrap().stop().await;
    }

    async fn start_purchases(&mut self) {
        self.purchases = Some(self.purchases_on(&self.databases.purchase).await);
    }

    async fn purchases_on(&self, db: &Db) -> Purchases {
        let (streams, stop, registry) = (CancellationToken::new(), self.stop.child_token(), Registry::new());
        let (service, tasks) = purchase::start(purchase::Parts {
            config: self.settings.purchase.clone(),
            db: db.clone(),
            bus: self.buses.purchase.clone(),
            book: self.settings.drivers.book_of_purchases(),
            feed: self.settings.news.feed(),
            clock: self.clock.clock(),
            random: Random::secure(),
            verifier: self.verifier.clone(),
            products: self.front.check_products(),
            registry: registry.clone(),
            metrics: PubsubMetrics::new(&registry, "purchase"),
            spans: telemetry::Spans::off(),
            stop_streams: streams.clone(),
            stop: stop.clone(),
        })
        .await
        .unwrap();
        let order = order::Parts {
            copies: None,
            db: self.databases.order.clone(),
            bus: self.buses.orders.clone(),
            clock: self.clock.clock(),
            verifier: self.verifier.clone(),
            products: self.front.get_products(),
            book: Book::new(),
            metrics: PubsubMetrics::new(&registry, "order"),
            spans: telemetry::Spans::off(),
            settings: participant_settings(&self.settings),
        };
        let payment = payment::Parts {
            copies: None,
            db: self.databases.payment.clone(),
            bus: self.buses.payments.clone(),
            clock: self.clock.clock(),
            verifier: self.verifier.clone(),
            limit: self.settings.payment_limit,
            book: Book::new(),
            metrics: PubsubMetrics::new(&registry, "payment"),
            spans: telemetry::Spans::off(),
            settings: participant_settings(&self.settings),
        };
        let api = Router::new()
            .merge(self.front.router())
            .merge(order::router(&order))
            .merge(payment::router(&payment))
            .merge(service.router());
        let api = Api {
            router: api,
            operator: service.operator_router(),
            initial_stock: Arc::clone(&self.initial_stock),
            accepted: Arc::clone(&self.accepted),
        };
        let tasks = tasks.into_iter().map(|(_, task)| tokio::spawn(task)).collect();
        Purchases { api, registry, streams, stop, tasks }
    }

    /// Closes the shop: everything ends, and ended well.
    pub async fn close(mut self) {
        for part in PARTS {
            self.stop(part).await;
        }
        self.stop_others().await;
        self.stop_purchases().await;
        self.stop.cancel();
        let Databases { product, order, payment, purchase } = &self.databases;
        for db in [product, order, payment, purchase] {
            db.close().await;
        }
    }
}

impl Drop for Shop {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

async fn hold_writes(db: &Db) -> HeldWrites {
    let (begun, has_begun) = tokio::sync::oneshot::channel();
    let (release, released) = std::sync::mpsc::channel();
    let (db, mut begun) = (db.clone(), Some(begun));
    tokio::spawn(async move {
        let hold = move |_: &mut db::Tx<'_>| {
            if let Some(begun) = begun.take() {
                begun.send(()).unwrap();
            }
            // An error: it is dropped, and so released.
            let _ = released.recv();
            Ok::<(), db::Error>(())
        };
        db.write(hold).await.unwrap();
    });
    has_begun.await.unwrap();
    HeldWrites { _release: release }
}

/// Whatever is tried again in a test is tried again soon.
const BOUNDS: Bounds = Bounds {
    retry_delay_min: Duration::from_millis(1),
    retry_delay_max: Duration::from_millis(20),
    drop_after_deliveries: 8,
};

fn participant_settings(settings: &Settings) -> participant::Settings {
    participant::Settings {
        bounds: BOUNDS,
        barrier_retention: settings.barrier_retention,
        // What waits in a participant, nobody here could wait for.
        report_after: Duration::ZERO,
        ..participant::Settings::default()
    }
}

async fn product_service(
    settings: &Settings,
    db: &Db,
    cache: &product::ProductCache,
    bus: &Bus,
    clock: &TestClock,
) -> product::ProductService {
    product::start(product::Parts {
        db: db.clone(),
        cache: cache.clone(),
        redis: None,
        bus: bus.clone(),
        clock: clock.clock(),
        write: product::CatalogWrite::Open,
        book: settings.drivers.book_of(Part::Stock),
        metrics: PubsubMetrics::new(&Registry::new(), "product"),
        spans: telemetry::Spans::off(),
        settings: participant_settings(settings),
    })
    .await
    .unwrap()
}

/// The purchase service's database, through connections of its own.
fn open_purchases(on_server: Option<&TestDb>, folder: &TempDir) -> Db {
    match on_server {
        None => open(folder, "purchase", purchase::MIGRATIONS),
        Some(database) => database.open(purchase::MIGRATIONS),
    }
}

fn open(folder: &TempDir, name: &'static str, migrations: &'static [db::Migration]) -> Db {
    let path = folder.path().join(name).with_extension("db");
    Db::open(db::Settings::new(path, name), migrations).unwrap()
}

fn wire(settings: &Settings, stop: &CancellationToken) -> (Buses, Option<Courier>) {
    let new = || Bus::embedded(settings.bus);
    match settings.wiring {
        Wiring::OneBus => {
            let bus = new();
            let (purchase, orchestrator, stock, orders) =
                (bus.clone(), bus.clone(), bus.clone(), bus.clone());
            (Buses { purchase, orchestrator, stock, orders, payments: bus }, None)
        }
        Wiring::Carried => {
            let buses =
                Buses { purchase: new(), orchestrator: new(), stock: new(), orders: new(), payments: new() };
            let line = |subject, from: &Bus, to: &Bus| Line { subject, from: from.clone(), to: to.clone() };
            let Buses { purchase, orchestrator, stock, orders, payments } = &buses;
            let mut lines = Vec::new();
            for from in [purchase, stock, orders, payments] {
                lines.push(line(ORCHESTRATOR, from, orchestrator));
            }
            // Whoever drives sagas may say anything to anybody else.
            for from in [orchestrator, stock, orders, payments] {
                lines.push(line(PURCHASE_PROGRESS, from, purchase));
            }
            for from in [purchase, orchestrator, orders, payments] {
                lines.push(line(INVENTORY_COMMANDS, from, stock));
            }
            for from in [purchase, orchestrator, stock, payments] {
                lines.push(line(ORDER_COMMANDS, from, orders));
            }
            for from in [purchase, orchestrator, stock, orders] {
                lines.push(line(PAYMENT_COMMANDS, from, payments));
            }
            let courier = Courier::start(lines, stop);
            (buses, Some(courier))
        }
    }
}

/// Makes access tokens as the account service does.
struct Mint {
    key: EncodingKey,
    public: PublicKey,
}

impl Mint {
    fn new() -> Mint {
        let pair = Ed25519KeyPair::from_seed_unchecked(&[7; 32]).unwrap();
        let public = PublicKey::new(pair.public_key().as_ref().try_into().unwrap());
        let der: Pkcs8V2Der<'_> = pair.as_der().unwrap();
        Mint { key: EncodingKey::from_ed_der(der.as_ref()), public }
    }

    fn token(&self, customer_id: u64, expires_at: u64) -> String {
        let mut header = Header::new(Algorithm::EdDSA);
        header.typ = Some(TOKEN_TYPE.to_owned());
        header.kid = Some(self.public.kid().to_owned());
        let Realm { issuer, audience } = Realm::default();
        let claims = serde_json::json!({
            "iss": issuer, "aud": audience, "sub": customer_id.to_string(), "exp": expires_at,
        });
        jsonwebtoken::encode(&header, &claims, &self.key).unwrap()
    }
}

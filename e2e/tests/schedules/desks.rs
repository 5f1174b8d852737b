//! The participants of a saga under test, in three makes that must come to the same.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bus::{Bus, Consumer, Envelope, EnvelopeId, Limits, Subject};
use bytes::Bytes;
use db::{Db, Error, Migration, Tx, Value};
use participant::barrier::{self, Decision, Found, Key};
use participant::{Answer, BadInput, Outcome, Participant, Undone, Work};
use saga::{Phase, Reason};
use serve::auth::{KeySet, Realm, Verifier};
use shop::calls::GetProducts;
use shop::purchase::{ORCHESTRATOR, Purchase, PurchasedItem};
use telemetry::{PubsubMetrics, Registry};
use testkit::TempDir;
use tokio::runtime::Runtime;
use tokio_util::sync::CancellationToken;
use wire::messages::{Command, Recorded, ToOrchestrator, ToParticipant};
use wire::time::Clock;

/// What a saga meets on its way.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Script {
    /// The step that says no.
    pub refuses: Option<u8>,
    /// A step that gives no answer so many times.
    pub silent: Option<(u8, u8)>,
}

/// How often a step has had its effect and how often it was undone, both for good.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Effects {
    pub acted: u8,
    pub undone: u8,
}

impl Effects {
    /// Whether the effect is there.
    pub fn live(self) -> bool {
        self.acted > self.undone
    }
}

/// Participants: they answer commands, and what they did can be counted.
pub trait Desks {
    /// The input of a saga that meets this.
    fn input(&mut self, saga: u64, script: Script) -> Bytes;

    /// Answers a batch of commands of one subject: the recorded reply of each, or none where it must come again.
    fn answer(&mut self, subject: Subject, commands: &[Command], now: u64) -> Vec<Option<Bytes>>;

    /// Handles a batch in a transaction that fails at its end: all of it must be as if it had not come.
    fn fail(&mut self, _subject: Subject, _commands: &[Command], _now: u64) {}

    /// What became of one step.
    fn effects(&mut self, saga: u64, step: u8) -> Effects;
}

/// No step.
const NOBODY: u8 = u8::MAX;

impl Script {
    fn to_bytes(self) -> Bytes {
        let (silent, times) = self.silent.unwrap_or((NOBODY, 0));
        Bytes::copy_from_slice(&[self.refuses.unwrap_or(NOBODY), silent, times])
    }

    fn from_bytes(bytes: &Bytes) -> Script {
        let &[refuses, silent, times] = &bytes[..] else { panic!("not a script: {bytes:?}") };
        Script {
            refuses: (refuses != NOBODY).then_some(refuses),
            silent: (silent != NOBODY).then_some((silent, times)),
        }
    }

    /// What a step says that is asked to act and may.
    fn act(self, step: u8, silences: &mut HashMap<Key, u8>, key: Key) -> Outcome {
        if let Some((_, times)) = self.silent.filter(|(silent, _)| *silent == step) {
            let so_far = silences.entry(key).or_default();
            if *so_far < times {
                *so_far += 1;
                return Outcome::Retry("not now".to_owned());
            }
        }
        match self.refuses {
            Some(refuses) if refuses == step => Outcome::Rejected("no".to_owned()),
            _ => Outcome::Done(vec![step]),
        }
    }
}

/// On no database: the pure half of the barrier, and maps.
#[derive(Clone, Debug, Default)]
pub struct InMemory {
    pub found: BTreeMap<(u64, u8), Found>,
    effects: BTreeMap<(u64, u8), Effects>,
    silences: HashMap<Key, u8>,
}

impl InMemory {
    /// What would be done about a command.
    pub fn decide(&self, command: &Command) -> Decision {
        let key = Key { saga: command.carried.token.saga, step: command.step };
        let nothing = Found::default();
        let found = self.found.get(&(key.saga, key.step.0)).unwrap_or(&nothing);
        barrier::decide(key, command.phase, found).unwrap()
    }

    /// Does it.
    pub fn handle(&mut self, command: &Command, now: u64) -> Option<Bytes> {
        let decision = self.decide(command);
        let key = Key { saga: command.carried.token.saga, step: command.step };
        let place = (key.saga, key.step.0);
        let found = self.found.entry(place).or_default();
        match decision {
            Decision::Answer(recorded) => return Some(recorded),
            Decision::Act => {
                let script = Script::from_bytes(&command.carried.about.input());
                let outcome = match script.act(key.step.0, &mut self.silences, key) {
                    Outcome::Done(data) => {
                        self.effects.entry(place).or_default().acted += 1;
                        saga::Outcome::Done(data)
                    }
                    Outcome::Rejected(why) => saga::Outcome::Rejected(Reason::Refused(why)),
                    Outcome::Retry(_) => return None,
                };
                found.action = Some(Recorded { outcome, at: now }.encode());
            }
            Decision::Undo => {
                self.effects.entry(place).or_default().undone += 1;
                found.compensation = Some(barrier::compensated(now));
            }
            Decision::Bury => found.action = Some(barrier::tombstone(now)),
            Decision::BuryAndCompensate => {
                found.action = Some(barrier::tombstone(now));
                found.compensation = Some(barrier::compensated(now));
            }
            Decision::NothingToUndo => found.compensation = Some(barrier::compensated(now)),
        }
        let row = if command.phase == Phase::Compensation { &found.compensation } else { &found.action };
        row.clone()
    }
}

impl Desks for InMemory {
    fn input(&mut self, _: u64, script: Script) -> Bytes {
        script.to_bytes()
    }

    fn answer(&mut self, _: Subject, commands: &[Command], now: u64) -> Vec<Option<Bytes>> {
        commands.iter().map(|command| self.handle(command, now)).collect()
    }

    fn effects(&mut self, saga: u64, step: u8) -> Effects {
        self.effects.get(&(saga, step)).copied().unwrap_or_default()
    }
}

/// A participant that counts in its own table.
#[derive(Debug, Default)]
struct Counting {
    silences: Mutex<HashMap<Key, u8>>,
    fails: bool,
}

/// `effect` has no key: a second effect is a second row.
const COUNTING: &[Migration] = &[
    Migration {
        number: 1,
        name: "effect",
        sqlite: "CREATE TABLE effect (saga INTEGER NOT NULL, step INTEGER NOT NULL, undone INTEGER NOT NULL) STRICT;",
        mysql: "CREATE TABLE IF NOT EXISTS effect (saga BIGINT NOT NULL, step INT NOT NULL, undone INT NOT NULL);",
    },
    barrier::migration(2),
];

fn count(tx: &mut Tx<'_>, work: &Work<'_, Script>, undo: bool) -> Result<(), Error> {
    let values = [Value::from(work.saga), Value::from(work.step.0), Value::from(undo)];
    tx.execute("INSERT INTO effect (saga, step, undone) VALUES (?, ?, ?)", &values).map(drop)
}

impl Participant for Counting {
    type Input = Script;
    type Changes = ();

    fn read(&self, input: &Bytes) -> Result<Script, BadInput> {
        Ok(Script::from_bytes(input))
    }

    fn act(&self, tx: &mut Tx<'_>, work: &[Work<'_, Script>], (): &mut ()) -> Result<Vec<Outcome>, Error> {
        let mut silences = self.silences.lock().unwrap();
        let mut outcomes = Vec::with_capacity(work.len());
        for work in work {
            let key = Key { saga: work.saga, step: work.step };
            let outcome = work.input.act(work.step.0, &mut silences, key);
            if matches!(outcome, Outcome::Done(_)) {
                count(tx, work, false)?;
            }
            outcomes.push(outcome);
        }
        if self.fails { Err(Error::Full) } else { Ok(outcomes) }
    }

    fn undo(&self, tx: &mut Tx<'_>, work: &[Work<'_, Script>], (): &mut ()) -> Result<Vec<Undone>, Error> {
        for work in work {
            count(tx, work, true)?;
        }
        if self.fails { Err(Error::Full) } else { Ok(vec![Undone::Done; work.len()]) }
    }
}

/// On a real database, with the real batch handler.
pub struct OnSqlite {
    runtime: Runtime,
    db: Db,
    participant: Arc<Counting>,
    failing: Arc<Counting>,
    effects: HashMap<(u64, u8), Effects>,
    seen: u64,
    _folder: TempDir,
}

impl OnSqlite {
    pub fn new() -> OnSqlite {
        let folder = TempDir::new();
        let db = Db::open(db::Settings::new(folder.path().join("desks.db"), "desks"), COUNTING).unwrap();
        let failing = Counting { fails: true, ..Counting::default() };
        OnSqlite {
            runtime: runtime(),
            db,
            participant: Arc::default(),
            failing: Arc::new(failing),
            effects: HashMap::new(),
            seen: 0,
            _folder: folder,
        }
    }

    fn handle(
        &self,
        participant: &Arc<Counting>,
        commands: &[Command],
        now: u64,
    ) -> Result<Vec<Answer>, Error> {
        let commands: Vec<participant::Command<Script>> = commands
            .iter()
            .map(|command| participant::Command {
                token: command.carried.token.clone(),
                step: command.step,
                phase: command.phase,
                input: Script::from_bytes(&command.carried.about.input()),
            })
            .collect();
        let participant = Arc::clone(participant);
        let handled =
            self.db.write(move |tx| participant::handle(&*participant, tx, &commands, now, &mut ()));
        self.runtime.block_on(handled)
    }

    /// What was committed since it was last looked at.
    fn look(&mut self) {
        let seen = self.seen;
        let rows: Result<Vec<(u64, u64, u8, bool)>, Error> = self.runtime.block_on(self.db.read(move |tx| {
            tx.query(
                "SELECT rowid, saga, step, undone FROM effect WHERE rowid > ? ORDER BY rowid",
                &[Value::from(seen)],
                |row| Ok((row.get(0)?, row.get(1)?, row.get(2)?, row.get(3)?)),
            )
        }));
        for (row, saga, step, undo) in rows.unwrap() {
            self.seen = row;
            let effects = self.effects.entry((saga, step)).or_default();
            if undo { effects.undone += 1 } else { effects.acted += 1 }
        }
    }
}

impl Desks for OnSqlite {
    fn input(&mut self, _: u64, script: Script) -> Bytes {
        script.to_bytes()
    }

    fn answer(&mut self, _: Subject, commands: &[Command], now: u64) -> Vec<Option<Bytes>> {
        let answers = self.handle(&self.participant, commands, now).unwrap();
        self.look();
        let recorded = |answer| match answer {
            Answer::Reply(recorded) => Some(recorded),
            Answer::Retry(_) => None,
            Answer::Park(why) => panic!("parked: {why}"),
        };
        answers.into_iter().map(recorded).collect()
    }

    /// A batch that the barrier answers alone does not reach the participant, and so does not fail.
    fn fail(&mut self, _: Subject, commands: &[Command], now: u64) {
        match self.handle(&self.failing, commands, now) {
            Err(error) => assert_eq!(error, Error::Full),
            Ok(answers) => assert_eq!(answers.len(), commands.len()),
        }
        self.look();
    }

    fn effects(&mut self, saga: u64, step: u8) -> Effects {
        self.effects.get(&(saga, step)).copied().unwrap_or_default()
    }
}

/// The shop's own services, each with its database, its barrier and its loop.
pub struct Services {
    runtime: Runtime,
    bus: Bus,
    replies: Consumer,
    product: Db,
    order: Db,
    payment: Db,
    stop: CancellationToken,
    _folder: TempDir,
}

/// What each product has at first, what a cart takes of it, and what it costs. Each saga has a product of its own.
const STOCK: i64 = 100;
const TAKEN: i64 = 30;
const PRICE: i64 = 1;
const PAYMENT_LIMIT: i64 = 50;
/// How long a reply may take. Only a failing test waits as long.
const PATIENCE: Duration = Duration::from_secs(60);

impl Services {
    pub fn new() -> Services {
        let (runtime, folder) = (runtime(), TempDir::new());
        let open = |name, migrations| {
            Db::open(db::Settings::new(folder.path().join(name), name), migrations).unwrap()
        };
        let product = open("product", product::MIGRATIONS);
        let order = open("order", order::MIGRATIONS);
        let payment = open("payment", payment::MIGRATIONS);
        let (bus, stop, clock) =
            (Bus::embedded(Limits::default()), CancellationToken::new(), Clock::system());
        let metrics = || PubsubMetrics::new(&Registry::new(), "test");
        let verifier = || Verifier::new(&KeySet::new([]), &Realm::default(), clock.clone());
        let settings = participant::Settings::default();
        let stock = runtime
            .block_on(product::start(product::Parts {
                cache: product::ProductCache::new(),
                redis: None,
                db: product.clone(),
                bus: bus.clone(),
                clock: clock.clone(),
                write: product::CatalogWrite::Open,
                book: drive::Book::new(),
                metrics: metrics(),
                spans: telemetry::Spans::off(),
                settings,
            }))
            .unwrap();
        let orders = order::Parts {
            copies: None,
            db: order.clone(),
            bus: bus.clone(),
            clock: clock.clone(),
            verifier: verifier(),
            products: GetProducts::new(|_| async { Ok(Vec::new()) }),
            book: drive::Book::new(),
            metrics: metrics(),
            spans: telemetry::Spans::off(),
            settings,
        };
        let payments = payment::Parts {
            copies: None,
            db: payment.clone(),
            bus: bus.clone(),
            clock: clock.clone(),
            verifier: verifier(),
            limit: PAYMENT_LIMIT,
            book: drive::Book::new(),
            metrics: metrics(),
            spans: telemetry::Spans::off(),
            settings,
        };
        runtime.spawn(stock.run(stop.clone()));
        runtime.spawn(order::run(orders, stop.clone()));
        runtime.spawn(payment::run(payments, stop.clone()));
        let replies = bus.subscribe(ORCHESTRATOR);
        Services { runtime, bus, replies, product, order, payment, stop, _folder: folder }
    }

    /// The recorded replies to these commands, as they come.
    fn replies(&mut self, count: usize) -> Vec<wire::messages::Reply> {
        let Services { runtime, replies: consumer, bus, .. } = self;
        let limit = bus.limits().frame_envelopes;
        runtime.block_on(async {
            let mut replies = Vec::with_capacity(count);
            while replies.len() < count {
                let next = tokio::time::timeout(PATIENCE, consumer.next(limit));
                let batch = next.await.expect("a service answers").unwrap();
                for delivery in batch.deliveries() {
                    match ToOrchestrator::decode(delivery.envelope.body.clone()).unwrap() {
                        ToOrchestrator::Reply(reply) => replies.push(reply),
                        ToOrchestrator::Start(start) => panic!("a service starts a saga: {start:?}"),
                    }
                }
                batch.ack_all().await.unwrap();
            }
            replies
        })
    }

    fn number(&self, db: &Db, sql: &'static str, saga: u64) -> i64 {
        let number: Result<Option<i64>, Error> = self
            .runtime
            .block_on(db.read(move |tx| tx.query_opt(sql, &[Value::from(saga)], |row| row.get(0))));
        number.unwrap().unwrap()
    }
}

impl Drop for Services {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

impl Desks for Services {
    /// The product service refuses what it does not have, the payment service what is above its limit. The order service
    /// refuses nothing, and no service is silent.
    fn input(&mut self, saga: u64, script: Script) -> Bytes {
        let created: Result<u64, Error> = self.runtime.block_on(self.product.write(move |tx| {
            tx.execute(
                "INSERT INTO product (id, name, description, brand_name, price, inventory)
                 VALUES (?, 'n', 'd', 'b', ?, ?)",
                &[Value::from(saga), Value::from(PRICE), Value::from(STOCK)],
            )
        }));
        assert_eq!(created.unwrap(), 1);
        let amount = match script.refuses {
            Some(0) => STOCK + 1,
            Some(2) => PAYMENT_LIMIT + 1,
            Some(step) => panic!("step {step} never refuses"),
            None => TAKEN,
        };
        let item = PurchasedItem { product_id: saga, amount, price: PRICE };
        let total = amount * PRICE;
        Purchase { customer_id: 1, items: vec![item], currency_code: "NT".to_owned(), total }.to_input()
    }

    fn answer(&mut self, subject: Subject, commands: &[Command], _: u64) -> Vec<Option<Bytes>> {
        let envelope = |(number, command): (u64, &Command)| Envelope {
            id: EnvelopeId::of(command.carried.token.saga, number),
            body: ToParticipant::Command(command.clone()).encode(),
        };
        let frame = self.bus.limits().frame_envelopes;
        for part in commands.chunks(frame) {
            let envelopes = (0..).zip(part).map(envelope).collect();
            self.runtime.block_on(self.bus.publish(subject, envelopes)).unwrap();
        }
        let mut replies = self.replies(commands.len());
        let mut take = |command: &Command| {
            let is_its = |reply: &wire::messages::Reply| {
                reply.carried == command.carried && reply.step == command.step && reply.phase == command.phase
            };
            let place = replies.iter().position(is_its).expect("each command has a reply of its own");
            Some(replies.swap_remove(place).recorded)
        };
        commands.iter().map(&mut take).collect()
    }

    fn effects(&mut self, saga: u64, step: u8) -> Effects {
        let live = match step {
            0 => {
                let left = self.number(&self.product, "SELECT inventory FROM product WHERE id = ?", saga);
                match STOCK - left {
                    0 => 0,
                    taken if taken == TAKEN || taken == PAYMENT_LIMIT + 1 => 1,
                    taken => panic!("saga {saga} has taken {taken}"),
                }
            }
            1 => self.number(&self.order, "SELECT COUNT(*) FROM purchase_order WHERE id = ?", saga),
            2 => self.number(&self.payment, "SELECT COUNT(*) FROM payment WHERE id = ?", saga),
            _ => panic!("a purchase has no step {step}"),
        };
        // What was undone cannot be told from what never was.
        Effects { acted: u8::try_from(live).unwrap(), undone: 0 }
    }
}

fn runtime() -> Runtime {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap()
}

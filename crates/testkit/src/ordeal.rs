//! One data directory through many deaths, with customers who buy all the while, and the reckoning at the end.

#![allow(clippy::print_stdout, reason = "a test's figures and its seed are for whoever reads its output")]

use std::collections::BTreeMap;
use std::process::ExitStatus;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::task::JoinHandle;

use crate::checks::{self, Expected};
use crate::dice::Dice;
use crate::shop::{Options, Shop, StartFailed};
use crate::traffic::{
    self, Catalogue, Customer, Gate, Habits, Ledger, Product, Totals, buy_until_last_call,
    follow_until_closed,
};
use crate::wait::until;

/// The environment variable that repeats a run, as far as chance goes.
pub const SEED_VARIABLE: &str = "SAGALINE_TEST_SEED";

const CUSTOMERS: usize = 3;
/// What makes a process end by itself does so within this time.
const DIES_WITHIN: Duration = Duration::from_secs(60);
/// After the last start everything ends within this time.
const ALL_ENDED_WITHIN: Duration = Duration::from_secs(60);
/// Lines of a log that are shown when something is wrong.
const SHOWN_LINES: usize = 30;

const SIGKILL: i32 = 9;

/// A data directory, and everybody who buys there.
#[derive(Debug)]
pub struct Ordeal {
    name: &'static str,
    seed: u64,
    dice: Dice,
    begun: Instant,
    options: Options,
    habits: Habits,
    gate: Gate,
    ledger: Arc<Ledger>,
    catalogue: Arc<Catalogue>,
    /// Every product with the stock that it was created with.
    stock: BTreeMap<u64, i64>,
    customers: Vec<Customer>,
    buyers: Vec<JoinHandle<()>>,
    followers: Vec<JoinHandle<()>>,
    kills: usize,
    starts: Vec<Duration>,
}

impl Ordeal {
    /// A shop with products and customers, which was killed once already; the customers wait at its door.
    ///
    /// # Panics
    /// When the shop does not start.
    pub async fn begin(name: &'static str, options: Options, habits: Habits) -> Ordeal {
        let seed = Dice::seed(SEED_VARIABLE);
        println!("{name}: {SEED_VARIABLE}={seed}");
        let begun = Instant::now();
        let mut shop = start(&options).await;
        let client = shop.client();
        let catalogue = Arc::new(Catalogue::create(&client).await);
        let mut customers = Vec::new();
        for number in 0..CUSTOMERS {
            customers.push(Customer::sign_up(&client, number).await);
        }
        let starts = vec![shop.ready_after()];
        shop.kill9().await;
        let mut ordeal = Ordeal {
            name,
            seed,
            dice: Dice::new(seed),
            begun,
            options,
            habits,
            gate: Gate::default(),
            ledger: Arc::default(),
            stock: catalogue.stock(),
            catalogue,
            customers,
            buyers: Vec::new(),
            followers: Vec::new(),
            kills: 1,
            starts,
        };
        ordeal.let_in();
        ordeal
    }

    fn let_in(&mut self) {
        for customer in &self.customers {
            let (ledger, dice) = (Arc::clone(&self.ledger), self.dice.fork());
            let follow = follow_until_closed(self.gate.address(), customer.clone(), ledger, dice);
            self.followers.push(tokio::spawn(follow));
        }
        self.let_buyers_in();
    }

    fn let_buyers_in(&mut self) {
        for customer in &self.customers {
            for _ in 0..self.habits.buyers_per_customer {
                let (catalogue, ledger) = (Arc::clone(&self.catalogue), Arc::clone(&self.ledger));
                let (address, dice) = (self.gate.address(), self.dice.fork());
                let buy =
                    buy_until_last_call(address, customer.clone(), catalogue, ledger, dice, self.habits);
                self.buyers.push(tokio::spawn(buy));
            }
        }
    }

    /// Chance, as the seed has it.
    pub fn dice(&mut self) -> &mut Dice {
        &mut self.dice
    }

    /// How the shop is started.
    pub fn options(&self) -> &Options {
        &self.options
    }

    /// What everybody was told.
    pub fn ledger(&self) -> &Ledger {
        &self.ledger
    }

    /// Who buys.
    pub fn customers(&self) -> &[Customer] {
        &self.customers
    }

    /// What there is to buy.
    pub fn catalogue(&self) -> &Catalogue {
        &self.catalogue
    }

    /// The test has created this product, which only itself buys.
    pub fn also_has(&mut self, product: Product) {
        self.stock.insert(product.id, product.stock);
    }

    /// Starts the shop and lets the customers in.
    ///
    /// # Panics
    /// When it does not start.
    pub async fn open(&mut self) -> Shop {
        let shop = start(&self.options).await;
        self.starts.push(shop.ready_after());
        self.gate.open(shop.client());
        shop
    }

    /// Starts the shop so that it will die by itself, and waits until it has. Returns how, and its log.
    ///
    /// # Panics
    /// When it does not die, or a customer was told a contradiction.
    pub async fn dies_by_itself(&mut self, cause: &str, options: Options) -> (ExitStatus, String) {
        let begun = Instant::now();
        let end = match Shop::start(options).await {
            Ok(mut shop) => {
                self.starts.push(shop.ready_after());
                self.gate.open(shop.client());
                let status = shop.wait_exit(DIES_WITHIN).await;
                self.gate.shut();
                match status {
                    Some(status) => (status, shop.stderr()),
                    None => panic!("{cause}: it lives:\n{}", tail(&shop.stderr())),
                }
            }
            // What was under way goes on at once, before anything else is answered.
            Err(StartFailed::Ended { status, stderr }) => (status, stderr),
            Err(error) => panic!("{cause}: {error}"),
        };
        self.died(&format!("{cause} after {:.1?}", begun.elapsed()));
        end
    }

    /// Starts the shop, and kills it so long after it was ready.
    ///
    /// # Panics
    /// When it does not start, or dies before, or a customer was told a contradiction.
    pub async fn is_killed_after(&mut self, life: Duration) {
        use std::os::unix::process::ExitStatusExt;
        let mut shop = self.open().await;
        let ready = Instant::now();
        until("an instant of chance", DIES_WITHIN, async || ready.elapsed() >= life).await;
        let status = shop.kill9().await;
        self.gate.shut();
        assert_eq!(status.signal(), Some(SIGKILL), "it died by itself:\n{}", tail(&shop.stderr()));
        self.died(&format!("{life:.1?} after it was ready"));
    }

    /// Starts the shop, and kills it so long after its start began, ready or not.
    ///
    /// # Panics
    /// When a customer was told a contradiction.
    pub async fn is_killed_while_it_starts(&mut self, life: Duration) {
        // The process is gone when this is over.
        let _ = tokio::time::timeout(life, Shop::start(self.options.clone())).await;
        self.died(&format!("{life:.1?} after its start began"));
    }

    /// The customers' shop has gone.
    ///
    /// # Panics
    /// When a customer was told a contradiction.
    pub fn died(&mut self, how: &str) {
        self.gate.shut();
        self.kills += 1;
        println!("{}: death {}: {how}; {:?}", self.name, self.kills, self.ledger.figures());
        self.ledger.assert_no_faults();
    }

    /// What the databases must agree with.
    pub fn expected(&self) -> Expected {
        Expected {
            stock: self.stock.clone(),
            acknowledged: self.ledger.acknowledged(),
            keys: self.ledger.keys(),
            ..Expected::default()
        }
    }

    /// Starts the shop for the last time: everything ends, and everything adds up, over its API and in its databases, while it
    /// runs and when it has stopped.
    ///
    /// # Panics
    /// When anything does not.
    pub async fn end(self) -> Totals {
        let shop = start(&self.options).await;
        self.end_in(shop).await
    }

    /// The same in a shop that runs already.
    ///
    /// # Panics
    /// When anything does not add up.
    pub async fn end_in(mut self, mut shop: Shop) -> Totals {
        self.starts.push(shop.ready_after());
        let (client, healed) = (shop.client(), self.is_quiet(&shop).await);
        let slowest = self.ledger.take_slowest();
        let totals = traffic::audit(&client, &self.customers, &self.catalogue, &self.ledger).await;
        self.check_databases();
        self.gate.close();
        all_in_order(self.followers.drain(..)).await;
        let status = shop.terminate().await;
        assert!(status.success(), "{status}:\n{}", tail(&shop.stderr()));
        let report = self.check_databases();
        self.starts.sort_unstable();
        println!(
            "{}: seed {}, {} deaths in {:.1?}, healed after {healed:.1?}, the slowest purchase took {slowest:.1?}\n  {totals:?}\n  {:?}\n  {report}\n  \
             ready after {:.0?} (median), {:.0?} (slowest)",
            self.name,
            self.seed,
            self.kills,
            self.begun.elapsed(),
            self.ledger.figures(),
            self.starts[self.starts.len() / 2],
            self.starts[self.starts.len() - 1],
        );
        totals
    }

    /// What has happened to this shop is over: everything ends, and everything adds up in its databases. Then the customers go on.
    /// Returns what was found there.
    ///
    /// # Panics
    /// When anything does not.
    pub async fn reckon(&mut self, shop: &Shop, what: &str) -> checks::Report {
        let (healed, slowest) = (self.is_quiet(shop).await, self.ledger.take_slowest());
        let report = self.check_databases();
        println!(
            "{}: {what}, after {:.1?}: healed after {healed:.1?}, the slowest purchase took {slowest:.1?}; {:?}\n  {report}",
            self.name,
            self.begun.elapsed(),
            self.ledger.figures()
        );
        self.gate.open(shop.client());
        self.let_buyers_in();
        report
    }

    /// Nothing new is begun, and all that was has ended. Tells how long that took.
    async fn is_quiet(&mut self, shop: &Shop) -> Duration {
        let (client, begun) = (shop.client(), Instant::now());
        self.gate.last_call(client.clone());
        let all_answered = async || self.buyers.iter().all(JoinHandle::is_finished);
        until("every key is answered", ALL_ENDED_WITHIN, all_answered).await;
        all_in_order(self.buyers.drain(..)).await;
        until("every purchase has ended, and whoever follows was told", ALL_ENDED_WITHIN, async || {
            let ended = traffic::all_ended(&client, &self.customers).await;
            self.ledger.assert_no_faults();
            ended.is_some_and(|ids| self.ledger.were_told_the_end_of(&ids))
        })
        .await;
        begun.elapsed()
    }

    fn check_databases(&self) -> checks::Report {
        match checks::check(self.options.books.clone(), &self.expected()) {
            Ok(report) => {
                report.assert_clean();
                report
            }
            Err(error) => panic!("the databases cannot be read: {error}"),
        }
    }
}

async fn all_in_order(tasks: impl Iterator<Item = JoinHandle<()>>) {
    for task in tasks {
        if let Err(panicked) = task.await {
            panic!("a customer's task: {panicked}");
        }
    }
}

async fn start(options: &Options) -> Shop {
    match Shop::start(options.clone()).await {
        Ok(shop) => shop,
        Err(error) => panic!("{error}"),
    }
}

/// The end of a log.
pub fn tail(log: &str) -> String {
    let lines: Vec<&str> = log.lines().collect();
    lines[lines.len().saturating_sub(SHOWN_LINES)..].join("\n")
}

//! Shared copies of rows that change, with two processes' worth of readers and writers on one database and real Redis servers that
//! stall, are emptied and fail over: nobody is ever shown something older than what anybody was shown before.

mod support;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU64, Ordering};
use std::time::Duration;

use cache::mark::Mark;
use cache::{Fenced, Life, Looked, Redis};
use db::{Db, Error};
use servers::{Proxy, RedisCluster, unique_name};
use support::{Database, Left, PATIENCE, connected, settings};

const ID: u64 = 7;

/// One of the processes that work on the stock.
#[derive(Clone)]
struct Process {
    db: Db,
    copies: Fenced<Left>,
}

impl Process {
    async fn start(db: &Db, redis: Option<Redis>) -> Process {
        let life = Life::start(db.clone(), redis).await.expect("a life");
        Process { db: db.clone(), copies: Fenced::new(life, "left") }
    }

    /// What is left, and whether a copy said so.
    async fn left(&self) -> (i64, bool) {
        match self.copies.look(ID).await {
            Looked::Found(left) => (left.amount, true),
            Looked::Ask(ticket) => {
                let (version, amount) = self.db.read(|tx| support::row(tx, ID)).await.expect("read");
                self.copies.keep(ticket, ID, version, &Left { amount });
                (amount, false)
            }
        }
    }

    async fn try_sell(&self) -> Result<i64, Error> {
        let copies = self.copies.clone();
        self.db
            .write(move |tx| {
                let (version, amount) = support::lock_row(tx, ID)?;
                copies.announce(tx, std::iter::once((ID, version + 1)))?;
                support::set(tx, ID, version + 1, amount - 1)?;
                Ok::<_, Error>(amount - 1)
            })
            .await
    }

    /// Sells one, as often as it takes.
    async fn sell(&self) -> i64 {
        let selling = async {
            loop {
                match self.try_sell().await {
                    Ok(left) => return left,
                    Err(error) => assert!(error.is_transient(), "{error}"),
                }
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        tokio::time::timeout(PATIENCE, selling).await.expect("nothing can be sold any more")
    }

    async fn alive(&self) {
        assert!(self.copies.life().wait_until_alive(PATIENCE).await, "no copies are used");
    }

    async fn until_a_copy_says(&self, amount: i64) {
        let asking = async { while self.left().await != (amount, true) {} };
        tokio::time::timeout(PATIENCE, asking).await.expect("no copy says it");
    }
}

async fn shop(redis: impl AsyncFn() -> Redis) -> (Database, Process, Process) {
    let database = Database::open().await;
    database.one.write(|tx| support::insert(tx, ID, 1_000_000)).await.expect("inserted");
    let one = Process::start(&database.one, Some(redis().await)).await;
    let two = Process::start(&database.two, Some(redis().await)).await;
    (database, one, two)
}

async fn plain_shop() -> (Database, Process, Process) {
    let prefix = unique_name();
    shop(async || connected(settings(servers::shared::redis(), &prefix)).await).await
}

#[tokio::test(flavor = "multi_thread")]
async fn what_one_process_has_read_the_other_is_told_by_redis() {
    let (_database, one, two) = plain_shop().await;
    one.alive().await;
    two.alive().await;
    one.until_a_copy_says(1_000_000).await;
    assert_eq!(two.left().await, (1_000_000, true));
    assert_eq!(two.sell().await, 999_999);
    assert_eq!(one.left().await, (999_999, false), "the database is asked after a sale");
    one.until_a_copy_says(999_999).await;
    assert_eq!(two.left().await, (999_999, true));
}

/// A reader asked the database before a sale and tells Redis after it.
#[tokio::test(flavor = "multi_thread")]
async fn what_was_read_before_a_sale_is_not_kept_after_it() {
    let (database, one, two) = plain_shop().await;
    one.alive().await;
    two.alive().await;
    let Looked::Ask(early) = one.copies.look(ID).await else { panic!("nothing was kept yet") };
    assert_eq!(two.sell().await, 999_999);
    one.copies.keep(early, ID, 0, &Left { amount: 1_000_000 });
    for _ in 0..50 {
        assert!(
            matches!(two.copies.look(ID).await, Looked::Ask(_)),
            "an older amount took the fence's place"
        );
    }
    // A newer one replaces it, and the older one does not come back.
    one.until_a_copy_says(999_999).await;
    one.copies.keep(early, ID, 0, &Left { amount: 1_000_000 });
    for _ in 0..50 {
        assert_eq!(two.copies.look(ID).await, Looked::Found(Left { amount: 999_999 }));
    }
    drop(database);
}

/// The fence of a sale that was rolled back keeps nobody from the truth.
#[tokio::test(flavor = "multi_thread")]
async fn after_a_rolled_back_sale_the_database_is_asked() {
    let (_database, one, two) = plain_shop().await;
    one.alive().await;
    two.alive().await;
    one.until_a_copy_says(1_000_000).await;
    let copies = one.copies.clone();
    let failed = one.db.write(move |tx| {
        copies.announce(tx, std::iter::once((ID, 1)))?;
        Err::<(), _>(Error::Panicked)
    });
    assert_eq!(failed.await, Err(Error::Panicked));
    assert_eq!(two.left().await, (1_000_000, false));
    assert_eq!(two.left().await, (1_000_000, false), "an older version does not take the fence's place");
    assert_eq!(one.sell().await, 999_999);
    one.until_a_copy_says(999_999).await;
}

/// Readers in sessions of their own ask both processes and the database, and tell each other what they were shown.
struct Watchers {
    copies: Arc<AtomicU64>,
    stop: Arc<AtomicBool>,
    tasks: Vec<tokio::task::JoinHandle<()>>,
}

impl Watchers {
    fn start(one: &Process, two: &Process) -> Watchers {
        let lowest = Arc::new(AtomicI64::new(i64::MAX));
        let (copies, stop) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicBool::new(false)));
        let tasks = (0..4).map(|number| {
            let (one, two) = (one.clone(), two.clone());
            let (lowest, copies, stop) = (lowest.clone(), copies.clone(), stop.clone());
            tokio::spawn(async move {
                for round in number.. {
                    if stop.load(Ordering::SeqCst) {
                        return;
                    }
                    let before = lowest.load(Ordering::SeqCst);
                    let (shown, by) = match round % 5 {
                        0 | 2 => (one.left().await, "a process"),
                        1 | 3 => (two.left().await, "the other process"),
                        _ => (
                            (one.db.read(|tx| support::row(tx, ID)).await.expect("read").1, false),
                            "the database",
                        ),
                    };
                    let (amount, copied) = shown;
                    assert!(
                        amount <= before,
                        "{amount} are shown by {by} (a copy: {copied}), and {before} were before"
                    );
                    lowest.fetch_min(amount, Ordering::SeqCst);
                    copies.fetch_add(u64::from(copied), Ordering::SeqCst);
                }
            })
        });
        Watchers { tasks: tasks.collect(), copies, stop }
    }

    /// How many answers were copies.
    async fn finish(self) -> u64 {
        self.stop.store(true, Ordering::SeqCst);
        for task in self.tasks {
            task.await.expect("nobody is shown something older");
        }
        self.copies.load(Ordering::SeqCst)
    }
}

/// Sells in turns through both processes; between two sales there is time for copies.
async fn sell(one: &Process, two: &Process, times: usize) {
    for time in 0..times {
        let process = if time % 2 == 0 { one } else { two };
        let left = process.sell().await;
        if time % 8 == 0 {
            // Somebody is shown a copy of it, or of what is left by now.
            let shown = async {
                while process.copies.life().current().is_some() {
                    let (amount, copied) = process.left().await;
                    if copied && amount <= left {
                        return;
                    }
                }
            };
            let _ = tokio::time::timeout(Duration::from_secs(1), shown).await;
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn no_amount_comes_back_while_redis_is_emptied_again_and_again() {
    let server = servers::Redis::start().expect("a Redis");
    let prefix = unique_name();
    let (_database, one, two) = shop(async || connected(settings(&server.url(), &prefix)).await).await;
    one.alive().await;
    two.alive().await;
    let watchers = Watchers::start(&one, &two);
    sell(&one, &two, 50).await;
    for _ in 0..4 {
        server.flush_all().expect("emptied");
        sell(&one, &two, 50).await;
        one.alive().await;
        two.alive().await;
    }
    assert!(watchers.finish().await > 0, "no copy was used");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn no_amount_comes_back_while_both_sell_at_once() {
    let (_database, one, two) = plain_shop().await;
    one.alive().await;
    two.alive().await;
    let watchers = Watchers::start(&one, &two);
    tokio::join!(sell(&one, &one, 200), sell(&two, &two, 200));
    assert!(watchers.finish().await > 0, "no copy was used");
    assert_eq!(one.left().await.0, 1_000_000 - 400);
}

/// The worst case: the one who sells cannot reach Redis, and those who read can.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn no_amount_comes_back_when_redis_is_cut_off_from_the_seller_alone() {
    let server = servers::Redis::start().expect("a Redis");
    let proxy = Proxy::start(server.socket_addr()).expect("a proxy");
    let database = Database::open().await;
    database.one.write(|tx| support::insert(tx, ID, 1_000_000)).await.expect("inserted");
    let prefix = unique_name();
    let through = format!("redis://{}", proxy.socket_addr());
    let mut sellers_settings = settings(&through, &prefix);
    sellers_settings.command_timeout = Duration::from_millis(300);
    let seller = Process::start(&database.one, Some(connected(sellers_settings).await)).await;
    let reader = Process::start(&database.two, Some(connected(settings(&server.url(), &prefix)).await)).await;
    let watchers = Watchers::start(&reader, &reader);
    for breaks in [Proxy::cut, |proxy: &Proxy| proxy.stall().expect("stalled"), Proxy::cut] {
        reader.alive().await;
        seller.alive().await;
        let left = seller.sell().await;
        reader.until_a_copy_says(left).await;
        breaks(&proxy);
        for _ in 0..20 {
            seller.sell().await;
        }
        proxy.heal().expect("healed");
    }
    assert!(watchers.finish().await > 0, "no copy was used");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn no_amount_comes_back_when_redis_comes_back_with_what_it_had_saved() {
    let server = servers::Redis::start().expect("a Redis");
    let prefix = unique_name();
    let (_database, one, two) = shop(async || connected(settings(&server.url(), &prefix)).await).await;
    let watchers = Watchers::start(&one, &two);
    for _ in 0..2 {
        one.alive().await;
        two.alive().await;
        let left = one.sell().await;
        one.until_a_copy_says(left).await;
        server.call(&["SAVE"]).expect("saved");
        let left = two.sell().await;
        one.until_a_copy_says(left).await;
        // Nobody sells meanwhile, who would find out.
        server.kill().expect("killed");
        server.restart().expect("restarted");
        assert!(holds(&server), "the older copy is there again");
        for process in [&one, &two] {
            assert!(process.copies.life().redis().expect("a Redis").wait_until_up(PATIENCE).await);
        }
        // All are asked again and again until copies are used again.
        one.until_a_copy_says(left).await;
    }
    assert!(watchers.finish().await > 0, "no copy was used");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn no_amount_comes_back_when_the_primary_that_holds_it_fails_over() {
    let cluster = RedisCluster::start().expect("a cluster");
    let prefix = unique_name();
    let (_database, one, two) =
        shop(async || connected(settings(&cluster.urls().join(","), &prefix)).await).await;
    let watchers = Watchers::start(&one, &two);
    for _ in 0..2 {
        one.alive().await;
        two.alive().await;
        sell(&one, &two, 20).await;
        // Whichever has it.
        let primary = cluster.primaries().expect("primaries").into_iter().find(|node| holds(node));
        let primary = primary.expect("one of them has the copy");
        primary.kill().expect("killed");
        sell(&one, &two, 20).await;
        cluster.wait_until_ready().expect("the replica takes over");
        sell(&one, &two, 20).await;
        primary.restart().expect("restarted");
        cluster.wait_until_ready().expect("it replicates");
    }
    assert!(watchers.finish().await > 0, "no copy was used");
}

/// Whether a node has a copy or a fence of an amount.
fn holds(node: &servers::Redis) -> bool {
    matches!(node.call(&["KEYS", "*:left:*"]), Ok(servers::Reply::List(keys)) if !keys.is_empty())
}

/// Changes that are not announced are over before copies are used again.
#[tokio::test(flavor = "multi_thread")]
async fn no_life_begins_while_a_change_relies_on_the_end_of_the_last_one() {
    let database = Database::open().await;
    database.one.write(|tx| support::insert(tx, ID, 5)).await.expect("inserted");
    let process = Process::start(&database.one, None).await;
    let ended = database.one.write(|tx| Mark::Life.replace(tx, 0, -7)).await;
    assert_eq!(ended, Ok(true));
    process.sell().await;
    let (go, wait) = std::sync::mpsc::channel::<()>();
    let (held, is_held) = tokio::sync::oneshot::channel();
    let (mut held, copies, db) = (Some(held), process.copies.clone(), database.one.clone());
    let changing = tokio::spawn(async move {
        db.write(move |tx| {
            copies.announce(tx, std::iter::once((ID, 2)))?;
            if let Some(held) = held.take() {
                held.send(()).expect("somebody waits");
                wait.recv().expect("told to go on");
            }
            support::set(tx, ID, 2, 3)
        })
        .await
    });
    is_held.await.expect("it is held");
    let impatient = database.impatient().await;
    let begun = impatient.write(|tx| Mark::Life.replace(tx, -7, 8)).await;
    assert!(matches!(begun, Err(Error::Unavailable(_))), "{begun:?}");
    go.send(()).expect("it waits");
    changing.await.expect("no panic").expect("changed");
    assert_eq!(impatient.write(|tx| Mark::Life.replace(tx, -7, 8)).await, Ok(true));
}

/// A process without Redis takes part in the agreement all the same.
#[tokio::test(flavor = "multi_thread")]
async fn who_sells_without_redis_ends_the_copies_first() {
    let (database, one, _two) = plain_shop().await;
    one.alive().await;
    one.until_a_copy_says(1_000_000).await;
    let blind = Process::start(&database.two, None).await;
    assert!(matches!(blind.try_sell().await, Err(Error::PutOff { .. })));
    assert_eq!(one.left().await.0, 1_000_000);
    assert_eq!(blind.sell().await, 999_999);
    assert_eq!(one.left().await.0, 999_999);
}

//! Messages in the wrong hands, in two hands, and too late: rows 5, 6 and 10 of the list of faults.

use bus::{Envelope, EnvelopeId};
use futures_util::future::join_all;
use saga::Phase;
use shop::purchase::{INVENTORY_COMMANDS, Purchase};
use testkit::checks::Violation;
use testkit::traffic::PAYMENT_LIMIT;
use testkit::{Client, Engines, Shop, TempDir, until};
use tokio::task::{JoinHandle, spawn_blocking};
use wire::messages::{Command, ToParticipant};

use super::annex::{Annex, Extra, Standstill, received};
use super::counter::{Counter, one_of};
use super::tap::{MADE_UP, Tap};
use super::{SOON, options, turn};

/// There is enough of every product.
const PLENTY: i64 = 1_000_000;
/// Purchases while others stand still.
const MEANWHILE: usize = 24;
/// Copies of an action that comes too late.
const TOO_LATE: usize = 3;

/// Messages that a process has acknowledged.
async fn handled(extra: &Extra, service: &str) -> u64 {
    received(extra.admin(), service, "acked").await
}

/// Row 10: processes stand still with commands in hand until others have long done what these ask; then they go on with them.
async fn slower_than_the_broker_waits(counter: &mut Counter, annex: &Annex) {
    let services = ["product", "order", "payment"];
    let slow = join_all(services.map(|service| annex.start(service, &[]))).await;
    let (pot, crown) =
        (counter.product("pot", 10, PLENTY).await, counter.product("crown", PAYMENT_LIMIT + 1, PLENTY).await);
    let standstill = Standstill::of(slow.iter().map(Extra::pid));
    for number in 0..MEANWHILE {
        counter.sell(&format!("meanwhile {number}"), &[one_of([pot, crown][number % 2])]).await;
    }
    // Whatever they had been given, others were given after that.
    counter.adds_up("row 10: while they stand still").await;
    drop(standstill);
    for (extra, service) in slow.iter().zip(services) {
        until(
            &format!("the {service} that stood still has gone on with what it had in hand"),
            SOON,
            async || handled(extra, service).await > 0,
        )
        .await;
    }
    let report = counter.adds_up("row 10: when they have gone on").await;
    assert_eq!((report.committed, report.aborted), (MEANWHILE / 2, MEANWHILE / 2));
    for (extra, service) in slow.iter().zip(services) {
        println!("{service}: {} messages in hand all the while", handled(extra, service).await);
    }
}

/// Holds the lock of a product's row.
struct RowLock {
    session: u64,
    held: JoinHandle<()>,
}

impl RowLock {
    async fn on(engines: &Engines, product: u64) -> RowLock {
        let (mysql, database) = (engines.mysql().clone(), engines.database("product"));
        let hold = format!(
            "USE {database}; START TRANSACTION; SELECT id FROM product WHERE id = {product} FOR UPDATE; DO SLEEP(300)"
        );
        // It ends with its session.
        let held = spawn_blocking(move || drop(mysql.run(&hold)));
        let mut session = None;
        let find = format!(
            "SELECT id FROM information_schema.processlist WHERE db = '{database}' AND info LIKE 'DO SLEEP%'"
        );
        until("the row is locked", SOON, async || {
            session = engines.mysql().run(&find).unwrap().trim().parse().ok();
            session.is_some()
        })
        .await;
        RowLock { session: session.unwrap(), held }
    }

    async fn release(self, engines: &Engines) {
        engines.mysql().run(&format!("KILL {}", self.session)).unwrap();
        self.held.await.unwrap();
    }
}

/// Transactions that wait for a lock in the product service's database. A process of it has one at a time. (What `information_schema` tells of them
/// is as old as the last look, if that was a tenth of a second ago.)
fn waiting(engines: &Engines) -> usize {
    let status = engines.mysql().run("SHOW ENGINE INNODB STATUS").unwrap();
    let (_, transactions) = status.split_once("\\nTRANSACTIONS\\n").unwrap();
    let of_product = format!("of table `{}`.", engines.database("product"));
    let waits = |line: &&str| line.contains(&of_product) && line.ends_with(" waiting");
    transactions.split("\\n").filter(waits).count()
}

/// Row 6: two processes have the same compensation in hand, and have begun with it.
async fn one_compensation_in_two_hands(counter: &mut Counter) {
    let tap = Tap::on(&counter.engines, INVENTORY_COMMANDS).await;
    let catching = tokio::spawn(tap.catch(Phase::Compensation));
    while !catching.is_finished() {
        // Each of another product: nobody else waits for its row.
        let crown = counter.product("another crown", PAYMENT_LIMIT + 1, PLENTY).await;
        counter.sell(&format!("crown {crown}"), &[one_of(crown)]).await;
    }
    let (compensation, command) = catching.await.unwrap();
    let crown = Purchase::from_input(&command.carried.about.input()).unwrap().items[0].product_id;
    let lock = RowLock::on(&counter.engines, crown).await;
    let mut copies = 0;
    until("two processes are at it", SOON, async || {
        if waiting(&counter.engines) < 2 {
            copies += 1;
            counter.bus.publish(INVENTORY_COMMANDS, vec![compensation.clone()]).await.unwrap();
            return false;
        }
        true
    })
    .await;
    lock.release(&counter.engines).await;
    assert!(copies >= 2, "somebody else waits for the row");
    counter.adds_up(&format!("row 6: {copies} copies of one compensation")).await;
}

/// Lets customers buy at this door until the test has the first command of a purchase, and nobody else has it.
async fn hold_an_action(counter: &mut Counter, door: &Client) -> (Envelope, Command) {
    let lamp = counter.product("lamp", 10, PLENTY).await;
    let catching = tokio::spawn(Tap::on(&counter.engines, INVENTORY_COMMANDS).await.catch(Phase::Action));
    while !catching.is_finished() {
        let key = format!("held up {}", counter.expected.keys.len());
        counter.sell_at(door, &key, &[one_of(lamp)]).await;
    }
    catching.await.unwrap()
}

/// A message that was held up comes, again and again.
async fn come_late(counter: &Counter, action: &Envelope) {
    for _ in 0..TOO_LATE {
        counter.bus.publish(INVENTORY_COMMANDS, vec![action.clone()]).await.unwrap();
    }
}

async fn is_cancelled(counter: &Counter, purchase: u64) {
    let (path, token) = (format!("/api/purchase/{purchase}"), &counter.customers[0].token);
    until("it is cancelled", SOON, async || {
        let answer = counter.client.get(&path, Some(token)).await.unwrap();
        answer.status == 200 && answer.json()["state"] == "CANCELLED"
    })
    .await;
}

/// Row 5, as it can happen: an action is held up until its saga has been cancelled, which left a tombstone where it would have been recorded.
async fn an_action_comes_after_its_saga_was_cancelled(counter: &mut Counter, annex: &Annex) {
    let hasty = annex.start("purchase", &[("SAGA_PURCHASE__DEADLINE_SECONDS", "1")]).await;
    let (action, command) = hold_an_action(counter, hasty.client()).await;
    is_cancelled(counter, command.carried.token.saga).await;
    come_late(counter, &action).await;
    counter.adds_up("row 5: an action after its saga was cancelled").await;
}

/// Row 5, as only a forger can bring it about: nobody has asked for this compensation, so its saga's path does not tell of it. There is nothing else
/// to be said of it.
async fn a_compensation_comes_before_its_action(counter: &mut Counter) {
    let (action, command) = hold_an_action(counter, &counter.client.clone()).await;
    let purchase = command.carried.token.saga;
    let body = ToParticipant::Command(Command { phase: Phase::Compensation, ..command }).encode();
    let forged = Envelope { id: EnvelopeId::of(purchase, MADE_UP), body };
    counter.bus.publish(INVENTORY_COMMANDS, vec![forged]).await.unwrap();
    let recorded = format!(
        "SELECT phase FROM {}.saga_barrier WHERE saga = {purchase} AND step = 0 ORDER BY phase",
        counter.engines.database("product")
    );
    until("a tombstone and the compensation are recorded", SOON, async || {
        counter.engines.mysql().run(&recorded).unwrap() == "0\n1\n"
    })
    .await;
    come_late(counter, &action).await;
    is_cancelled(counter, purchase).await;
    counter.is_quiet().await;
    let report = counter.check("row 5: a compensation before its action");
    assert_eq!(report.violations, [Violation::ReplyLeftOut { purchase, step: 0, phase: 1 }], "{report}");
}

#[tokio::test(flavor = "multi_thread")]
async fn whoever_has_a_message_and_however_late_it_is_done_once() {
    let _turn = turn().await;
    let (dir, engines) = (TempDir::new(), Engines::shared());
    let mut shop = Shop::start(options(&dir, &engines)).await.unwrap();
    let annex = Annex::of(&shop, &dir, &engines).await;
    let mut counter = Counter::open(&shop, engines).await;
    slower_than_the_broker_waits(&mut counter, &annex).await;
    one_compensation_in_two_hands(&mut counter).await;
    an_action_comes_after_its_saga_was_cancelled(&mut counter, &annex).await;
    a_compensation_comes_before_its_action(&mut counter).await;
    let status = shop.terminate().await;
    assert!(status.success(), "{status}:\n{}", testkit::tail(&shop.stderr()));
}

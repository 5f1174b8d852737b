//! Purchases while messages are lost, repeated, delayed, reordered and forged, parts stand still, and time passes. The
//! numbers are the rows of the design's table of faults.

#![allow(clippy::unwrap_used, reason = "a test panics where something is not as it should be")]

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bus::{Bus, Envelope, EnvelopeId, Subject};
use bytes::Bytes;
use e2e::{Books, Customer, Drivers, Fate, LIMIT, Part, Settings, Shop, Wiring, check_events};
use http::Method;
use saga::{Entry, Mode, Outcome, Path, Phase, Reason, StepIndex, Token};
use serde_json::Value;
use shop::purchase::{
    INVENTORY_COMMANDS, ORCHESTRATOR, ORDER_COMMANDS, PAYMENT_COMMANDS, PURCHASE_PROGRESS, PURCHASE_SAGA,
    Purchase, PurchaseStep,
};
use testkit::{Dice, until};
use wire::messages::{
    About, Carried, Command, FORMAT, Progress, Recorded, Reply, Start, ToOrchestrator, ToParticipant,
};

const DAY: Duration = Duration::from_secs(24 * 60 * 60);
const PARTS: [Part; 4] = [Part::Stock, Part::Orders, Part::Payments, Part::Orchestrator];

/// Nothing is cancelled and nothing is given up, however often it is tried.
fn patient(wiring: Wiring) -> Settings {
    let mut settings = Settings { wiring, ..Settings::default() };
    settings.purchase.deadline = 10_000 * DAY;
    settings.purchase.max_tries = u32::MAX;
    settings.purchase.retry_max = settings.purchase.retry_first;
    settings
}

fn carried() -> Settings {
    Settings { wiring: Wiring::Carried, ..Settings::default() }
}

/// Three products: two to sell, one of which is too dear for any payment, and one of which there are 3.
struct Shelf {
    carts: [(u64, i64); 3],
}

/// How the carts of a shelf end, whatever happens on the way.
const ENDS: [&str; 3] = ["SUCCEEDED", "FAILED", "FAILED"];

impl Shelf {
    async fn fill(shop: &Shop) -> Shelf {
        let api = shop.api();
        let plenty = api.product(10, 100_000).await;
        let scarce = api.product(10, 3).await;
        let dear = api.product(2_000_000, 1_000).await;
        Shelf { carts: [(plenty, 2), (scarce, 9), (dear, 1)] }
    }

    /// One that succeeds.
    fn plenty(&self) -> [(u64, i64); 1] {
        [self.carts[0]]
    }

    /// One whose payment is declined.
    fn dear(&self) -> [(u64, i64); 1] {
        [self.carts[2]]
    }

    /// Buys one cart of each kind; tells each with how it has to end.
    async fn buy_all(&self, shop: &Shop, customer: &Customer) -> Vec<(u64, &'static str)> {
        let api = shop.api();
        let mut bought = Vec::new();
        for (cart, end) in self.carts.iter().zip(ENDS) {
            bought.push((api.buy(customer, &[*cart]).await, end));
        }
        bought
    }
}

async fn check_ends(shop: &Shop, customer: &Customer, bought: &[(u64, &'static str)]) {
    let api = shop.api();
    for (id, end) in bought {
        assert_eq!(api.state(customer, *id).await, *end, "purchase {id}");
    }
}

/// Row 9: the bus is emptied again and again, while purchases come in.
#[tokio::test]
async fn purchases_survive_a_bus_that_is_emptied_again_and_again() {
    let shop = Shop::open(Settings { replicas: 2, ..patient(Wiring::OneBus) }).await;
    let shelf = Shelf::fill(&shop).await;
    let customer = shop.customer(7);
    let mut dice = Dice::new(9);
    let mut bought = Vec::new();
    for _ in 0..25 {
        bought.extend(shelf.buy_all(&shop, &customer).await);
        for _ in 0..dice.below(60) {
            tokio::task::yield_now().await;
        }
        shop.bus().clear().await.unwrap();
        if dice.chance(30) {
            shop.clock.turn(shop.settings.purchase.retry_first);
        }
    }
    assert!(shop.bus().stats().forgotten > 0, "nothing was lost");
    for _ in 0..40 {
        shop.clock.turn(shop.settings.purchase.retry_first);
        let due = shop.clock.now();
        until("the reconciler has looked", LIMIT, async || {
            shop.open_purchases().await == 0 || Books::of(&shop).await.next_wake_at() > due
        })
        .await;
        for _ in 0..dice.below(200) {
            tokio::task::yield_now().await;
        }
        shop.bus().clear().await.unwrap();
    }
    // A new one is served at once, whatever has become of the others: nothing turns the clock for it.
    let api = shop.api();
    let mut watch = api.watch(&customer, None).await.unwrap();
    let new = api.buy(&customer, &shelf.plenty()).await;
    watch.until_ended(&[new]).await;
    bought.push((new, ENDS[0]));

    shop.quiet_by_turning(shop.settings.purchase.retry_first).await;
    shop.check().await;
    check_ends(&shop, &customer, &bought).await;
    assert_eq!(shop.parked().await, []);
}

/// Row 9: for each message that a purchase causes, that one and everything behind it is lost.
#[tokio::test]
async fn purchases_survive_the_loss_of_everything_between_any_two_steps() {
    let shop = Shop::open(patient(Wiring::Carried)).await;
    let shelf = Shelf::fill(&shop).await;
    let (api, customer) = (shop.api(), shop.customer(7));
    let mut bought = Vec::new();
    for (cart, end) in shelf.carts.iter().zip(ENDS) {
        for lost_from in 0.. {
            let first = shop.courier().taken() + lost_from;
            shop.courier().judge(move |passing| Fate::Deliver(u8::from(passing.number < first)));
            let id = api.buy(&customer, &[*cart]).await;
            let ended = async || api.purchase(&customer, id).await["finished_at"] != Value::Null;
            until("it ended, or its messages were lost", LIMIT, async || {
                shop.courier().taken() > first || ended().await
            })
            .await;
            shop.lose_all_messages().await;
            bought.push((id, end));
            let was_cut = shop.courier().taken() > first;
            shop.courier().be_honest();
            shop.quiet_by_turning(shop.settings.purchase.retry_first).await;
            if !was_cut {
                assert!(lost_from >= 2, "a purchase causes messages");
                break;
            }
        }
    }
    shop.check().await;
    check_ends(&shop, &customer, &bought).await;
    assert_eq!(shop.parked().await, []);
}

/// The purchase service dies with purchases under way, and every message with it. They go on at its start: nothing turns
/// the clock. Who watched resumes.
#[tokio::test]
async fn what_is_open_at_a_start_goes_on_and_its_stream_resumes() {
    let mut shop = Shop::open(patient(Wiring::Carried)).await;
    let shelf = Shelf::fill(&shop).await;
    let customer = shop.customer(7);
    let mut bought = Vec::new();
    let mut events = Vec::new();
    {
        let api = shop.api();
        let mut watch = api.watch(&customer, None).await.unwrap();
        shop.courier().hold(&[PAYMENT_COMMANDS]);
        for _ in 0..5 {
            bought.extend(shelf.buy_all(&shop, &customer).await);
        }
        // Two of each three come to their payment, the other is out of stock.
        while events.len() < 5 * (5 + 5 + 2) {
            events.push(watch.next().await.unwrap());
        }
    }
    shop.lose_all_messages().await;
    shop.courier().be_honest();
    shop.restart_purchases().await;
    let ids: Vec<u64> = bought.iter().map(|(id, _)| *id).collect();
    let open: Vec<u64> = bought.chunks(3).flat_map(|three| [three[0].0, three[2].0]).collect();
    let api = shop.api();
    let mut watch = api.watch(&customer, Some(&events.last().unwrap().id)).await.unwrap();
    events.extend(watch.until_ended(&open).await);
    check_events(&events, &ids);
    shop.check().await;
    check_ends(&shop, &customer, &bought).await;
}

/// Row 4: every message comes 1 to 5 times, shuffled and delayed; then 0 to 5 times.
#[tokio::test]
async fn repeated_shuffled_and_lost_messages_change_no_end() {
    let both = [1, 0].into_iter().flat_map(|least| Drivers::ALL.map(|drivers| (least, drivers)));
    for (seed, (least, drivers)) in (1..).zip(both) {
        let shop = Shop::open(Settings { replicas: 2, drivers, ..patient(Wiring::Carried) }).await;
        let shelf = Shelf::fill(&shop).await;
        let customer = shop.customer(7);
        let api = shop.api();
        let mut watch = api.watch(&customer, None).await.unwrap();
        shop.courier().repeat(seed, least, 5);
        let mut bought = Vec::new();
        for _ in 0..8 {
            bought.extend(shelf.buy_all(&shop, &customer).await);
        }
        if least == 0 {
            shop.quiet_by_turning(shop.settings.purchase.retry_first).await;
        }
        let ids: Vec<u64> = bought.iter().map(|(id, _)| *id).collect();
        let events = watch.until_ended(&ids).await;
        check_events(&events, &ids);
        shop.check().await;
        check_ends(&shop, &customer, &bought).await;
        // What is still under way comes too late for everything.
        let before = shop_state(&shop).await;
        until("all copies have arrived", LIMIT, async || shop.courier().is_idle() && is_idle(&shop).await)
            .await;
        assert_eq!(shop_state(&shop).await, before, "seed {seed}");
        assert_eq!(watch.ready().await, [], "an event behind the end, seed {seed}");
        assert_eq!(shop.parked().await, [], "seed {seed}");
        shop.check().await;
        drop((api, watch));
        shop.close().await;
    }
}

/// Everything that the databases say, as text.
async fn shop_state(shop: &Shop) -> String {
    format!("{:?}", Books::of(shop).await)
}

async fn is_idle(shop: &Shop) -> bool {
    let empty = async |bus: &Bus, subject| bus.depth(subject).await.unwrap().held() == 0;
    empty(shop.bus_of(Part::Stock), INVENTORY_COMMANDS).await
        && empty(shop.bus_of(Part::Orders), ORDER_COMMANDS).await
        && empty(shop.bus_of(Part::Payments), PAYMENT_COMMANDS).await
        && empty(shop.bus_of(Part::Orchestrator), ORCHESTRATOR).await
        && empty(shop.bus_of_purchases(), PURCHASE_PROGRESS).await
}

/// Row 5: a compensation that overtakes its action leaves a tombstone; the late action does nothing, ever.
#[tokio::test]
async fn a_compensation_before_its_action_leaves_a_tombstone() {
    for (subject, step) in [(INVENTORY_COMMANDS, StepIndex(0)), (ORDER_COMMANDS, StepIndex(1))] {
        // So that replies are to be seen.
        let shop = Shop::open(Settings { drivers: Drivers::Orchestrators, ..carried() }).await;
        let shelf = Shelf::fill(&shop).await;
        let (api, customer, courier) = (shop.api(), shop.customer(7), shop.courier());
        courier.hold(&[subject]);
        let id = api.buy(&customer, &shelf.plenty()).await;
        until("the step is asked to act", LIMIT, async || courier.held() == 1).await;
        let action = courier.take_held().remove(0);
        let command = action.command().unwrap();
        assert_eq!((command.step, command.phase), (step, Phase::Action));

        courier.hold(&[ORCHESTRATOR]);
        let compensation = Command { phase: Phase::Compensation, ..command };
        let body = ToParticipant::Command(compensation).encode();
        courier.deliver(subject, Envelope { id: EnvelopeId::of(id, 1 << 50), body });
        until("the compensation is answered", LIMIT, async || courier.held() == 1).await;
        let answered = courier.take_held().remove(0).reply().unwrap();
        assert_eq!(Recorded::decode(&answered.recorded).unwrap().outcome, Outcome::Compensated);

        let mut replies = BTreeSet::new();
        let mut last = None;
        for _ in 0..3 {
            courier.deliver(subject, action.envelope.clone());
            until("the late action is answered", LIMIT, async || courier.held() == 1).await;
            let reply = courier.take_held().remove(0);
            replies.insert(reply.reply().unwrap().recorded);
            last = Some(reply);
        }
        let [recorded] = &replies.into_iter().collect::<Vec<_>>()[..] else { panic!("replies differ") };
        let outcome = Recorded::decode(recorded).unwrap().outcome;
        assert_eq!(outcome, Outcome::Rejected(Reason::Cancelled));
        let books = Books::of(&shop).await;
        assert!(!books.has_order(id));
        assert_eq!(books.has_reservation(id), step != StepIndex(0), "only what another step has reserved");

        // The saga goes on with that reply.
        courier.be_honest();
        courier.deliver(ORCHESTRATOR, last.unwrap().envelope);
        shop.check().await;
        assert_eq!(api.state(&customer, id).await, "CANCELLED");
    }
}

/// Row 6: two replicas, each with connections of its own, have the same compensation in hand at once.
#[tokio::test]
async fn one_compensation_on_two_replicas_at_once_gives_back_once() {
    let mut shop = Shop::open(carried()).await;
    shop.start_apart(Part::Stock).await;
    let shelf = Shelf::fill(&shop).await;
    let (api, customer) = (shop.api(), shop.customer(7));
    shop.courier().judge(|passing| match passing.command() {
        Some(Command { step: StepIndex(0), phase: Phase::Compensation, .. }) => Fate::Hold,
        _ => Fate::Deliver(1),
    });
    let id = api.buy(&customer, &shelf.dear()).await;
    until("the stock is asked to give back", LIMIT, async || shop.courier().held() == 1).await;
    let compensation = shop.courier().take_held().remove(0);
    let writes = shop.hold_stock_writes().await;
    let in_hand = async || shop.bus_of(Part::Stock).depth(INVENTORY_COMMANDS).await.unwrap().in_hand;
    for replica in 1..=2 {
        shop.courier().deliver(INVENTORY_COMMANDS, compensation.envelope.clone());
        until("one replica more has it in hand", LIMIT, async || in_hand().await == replica).await;
    }
    drop(writes);
    shop.check().await;
    until("both have answered", LIMIT, async || in_hand().await == 0).await;
    shop.check().await;
    assert_eq!(api.state(&customer, id).await, "FAILED");
    assert_eq!(api.stock(shelf.dear()[0].0).await, 1_000);
}

/// What no part can understand, on each subject, with what its dead letter must say.
fn nonsense() -> Vec<(Subject, Bytes, &'static str)> {
    let entry = |step, outcome| Entry { step: StepIndex(step), outcome, at: 1 };
    let path: Path = [entry(0, Outcome::Rejected(Reason::Cancelled))].into_iter().collect();
    let about_that = |input: &[u8], definition: &str, version, path: Path| Carried {
        token: Token { saga: 999, mode: Mode::Execute, path },
        about: About::new(definition, version, 1, input, b""),
    };
    let carried = |definition: &str, version, path| about_that(b"\xff\xff", definition, version, path);
    let start = |definition: &str, version| {
        ToOrchestrator::Start(Start { carried: carried(definition, version, Path::new()) }).encode()
    };
    let reply = |step, recorded: Bytes| {
        let carried = carried(PURCHASE_SAGA, 1, Path::new());
        let reply = Reply { carried, step: StepIndex(step), phase: Phase::Action, recorded };
        ToOrchestrator::Reply(reply).encode()
    };
    let done = Recorded { outcome: Outcome::Done(Vec::new()), at: 1 }.encode();
    let progress =
        |definition: &str, version, path| Progress { carried: carried(definition, version, path) }.encode();
    let input = Purchase { customer_id: 7, ..Purchase::default() }.to_input();
    let unknown = Progress { carried: about_that(&input, PURCHASE_SAGA, 1, path.clone()) }.encode();
    let beyond: Path = [entry(7, Outcome::Done(Vec::new()))].into_iter().collect();
    let mut all = vec![
        (ORCHESTRATOR, start("another", 1), "no definition \"another\" version 1"),
        (ORCHESTRATOR, start(PURCHASE_SAGA, 99), "no definition \"purchase\" version 99"),
        (ORCHESTRATOR, reply(2, done), "step 2 replied where step 0 was asked"),
        (ORCHESTRATOR, reply(0, Bytes::from_static(b"\xff")), "not a recorded reply message"),
        (ORCHESTRATOR, other_format(start(PURCHASE_SAGA, 1)), "format 99"),
        (PURCHASE_PROGRESS, unknown, "there is no purchase 999"),
        (PURCHASE_PROGRESS, progress(PURCHASE_SAGA, 1, path.clone()), "not a purchase"),
        (PURCHASE_PROGRESS, progress(PURCHASE_SAGA, 1, beyond), "step 7"),
        (PURCHASE_PROGRESS, progress("another", 1, path.clone()), "no definition \"another\" version 1"),
        (
            PURCHASE_PROGRESS,
            progress(PURCHASE_SAGA, 99, path.clone()),
            "no definition \"purchase\" version 99",
        ),
        (PURCHASE_PROGRESS, other_format(progress(PURCHASE_SAGA, 1, path)), "format 99"),
    ];
    for (index, subject) in [INVENTORY_COMMANDS, ORDER_COMMANDS, PAYMENT_COMMANDS].into_iter().enumerate() {
        let carried = carried(PURCHASE_SAGA, 1, Path::new());
        let command = Command { carried, step: StepIndex(index as u8), phase: Phase::Action };
        let command = ToParticipant::Command(command).encode();
        all.push((subject, other_format(command.clone()), "format 99"));
        all.push((subject, command, "the input of the saga cannot be read"));
    }
    for subject in [ORCHESTRATOR, PURCHASE_PROGRESS, INVENTORY_COMMANDS, ORDER_COMMANDS, PAYMENT_COMMANDS] {
        all.push((subject, Bytes::from_static(b"\xff\xfe\xfd"), "not a "));
        all.push((subject, Bytes::new(), "format 0"));
    }
    all
}

/// The message as another generation of the software would write it: field 1 is the format.
fn other_format(message: Bytes) -> Bytes {
    let mut bytes = message.to_vec();
    assert_eq!(bytes[..2], [8, FORMAT as u8], "a message begins with its format");
    bytes[1] = 99;
    bytes.into()
}

/// Row 8: what cannot be understood is set aside with its reason, and everything else in its frame goes on.
#[tokio::test]
async fn what_cannot_be_understood_is_parked_and_others_flow() {
    let mut shop = Shop::open(Settings { replicas: 0, ..Settings::default() }).await;
    let shelf = Shelf::fill(&shop).await;
    let customer = shop.customer(7);
    let bought = shelf.buy_all(&shop, &customer).await;
    until("all are started", LIMIT, async || shop.bus().depth(INVENTORY_COMMANDS).await.unwrap().held() == 3)
        .await;
    for (index, (subject, body, _)) in nonsense().into_iter().enumerate() {
        let envelope = Envelope { id: EnvelopeId::of(index as u64, 0), body };
        shop.bus().publish(subject, vec![envelope]).await.unwrap();
    }
    for part in PARTS {
        shop.start(part).await;
    }
    shop.check().await;
    check_ends(&shop, &customer, &bought).await;
    let expected = nonsense();
    until("all of it is set aside", LIMIT, async || shop.parked().await.len() == expected.len()).await;
    for letter in shop.parked().await {
        let (index, _) = letter.envelope.id.parts();
        let (subject, body, reason) = &expected[index as usize];
        assert_eq!((letter.subject, &letter.envelope.body), (*subject, body));
        assert!(letter.reason.contains(reason), "{:?} where {reason:?} was expected", letter.reason);
        assert_eq!(letter.count, 1, "trying again would not help");
    }
}

/// Every participant is away until the deadline has passed; what was asked of them before is lost.
#[tokio::test]
async fn what_nobody_has_begun_at_its_deadline_is_cancelled() {
    let mut shop = Shop::open(Settings { replicas: 0, ..Settings::default() }).await;
    let shelf = Shelf::fill(&shop).await;
    let customer = shop.customer(7);
    let bought = shelf.buy_all(&shop, &customer).await;
    until("all are started", LIMIT, async || shop.bus().depth(INVENTORY_COMMANDS).await.unwrap().held() == 3)
        .await;
    shop.lose_all_messages().await;
    shop.clock.turn(shop.settings.purchase.deadline);
    for part in PARTS {
        shop.start(part).await;
    }
    shop.check().await;
    let api = shop.api();
    for (id, _) in bought {
        let shown = api.purchase(&customer, id).await;
        assert_eq!(shown["state"], "CANCELLED");
        assert_eq!(shown["reason"], "the deadline passed");
        assert_eq!(shown["finished_at"], shop.clock.now() / 1000);
    }
    // An order can still be placed, at once.
    let mut watch = api.watch(&customer, None).await.unwrap();
    let id = api.buy(&customer, &shelf.plenty()).await;
    watch.until_ended(&[id]).await;
    assert_eq!(api.state(&customer, id).await, "SUCCEEDED");
}

/// The deadline passes before the payment is asked for; every message from before then arrives after the end.
#[tokio::test]
async fn what_comes_after_a_cancellation_changes_nothing() {
    let shop = Shop::open(carried()).await;
    let shelf = Shelf::fill(&shop).await;
    let (api, customer, courier) = (shop.api(), shop.customer(7), shop.courier());
    let mut watch = api.watch(&customer, None).await.unwrap();
    // Each message is delivered, and kept as well, but for the one that would pay.
    let kept = Arc::new(std::sync::Mutex::new(Vec::new()));
    courier.judge({
        let kept = Arc::clone(&kept);
        move |passing| {
            if passing.is_purge() {
                return Fate::Deliver(1);
            }
            kept.lock().unwrap().push(passing.clone());
            let pays = passing.command().is_some_and(|command| command.step == StepIndex(2));
            Fate::Deliver(u8::from(!pays))
        }
    });
    let id = api.buy(&customer, &shelf.plenty()).await;
    let asked = || kept.lock().unwrap().iter().any(|passing| passing.subject == PAYMENT_COMMANDS);
    until("the payment is asked for", LIMIT, async || asked()).await;
    until("two steps are done", LIMIT, async || {
        api.purchase(&customer, id).await["steps"].as_array().unwrap().len() == 5
    })
    .await;
    courier.be_honest();
    shop.clock.turn(shop.settings.purchase.deadline);
    let events = watch.until_ended(&[id]).await;
    check_events(&events, &[id]);
    let told: Vec<_> = events.iter().map(|event| event.what().1).collect();
    let (execute, success, back) = ("STATUS_EXECUTE", "STATUS_SUCCESS", "STATUS_ROLLBACKED");
    assert_eq!(told, [execute, success, execute, success, execute, "STATUS_FAILED", back, back]);
    assert_eq!(events[5].data["reason"], "cancelled");
    assert_eq!(api.state(&customer, id).await, "CANCELLED");
    shop.check().await;
    let before = shop_state(&shop).await;

    let late = std::mem::take(&mut *kept.lock().unwrap());
    assert!(late.len() >= 5);
    for passing in late {
        courier.deliver(passing.subject, passing.envelope);
    }
    until("all of it has arrived", LIMIT, async || courier.is_idle() && is_idle(&shop).await).await;
    assert_eq!(shop_state(&shop).await, before);
    assert_eq!(watch.ready().await, []);
    assert_eq!(shop.parked().await, []);
    shop.check().await;
}

/// The payment is taken, its report is late, the deadline passes: the pivot has decided.
#[tokio::test]
async fn what_is_paid_before_the_deadline_succeeds_after_it() {
    let shop = Shop::open(carried()).await;
    let shelf = Shelf::fill(&shop).await;
    let (api, customer, courier) = (shop.api(), shop.customer(7), shop.courier());
    courier.judge(|passing| match passing.report() {
        Some(report) if report.carried.token.path.len() == 3 => Fate::Hold,
        _ => Fate::Deliver(1),
    });
    let id = api.buy(&customer, &shelf.plenty()).await;
    until("the payment is taken", LIMIT, async || courier.held() == 1).await;
    assert!(Books::of(&shop).await.has_payment(id));
    assert_eq!(api.state(&customer, id).await, "PENDING");
    let paid_at = shop.clock.now() / 1000;
    let late = courier.take_held();
    courier.be_honest();
    shop.clock.turn(shop.settings.purchase.deadline);
    shop.check().await;
    let shown = api.purchase(&customer, id).await;
    assert_eq!((&shown["state"], &shown["finished_at"]), (&Value::from("SUCCEEDED"), &Value::from(paid_at)));
    for passing in late {
        courier.deliver(passing.subject, passing.envelope);
    }
    until("it has arrived", LIMIT, async || courier.is_idle() && is_idle(&shop).await).await;
    shop.check().await;
}

/// The deadline passes at any moment, while messages repeat: those who drive a purchase on and those who cancel it race,
/// and it has one outcome.
#[tokio::test]
async fn a_driver_and_a_canceller_that_race_make_one_outcome() {
    let mut dice = Dice::new(13);
    let mut ends = BTreeSet::new();
    for seed in 0..12 {
        let drivers = Drivers::ALL[seed as usize % Drivers::ALL.len()];
        let shop = Shop::open(Settings { replicas: 2, drivers, ..carried() }).await;
        let shelf = Shelf::fill(&shop).await;
        let (api, customer, courier) = (shop.api(), shop.customer(7), shop.courier());
        // All set out together.
        courier.judge(|_| Fate::Hold);
        let mut bought = Vec::new();
        for _ in 0..4 {
            bought.extend(shelf.buy_all(&shop, &customer).await);
        }
        until("all are to be started", LIMIT, async || courier.held() >= bought.len()).await;
        courier.repeat(seed, 1, 3);
        // At some moment what is under way waits until the cancellations are, too; then all are off.
        courier.hold_after(dice.below(100));
        for passing in courier.take_held() {
            courier.deliver(passing.subject, passing.envelope);
        }
        until("the moment has come", LIMIT, async || courier.is_idle() && is_idle(&shop).await).await;
        shop.clock.turn(shop.settings.purchase.deadline);
        let now = shop.clock.now();
        until("what is open is to be cancelled", LIMIT, async || Books::of(&shop).await.next_wake_at() > now)
            .await;
        courier.repeat(!seed, 1, 3);
        for passing in courier.take_held() {
            courier.deliver(passing.subject, passing.envelope);
        }
        shop.check().await;
        let before = shop_state(&shop).await;
        until("all copies have arrived", LIMIT, async || courier.is_idle() && is_idle(&shop).await).await;
        assert_eq!(shop_state(&shop).await, before, "seed {seed}");
        assert_eq!(shop.parked().await, [], "seed {seed}");
        for (id, end) in bought {
            let state = api.state(&customer, id).await;
            assert!(state == end || state == "CANCELLED", "purchase {id} is {state}, seed {seed}");
            ends.insert(state);
        }
    }
    assert_eq!(ends.len(), 3, "each outcome was seen: {ends:?}");
}

async fn parked_for_operator(shop: &Shop) -> Vec<Value> {
    let listed = shop.api().operator(Method::GET, "/purchases/parked").await;
    assert_eq!(listed.status, 200);
    listed.body.as_array().unwrap().clone()
}

async fn retry(shop: &Shop, id: u64) -> u16 {
    shop.api().operator(Method::POST, &format!("/purchases/{id}/retry")).await.status
}

async fn in_flight(shop: &Shop, count: f64) {
    until("so many are under way", LIMIT, async || shop.metric("saga_in_flight") == count).await;
}

/// Nobody takes payments, before the deadline and behind it: there is nothing more that can be tried.
#[tokio::test]
async fn after_its_last_try_a_purchase_waits_for_an_operator_who_may_retry_it() {
    let mut settings = Settings { replicas: 0, ..Settings::default() };
    settings.purchase.max_tries = 3;
    settings.purchase.max_in_flight = 1;
    let mut shop = Shop::open(settings).await;
    for part in [Part::Stock, Part::Orders, Part::Orchestrator] {
        shop.start(part).await;
    }
    let shelf = Shelf::fill(&shop).await;
    let (anna, bert) = (shop.customer(7), shop.customer(8));
    let api = shop.api();
    let id = api.buy(&anna, &shelf.plenty()).await;
    assert_eq!(api.try_buy(&bert, &shelf.plenty(), None).await.status, 503);
    assert_eq!(parked_for_operator(&shop).await, Vec::<Value>::new());
    shop.quiet_by_turning(shop.settings.purchase.retry_max).await;

    let given_up = "it was tried as often as is allowed and has not ended";
    let shown = api.purchase(&anna, id).await;
    assert_eq!((shown["state"].as_str(), shown["reason"].as_str()), (Some("NEEDS_OPERATOR"), Some(given_up)));
    assert_eq!(shown["finished_at"], Value::Null);
    let [parked] = &parked_for_operator(&shop).await[..] else { panic!("one is left to the operator") };
    assert_eq!((parked["id"].as_u64(), parked["customer_id"].as_u64()), (Some(id), Some(anna.id)));
    assert_eq!(parked["reason"], given_up);
    // Its place is free.
    let other = api.buy(&bert, &shelf.plenty()).await;
    assert_eq!(api.try_buy(&bert, &shelf.plenty(), None).await.status, 503);
    assert_eq!(retry(&shop, other).await, 404, "one that is under way");
    assert_eq!(retry(&shop, 12_345).await, 404, "one that there is not");

    shop.lose_all_messages().await;
    in_flight(&shop, 1.0).await;
    assert_eq!(retry(&shop, id).await, 200);
    in_flight(&shop, 2.0).await;
    assert_eq!(retry(&shop, id).await, 404, "it is under way again");
    drop(api);
    shop.start(Part::Payments).await;
    shop.quiet_by_turning(shop.settings.purchase.retry_first).await;
    let api = shop.api();
    assert_eq!(api.state(&anna, id).await, "CANCELLED", "its deadline has passed, and it was not paid");
    assert_eq!(api.state(&bert, other).await, "SUCCEEDED");
    for id in [id, other] {
        assert_eq!(retry(&shop, id).await, 404, "it has ended");
    }
    assert_eq!(parked_for_operator(&shop).await, Vec::<Value>::new());
    shop.check().await;
    in_flight(&shop, 0.0).await;
    api.buy(&anna, &shelf.plenty()).await;
    shop.check().await;
}

/// A purchase that was given up still ends by whatever comes late, and takes no place twice.
#[tokio::test]
async fn a_purchase_that_was_given_up_still_ends_by_a_late_message() {
    let mut settings = carried();
    settings.purchase.max_tries = 2;
    let shop = Shop::open(settings).await;
    let shelf = Shelf::fill(&shop).await;
    let (api, customer, courier) = (shop.api(), shop.customer(7), shop.courier());
    courier.hold(&[PAYMENT_COMMANDS]);
    let id = api.buy(&customer, &shelf.plenty()).await;
    until("the payment is asked for", LIMIT, async || courier.held() > 0).await;
    let payment = courier.take_held().remove(0);
    shop.quiet_by_turning(shop.settings.purchase.retry_max).await;
    assert_eq!(api.state(&customer, id).await, "NEEDS_OPERATOR");
    courier.take_held();
    courier.be_honest();
    let mut watch = api.watch(&customer, Some("0")).await.unwrap();
    courier.deliver(PAYMENT_COMMANDS, payment.envelope);
    check_events(&watch.until_ended(&[id]).await, &[id]);
    assert_eq!(api.state(&customer, id).await, "SUCCEEDED");
    assert_eq!(parked_for_operator(&shop).await, Vec::<Value>::new());
    in_flight(&shop, 0.0).await;
    shop.check().await;
}

/// What the participants know of a saga is forgotten when it has ended long ago, and not before.
#[tokio::test]
async fn barrier_rows_go_when_their_saga_has_ended_and_no_message_can_name_it() {
    let mut settings = carried();
    settings.purchase.deadline = 10 * DAY;
    settings.purchase.max_tries = 5;
    settings.purchase.purge_interval = Duration::from_millis(10);
    settings.barrier_retention = DAY;
    let shop = Shop::open(settings).await;
    let shelf = Shelf::fill(&shop).await;
    let (api, customer, courier) = (shop.api(), shop.customer(7), shop.courier());
    let rows = async |id: u64| Books::of(&shop).await.replies_of(id);
    let old = api.buy(&customer, &shelf.plenty()).await;
    let rolled_back = api.buy(&customer, &shelf.dear()).await;
    shop.check().await;
    assert_eq!((rows(old).await, rows(rolled_back).await), (3, 5));

    // From here on one is stuck before its payment; purges are counted.
    let purges = Arc::new(AtomicU64::new(0));
    let counted = Arc::clone(&purges);
    courier.judge(move |passing| {
        if passing.is_purge() {
            counted.fetch_add(1, Ordering::SeqCst);
        }
        let pays = passing.command().is_some_and(|command| command.step == StepIndex(2));
        if pays { Fate::Hold } else { Fate::Deliver(1) }
    });
    let stuck = api.buy(&customer, &shelf.plenty()).await;
    until("it is stuck", LIMIT, async || rows(stuck).await == 2).await;
    let younger = api.buy(&customer, &[shelf.carts[1]]).await;
    until("another has ended", LIMIT, async || api.state(&customer, younger).await == "FAILED").await;
    let turn_and_purge = async |by: Duration| {
        // What is known to have ended is known for a while before the participants are told.
        for _ in 0..3 {
            let looks = shop.metric("saga_oldest_unfinished_seconds");
            shop.clock.turn(by / 3);
            until("the reconciler has looked", LIMIT, async || {
                shop.metric("saga_oldest_unfinished_seconds") != looks
            })
            .await;
        }
        // Each participant gets its own; two rounds, so that one has begun after now.
        let enough = purges.load(Ordering::SeqCst) + 2 * 3;
        until("the participants are told", LIMIT, async || purges.load(Ordering::SeqCst) >= enough).await;
        until("they have listened", LIMIT, async || courier.is_idle() && is_idle(&shop).await).await;
    };
    turn_and_purge(DAY / 2).await;
    assert_eq!((rows(old).await, rows(rolled_back).await), (3, 5), "they are kept for a day");
    turn_and_purge(2 * DAY).await;
    assert_eq!((rows(old).await, rows(rolled_back).await), (0, 0), "the old ones are forgotten");
    assert_eq!((rows(stuck).await, rows(younger).await), (2, 1), "not the open one, nor what is younger");
    assert_eq!(api.state(&customer, stuck).await, "PENDING");

    until("it is given up", LIMIT, async || {
        shop.clock.turn(DAY);
        api.state(&customer, stuck).await == "NEEDS_OPERATOR"
    })
    .await;
    let told = purges.load(Ordering::SeqCst);
    until("the participants are told", LIMIT, async || {
        shop.clock.turn(DAY);
        purges.load(Ordering::SeqCst) >= told + 10 * 3
    })
    .await;
    until("they have listened", LIMIT, async || courier.is_idle() && is_idle(&shop).await).await;
    assert_eq!((rows(stuck).await, rows(younger).await), (2, 1), "nor one that an operator may retry");

    let late = courier.take_held();
    courier.be_honest();
    assert_eq!(retry(&shop, stuck).await, 200);
    shop.check().await;
    assert_eq!(api.state(&customer, stuck).await, "CANCELLED");
    for passing in late {
        courier.deliver(passing.subject, passing.envelope);
    }
    until("what was late is answered", LIMIT, async || courier.is_idle() && is_idle(&shop).await).await;
    shop.check().await;

    until("in the end nothing is kept", LIMIT, async || {
        shop.clock.turn(DAY);
        rows(stuck).await + rows(younger).await == 0
    })
    .await;
    shop.check().await;
}

/// The steps of the definition are those that the tests name by number.
#[test]
fn the_steps_are_numbered_as_the_tests_number_them() {
    let definition = shop::purchase::purchase_saga();
    let steps: Vec<_> = definition.steps().map(|(index, step, _)| (index.0, step)).collect();
    use PurchaseStep::{CreateOrder, CreatePayment, UpdateProductInventory};
    assert_eq!(steps, [(0, UpdateProductInventory), (1, CreateOrder), (2, CreatePayment)]);
}

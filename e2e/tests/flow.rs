//! Purchases from the request to the last event, with everything in its place: what is answered, what is told, what can be
//! read when, and what is refused.

#![allow(clippy::unwrap_used, reason = "a test panics where something is not as it should be")]

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use bus::Limits;
use e2e::{Books, Drivers, Event, LIMIT, Part, Settings, Shop, Wiring, check_events};
use http::Method;
use serde_json::{Value, json};
use shop::purchase::{INVENTORY_COMMANDS, ORDER_COMMANDS, PAYMENT_COMMANDS, PURCHASE_PROGRESS};
use testkit::until;
use tokio::task::JoinSet;

const STOCK: &str = "UPDATE_PRODUCT_INVENTORY";
const ORDER: &str = "CREATE_ORDER";
const PAYMENT: &str = "CREATE_PAYMENT";
const EXECUTE: &str = "STATUS_EXECUTE";
const SUCCESS: &str = "STATUS_SUCCESS";
const FAILED: &str = "STATUS_FAILED";
const ROLLED_BACK: &str = "STATUS_ROLLBACKED";

const OF_A_SUCCESS: [(&str, &str); 6] = [
    (STOCK, EXECUTE),
    (STOCK, SUCCESS),
    (ORDER, EXECUTE),
    (ORDER, SUCCESS),
    (PAYMENT, EXECUTE),
    (PAYMENT, SUCCESS),
];
const OF_NO_STOCK: [(&str, &str); 2] = [(STOCK, EXECUTE), (STOCK, FAILED)];
const OF_A_DECLINE: [(&str, &str); 8] = [
    (STOCK, EXECUTE),
    (STOCK, SUCCESS),
    (ORDER, EXECUTE),
    (ORDER, SUCCESS),
    (PAYMENT, EXECUTE),
    (PAYMENT, FAILED),
    (ORDER, ROLLED_BACK),
    (STOCK, ROLLED_BACK),
];

fn carried() -> Settings {
    Settings { wiring: Wiring::Carried, ..Settings::default() }
}

fn with_purchases(change: impl FnOnce(&mut purchase::Config)) -> Settings {
    let mut settings = Settings::default();
    change(&mut settings.purchase);
    settings
}

/// The events of one purchase, as step and status.
fn history(events: &[Event], id: u64) -> Vec<(&str, &str)> {
    events.iter().filter(|event| event.purchase_id() == id).map(Event::what).collect()
}

fn ended(events: &[Event]) -> BTreeSet<u64> {
    let last = |event: &&Event| e2e::is_terminal(event.what().0, event.what().1);
    events.iter().filter(last).map(Event::purchase_id).collect()
}

fn without(ids: &[u64], ended: &BTreeSet<u64>) -> Vec<u64> {
    ids.iter().copied().filter(|id| !ended.contains(id)).collect()
}

/// Three products: two to sell, one of which is too dear for any payment, and one of which there are 3.
struct Shelf {
    plenty: u64,
    dear: u64,
    scarce: u64,
}

impl Shelf {
    async fn fill(shop: &Shop) -> Shelf {
        let api = shop.api();
        let plenty = api.product(10, 100_000).await;
        let dear = api.product(2_000_000, 1_000).await;
        let scarce = api.product(10, 3).await;
        Shelf { plenty, dear, scarce }
    }

    /// A cart of each kind: one that succeeds, one that is out of stock, one whose payment is declined.
    fn carts(&self) -> [(u64, i64); 3] {
        [(self.plenty, 2), (self.scarce, 9), (self.dear, 1)]
    }
}

#[tokio::test]
async fn a_success_and_each_failure_are_told_as_the_contract_says() {
    let shop = Shop::open(Settings::default()).await;
    let shelf = Shelf::fill(&shop).await;
    let (api, customer) = (shop.api(), shop.customer(7));
    let mut watch = api.watch(&customer, None).await.unwrap();
    assert_eq!(watch.headers["content-type"], "text/event-stream");
    assert_eq!(watch.headers["x-accel-buffering"], "no");
    let opening = watch.next_block().await.unwrap();
    assert!(opening.starts_with(':'), "a comment opens the stream, not {opening:?}");

    let mut ids = Vec::new();
    for cart in shelf.carts() {
        ids.push(api.buy(&customer, &[cart]).await);
    }
    let events = watch.until_ended(&ids).await;
    check_events(&events, &ids);
    assert_eq!(history(&events, ids[0]), OF_A_SUCCESS);
    assert_eq!(history(&events, ids[1]), OF_NO_STOCK);
    assert_eq!(history(&events, ids[2]), OF_A_DECLINE);

    let timestamp = shop.clock.now() / 1000;
    for event in &events {
        let (step, status) = event.what();
        let mut expected = json!({
            "purchase_id": event.purchase_id(), "step": step, "status": status,
            "timestamp": timestamp, "seq": event.seq(),
        });
        if status == FAILED {
            let reason = if event.purchase_id() == ids[1] {
                format!("out of stock: product {} has 3 left, 9 wanted", shelf.scarce)
            } else {
                "payment declined: 2000000 is above the limit of 1000000".to_owned()
            };
            expected["reason"] = Value::from(reason);
        }
        assert_eq!(event.data, expected);
    }
    let books = shop.check().await;
    assert_eq!(books.succeeded(), BTreeSet::from([ids[0]]));
    drop(api);
    shop.close().await;
}

#[tokio::test]
async fn a_stream_opened_before_during_or_after_tells_the_same() {
    let shop = Shop::open(carried()).await;
    let shelf = Shelf::fill(&shop).await;
    let (api, customer) = (shop.api(), shop.customer(7));
    let mut before = api.watch(&customer, None).await.unwrap();
    shop.courier().hold(&[ORDER_COMMANDS]);
    let id = api.buy(&customer, &[(shelf.dear, 1)]).await;
    until("the order is asked for", LIMIT, async || shop.courier().held() == 1).await;
    let mut during = api.watch(&customer, None).await.unwrap();
    shop.courier().release();
    for watch in [&mut before, &mut during] {
        assert_eq!(history(&watch.until_ended(&[id]).await, id), OF_A_DECLINE);
    }
    let mut after = api.watch(&customer, None).await.unwrap();
    assert_eq!(history(&after.until_ended(&[id]).await, id), OF_A_DECLINE);

    // Who comes later than the look-back hears of what comes, not of what was.
    shop.clock.turn(shop.settings.purchase.look_back + Duration::from_secs(1));
    let mut late = api.watch(&customer, None).await.unwrap();
    let next = api.buy(&customer, &[(shelf.plenty, 1)]).await;
    let events = late.until_ended(&[next]).await;
    check_events(&events, &[next]);
    // And who names the beginning gets everything.
    let everything = api.watch(&customer, Some("0")).await.unwrap().until_ended(&[id, next]).await;
    check_events(&everything, &[id, next]);
    shop.check().await;
}

#[tokio::test]
async fn a_stream_resumes_behind_every_event_also_after_a_restart() {
    let mut shop = Shop::open(carried()).await;
    let shelf = Shelf::fill(&shop).await;
    let customer = shop.customer(7);
    let mut ids = Vec::new();
    let whole = {
        let api = shop.api();
        let mut watch = api.watch(&customer, None).await.unwrap();
        for cart in shelf.carts() {
            ids.push(api.buy(&customer, &[cart]).await);
        }
        watch.until_ended(&ids).await
    };
    check_events(&whole, &ids);
    assert_eq!(whole.len(), OF_A_SUCCESS.len() + OF_NO_STOCK.len() + OF_A_DECLINE.len());
    assert_eq!(whole.last().unwrap().id, "3", "with nothing under way, a place in the stream is one number");
    for restarted in [false, true] {
        if restarted {
            shop.restart_purchases().await;
        }
        let api = shop.api();
        for cut in 0..=whole.len() {
            let last_event_id = if cut == 0 { "0" } else { whole[cut - 1].id.as_str() };
            let mut watch = api.watch(&customer, Some(last_event_id)).await.unwrap();
            let rest = watch.until_ended(&without(&ids, &ended(&whole[..cut]))).await;
            let all: Vec<Event> = whole[..cut].iter().cloned().chain(rest).collect();
            check_events(&all, &ids);
            let told: BTreeSet<String> = all.iter().map(|event| event.data.to_string()).collect();
            let expected = whole.iter().map(|event| event.data.to_string()).collect();
            assert_eq!(told, expected, "cut behind {cut}, restarted: {restarted}");
        }
    }
    shop.check().await;
}

/// The connection is cut while purchases go on, behind each possible number of events.
#[tokio::test]
async fn a_stream_that_is_cut_while_purchases_go_on_misses_nothing() {
    let shop = Shop::open(carried()).await;
    let shelf = Shelf::fill(&shop).await;
    let (api, customer) = (shop.api(), shop.customer(7));
    let events_in_all = OF_A_SUCCESS.len() + OF_NO_STOCK.len() + OF_A_DECLINE.len();
    let mut last_event_id = "0".to_owned();
    for cut in 0..=events_in_all {
        let mut watch = api.watch(&customer, Some(&last_event_id)).await.unwrap();
        let mut ids = Vec::new();
        for cart in shelf.carts() {
            ids.push(api.buy(&customer, &[cart]).await);
        }
        let mut events = Vec::new();
        while events.len() < cut {
            events.push(watch.next().await.unwrap());
        }
        drop(watch);
        last_event_id = events.last().map_or(last_event_id, |event| event.id.clone());
        let mut resumed = api.watch(&customer, Some(&last_event_id)).await.unwrap();
        events.extend(resumed.until_ended(&without(&ids, &ended(&events))).await);
        check_events(&events, &ids);
        last_event_id = events.last().unwrap().id.clone();
    }
    shop.check().await;
}

#[tokio::test]
async fn with_a_hundred_under_way_a_resumed_stream_may_repeat_and_never_misses() {
    const BUYS: usize = 100;
    let shop = Shop::open(carried()).await;
    let shelf = Shelf::fill(&shop).await;
    let (api, customer) = (shop.api(), shop.customer(7));
    let mut watch = api.watch(&customer, None).await.unwrap();
    shop.courier().hold(&[PAYMENT_COMMANDS]);
    let mut ids = Vec::new();
    let mut events = Vec::new();
    for _ in 0..BUYS {
        ids.push(api.buy(&customer, &[(shelf.plenty, 1)]).await);
        events.extend(watch.ready().await);
    }
    until("all wait for their payment", LIMIT, async || shop.courier().held() == BUYS).await;
    while events.len() < 5 * BUYS {
        events.push(watch.next().await.unwrap());
    }
    shop.courier().release();
    events.extend(watch.until_ended(&ids).await);
    check_events(&events, &ids);

    let of = |event: &Event| (event.purchase_id(), event.seq());
    let everything: BTreeSet<_> = events.iter().map(of).collect();
    for cut in (1..events.len()).step_by(13) {
        let (read, unread) = events.split_at(cut);
        let mut resumed = api.watch(&customer, Some(&read[cut - 1].id)).await.unwrap();
        // A purchase whose end was read may be repeated, or not; those that were open come whole.
        let rest = resumed.until_ended(&without(&ids, &ended(read))).await;
        let told: BTreeSet<_> = read.iter().chain(&rest).map(of).collect();
        assert_eq!(told, everything, "cut behind {cut}");
        assert!(rest.len() >= unread.len(), "cut behind {cut}");
    }
    shop.check().await;
}

#[tokio::test]
async fn a_client_that_does_not_read_is_dropped_at_a_bound_and_can_resume() {
    // More than the news that wait for one stream at most: each purchase is news at least twice.
    const BUYS: usize = 1_200;
    let shop = Shop::open(with_purchases(|purchase| purchase.max_open_per_customer = 2 * BUYS)).await;
    let shelf = Shelf::fill(&shop).await;
    let (api, customer) = (shop.api(), shop.customer(7));
    let mut sleepy = api.watch(&customer, None).await.unwrap();
    let mut ids = Vec::new();
    for _ in 0..BUYS {
        ids.push(api.buy(&customer, &[(shelf.plenty, 1)]).await);
    }
    shop.quiet().await;
    let mut events = Vec::new();
    while let Some(event) = sleepy.next().await {
        events.push(event);
    }
    assert!(events.len() < ids.len() * OF_A_SUCCESS.len(), "all {} events were kept for it", events.len());
    let mut resumed = api.watch(&customer, Some(&events.last().unwrap().id)).await.unwrap();
    events.extend(resumed.until_ended(&without(&ids, &ended(&events))).await);
    let of = |event: &Event| (event.purchase_id(), event.seq());
    let told: BTreeSet<_> = events.iter().map(of).collect();
    let everything = ids.iter().flat_map(|id| (1..=6).map(|seq| (*id, seq))).collect();
    assert_eq!(told, everything);
    shop.check().await;
}

#[tokio::test]
async fn nobody_sees_what_is_not_theirs() {
    let shop = Shop::open(Settings::default()).await;
    let shelf = Shelf::fill(&shop).await;
    let (api, anna, bert) = (shop.api(), shop.customer(7), shop.customer(8));
    let mut of_anna = api.watch(&anna, None).await.unwrap();
    let mut of_bert = api.watch(&bert, None).await.unwrap();
    let (mut annas, mut berts) = (Vec::new(), Vec::new());
    for cart in shelf.carts() {
        annas.push(api.buy(&anna, &[cart]).await);
        berts.push(api.buy(&bert, &[cart]).await);
    }
    let told_to_anna = of_anna.until_ended(&annas).await;
    check_events(&told_to_anna, &annas);
    check_events(&of_bert.until_ended(&berts).await, &berts);
    // With another's place in the stream one still gets one's own, from there on.
    let borrowed = told_to_anna[0].id.as_str();
    check_events(&api.watch(&bert, Some(borrowed)).await.unwrap().until_ended(&berts).await, &berts);

    for what in ["purchase", "order", "payment"] {
        let path = format!("/api/{what}/{}", annas[0]);
        assert_eq!(api.get(&anna, &path).await.status, 200);
        let refused = api.get(&bert, &path).await;
        assert_eq!((refused.status, refused.msg()), (404, format!("{what} not found").as_str()));
    }
    shop.check().await;
}

#[tokio::test]
async fn streams_that_cannot_be_are_refused() {
    let settings = with_purchases(|purchase| {
        purchase.max_streams = 3;
        purchase.max_streams_per_customer = 2;
    });
    let shop = Shop::open(settings).await;
    let (api, anna, bert) = (shop.api(), shop.customer(7), shop.customer(8));
    for malformed in ["x", "1-", "-1", "1-2", "1-2.x", "1.5", "99999999999999999999"] {
        let refused = api.watch(&anna, Some(malformed)).await.err().unwrap();
        assert_eq!(refused.status, 400, "{malformed}");
        assert!(refused.msg().starts_with("invalid Last-Event-ID"), "{}", refused.body);
    }
    let path = "/api/purchase/result?last_event_id=1-2";
    assert_eq!(api.get(&anna, path).await.status, 400, "in the query, too");
    let nobody = api.request(Method::GET, "/api/purchase/result", None, &[], None).await;
    assert_eq!((nobody.status, nobody.msg()), (401, "missing access token"));

    let first = api.watch(&anna, None).await.unwrap();
    let _second = api.watch(&anna, None).await.unwrap();
    let third = api.watch(&anna, None).await.err().unwrap();
    assert_eq!((third.status, third.retry_after()), (429, Some(1)));
    let _of_bert = api.watch(&bert, None).await.unwrap();
    let one_too_many = api.watch(&bert, None).await.err().unwrap();
    assert_eq!((one_too_many.status, one_too_many.retry_after()), (503, Some(1)));
    drop(first);
    api.watch(&bert, None).await.map(drop).expect("one that was closed makes room");
}

#[tokio::test]
async fn what_is_told_can_be_read_at_once() {
    let shop = Shop::open(Settings::default()).await;
    let (api, customer) = (shop.api(), shop.customer(7));
    let product = api.product(10, 100).await;
    let dear = api.product(2_000_000, 5).await;
    let mut watch = api.watch(&customer, None).await.unwrap();
    for bought in 1..=20 {
        let id = api.buy(&customer, &[(product, 2)]).await;
        loop {
            let event = watch.next().await.unwrap();
            match event.what() {
                (STOCK, SUCCESS) => assert_eq!(api.stock(product).await, 100 - 2 * bought),
                (ORDER, SUCCESS) => {
                    let order = api.get(&customer, &format!("/api/order/{id}")).await;
                    assert_eq!(order.body["purchased_items"][0]["amount"], 2);
                }
                (PAYMENT, SUCCESS) => {
                    let payment = api.get(&customer, &format!("/api/payment/{id}")).await.body;
                    assert_eq!(payment, json!({"id": id, "currency_code": "EUR", "amount": 20}));
                    let purchase = api.purchase(&customer, id).await;
                    assert_eq!(purchase["state"], "SUCCEEDED");
                    assert_eq!(purchase["finished_at"], shop.clock.now() / 1000);
                    break;
                }
                (_, status) => assert_eq!(status, EXECUTE),
            }
        }
    }
    let id = api.buy(&customer, &[(dear, 1)]).await;
    loop {
        let event = watch.next().await.unwrap();
        match event.what() {
            (ORDER, ROLLED_BACK) => {
                assert_eq!(api.get(&customer, &format!("/api/order/{id}")).await.status, 404)
            }
            (STOCK, ROLLED_BACK) => {
                assert_eq!(api.stock(dear).await, 5);
                assert_eq!(api.state(&customer, id).await, "FAILED");
                break;
            }
            _ => {}
        }
    }
    shop.check().await;
}

#[tokio::test]
async fn an_end_is_not_told_before_it_is_written() {
    let shop = Shop::open(carried()).await;
    let shelf = Shelf::fill(&shop).await;
    let (api, customer) = (shop.api(), shop.customer(7));
    let mut watch = api.watch(&customer, None).await.unwrap();
    shop.courier().hold(&[PAYMENT_COMMANDS]);
    let id = api.buy(&customer, &[(shelf.plenty, 1)]).await;
    until("the payment is asked for", LIMIT, async || shop.courier().held() == 1).await;
    let mut events = Vec::new();
    while events.len() < 5 {
        events.push(watch.next().await.unwrap());
    }
    let writes = shop.hold_purchase_writes().await;
    shop.courier().release();
    until("the end is about to be written", LIMIT, async || shop.waiting_purchase_writes() > 0).await;
    // Whatever was announced by now is before this question in the same queue. The stream says the same, but it may hold
    // progress back for a moment: what is shown here tells at once.
    let shown = api.purchase(&customer, id).await;
    assert_eq!((shown["state"].as_str(), shown["steps"].as_array().unwrap().len()), (Some("PENDING"), 5));
    assert_eq!(watch.ready().await, []);
    drop(writes);
    events.extend(watch.until_ended(&[id]).await);
    check_events(&events, &[id]);
    shop.check().await;
}

#[tokio::test]
async fn nothing_is_started_before_it_is_accepted() {
    let shop = Shop::open(Settings { replicas: 0, ..Settings::default() }).await;
    let shelf = Shelf::fill(&shop).await;
    let (api, customer) = (shop.api(), shop.customer(7));
    let started = async || shop.bus().depth(INVENTORY_COMMANDS).await.unwrap().held();
    let writes = shop.hold_purchase_writes().await;
    let buying = tokio::spawn({
        let (api, customer, cart) = (api.clone(), customer.clone(), [(shelf.plenty, 1)]);
        async move { api.buy(&customer, &cart).await }
    });
    until("it is about to be written", LIMIT, async || shop.waiting_purchase_writes() > 0).await;
    assert_eq!(started().await, 0, "what may still be rolled back has no effect");
    assert!(!buying.is_finished(), "nor is it answered");
    drop(writes);
    let id = buying.await.unwrap();
    until("it is started", LIMIT, async || started().await == 1).await;
    assert_eq!(api.state(&customer, id).await, "PENDING");
}

#[tokio::test]
async fn a_purchase_shows_how_far_it_is_and_never_goes_back() {
    let shop = Shop::open(carried()).await;
    let shelf = Shelf::fill(&shop).await;
    let (api, customer, courier) = (shop.api(), shop.customer(7), shop.courier());
    courier.hold(&[PAYMENT_COMMANDS, PURCHASE_PROGRESS]);
    let id = api.buy(&customer, &[(shelf.dear, 3)]).await;
    until("two steps are done", LIMIT, async || courier.held() == 3).await;
    let shown = api.purchase(&customer, id).await;
    let steps = |shown: &Value| shown["steps"].as_array().unwrap().len();
    assert_eq!((shown["state"].as_str(), steps(&shown)), (Some("PENDING"), 1));
    let expected = json!([{"product_id": shelf.dear, "amount": 3, "price": 2_000_000}]);
    assert_eq!(shown["items"], expected);
    assert_eq!(shown["payment"], json!({"currency_code": "EUR", "amount": 6_000_000}));
    assert_eq!((&shown["finished_at"], &shown["reason"]), (&Value::Null, &Value::Null));

    // The two reports arrive in the wrong order.
    let (mut reports, commands): (Vec<_>, Vec<_>) =
        courier.take_held().into_iter().partition(|passing| passing.subject == PURCHASE_PROGRESS);
    reports.sort_by_key(|passing| passing.envelope.body.len());
    let later = reports.pop().unwrap();
    courier.deliver(later.subject, later.envelope);
    until("the later report is shown", LIMIT, async || steps(&api.purchase(&customer, id).await) == 5).await;
    let acked = shop.bus_of_purchases().stats().acked;
    let earlier = reports.pop().unwrap();
    courier.deliver(earlier.subject, earlier.envelope);
    until("the earlier report is read", LIMIT, async || shop.bus_of_purchases().stats().acked > acked).await;
    assert_eq!(steps(&api.purchase(&customer, id).await), 5, "a purchase never goes back");
    // A stream that is opened now is told the same.
    let mut watch = api.watch(&customer, None).await.unwrap();
    for expected in &OF_A_DECLINE[..5] {
        assert_eq!(watch.next().await.unwrap().what(), *expected);
    }

    courier.hold(&[INVENTORY_COMMANDS]);
    for command in commands {
        courier.deliver(command.subject, command.envelope);
    }
    until("it is rolled back", LIMIT, async || courier.held() == 1).await;
    until("the rollback shows", LIMIT, async || steps(&api.purchase(&customer, id).await) == 7).await;
    let shown = api.purchase(&customer, id).await;
    assert_eq!(shown["state"], "ROLLING_BACK");
    assert_eq!(shown["reason"], "payment declined: 6000000 is above the limit of 1000000");
    assert_eq!(shown["finished_at"], Value::Null);
    courier.release();
    shop.check().await;
    let shown = api.purchase(&customer, id).await;
    assert_eq!((shown["state"].as_str(), steps(&shown)), (Some("FAILED"), 8));
    assert_eq!(shown["finished_at"], shop.clock.now() / 1000);
}

#[tokio::test]
async fn purchases_are_listed_newest_first_in_pages() {
    let shop = Shop::open(Settings::default()).await;
    let shelf = Shelf::fill(&shop).await;
    let (api, customer) = (shop.api(), shop.customer(7));
    let mut ids = Vec::new();
    for _ in 0..5 {
        ids.insert(0, api.buy(&customer, &[(shelf.plenty, 1)]).await);
        api.buy(&shop.customer(8), &[(shelf.plenty, 1)]).await;
    }
    shop.check().await;
    let page = async |offset: u64, size: u64| -> Vec<u64> {
        let listed = api.get(&customer, &format!("/api/purchases?offset={offset}&size={size}")).await.body;
        listed["purchases"].as_array().unwrap().iter().map(|one| one["id"].as_u64().unwrap()).collect()
    };
    assert_eq!(page(0, 500).await, ids);
    assert_eq!(page(0, 2).await, ids[..2]);
    assert_eq!(page(2, 2).await, ids[2..4]);
    assert_eq!(page(4, 2).await, ids[4..]);
    assert!(page(5, 2).await.is_empty());
    let listed = api.get(&customer, "/api/purchases?size=1").await.body;
    assert_eq!(listed["purchases"][0].get("steps"), None, "without their steps");
    assert_eq!(listed["purchases"][0]["state"], "SUCCEEDED");
    for query in ["", "?size=0", "?size=501", "?size=x", "?offset=-1&size=1"] {
        assert_eq!(api.get(&customer, &format!("/api/purchases{query}")).await.status, 400, "{query}");
    }
}

#[tokio::test]
async fn what_is_refused_for_want_of_room_has_no_effect_and_takes_no_room() {
    let settings = with_purchases(|purchase| {
        purchase.max_in_flight = 4;
        purchase.max_open_per_customer = 3;
    });
    let mut shop = Shop::open(Settings { replicas: 0, ..settings }).await;
    let shelf = Shelf::fill(&shop).await;
    let (anna, bert) = (shop.customer(7), shop.customer(8));
    let cart = [(shelf.plenty, 1)];
    let api = shop.api();
    let first = api.try_buy(&anna, &cart, Some("k")).await.purchase_id();
    // Neither a request that is repeated nor one that makes no sense takes room.
    for _ in 0..5 {
        assert_eq!(api.try_buy(&anna, &cart, Some("k")).await.purchase_id(), first);
        assert_eq!(api.try_buy(&anna, &[(shelf.plenty, 2)], Some("k")).await.status, 422);
        assert_eq!(api.try_buy(&anna, &[(1, 1)], None).await.status, 404);
        assert_eq!(api.try_buy(&anna, &[(shelf.plenty, 0)], None).await.status, 400);
    }
    api.buy(&anna, &cart).await;
    api.buy(&anna, &cart).await;
    let too_many_of_one = api.try_buy(&anna, &cart, Some("refused")).await;
    assert_eq!((too_many_of_one.status, too_many_of_one.retry_after()), (429, Some(1)));
    api.buy(&bert, &cart).await;
    let too_many = api.try_buy(&bert, &cart, Some("refused")).await;
    assert_eq!((too_many.status, too_many.retry_after()), (503, Some(1)));
    assert_eq!(too_many.msg(), "too many purchases are under way");
    assert_eq!(shop.open_purchases().await, 4, "a refused request left no row");

    drop(api);
    for part in [Part::Orchestrator, Part::Stock, Part::Orders, Part::Payments] {
        shop.start(part).await;
    }
    assert_eq!(shop.check().await.succeeded().len(), 4);
    let api = shop.api();
    for _ in 0..2 {
        // As much room as in the beginning, and the keys that were refused are free.
        until("what has ended makes room", LIMIT, async || shop.metric("saga_in_flight") == 0.0).await;
        for who in [&anna, &anna, &anna, &bert] {
            api.try_buy(who, &cart, None).await.purchase_id();
        }
        shop.quiet().await;
    }
    until("what has ended makes room", LIMIT, async || shop.metric("saga_in_flight") == 0.0).await;
    let retried = api.try_buy(&anna, &cart, Some("refused")).await.purchase_id();
    assert!(!shop.check().await.needs_operator().contains(&retried));
}

/// Who comes behind purchases that are stuck waits only so long, leaves nothing behind, and may come again.
#[tokio::test]
async fn behind_purchases_that_are_stuck_customers_are_refused() {
    let settings = with_purchases(|purchase| {
        purchase.accept_patience = Duration::from_millis(50);
        purchase.max_in_flight = 2;
    });
    let shop = Shop::open(settings).await;
    let shelf = Shelf::fill(&shop).await;
    let (anna, bert, cart) = (shop.customer(7), shop.customer(8), [(shelf.plenty, 1)]);
    let api = shop.api();
    // From now on the price is known, and a request is behind the others as soon as it has its place.
    api.buy(&anna, &cart).await;
    // Not by `saga_in_flight`: that is zero until the reconciler has looked for the first time.
    until("it has ended", LIMIT, async || shop.open_purchases().await == 0).await;

    let held = shop.hold_purchase_writes().await;
    let first = api.try_buy(&anna, &cart, Some("hers"));
    let second = async {
        until("hers is under way", LIMIT, async || shop.metric("saga_in_flight") == 1.0).await;
        // Had his place not become free again, there would be none for the next time.
        for _ in 0..3 {
            let refused = tokio::time::timeout(LIMIT, api.try_buy(&bert, &cart, Some("his"))).await;
            let refused = refused.expect("he waits as long as she does");
            assert_eq!((refused.status, refused.retry_after()), (503, Some(1)));
            assert_eq!(refused.msg(), "temporarily unavailable, try again");
        }
        drop(held);
    };
    let (first, ()) = tokio::join!(first, second);
    let second = api.try_buy(&bert, &cart, Some("his")).await.purchase_id();
    assert_ne!(first.purchase_id(), second);
    drop(api);
    assert_eq!(shop.check().await.succeeded().len(), 3);
}

#[tokio::test]
async fn more_requests_than_may_wait_are_refused_at_once() {
    let settings = with_purchases(|purchase| {
        purchase.accept_queue_requests = 1;
        purchase.accept_batch_requests = 1;
    });
    let shop = Shop::open(settings).await;
    let shelf = Shelf::fill(&shop).await;
    let (api, customer) = (shop.api(), shop.customer(7));
    let in_flight = async |count: f64| {
        until("the metric follows", LIMIT, async || shop.metric("saga_in_flight") == count).await;
    };
    let writes = shop.hold_purchase_writes().await;
    let mut buying = JoinSet::new();
    // A batch of one is about to be written, and one request waits.
    for waiting in 1..=2 {
        let (api, customer, cart) = (api.clone(), customer.clone(), [(shelf.plenty, 1)]);
        buying.spawn(async move { api.buy(&customer, &cart).await });
        in_flight(f64::from(waiting)).await;
        until("a batch is about to be written", LIMIT, async || shop.waiting_purchase_writes() > 0).await;
    }
    let refused = api.try_buy(&customer, &[(shelf.plenty, 1)], None).await;
    assert_eq!((refused.status, refused.retry_after()), (503, Some(1)));
    assert_eq!(refused.msg(), "too many purchases are waiting");
    drop(writes);
    assert_eq!(buying.join_all().await.len(), 2);
    assert_eq!(shop.check().await.purchases().len(), 2);
    in_flight(0.0).await;
}

/// Row 13 of the faults: requests with one key in one transaction, and in several.
#[tokio::test]
async fn fifty_requests_with_one_key_are_one_purchase() {
    const REQUESTS: usize = 50;
    let shop = Shop::open(Settings::default()).await;
    let shelf = Shelf::fill(&shop).await;
    let (api, customer) = (shop.api(), shop.customer(7));
    let try_buy = |key: &'static str, amount: i64| {
        let (api, customer, cart) = (api.clone(), customer.clone(), [(shelf.plenty, amount)]);
        async move { api.try_buy(&customer, &cart, Some(key)).await }
    };
    // While the first is about to be written, the others gather, so that they are accepted in one transaction.
    let writes = shop.hold_purchase_writes().await;
    let first = tokio::spawn(try_buy("first", 1));
    until("the first is about to be written", LIMIT, async || shop.waiting_purchase_writes() > 0).await;
    let mut requests = JoinSet::new();
    for request in 0..REQUESTS {
        // The last one is another request under the same key.
        requests.spawn(try_buy("k", if request == REQUESTS - 1 { 2 } else { 1 }));
    }
    until("all have been admitted", LIMIT, async || shop.metric("saga_in_flight") == 1.0 + REQUESTS as f64)
        .await;
    drop(writes);
    first.await.unwrap().purchase_id();
    let answers = requests.join_all().await;
    let ids: BTreeSet<u64> =
        answers.iter().filter(|answer| answer.status == 201).map(e2e::Answer::purchase_id).collect();
    assert_eq!(ids.len(), 1);
    let other = answers.iter().filter(|answer| answer.status == 422).count();
    assert_eq!(other + answers.iter().filter(|answer| answer.status == 201).count(), REQUESTS);
    assert!(other == 1 || other == REQUESTS - 1, "{other} were another request");
    let books = shop.check().await;
    assert_eq!(books.purchases().len(), 2);
    assert_eq!(books.succeeded().len(), 2);
    // Long after, the key still names that purchase.
    let amount = if other == 1 { 1 } else { 2 };
    assert!(ids.contains(&try_buy("k", amount).await.purchase_id()));
}

#[tokio::test]
async fn a_product_named_twice_counts_as_the_sum() {
    let shop = Shop::open(Settings::default()).await;
    let shelf = Shelf::fill(&shop).await;
    let (api, customer) = (shop.api(), shop.customer(7));
    let id = api.buy(&customer, &[(shelf.plenty, 1), (shelf.scarce, 1), (shelf.plenty, 4)]).await;
    shop.check().await;
    assert_eq!(api.state(&customer, id).await, "SUCCEEDED");
    assert_eq!(api.stock(shelf.plenty).await, 100_000 - 5);
    let order = api.get(&customer, &format!("/api/order/{id}")).await.body;
    let items = order["purchased_items"].as_array().unwrap();
    let amounts: BTreeSet<_> =
        items.iter().map(|item| (item["product_id"].as_u64(), item["amount"].as_i64())).collect();
    assert_eq!(amounts, BTreeSet::from([(Some(shelf.plenty), Some(5)), (Some(shelf.scarce), Some(1))]));
    assert_eq!(api.get(&customer, &format!("/api/payment/{id}")).await.body["amount"], 60);
}

#[tokio::test]
async fn what_the_bus_did_not_take_is_started_later_and_replays_do_not_feed_an_overload() {
    const QUEUE: usize = 16;
    let limits = Limits { queue_envelopes: QUEUE, frame_envelopes: QUEUE, ..Limits::default() };
    let settings = with_purchases(|purchase| {
        purchase.deadline = Duration::from_secs(1_000_000_000);
        purchase.max_tries = u32::MAX;
    });
    let mut shop = Shop::open(Settings { replicas: 0, bus: limits, ..settings }).await;
    let shelf = Shelf::fill(&shop).await;
    let customer = shop.customer(7);
    let api = shop.api();
    for _ in 0..3 * QUEUE {
        api.buy(&customer, &[(shelf.plenty, 1)]).await;
    }
    drop(api);
    until("what fits is started", LIMIT, async || {
        shop.bus().depth(INVENTORY_COMMANDS).await.unwrap().held() == QUEUE
    })
    .await;
    // All are due, long since; the queue is full.
    shop.clock.turn(Duration::from_secs(10_000));
    let looked = async || shop.metric("saga_oldest_unfinished_seconds") >= 10_000.0;
    until("the reconciler has looked", LIMIT, looked).await;
    assert_eq!(Books::of(&shop).await.tries(), 0, "a try that cannot succeed is not made");
    for part in [Part::Orchestrator, Part::Stock, Part::Orders, Part::Payments] {
        shop.start(part).await;
    }
    shop.quiet_by_turning(Duration::from_secs(60)).await;
    let books = shop.check().await;
    assert_eq!(books.succeeded().len(), 3 * QUEUE);
    assert_eq!(shop.parked().await, []);
}

/// The orchestrator's queue is full of replies that call for orders, and the orders' queue is full of commands whose replies
/// find no room in the orchestrator's.
#[tokio::test]
async fn two_queues_that_are_full_of_each_other_move_again() {
    const QUEUE: usize = 8;
    let limits = Limits { queue_envelopes: QUEUE, frame_envelopes: QUEUE, ..Limits::default() };
    let settings = with_purchases(|purchase| purchase.deadline = Duration::from_secs(1_000_000_000));
    let mut shop =
        Shop::open(Settings { replicas: 0, bus: limits, drivers: Drivers::Orchestrators, ..settings }).await;
    for part in [Part::Orchestrator, Part::Stock, Part::Payments] {
        shop.start(part).await;
    }
    let shelf = Shelf::fill(&shop).await;
    let (api, customer) = (shop.api(), shop.customer(7));
    let mut ids = Vec::new();
    for _ in 0..2 * QUEUE {
        let id = api.buy(&customer, &[(shelf.plenty, 1)]).await;
        until("its stock is reserved", LIMIT, async || Books::of(&shop).await.has_reservation(id)).await;
        ids.push(id);
    }
    drop(api);
    until("an order was refused", LIMIT, async || shop.bus().stats().refused > 0).await;
    shop.start(Part::Orders).await;
    shop.quiet_by_turning(shop.settings.purchase.retry_first).await;
    assert_eq!(shop.check().await.succeeded(), ids.into_iter().collect());
}

/// The orders' queue is full of what to take back, which calls for stock to be given back, and the stock's queue is full of
/// purchases that call for orders.
#[tokio::test]
async fn two_participants_whose_queues_are_full_of_each_other_move_again() {
    const QUEUE: usize = 8;
    let limits = Limits { queue_envelopes: QUEUE, frame_envelopes: QUEUE, ..Limits::default() };
    let settings = with_purchases(|purchase| purchase.deadline = Duration::from_secs(1_000_000_000));
    let mut shop = Shop::open(Settings { replicas: 0, bus: limits, ..settings }).await;
    for part in [Part::Orchestrator, Part::Stock, Part::Orders] {
        shop.start(part).await;
    }
    let shelf = Shelf::fill(&shop).await;
    let (api, customer) = (shop.api(), shop.customer(7));
    let bus = shop.bus().clone();
    let held = async |subject, count| {
        until("so many wait", LIMIT, async || bus.depth(subject).await.unwrap().held() == count).await;
    };
    for declined in 1..=QUEUE {
        api.buy(&customer, &[(shelf.dear, 1)]).await;
        held(PAYMENT_COMMANDS, declined).await;
    }
    shop.stop(Part::Orders).await;
    shop.start(Part::Payments).await;
    held(ORDER_COMMANDS, QUEUE).await;
    shop.stop(Part::Stock).await;
    let mut good = BTreeSet::new();
    for waiting in 1..=QUEUE {
        good.insert(api.buy(&customer, &[(shelf.plenty, 1)]).await);
        held(INVENTORY_COMMANDS, waiting).await;
    }
    drop(api);
    shop.start(Part::Stock).await;
    shop.start(Part::Orders).await;
    until("an order was refused", LIMIT, async || bus.stats().refused > 0).await;
    shop.quiet_by_turning(shop.settings.purchase.retry_first).await;
    assert_eq!(shop.check().await.succeeded(), good);
}

/// Row 11 of the faults.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_five_hundred_buyers_a_hundred_get_one_of_a_hundred() {
    let shop = Shop::open(Settings { replicas: 4, ..Settings::default() }).await;
    let api = Arc::new(shop.api());
    let hot = api.product(10, 100).await;
    let mut buyers = JoinSet::new();
    for id in 1..=500 {
        let (api, customer) = (Arc::clone(&api), shop.customer(id));
        buyers.spawn(async move { api.buy(&customer, &[(hot, 1)]).await });
    }
    assert_eq!(buyers.join_all().await.into_iter().collect::<BTreeSet<_>>().len(), 500);
    let books = shop.check().await;
    assert_eq!(books.succeeded().len(), 100);
    assert_eq!(api.stock(hot).await, 0);
}

//! The purchase service in several replicas on one database, whatever becomes of the news between them.

#![allow(clippy::unwrap_used, reason = "a test panics where something is not as it should be")]

use std::collections::BTreeSet;
use std::time::Duration;

use e2e::{
    Api, Customer, Event, Herald, LIMIT, News, Part, PurchasesOn, Settings, Shop, Watch, Weather,
    check_events,
};
use http::Method;
use servers::Proxy;
use shop::purchase::ORCHESTRATOR;
use testkit::{Dice, until};
use tokio::task::JoinSet;

const REPLICAS: usize = 3;
const PARTS: [Part; 4] = [Part::Stock, Part::Orders, Part::Payments, Part::Orchestrator];
/// The time after which an open purchase is looked after for the first time.
const RETRY_FIRST: Duration = Duration::from_secs(5);

/// Starts that wait for an orchestrator.
async fn waiting(bus: &bus::Bus) -> usize {
    bus.depth(ORCHESTRATOR).await.expect("a bus in memory tells at once").held()
}

/// Makes two tests of each: on a file that all replicas open, and on a server.
macro_rules! on_both {
    ($($test:ident,)*) => {
        mod on_a_file {
            $(#[tokio::test] async fn $test() { super::$test(super::PurchasesOn::File).await; })*
        }
        mod on_mariadb {
            // On several threads: what replicas do at once, they do at once.
            $(#[tokio::test(flavor = "multi_thread", worker_threads = 3)]
            async fn $test() { super::$test(super::PurchasesOn::MariaDb).await; })*
        }
    };
}

on_both! {
    each_stream_tells_everything_in_order_and_once,
    a_stream_that_moves_misses_nothing_and_repeats_nothing,
    what_others_accept_is_told_as_it_goes_if_the_news_come_and_with_its_end_if_not,
    fifty_requests_with_one_key_to_three_replicas_are_one_purchase,
    what_is_due_is_taken_by_one_and_a_start_wakes_nothing,
    when_the_broker_has_lost_everything_all_of_it_ends,
    what_a_dead_replica_has_accepted_ends_and_its_streams_go_on_elsewhere,
    what_ends_elsewhere_makes_room_although_no_news_come,
    what_is_left_to_an_operator_elsewhere_makes_room_and_can_be_retried_anywhere,
}

fn several(on: PurchasesOn, news: News) -> Settings {
    let mut settings = Settings { purchases_on: on, news, ..Settings::default() };
    settings.purchase.replicated = true;
    settings
}

/// News as a herald carries them in this weather.
fn carried(weather: Weather) -> (Herald, News) {
    let herald = Herald::new(weather, 5);
    (herald.clone(), News::Herald(herald))
}

async fn open(settings: Settings) -> Shop {
    let mut shop = Shop::open(settings).await;
    for _ in 1..REPLICAS {
        shop.add_purchases().await;
    }
    shop
}

/// Three products: two to sell, one of which is too dear for any payment, and one of which there are none.
struct Shelf {
    carts: [(u64, i64); 3],
}

impl Shelf {
    async fn fill(shop: &Shop) -> Shelf {
        let api = shop.api();
        let plenty = api.product(10, 1_000_000).await;
        let sold_out = api.product(10, 0).await;
        let dear = api.product(2_000_000, 1_000_000).await;
        Shelf { carts: [(plenty, 1), (sold_out, 1), (dear, 1)] }
    }
}

/// The events of these purchases, to their ends, and that no other event is among them.
async fn told(watch: &mut Watch, ids: &[u64]) {
    let events = watch.until_ended(ids).await;
    check_events(&events, ids);
}

async fn each_stream_tells_everything_in_order_and_once(on: PurchasesOn) {
    const ROUNDS: usize = 30;
    let (herald, news) = carried(Weather::Rough);
    let shop = open(several(on, news)).await;
    let shelf = Shelf::fill(&shop).await;
    let customers = [7, 8].map(|id| shop.customer(id));
    let mut streams = Vec::new();
    for (customer, replica) in
        customers.iter().flat_map(|customer| (0..REPLICAS).map(move |at| (customer, at)))
    {
        streams.push((customer.id, shop.api_of(replica).watch(customer, None).await.unwrap()));
    }
    let mut bought: [Vec<u64>; 2] = Default::default();
    for round in 0..ROUNDS {
        for (customer, bought) in customers.iter().zip(&mut bought) {
            let api = shop.api_of((round + customer.id as usize) % REPLICAS);
            bought.push(api.buy(customer, &[shelf.carts[round % 3]]).await);
        }
    }
    for (customer_id, watch) in &mut streams {
        told(watch, &bought[*customer_id as usize - 7]).await;
    }
    // If anything were told twice, it would stand before these.
    herald.weather(Weather::Fair);
    for customer in &customers {
        let last = shop.api().buy(customer, &[shelf.carts[2]]).await;
        for (_, watch) in streams.iter_mut().filter(|(id, _)| *id == customer.id) {
            told(watch, &[last]).await;
        }
    }
    assert!(herald.taken() > 0);
    shop.check().await;
}

async fn a_stream_that_moves_misses_nothing_and_repeats_nothing(on: PurchasesOn) {
    let (_herald, news) = carried(Weather::Rough);
    let shop = open(several(on, news)).await;
    let shelf = Shelf::fill(&shop).await;
    let customer = shop.customer(7);
    let mut last_event_id = "0".to_owned();
    // Behind each possible number of events.
    for (round, cut) in (0..=6 + 2 + 8).enumerate() {
        let here = shop.api_of(round % REPLICAS);
        let mut watch = here.watch(&customer, Some(&last_event_id)).await.unwrap();
        let mut ids = Vec::new();
        for (place, cart) in shelf.carts.iter().enumerate() {
            ids.push(shop.api_of((round + place) % REPLICAS).buy(&customer, &[*cart]).await);
        }
        let mut events: Vec<Event> = Vec::new();
        while events.len() < cut {
            events.push(watch.next().await.unwrap());
        }
        drop(watch);
        last_event_id = events.last().map_or(last_event_id, |event| event.id.clone());
        let there = shop.api_of((round + 1) % REPLICAS);
        let mut resumed = there.watch(&customer, Some(&last_event_id)).await.unwrap();
        let all = 6 + 2 + 8;
        while events.len() < all {
            events.push(resumed.next().await.unwrap());
        }
        check_events(&events, &ids);
        last_event_id = events.last().unwrap().id.clone();
    }
    shop.check().await;
}

async fn what_others_accept_is_told_as_it_goes_if_the_news_come_and_with_its_end_if_not(on: PurchasesOn) {
    let (herald, news) = carried(Weather::Fair);
    let mut shop = open(several(on, news)).await;
    let shelf = Shelf::fill(&shop).await;
    let customer = shop.customer(7);
    shop.stop(Part::Payments).await;
    let (here, there) = (shop.api_of(1), shop.api_of(2));
    let mut watch = there.watch(&customer, None).await.unwrap();
    let id = here.buy(&customer, &[shelf.carts[0]]).await;
    let mut events = Vec::new();
    for _ in 0..5 {
        events.push(watch.next().await.unwrap());
    }
    assert_eq!(there.purchase(&customer, id).await["steps"].as_array().unwrap().len(), 5);

    // Without news, nothing is known elsewhere of one that is open, but that it is.
    herald.weather(Weather::Storm);
    let silent = here.buy(&customer, &[shelf.carts[0]]).await;
    let steps = async |api: &Api| api.purchase(&customer, silent).await["steps"].as_array().unwrap().len();
    // It was accepted there, and any replica may have taken the reports.
    until("it waits for its payment", LIMIT, async || {
        let books = e2e::Books::of(&shop).await;
        books.has_order(silent)
    })
    .await;
    assert_eq!(there.state(&customer, silent).await, "PENDING");
    assert_eq!(steps(&there).await, 1);
    shop.start(Part::Payments).await;
    events.extend(watch.until_ended(&[id, silent]).await);
    assert!(events[..5].iter().all(|event| event.purchase_id() == id));
    check_events(&events, &[id, silent]);
    assert_eq!(there.state(&customer, silent).await, "SUCCEEDED");
    assert_eq!(steps(&there).await, 6);
    drop((here, there));
    shop.check().await;
}

/// Row 13 of the faults, over replicas: whoever comes second finds the first, and nobody else's purchase fails with it.
async fn fifty_requests_with_one_key_to_three_replicas_are_one_purchase(on: PurchasesOn) {
    const REQUESTS: usize = 50;
    let (_herald, news) = carried(Weather::Fair);
    let shop = open(several(on, news)).await;
    let shelf = Shelf::fill(&shop).await;
    let customer = shop.customer(7);
    for key in ["one", "two", "three", "four"] {
        let mut requests = JoinSet::new();
        for request in 0..2 * REQUESTS {
            let (api, customer, cart) = (shop.api_of(request % REPLICAS), customer.clone(), shelf.carts[0]);
            let key = (request % 2 == 0).then_some(key);
            requests.spawn(async move { (key, api.try_buy(&customer, &[cart], key).await) });
        }
        let answers = requests.join_all().await;
        let ids = |with_key: bool| -> Vec<u64> {
            let those = answers.iter().filter(|(key, _)| key.is_some() == with_key);
            those.map(|(_, answer)| answer.purchase_id()).collect()
        };
        assert_eq!(ids(true).len(), REQUESTS);
        assert_eq!(ids(true).into_iter().collect::<BTreeSet<_>>().len(), 1);
        assert_eq!(ids(false).into_iter().collect::<BTreeSet<_>>().len(), REQUESTS);
        let other = shop.api_of(1).try_buy(&customer, &[(shelf.carts[0].0, 2)], Some(key)).await;
        assert_eq!(other.status, 422, "{}", other.body);
    }
    assert_eq!(shop.check().await.purchases().len(), 4 * (1 + REQUESTS));
}

async fn stop_all(shop: &mut Shop) {
    for part in PARTS {
        shop.stop(part).await;
    }
}

async fn start_all(shop: &mut Shop) {
    for part in PARTS {
        shop.start(part).await;
    }
}

/// All at once, through all replicas; by customer.
async fn buy_many(shop: &Shop, customers: &[Customer], cart: (u64, i64), count: usize) -> Vec<(u64, u64)> {
    let mut requests = JoinSet::new();
    for number in 0..count {
        let (api, customer) = (shop.api_of(number % REPLICAS), customers[number % customers.len()].clone());
        requests.spawn(async move { (customer.id, api.buy(&customer, &[cart]).await) });
    }
    requests.join_all().await
}

async fn what_is_due_is_taken_by_one_and_a_start_wakes_nothing(on: PurchasesOn) {
    const BOUGHT: usize = 600;
    let (_herald, news) = carried(Weather::Fair);
    let mut shop = open(several(on, news)).await;
    let shelf = Shelf::fill(&shop).await;
    stop_all(&mut shop).await;
    buy_many(&shop, &[shop.customer(7)], shelf.carts[0], BOUGHT).await;
    shop.lose_all_messages().await;
    shop.clock.turn(RETRY_FIRST);
    let tries = async || e2e::Books::of(&shop).await.tries() as usize;
    until("all are tried", LIMIT, async || tries().await >= BOUGHT).await;
    until("all are published", LIMIT, async || waiting(shop.bus()).await >= BOUGHT).await;
    assert_eq!((tries().await, waiting(shop.bus()).await), (BOUGHT, BOUGHT));

    let due = e2e::Books::of(&shop).await.next_wake_at();
    assert!(
        (3_750..=5_000).contains(&(due - shop.clock.now())),
        "they are spread over a quarter of the delay"
    );
    shop.add_purchases().await;
    shop.clock.turn(Duration::from_millis(3_500));
    assert_eq!(e2e::Books::of(&shop).await.tries() as usize, BOUGHT);
    assert_eq!(waiting(shop.bus()).await, BOUGHT);
    start_all(&mut shop).await;
    shop.check().await;
}

async fn when_the_broker_has_lost_everything_all_of_it_ends(on: PurchasesOn) {
    let (_herald, news) = carried(Weather::Rough);
    let mut shop = open(several(on, news)).await;
    let shelf = Shelf::fill(&shop).await;
    let customers = [7, 8].map(|id| shop.customer(id));
    let mut streams = Vec::new();
    for customer in &customers {
        streams.push(shop.api_of(1).watch(customer, None).await.unwrap());
    }
    let mut bought = Vec::new();
    let mut dice = Dice::new(9);
    for part in PARTS {
        shop.stop(part).await;
        for cart in shelf.carts {
            bought.extend(buy_many(&shop, &customers, cart, 40).await);
        }
        for _ in 0..dice.below(40) {
            tokio::task::yield_now().await;
        }
        shop.lose_all_messages().await;
        shop.start(part).await;
        shop.lose_all_messages().await;
    }
    // One turn of the first delay brings all of it back.
    shop.clock.turn(RETRY_FIRST);
    shop.check().await;
    for (customer, watch) in customers.iter().zip(&mut streams) {
        let theirs = bought.iter().filter(|(customer_id, _)| *customer_id == customer.id);
        told(watch, &theirs.map(|(_, id)| *id).collect::<Vec<_>>()).await;
    }
}

async fn what_a_dead_replica_has_accepted_ends_and_its_streams_go_on_elsewhere(on: PurchasesOn) {
    let (_herald, news) = carried(Weather::Rough);
    let mut shop = open(several(on, news)).await;
    let shelf = Shelf::fill(&shop).await;
    let customer = shop.customer(7);
    shop.stop(Part::Orders).await;
    let mut ids = Vec::new();
    let mut events = Vec::new();
    {
        let dying = shop.api_of(2);
        let mut watch = dying.watch(&customer, Some("0")).await.unwrap();
        for cart in [shelf.carts[0], shelf.carts[2]] {
            ids.push(dying.buy(&customer, &[cart]).await);
        }
        events.push(watch.next().await.unwrap());
    }
    shop.kill_replica(2);
    shop.lose_all_messages().await;
    shop.start(Part::Orders).await;
    let last = events.last().map(|event| event.id.clone());
    let mut resumed = shop.api_of(1).watch(&customer, last.as_deref()).await.unwrap();
    shop.clock.turn(RETRY_FIRST);
    events.extend(resumed.until_ended(&ids).await);
    check_events(&events, &ids);
    shop.check().await;
}

async fn what_ends_elsewhere_makes_room_although_no_news_come(on: PurchasesOn) {
    const ROOM: usize = 20;
    let (herald, news) = carried(Weather::Storm);
    let mut settings = several(on, news);
    settings.purchase.max_in_flight = ROOM;
    let mut shop = open(settings).await;
    let shelf = Shelf::fill(&shop).await;
    let customer = shop.customer(7);
    for _ in 0..3 {
        shop.stop(Part::Payments).await;
        let api = shop.api_of(1);
        let mut ids = Vec::new();
        until("there is no room at one replica", LIMIT, async || {
            let answer = api.try_buy(&customer, &[shelf.carts[0]], None).await;
            if answer.status == 201 {
                ids.push(answer.purchase_id());
            }
            answer.status == 503
        })
        .await;
        assert_eq!(ids.len(), ROOM);
        let full = async || shop.metric_of(1, "saga_in_flight") == ROOM as f64;
        until("all of them are counted", LIMIT, full).await;
        assert_eq!(shop.api_of(2).try_buy(&customer, &[shelf.carts[0]], None).await.status, 201, "elsewhere");
        drop(api);
        shop.start(Part::Payments).await;
        until("there is room", LIMIT, async || shop.metric_of(1, "saga_in_flight") == 0.0).await;
    }
    let missed: f64 = (0..REPLICAS).map(|at| shop.metric_of(at, "saga_ends_missed_total")).sum();
    assert!(missed >= ROOM as f64, "{missed}");
    assert!(herald.taken() > 0);
    shop.check().await;
}

async fn what_is_left_to_an_operator_elsewhere_makes_room_and_can_be_retried_anywhere(on: PurchasesOn) {
    let (herald, news) = carried(Weather::Storm);
    let mut settings = several(on, news);
    settings.purchase.max_tries = 2;
    let mut shop = open(settings).await;
    let shelf = Shelf::fill(&shop).await;
    let customer = shop.customer(7);
    shop.stop(Part::Payments).await;
    // Whoever leaves them to an operator, for one of them it is another than the one that counts it.
    let mut ids = Vec::new();
    for replica in [1, 2] {
        ids.push(shop.api_of(replica).buy(&customer, &[shelf.carts[0]]).await);
    }
    until("they are left to an operator", LIMIT, async || {
        shop.clock.turn(Duration::from_secs(5));
        e2e::Books::of(&shop).await.needs_operator().len() == ids.len()
    })
    .await;
    for replica in 0..REPLICAS {
        let none = async || shop.metric_of(replica, "saga_in_flight") == 0.0;
        until("nobody counts them any more", LIMIT, none).await;
        until("all know", LIMIT, async || shop.metric_of(replica, "saga_parked") == 2.0).await;
    }
    herald.weather(Weather::Fair);
    shop.lose_all_messages().await;
    shop.start(Part::Payments).await;
    let mut watch = shop.api_of(0).watch(&customer, Some("0")).await.unwrap();
    for id in &ids {
        let retried = shop.api_of(2).operator(Method::POST, &format!("/purchases/{id}/retry")).await;
        assert_eq!(retried.status, 200, "{}", retried.body);
    }
    told(&mut watch, &ids).await;
    for id in &ids {
        assert_eq!(shop.api_of(1).state(&customer, *id).await, "CANCELLED");
    }
    until("they are counted out", LIMIT, async || shop.metric_of(2, "saga_in_flight") == 0.0).await;
    shop.check().await;
}

fn redis(urls: &str) -> cache::Redis {
    let mut settings = cache::redis::Settings::parse(urls).unwrap();
    settings.prefix = servers::unique_name();
    cache::Redis::connect(settings)
}

/// What is accepted at one replica and waits for its payment is told by the others: that they have from the news only.
async fn open_elsewhere_is_told(shop: &mut Shop, customer: &Customer, cart: (u64, i64)) {
    shop.stop(Part::Payments).await;
    // Right after a fault, news may be missed: then the next one is told.
    let mut ids = Vec::new();
    until("another replica tells how far it is", LIMIT, async || {
        let id = shop.api_of(1).buy(customer, &[cart]).await;
        ids.push(id);
        until("it waits for its payment", LIMIT, async || e2e::Books::of(shop).await.has_order(id)).await;
        let seen = async || {
            let steps = shop.api_of(2).purchase(customer, id).await["steps"].as_array().unwrap().len();
            steps == 5
        };
        let within = tokio::time::timeout(Duration::from_secs(1), until("it is seen", LIMIT, seen));
        within.await.is_ok()
    })
    .await;
    shop.start(Part::Payments).await;
    let mut watch = shop.api_of(2).watch(customer, Some("0")).await.unwrap();
    watch.until_ended(&ids).await;
}

/// Row 19 of the faults: Redis emptied, cut off, gone and back.
#[tokio::test]
async fn news_through_redis_may_come_and_go() {
    const BOUGHT: usize = 30;
    let server = servers::Redis::start().unwrap();
    let proxy = Proxy::start(server.socket_addr()).unwrap();
    let link = redis(&format!("redis://{}", proxy.socket_addr()));
    assert!(link.wait_until_up(LIMIT).await);
    let mut shop = open(several(PurchasesOn::File, News::Redis(link.clone()))).await;
    let shelf = Shelf::fill(&shop).await;
    let customer = shop.customer(7);
    open_elsewhere_is_told(&mut shop, &customer, shelf.carts[0]).await;
    assert!(shop.metric_of(2, "saga_news_total{what=\"heard\"}") > 0.0);

    let mut streams = Vec::new();
    for replica in 0..REPLICAS {
        streams.push(shop.api_of(replica).watch(&customer, None).await.unwrap());
    }
    // What has just ended is told to those who do not say where they are.
    let before: Vec<u64> = e2e::Books::of(&shop).await.purchases().into_iter().collect();
    for watch in &mut streams {
        told(watch, &before).await;
    }
    let faults: [(&str, &dyn Fn()); 6] = [
        ("none", &|| {}),
        ("emptied", &|| server.flush_all().unwrap()),
        ("cut off", &|| proxy.cut()),
        ("back", &|| proxy.heal().unwrap()),
        ("killed", &|| server.kill().unwrap()),
        ("empty and back", &|| server.restart().unwrap()),
    ];
    for (name, fault) in faults {
        let half = buy_many(&shop, std::slice::from_ref(&customer), shelf.carts[0], BOUGHT).await;
        fault();
        let rest = buy_many(&shop, std::slice::from_ref(&customer), shelf.carts[2], BOUGHT).await;
        let ids: Vec<u64> = half.into_iter().chain(rest).map(|(_, id)| id).collect();
        for watch in &mut streams {
            let events = watch.until_ended(&ids).await;
            check_events(&events, &ids);
        }
        assert!(!ids.is_empty(), "{name}");
    }
    assert!(link.wait_until_up(LIMIT).await);
    drop(streams);
    open_elsewhere_is_told(&mut shop, &customer, shelf.carts[0]).await;
    shop.check().await;
}

#[tokio::test]
async fn news_travel_through_a_redis_cluster() {
    let link = redis(&servers::shared::redis_cluster().join(","));
    assert!(link.wait_until_up(LIMIT).await);
    let mut shop = open(several(PurchasesOn::File, News::Redis(link))).await;
    let shelf = Shelf::fill(&shop).await;
    let customer = shop.customer(7);
    open_elsewhere_is_told(&mut shop, &customer, shelf.carts[0]).await;
    shop.check().await;
}

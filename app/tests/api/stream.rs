//! A customer's events: what they say, in which order, and how a client that was away catches up.

use serde_json::{Value, json};
use testkit::{ClientError, SseEvent, until};

use crate::fixture::{Customer, PATIENCE, Shop, assert_refused, cart, run, shop, take};

const PATH: &str = "/api/purchase/result";

/// Step and status of a stream's events, in short.
fn told(events: &[SseEvent]) -> Vec<String> {
    let short = |event: &SseEvent| {
        let data: Value = serde_json::from_str(&event.data).unwrap();
        let word = |name: &str| data[name].as_str().unwrap().to_owned();
        format!("{} {}", word("step"), word("status").replace("STATUS_", ""))
    };
    events.iter().map(short).collect()
}

/// Each event's form: its name, its id, and every field of its data with its type.
#[track_caller]
fn assert_form(events: &[SseEvent], purchase_id: u64) {
    let mut last = 0;
    for (index, event) in events.iter().enumerate() {
        assert_eq!(event.event, "data");
        assert!(!event.id.is_empty(), "{event:?}");
        let data: Value = serde_json::from_str(&event.data).unwrap();
        let timestamp = data["timestamp"].as_u64().unwrap();
        assert!(timestamp >= last && timestamp > 1_700_000_000, "{data}");
        last = timestamp;
        let mut expected = json!({"purchase_id": purchase_id, "step": data["step"], "status": data["status"],
            "timestamp": timestamp, "seq": index + 1});
        if data["status"] == "STATUS_FAILED" {
            assert!(data["reason"].is_string(), "{data}");
            expected["reason"] = data["reason"].clone();
        }
        assert_eq!(data, expected);
    }
}

const SUCCESS: [&str; 6] = [
    "UPDATE_PRODUCT_INVENTORY EXECUTE",
    "UPDATE_PRODUCT_INVENTORY SUCCESS",
    "CREATE_ORDER EXECUTE",
    "CREATE_ORDER SUCCESS",
    "CREATE_PAYMENT EXECUTE",
    "CREATE_PAYMENT SUCCESS",
];

#[test]
fn a_stream_begins_with_a_comment_and_is_not_held_up_on_its_way() {
    run(async {
        let shop = shop().await;
        let customer = shop.sign_up().await;
        let token = &customer.token;
        for accept in
            ["", "Accept: text/event-stream\r\n", "Accept: text/html\r\n", "Accept: application/json\r\n"]
        {
            let mut wire = shop.wire();
            wire.send(format!(
                "GET {PATH} HTTP/1.1\r\nHost: shop\r\nAuthorization: Bearer {token}\r\n{accept}\r\n"
            ));
            let head = wire.read_until("\r\n\r\n").to_ascii_lowercase();
            assert!(head.starts_with("http/1.1 200 "), "{head}");
            for line in
                ["content-type: text/event-stream", "x-accel-buffering: no", "cache-control: no-cache"]
            {
                assert!(head.lines().any(|other| other == line), "no {line:?} in {head}");
            }
            let first = wire.read_until("\n\n");
            let line = first.lines().nth(1).unwrap();
            assert!(line.starts_with(':'), "behind the size of its chunk, a comment: {first:?}");
        }
    });
}

#[test]
fn a_success_is_told_step_by_step() {
    run(async {
        let shop = shop().await;
        let customer = shop.sign_up().await;
        let product = shop.new_product(5, 10).await;
        let mut events = shop.events(&customer, None).await;
        let id = shop.buy(&customer, &cart(product, 1)).await;
        let events = take(&mut events, 6).await;
        assert_eq!(told(&events), SUCCESS);
        assert_form(&events, id);
        // What was announced has happened.
        assert_eq!(shop.get_as(&customer, &format!("/api/payment/{id}")).await.status, 200);
        assert_eq!(shop.get_as(&customer, &format!("/api/purchase/{id}")).await.json()["state"], "SUCCEEDED");
    });
}

#[test]
fn a_failure_is_told_with_its_reason_and_what_was_undone() {
    run(async {
        let shop = shop().await;
        let customer = shop.sign_up().await;
        let (rare, dear) = (shop.new_product(5, 1).await, shop.new_product(2_000_000, 1).await);
        let mut stream = shop.events(&customer, None).await;
        let reason = |event: &SseEvent| serde_json::from_str::<Value>(&event.data).unwrap()["reason"].clone();

        let id = shop.buy(&customer, &cart(rare, 2)).await;
        let events = take(&mut stream, 2).await;
        assert_eq!(told(&events), ["UPDATE_PRODUCT_INVENTORY EXECUTE", "UPDATE_PRODUCT_INVENTORY FAILED"]);
        assert_form(&events, id);
        assert_eq!(reason(&events[1]), format!("out of stock: product {rare} has 1 left, 2 wanted"));

        let id = shop.buy(&customer, &cart(dear, 1)).await;
        let events = take(&mut stream, 8).await;
        let undone =
            ["CREATE_PAYMENT FAILED", "CREATE_ORDER ROLLBACKED", "UPDATE_PRODUCT_INVENTORY ROLLBACKED"];
        assert_eq!(told(&events), [&SUCCESS[..5], &undone].concat());
        assert_form(&events, id);
        assert_eq!(reason(&events[5]), "payment declined: 2000000 is above the limit of 1000000");
    });
}

#[test]
fn who_buys_first_and_listens_then_misses_nothing() {
    run(async {
        let shop = shop().await;
        let customer = shop.sign_up().await;
        let product = shop.new_product(5, 10).await;
        let id = shop.buy(&customer, &cart(product, 1)).await;
        shop.ended(&customer, id).await;
        let events = take(&mut shop.events(&customer, None).await, 6).await;
        assert_eq!(told(&events), SUCCESS);
        assert_form(&events, id);
    });
}

/// The events of a stream that is asked for with this query, and further lines of the request's head.
fn resumed_by_query(
    shop: &Shop,
    customer: &Customer,
    (query, head): (&str, &str),
    count: usize,
) -> Vec<String> {
    let mut wire = shop.wire();
    let token = &customer.token;
    wire.send(format!(
        "GET {PATH}?{query} HTTP/1.1\r\nHost: shop\r\nAuthorization: bearer {token}\r\n{head}\r\n"
    ));
    let data = |_| {
        wire.read_until("\ndata: ");
        wire.read_until("\n").trim_end().to_owned()
    };
    (0..count).map(data).collect()
}

#[test]
fn a_stream_resumes_behind_any_event() {
    run(async {
        let shop = shop().await;
        let customer = shop.sign_up().await;
        let product = shop.new_product(5, 10).await;
        let mut stream = shop.events(&customer, None).await;
        for _ in 0..2 {
            let id = shop.buy(&customer, &cart(product, 1)).await;
            shop.ended(&customer, id).await;
        }
        let whole = take(&mut stream, 12).await;
        drop(stream);
        for (index, event) in whole.iter().enumerate() {
            let left = &whole[index + 1..];
            let resumed = take(&mut shop.events(&customer, Some(&event.id)).await, left.len()).await;
            assert_eq!(resumed, left, "behind {}", event.id);
            let data: Vec<String> = left.iter().map(|event| event.data.clone()).collect();
            // By a client that can set no headers; by a library that has its own name for it, and appends it to what the page began
            // with; and by a browser that was sent away with one place and comes back with a later one.
            let (id, first) = (&event.id, &whole[0].id);
            for (query, head) in [
                (format!("x=y&last_event_id={id}"), String::new()),
                (format!("lastEventId={id}"), String::new()),
                (format!("last_event_id={first}&lastEventId={id}"), format!("Last-Event-ID: {first}\r\n")),
                (format!("last_event_id={first}"), format!("Last-Event-ID: {id}\r\n")),
            ] {
                let resumed = resumed_by_query(&shop, &customer, (&query, &head), left.len());
                assert_eq!(resumed, data, "behind {query} {head:?}");
            }
        }

        // Behind the last one comes what happens next, and nothing else.
        let mut stream = shop.events(&customer, Some(&whole[11].id)).await;
        let id = shop.buy(&customer, &cart(product, 1)).await;
        assert_form(&take(&mut stream, 6).await, id);
    });
}

#[test]
fn what_is_no_event_s_id_is_refused() {
    run(async {
        let shop = shop().await;
        let customer = shop.sign_up().await;
        for text in ["x", "-1", "+1", "1-", "1-2", "1-2.", "1-2.x", "1.5", "18446744073709551616"] {
            let msg = format!("invalid Last-Event-ID {text:?}: expected the id of an event of this stream");
            let header = shop.ask("GET", PATH).bearer(&customer.token).header("last-event-id", text);
            header.refused(400, &msg).await;
            for name in ["last_event_id", "lastEventId"] {
                let query = shop.ask("GET", &format!("{PATH}?{name}={text}")).bearer(&customer.token);
                query.refused(400, &msg).await;
            }
        }
        // A browser that has seen no event yet sends none.
        let product = shop.new_product(5, 10).await;
        for (header, id) in [("empty", Some("")), ("from another database", Some("9007199254740991"))] {
            let mut stream = shop.events(&customer, id).await;
            let id = shop.buy(&customer, &cart(product, 1)).await;
            let last = until_told(&mut stream, id).await;
            assert_eq!(last.len(), 6, "{header}");
        }
    });
}

/// The events of one purchase, with those of others left out.
async fn until_told(stream: &mut testkit::Events, purchase_id: u64) -> Vec<SseEvent> {
    let mut told = Vec::new();
    while told.len() < 6 {
        let event = take(stream, 1).await.remove(0);
        let data: Value = serde_json::from_str(&event.data).unwrap();
        if data["purchase_id"] == purchase_id {
            told.push(event);
        }
    }
    told
}

#[test]
fn nobody_hears_of_somebody_else_s_purchases() {
    run(async {
        let shop = shop().await;
        let (customer, other) = (shop.sign_up().await, shop.sign_up().await);
        let product = shop.new_product(5, 10).await;
        let mut stream = shop.events(&customer, None).await;
        let theirs = shop.buy(&other, &cart(product, 1)).await;
        shop.ended(&other, theirs).await;
        let id = shop.buy(&customer, &cart(product, 1)).await;
        assert_form(&take(&mut stream, 6).await, id);

        // Nor with the id of an event that was theirs.
        let seen = take(&mut shop.events(&other, None).await, 6).await;
        for event in seen {
            let mut stream = shop.events(&customer, Some(&event.id)).await;
            let id = shop.buy(&customer, &cart(product, 1)).await;
            for event in until_told(&mut stream, id).await {
                assert!(!event.data.contains(&theirs.to_string()), "{event:?}");
            }
        }
    });
}

#[test]
fn a_customer_has_so_many_streams_and_no_more() {
    run(async {
        let shop = shop().await;
        let customer = shop.sign_up().await;
        let mut open = Vec::new();
        for _ in 0..32 {
            open.push(shop.events(&customer, None).await);
        }
        let Err(ClientError::Refused(answer)) = shop.api().events(&customer.token, None).await else {
            panic!("one more was opened");
        };
        assert_refused("one more", &answer, 429, "too many requests, try again later");
        assert_eq!(answer.headers["retry-after"], "1");
        // Others are not concerned.
        shop.events(&shop.sign_up().await, None).await;
        open.pop();
        until("a place is free again", PATIENCE, async || {
            shop.api().events(&customer.token, None).await.is_ok()
        })
        .await;
    });
}

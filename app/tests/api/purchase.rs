//! Buying: what is accepted, what is refused and has no effect, and how often a repeated request counts.

use std::collections::BTreeSet;

use serde_json::{Value, json};
use testkit::until;
use tokio::task::JoinSet;

use crate::fixture::{Customer, MAX, PATIENCE, Shop, bought, cart, run, shop, shop_with};

fn items(items: &[(u64, i64)]) -> Value {
    let item = |(product_id, amount): &(u64, i64)| json!({"product_id": product_id, "amount": amount});
    let items: Vec<Value> = items.iter().map(item).collect();
    json!({"purchase_items": items, "payment": {"currency_code": "NT"}})
}

#[test]
fn a_purchase_is_followed_to_its_end() {
    run(async {
        let shop = shop().await;
        let customer = shop.sign_up().await;
        let (first, second) = (shop.new_product(100, 1_000).await, shop.new_product(7, 20).await);
        let id = shop.buy(&customer, &items(&[(first, 2), (second, 3)])).await;
        let purchase = shop.ended(&customer, id).await;
        let (created, finished) =
            (purchase["created_at"].as_u64().unwrap(), purchase["finished_at"].as_u64().unwrap());
        assert!(created > 1_700_000_000 && (created..created + 60).contains(&finished), "{purchase}");
        let step = |step: &str, status: &str, index: usize| {
            let timestamp = purchase["steps"][index]["timestamp"].as_u64().unwrap();
            assert!((created..=finished).contains(&timestamp), "{purchase}");
            json!({"step": step, "status": status, "timestamp": timestamp})
        };
        let expected = json!({
            "id": id, "state": "SUCCEEDED", "created_at": created, "finished_at": finished,
            "items": [
                {"product_id": first, "amount": 2, "price": 100},
                {"product_id": second, "amount": 3, "price": 7},
            ],
            "payment": {"currency_code": "NT", "amount": 221},
            "steps": [
                step("UPDATE_PRODUCT_INVENTORY", "STATUS_EXECUTE", 0),
                step("UPDATE_PRODUCT_INVENTORY", "STATUS_SUCCESS", 1),
                step("CREATE_ORDER", "STATUS_EXECUTE", 2),
                step("CREATE_ORDER", "STATUS_SUCCESS", 3),
                step("CREATE_PAYMENT", "STATUS_EXECUTE", 4),
                step("CREATE_PAYMENT", "STATUS_SUCCESS", 5),
            ],
            "reason": null,
        });
        assert_eq!(purchase, expected);

        let order = shop.get_as(&customer, &format!("/api/order/{id}")).await;
        let item = |product: u64, price, amount| {
            json!({"product_id": product, "name": "product", "description": "a product", "brand_name": "brand",
                "price": price, "amount": amount})
        };
        let expected = json!({"id": id, "purchased_items": [item(first, 100, 2), item(second, 7, 3)]});
        assert_eq!((order.status, order.json()), (200, expected));
        let payment = shop.get_as(&customer, &format!("/api/payment/{id}")).await;
        let expected = json!({"id": id, "currency_code": "NT", "amount": 221});
        assert_eq!((payment.status, payment.json()), (200, expected));
        assert_eq!((shop.stock(first).await, shop.stock(second).await), (998, 17));
    });
}

#[test]
fn a_failed_purchase_leaves_nothing_but_its_reason() {
    run(async {
        let shop = shop().await;
        let customer = shop.sign_up().await;
        let (rare, common) = (shop.new_product(5, 1).await, shop.new_product(5, 10).await);
        let dear = shop.new_product(1_000_001, 10).await;
        for (cart, reason, steps) in [
            (
                items(&[(common, 1), (rare, 2)]),
                format!("out of stock: product {rare} has 1 left, 2 wanted"),
                2,
            ),
            (cart(dear, 1), "payment declined: 1000001 is above the limit of 1000000".to_owned(), 8),
        ] {
            let id = shop.buy(&customer, &cart).await;
            let purchase = shop.ended(&customer, id).await;
            assert_eq!(purchase["state"], "FAILED", "{purchase}");
            assert_eq!(purchase["reason"], reason.as_str(), "{purchase}");
            assert_eq!(purchase["steps"].as_array().unwrap().len(), steps, "{purchase}");
            for (kind, msg) in [("order", "order not found"), ("payment", "payment not found")] {
                let ask = shop.ask("GET", &format!("/api/{kind}/{id}")).bearer(&customer.token);
                ask.refused(404, msg).await;
            }
        }
        for (product, stock) in [(rare, 1), (common, 10), (dear, 10)] {
            assert_eq!(shop.stock(product).await, stock);
        }
    });
}

#[test]
fn a_cart_that_makes_no_sense_is_refused_and_had_no_effect() {
    run(async {
        let shop = shop().await;
        let customer = shop.sign_up().await;
        let product = shop.new_product(100, 50).await;
        let most = MAX as i64;
        let amount = |amount: i64| {
            format!("invalid parameter: amount: {amount} of product {product}, 1 to {MAX} expected")
        };
        let in_all =
            format!("invalid parameter: amount: product {product} is named with more than {MAX} in all");
        let id = |id: u64| format!("invalid parameter: product_id: {id}, 0 to {MAX} expected");
        let overflow = |times: i64| {
            format!(
                "invalid parameter: purchase_items: the total overflows: {times} of product {product} at 100 each"
            )
        };
        for (cart, msg) in [
            (items(&[]), "invalid parameter: purchase_items: empty, at least one expected".to_owned()),
            (cart(product, 0), amount(0)),
            (cart(product, -1), amount(-1)),
            (cart(product, i64::MIN), amount(i64::MIN)),
            (cart(product, most + 1), amount(most + 1)),
            (cart(product, i64::MAX), amount(i64::MAX)),
            // A negative amount does not hide behind a positive one.
            (items(&[(product, 5), (product, -4)]), amount(-4)),
            (items(&[(product, most), (product, 1)]), in_all.clone()),
            (items(&[(product, most), (product, most)]), in_all),
            (cart(MAX + 1, 1), id(MAX + 1)),
            (cart(1 << 63, 1), id(1 << 63)),
            (cart(u64::MAX, 1), id(u64::MAX)),
            (cart(product, most), overflow(most)),
            (cart(product, most / 100 + 1), overflow(most / 100 + 1)),
        ] {
            shop.ask_to_buy(&customer, &cart).refused(400, &msg).await;
        }
        assert_eq!(shop.purchases(&customer).await, Vec::<Value>::new());
        assert_eq!(shop.stock(product).await, 50);
    });
}

#[test]
fn a_total_is_summed_without_overflow() {
    run(async {
        let shop = shop_with(&[("PAYMENT__LIMIT", &MAX.to_string())]).await;
        let customer = shop.sign_up().await;
        let (most, one) = (shop.new_product(MAX, 5).await, shop.new_product(1, 5).await);
        let msg =
            format!("invalid parameter: purchase_items: the total overflows: 1 of product {one} at 1 each");
        shop.ask_to_buy(&customer, &items(&[(most, 1), (one, 1)])).refused(400, &msg).await;
        let msg = format!(
            "invalid parameter: purchase_items: the total overflows: 2 of product {most} at {MAX} each"
        );
        shop.ask_to_buy(&customer, &cart(most, 2)).refused(400, &msg).await;

        let id = shop.buy(&customer, &cart(most, 1)).await;
        assert_eq!(shop.ended(&customer, id).await["state"], "SUCCEEDED");
        let payment = shop.get_as(&customer, &format!("/api/payment/{id}")).await.json();
        assert_eq!(payment, json!({"id": id, "currency_code": "NT", "amount": MAX}), "to the last digit");
    });
}

#[test]
fn an_unknown_product_is_not_found_whatever_else_is_in_the_cart() {
    run(async {
        let shop = shop().await;
        let customer = shop.sign_up().await;
        let product = shop.new_product(100, 50).await;
        for unknown in [0, 1, product + 1_000_000, MAX] {
            for cart in [cart(unknown, 1), items(&[(product, 1), (unknown, 1)])] {
                shop.ask_to_buy(&customer, &cart).refused(404, "product not found").await;
            }
        }
        assert_eq!(shop.purchases(&customer).await, Vec::<Value>::new());
        assert_eq!(shop.stock(product).await, 50);
    });
}

#[test]
fn fields_that_the_api_does_not_know_bind_to_nothing() {
    run(async {
        let shop = shop().await;
        let (customer, victim) = (shop.sign_up().await, shop.sign_up().await);
        let product = shop.new_product(100, 50).await;
        let cart = json!({
            "id": 17, "purchase_id": 17, "customer_id": 1, "state": "SUCCEEDED", "total": 1, "created_at": 1,
            "purchase_items": [{
                "product_id": product, "amount": 2, "price": 1, "name": "x", "inventory": 0, "purchase_id": 17,
            }],
            "payment": {"currency_code": "US", "amount": 1, "id": 17, "customer_id": 1},
            "order": {"customer_id": 1, "purchased_items": []},
        });
        let id = shop.buy(&customer, &cart).await;
        assert_ne!(id, 17);
        let purchase = shop.ended(&customer, id).await;
        assert_eq!(purchase["state"], "SUCCEEDED");
        assert_eq!(purchase["items"], json!([{"product_id": product, "amount": 2, "price": 100}]));
        assert_eq!(purchase["payment"], json!({"currency_code": "US", "amount": 200}));
        let payment = shop.get_as(&customer, &format!("/api/payment/{id}")).await.json();
        assert_eq!(payment, json!({"id": id, "currency_code": "US", "amount": 200}));
        assert_eq!(shop.stock(product).await, 48);
        assert_eq!(shop.purchases(&victim).await, Vec::<Value>::new());
    });
}

#[test]
fn a_product_that_is_named_twice_counts_as_the_sum() {
    run(async {
        let shop = shop().await;
        let customer = shop.sign_up().await;
        let product = shop.new_product(10, 5).await;
        let id = shop.buy(&customer, &items(&[(product, 2), (product, 1)])).await;
        let purchase = shop.ended(&customer, id).await;
        assert_eq!(purchase["state"], "SUCCEEDED", "{purchase}");
        assert_eq!(purchase["items"], json!([{"product_id": product, "amount": 3, "price": 10}]));
        assert_eq!(shop.stock(product).await, 2);
        // It is the sum that has to be there.
        let id = shop.buy(&customer, &items(&[(product, 2), (product, 1)])).await;
        assert_eq!(shop.ended(&customer, id).await["state"], "FAILED");
        assert_eq!(shop.stock(product).await, 2);
    });
}

#[test]
fn a_cart_has_so_many_lines_and_no_more() {
    run(async {
        let shop = shop_with(&[("PURCHASE__MAX_CART_LINES", "3")]).await;
        let customer = shop.sign_up().await;
        let mut products = Vec::new();
        for _ in 0..4 {
            products.push(shop.new_product(1, 10).await);
        }
        let lines: Vec<(u64, i64)> = products.iter().map(|id| (*id, 1)).collect();
        let msg = "invalid parameter: purchase_items: 4 products, at most 3 expected";
        shop.ask_to_buy(&customer, &items(&lines)).refused(400, msg).await;
        // Different products are counted, not lines.
        let id = shop.buy(&customer, &items(&[&lines[..3], &lines[..2]].concat())).await;
        assert_eq!(shop.ended(&customer, id).await["state"], "SUCCEEDED");
    });
}

#[test]
fn the_currency_is_one_that_there_is() {
    run(async {
        let shop = shop().await;
        let customer = shop.sign_up().await;
        let product = shop.new_product(0, 50).await;
        let cart = |code: &str| json!({"purchase_items": [{"product_id": product, "amount": 1}], "payment": {"currency_code": code}});
        for code in ["NT", "US", "TWD", "USD", "EUR", "JPY", "XAU", "ZWG"] {
            let id = shop.buy(&customer, &cart(code)).await;
            let purchase = shop.ended(&customer, id).await;
            assert_eq!(purchase["payment"], json!({"currency_code": code, "amount": 0}), "{purchase}");
        }
        let long = "X".repeat(1_000);
        for code in
            ["", "N", "nt", "usd", "QQQ", "USDX", "U S", " US", "US ", "NT US", "\u{20ac}", "\u{0}", &long]
        {
            let echo: String = code.chars().take(16).collect();
            let msg =
                format!("invalid parameter: currency_code: {echo:?}, NT, US or an ISO 4217 code expected");
            shop.ask_to_buy(&customer, &cart(code)).refused(400, &msg).await;
        }
        assert_eq!(shop.purchases(&customer).await.len(), 8);
    });
}

async fn buy_once(shop: &Shop, customer: &Customer, key: &str, cart: &Value) -> testkit::Answer {
    shop.ask_to_buy(customer, cart).header("idempotency-key", key).send().await
}

#[test]
fn a_repeated_request_is_the_same_purchase() {
    run(async {
        let shop = shop().await;
        let customer = shop.sign_up().await;
        let (a, b) = (shop.new_product(1, 100).await, shop.new_product(2, 100).await);
        let first = bought(&buy_once(&shop, &customer, "key-1", &items(&[(a, 3), (b, 1)])).await);
        // The same cart, said in other words, while it is under way and when it has ended.
        let mut noted = items(&[(a, 3), (b, 1)]);
        noted["note"] = json!("again");
        let same =
            [items(&[(a, 3), (b, 1)]), items(&[(b, 1), (a, 3)]), items(&[(a, 1), (b, 1), (a, 2)]), noted];
        for _ in 0..2 {
            for cart in &same {
                assert_eq!(bought(&buy_once(&shop, &customer, "key-1", cart).await), first);
            }
            // In the quotes of the draft, it is the same key.
            assert_eq!(bought(&buy_once(&shop, &customer, "\"key-1\"", &same[0]).await), first);
            shop.ended(&customer, first).await;
        }

        let mut paid_otherwise = same[0].clone();
        paid_otherwise["payment"]["currency_code"] = json!("US");
        let msg = format!("the Idempotency-Key was used for purchase {first}, which was another request");
        for other in [items(&[(a, 3)]), items(&[(a, 3), (b, 2)]), items(&[(a, 1), (b, 3)]), paid_otherwise] {
            let ask = shop.ask_to_buy(&customer, &other).header("idempotency-key", "key-1");
            ask.refused(422, &msg).await;
        }
        assert_eq!(shop.purchases(&customer).await.len(), 1, "one key, one purchase");
        assert_eq!((shop.stock(a).await, shop.stock(b).await), (97, 99));

        // Another key is another purchase, and so is none; a key is compared in its case.
        let mut ids = BTreeSet::from([first]);
        for key in ["key-2", "KEY-1", "key-1 x"] {
            ids.insert(bought(&buy_once(&shop, &customer, key, &same[0]).await));
        }
        ids.insert(shop.buy(&customer, &same[0]).await);
        assert_eq!(ids.len(), 5);
    });
}

#[test]
fn a_key_is_its_customer_s_own() {
    run(async {
        let shop = shop().await;
        let (one, other) = (shop.sign_up().await, shop.sign_up().await);
        let product = shop.new_product(1, 100).await;
        let mine = bought(&buy_once(&shop, &one, "shared", &cart(product, 1)).await);
        // Neither the same cart nor another one tells whether somebody else has used the key.
        let theirs = bought(&buy_once(&shop, &other, "shared", &cart(product, 2)).await);
        assert_ne!(mine, theirs);
        assert_eq!(bought(&buy_once(&shop, &one, "shared", &cart(product, 1)).await), mine);
        assert_eq!(bought(&buy_once(&shop, &other, "shared", &cart(product, 2)).await), theirs);
    });
}

#[test]
fn a_key_has_a_length() {
    run(async {
        let shop = shop().await;
        let customer = shop.sign_up().await;
        let product = shop.new_product(1, 100).await;
        let msg = "invalid parameter: Idempotency-Key: 1 to 255 printable ASCII characters expected";
        for key in ["", "\"\"", &"k".repeat(256), &"k".repeat(5_000)] {
            let ask = shop.ask_to_buy(&customer, &cart(product, 1)).header("idempotency-key", key);
            ask.refused(400, msg).await;
        }
        let body = cart(product, 1).to_string();
        let (token, length) = (&customer.token, body.len());
        let head = format!(
            "POST /api/purchase HTTP/1.1\r\nHost: shop\r\nAuthorization: bearer {token}\r\nContent-Length: {length}\r\n"
        );
        let answer =
            shop.wire().send(format!("{head}Idempotency-Key: schl\u{fc}ssel\r\n\r\n{body}")).answer();
        assert_eq!((answer.status, answer.body), (400, json!({ "msg": msg }).to_string()));
        assert_eq!(shop.purchases(&customer).await, Vec::<Value>::new());

        let longest = "k".repeat(255);
        let id = bought(&buy_once(&shop, &customer, &longest, &cart(product, 1)).await);
        assert_eq!(bought(&buy_once(&shop, &customer, &longest, &cart(product, 1)).await), id);
    });
}

#[test]
fn of_fifty_parallel_requests_with_one_key_comes_one_purchase() {
    run(async {
        let shop = shop().await;
        let customer = shop.sign_up().await;
        let product = shop.new_product(1, 100).await;
        let mut requests = JoinSet::new();
        for _ in 0..50 {
            let ask = shop.ask_to_buy(&customer, &cart(product, 1)).header("idempotency-key", "one");
            requests.spawn(ask.send());
        }
        let ids: BTreeSet<u64> = requests.join_all().await.iter().map(bought).collect();
        assert_eq!(ids.len(), 1, "{ids:?}");
        shop.all_ended(&customer).await;
        assert_eq!(shop.purchases(&customer).await.len(), 1);
        assert_eq!(shop.stock(product).await, 99);
    });
}

/// Buys in crowds until somebody is refused; every answer is a purchase or `refusal`. Returns how many were accepted.
async fn crowd(shop: &Shop, customer: &Customer, product: u64, refusal: (u16, &str)) -> usize {
    let (mut accepted, mut refused) = (0, 0);
    until("somebody is refused", PATIENCE, async || {
        let mut requests = JoinSet::new();
        for _ in 0..40 {
            requests.spawn(shop.ask_to_buy(customer, &cart(product, 1)).send());
        }
        for answer in requests.join_all().await {
            if answer.status == 201 {
                bought(&answer);
                accepted += 1;
            } else {
                let (status, msg) = refusal;
                crate::fixture::assert_refused("one of a crowd", &answer, status, msg);
                assert_eq!(answer.headers["retry-after"], "1");
                refused += 1;
            }
        }
        refused > 0
    })
    .await;
    accepted
}

#[test]
fn what_is_too_much_at_once_is_refused_and_had_no_effect() {
    run(async {
        for (setting, refusal) in [
            ("PURCHASE__MAX_OPEN_PER_CUSTOMER", (429, "too many requests, try again later")),
            ("PURCHASE__MAX_IN_FLIGHT", (503, "too many purchases are under way")),
        ] {
            let shop = shop_with(&[(setting, "2")]).await;
            let customer = shop.sign_up().await;
            let product = shop.new_product(1, 1_000_000).await;
            let accepted = crowd(&shop, &customer, product, refusal).await;
            assert!(accepted >= 2, "{accepted}");
            shop.all_ended(&customer).await;
            assert_eq!(shop.purchases(&customer).await.len(), accepted);
            assert_eq!(shop.stock(product).await, 1_000_000 - accepted as i64);
            // There is room again.
            until("room again", PATIENCE, async || {
                shop.ask_to_buy(&customer, &cart(product, 1)).send().await.status == 201
            })
            .await;
        }
    });
}

#[test]
fn a_repeated_request_takes_nobody_s_place() {
    run(async {
        let shop = shop_with(&[("PURCHASE__MAX_OPEN_PER_CUSTOMER", "2")]).await;
        let customer = shop.sign_up().await;
        let product = shop.new_product(1, 100).await;
        let first = bought(&buy_once(&shop, &customer, "one", &cart(product, 1)).await);
        shop.ended(&customer, first).await;
        // A place is free again a moment after its purchase has ended; one that is kept for ever shows.
        let answered = async |key: &str, amount: i64| {
            let mut status = 0;
            until("there is room", PATIENCE, async || {
                status = buy_once(&shop, &customer, key, &cart(product, amount)).await.status;
                status != 429
            })
            .await;
            status
        };
        for _ in 0..3 {
            assert_eq!(answered("one", 1).await, 201);
            assert_eq!(answered("one", 2).await, 422);
        }
        assert_eq!(answered("two", 1).await, 201);
        assert_eq!(shop.purchases(&customer).await.len(), 2);
    });
}

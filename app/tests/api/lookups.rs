//! Looking up purchases, orders and payments: one's own, and nobody else's.

use serde_json::{Value, json};

use crate::fixture::{MAX, cart, run, shop};

#[test]
fn a_customer_finds_its_own_purchases_the_newest_first() {
    run(async {
        let shop = shop().await;
        let (customer, other) = (shop.sign_up().await, shop.sign_up().await);
        let product = shop.new_product(3, 100).await;
        let mut ids = Vec::new();
        for amount in 1..=4 {
            ids.push(shop.buy(&customer, &cart(product, amount)).await);
            shop.buy(&other, &cart(product, 9)).await;
        }
        shop.all_ended(&customer).await;
        ids.reverse();
        let page = async |query: &str| {
            let answer = shop.get_as(&customer, &format!("/api/purchases?{query}")).await;
            assert_eq!(answer.status, 200, "{}", answer.body);
            let body = answer.json();
            assert_eq!(body.as_object().unwrap().keys().collect::<Vec<_>>(), ["purchases"]);
            let purchases = body["purchases"].as_array().unwrap();
            purchases.iter().map(|purchase| purchase["id"].as_u64().unwrap()).collect::<Vec<_>>()
        };
        assert_eq!(page("size=500").await, ids);
        assert_eq!(page("size=1").await, ids[..1]);
        assert_eq!(page("offset=1&size=2").await, ids[1..3]);
        assert_eq!(page("offset=4&size=1").await, Vec::<u64>::new());

        let newest = shop.purchases(&customer).await[0].clone();
        let expected = json!({"id": ids[0], "state": "SUCCEEDED", "created_at": newest["created_at"],
            "finished_at": newest["finished_at"], "items": [{"product_id": product, "amount": 4, "price": 3}],
            "payment": {"currency_code": "NT", "amount": 12}, "reason": null});
        assert_eq!(newest, expected, "without steps");
    });
}

#[test]
fn what_is_somebody_else_s_is_answered_like_what_is_not_there() {
    run(async {
        let shop = shop().await;
        let (owner, stranger) = (shop.sign_up().await, shop.sign_up().await);
        let product = shop.new_product(3, 100).await;
        let id = shop.buy(&owner, &cart(product, 1)).await;
        shop.ended(&owner, id).await;
        for (kind, msg) in [
            ("purchase", "purchase not found"),
            ("order", "order not found"),
            ("payment", "payment not found"),
        ] {
            let ask = |id: &str| shop.ask("GET", &format!("/api/{kind}/{id}")).bearer(&stranger.token);
            let mut foreign = ask(&id.to_string()).refused(404, msg).await.headers;
            foreign.remove("date");
            for unknown in
                ["0", "1", &MAX.to_string(), "9007199254740992", "18446744073709551616", "-1", "x", "%FF"]
            {
                let mut headers = ask(unknown).refused(404, msg).await.headers;
                headers.remove("date");
                assert_eq!(headers, foreign, "{kind} {unknown}");
            }
            let own = shop.get_as(&owner, &format!("/api/{kind}/{id}")).await;
            assert_eq!(own.status, 200, "{}", own.body);
        }
        assert_eq!(shop.purchases(&stranger).await, Vec::<Value>::new());
    });
}

//! Products: who may create them, what they may be, how they are listed.

use serde_json::{Value, json};

use crate::fixture::{MAX, run, shop, shop_with};

fn product() -> Value {
    json!({"name": "product1", "description": "first product", "brand_name": "mingbrand", "price": 100,
        "inventory": 1000})
}

#[test]
fn a_product_is_created_shown_and_listed() {
    run(async {
        let shop = shop().await;
        let mut body = product();
        // Not for a client to say.
        body["id"] = json!(7);
        body["product_id"] = json!(7);
        body["version"] = json!(7);
        let created = shop.post("/api/product", &body).await;
        assert_eq!(created.status, 201, "{}", created.body);
        let id = created.json()["id"].as_u64().unwrap();
        assert_eq!(created.json(), json!({ "id": id }));
        assert!(id > 7 && id <= MAX, "{id}");

        let shown = shop.get(&format!("/api/product/{id}")).await;
        assert_eq!(shown.status, 200);
        let expected = json!({"id": id, "name": "product1", "description": "first product",
            "brand_name": "mingbrand", "price": 100, "inventory": 1000});
        assert_eq!(shown.json(), expected);

        let listed = shop.get("/api/products?offset=0&size=500").await;
        assert_eq!(listed.status, 200);
        let listed = listed.json();
        assert_eq!(listed.as_object().unwrap().keys().collect::<Vec<_>>(), ["catalogs"]);
        let line = listed["catalogs"].as_array().unwrap().iter().find(|line| line["id"] == id);
        let expected = json!({"id": id, "name": "product1", "inventory": 1000, "price": 100});
        assert_eq!(line, Some(&expected));
    });
}

#[test]
fn what_a_product_may_be_has_bounds() {
    run(async {
        let shop = shop_with(&[]).await;
        let long = "é".repeat(4_096);
        let too_long = "é".repeat(4_097);
        let texts = "1 to 4096 expected";
        let numbers = format!("0 to {MAX} expected");
        for field in ["name", "description", "brand_name"] {
            for (text, problem) in [
                ("", format!("0 characters, {texts}")),
                ("  ", format!("2 characters, {texts}")),
                (&too_long, format!("4097 characters, {texts}")),
            ] {
                let mut body = product();
                body[field] = json!(text);
                let msg = format!("invalid parameter: {field}: {problem}");
                shop.ask("POST", "/api/product").json(&body).refused(400, &msg).await;
            }
        }
        for field in ["price", "inventory"] {
            for number in [-1, i64::MIN, 1 << 53, i64::MAX] {
                let mut body = product();
                body[field] = json!(number);
                let msg = format!("invalid parameter: {field}: {number}, {numbers}");
                shop.ask("POST", "/api/product").json(&body).refused(400, &msg).await;
            }
        }
        let none = shop.get("/api/products?size=1").await;
        assert_eq!(none.json(), json!({"catalogs": []}), "a refused product is nowhere");

        for (price, inventory) in [(0, 0), (MAX, MAX)] {
            let body = json!({"name": long, "description": "b", "brand_name": "c", "price": price,
                "inventory": inventory});
            let created = shop.post("/api/product", &body).await;
            assert_eq!(created.status, 201, "{}", created.body);
            let shown = shop.get(&format!("/api/product/{}", created.json()["id"])).await.json();
            assert_eq!((&shown["price"], &shown["inventory"]), (&json!(price), &json!(inventory)));
            assert_eq!(shown["name"], long.as_str());
        }
    });
}

#[test]
fn an_unknown_product_is_not_found_and_what_is_no_id_is_refused() {
    run(async {
        let shop = shop().await;
        for id in ["0", "1", "00", "9007199254740991"] {
            shop.ask("GET", &format!("/api/product/{id}")).refused(404, "product not found").await;
        }
        let range = format!("expected an integer from 0 to {MAX}");
        for (id, echo) in [
            ("9007199254740992", r#""9007199254740992", "#),
            ("18446744073709551616", r#""18446744073709551616", "#),
            ("-1", r#""-1", "#),
            ("+1", r#""+1", "#),
            ("1.0", r#""1.0", "#),
            ("1e3", r#""1e3", "#),
            ("0x1", r#""0x1", "#),
            ("abc", r#""abc", "#),
            ("1%20", r#""1 ", "#),
            ("%00", r#""\0", "#),
            // Arabic digits are digits to some parsers.
            ("%D9%A1", "\"\u{661}\", "),
            ("1;DROP%20TABLE%20product", r#""1;DROP TABLE product", "#),
            (
                "99999999999999999999999999999999999999999999",
                // The first 32 characters, whatever was sent.
                r#""99999999999999999999999999999999", "#,
            ),
            ("%FF", ""),
        ] {
            let msg = format!("invalid parameter: id: {echo}{range}");
            shop.ask("GET", &format!("/api/product/{id}")).refused(400, &msg).await;
        }
    });
}

#[test]
fn a_list_is_read_page_by_page() {
    run(async {
        let shop = shop_with(&[]).await;
        let mut ids = Vec::new();
        for number in 1..=5 {
            ids.push(shop.new_product(number, number).await);
        }
        assert!(ids.is_sorted(), "{ids:?}");
        let page = async |query: &str| {
            let answer = shop.get(&format!("/api/products?{query}")).await;
            assert_eq!(answer.status, 200, "{query}: {}", answer.body);
            let lines = answer.json()["catalogs"].as_array().unwrap().clone();
            lines.iter().map(|line| line["id"].as_u64().unwrap()).collect::<Vec<_>>()
        };
        assert_eq!(page("size=500").await, ids);
        assert_eq!(page("size=2").await, ids[..2]);
        assert_eq!(page("offset=2&size=2").await, ids[2..4]);
        assert_eq!(page("size=2&offset=4&page=9").await, ids[4..]);
        assert_eq!(page("offset=5&size=2").await, Vec::<u64>::new());
        assert_eq!(page(&format!("offset={MAX}&size=500")).await, Vec::<u64>::new());
    });
}

#[test]
fn a_page_out_of_range_is_refused_by_every_list() {
    run(async {
        let shop = shop().await;
        let token = shop.sign_up().await.token;
        let size = "expected an integer from 1 to 500";
        let offset = format!("expected an integer from 0 to {MAX}");
        for path in ["/api/products", "/api/purchases"] {
            for (query, problem) in [
                ("", format!("size: missing, {size}")),
                ("?offset=0", format!("size: missing, {size}")),
                ("?size", format!("size: missing, {size}")),
                ("?size=", format!("size: \"\", {size}")),
                ("?size=0", format!("size: \"0\", {size}")),
                ("?size=501", format!("size: \"501\", {size}")),
                ("?size=-1", format!("size: \"-1\", {size}")),
                ("?size=ten", format!("size: \"ten\", {size}")),
                ("?size=1.5", format!("size: \"1.5\", {size}")),
                ("?size=18446744073709551617", format!("size: \"18446744073709551617\", {size}")),
                ("?size=1&offset=-1", format!("offset: \"-1\", {offset}")),
                ("?size=1&offset=", format!("offset: \"\", {offset}")),
                ("?size=1&offset=x", format!("offset: \"x\", {offset}")),
                ("?size=1&offset=9007199254740992", format!("offset: \"9007199254740992\", {offset}")),
                ("?size=1&offset=9223372036854775808", format!("offset: \"9223372036854775808\", {offset}")),
            ] {
                let ask = shop.ask("GET", &format!("{path}{query}")).bearer(&token);
                ask.refused(400, &format!("invalid parameter: {problem}")).await;
            }
        }
    });
}

#[test]
fn where_the_catalogue_is_closed_only_the_admin_token_writes() {
    run(async {
        let admin = "an-admin-token-of-some-length";
        let shop = shop_with(&[("CATALOG__WRITE", "admin"), ("CATALOG__ADMIN_TOKEN", admin)]).await;
        let customer = shop.sign_up().await;
        let ask = || shop.ask("POST", "/api/product").json(&product());
        // Before anything is said about the body.
        let unknown = shop.ask("POST", "/api/product").body("{");
        unknown.refused(401, "products are created with the admin token").await;
        let answer = ask().refused(401, "products are created with the admin token").await;
        assert_eq!(answer.headers["www-authenticate"], "Bearer");
        let empty = ask().bearer("");
        empty.refused(401, "products are created with the admin token").await;
        let basic = ask().header("authorization", &format!("basic {admin}"));
        basic.refused(401, "the authorization scheme is not bearer").await;
        let nearly = &admin[..admin.len() - 1];
        for token in [customer.token.as_str(), nearly, &format!("{admin}x"), &admin.to_uppercase()] {
            ask().bearer(token).refused(403, "this token may not create products").await;
        }
        let none = shop.get("/api/products?size=1").await.json();
        assert_eq!(none, json!({"catalogs": []}), "nobody created anything");

        for scheme in ["bearer", "Bearer", "BEARER"] {
            let created = ask().header("authorization", &format!("{scheme} {admin}")).send().await;
            assert_eq!(created.status, 201, "{}", created.body);
        }
        // It is a key to the catalogue and to nothing else.
        let ask = shop.ask("GET", "/api/account/info/person").bearer(admin);
        ask.refused(401, "invalid token").await;
    });
}

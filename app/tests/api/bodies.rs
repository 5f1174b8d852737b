//! What a request's body may be, at every door that takes one.

use serde_json::{Value, json};

use crate::fixture::{MAX, Shop, cart, new_customer, run, shop};

const LIMIT_BYTES: usize = 65_536;

/// A door that takes a body: method, path, a body that fits.
async fn doors(shop: &Shop) -> Vec<(&'static str, &'static str, Value)> {
    let product = shop.new_product(1, 1_000).await;
    vec![
        ("POST", "/api/account/auth/signup", new_customer()),
        ("POST", "/api/account/auth/login", json!({"email": "a@b.c", "password": "abcd5432"})),
        ("POST", "/api/account/auth/refresh", json!({"refresh_token": "x"})),
        ("POST", "/api/account/auth/logout", json!({"refresh_token": "x"})),
        ("PUT", "/api/account/info/person", json!({"firstname": "a", "lastname": "b", "email": "a@b.c"})),
        ("PUT", "/api/account/info/shipping", json!({"address": "a", "phone_number": "123"})),
        (
            "POST",
            "/api/product",
            json!({"name": "a", "description": "b", "brand_name": "c", "price": 1, "inventory": 1}),
        ),
        ("POST", "/api/purchase", cart(product, 1)),
    ]
}

/// The column of a text's last byte, as a parser counts them, from 1.
fn column_of(text: &str, part: &str) -> usize {
    text.find(part).unwrap_or_else(|| panic!("no {part} in {text}")) + part.len()
}

#[test]
fn every_field_is_required_and_has_its_type() {
    run(async {
        let shop = shop().await;
        let customer = shop.sign_up().await;
        let mut tried = 0;
        for (method, path, fits) in doors(&shop).await {
            let refused = async |text: String, problem: String| {
                let ask = shop.ask(method, path).bearer(&customer.token).body(text.clone());
                ask.refused(400, &format!("invalid parameter: {problem}")).await;
            };
            for (field, value) in fits.as_object().unwrap() {
                let mut missing = fits.clone();
                missing.as_object_mut().unwrap().remove(field);
                let text = missing.to_string();
                let column = text.len();
                refused(text, format!("body: missing field `{field}` (line 1, column {column})")).await;

                let (kind, others) = match value {
                    Value::String(_) => ("a string", ["null", "7", "true"]),
                    Value::Number(_) => ("i64", ["null", "\"7\"", "1.5"]),
                    // Its fields are tried one by one below.
                    _ => continue,
                };
                for other in others {
                    let mut wrong = fits.clone();
                    wrong[field] = serde_json::from_str(other).unwrap();
                    let text = wrong.to_string();
                    let column = column_of(&text, &format!("\"{field}\":{other}"));
                    refused(text, format!("{field}: expected {kind} (line 1, column {column})")).await;
                    tried += 1;
                }
            }
        }
        assert_eq!(tried, 3 * 20, "every field of every door");
    });
}

#[test]
fn every_field_of_a_cart_is_required_and_has_its_type() {
    run(async {
        let shop = shop().await;
        let customer = shop.sign_up().await;
        let product = shop.new_product(1, 10).await;
        let payment = r#""payment":{"currency_code":"NT"}"#;
        let item = |fields: &str| format!(r#"{{"purchase_items":[{{{fields}}}],{payment}}}"#);
        let id = format!(r#""product_id":{product}"#);
        let paid =
            |payment: &str| format!(r#"{{"purchase_items":[{{{id},"amount":1}}],"payment":{payment}}}"#);
        for (text, until, problem) in [
            (item(r#""amount":1"#), r#""amount":1}"#, "purchase_items[0]: missing field `product_id`"),
            (item(&id), &*format!("{id}}}"), "purchase_items[0]: missing field `amount`"),
            (item(""), "[{}", "purchase_items[0]: missing field `product_id`"),
            (item(r#""product_id":null,"amount":1"#), "null", "purchase_items[0].product_id: expected u64"),
            (item(r#""product_id":-1,"amount":1"#), "-1", "purchase_items[0].product_id: expected u64"),
            (item(r#""product_id":"1","amount":1"#), r#""1""#, "purchase_items[0].product_id: expected u64"),
            (item(r#""product_id":1.0,"amount":1"#), "1.0", "purchase_items[0].product_id: expected u64"),
            (
                item(r#""product_id":18446744073709551616,"amount":1"#),
                "18446744073709551616",
                "purchase_items[0].product_id: expected u64",
            ),
            (item(&format!(r#"{id},"amount":null"#)), "null", "purchase_items[0].amount: expected i64"),
            (item(&format!(r#"{id},"amount":"1""#)), r#""1""#, "purchase_items[0].amount: expected i64"),
            (item(&format!(r#"{id},"amount":1.5"#)), "1.5", "purchase_items[0].amount: expected i64"),
            (
                item(&format!(r#"{id},"amount":9223372036854775808"#)),
                "9223372036854775808",
                "purchase_items[0].amount: expected i64",
            ),
            (
                item(&format!(r#"{id},"amount":1,"amount":2"#)),
                r#""amount":1,"amount""#,
                "purchase_items[0]: duplicate field `amount`",
            ),
            (
                format!(r#"{{"purchase_items":null,{payment}}}"#),
                "null",
                "purchase_items: expected a sequence",
            ),
            (
                format!(r#"{{"purchase_items":[null],{payment}}}"#),
                "null",
                "purchase_items[0]: expected an object",
            ),
            (paid("null"), "null", "payment: expected an object"),
            (paid("{}"), ":{}", "payment: missing field `currency_code`"),
            (paid(r#"{"currency_code":null}"#), "null", "payment.currency_code: expected a string"),
            (paid(r#"{"currency_code":158}"#), "158", "payment.currency_code: expected a string"),
        ] {
            let column = column_of(&text, until);
            let msg = format!("invalid parameter: {problem} (line 1, column {column})");
            let ask = shop.ask("POST", "/api/purchase").bearer(&customer.token).body(text.clone());
            ask.refused(400, &msg).await;
        }
        assert_eq!(shop.purchases(&customer).await, Vec::<Value>::new(), "nothing was bought");
    });
}

#[test]
fn what_is_no_json_object_is_refused() {
    run(async {
        let shop = shop().await;
        let customer = shop.sign_up().await;
        let empty = "the request's body is empty, a JSON object is expected";
        let not_json = "the request's body is not JSON: ";
        for (method, path, fits) in doors(&shop).await {
            let two = format!("{fits} {fits}");
            let behind = format!("trailing characters at line 1 column {}", fits.to_string().len() + 2);
            let cases: [(&[u8], String); 13] = [
                (b"", empty.to_owned()),
                (b" \r\n\t", empty.to_owned()),
                (b"{", format!("{not_json}EOF while parsing an object at line 1 column 1")),
                (b"{\"a\":", format!("{not_json}EOF while parsing a value at line 1 column 5")),
                (b"a=b&c=d", format!("{not_json}expected value at line 1 column 1")),
                (b"{'a':1}", format!("{not_json}key must be a string at line 1 column 2")),
                (b"\xef\xbb\xbf{}", format!("{not_json}expected value at line 1 column 1")),
                (b"{\"\xff\":1}", format!("{not_json}invalid unicode code point at line 1 column 3")),
                (two.as_bytes(), format!("{not_json}{behind}")),
                (b"null", "invalid parameter: body: expected an object (line 1, column 4)".to_owned()),
                (b"true", "invalid parameter: body: expected an object (line 1, column 4)".to_owned()),
                (b"17", "invalid parameter: body: expected an object (line 1, column 2)".to_owned()),
                (b"\"{}\"", "invalid parameter: body: expected an object (line 1, column 4)".to_owned()),
            ];
            for (body, msg) in cases {
                let ask = shop.ask(method, path).bearer(&customer.token).body(body);
                ask.refused(400, &msg).await;
            }
        }
    });
}

#[test]
fn nesting_costs_the_shop_nothing_in_fields_that_nobody_knows() {
    run(async {
        let shop = shop().await;
        let open = format!(r#"{{"unknown":{}"#, "[".repeat(60_000));
        let msg = "the request's body is not JSON: EOF while parsing a list at line 1 column 60011";
        shop.ask("POST", "/api/account/auth/login").body(open).refused(400, msg).await;
        let fits = new_customer().to_string();
        let nested = format!(r#"{{"unknown":{}{},{}"#, "[".repeat(30_000), "]".repeat(30_000), &fits[1..]);
        let answer = shop.ask("POST", "/api/account/auth/signup").body(nested).send().await;
        assert_eq!(answer.status, 201, "{}", answer.body);
    });
}

#[test]
fn a_body_is_json_whatever_its_content_type_says() {
    run(async {
        let shop = shop().await;
        for content_type in [
            "application/x-www-form-urlencoded",
            "application/json",
            "application/json; charset=utf-8",
            "text/plain",
            "multipart/form-data; boundary=x",
            "no type at all",
            "",
        ] {
            let ask = shop.ask("POST", "/api/account/auth/signup").json(&new_customer());
            let answer = ask.header("content-type", content_type).send().await;
            assert_eq!(answer.status, 201, "{content_type}: {}", answer.body);
            assert_eq!(answer.headers["content-type"], "application/json");
        }
        let untyped = shop.post("/api/account/auth/signup", &new_customer()).await;
        assert_eq!(untyped.status, 201, "{}", untyped.body);
    });
}

#[test]
fn white_space_and_escapes_are_json_too() {
    run(async {
        let shop = shop().await;
        let text = "\r\n{ \"name\" : \"\\u0061\\n\\ud83d\\ude00\", \"description\":\"b\",\t\"brand_name\":\"c\",\"price\":0,\"inventory\":0 }\n";
        let created = shop.ask("POST", "/api/product").body(text).send().await;
        assert_eq!(created.status, 201, "{}", created.body);
        let shown = shop.get(&format!("/api/product/{}", created.json()["id"])).await.json();
        assert_eq!((shown["name"].as_str(), &shown["inventory"]), (Some("a\n\u{1f600}"), &json!(0)));
    });
}

#[test]
fn a_body_above_the_limit_is_refused_before_anything_else() {
    run(async {
        let shop = shop().await;
        let msg = format!("the request's body is larger than {LIMIT_BYTES} bytes");
        for (method, path) in [
            ("POST", "/api/account/auth/login"),
            // Neither a token nor a path is asked for first.
            ("POST", "/api/purchase"),
            ("PUT", "/api/account/info/person"),
            ("POST", "/api/nothing"),
        ] {
            // Also the larger ones are heard out, so that their senders hear why.
            for size in [1, 10, 16, 16, 16].map(|times| (times * LIMIT_BYTES).max(LIMIT_BYTES + 1)) {
                shop.ask(method, path).body(vec![b' '; size]).refused(413, &msg).await;
            }
        }

        // As large as may be: read, and found to be nothing.
        let largest = shop.ask("POST", "/api/account/auth/login").body(vec![b' '; LIMIT_BYTES]);
        largest.refused(400, "the request's body is empty, a JSON object is expected").await;
    });
}

#[test]
fn a_body_that_only_announces_its_size_or_none_is_refused_too() {
    run(async {
        let shop = shop().await;
        let head = "POST /api/account/auth/login HTTP/1.1\r\nHost: shop\r\n";
        let msg = format!(r#"{{"msg":"the request's body is larger than {LIMIT_BYTES} bytes"}}"#);
        let announced = shop.wire().send(format!("{head}Content-Length: {MAX}\r\n\r\n")).answer();
        assert_eq!((announced.status, announced.body), (413, msg.clone()), "not a byte of it was sent");

        let mut wire = shop.wire();
        wire.send(format!("{head}Transfer-Encoding: chunked\r\n\r\n{:x}\r\n", LIMIT_BYTES + 1));
        wire.send(vec![b' '; LIMIT_BYTES + 1]);
        let chunked = wire.answer();
        assert_eq!((chunked.status, chunked.body), (413, msg));

        let mut wire = shop.wire();
        wire.send(format!("{head}Transfer-Encoding: chunked\r\n\r\n2\r\n{{}}\r\n0\r\n\r\n"));
        let small = wire.answer();
        assert_eq!(small.status, 400);
        assert!(small.body.contains("missing field `email`"), "{}", small.body);
    });
}

//! Paths, methods, headers, browsers of other origins, and clients that take their time.

use std::time::{Duration, Instant};

use testkit::Answer;

use crate::fixture::{Shop, run, shop, shop_with};

/// Every path of the API and the methods it allows, as `Allow` names them.
const PATHS: [(&str, &str); 15] = [
    ("/api/account/auth/signup", "POST"),
    ("/api/account/auth/login", "POST"),
    ("/api/account/auth/refresh", "POST"),
    ("/api/account/auth/logout", "POST"),
    ("/api/account/info/person", "GET,HEAD,PUT"),
    ("/api/account/info/shipping", "GET,HEAD,PUT"),
    ("/api/product", "POST"),
    ("/api/products", "GET,HEAD"),
    ("/api/product/1", "GET,HEAD"),
    ("/api/purchase", "POST"),
    ("/api/purchase/result", "GET,HEAD"),
    ("/api/purchase/1", "GET,HEAD"),
    ("/api/purchases", "GET,HEAD"),
    ("/api/order/1", "GET,HEAD"),
    ("/api/payment/1", "GET,HEAD"),
];

const METHODS: [&str; 8] = ["GET", "POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "BREW"];

#[test]
fn a_wrong_method_is_told_the_right_ones() {
    run(async {
        let shop = shop().await;
        for (path, allowed) in PATHS {
            for method in METHODS.iter().filter(|method| !allowed.split(',').any(|one| one == **method)) {
                let answer = shop.ask(method, path).refused(405, "method not allowed on this path").await;
                let mut told: Vec<&str> = answer.headers["allow"].to_str().unwrap().split(',').collect();
                told.sort_unstable();
                assert_eq!(told.join(","), allowed, "{method} {path}");
            }
        }
    });
}

#[test]
fn unknown_paths_are_404_whatever_the_method() {
    run(async {
        let shop = shop().await;
        for path in [
            "/api",
            "/api/",
            "/api/nothing",
            "/api/account",
            "/api/account/auth",
            "/api/account/auth/signup/",
            "/api/account/info/person/1",
            "/api/products/",
            "/api/products/1",
            "/api/product/",
            "/api/product/1/inventory",
            "/api//product/1",
            "/API/products",
            "/api/purchase/",
            "/api/purchase/result/",
            "/api/purchase/1/",
            "/api/order",
            "/api/order/",
            "/api/payment/",
            "/api/../healthz",
            "/api/%70roducts",
        ] {
            for method in METHODS {
                shop.ask(method, path).refused(404, "no such path").await;
            }
        }
    });
}

#[test]
fn head_is_get_without_the_body() {
    run(async {
        let shop = shop().await;
        let product = shop.new_product(7, 1).await;
        let path = format!("/api/product/{product}");
        let got = shop.get(&path).await;
        let headed = shop.ask("HEAD", &path).send().await;
        assert_eq!((headed.status, headed.body.as_str()), (200, ""));
        assert_eq!(headed.headers["content-length"], got.body.len().to_string().as_str());
        assert_eq!(headed.headers["content-type"], "application/json");

        let missing = shop.ask("HEAD", "/api/product/1").send().await;
        assert_eq!((missing.status, missing.body.as_str()), (404, ""));
        let unproven = shop.ask("HEAD", "/api/purchase/result").send().await;
        assert_eq!((unproven.status, unproven.body.as_str()), (401, ""));
        let customer = shop.sign_up().await;
        let stream = shop.ask("HEAD", "/api/purchase/result").bearer(&customer.token).send().await;
        assert_eq!((stream.status, stream.body.as_str()), (200, ""), "and it ends");
        assert_eq!(stream.headers["content-type"], "text/event-stream");
    });
}

#[test]
fn a_browser_reads_nothing_more_into_an_answer_than_there_is() {
    run(async {
        let shop = shop().await;
        let customer = shop.sign_up().await;
        for answer in [
            shop.get("/api/products?size=1").await,
            shop.get("/api/nothing").await,
            shop.ask("BREW", "/api/products").send().await,
            shop.get_as(&customer, "/api/account/info/person").await,
            shop.ask("POST", "/api/purchase").body(vec![0; 100_000]).send().await,
        ] {
            assert_eq!(answer.headers["x-content-type-options"], "nosniff", "{answer:?}");
            assert_eq!(answer.headers["x-frame-options"], "DENY", "{answer:?}");
            assert_eq!(answer.headers["referrer-policy"], "no-referrer", "{answer:?}");
        }
        for path in ["/api/account/info/person", "/api/account/info/shipping"] {
            let answer = shop.get_as(&customer, path).await;
            assert_eq!(answer.headers["cache-control"], "no-store", "{path}");
        }
    });
}

const ORIGIN: &str = "https://shop.example";

async fn preflight(shop: &Shop, origin: &str) -> Answer {
    shop.ask("OPTIONS", "/api/purchase")
        .header("origin", origin)
        .header("access-control-request-method", "POST")
        .header("access-control-request-headers", "authorization,content-type,idempotency-key,last-event-id")
        .send()
        .await
}

#[test]
fn without_a_list_no_other_origin_is_let_in() {
    run(async {
        let shop = shop().await;
        let asked = preflight(&shop, ORIGIN).await;
        assert_eq!(asked.status, 405);
        let got = shop.ask("GET", "/api/products?size=1").header("origin", ORIGIN).send().await;
        assert_eq!(got.status, 200);
        for answer in [asked, got] {
            let cors = answer.headers.keys().find(|name| name.as_str().starts_with("access-control"));
            assert_eq!(cors, None);
        }
    });
}

#[test]
fn the_origins_on_the_list_are_let_in_and_no_other() {
    run(async {
        let other = "http://127.0.0.1:3000";
        let shop = shop_with(&[("HTTP__CORS_ALLOWED_ORIGINS", &format!("{ORIGIN},{other}"))]).await;
        for origin in [ORIGIN, other] {
            let asked = preflight(&shop, origin).await;
            assert_eq!((asked.status, asked.body.as_str()), (200, ""));
            let list = |name: &str| {
                let mut list: Vec<String> =
                    asked.headers[name].to_str().unwrap().split(',').map(str::to_owned).collect();
                list.sort();
                list.join(",")
            };
            assert_eq!(asked.headers["access-control-allow-origin"], origin);
            assert_eq!(list("access-control-allow-methods"), "GET,POST,PUT");
            let headers = "authorization,content-type,idempotency-key,last-event-id";
            assert_eq!(list("access-control-allow-headers"), headers);
            assert_eq!(asked.headers["access-control-max-age"], "600");
            assert!(!asked.headers.contains_key("access-control-allow-credentials"));
        }
        for foreign in
            ["https://evil.example", "https://shop.example.evil.example", "http://shop.example", "null"]
        {
            let asked = preflight(&shop, foreign).await;
            assert!(!asked.headers.contains_key("access-control-allow-origin"), "{foreign}");
        }

        // A refusal is let through as well, or a page could not tell why.
        let refused = shop.ask("GET", "/api/purchases?size=1").header("origin", ORIGIN);
        let refused = refused.refused(401, "missing access token").await;
        assert_eq!(refused.headers["access-control-allow-origin"], ORIGIN);
        assert_eq!(refused.headers["access-control-expose-headers"], "retry-after");
        assert!(refused.headers["vary"].to_str().unwrap().contains("origin"));
    });
}

#[test]
fn a_head_that_is_too_large_is_refused() {
    run(async {
        let shop = shop().await;
        let request = "GET /api/products?size=1 HTTP/1.1\r\nHost: shop\r\n";
        // One more than may be; each is tiny.
        let many: String = (0..100).map(|n| format!("x-{n}: 1\r\n")).collect();
        let answer = shop.wire().send(format!("{request}{many}\r\n")).answer();
        assert_eq!((answer.status, answer.body.as_str()), (431, ""));

        // The connection may be cut while the client still sends: it need not hear why, but it is not served.
        let large = "x".repeat(200_000);
        let head = format!("{request}x-large: {large}\r\n\r\n");
        let mut wire = shop.wire();
        let heard = match wire.try_send(head.as_bytes()) {
            Ok(()) => wire.rest(),
            Err(_) => String::new(),
        };
        assert!(heard.is_empty() || heard.starts_with("HTTP/1.1 431 "), "{heard}");

        // What clients send is far below.
        let usual = shop.ask("GET", "/api/products?size=1").header("cookie", &"x".repeat(8_000)).send().await;
        assert_eq!(usual.status, 200);
    });
}

#[test]
fn what_two_servers_might_read_differently_is_refused() {
    run(async {
        let shop = shop().await;
        let request = "POST /api/account/auth/login HTTP/1.1\r\nHost: shop\r\n";
        for framing in [
            "Content-Length: 2\r\nContent-Length: 3\r\n\r\n{}",
            "Content-Length: -2\r\n\r\n{}",
            "Content-Length: 2\r\n folded\r\n\r\n{}",
            "Content Length: 2\r\n\r\n{}",
        ] {
            let answer = shop.wire().send(format!("{request}{framing}")).answer();
            assert_eq!(answer.status, 400, "{framing:?}: {answer:?}");
        }
    });
}

/// Milliseconds that this shop waits for a head and for a body.
const WAITS_MS: &str = "300";

async fn impatient() -> Shop {
    shop_with(&[("HTTP__HEAD_TIMEOUT_MS", WAITS_MS), ("HTTP__BODY_TIMEOUT_MS", WAITS_MS)]).await
}

#[test]
fn a_client_that_is_slow_with_its_head_is_cut() {
    run(async {
        let shop = impatient().await;
        let begun = Instant::now();
        let mut silent = shop.wire();
        let mut stopped = shop.wire();
        stopped.send("GET /api/products?size=1 HTTP/1.1\r\nHost: sh");
        let mut dripping = shop.wire();
        dripping.send("GET /api/products?size=1 HTTP/1.1\r\nHost: shop\r\nx-slow: ");

        // The others are served meanwhile.
        assert_eq!(shop.get("/api/products?size=1").await.status, 200);
        for heard in [dripping.drip(), silent.rest(), stopped.rest()] {
            assert!(heard.is_empty() || heard.starts_with("HTTP/1.1 408 "), "{heard}");
        }
        assert!(begun.elapsed() >= Duration::from_millis(300), "not before its time");
    });
}

#[test]
fn a_client_that_is_slow_with_its_body_is_answered_408() {
    run(async {
        let shop = impatient().await;
        let head = "POST /api/account/auth/login HTTP/1.1\r\nHost: shop\r\nContent-Length: 1000\r\n\r\n{";
        let msg = r#"{"msg":"the request's body did not arrive in time"}"#;
        let mut stopped = shop.wire();
        stopped.send(head);
        let mut dripping = shop.wire();
        dripping.send(head);
        let heard = dripping.drip();
        assert!(heard.starts_with("HTTP/1.1 408 ") && heard.ends_with(msg), "{heard}");
        let answer = stopped.answer();
        assert_eq!((answer.status, answer.body.as_str()), (408, msg));
        assert_eq!(stopped.rest(), "", "the rest of the body is not taken for a request");
        assert_eq!(shop.get("/api/products?size=1").await.status, 200);
    });
}

#[test]
fn one_connection_serves_one_request_after_another() {
    run(async {
        let shop = shop().await;
        let request = "GET /api/products?size=0 HTTP/1.1\r\nHost: shop\r\n\r\n";
        let mut wire = shop.wire();
        wire.send(request.repeat(3));
        for _ in 0..3 {
            assert_eq!(wire.answer().status, 400);
        }
        wire.send("GET /api/products?size=1 HTTP/1.1\r\nHost: shop\r\nConnection: close\r\n\r\n");
        let last = wire.answer();
        assert_eq!(last.status, 200);
        assert!(last.head.contains("connection: close"), "{}", last.head);
        assert_eq!(wire.rest(), "");
    });
}

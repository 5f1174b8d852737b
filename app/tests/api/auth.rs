//! Who may come in: tokens that are missing, forged, or past their time.

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use serde_json::{Value, json};
use testkit::until;

use crate::fixture::{PATIENCE, run, shop, shop_with};

/// Every door that asks for a token.
const CLOSED: [(&str, &str); 12] = [
    ("POST", "/api/account/auth/logout"),
    ("GET", "/api/account/info/person"),
    ("PUT", "/api/account/info/person"),
    ("GET", "/api/account/info/shipping"),
    ("PUT", "/api/account/info/shipping"),
    ("POST", "/api/purchase"),
    ("GET", "/api/purchase/result"),
    ("GET", "/api/purchase/1"),
    ("GET", "/api/purchases?size=1"),
    ("GET", "/api/order/1"),
    ("GET", "/api/payment/1"),
    // Nothing else is said to somebody unknown: not that the page or the id makes no sense.
    ("GET", "/api/purchases"),
];

const INVALID: &str = r#"Bearer error="invalid_token""#;

#[test]
fn every_closed_door_asks_for_a_token_before_it_looks_at_anything_else() {
    run(async {
        let shop = shop().await;
        for (method, path) in CLOSED {
            let answer = shop.ask(method, path).body("no JSON").refused(401, "missing access token").await;
            assert_eq!(answer.headers["www-authenticate"], "Bearer", "{method} {path}");
            let forged = shop.ask(method, path).bearer("forged").body("no JSON");
            let answer = forged.refused(401, "invalid token").await;
            assert_eq!(answer.headers["www-authenticate"], INVALID, "{method} {path}");
        }
    });
}

#[test]
fn the_scheme_is_bearer_in_any_case() {
    run(async {
        let shop = shop().await;
        let token = shop.sign_up().await.token;
        let with =
            |value: String| shop.ask("GET", "/api/account/info/person").header("authorization", &value);
        for scheme in ["bearer", "Bearer", "BEARER", "bEaReR"] {
            assert_eq!(with(format!("{scheme} {token}")).send().await.status, 200, "{scheme}");
        }
        assert_eq!(with(format!("bearer   {token} ")).send().await.status, 200, "with spaces");
        for scheme in ["Basic", "JWT", "bearer:", "token"] {
            with(format!("{scheme} {token}")).refused(401, "missing access token").await;
        }
        for value in [token.clone(), "bearer".to_owned(), String::new(), "bearer ".to_owned()] {
            with(value).refused(401, "invalid token").await;
        }
        let twice = with(format!("bearer {token}")).header("authorization", &format!("bearer {token}"));
        twice.refused(401, "invalid token").await;
    });
}

/// A token with its header and its claims changed, under its old signature.
fn changed(token: &str, header: impl Fn(&mut Value), claims: impl Fn(&mut Value)) -> String {
    let parts: Vec<&str> = token.split('.').collect();
    let part = |text: &str, change: &dyn Fn(&mut Value)| {
        let mut json: Value = serde_json::from_slice(&URL_SAFE_NO_PAD.decode(text).unwrap()).unwrap();
        change(&mut json);
        URL_SAFE_NO_PAD.encode(json.to_string())
    };
    format!("{}.{}.{}", part(parts[0], &header), part(parts[1], &claims), parts[2])
}

#[test]
fn a_forged_token_opens_nothing() {
    run(async {
        let shop = shop().await;
        let (customer, victim) = (shop.sign_up().await, shop.sign_up().await);
        let token = customer.token.as_str();
        let kept = |_: &mut Value| {};
        let signed = token.rsplit_once('.').unwrap().0;
        let victims = victim.token.rsplit_once('.').unwrap();
        let claims = URL_SAFE_NO_PAD.decode(victims.0.split_once('.').unwrap().1).unwrap();
        let who = serde_json::from_slice::<Value>(&claims).unwrap()["sub"].clone();
        let unsigned = changed(token, |header| header["alg"] = json!("none"), kept);
        let mut flipped = token.to_owned();
        // Not the last character, whose low bits mean nothing.
        let last = flipped.len() - 10;
        let other = if flipped.as_bytes()[last] == b'A' { "B" } else { "A" };
        flipped.replace_range(last..=last, other);
        let forged = [
            changed(token, kept, |claims| claims["sub"] = who.clone()),
            changed(token, kept, |claims| claims["exp"] = json!(9_999_999_999_u64)),
            changed(token, kept, |claims| claims["exp"] = json!(1)),
            changed(token, |header| header["alg"] = json!("HS256"), kept),
            changed(token, |header| header["kid"] = json!("../../etc/passwd"), kept),
            format!("{}.", unsigned.rsplit_once('.').unwrap().0),
            unsigned,
            flipped,
            format!("{signed}."),
            format!("{signed}.{}", victims.1),
            format!("{}.{}", victims.0, token.rsplit_once('.').unwrap().1),
            format!("{token}.{token}"),
            customer.refresh.clone(),
            "..".to_owned(),
            "a.b.c".to_owned(),
            "x".repeat(5_000),
        ];
        for token in forged {
            let answer = shop.ask("GET", "/api/account/info/person").bearer(&token).send().await;
            assert_eq!((answer.status, answer.body.as_str()), (401, r#"{"msg":"invalid token"}"#), "{token}");
            assert_eq!(answer.headers["www-authenticate"], INVALID);
        }
        // And those who hold good ones are served all the same.
        let mine = shop.get_as(&customer, "/api/account/info/person").await.json();
        assert_eq!(mine["email"], customer.email.as_str());
    });
}

#[test]
fn an_access_token_past_its_time_is_told_so() {
    run(async {
        let shop = shop_with(&[("ACCOUNT__ACCESS_TOKEN_SECONDS", "1")]).await;
        let customer = shop.sign_up().await;
        let ask = || shop.ask("GET", "/api/account/info/person").bearer(&customer.token);
        until("the token's time is over", PATIENCE, async || ask().send().await.status == 401).await;
        let answer = ask().refused(401, "token expired").await;
        let challenge = format!(r#"{INVALID}, error_description="token expired""#);
        assert_eq!(answer.headers["www-authenticate"], challenge.as_str());

        let body = json!({"refresh_token": customer.refresh});
        let pair = shop.post("/api/account/auth/refresh", &body).await;
        assert_eq!(pair.status, 200, "and the refresh token still is good: {}", pair.body);
    });
}

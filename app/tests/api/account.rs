//! Customers: signing up, logging in, tokens that are renewed and given back, personal data.
//!
//! The rules in depth are tested beside the account service; here each is seen once, from outside.

use serde_json::{Value, json};
use testkit::Answer;

use crate::fixture::{Customer, PASSWORD, Shop, new_customer, run, shop, shop_with};

const SIGN_UP: &str = "/api/account/auth/signup";
const LOG_IN: &str = "/api/account/auth/login";
const REFRESH: &str = "/api/account/auth/refresh";
const LOG_OUT: &str = "/api/account/auth/logout";
const PERSON: &str = "/api/account/info/person";
const SHIPPING: &str = "/api/account/info/shipping";

/// The two tokens of an answer that has nothing else.
#[track_caller]
fn pair(answer: &Answer, status: u16) -> (String, String) {
    assert_eq!(answer.status, status, "{}", answer.body);
    assert_eq!(answer.headers["cache-control"], "no-store");
    let body = answer.json();
    let text = |name: &str| body[name].as_str().unwrap().to_owned();
    let (refresh, access) = (text("refresh_token"), text("access_token"));
    assert_eq!(body, json!({"refresh_token": refresh, "access_token": access}));
    assert!(!refresh.is_empty() && access.split('.').count() == 3, "{body}");
    (refresh, access)
}

fn login(email: &str, password: &str) -> Value {
    json!({"email": email, "password": password})
}

async fn refreshed(shop: &Shop, refresh: &str) -> Answer {
    shop.post(REFRESH, &json!({ "refresh_token": refresh })).await
}

async fn refresh_refused(shop: &Shop, refresh: &str) {
    let ask = shop.ask("POST", REFRESH).json(&json!({ "refresh_token": refresh }));
    ask.refused(401, "invalid token").await;
}

#[test]
fn a_customer_signs_up_logs_in_and_finds_its_data() {
    run(async {
        let shop = shop().await;
        let body = new_customer();
        let (_, access) = pair(&shop.post(SIGN_UP, &body).await, 201);
        let email = body["email"].as_str().unwrap();
        let (_, second) = pair(&shop.post(LOG_IN, &login(email, PASSWORD)).await, 200);
        assert_ne!(access, second);
        for token in [access, second] {
            let person = shop.ask("GET", PERSON).bearer(&token).send().await;
            assert_eq!(person.status, 200);
            assert_eq!(person.json(), json!({"firstname": "ming", "lastname": "hsu", "email": email}));
            let shipping = shop.ask("GET", SHIPPING).bearer(&token).send().await;
            assert_eq!(shipping.status, 200);
            assert_eq!(shipping.json(), json!({"address": "taipei", "phone_number": body["phone_number"]}));
        }
    });
}

#[test]
fn an_e_mail_and_a_phone_number_can_be_taken_once() {
    run(async {
        let shop = shop().await;
        let taken = shop.sign_up().await;
        let mut same_email = new_customer();
        same_email["email"] = json!(taken.email.to_uppercase());
        let mut same_phone = new_customer();
        let (front, back) = taken.phone.split_at(3);
        same_phone["phone_number"] = json!(format!("({front}) {back}"));
        for body in [&same_email, &same_phone] {
            shop.ask("POST", SIGN_UP).json(body).refused(400, "duplicate entry").await;
        }
        // Nothing of a refused sign-up is left: its other half is still free.
        let free = json!({"password": PASSWORD, "firstname": "a", "lastname": "b", "email": same_phone["email"],
            "address": "c", "phone_number": same_email["phone_number"]});
        pair(&shop.post(SIGN_UP, &free).await, 201);

        let other = shop.sign_up().await;
        let person = json!({"firstname": "a", "lastname": "b", "email": taken.email});
        shop.ask("PUT", PERSON).bearer(&other.token).json(&person).refused(400, "duplicate entry").await;
        let shipping = json!({"address": "c", "phone_number": taken.phone});
        shop.ask("PUT", SHIPPING).bearer(&other.token).json(&shipping).refused(400, "duplicate entry").await;
    });
}

#[test]
fn what_a_customer_says_about_itself_has_bounds() {
    run(async {
        let shop = shop().await;
        let customer = shop.sign_up().await;
        let phone = "is not a phone number: 3 to 15 digits, with spaces, '-', '.', '(', ')' or a leading '+'";
        let long = "x".repeat(301);
        for (field, value, problem) in [
            ("password", "1234567", "must have at least 8 characters"),
            ("password", "", "must have at least 8 characters"),
            ("password", &"x".repeat(129), "must have at most 128 characters"),
            ("firstname", " ", "must not be empty"),
            ("lastname", &long, "must have at most 100 characters"),
            ("lastname", "a\u{0}b", "must not have control characters"),
            ("email", "", "must not be empty"),
            ("email", "ming", "is not an e-mail address"),
            ("email", "ming@", "is not an e-mail address"),
            ("email", "ming hsu@ming.com", "is not an e-mail address"),
            ("address", "", "must not be empty"),
            ("address", &long, "must have at most 300 characters"),
            ("phone_number", "12", phone),
            ("phone_number", "call me", phone),
        ] {
            let msg = format!("invalid parameter: {field}: {problem}");
            let mut body = new_customer();
            body[field] = json!(value);
            shop.ask("POST", SIGN_UP).json(&body).refused(400, &msg).await;
            let path = match field {
                "firstname" | "lastname" | "email" => PERSON,
                "address" | "phone_number" => SHIPPING,
                _ => continue,
            };
            shop.ask("PUT", path).bearer(&customer.token).json(&body).refused(400, &msg).await;
        }
    });
}

#[test]
fn fields_that_the_api_does_not_know_bind_to_nothing() {
    run(async {
        let shop = shop().await;
        let victim = shop.sign_up().await;
        let mut body = new_customer();
        for (field, value) in [
            ("id", json!(1)),
            ("customer_id", json!(1)),
            ("active", json!(false)),
            ("role", json!("admin")),
            ("password_hash", json!("x")),
        ] {
            body[field] = value;
        }
        let (_, access) = pair(&shop.post(SIGN_UP, &body).await, 201);
        let change = json!({"firstname": "new", "lastname": "name", "email": body["email"], "customer_id": 1,
            "id": 1, "password": "changed123", "address": "elsewhere"});
        let put = shop.ask("PUT", PERSON).bearer(&access).json(&change).send().await;
        assert_eq!((put.status, put.json()), (200, json!({"msg": "ok"})));
        let email = body["email"].as_str().unwrap();
        pair(&shop.post(LOG_IN, &login(email, PASSWORD)).await, 200);
        let shipping = shop.ask("GET", SHIPPING).bearer(&access).send().await.json();
        assert_eq!(shipping["address"], "taipei");
        let theirs = shop.get_as(&victim, PERSON).await.json();
        assert_eq!(theirs, json!({"firstname": "ming", "lastname": "hsu", "email": victim.email}));
    });
}

#[test]
fn a_failed_login_tells_nothing() {
    run(async {
        let shop = shop().await;
        let customer = shop.sign_up().await;
        let mut answers = Vec::new();
        for body in [login(&customer.email, "wrongwrong"), login("nobody@ming.com", PASSWORD)] {
            let answer = shop.ask("POST", LOG_IN).json(&body).refused(401, "authentication failed").await;
            let mut headers = answer.headers;
            headers.remove("date");
            answers.push((answer.body, headers));
        }
        assert_eq!(answers[0], answers[1]);
        for (body, msg) in [
            (login("ming", PASSWORD), "invalid parameter: email: is not an e-mail address"),
            (
                login(&customer.email, &"x".repeat(129)),
                "invalid parameter: password: must have at most 128 characters",
            ),
        ] {
            shop.ask("POST", LOG_IN).json(&body).refused(400, msg).await;
        }
    });
}

#[test]
fn after_a_change_of_e_mail_only_the_new_one_logs_in() {
    run(async {
        let shop = shop().await;
        let customer = shop.sign_up().await;
        let new = format!("new-{}", customer.email);
        let body = json!({"firstname": "new", "lastname": "name", "email": new});
        let put = shop.ask("PUT", PERSON).bearer(&customer.token).json(&body).send().await;
        assert_eq!((put.status, put.body.as_str()), (200, r#"{"msg":"ok"}"#));
        assert_eq!(shop.get_as(&customer, PERSON).await.json(), body);
        let old = shop.ask("POST", LOG_IN).json(&login(&customer.email, PASSWORD));
        old.refused(401, "authentication failed").await;
        pair(&shop.post(LOG_IN, &login(&new, PASSWORD)).await, 200);

        let body = json!({"address": "japan", "phone_number": format!("+9{}", customer.phone)});
        let put = shop.ask("PUT", SHIPPING).bearer(&customer.token).json(&body).send().await;
        assert_eq!((put.status, put.body.as_str()), (200, r#"{"msg":"ok"}"#));
        assert_eq!(shop.get_as(&customer, SHIPPING).await.json(), body);
    });
}

#[test]
fn a_refresh_spends_its_token_and_a_second_use_ends_the_family() {
    run(async {
        let shop = shop().await;
        let customer = shop.sign_up().await;
        let (elsewhere, _) = pair(&shop.post(LOG_IN, &login(&customer.email, PASSWORD)).await, 200);
        let (second, access) = pair(&refreshed(&shop, &customer.refresh).await, 200);
        assert_ne!(second, customer.refresh);
        assert_eq!(shop.ask("GET", PERSON).bearer(&access).send().await.status, 200);
        let (third, _) = pair(&refreshed(&shop, &second).await, 200);

        // A thief comes with a spent one: nobody of this family is believed any more.
        refresh_refused(&shop, &customer.refresh).await;
        refresh_refused(&shop, &third).await;
        // Another login is another family.
        pair(&refreshed(&shop, &elsewhere).await, 200);

        for nonsense in ["", "x", &customer.token, &"A".repeat(43)] {
            refresh_refused(&shop, nonsense).await;
        }
    });
}

async fn log_out(shop: &Shop, customer: &Customer, refresh: &str) -> Answer {
    let ask = shop.ask("POST", LOG_OUT).bearer(&customer.token);
    ask.json(&json!({ "refresh_token": refresh })).send().await
}

#[test]
fn a_logout_ends_its_own_family_and_nobody_else_s() {
    run(async {
        let shop = shop().await;
        let (customer, other) = (shop.sign_up().await, shop.sign_up().await);
        let stolen = log_out(&shop, &other, &customer.refresh).await;
        crate::fixture::assert_refused("somebody else's", &stolen, 401, "invalid token");
        let (second, _) = pair(&refreshed(&shop, &customer.refresh).await, 200);

        let done = log_out(&shop, &customer, &second).await;
        assert_eq!((done.status, done.body.as_str()), (200, r#"{"msg":"ok"}"#));
        refresh_refused(&shop, &second).await;
        let unknown = log_out(&shop, &customer, "x").await;
        crate::fixture::assert_refused("no token", &unknown, 401, "invalid token");
        pair(&refreshed(&shop, &other.refresh).await, 200);
    });
}

#[test]
fn logins_are_limited_and_told_when_to_come_back() {
    run(async {
        let hour = "3600000";
        let shop = shop_with(&[
            ("ACCOUNT__LOGINS__BURST_PER_EMAIL", "2"),
            ("ACCOUNT__LOGINS__INTERVAL_PER_EMAIL_MS", hour),
            ("ACCOUNT__LOGINS__BURST_PER_CLIENT", "7"),
            ("ACCOUNT__LOGINS__INTERVAL_PER_CLIENT_MS", hour),
        ])
        .await;
        let customer = shop.sign_up().await;
        let ask = |email: &str, password| shop.ask("POST", LOG_IN).json(&login(email, password));
        let limited = async |email: &str| {
            let answer = ask(email, PASSWORD).refused(429, "too many requests, try again later").await;
            let seconds: u32 = answer.headers["retry-after"].to_str().unwrap().parse().unwrap();
            assert!((3_500..=3_600).contains(&seconds), "{seconds}");
        };
        ask(&customer.email, "wrongwrong").refused(401, "authentication failed").await;
        ask(&customer.email.to_uppercase(), "wrongwrong").refused(401, "authentication failed").await;
        // The right password does not help, and an address that nobody has is counted likewise.
        limited(&customer.email).await;
        for _ in 0..2 {
            ask("nobody@ming.com", PASSWORD).refused(401, "authentication failed").await;
        }
        limited("nobody@ming.com").await;
        // Signing up and refreshing are something else.
        let other = shop.sign_up().await;
        assert_eq!(ask(&other.email, PASSWORD).send().await.status, 200);
        // That was the seventh try from this address.
        limited(&shop.sign_up().await.email).await;
        pair(&refreshed(&shop, &customer.refresh).await, 200);
    });
}

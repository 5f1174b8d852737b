//! The walk through the API of the original's README, line by line, through the gateway: any line may be answered by another replica than the one before.

use serde_json::{Value, json};
use testkit::{Answer, Client, Engines, Shop, TempDir, until};

use super::{ENDED_WITHIN, PROCESSES, options};

const EMAIL: &str = "ming@ming.com";
/// Events of a purchase that succeeds.
const EVENTS: usize = 6;

fn expect(answer: &Answer, status: u16, msg: Option<&str>) -> Value {
    assert_eq!(answer.status, status, "{}", answer.body);
    let body = answer.json();
    if let Some(msg) = msg {
        assert_eq!(body["msg"], msg, "{body}");
    }
    body
}

/// Signs up and logs in, twice each where the second is refused. The token.
async fn account(client: &Client) -> String {
    let person = json!({"password": "abcd5432", "firstname": "ming", "lastname": "hsu", "email": EMAIL,
                        "address": "taipei", "phone_number": "0912345678"});
    let post = async |path: &str, body: &Value| client.post(path, None, body).await.unwrap();
    let body = expect(&post("/api/account/auth/signup", &person).await, 201, None);
    assert!(!body["access_token"].as_str().unwrap().is_empty());
    expect(&post("/api/account/auth/signup", &person).await, 400, Some("duplicate entry"));
    let login = |password: &str| json!({"email": EMAIL, "password": password});
    let body = expect(&post("/api/account/auth/login", &login("abcd5432")).await, 200, None);
    expect(&post("/api/account/auth/login", &login("wrongwrong")).await, 401, None);
    let refresh = json!({"refresh_token": body["refresh_token"].as_str().unwrap()});
    let refreshed = expect(&post("/api/account/auth/refresh", &refresh).await, 200, None);
    assert!(!refreshed["access_token"].as_str().unwrap().is_empty());
    body["access_token"].as_str().unwrap().to_owned()
}

/// What is changed is read back at once.
async fn personal_data(client: &Client, token: &str) {
    let get = async |path: &str| expect(&client.get(path, Some(token)).await.unwrap(), 200, None);
    let put = async |path: &str, body: Value| {
        expect(&client.put(path, Some(token), &body).await.unwrap(), 200, Some("ok"));
    };
    let (person, shipping) = ("/api/account/info/person", "/api/account/info/shipping");
    assert_eq!(get(person).await["email"], EMAIL);
    put(person, json!({"firstname": "newfirst", "lastname": "newlast", "email": "new@ming.com"})).await;
    let now = get(person).await;
    assert_eq!((&now["firstname"], &now["email"]), (&json!("newfirst"), &json!("new@ming.com")));
    put(shipping, json!({"address": "japan", "phone_number": "0987654321"})).await;
    assert_eq!(get(shipping).await["address"], "japan");
    let nobody = client.get(person, None).await.unwrap();
    assert_eq!(nobody.status, 401, "{}", nobody.body);
}

/// Two products, of which the second is few. Their ids.
async fn catalogue(client: &Client) -> (u64, u64) {
    let create = async |name: &str, inventory: i64| {
        let product = json!({"name": name, "description": "a product", "brand_name": "mingbrand", "price": 100,
                             "inventory": inventory});
        let answer = client.post("/api/product", None, &product).await.unwrap();
        expect(&answer, 201, None)["id"].as_u64().unwrap()
    };
    let (plenty, few) = (create("product1", 1_000).await, create("product2", 10).await);
    assert!(plenty < 1 << 53 && few < 1 << 53, "{plenty} and {few} survive JavaScript");
    let list = expect(&client.get("/api/products?offset=0&size=100", None).await.unwrap(), 200, None);
    assert_eq!(list["catalogs"].as_array().map(Vec::len), Some(2), "{list}");
    let details = expect(&client.get(&format!("/api/product/{plenty}"), None).await.unwrap(), 200, None);
    assert_eq!(details["inventory"], 1_000);
    expect(&client.get("/api/product/1", None).await.unwrap(), 404, Some("product not found"));
    (plenty, few)
}

/// A purchase that succeeds, one of more than there is, and three that are refused.
async fn purchases(client: &Client, token: &str, plenty: u64, few: u64) {
    let mut events = client.events(token, None).await.unwrap();
    let buy = async |product: u64, amount: i64, payment: Option<Value>| {
        let mut cart = json!({"purchase_items": [{"product_id": product, "amount": amount}]});
        cart.as_object_mut().unwrap().extend(payment.map(|payment| ("payment".to_owned(), payment)));
        client.post("/api/purchase", Some(token), &cart).await.unwrap()
    };
    let payment = || Some(json!({"currency_code": "NT"}));
    let get = async |path: String| client.get(&path, Some(token)).await.unwrap();
    let stock_is = async |product: u64, left: i64| {
        // A second at most, whichever replica is asked.
        until("the stock is seen", ENDED_WITHIN, async || {
            get(format!("/api/product/{product}")).await.json()["inventory"] == left
        })
        .await;
    };

    let id = expect(&buy(plenty, 1, payment()).await, 201, None)["purchase_id"].as_u64().unwrap();
    let mut told = Vec::new();
    while told.len() < EVENTS {
        let event = events.next(ENDED_WITHIN).await.unwrap();
        assert_eq!(event.event, "data");
        let data: Value = serde_json::from_str(&event.data).unwrap();
        assert_eq!(data["purchase_id"], id);
        told.push(format!("{} {}", data["step"].as_str().unwrap(), data["status"].as_str().unwrap()));
    }
    let steps = ["UPDATE_PRODUCT_INVENTORY", "CREATE_ORDER", "CREATE_PAYMENT"];
    let expected: Vec<String> = steps
        .iter()
        .flat_map(|step| ["EXECUTE", "SUCCESS"].map(|status| format!("{step} STATUS_{status}")))
        .collect();
    assert_eq!(told, expected);
    let order = expect(&get(format!("/api/order/{id}")).await, 200, None);
    let item = &order["purchased_items"][0];
    assert_eq!((&item["product_id"], &item["amount"]), (&json!(plenty), &json!(1)), "{order}");
    let paid = expect(&get(format!("/api/payment/{id}")).await, 200, None);
    assert_eq!((&paid["currency_code"], &paid["amount"]), (&json!("NT"), &json!(100)), "{paid}");
    stock_is(plenty, 999).await;

    let id = expect(&buy(few, 11, payment()).await, 201, None)["purchase_id"].as_u64().unwrap();
    for expected in ["STATUS_EXECUTE", "STATUS_FAILED"] {
        let event = events.next(ENDED_WITHIN).await.unwrap();
        let data: Value = serde_json::from_str(&event.data).unwrap();
        let found = (&data["purchase_id"], &data["step"], &data["status"]);
        assert_eq!(found, (&json!(id), &json!("UPDATE_PRODUCT_INVENTORY"), &json!(expected)), "{data}");
    }
    for path in ["order", "payment"] {
        expect(&get(format!("/api/{path}/{id}")).await, 404, None);
    }
    stock_is(few, 10).await;

    expect(&buy(plenty, 1, None).await, 400, None);
    expect(&buy(plenty, 0, payment()).await, 400, None);
    expect(&buy(1, 1, payment()).await, 404, Some("product not found"));
}

#[tokio::test(flavor = "multi_thread")]
async fn the_originals_walk_goes_through_the_gateway() {
    let (dir, engines) = (TempDir::new(), Engines::shared());
    let mut shop = Shop::start(options(&dir, &engines, PROCESSES)).await.unwrap();
    let client = shop.client();
    let token = account(&client).await;
    personal_data(&client, &token).await;
    let (plenty, few) = catalogue(&client).await;
    purchases(&client, &token, plenty, few).await;
    let status = shop.terminate().await;
    assert!(status.success(), "{status}:\n{}", testkit::tail(&shop.stderr()));
}

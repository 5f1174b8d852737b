//! A client in Python, of code that protoc makes of the protos in `protos/`, asks all that the contract lets it ask. Those are written
//! after the contract, and not after the shop's own `proto/`.

use std::path::Path;
use std::process::Stdio;

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use serde_json::{Value, json};
use servers::program::{self, GrpcPrograms};
use testkit::traffic::{Customer, Product};
use testkit::{Client, Engines, TempDir, until};
use tokio::process::Command;

use super::{PATIENCE, many_processes, one_process};

const HERE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/outside");
const PROTOS: [&str; 4] = ["auth.proto", "product.proto", "health.proto", "reflection.proto"];
/// More products than one call may name: the bound of the product service, and one.
const TOO_MANY: usize = 1_001;

/// The client's code, generated.
struct Foreign {
    programs: GrpcPrograms,
    generated: TempDir,
}

impl Foreign {
    async fn generate() -> Foreign {
        let programs = program::grpc().unwrap_or_else(|missing| panic!("{missing}"));
        let generated = TempDir::new();
        let mut plugin = std::ffi::OsString::from("--plugin=protoc-gen-grpc_python=");
        plugin.push(&programs.plugin);
        let protos = Path::new(HERE).join("protos");
        let mut protoc = Command::new(&programs.protoc);
        protoc.arg(plugin).arg("--proto_path").arg(protos).args(PROTOS);
        protoc.arg("--python_out").arg(generated.path()).arg("--grpc_python_out").arg(generated.path());
        run(protoc).await;
        Foreign { programs, generated }
    }

    /// What the client prints.
    async fn ask(&self, shop: &Client, questions: &Value) -> Value {
        let mut python = Command::new(&self.programs.python);
        python.arg(Path::new(HERE).join("client.py")).arg(self.generated.path());
        python.arg(shop.base().trim_start_matches("http://")).arg(questions.to_string());
        serde_json::from_str(&run(python).await).unwrap()
    }
}

/// What a program prints; it has to succeed.
async fn run(mut command: Command) -> String {
    let output = command.stdin(Stdio::null()).kill_on_drop(true).output();
    let output = tokio::time::timeout(PATIENCE, output).await;
    let output = output.unwrap_or_else(|_| panic!("not within {PATIENCE:?}: {command:?}")).unwrap();
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

/// The claims of a token.
fn claims(token: &str) -> Value {
    let text = URL_SAFE_NO_PAD.decode(token.split('.').nth(1).unwrap()).unwrap();
    serde_json::from_slice(&text).unwrap()
}

/// A token with somebody else's name in it, under the signature that it had.
fn forged(token: &str) -> String {
    let mut forged = claims(token);
    assert_ne!(forged["sub"], "1");
    forged["sub"] = json!("1");
    let parts: Vec<&str> = token.split('.').collect();
    format!("{}.{}.{}", parts[0], URL_SAFE_NO_PAD.encode(forged.to_string()), parts[2])
}

/// A token that was good once, signed with the key in this folder, which is made if there is none.
async fn expired(keys: &str) -> String {
    let dir = TempDir::new();
    let settings = [("SAGA_KEY_DIR", keys), ("SAGA_ACCOUNT__ACCESS_TOKEN_SECONDS", "1")];
    let shop = one_process(&dir, &settings).await;
    let client = shop.client();
    let token = Customer::sign_up(&client, 1).await.token;
    until("the token's time is over", PATIENCE, async || {
        client.get("/api/account/info/person", Some(&token)).await.unwrap().status == 401
    })
    .await;
    token
}

/// Every question, and what the contract says that its answer is.
async fn the_contract_is_kept(foreign: &Foreign, shop: &Client, expired: &str) {
    let customer = Customer::sign_up(shop, 2).await;
    let (kettle, lamp) =
        (Product::create(shop, "kettle", 100, 10).await, Product::create(shop, "lamp", 0, 3).await);
    let missing = kettle.id - 1;
    let questions = json!({
        "tokens": {
            "good": customer.token, "forged": forged(&customer.token), "expired": expired,
            "forged and expired": forged(expired), "nonsense": "nonsense", "none": "",
        },
        "check": [[lamp.id, 1], [missing, 1], [kettle.id, 99]],
        "get": [lamp.id, missing, kettle.id],
        "too_many": TOO_MANY,
    });
    let details = |product: Product, name: &str| {
        json!({"product_id": product.id, "product_name": name, "description": "for tests",
               "brand_name": "testkit", "inventory": product.stock, "price": product.price})
    };
    let (id, not_good) = (
        claims(&customer.token)["sub"].as_str().unwrap().parse::<u64>().unwrap(),
        |why| json!({"refused": "UNAUTHENTICATED", "why": why}),
    );
    let told = foreign.ask(shop, &questions).await;
    assert_eq!(
        told["auth"],
        json!({
            "good": {"customer_id": id, "expired": false},
            "expired": {"customer_id": 0, "expired": true},
            "forged": not_good("invalid token"),
            "forged and expired": not_good("invalid token"),
            "nonsense": not_good("invalid token"),
            "none": not_good("invalid token"),
        })
    );
    // There is a price for whatever exists, however many are wanted: that is for the stock to say.
    let prices =
        json!([[lamp.id, 0, "STATUS_OK"], [missing, 0, "STATUS_NOT_FOUND"], [kettle.id, 100, "STATUS_OK"]]);
    assert_eq!(told["check"], prices);
    assert_eq!(told["get"], json!([details(lamp, "lamp"), details(kettle, "kettle")]));
    assert_eq!((&told["check_nothing"], &told["get_nothing"]), (&json!([]), &json!([])));
    assert_eq!(told["too_many"]["refused"], "INVALID_ARGUMENT", "{told}");

    assert_eq!(told["health"], "SERVING");
    assert_eq!(told["health_of_a_stranger"]["refused"], "NOT_FOUND", "{told}");
    assert_eq!(told["health_watched"], json!(["SERVING", "DEADLINE_EXCEEDED"]));
    assert_eq!(told["services"], told["services_as_of_old"]);
    let services: Vec<&str> =
        told["services"].as_array().unwrap().iter().map(|name| name.as_str().unwrap()).collect();
    for name in ["auth.AuthService", "product.ProductService", "grpc.health.v1.Health"] {
        assert!(services.contains(&name), "{name} is not among {services:?}");
    }
    // The shop describes its services as the client's protos do: 18 fields, 2 values of an enum, 3 methods.
    assert_eq!((&told["differences"], &told["compared"]), (&json!([]), &json!(23)));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_of_the_contract_s_protos_is_answered_by_one_process() {
    let (foreign, dir) = (Foreign::generate().await, TempDir::new());
    let keys = dir.path().join("keys").display().to_string();
    let expired = expired(&keys).await;
    let shop = one_process(&dir, &[("SAGA_KEY_DIR", &keys)]).await;
    the_contract_is_kept(&foreign, &shop.client(), &expired).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_of_the_contract_s_protos_is_answered_through_the_gateway() {
    let (foreign, dir, engines) = (Foreign::generate().await, TempDir::new(), Engines::shared());
    let keys = dir.path().join("keys").display().to_string();
    let expired = expired(&keys).await;
    let shop = many_processes(&dir, &engines, &[("SAGA_KEY_DIR", &keys)]).await;
    the_contract_is_kept(&foreign, &shop.client(), &expired).await;
}

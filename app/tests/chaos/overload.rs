//! More is asked for than can be done: row 22 of the list of faults.

use serde_json::Value;
use testkit::checks::{self, Expected};
use testkit::{Engines, Options, Shop, TempDir};

use super::{options, saga, turn};

/// What there is of each product.
const STOCK: i64 = 1_000_000;
/// Purchases that each replica may have under way.
const MAX_IN_FLIGHT: &str = "100";
/// Who ask for one purchase after the other, whatever they are told: three for every two that are let in.
const BUYERS: &str = "300";

/// `saga load` against this shop; it checks in the end, over the API, that everything adds up.
async fn load(shop: &Shop, arguments: &[&str]) -> Value {
    let client = shop.client();
    let mut command = saga();
    command.args(["load", client.base(), "--json", "--verify", "--products", "20", "--customers", "16"]);
    command.args(["--stock", &STOCK.to_string(), "--threads", "1", "--warm-up", "1s"]);
    command.args(["--request-timeout", "60s"]).args(arguments);
    let output = command.output().await.unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(
        output.status.success(),
        "{}\n{text}\n{}",
        output.status,
        String::from_utf8_lossy(&output.stderr)
    );
    serde_json::from_str(&text).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn beyond_what_can_be_done_some_are_refused_and_nothing_is_lost() {
    let _turn = turn().await;
    let (dir, engines) = (TempDir::new(), Engines::shared());
    let options: Options = options(&dir, &engines).env("SAGA_PURCHASE__MAX_IN_FLIGHT", MAX_IN_FLIGHT);
    let mut shop = Shop::start(options).await.unwrap();

    let report = load(&shop, &["--duration", "3s", "--buyers", BUYERS]).await;
    let errors = report.pointer("/total/errors").and_then(Value::as_object).unwrap();
    assert!(errors.keys().eq(["503"]), "{report:#}");
    let accepted = report.pointer("/total/accepted").and_then(Value::as_u64).unwrap();
    println!("{accepted} accepted, {errors:?}");

    let ids = format!("SELECT id FROM {}.product", engines.database("product"));
    let ids = engines.mysql().run(&ids).unwrap();
    let stock = ids.lines().map(|id| (id.trim().parse().unwrap(), STOCK)).collect();
    let found = checks::check(engines.books(), &Expected { stock, ..Expected::default() }).unwrap();
    found.assert_clean();
    // What was refused had no effect.
    assert_eq!(found.accepted as u64, accepted, "{found}");
    println!("{found}");
    assert!(shop.terminate().await.success());
}

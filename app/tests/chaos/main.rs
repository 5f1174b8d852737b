//! Faults of the distributed shop, under load: processes of each service on a MariaDB, three NATS nodes and a Redis Cluster. After each,
//! everything ends by itself, and the invariants hold in the databases and for every customer.
//!
//! One test at a time: each keeps a small machine busy by itself.

#![allow(clippy::unwrap_used, reason = "what fails here fails the test")]
#![allow(clippy::print_stdout, reason = "a test's figures are for whoever reads its output")]

mod annex;
mod boundaries;
mod clocks;
mod counter;
mod crowd;
mod hands;
mod messages;
mod overload;
mod rolling;
mod servers_die;
mod streams;
mod tap;

use std::process::Stdio;
use std::time::Duration;

use testkit::traffic::{Cart, Customer, Habits};
use testkit::{Client, Engines, Options, Ordeal, Shop, TempDir, until};
use tokio::process::Command;
use tokio::sync::{Mutex, MutexGuard};

/// Processes of each service.
const PROCESSES: usize = 2;
/// What is to happen while customers buy happens within this time.
const SOON: Duration = Duration::from_secs(60);

/// Many customers, who send what has a key again until it is answered.
const CROWD: Habits = Habits { refusals_are_fine: true, buyers_per_customer: 6 };

/// Ends with the guard.
async fn turn() -> MutexGuard<'static, ()> {
    static TURN: Mutex<()> = Mutex::const_new(());
    TURN.lock().await
}

/// With every setting as it comes: what is shown here is what an operator gets.
fn options(dir: &TempDir, engines: &Engines) -> Options {
    Options::new(env!("CARGO_BIN_EXE_saga"), dir.path().join("data"))
        .arg("--no-demo-data")
        .on(engines, PROCESSES)
}

/// The program, without the settings of whoever runs the tests.
fn saga() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_saga"));
    for (name, _) in std::env::vars_os() {
        if name.to_string_lossy().starts_with("SAGA_") {
            command.env_remove(name);
        }
    }
    command.stdin(Stdio::null()).kill_on_drop(true);
    command
}

/// So many purchases are accepted from now on, and so many end.
async fn much_is_bought(ordeal: &Ordeal, much: usize) {
    let before = ordeal.ledger().figures();
    until("much is bought", SOON, async || {
        let now = ordeal.ledger().figures();
        now.acknowledged >= before.acknowledged + much && now.ended >= before.ended + much
    })
    .await;
    ordeal.ledger().assert_no_faults();
}

/// Asks until the purchase is accepted, as one with a key may. Its id.
async fn accepted(client: &Client, customer: &Customer, cart: &Cart, key: &str) -> u64 {
    let mut id = None;
    until(&format!("{key:?} is accepted"), SOON, async || {
        match customer.buy(client, cart, Some(key)).await {
            Ok(answer) if answer.status == 201 => id = answer.json()["purchase_id"].as_u64(),
            Ok(answer) => assert!(matches!(answer.status, 502 | 503), "{} {}", answer.status, answer.body),
            Err(_) => {}
        }
        id.is_some()
    })
    .await;
    id.unwrap()
}

async fn all_are_ready(shop: &Shop) {
    until("all processes are ready", SOON, async || {
        shop.admin().get("/readyz", None).await.is_ok_and(|answer| answer.status == 200)
    })
    .await;
}

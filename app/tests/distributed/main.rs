//! The distributed shop on real servers: two processes of each service behind a gateway, kept alive by their supervisor.
//!
//! The tests share one MariaDB, three NATS nodes and a Redis Cluster, in which each has names of its own; but for those whose servers die, or
//! are not as they should be.

#![allow(clippy::unwrap_used, reason = "what fails here fails the test")]

mod doctor;
mod encrypted;
mod servers_away;
mod supervisor;
mod tour;
mod walk;

use std::time::Duration;

use testkit::{Engines, Options, Shop, TempDir, until};

/// Processes of each service.
const PROCESSES: usize = 2;
/// And the gateway.
const ALL_PROCESSES: usize = 6 * PROCESSES + 1;
/// A process that died is back within this time.
const BACK_WITHIN: Duration = Duration::from_secs(60);
/// What was accepted has ended within this time.
const ENDED_WITHIN: Duration = Duration::from_secs(60);
/// What has lost its supervisor is gone within this time: what a stop may take.
const GONE_WITHIN: Duration = Duration::from_secs(15);

fn options(dir: &TempDir, engines: &Engines, processes: usize) -> Options {
    Options::new(env!("CARGO_BIN_EXE_saga"), dir.path().join("data"))
        .arg("--no-demo-data")
        .env("SAGA_PURCHASE__RETRY_FIRST_SECONDS", "1")
        .env("SAGA_PURCHASE__RETRY_MAX_SECONDS", "2")
        .on(engines, processes)
}

async fn all_are_ready(shop: &Shop) {
    until("all processes are ready", BACK_WITHIN, async || {
        shop.admin().get("/readyz", None).await.is_ok_and(|answer| answer.status == 200)
    })
    .await;
}

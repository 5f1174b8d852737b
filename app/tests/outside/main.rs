//! Clients that nobody here has written, or that know nothing but the contract: a gRPC client in Python, generated from protos of its
//! own, and a front end's library for event streams, from npm, in a Chromium. Each against the shop in one process, and against one of
//! many processes through its gateway.
//!
//! `cargo xtask test` installs them. Where one is missing the test fails, and says how to install it.

#![allow(clippy::unwrap_used, reason = "what fails here fails the test")]

mod browser;
mod grpc;

use std::time::Duration;

use testkit::{Engines, Options, Shop, TempDir};

/// Processes of each service, where there are many.
const PROCESSES: usize = 2;
/// How long anything may take that takes moments, on a busy machine.
const PATIENCE: Duration = Duration::from_secs(60);

/// A shop in one process, with further settings: `(name of the variable, value)`.
async fn one_process(dir: &TempDir, settings: &[(&str, &str)]) -> Shop {
    start(options(dir), settings).await
}

/// A shop of [`PROCESSES`] of each service behind a gateway.
async fn many_processes(dir: &TempDir, engines: &Engines, settings: &[(&str, &str)]) -> Shop {
    start(options(dir).on(engines, PROCESSES), settings).await
}

fn options(dir: &TempDir) -> Options {
    Options::new(env!("CARGO_BIN_EXE_saga"), dir.path().join("data")).arg("--no-demo-data")
}

async fn start(options: Options, settings: &[(&str, &str)]) -> Shop {
    let options = settings.iter().fold(options, |options, (name, value)| options.env(*name, *value));
    Shop::start(options).await.unwrap_or_else(|failed| panic!("{failed}"))
}

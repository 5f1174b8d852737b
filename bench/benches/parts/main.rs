//! What the parts of the shop cost alone, in one process, through their public doors and on real files.
//!
//! `cargo bench -p bench` runs them, `cargo bench -p bench -- barrier` those of that name. Times are of this machine
//! at this hour: compare within one run.

#![allow(missing_docs, reason = "criterion's macros make functions without any")]

mod accept;
mod barrier;
mod bus;
mod engine;
mod gateway;
mod messages;
mod place;
mod reads;
mod tokens;

use std::time::Duration;

use allocator::Allocator;
use criterion::{Criterion, criterion_group, criterion_main};

#[global_allocator]
static ALLOCATOR: Allocator = Allocator;

fn settings() -> Criterion {
    Criterion::default()
        .warm_up_time(Duration::from_millis(500))
        .measurement_time(Duration::from_secs(2))
        .sample_size(30)
        .nresamples(2_000)
        .without_plots()
}

criterion_group! {
    name = parts;
    config = settings();
    targets = engine::benches, messages::benches, tokens::benches, bus::benches, barrier::benches, reads::benches,
        accept::benches, gateway::benches
}
criterion_main!(parts);

//! A load generator for a shop that speaks the HTTP API: many buyers, each answer and each end of a purchase timed.
//!
//! - [`Options`] say what to do, [`run`] does it, a [`Report`] says what happened.
//! - Threads share nothing while they measure: each has its own customers, connections and histograms (`worker`, `desk`, `record`).
//! - What decides is pure: `schedule` (when), `carts` (what), `sse` and `told` (what an event says), `tracker` (when a purchase has
//!   ended), `ledger` (what has to add up), `report`.
//! - What does I/O is thin: `http1`, `buyer`, `follow`, `poll`, `ask`, `setup`, `resolve`, `verify`.
//!
//! What never happens: a request that was due and is neither sent nor counted; a latency measured from later than the request
//! was due; an end that is counted twice; memory that grows with the length of a run.

mod ask;
mod backoff;
mod buyer;
mod carts;
mod cpu;
mod customer;
mod desk;
mod follow;
mod http1;
mod ledger;
mod live;
mod options;
mod pacer;
mod poll;
mod record;
mod report;
mod resolve;
mod run;
mod schedule;
mod setup;
mod sse;
mod target;
mod told;
mod tracker;
mod verify;
mod worker;

pub use options::{Completion, Conflict, Options, Scenario, Until};
pub use report::Report;
pub use run::{Error, run};
pub use setup::SetupFailed;
pub use target::{NoTarget, Target};

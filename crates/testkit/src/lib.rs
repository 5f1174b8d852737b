//! The shop as a real process under test: started, watched, killed, started again, and judged by what it left on disk.
//!
//! - [`Shop`]: a process of the binary, on free ports of this machine.
//! - [`Engines`]: the servers that a distributed one stands on; [`Replica`]: one of its processes.
//! - [`Collector`]: what a process records of its work, by OTLP.
//! - [`Client`], [`Events`]: what its customers do, over real connections.
//! - [`traffic`]: customers who buy, follow their streams and remember what they were told.
//! - [`Ordeal`]: the whole of it, through many deaths on one data directory.
//! - [`checks`]: the invariants of the whole, read from the databases, each violation named.
//! - [`TempDir`], [`until`], [`Dice`]: a place, a wait, and chance that can be repeated.
//!
//! What never happens: a test that sleeps and hopes ([`until`] is the one place that pauses, between two looks at a condition),
//! a process that outlives its test, traffic that leaves the machine.

pub mod checks;
mod client;
mod collector;
mod dice;
mod engines;
mod events;
mod ordeal;
mod replicas;
mod shop;
mod temp_dir;
pub mod traffic;
mod wait;

pub use client::{Answer, Client, ClientError};
pub use collector::{Collector, Span, SpanKind};
pub use dice::Dice;
pub use engines::Engines;
pub use events::{Events, SseEvent};
pub use ordeal::{Ordeal, SEED_VARIABLE, tail};
pub use replicas::{Replica, is_alive};
pub use shop::{Options, Shop, StartFailed};
pub use temp_dir::TempDir;
pub use wait::until;

//! Sagas under every schedule: a pool of messages in place of the bus, the real book, as an orchestrator asks it, and the real barrier.
//!
//! - [`sagas`]: the shop's saga and a trip's, and what each path of theirs says.
//! - [`desks`]: their participants: on no database, on a real one, and the shop's own services.
//! - [`faults`]: what a schedule does to which message.
//! - [`world`]: carries a schedule out, and checks the invariants I3, I4 and I12 at each message and at the end.
//! - [`soup`]: all schedules at once: every state that is reachable when any message may come at any time.
#![allow(unreachable_pub, reason = "a module of one test")]
#![allow(clippy::unwrap_used, reason = "all of this is a test, also what carries no test attribute")]

pub mod desks;
pub mod faults;
pub mod sagas;
pub mod soup;
pub mod world;

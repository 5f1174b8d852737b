//! The shop in one process, under test, with its bus, its clock and its settings in the hands of the test.
//!
//! - [`Shop`]: the services as the binary assembles them, on files of their own. Participants and orchestrators can
//!   be started and stopped one by one, in as many replicas as wanted; the clock stands until a test turns it.
//! - [`Api`]: a client of its doors, without a socket. [`Watch`]: an event stream.
//! - [`Courier`]: stands between all services, in place of the one bus, and loses, repeats, shuffles or holds what they
//!   send each other.
//! - [`Herald`]: carries news between replicas of the purchase service, and loses, repeats, delays and shuffles them.
//! - [`Books`]: what all databases say, and whether it adds up.
//!
//! What never happens: a test waits for time to pass. It waits for a condition, within [`LIMIT`].

#![allow(clippy::unwrap_used, reason = "a test's tools panic where something is not as it should be")]

mod api;
mod books;
mod clock;
mod courier;
mod herald;
mod shop;

use std::time::Duration;

pub use api::{Answer, Api, Customer, Event, Watch, is_terminal};
pub use books::{Books, check_events};
pub use clock::TestClock;
pub use courier::{Courier, Fate, Passing};
pub use herald::{Herald, Weather};
pub use shop::{Drivers, HeldWrites, News, Part, PurchasesOn, Settings, Shop, Wiring};

/// How long a condition may take to come true. It is long, because the machine may be busy; a condition that
/// comes true sooner is seen sooner.
pub const LIMIT: Duration = Duration::from_secs(60);

//! A clock that stands still until a test turns it.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use wire::time::{Clock, UnixMillis};

/// When every shop under test opens: some day in 2027.
const OPENING: UnixMillis = 1_800_000_000_000;

/// The hands of the clock. Clones turn the same clock.
#[derive(Clone, Debug)]
pub struct TestClock(Arc<AtomicU64>);

impl TestClock {
    pub(crate) fn new() -> TestClock {
        TestClock(Arc::new(AtomicU64::new(OPENING)))
    }

    /// The clock that the services read.
    pub fn clock(&self) -> Clock {
        let millis = Arc::clone(&self.0);
        Clock::from_fn(move || millis.load(Ordering::SeqCst))
    }

    /// The time it shows.
    pub fn now(&self) -> UnixMillis {
        self.0.load(Ordering::SeqCst)
    }

    /// Turns it forward.
    pub fn turn(&self, by: Duration) {
        self.0.fetch_add(u64::try_from(by.as_millis()).unwrap(), Ordering::SeqCst);
    }
}

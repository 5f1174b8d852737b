//! Time as a parameter: logic that depends on it takes a [`Clock`], so that a test can hold or turn it.

use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

/// Milliseconds since the Unix epoch, UTC.
pub type UnixMillis = u64;

/// Where the time comes from. Cloning is cheap; all clones tell the same time.
#[derive(Clone)]
pub struct Clock(Arc<dyn Fn() -> UnixMillis + Send + Sync>);

impl Clock {
    /// The machine's own clock. It may jump, in both directions.
    #[allow(clippy::disallowed_methods, reason = "the one place that reads the machine's clock")]
    pub fn system() -> Clock {
        Clock::from_fn(|| {
            let since_epoch = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
            u64::try_from(since_epoch.as_millis()).unwrap_or(u64::MAX)
        })
    }

    /// A clock that tells what `now` says: a server's, or a test's.
    pub fn from_fn(now: impl Fn() -> UnixMillis + Send + Sync + 'static) -> Clock {
        Clock(Arc::new(now))
    }

    /// The time now.
    pub fn now(&self) -> UnixMillis {
        (self.0)()
    }

    /// The time now in whole Unix seconds, as the HTTP API gives it.
    pub fn now_seconds(&self) -> u64 {
        self.now() / 1000
    }
}

impl std::fmt::Debug for Clock {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Clock(now = {})", self.now())
    }
}

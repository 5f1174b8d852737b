//! Waiting for a condition.

use std::time::{Duration, Instant};

/// The pause between two looks at a condition.
const POLL_INTERVAL: Duration = Duration::from_millis(10);

/// Waits until the condition holds; false when it has not within `limit`. Its first error ends the wait.
pub(crate) fn until<E>(limit: Duration, mut holds: impl FnMut() -> Result<bool, E>) -> Result<bool, E> {
    let deadline = Instant::now() + limit;
    while !holds()? {
        if Instant::now() > deadline {
            return Ok(false);
        }
        std::thread::park_timeout(POLL_INTERVAL);
    }
    Ok(true)
}

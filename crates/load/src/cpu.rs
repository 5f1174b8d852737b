//! The time that this process has spent on processors.

use std::fs;
use std::time::Duration;

/// The processor time of all threads so far that still run. None where the system does not tell (Linux does).
pub(crate) fn used() -> Option<Duration> {
    let mut nanos = 0;
    for thread in fs::read_dir("/proc/self/task").ok()? {
        // A thread that has ended since is not there any more.
        let Ok(text) = fs::read_to_string(thread.ok()?.path().join("schedstat")) else { continue };
        nanos += text.split_whitespace().next()?.parse::<u64>().ok()?;
    }
    Some(Duration::from_nanos(nanos))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn time_that_is_spent_is_counted() {
        let before = used().expect("Linux tells");
        let mut spent = before;
        while spent < before + Duration::from_millis(2) {
            spent = used().expect("Linux tells");
        }
    }
}

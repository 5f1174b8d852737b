//! When requests are due in an open loop. Pure: who waits, and how, is elsewhere.
//!
//! A request is due whether the one before it was answered or not, and is measured from when it was due. So a shop that stalls for
//! a second has a second in its latencies, for each request that was due in it (no coordinated omission).

use std::time::{Duration, Instant};

/// The times at which one of several threads sends: every `threads`th of a constant rate.
#[derive(Clone, Debug)]
pub(crate) struct Schedule {
    begin: Instant,
    end: Instant,
    per_second: f64,
    next: u64,
    stride: u64,
}

impl Schedule {
    /// The share of thread `thread` of `threads` in `per_second` requests, from `begin` until `end`.
    pub(crate) fn new(begin: Instant, end: Instant, per_second: f64, thread: u32, threads: u32) -> Schedule {
        Schedule { begin, end, per_second, next: u64::from(thread), stride: u64::from(threads) }
    }

    /// When the next request is due. None behind the end.
    pub(crate) fn next_due(&self) -> Option<Instant> {
        // Not a sum of rounded intervals: that would drift.
        let due = self.begin + Duration::from_secs_f64(self.next as f64 / self.per_second);
        (due < self.end).then_some(due)
    }

    /// The next request's time, if it has come.
    pub(crate) fn take(&mut self, now: Instant) -> Option<Instant> {
        let due = self.next_due().filter(|due| *due <= now)?;
        self.next += self.stride;
        Some(due)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all(mut schedule: Schedule, now: Instant) -> Vec<Instant> {
        std::iter::from_fn(|| schedule.take(now)).collect()
    }

    #[test]
    fn the_threads_share_one_constant_rate() {
        let begin = Instant::now();
        let end = begin + Duration::from_secs(3);
        let mut times: Vec<Instant> =
            (0..3).flat_map(|thread| all(Schedule::new(begin, end, 1000.0, thread, 3), end)).collect();
        times.sort();
        assert_eq!(times.len(), 3000);
        for (count, time) in times.iter().enumerate() {
            let off = time.duration_since(begin).abs_diff(Duration::from_millis(count as u64));
            assert!(off < Duration::from_micros(1), "{count}: off by {off:?}");
        }
    }

    #[test]
    fn nothing_is_due_early_and_nothing_is_left_out() {
        let begin = Instant::now();
        let end = begin + Duration::from_secs(10);
        let mut schedule = Schedule::new(begin, end, 10.0, 0, 1);
        assert_eq!(schedule.take(begin), Some(begin));
        assert_eq!(schedule.take(begin + Duration::from_millis(99)), None);
        // Nobody looked for a second: all that was due in it is due now, with the time that it was due at.
        let late = begin + Duration::from_millis(1_050);
        let taken: Vec<Instant> = std::iter::from_fn(|| schedule.take(late)).collect();
        assert_eq!(taken.len(), 10);
        assert_eq!(taken[0], begin + Duration::from_millis(100));
        assert_eq!(schedule.next_due(), Some(begin + Duration::from_millis(1_100)));
    }

    /// A shop that answers in a millisecond, and stalls once for a second, seen by one connection at 100 requests a second.
    #[test]
    fn a_stall_is_in_the_latencies_of_all_that_was_due_in_it() {
        let begin = Instant::now();
        let mut schedule = Schedule::new(begin, begin + Duration::from_secs(10), 100.0, 0, 1);
        let (stall, service) = (Duration::from_secs(1), Duration::from_millis(1));
        let (mut free, mut slow) = (begin, 0);
        while let Some(due) = schedule.next_due() {
            let sent = free.max(due);
            assert_eq!(schedule.take(sent), Some(due));
            let stalls = sent >= begin + Duration::from_secs(5) && free < begin + Duration::from_secs(5);
            free = sent + if stalls { stall } else { service };
            if free - due > Duration::from_millis(100) {
                slow += 1;
            }
        }
        // Measured from the time of sending it would be one.
        assert!((90..=110).contains(&slow), "{slow} requests were slow");
    }
}

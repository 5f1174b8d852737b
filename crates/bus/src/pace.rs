//! When a consumer lets envelopes gather: what PostgreSQL's `commit_delay` is for a log, [`Pace`] is for a queue.
//!
//! A batch has costs that do not depend on its size: an fsync and several wake-ups; on servers a dozen round trips and as many messages.
//! So under load a consumer that takes whatever waits, as soon as it can, spends the machine on many small batches. One
//! that waits for some milliseconds has the same work done by a fraction of them. When there is little to do waiting gains nothing
//! and costs latency: then nobody waits. So the rate at which envelopes come decides, and the bus says which rate is one
//! ([`Gathering`]).

use std::time::Duration;

use tokio::time::Instant;

/// For how long, and from which rate on, the consumers of a bus let envelopes gather.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Gathering {
    /// The longest time from one batch to the next that a consumer waits for. None at all: nothing gathers.
    pub at_most: Duration,
    /// Gathering is worth its wait if it brings so many envelopes: divided by `at_most` this is the rate.
    pub worth_envelopes: u16,
}

impl Gathering {
    /// In memory a batch costs little more than its fsync: 16 ms, from 8,000 envelopes a second on. (8 ms made a tenth less of the
    /// purchases at the peak.)
    pub const IN_MEMORY: Gathering = Gathering { at_most: Duration::from_millis(16), worth_envelopes: 128 };

    /// Between servers a batch costs milliseconds of their processors: 30 ms, from 1,067 envelopes a second on. (`docs/servers.md` has
    /// what shorter and longer ones make.)
    pub const ON_SERVERS: Gathering = Gathering { at_most: Duration::from_millis(30), worth_envelopes: 32 };

    /// Nothing gathers.
    pub const NONE: Gathering = Gathering { at_most: Duration::ZERO, worth_envelopes: 1 };

    /// A part of the time, at the same rate.
    pub(crate) fn part(self, of: u16) -> Gathering {
        Gathering {
            at_most: self.at_most / u32::from(of),
            worth_envelopes: (self.worth_envelopes / of).max(1),
        }
    }

    fn is_worth_it(self, per_second: f64) -> bool {
        let brings = per_second * self.at_most.as_secs_f64();
        !self.at_most.is_zero() && brings >= f64::from(self.worth_envelopes)
    }
}

/// The time over which the rate is averaged: a load lasts, a burst of less than what a load brings in this time does not.
const HORIZON: Duration = Duration::from_millis(250);

/// How fast envelopes come to a consumer, and so whether it lets them gather.
#[derive(Debug)]
pub struct Pace {
    gathering: Gathering,
    per_second: f64,
    last: Option<Instant>,
    /// More was waiting than was taken.
    behind: bool,
}

impl Pace {
    /// A pace that knows of no load.
    pub fn new(gathering: Gathering) -> Pace {
        Pace { gathering, per_second: 0.0, last: None, behind: false }
    }

    /// A batch was taken now, of at most `limit` envelopes.
    pub fn took(&mut self, envelopes: usize, limit: usize, now: Instant) {
        self.behind = envelopes >= limit;
        if let Some(last) = self.last {
            let passed = now.duration_since(last).as_secs_f64();
            let weight = passed / (passed + HORIZON.as_secs_f64());
            // Weighted by the time that it stands for. `weight / passed` stays finite when no time has passed.
            let added = envelopes as f64 / (passed + HORIZON.as_secs_f64());
            self.per_second += added - self.per_second * weight;
        }
        self.last = Some(now);
    }

    /// Until when the next batch should be left to gather; None when it should be taken at once.
    pub fn gather_until(&self) -> Option<Instant> {
        let waits = !self.behind && self.gathering.is_worth_it(self.per_second);
        self.last.filter(|_| waits).map(|last| last + self.gathering.at_most)
    }

    /// Waits as [`Pace::gather_until`] says.
    pub async fn gather(&self) {
        if let Some(until) = self.gather_until()
            && until > Instant::now()
        {
            tokio::time::sleep_until(until).await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// From 16,000 envelopes a second on.
    const GATHERING: Gathering = Gathering { at_most: Duration::from_millis(8), worth_envelopes: 128 };

    /// Batches of so many, so many milliseconds apart.
    fn after(batches: usize, envelopes: usize, milliseconds: u64) -> (Pace, Instant) {
        among(GATHERING, batches, envelopes, milliseconds)
    }

    fn among(gathering: Gathering, batches: usize, envelopes: usize, milliseconds: u64) -> (Pace, Instant) {
        let (mut pace, mut now) = (Pace::new(gathering), Instant::now());
        for _ in 0..batches {
            pace.took(envelopes, 512, now);
            now += Duration::from_millis(milliseconds);
        }
        (pace, now)
    }

    #[test]
    fn a_light_load_never_waits() {
        assert_eq!(Pace::new(GATHERING).gather_until(), None);
        assert_eq!(after(1_000, 10, 1).0.gather_until(), None, "10,000 a second");
        assert_eq!(after(1_000, 1, 20).0.gather_until(), None);
    }

    #[test]
    fn a_burst_is_no_load() {
        for gathering in [Gathering::IN_MEMORY, Gathering::ON_SERVERS] {
            assert_eq!(among(gathering, 5, 50, 1).0.gather_until(), None, "{gathering:?}");
            assert!(among(gathering, 500, 50, 1).0.gather_until().is_some(), "{gathering:?}");
        }
    }

    #[test]
    fn a_heavy_load_gathers_until_a_few_milliseconds_after_the_last_batch() {
        let (pace, now) = after(1_000, 40, 1);
        assert_eq!(pace.gather_until(), Some(now - Duration::from_millis(1) + GATHERING.at_most));
        let (pace, _) = after(1_000, 320, 8);
        assert!(pace.gather_until().is_some(), "what has gathered is the same load");
    }

    #[test]
    fn the_bus_says_what_is_a_load() {
        let at = |per_second: u32, gathering: Gathering| gathering.is_worth_it(per_second.into());
        assert!(!at(7_999, Gathering::IN_MEMORY) && at(8_000, Gathering::IN_MEMORY));
        assert!(!at(1_066, Gathering::ON_SERVERS) && at(1_067, Gathering::ON_SERVERS));
        assert!(!at(u32::MAX, Gathering::NONE));
        assert!(!at(u32::MAX, Gathering { worth_envelopes: 0, ..Gathering::NONE }));
    }

    #[test]
    fn a_part_is_of_the_time_and_not_of_the_rate() {
        let part = Gathering::ON_SERVERS.part(4);
        assert_eq!(part.at_most, Duration::from_micros(7_500));
        assert!(!part.is_worth_it(1_066.0) && part.is_worth_it(1_067.0));
        assert!(!Gathering::NONE.part(4).is_worth_it(f64::MAX));
    }

    #[test]
    fn who_is_behind_never_waits() {
        let (mut pace, now) = after(1_000, 320, 8);
        pace.took(512, 512, now);
        assert_eq!(pace.gather_until(), None);
    }

    #[test]
    fn a_load_that_ends_is_forgotten() {
        let (mut pace, mut now) = after(1_000, 40, 1);
        for _ in 0..100 {
            now += Duration::from_millis(10);
            pace.took(10, 512, now);
        }
        assert_eq!(pace.gather_until(), None, "1,000 a second");
        let (mut pace, now) = after(1_000, 40, 1);
        pace.took(1, 512, now + Duration::from_secs(5));
        assert_eq!(pace.gather_until(), None);
    }

    #[test]
    fn no_time_between_two_batches_is_no_infinite_rate() {
        let (pace, _) = after(3, 100, 0);
        assert!(pace.per_second.is_finite());
    }
}

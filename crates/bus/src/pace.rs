//! When a consumer lets envelopes gather: what PostgreSQL's `commit_delay` is for a log, [`Pace`] is for a queue.
//!
//! A batch has costs that do not depend on its size: an fsync and several wake-ups; on servers a dozen round trips and as many messages.
//! So under load a consumer that takes whatever waits, as soon as it can, spends the machine on many small batches. One
//! that waits for some milliseconds has the same work done by a fraction of them. When there is little to do waiting gains nothing
//! and costs latency: then nobody waits. So the rate at which envelopes come decides, and the bus says which rate is one
//! ([`Gathering`]).
//!
//! Waiting saves work, and work is dear only while there is no time left for it: who waits beside an idle processor makes a client that
//! waits for the end wait, too. So in memory the wait adapts. A timer that fires late says that the processors are busy, and the next
//! wait is longer; one that fires in time says that they are not, and it is shorter.

use std::time::Duration;

use tokio::time::Instant;

/// For how long, and from which rate on, the consumers of a bus let envelopes gather.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Gathering {
    /// The longest time from one batch to the next that a consumer waits for. None at all: nothing gathers.
    pub at_most: Duration,
    /// Gathering is worth its wait if it brings so many envelopes: divided by `at_most` this is the rate.
    pub worth_envelopes: u16,
    /// What part of `at_most` is waited for while the processors have time. 1: all of it, as when those who do the work are elsewhere.
    pub shrinks_to: u16,
}

impl Gathering {
    /// In memory a batch costs little more than its fsync: 2 to 16 ms, from 16,000 envelopes a second on. (8 ms at most made a tenth less of
    /// the purchases at the peak; 16 ms at least made little more than half of those of 512 buyers who wait for the end; from 8,000 a
    /// second on, purchases at a fifth of the peak took half as long again, and no less of the processors.)
    pub const IN_MEMORY: Gathering =
        Gathering { at_most: Duration::from_millis(16), worth_envelopes: 256, shrinks_to: 8 };

    /// Between servers a batch costs milliseconds of their processors: 30 ms, from 1,067 envelopes a second on. (`docs/servers.md` has
    /// what shorter and longer ones make.)
    pub const ON_SERVERS: Gathering =
        Gathering { at_most: Duration::from_millis(30), worth_envelopes: 32, shrinks_to: 1 };

    /// Nothing gathers.
    pub const NONE: Gathering = Gathering { at_most: Duration::ZERO, worth_envelopes: 1, shrinks_to: 1 };

    /// A part of the time, at the same rate.
    pub(crate) fn part(self, of: u16) -> Gathering {
        Gathering {
            at_most: self.at_most / u32::from(of),
            worth_envelopes: (self.worth_envelopes / of).max(1),
            ..self
        }
    }

    fn is_worth_it(self, per_second: f64) -> bool {
        let brings = per_second * self.at_most.as_secs_f64();
        !self.at_most.is_zero() && brings >= f64::from(self.worth_envelopes)
    }
}

/// The time over which the rate is averaged: a load lasts, a burst of less than what a load brings in this time does not.
const HORIZON: Duration = Duration::from_millis(250);

/// A timer that fires later than this has waited for a processor: by itself it may be late by its granularity, a millisecond.
const LATE: Duration = Duration::from_millis(2);

/// How fast envelopes come to a consumer, and so whether it lets them gather, and for how long.
#[derive(Debug)]
pub struct Pace {
    gathering: Gathering,
    per_second: f64,
    last: Option<Instant>,
    /// More was waiting than was taken.
    behind: bool,
    /// The time from one batch to the next, as it is now.
    wait: Duration,
}

impl Pace {
    /// A pace that knows of no load.
    pub fn new(gathering: Gathering) -> Pace {
        Pace { gathering, per_second: 0.0, last: None, behind: false, wait: gathering.at_most }
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
        self.last.filter(|_| waits).map(|last| last + self.wait)
    }

    /// Waits as [`Pace::gather_until`] says, and learns from it for the next time. Dropping the future loses only that.
    pub async fn gather(&mut self) {
        let Some(until) = self.gather_until() else { return };
        let is_over = until <= Instant::now();
        if !is_over {
            tokio::time::sleep_until(until).await;
        }
        // Who was so long at work that the time was over has not waited, and knows that there is work.
        self.adapt(is_over || Instant::now() > until + LATE);
    }

    /// By a quarter, or a fifth, so one time that is like no other is soon forgotten.
    fn adapt(&mut self, busy: bool) {
        let Gathering { at_most, shrinks_to, .. } = self.gathering;
        let next = if busy { self.wait * 5 / 4 } else { self.wait * 4 / 5 };
        self.wait = next.clamp(at_most / u32::from(shrinks_to.max(1)), at_most);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// From 16,000 envelopes a second on.
    const GATHERING: Gathering =
        Gathering { at_most: Duration::from_millis(8), worth_envelopes: 128, shrinks_to: 4 };

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
        assert!(!at(15_999, Gathering::IN_MEMORY) && at(16_000, Gathering::IN_MEMORY));
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
    fn the_wait_is_short_while_the_processors_have_time() {
        let mut pace = Pace::new(GATHERING);
        (0..10).for_each(|_| pace.adapt(false));
        assert_eq!(pace.wait, Duration::from_millis(2));
        pace.adapt(true);
        assert_eq!(pace.wait, Duration::from_micros(2_500));
        (0..10).for_each(|_| pace.adapt(true));
        assert_eq!(pace.wait, GATHERING.at_most);

        let mut elsewhere = Pace::new(Gathering::ON_SERVERS);
        elsewhere.adapt(false);
        assert_eq!(elsewhere.wait, Gathering::ON_SERVERS.at_most, "this process cannot see who is busy");
    }

    #[tokio::test(start_paused = true)]
    async fn a_timer_in_time_says_that_there_is_time_and_a_long_batch_that_there_is_not() {
        let (mut pace, _) = after(1_000, 320, 8);
        pace.last = Some(Instant::now());
        pace.gather().await;
        assert_eq!(pace.last.unwrap().elapsed(), GATHERING.at_most);
        assert_eq!(pace.wait, GATHERING.at_most * 4 / 5);

        pace.last = Some(Instant::now());
        tokio::time::advance(pace.wait).await;
        pace.gather().await;
        assert_eq!(pace.last.unwrap().elapsed(), GATHERING.at_most * 4 / 5, "it did not wait");
        assert_eq!(pace.wait, GATHERING.at_most);
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

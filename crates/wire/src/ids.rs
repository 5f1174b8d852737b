//! Ids: unique without a round trip, in the order of time, and small enough for a JSON number.
//!
//! 53 bits, so that JavaScript's numbers hold them: 31 bits of seconds since 2026-01-01 UTC, 7 bits of worker,
//! 15 bits of sequence. The idea is that of Twitter's Snowflake (2010) and Sony's Sonyflake.
//!
//! What never happens, whatever the clock does:
//! - A [`Sequence`] gives out an id twice, or one below an earlier one.
//! - It gives out an id whose second is above the limit that the caller reserved. So two sequences whose
//!   reservations for a worker do not overlap have no id in common.
//!
//! When the 32,768 ids of a second are used up, it borrows from the next second instead of waiting. Under a
//! lasting load of N ids/s an id's second so runs ahead of the clock by N / 32,768 - 1 seconds a second (two, at
//! 100,000 ids/s), and falls back to the clock when the load ends. So an id's second is not the time of
//! anything; it only orders.

/// 2026-01-01 00:00:00 UTC, in Unix seconds: second 0 of all ids.
pub const EPOCH_UNIX_SECONDS: u64 = 1_767_225_600;
/// Bits of an id's second: enough until 2094.
pub const SECOND_BITS: u32 = 31;
/// Bits of an id's worker.
pub const WORKER_BITS: u32 = 7;
/// Bits of an id's sequence number.
pub const SEQUENCE_BITS: u32 = 15;

/// How many workers there are.
pub const WORKERS: u8 = 1 << WORKER_BITS;
/// How many ids a worker has for each second.
pub const IDS_PER_SECOND: u64 = 1 << SEQUENCE_BITS;
/// The last second that fits.
pub const LAST_SECOND: u32 = (1 << SECOND_BITS) - 1;

/// An id's parts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Parts {
    /// Seconds since [`EPOCH_UNIX_SECONDS`], up to [`LAST_SECOND`].
    pub second: u32,
    /// Below [`WORKERS`].
    pub worker: u8,
    /// Below [`IDS_PER_SECOND`].
    pub sequence: u16,
}

impl Parts {
    /// The id with these parts, below 2^53.
    ///
    /// # Panics
    /// If a part is out of its range.
    pub fn compose(self) -> u64 {
        let Parts { second, worker, sequence } = self;
        let in_range = second <= LAST_SECOND && worker < WORKERS && u64::from(sequence) < IDS_PER_SECOND;
        assert!(in_range, "an id cannot have {self:?}");
        (u64::from(second) << (WORKER_BITS + SEQUENCE_BITS))
            | (u64::from(worker) << SEQUENCE_BITS)
            | u64::from(sequence)
    }

    /// The parts of an id, or none if it is not below 2^53.
    pub fn of(id: u64) -> Option<Parts> {
        let second = u32::try_from(id >> (WORKER_BITS + SEQUENCE_BITS)).ok()?;
        if second > LAST_SECOND {
            return None;
        }
        let worker = (id >> SEQUENCE_BITS) as u8 & (WORKERS - 1);
        let sequence = (id & (IDS_PER_SECOND - 1)) as u16;
        Some(Parts { second, worker, sequence })
    }
}

/// The id second of a Unix time: 0 before 2026, [`LAST_SECOND`] from 2094 on.
pub fn second_of(unix_seconds: u64) -> u32 {
    let second = unix_seconds.saturating_sub(EPOCH_UNIX_SECONDS);
    u32::try_from(second).unwrap_or(LAST_SECOND).min(LAST_SECOND)
}

/// No worker whose clock says this gives out a lower id from now on.
pub fn lowest_at(unix_seconds: u64) -> u64 {
    Parts { second: second_of(unix_seconds), worker: 0, sequence: 0 }.compose()
}

/// Gives out one worker's ids. It only ever moves upwards, from the second it began with.
#[derive(Debug)]
pub struct Sequence {
    worker: u8,
    /// The next id without its worker: the second and the sequence as one number.
    next_tick: u64,
}

/// The reserved seconds do not hold that many more ids.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the ids up to second {limit_second} are used up; up to second {needed_second} must be reserved")]
pub struct Exhausted {
    /// The last reserved second.
    pub limit_second: u32,
    /// The second that must be reserved for the ids asked for.
    pub needed_second: u64,
}

impl Sequence {
    /// Begins at a second of which, and above which, no id of this worker was ever given out.
    ///
    /// # Panics
    /// If the worker is out of range.
    pub fn new(worker: u8, first_second: u32) -> Sequence {
        assert!(worker < WORKERS, "there is no worker {worker}");
        Sequence { worker, next_tick: u64::from(first_second) << SEQUENCE_BITS }
    }

    /// The next `count` ids: from the clock's second on, or from where this stands, if that is later.
    ///
    /// # Errors
    /// If one of them would be above `limit_second`; then none is given out.
    pub fn take(&mut self, now_second: u32, count: u32, limit_second: u32) -> Result<Ids, Exhausted> {
        let first = self.next_tick.max(u64::from(now_second) << SEQUENCE_BITS);
        let end = first + u64::from(count);
        let needed_second = end.saturating_sub(1).max(first) >> SEQUENCE_BITS;
        if needed_second > u64::from(limit_second.min(LAST_SECOND)) {
            return Err(Exhausted { limit_second, needed_second });
        }
        self.next_tick = end;
        Ok(Ids { worker: self.worker, ticks: first..end })
    }

    /// The second of the next id, unless the clock is later.
    pub fn next_second(&self) -> u64 {
        self.next_tick >> SEQUENCE_BITS
    }

    /// The worker whose ids these are.
    pub fn worker(&self) -> u8 {
        self.worker
    }
}

/// Ids that were taken together, in ascending order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ids {
    worker: u8,
    ticks: std::ops::Range<u64>,
}

impl Iterator for Ids {
    type Item = u64;

    fn next(&mut self) -> Option<u64> {
        let tick = self.ticks.next()?;
        let low = tick & (IDS_PER_SECOND - 1);
        let high = (tick >> SEQUENCE_BITS) << WORKER_BITS | u64::from(self.worker);
        Some(high << SEQUENCE_BITS | low)
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        let left = usize::try_from(self.ticks.end - self.ticks.start).unwrap_or(usize::MAX);
        (left, Some(left))
    }
}

impl ExactSizeIterator for Ids {}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_epoch_is_the_year_2026_and_the_parts_fill_53_bits() {
        assert_eq!(EPOCH_UNIX_SECONDS, (2026 - 1970) * 365 * 86_400 + 14 * 86_400);
        let last = Parts { second: LAST_SECOND, worker: WORKERS - 1, sequence: 32_767 };
        assert_eq!(last.compose(), (1 << 53) - 1);
        assert_eq!(Parts::of(1 << 53), None);
        assert_eq!(second_of(0), 0);
        assert_eq!(second_of(EPOCH_UNIX_SECONDS + 7), 7);
        assert_eq!(second_of(u64::MAX), LAST_SECOND);
        let first = Sequence::new(0, 0).take(second_of(EPOCH_UNIX_SECONDS + 7), 1, 7).unwrap().next();
        assert_eq!(first, Some(lowest_at(EPOCH_UNIX_SECONDS + 7)));
    }

    #[test]
    fn an_exhausted_second_borrows_from_the_next_up_to_the_limit() {
        let mut sequence = Sequence::new(5, 10);
        assert_eq!(sequence.take(0, 32_768, 10).unwrap().len(), 32_768);
        let refused = sequence.take(10, 1, 10);
        assert_eq!(refused, Err(Exhausted { limit_second: 10, needed_second: 11 }));
        let borrowed: Vec<_> = sequence.take(10, 2, 11).unwrap().filter_map(Parts::of).collect();
        assert_eq!(borrowed[0], Parts { second: 11, worker: 5, sequence: 0 });
        assert_eq!(borrowed[1], Parts { second: 11, worker: 5, sequence: 1 });
    }

    #[test]
    fn the_last_second_is_the_end() {
        let mut sequence = Sequence::new(0, LAST_SECOND);
        assert!(sequence.take(LAST_SECOND, 32_768, u32::MAX).is_ok());
        assert!(sequence.take(LAST_SECOND, 1, u32::MAX).is_err());
    }

    proptest! {
        #[test]
        fn parts_survive_composition(second in 0..=LAST_SECOND, worker in 0..WORKERS, sequence in 0..32_768_u16) {
            let parts = Parts { second, worker, sequence };
            prop_assert_eq!(Parts::of(parts.compose()), Some(parts));
        }

        /// The clock jumps at will, and the process restarts at will; what survives a restart is only how far
        /// was reserved. The model of the reservation is the one of `db::ids`.
        #[test]
        fn ids_are_unique_increasing_and_small_whatever_the_clock_does(
            steps in proptest::collection::vec((0..20_u32, 0..40_000_u32, proptest::bool::weighted(0.2)), 1..20),
            worker in 0..WORKERS,
        ) {
            const WINDOW_SECONDS: u32 = 3;
            let mut reserved = 0;
            let mut sequence = Sequence::new(worker, 0);
            let mut last = None;
            for (now, count, restart) in steps {
                if restart {
                    sequence = Sequence::new(worker, reserved + 1);
                }
                let ids = match sequence.take(now, count, reserved) {
                    Ok(ids) => ids,
                    Err(exhausted) => {
                        let needed = u32::try_from(exhausted.needed_second).unwrap();
                        prop_assert!(needed > reserved);
                        reserved = needed + WINDOW_SECONDS;
                        sequence.take(now, count, reserved).unwrap()
                    }
                };
                prop_assert_eq!(ids.len(), count as usize);
                for id in ids {
                    let parts = Parts::of(id).unwrap();
                    prop_assert!(last < Some(id) && id < 1 << 53);
                    prop_assert!(parts.second <= reserved && parts.worker == worker);
                    last = Some(id);
                }
            }
        }
    }
}

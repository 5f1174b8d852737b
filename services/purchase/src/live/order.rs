//! The order of ends: what is heard late, early, twice or never, put into the order of the finish numbers.
//!
//! Finish numbers are dense and given out in the order of commits. So whoever knows one number and has heard of the next can
//! tell that nothing ended between them; and where one is missing, that it is missing.
//!
//! What never happens: an end comes out before one with a smaller number, or twice; more than a bound is held.

use std::collections::BTreeMap;

use tokio::time::Instant;

/// What is held, and which number is due.
#[derive(Debug)]
pub(crate) struct Order<T> {
    /// Everything up to this number has come out.
    announced: u64,
    /// The last number that is known to have been given out, and since when.
    last: (u64, Instant),
    /// What came before its turn, and when.
    held: BTreeMap<u64, (Instant, T)>,
    bound: usize,
}

/// Numbers that were given out and have not been heard of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Gap {
    /// The number before the first missing one.
    pub(crate) after: u64,
    /// The last missing one.
    pub(crate) up_to: u64,
    /// Since when it is known that they are missing, or later.
    pub(crate) since: Instant,
}

impl<T> Order<T> {
    /// Begins behind this number. Holds at most `bound` ends.
    pub(crate) fn new(announced: u64, bound: usize, now: Instant) -> Order<T> {
        Order { announced, last: (announced, now), held: BTreeMap::new(), bound }
    }

    /// The number up to which everything has come out.
    pub(crate) fn announced(&self) -> u64 {
        self.announced
    }

    /// Takes note that this number was given out, whether or not its end was heard of.
    pub(crate) fn given_out(&mut self, number: u64, now: Instant) {
        if number > self.last.0 {
            self.last = (number, now);
        }
    }

    /// Takes an end. Gives it back if it is its turn; then [`Order::next`] may have more. What came out before is dropped, and
    /// so is what there is no room for: it is missing then, and to be had from the database.
    pub(crate) fn hear(&mut self, number: u64, end: T, now: Instant) -> Option<T> {
        self.given_out(number, now);
        if number <= self.announced {
            return None;
        }
        if number == self.announced + 1 {
            self.announced = number;
            self.held.remove(&number);
            return Some(end);
        }
        self.held.entry(number).or_insert((now, end));
        if self.held.len() > self.bound {
            self.held.pop_last();
        }
        None
    }

    /// What was held and whose turn it is now.
    pub(crate) fn next(&mut self) -> Option<T> {
        let first = self.held.first_entry()?;
        if *first.key() != self.announced + 1 {
            return None;
        }
        self.announced = *first.key();
        Some(first.remove().1)
    }

    /// The first numbers that are missing.
    pub(crate) fn gap(&self) -> Option<Gap> {
        if let Some((first, (since, _))) = self.held.first_key_value() {
            return Some(Gap { after: self.announced, up_to: first - 1, since: *since });
        }
        let (last, since) = self.last;
        (last > self.announced).then_some(Gap { after: self.announced, up_to: last, since })
    }

    /// How many are held.
    #[cfg(test)]
    pub(crate) fn held(&self) -> usize {
        self.held.len()
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::time::Duration;

    use proptest::prelude::*;

    use super::*;

    fn hear(order: &mut Order<u64>, number: u64) -> Vec<u64> {
        let first = order.hear(number, number, Instant::now());
        let more = std::iter::from_fn(|| order.next()).collect::<Vec<_>>();
        first.into_iter().chain(more).collect()
    }

    #[test]
    fn what_is_early_waits_and_what_is_known_is_dropped() {
        let began = Instant::now();
        let mut order = Order::new(7, 10, began);
        assert_eq!(hear(&mut order, 8), [8]);
        assert_eq!(hear(&mut order, 8), [0; 0]);
        assert_eq!(order.gap(), None);
        assert_eq!(hear(&mut order, 11), [0; 0]);
        assert_eq!(hear(&mut order, 10), [0; 0]);
        let Gap { after, up_to, .. } = order.gap().expect("a gap");
        assert_eq!((after, up_to), (8, 8 + 1));
        assert_eq!(hear(&mut order, 9), [9, 10, 11]);
        assert_eq!((order.gap(), order.announced(), order.held()), (None, 11, 0));
        let later = began + Duration::from_secs(1);
        order.given_out(13, later);
        order.given_out(12, later + Duration::from_secs(1));
        assert_eq!(order.gap(), Some(Gap { after: 11, up_to: 13, since: later }));
    }

    #[test]
    fn beyond_the_bound_the_latest_is_missing_again() {
        let mut order = Order::new(0, 2, Instant::now());
        for number in [3, 9, 4] {
            assert_eq!(hear(&mut order, number), [0; 0]);
        }
        assert_eq!(order.held(), 2);
        assert_eq!(hear(&mut order, 1), [1]);
        assert_eq!(hear(&mut order, 2), [2, 3, 4]);
        let Gap { after, up_to, .. } = order.gap().expect("a gap");
        assert_eq!((after, up_to), (4, 9), "it is known to have been given out");
    }

    proptest! {
        /// Whatever is heard, as often and in whichever order, and filled from what is missing: it comes out once and in order.
        #[test]
        fn everything_comes_out_once_and_in_order(
            heard in prop::collection::vec((1..60_u64, any::<bool>()), 0..200),
            bound in 1..8_usize,
        ) {
            let now = Instant::now();
            let mut order = Order::new(0, bound, now);
            let (mut out, mut given) = (Vec::new(), BTreeSet::new());
            for (number, fill) in heard {
                given.insert(number);
                out.extend(hear(&mut order, number));
                prop_assert!(order.held() <= bound);
                if let (Some(Gap { after, up_to, .. }), true) = (order.gap(), fill) {
                    prop_assert_eq!(after, order.announced());
                    prop_assert!(up_to > after);
                    (after + 1..=up_to).for_each(|missing| out.extend(hear(&mut order, missing)));
                }
            }
            while let Some(Gap { after, up_to, .. }) = order.gap() {
                (after + 1..=up_to).for_each(|missing| out.extend(hear(&mut order, missing)));
            }
            let last = given.last().copied().unwrap_or(0);
            prop_assert_eq!(out, (1..=last).collect::<Vec<_>>());
        }
    }
}

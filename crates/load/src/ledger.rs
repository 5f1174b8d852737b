//! What has to add up in the end. Pure.
//!
//! What is kept does not grow with the length of a run, unless everything is to be checked: counts for each cart, and an even
//! sample of purchases, 16 bytes each.

use fastrand::Rng;

use crate::tracker::Outcome;

/// Purchases whose orders and payments are checked, in all.
pub(crate) const SAMPLE: usize = 100_000;

/// Requests of unknown effect of one thread that are remembered, 8 bytes each. More are counted.
const MAX_UNKNOWN: usize = 65_536;

/// A purchase that has ended. 16 bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Entry {
    pub(crate) id: u64,
    pub(crate) cart: u32,
    /// Twice the customer's place among all, and one more if it was committed.
    customer_and_committed: u32,
}

impl Entry {
    /// One of the customer at this place among all of the run.
    pub(crate) fn new(id: u64, cart: u32, customer: u32, committed: bool) -> Entry {
        Entry { id, cart, customer_and_committed: customer << 1 | u32::from(committed) }
    }

    pub(crate) fn customer(self) -> u32 {
        self.customer_and_committed >> 1
    }

    pub(crate) fn committed(self) -> bool {
        self.customer_and_committed & 1 == 1
    }
}

/// How often a cart was bought.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Sales {
    /// Surely.
    pub(crate) committed: u64,
    /// Perhaps: nobody knows how it ended, or whether it began.
    pub(crate) unsure: u64,
}

/// See the module.
#[derive(Clone, Debug)]
pub(crate) struct Ledger {
    sales: Vec<Sales>,
    entries: Vec<Entry>,
    ended: u64,
    most: usize,
    dice: Rng,
    /// Ids that were given to two purchases.
    pub(crate) same_ids: Vec<u64>,
    /// Requests that may have had an effect, or not.
    pub(crate) unknown: Vec<Unknown>,
}

/// A request that may have had an effect, or not.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Unknown {
    pub(crate) cart: u32,
    /// The customer's place among all of the run.
    pub(crate) customer: u32,
}

impl Ledger {
    /// One for so many carts that keeps so many purchases at most.
    pub(crate) fn new(carts: usize, most: usize, seed: u64) -> Ledger {
        Ledger {
            sales: vec![Sales::default(); carts],
            entries: Vec::new(),
            ended: 0,
            most,
            dice: Rng::with_seed(seed),
            same_ids: Vec::new(),
            unknown: Vec::new(),
        }
    }

    /// A purchase has ended.
    pub(crate) fn ended(&mut self, id: u64, cart: u32, customer: u32, outcome: Outcome) {
        let sales = &mut self.sales[cart as usize];
        let committed = match outcome {
            Outcome::Committed => {
                sales.committed += 1;
                true
            }
            Outcome::Aborted(_) => false,
            Outcome::NotRolledBack => {
                sales.unsure += 1;
                return;
            }
        };
        let entry = Entry::new(id, cart, customer, committed);
        self.ended += 1;
        // Algorithm R: each has the same chance to be kept.
        if self.entries.len() < self.most {
            self.entries.push(entry);
        } else {
            let place = self.dice.u64(0..self.ended) as usize;
            if let Some(kept) = self.entries.get_mut(place) {
                *kept = entry;
            }
        }
    }

    /// Nobody knows how a purchase of this cart ended, or whether it began.
    pub(crate) fn unsure(&mut self, cart: u32) {
        self.sales[cart as usize].unsure += 1;
    }

    /// Nobody knows whether a request had an effect. It can be resolved, if there is room to remember it.
    pub(crate) fn unknown(&mut self, cart: u32, customer: u32) {
        self.unsure(cart);
        if self.unknown.len() < MAX_UNKNOWN {
            self.unknown.push(Unknown { cart, customer });
        }
    }

    /// It turns out that one of these customer's requests of unknown effect was a purchase with these products.
    /// Whether there is one that fits.
    pub(crate) fn resolve(
        &mut self,
        id: u64,
        customer: u32,
        outcome: Outcome,
        has_products: impl Fn(u32) -> bool,
    ) -> bool {
        let fits = |unknown: &Unknown| unknown.customer == customer && has_products(unknown.cart);
        let Some(place) = self.unknown.iter().position(fits) else { return false };
        let Unknown { cart, .. } = self.unknown.swap_remove(place);
        self.sales[cart as usize].unsure -= 1;
        self.ended(id, cart, customer, outcome);
        true
    }

    /// An id was given to two purchases.
    pub(crate) fn same_id(&mut self, id: u64) {
        self.same_ids.push(id);
    }

    /// Puts another thread's ledger to this one.
    pub(crate) fn add(&mut self, other: Ledger) {
        for (sales, more) in self.sales.iter_mut().zip(&other.sales) {
            sales.committed += more.committed;
            sales.unsure += more.unsure;
        }
        self.entries.extend(other.entries);
        self.ended += other.ended;
        self.same_ids.extend(other.same_ids);
        self.unknown.extend(other.unknown);
    }

    /// The sales of each cart.
    pub(crate) fn sales(&self) -> &[Sales] {
        &self.sales
    }

    /// The purchases that were kept.
    pub(crate) fn entries(&self) -> &[Entry] {
        &self.entries
    }

    /// How many purchases ended with a clear outcome.
    pub(crate) fn ended_count(&self) -> u64 {
        self.ended
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_entry_is_small_and_whole() {
        assert_eq!(size_of::<Entry>(), 16);
        for committed in [false, true] {
            let entry = Entry::new(u64::MAX, 5, 99_999, committed);
            assert_eq!((entry.id, entry.customer(), entry.committed()), (u64::MAX, 99_999, committed));
        }
    }

    #[test]
    fn carts_are_counted_by_how_sure_they_are() {
        let mut ledger = Ledger::new(2, 10, 1);
        ledger.ended(1, 0, 0, Outcome::Committed);
        ledger.ended(2, 0, 0, Outcome::Aborted(None));
        ledger.ended(3, 1, 0, Outcome::NotRolledBack);
        ledger.unsure(1);
        let mut other = Ledger::new(2, 10, 1);
        other.ended(4, 0, 1, Outcome::Committed);
        other.same_id(4);
        ledger.add(other);
        assert_eq!(ledger.sales(), [Sales { committed: 2, unsure: 0 }, Sales { committed: 0, unsure: 2 }]);
        assert_eq!(ledger.entries().iter().map(|entry| entry.id).collect::<Vec<_>>(), [1, 2, 4]);
        assert_eq!((ledger.ended_count(), ledger.same_ids), (3, vec![4]));
    }

    #[test]
    fn a_request_of_unknown_effect_is_resolved_once() {
        let mut ledger = Ledger::new(2, 10, 1);
        ledger.unknown(0, 5);
        ledger.unknown(1, 5);
        assert!(!ledger.resolve(7, 6, Outcome::Committed, |_| true), "another customer");
        assert!(!ledger.resolve(7, 5, Outcome::Committed, |_| false), "another cart");
        assert!(ledger.resolve(7, 5, Outcome::Committed, |cart| cart == 1));
        assert!(!ledger.resolve(8, 5, Outcome::Committed, |cart| cart == 1));
        assert_eq!(ledger.sales(), [Sales { committed: 0, unsure: 1 }, Sales { committed: 1, unsure: 0 }]);
        assert_eq!(ledger.entries(), [Entry::new(7, 1, 5, true)]);
    }

    #[test]
    fn the_sample_is_even_and_bounded() {
        let mut ledger = Ledger::new(1, 1_000, 1);
        for id in 0..100_000 {
            ledger.ended(id, 0, 0, Outcome::Committed);
        }
        assert_eq!(ledger.entries().len(), 1_000);
        let early = ledger.entries().iter().filter(|entry| entry.id < 50_000).count();
        assert!((400..600).contains(&early), "{early} of the first half");
        assert_eq!(ledger.ended_count(), 100_000);
    }
}

//! How many purchases may be open at a time, in all and for one customer. What goes beyond is refused before it has had any
//! effect, so that an overload never becomes a backlog that nobody waits for any more.
//!
//! Of several replicas each counts what it accepted itself; the bounds are those of one replica. What was counted in stays so until the
//! live view closes it: because it has ended, by whichever way that becomes known, or because it was left to an operator.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use foldhash::{HashMap, HashMapExt};

/// The counts of open purchases. Clones share them.
#[derive(Clone, Debug)]
pub(crate) struct Admission(Arc<Mutex<Counts>>);

/// One that was counted in. It is counted out when this is dropped, unless it is kept.
#[derive(Debug)]
pub(crate) struct Place {
    admission: Admission,
    customer_id: u64,
    kept: bool,
}

impl Place {
    /// From now on it stands for a purchase: the live view counts it out.
    pub(crate) fn keep(mut self) {
        self.kept = true;
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        if !self.kept {
            self.admission.leave([self.customer_id].into_iter());
        }
    }
}

#[derive(Debug)]
struct Counts {
    total: usize,
    by_customer: HashMap<u64, usize>,
    max_total: usize,
    max_by_customer: usize,
}

/// Why a purchase is not admitted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Refused {
    /// The shop has as many open as it may.
    Shop,
    /// The customer has.
    Customer,
}

impl Admission {
    pub(crate) fn new(max_total: usize, max_by_customer: usize) -> Admission {
        let counts = Counts { total: 0, by_customer: HashMap::new(), max_total, max_by_customer };
        Admission(Arc::new(Mutex::new(counts)))
    }

    /// Counts one more in, if there is room.
    pub(crate) fn enter(&self, customer_id: u64) -> Result<Place, Refused> {
        let mut counts = self.counts();
        if counts.total >= counts.max_total {
            return Err(Refused::Shop);
        }
        let max_by_customer = counts.max_by_customer;
        let own = counts.by_customer.entry(customer_id).or_default();
        if *own >= max_by_customer {
            return Err(Refused::Customer);
        }
        *own += 1;
        counts.total += 1;
        drop(counts);
        Ok(Place { admission: self.clone(), customer_id, kept: false })
    }

    /// Counts in what is open already, whether there is room or not.
    pub(crate) fn found_open(&self, customers: impl Iterator<Item = u64>) {
        let mut counts = self.counts();
        for customer_id in customers {
            counts.total += 1;
            *counts.by_customer.entry(customer_id).or_default() += 1;
        }
    }

    /// Counts these out: one for each time that a customer is named.
    pub(crate) fn leave(&self, customers: impl Iterator<Item = u64>) {
        let mut counts = self.counts();
        for customer_id in customers {
            let Some(own) = counts.by_customer.get_mut(&customer_id) else {
                debug_assert!(false, "customer {customer_id} leaves more often than it entered");
                continue;
            };
            *own -= 1;
            if *own == 0 {
                counts.by_customer.remove(&customer_id);
            }
            counts.total -= 1;
        }
    }

    /// How many are open.
    pub(crate) fn open(&self) -> usize {
        self.counts().total
    }

    fn counts(&self) -> MutexGuard<'_, Counts> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_bounds_hold_and_what_left_makes_room() {
        let admission = Admission::new(3, 2);
        let enter = |customer_id| admission.enter(customer_id).map(Place::keep);
        assert_eq!(enter(1), Ok(()));
        assert_eq!(enter(1), Ok(()));
        assert_eq!(enter(1), Err(Refused::Customer));
        drop(admission.enter(2).unwrap());
        assert_eq!(admission.open(), 2, "a place that is not kept is given back");
        assert_eq!(enter(2), Ok(()));
        assert_eq!(enter(3), Err(Refused::Shop));
        admission.leave([1].into_iter());
        assert_eq!(enter(3), Ok(()));
        assert_eq!(enter(1), Err(Refused::Shop));
        admission.leave([1, 2, 3].into_iter());
        assert_eq!(admission.open(), 0);
        admission.found_open([1, 1, 1, 1].into_iter());
        assert_eq!(admission.open(), 4, "what is open already is counted above the bounds, too");
        assert_eq!(enter(2), Err(Refused::Shop));
    }
}

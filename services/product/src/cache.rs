//! Products in memory: what was read or sold lately is answered without asking the database.
//!
//! What a product is (name, price, ...) never changes once it is created, so a copy of it is as good as the row. What is left
//! of it changes with every purchase: [`ProductCache::sold`] brings what the participant has just committed, before anybody is
//! told of it, so a copy is never older than what any client can know of.
//!
//! What never happens: an amount that was read before a commit takes the place of what the commit brought; "there is no such
//! product" is remembered.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use moka::ops::compute::Op;
use moka::policy::EvictionPolicy;
use moka::sync::Cache;

use crate::store::Product;

/// The facts kept, in bytes of text and overhead.
const FACTS_BYTES: u64 = 64 << 20;
/// What an entry takes beside its texts, in bytes, roughly.
const ENTRY_BYTES: usize = 256;
/// The amounts kept.
const AMOUNTS: u64 = 200_000;
/// Products share a counter of writes; a collision costs a read, nothing else.
const STRIPES: usize = 256;

/// What a product is. It never changes.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Facts {
    pub(crate) name: String,
    pub(crate) description: String,
    pub(crate) brand_name: String,
    pub(crate) price: i64,
}

/// A handle to the copies. Cloning is cheap.
#[derive(Clone)]
pub(crate) struct ProductCache {
    facts: Cache<u64, Arc<Facts>>,
    amounts: Cache<u64, i64>,
    /// How often an amount was brought in by a commit, by stripe.
    writes: Arc<[AtomicU64; STRIPES]>,
}

/// Taken before the database is asked; it tells whether the answer may be kept.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Before {
    id: u64,
    writes: u64,
}

impl ProductCache {
    pub(crate) fn new() -> ProductCache {
        let weight = |_: &u64, facts: &Arc<Facts>| {
            let Facts { name, description, brand_name, .. } = &**facts;
            let bytes = ENTRY_BYTES + name.len() + description.len() + brand_name.len();
            u32::try_from(bytes).unwrap_or(u32::MAX)
        };
        ProductCache {
            facts: Cache::builder().weigher(weight).max_capacity(FACTS_BYTES).build(),
            // What a commit brings must be kept, not turned away for being new.
            amounts: Cache::builder().eviction_policy(EvictionPolicy::lru()).max_capacity(AMOUNTS).build(),
            writes: Arc::new(std::array::from_fn(|_| AtomicU64::new(0))),
        }
    }

    pub(crate) fn price(&self, id: u64) -> Option<i64> {
        self.facts.get(&id).map(|facts| facts.price)
    }

    /// What a product is, and what is left of it.
    pub(crate) fn get(&self, id: u64) -> Option<(Arc<Facts>, i64)> {
        Some((self.facts.get(&id)?, self.amounts.get(&id)?))
    }

    /// Call it before asking the database, and hand it to [`ProductCache::read`] with the answer.
    pub(crate) fn before(&self, id: u64) -> Before {
        Before { id, writes: self.stripe(id).load(Ordering::SeqCst) }
    }

    /// Keeps what was read from the database. What is left of it only if no commit has brought something newer since.
    pub(crate) fn read(&self, before: Before, facts: Facts, amount: i64) -> Arc<Facts> {
        let Before { id, writes } = before;
        let facts = self.facts.get_with(id, || Arc::new(facts));
        // One after the other for one product, so between the look at the counter and the insertion nothing comes in.
        self.amounts.entry(id).and_compute_with(|known| {
            let unchanged = known.is_none() && self.stripe(id).load(Ordering::SeqCst) == writes;
            if unchanged { Op::Put(amount) } else { Op::Nop }
        });
        facts
    }

    /// Keeps a price that was read from the database.
    pub(crate) fn read_facts(&self, id: u64, facts: Facts) {
        self.facts.get_with(id, || Arc::new(facts));
    }

    /// Brings what is left of products, as it was just committed. Calls must come in the order of the commits.
    pub(crate) fn sold(&self, left: impl Iterator<Item = (u64, i64)>) {
        for (id, amount) in left {
            // Counted first: a reader that still sees the old count has its amount overwritten by what follows.
            self.stripe(id).fetch_add(1, Ordering::SeqCst);
            self.amounts.entry(id).and_upsert_with(|_| amount);
        }
    }

    fn stripe(&self, id: u64) -> &AtomicU64 {
        &self.writes[usize::try_from(id % STRIPES as u64).unwrap_or(0)]
    }
}

impl Facts {
    /// A product's facts, and what is left of it.
    pub(crate) fn of(product: Product) -> (Facts, i64) {
        let Product { name, description, brand_name, price, inventory, .. } = product;
        (Facts { name, description, brand_name, price }, inventory)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn facts() -> Facts {
        Facts { name: "lamp".into(), description: String::new(), brand_name: String::new(), price: 30 }
    }

    #[test]
    fn what_was_read_before_a_commit_never_hides_it() {
        let cache = ProductCache::new();
        let early = cache.before(7);
        cache.sold([(7, 8)].into_iter());
        assert_eq!(cache.get(7), None, "what it is was not read yet");
        cache.read(early, facts(), 9);
        assert_eq!(cache.get(7).map(|(_, left)| left), Some(8));

        // The same when the committed amount has been evicted in between.
        cache.amounts.invalidate(&7);
        cache.read(early, facts(), 9);
        assert_eq!(cache.get(7), None);
        cache.read(cache.before(7), facts(), 8);
        assert_eq!(cache.get(7), Some((Arc::new(facts()), 8)));
        cache.sold([(7, 5)].into_iter());
        assert_eq!(cache.get(7).map(|(_, left)| left), Some(5));
        assert_eq!(cache.price(7), Some(30));
        assert_eq!(cache.price(8), None);
    }
}

//! Products in memory: what was read or sold lately is answered without asking the database.
//!
//! What a product is (name, price, ...) never changes once it is created, so a copy of it is as good as the row. What is left
//! of it changes with every purchase. Before a transaction that changes it may be committed, its [`Sale`] begins: from then on
//! the amount is asked of the database. The sale ends when the transaction is rolled back, or when it has been committed and
//! the copies have its amounts, before anybody is told of them.
//!
//! This holds for the participants that share the copies: those of one process. Where others sell from the same database, nobody
//! keeps amounts here; `shared.rs` is for that.
//!
//! What never happens: a client that has seen an amount, from wherever, is shown an older one; "there is no such product" is
//! remembered.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicI64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use ::cache::record::{Reader, Record, Writer};
use foldhash::fast::RandomState;
use moka::sync::Cache;

use crate::store::Product;

/// The copies kept, in bytes of text and overhead.
const CACHE_BYTES: u64 = 64 << 20;
/// What a copy takes beside its texts, in bytes, roughly.
const COPY_BYTES: usize = 320;
/// Products share counters of sales; a collision costs a read, nothing else.
const STRIPES: usize = 256;
/// What is left is not known. No product has less than none.
const UNKNOWN: i64 = -1;

/// What a product is, which never changes, and what is left of it, if that is known.
#[derive(Debug)]
pub(crate) struct Known {
    pub(crate) name: String,
    pub(crate) description: String,
    pub(crate) brand_name: String,
    pub(crate) price: i64,
    left: AtomicI64,
}

impl Known {
    fn of(product: Product) -> Known {
        let Product { name, description, brand_name, price, .. } = product;
        Known { name, description, brand_name, price, left: AtomicI64::new(UNKNOWN) }
    }

    fn left(&self) -> Option<i64> {
        Some(self.left.load(Ordering::Relaxed)).filter(|left| *left != UNKNOWN)
    }
}

impl Record for Known {
    const FORMAT: u8 = 1;

    fn write(&self, to: &mut Writer) {
        to.text(&self.name);
        to.text(&self.description);
        to.text(&self.brand_name);
        to.signed(self.price);
    }

    fn read(from: &mut Reader<'_>) -> Option<Known> {
        Some(Known {
            name: from.text()?,
            description: from.text()?,
            brand_name: from.text()?,
            price: from.signed()?,
            left: AtomicI64::new(UNKNOWN),
        })
    }
}

/// Copies of products. Clones share them; so must everything in this process that works on one database.
#[derive(Clone)]
pub struct ProductCache {
    copies: Cache<u64, Arc<Known>, RandomState>,
    sales: Arc<[Mutex<Sales>; STRIPES]>,
}

/// The sales of the products of one stripe.
#[derive(Debug, Default)]
struct Sales {
    /// How many have begun, ever.
    begun: u64,
    under_way: u64,
}

impl Sales {
    /// How many there were, if none is under way.
    fn quiet(&self) -> Option<u64> {
        (self.under_way == 0).then_some(self.begun)
    }
}

/// A transaction that changes what is left. It ends with this.
#[derive(Default)]
pub(crate) struct Sale {
    cache: Option<ProductCache>,
    /// What is left of each product, once it is committed.
    left: BTreeMap<u64, i64>,
    /// The stripes of these, and which of each one's sales this is.
    stripes: BTreeMap<usize, u64>,
}

impl Sale {
    /// The transaction leaves so much of these products. Call it before it may be committed.
    pub(crate) fn leaves(&mut self, cache: &ProductCache, left: impl Iterator<Item = (u64, i64)>) {
        self.cache.get_or_insert_with(|| cache.clone());
        for (id, amount) in left {
            self.left.insert(id, amount);
            self.stripes.entry(stripe(id)).or_insert_with_key(|stripe| {
                let mut sales = cache.sales(*stripe);
                sales.begun += 1;
                sales.under_way += 1;
                sales.begun
            });
        }
    }

    /// It was committed. An amount is kept if no other sale of its stripe is under way or has begun since; else it is forgotten, because
    /// the other one may have been committed later.
    pub(crate) fn committed(self) {
        let Some(cache) = &self.cache else { return };
        for (id, amount) in &self.left {
            let sales = cache.sales(stripe(*id));
            let alone = sales.under_way == 1 && self.stripes.get(&stripe(*id)) == Some(&sales.begun);
            if let Some(copy) = cache.copies.get(id) {
                copy.left.store(if alone { *amount } else { UNKNOWN }, Ordering::Relaxed);
            }
        }
    }
}

impl Drop for Sale {
    fn drop(&mut self) {
        let Some(cache) = &self.cache else { return };
        for stripe in self.stripes.keys() {
            cache.sales(*stripe).under_way -= 1;
        }
    }
}

/// Taken before the database is asked; it tells whether the answer's amount may be kept.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Before {
    id: u64,
    /// None while a sale is under way.
    sales: Option<u64>,
}

impl Default for ProductCache {
    fn default() -> ProductCache {
        ProductCache::new()
    }
}

impl ProductCache {
    /// No copies yet.
    pub fn new() -> ProductCache {
        let weight = |_: &u64, copy: &Arc<Known>| {
            let bytes = COPY_BYTES + copy.name.len() + copy.description.len() + copy.brand_name.len();
            u32::try_from(bytes).unwrap_or(u32::MAX)
        };
        ProductCache {
            copies: Cache::builder()
                .weigher(weight)
                .max_capacity(CACHE_BYTES)
                .build_with_hasher(RandomState::default()),
            sales: Arc::new(std::array::from_fn(|_| Mutex::default())),
        }
    }

    /// What a product is, if it is known.
    pub(crate) fn facts(&self, id: u64) -> Option<Arc<Known>> {
        self.copies.get(&id)
    }

    /// Keeps what another process knows of it.
    pub(crate) fn keep_known(&self, id: u64, known: Known) -> Arc<Known> {
        self.copies.get_with(id, || Arc::new(known))
    }

    pub(crate) fn price(&self, id: u64) -> Option<i64> {
        self.copies.get(&id).map(|copy| copy.price)
    }

    /// What a product is and what is left of it, if both are known.
    pub(crate) fn get(&self, id: u64) -> Option<(Arc<Known>, i64)> {
        let sales = self.sales(stripe(id));
        sales.quiet()?;
        let copy = self.copies.get(&id)?;
        let left = copy.left()?;
        drop(sales);
        Some((copy, left))
    }

    /// Call it before asking the database, and hand it to [`ProductCache::keep`] with the answer.
    pub(crate) fn before(&self, id: u64) -> Before {
        Before { id, sales: self.sales(stripe(id)).quiet() }
    }

    /// Keeps what was read from the database: the amount only if no sale was under way meanwhile.
    pub(crate) fn keep(&self, before: Before, product: Product) -> Arc<Known> {
        let amount = product.inventory;
        let copy = self.keep_facts(product);
        let sales = self.sales(stripe(before.id));
        if before.sales.is_some() && sales.quiet() == before.sales && copy.left().is_none() {
            copy.left.store(amount, Ordering::Relaxed);
        }
        copy
    }

    /// Keeps what a product is. What is left of it stays unknown, unless it is known already.
    pub(crate) fn keep_facts(&self, product: Product) -> Arc<Known> {
        self.copies.get_with(product.id, || Arc::new(Known::of(product)))
    }

    /// Every amount is read and written under its stripe's lock.
    fn sales(&self, stripe: usize) -> MutexGuard<'_, Sales> {
        self.sales[stripe].lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn stripe(id: u64) -> usize {
    usize::try_from(id % STRIPES as u64).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lamps(inventory: i64) -> Product {
        let text = || "lamp".to_owned();
        Product { id: 7, name: text(), description: text(), brand_name: text(), price: 30, inventory }
    }

    fn left(cache: &ProductCache) -> Option<i64> {
        cache.get(7).map(|(_, left)| left)
    }

    fn sale(cache: &ProductCache, left: &[(u64, i64)]) -> Sale {
        let mut sale = Sale::default();
        sale.leaves(cache, left.iter().copied());
        sale
    }

    #[test]
    fn while_a_sale_is_under_way_the_database_is_asked() {
        let cache = ProductCache::new();
        cache.keep(cache.before(7), lamps(9));
        assert_eq!(left(&cache), Some(9));
        let rolled_back = sale(&cache, &[(7, 8)]);
        assert_eq!((left(&cache), cache.price(7)), (None, Some(30)), "a price never grows old");
        let meanwhile = cache.before(7);
        drop(rolled_back);
        assert_eq!(left(&cache), Some(9));
        cache.keep(meanwhile, lamps(8));
        assert_eq!(left(&cache), Some(9));

        let before = cache.before(7);
        let committed = sale(&cache, &[(7, 8), (8, 1)]);
        cache.keep(before, lamps(9));
        assert_eq!(left(&cache), None);
        committed.committed();
        assert_eq!((left(&cache), cache.price(8)), (Some(8), None));
    }

    #[test]
    fn what_was_read_before_a_commit_never_hides_it() {
        let cache = ProductCache::new();
        let early = cache.before(7);
        sale(&cache, &[(7, 8)]).committed();
        cache.keep(early, lamps(9));
        assert_eq!(left(&cache), None);
        cache.keep(cache.before(7), lamps(8));
        cache.keep(early, lamps(9));
        assert_eq!(left(&cache), Some(8));
        // Evicted, and read again by one who began before the last commit.
        let early = cache.before(7);
        sale(&cache, &[(7, 4)]).committed();
        cache.copies.invalidate(&7);
        cache.keep(early, lamps(8));
        assert_eq!(left(&cache), None);
    }

    /// The one that began last was committed last: the database gives a row to one transaction at a time.
    #[test]
    fn of_sales_that_overlap_none_hides_what_a_later_one_left() {
        for (in_order, kept) in [(true, Some(6)), (false, None)] {
            let cache = ProductCache::new();
            cache.keep(cache.before(7), lamps(9));
            let (first, second) = (sale(&cache, &[(7, 8)]), sale(&cache, &[(7, 6)]));
            let told = if in_order { [first, second] } else { [second, first] };
            told.into_iter().for_each(Sale::committed);
            assert_eq!(left(&cache), kept);
            cache.keep(cache.before(7), lamps(6));
            assert_eq!(left(&cache), Some(6));
        }
    }

    /// One writer sells from 10,000 down; readers ask the copies, or else the "database", as the service does. Nobody is ever
    /// shown more than somebody was shown, or told, before.
    #[test]
    fn no_amount_comes_back() {
        let cache = ProductCache::new();
        let (database, seen) = (AtomicI64::new(10_000), AtomicI64::new(10_000));
        std::thread::scope(|scope| {
            scope.spawn(|| {
                for amount in (0..10_000).rev() {
                    let sale = sale(&cache, &[(7, amount)]);
                    database.store(amount, Ordering::SeqCst);
                    sale.committed();
                    seen.fetch_min(amount, Ordering::SeqCst);
                    if amount % 7 == 0 {
                        cache.copies.invalidate(&7);
                    }
                }
            });
            for _ in 0..2 {
                scope.spawn(|| {
                    while seen.load(Ordering::SeqCst) > 0 {
                        let latest = seen.load(Ordering::SeqCst);
                        let shown = left(&cache).unwrap_or_else(|| {
                            let before = cache.before(7);
                            let amount = database.load(Ordering::SeqCst);
                            cache.keep(before, lamps(amount));
                            amount
                        });
                        assert!(shown <= latest, "{shown} are shown, and {latest} were before");
                        seen.fetch_min(shown, Ordering::SeqCst);
                    }
                });
            }
        });
    }
}

//! The stock as a participant of the purchase saga: reserve what a cart asks for, or say what is missing; give it back.

use std::collections::BTreeMap;

use ::cache::Fenced;
use bytes::Bytes;
use db::{Error, Tx};
use participant::{BadInput, Outcome, Participant, Undone, Work};
use shop::purchase::Purchase;

use crate::cache::{ProductCache, Sale};
use crate::shared::Left;
use crate::store;

/// Reserves and gives back.
pub(crate) struct Stock {
    /// Learns what is left, where nobody else sells from the database.
    pub(crate) cache: ProductCache,
    /// Are told what will change, where others do.
    pub(crate) shared: Option<Fenced<Left>>,
}

impl Participant for Stock {
    type Input = Purchase;
    type Changes = Sale;

    fn read(&self, input: &Bytes) -> Result<Purchase, BadInput> {
        Purchase::from_input(input).map_err(|error| BadInput(Box::new(error)))
    }

    fn act(
        &self,
        tx: &mut Tx<'_>,
        work: &[Work<'_, Purchase>],
        sale: &mut Sale,
    ) -> Result<Vec<Outcome>, Error> {
        let mut shelf = Shelf::lock(tx, work)?;
        let outcomes = work.iter().map(|work| shelf.reserve(work.input)).collect();
        self.store(tx, &shelf, sale)?;
        Ok(outcomes)
    }

    fn undo(
        &self,
        tx: &mut Tx<'_>,
        work: &[Work<'_, Purchase>],
        sale: &mut Sale,
    ) -> Result<Vec<Undone>, Error> {
        let mut shelf = Shelf::lock(tx, work)?;
        let outcomes = work.iter().map(|work| shelf.give_back(work.input)).collect();
        self.store(tx, &shelf, sale)?;
        Ok(outcomes)
    }

    fn committed(&self, sale: Sale) {
        sale.committed();
    }
}

impl Stock {
    /// Writes what is left, and tells those who keep copies of it, before it may be committed.
    fn store(&self, tx: &mut Tx<'_>, shelf: &Shelf, sale: &mut Sale) -> Result<(), Error> {
        store::set_stock(tx, shelf.changed())?;
        match &self.shared {
            Some(shared) => shared.announce(tx, shelf.changed().map(|stock| (stock.id, stock.version))),
            None => {
                sale.leaves(&self.cache, shelf.changed().map(|stock| (stock.id, stock.amount)));
                Ok(())
            }
        }
    }
}

/// What is left of the products that a batch touches, and which of them it changes. Nothing of a purchase is reserved
/// unless all of it can be; what is left is never below zero.
#[derive(Debug, Default)]
struct Shelf {
    left: BTreeMap<u64, Held>,
}

#[derive(Debug)]
struct Held {
    amount: i64,
    /// As it was read.
    version: u64,
    changed: bool,
}

impl Shelf {
    fn lock(tx: &mut Tx<'_>, work: &[Work<'_, Purchase>]) -> Result<Shelf, Error> {
        let touched: std::collections::BTreeSet<u64> =
            work.iter().flat_map(|work| work.input.items.iter().map(|item| item.product_id)).collect();
        Ok(Shelf::of(store::lock_stock(tx, touched.into_iter())?))
    }

    fn of(stock: impl IntoIterator<Item = store::Stock>) -> Shelf {
        let left = |store::Stock { id, amount, version }| (id, Held { amount, version, changed: false });
        Shelf { left: stock.into_iter().map(left).collect() }
    }

    fn reserve(&mut self, purchase: &Purchase) -> Outcome {
        for item in &purchase.items {
            let id = item.product_id;
            match self.left.get(&id) {
                None => return Outcome::Rejected(format!("product {id} does not exist")),
                Some(left) if left.amount < item.amount => {
                    return Outcome::Rejected(format!(
                        "out of stock: product {id} has {} left, {} wanted",
                        left.amount, item.amount
                    ));
                }
                Some(_) => {}
            }
        }
        for item in &purchase.items {
            self.add(item.product_id, -item.amount);
        }
        Outcome::Done(Vec::new())
    }

    fn give_back(&mut self, purchase: &Purchase) -> Undone {
        for item in &purchase.items {
            self.add(item.product_id, item.amount);
        }
        Undone::Done
    }

    fn add(&mut self, id: u64, amount: i64) {
        if let Some(left) = self.left.get_mut(&id) {
            left.amount += amount;
            left.changed = true;
        }
    }

    /// What has changed, as it is to be written.
    fn changed(&self) -> impl Iterator<Item = store::Stock> {
        self.left.iter().filter(|(_, held)| held.changed).map(|(id, held)| store::Stock {
            id: *id,
            amount: held.amount,
            version: held.version + 1,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use shop::purchase::PurchasedItem;

    fn purchase(items: &[(u64, i64)]) -> Purchase {
        let item = |&(product_id, amount): &(u64, i64)| PurchasedItem { product_id, amount, price: 1 };
        Purchase { items: items.iter().map(item).collect(), ..Purchase::default() }
    }

    fn shelf(stock: &[(u64, i64)]) -> Shelf {
        Shelf::of(stock.iter().map(|(id, amount)| store::Stock { id: *id, amount: *amount, version: 5 }))
    }

    fn left(shelf: &Shelf) -> Vec<(u64, i64)> {
        shelf.left.iter().map(|(id, left)| (*id, left.amount)).collect()
    }

    #[test]
    fn a_purchase_is_reserved_whole_or_not_at_all() {
        let mut shelf = shelf(&[(1, 5), (2, 1)]);
        assert_eq!(shelf.reserve(&purchase(&[(1, 2), (2, 1)])), Outcome::Done(Vec::new()));
        let refused = shelf.reserve(&purchase(&[(1, 1), (2, 1)]));
        assert_eq!(refused, Outcome::Rejected("out of stock: product 2 has 0 left, 1 wanted".into()));
        assert_eq!(left(&shelf), [(1, 3), (2, 0)], "a refused purchase reserves nothing");
        assert_eq!(shelf.reserve(&purchase(&[(1, 3)])), Outcome::Done(Vec::new()));
        assert_eq!(left(&shelf), [(1, 0), (2, 0)], "the last unit can be sold");
    }

    #[test]
    fn what_is_given_back_can_be_reserved_again_in_the_same_batch() {
        let mut shelf = shelf(&[(1, 1)]);
        assert_eq!(shelf.reserve(&purchase(&[(1, 1)])), Outcome::Done(Vec::new()));
        assert_eq!(shelf.give_back(&purchase(&[(1, 1)])), Undone::Done);
        assert_eq!(shelf.reserve(&purchase(&[(1, 1)])), Outcome::Done(Vec::new()));
        assert_eq!(left(&shelf), [(1, 0)]);
        let written: Vec<_> = shelf.changed().collect();
        assert_eq!(written, [store::Stock { id: 1, amount: 0, version: 6 }], "once in a transaction");
    }

    #[test]
    fn a_product_that_does_not_exist_is_refused() {
        let refused = shelf(&[]).reserve(&purchase(&[(9, 1)]));
        assert_eq!(refused, Outcome::Rejected("product 9 does not exist".into()));
    }
}

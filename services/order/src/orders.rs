//! Orders as a participant of the purchase saga: create one, delete it when the purchase is rolled back.

use bytes::Bytes;
use cache::mark::Mark;
use db::{Error, Tx};
use participant::{BadInput, Outcome, Participant, Undone, Work};
use shop::purchase::Purchase;

use crate::store::{self, Line, NewOrder};

/// Creates and deletes orders.
#[derive(Debug)]
pub(crate) struct Orders;

impl Participant for Orders {
    type Input = Purchase;
    type Changes = ();

    fn read(&self, input: &Bytes) -> Result<Purchase, BadInput> {
        Purchase::from_input(input).map_err(|error| BadInput(Box::new(error)))
    }

    fn act(&self, tx: &mut Tx<'_>, work: &[Work<'_, Purchase>], (): &mut ()) -> Result<Vec<Outcome>, Error> {
        store::insert(tx, work.iter().map(new_order))?;
        Ok(vec![Outcome::Done(Vec::new()); work.len()])
    }

    fn undo(&self, tx: &mut Tx<'_>, work: &[Work<'_, Purchase>], (): &mut ()) -> Result<Vec<Undone>, Error> {
        store::delete(tx, work.iter().map(|work| work.saga))?;
        Ok(vec![Undone::Done; work.len()])
    }

    /// Their orders are never deleted any more.
    fn ended_below(&self, tx: &mut Tx<'_>, below: u64) -> Result<(), Error> {
        Mark::EndedBelow.raise(tx, i64::try_from(below).unwrap_or(i64::MAX))
    }
}

fn new_order(work: &Work<'_, Purchase>) -> NewOrder {
    let line = |item: &shop::purchase::PurchasedItem| (item.product_id, item.amount, item.price);
    let lines: Vec<Line> = work.input.items.iter().map(line).collect();
    NewOrder {
        id: work.saga,
        customer_id: work.input.customer_id,
        items: serde_json::to_string(&lines).expect("numbers can be written as JSON"),
        created_at: work.now,
    }
}

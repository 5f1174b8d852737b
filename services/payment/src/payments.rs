//! Payments as the pivot of the purchase saga: take the payment, or decline it. What is taken is never given back.

use bytes::Bytes;
use db::{Error, Tx};
use participant::{BadInput, Outcome, Participant, Undone, Work};
use shop::purchase::Purchase;

use crate::store::{self, NewPayment};

/// Takes and declines payments.
#[derive(Debug)]
pub(crate) struct Payments {
    /// An amount above it is declined.
    pub(crate) limit: i64,
}

impl Payments {
    fn decide(&self, purchase: &Purchase) -> Outcome {
        if purchase.total > self.limit {
            let (total, limit) = (purchase.total, self.limit);
            Outcome::Rejected(format!("payment declined: {total} is above the limit of {limit}"))
        } else {
            Outcome::Done(Vec::new())
        }
    }
}

impl Participant for Payments {
    type Input = Purchase;
    type Changes = ();

    fn read(&self, input: &Bytes) -> Result<Purchase, BadInput> {
        Purchase::from_input(input).map_err(|error| BadInput(Box::new(error)))
    }

    fn act(&self, tx: &mut Tx<'_>, work: &[Work<'_, Purchase>], (): &mut ()) -> Result<Vec<Outcome>, Error> {
        let outcomes: Vec<Outcome> = work.iter().map(|work| self.decide(work.input)).collect();
        let taken = work.iter().zip(&outcomes).filter(|(_, outcome)| matches!(outcome, Outcome::Done(_)));
        store::insert(tx, taken.map(|(work, _)| payment(work)))?;
        Ok(outcomes)
    }

    /// No saga asks for this: the engine never compensates a pivot.
    fn undo(&self, _: &mut Tx<'_>, work: &[Work<'_, Purchase>], (): &mut ()) -> Result<Vec<Undone>, Error> {
        Ok(vec![Undone::Retry("a payment decides and is never undone".to_owned()); work.len()])
    }
}

fn payment<'a>(work: &Work<'a, Purchase>) -> NewPayment<'a> {
    NewPayment {
        id: work.saga,
        customer_id: work.input.customer_id,
        currency_code: &work.input.currency_code,
        amount: work.input.total,
        created_at: work.now,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_payment_above_the_limit_is_declined() {
        let payments = Payments { limit: 100 };
        let decide = |total| payments.decide(&Purchase { total, ..Purchase::default() });
        assert_eq!(decide(100), Outcome::Done(Vec::new()));
        let declined = "payment declined: 101 is above the limit of 100".to_owned();
        assert_eq!(decide(101), Outcome::Rejected(declined));
    }
}

//! What the tasks of one thread share: its customers, its purchases under way, its measurements.

use std::cell::RefCell;
use std::sync::Arc;
use std::time::Instant;

use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

use crate::carts::{Carts, Products};
use crate::customer::Customer;
use crate::ledger::Ledger;
use crate::options::{Options, Until};
use crate::record::Recorder;
use crate::told;
use crate::tracker::{Accepted, Ended, Outcome, SameId, Tracker};

/// What all threads share, and none changes.
#[derive(Debug)]
pub(crate) struct Plan {
    pub(crate) options: Options,
    pub(crate) products: Products,
    pub(crate) carts: Carts,
    /// A number that tells this run from any other.
    pub(crate) run: u64,
}

/// See the module. Nothing here is borrowed across an await.
pub(crate) struct Desk {
    pub(crate) plan: Arc<Plan>,
    /// The customers who buy.
    pub(crate) customers: Vec<Customer>,
    /// The place of this thread's first customer among all.
    first_customer: u32,
    pub(crate) recorder: RefCell<Recorder>,
    pub(crate) ledger: RefCell<Ledger>,
    pub(crate) tracker: RefCell<Tracker>,
    /// One for each buyer, who may wait for the end of a purchase.
    ended: Vec<Notify>,
    /// Nothing new is to be sent.
    pub(crate) closing: CancellationToken,
    /// What has no answer or no end gets none any more.
    pub(crate) over: CancellationToken,
    /// Told when the last purchase under way has ended.
    pub(crate) quiet: Notify,
}

impl Desk {
    pub(crate) fn new(
        plan: Arc<Plan>,
        customers: Vec<Customer>,
        first_customer: u32,
        buyers: u32,
        recorder: Recorder,
        ledger: Ledger,
    ) -> Desk {
        Desk {
            tracker: RefCell::new(Tracker::new(plan.options.event_timeout)),
            plan,
            customers,
            first_customer,
            recorder: RefCell::new(recorder),
            ledger: RefCell::new(ledger),
            ended: (0..buyers).map(|_| Notify::new()).collect(),
            closing: CancellationToken::new(),
            over: CancellationToken::new(),
            quiet: Notify::new(),
        }
    }

    /// A purchase was answered.
    pub(crate) fn accepted(&self, id: u64, purchase: Accepted, now: Instant) {
        self.recorder.borrow_mut().accepted(purchase.due, now);
        if !self.plan.options.follows() {
            return;
        }
        let accepted = self.tracker.borrow_mut().accepted(id, purchase, now);
        match accepted {
            Ok(None) => {}
            Ok(Some(ended)) => self.finish(ended, false),
            Err(SameId(id)) => {
                self.ledger.borrow_mut().same_id(id);
                self.ledger.borrow_mut().unsure(purchase.cart);
                self.wake(purchase.buyer);
            }
        }
    }

    /// A customer's stream told something.
    pub(crate) fn told(&self, customer: u32, data: &[u8], now: Instant) {
        let Some(told) = told::read(data) else { return };
        let ended = self.tracker.borrow_mut().told(customer, told, now);
        if let Some(ended) = ended {
            self.finish(ended, false);
        }
    }

    /// The shop was asked how a purchase ended.
    pub(crate) fn answered(&self, id: u64, committed: bool, now: Instant) {
        let ended = self.tracker.borrow_mut().answered(id, committed, now);
        if let Some(ended) = ended {
            self.finish(ended, true);
        }
    }

    /// Waits until a purchase of this buyer has ended, which may have been before.
    pub(crate) async fn until_ended(&self, buyer: u32) {
        tokio::select! {
            () = self.ended[buyer as usize].notified() => {}
            () = self.over.cancelled() => {}
        }
    }

    /// Nobody knows whether a request had an effect.
    pub(crate) fn unknown(&self, cart: u32, customer: u32, now: Instant) {
        self.recorder.borrow_mut().unknown(now);
        self.ledger.borrow_mut().unknown(cart, self.first_customer + customer);
    }

    /// Purchases that streams told the ends of and no answer named: id, place of the customer among all, outcome.
    pub(crate) fn unanswered(&self) -> Vec<(u64, u32, Outcome)> {
        let tracker = self.tracker.borrow();
        let of_all = |(id, customer, outcome)| (id, self.first_customer + customer, outcome);
        tracker.unanswered().map(of_all).collect()
    }

    fn finish(&self, ended: Ended, polled: bool) {
        let Ended { id, purchase, outcome, at } = ended;
        self.recorder.borrow_mut().ended(purchase.due, at, outcome, polled);
        if self.plan.options.verify {
            let customer = self.first_customer + purchase.customer;
            self.ledger.borrow_mut().ended(id, purchase.cart, customer, outcome);
        }
        self.wake(purchase.buyer);
        if self.tracker.borrow().open_count() == 0 {
            self.quiet.notify_one();
        }
    }

    fn wake(&self, buyer: u32) {
        if self.plan.options.until == Until::Completed {
            self.ended[buyer as usize].notify_one();
        }
    }
}

//! Customers: they buy, repeat themselves, follow their streams through every crash, and remember all that they were told.
//!
//! A [`Ledger`] holds what the shop has said to anybody. Whatever contradicts what it said before is a fault, and is kept with
//! the ids at fault; a test ends with [`Ledger::assert_no_faults`] and [`audit`], which asks the shop again about everything.
//!
//! What never happens: a customer has more than [`MAX_UNDER_WAY`] acknowledged purchases under way, because from 64 on the ids of a
//! stream's events stop being exact; a key is given up before it is answered.

mod audit;
mod buyers;
mod catalogue;
mod followers;
mod ledger;

pub use audit::{Totals, all_ended, audit};
pub use buyers::{Habits, buy_until_last_call};
pub use catalogue::{Cart, Catalogue, Customer, PAYMENT_LIMIT, Product};
pub use followers::follow_until_closed;
pub use ledger::{Figures, Ledger};

use tokio::sync::watch;

use crate::client::Client;

/// Acknowledged purchases of one customer that may be under way.
pub const MAX_UNDER_WAY: usize = 30;

/// How customers find the shop, which moves to another port with each start.
#[derive(Debug)]
pub struct Gate(watch::Sender<State>);

/// Where customers look for the shop.
#[derive(Clone, Debug)]
pub struct Address(watch::Receiver<State>);

#[derive(Clone, Debug)]
enum State {
    /// Nobody answers.
    Shut,
    /// Here it is.
    Open(Client),
    /// Here it is; what was begun is finished, nothing new is begun.
    LastCall(Client),
    /// Go home.
    Closed,
}

impl Default for Gate {
    fn default() -> Gate {
        Gate(watch::Sender::new(State::Shut))
    }
}

impl Gate {
    /// For one customer's task.
    pub fn address(&self) -> Address {
        Address(self.0.subscribe())
    }

    /// The shop is here.
    pub fn open(&self, client: Client) {
        self.0.send_replace(State::Open(client));
    }

    /// The shop is gone.
    pub fn shut(&self) {
        self.0.send_replace(State::Shut);
    }

    /// The shop is here, for what was begun.
    pub fn last_call(&self, client: Client) {
        self.0.send_replace(State::LastCall(client));
    }

    /// All is over.
    pub fn close(&self) {
        self.0.send_replace(State::Closed);
    }
}

impl Address {
    /// Waits for the shop. None once nothing new is to be begun.
    async fn for_something_new(&mut self) -> Option<Client> {
        loop {
            match &*self.0.borrow_and_update() {
                State::Open(client) => return Some(client.clone()),
                State::LastCall(_) | State::Closed => return None,
                State::Shut => {}
            }
            self.0.changed().await.ok()?;
        }
    }

    /// Waits for the shop. None once all is over.
    async fn for_something_begun(&mut self) -> Option<Client> {
        loop {
            match &*self.0.borrow_and_update() {
                State::Open(client) | State::LastCall(client) => return Some(client.clone()),
                State::Closed => return None,
                State::Shut => {}
            }
            self.0.changed().await.ok()?;
        }
    }

    /// After a broken connection: waits until the shop has moved, or long enough to try again where it was.
    async fn moved(&mut self) {
        const TRY_AGAIN_AFTER: std::time::Duration = std::time::Duration::from_millis(250);
        // Over the limit or not: the caller looks again.
        let _ = tokio::time::timeout(TRY_AGAIN_AFTER, self.0.changed()).await;
    }

    fn is_closed(&self) -> bool {
        matches!(&*self.0.borrow(), State::Closed)
    }
}

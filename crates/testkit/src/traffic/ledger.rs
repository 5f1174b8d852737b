//! What the shop has said, to whom; and whatever it said that contradicts it.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::Notify;

use super::{Cart, MAX_UNDER_WAY};
use crate::events::SseEvent;

/// Faults that are kept; the first ones tell most.
const MAX_FAULTS: usize = 50;

/// What everybody was told. Shared by all tasks of a test.
#[derive(Debug, Default)]
pub struct Ledger {
    state: Mutex<State>,
    /// A purchase of somebody's has ended.
    pub(super) ended: Notify,
}

#[derive(Debug, Default)]
struct State {
    bought: BTreeMap<u64, Bought>,
    keys: BTreeMap<String, u64>,
    told: BTreeMap<u64, Told>,
    /// Acknowledged purchases of each customer whose end was not told yet, and when they were acknowledged.
    under_way: BTreeMap<usize, BTreeMap<u64, Instant>>,
    /// The longest time between a purchase's acknowledgement and its end.
    slowest: Duration,
    /// Purchases whose order was announced and was not there.
    orders_missing: BTreeSet<u64>,
    figures: Figures,
    faults: Vec<String>,
}

/// A purchase that was answered 201.
#[derive(Clone, Debug)]
pub(super) struct Bought {
    pub customer: usize,
    pub cart: Cart,
}

/// What a stream told of one purchase.
#[derive(Clone, Debug)]
pub(super) struct Told {
    pub customer: usize,
    pub steps: Vec<Step>,
    pub ended: bool,
}

/// One event, as the purchase's history must have it, too.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Step {
    pub step: String,
    pub status: String,
    pub timestamp: u64,
}

/// Counts, for the test to print.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Figures {
    /// Purchases answered 201, each once.
    pub acknowledged: usize,
    /// Purchases whose end was told, acknowledged or not.
    pub ended: usize,
    /// Requests answered 201 again with the same purchase.
    pub repeated: usize,
    /// Requests without an answer.
    pub unanswered: usize,
    /// Those of them that had a key.
    pub unanswered_with_key: usize,
    /// Requests answered 503.
    pub refused: usize,
    /// Events received.
    pub events: usize,
    /// Streams opened.
    pub streams: usize,
    /// Effects that were looked for when they were announced.
    pub spot_checks: usize,
}

/// What an event makes worth a look.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Look {
    /// The order must be there, unless its purchase is rolled back.
    AtOrder(u64),
    /// The purchase must have ended, in the database, too.
    AtEnd { purchase: u64, succeeded: bool },
}

impl Ledger {
    /// A purchase was answered 201.
    pub(super) fn acknowledge(&self, customer: usize, id: u64, key: Option<&str>, cart: &Cart) {
        let mut state = self.state();
        let earlier = state.bought.get(&id).cloned();
        let known = key.and_then(|key| state.keys.get(key).copied());
        match (key, known) {
            (Some(key), Some(known)) if known != id => {
                state.fault(format!("I2: key {key:?} was answered with purchase {known}, then with {id}"));
            }
            (None | Some(_), None) if earlier.is_some() => {
                state.fault(format!(
                    "I10: purchase {id} was answered to two different requests, the second {key:?}"
                ));
            }
            _ => {}
        }
        if let Some(Bought { customer: before, cart: other }) = earlier {
            if before != customer || other != *cart {
                state.fault(format!(
                    "I11: purchase {id} is customer {before}'s {other:?} and {customer}'s {cart:?}"
                ));
            }
            state.figures.repeated += 1;
            return;
        }
        if !(1..1 << 53).contains(&id) {
            state.fault(format!("I10: purchase {id} is not below 2^53"));
        }
        state.figures.acknowledged += 1;
        state.bought.insert(id, Bought { customer, cart: cart.clone() });
        if let Some(key) = key {
            state.keys.insert(key.to_owned(), id);
        }
        if !state.told.get(&id).is_some_and(|told| told.ended) {
            state.under_way.entry(customer).or_default().insert(id, Instant::now());
        }
    }

    pub(super) fn unanswered(&self, key: Option<&str>) {
        let mut state = self.state();
        state.figures.unanswered += 1;
        state.figures.unanswered_with_key += usize::from(key.is_some());
    }

    pub(super) fn refused(&self) {
        self.state().figures.refused += 1;
    }

    pub(super) fn stream_opened(&self) {
        self.state().figures.streams += 1;
    }

    pub(super) fn spot_checked(&self) {
        self.state().figures.spot_checks += 1;
    }

    /// Whether this customer may begin another purchase.
    pub(super) fn has_room(&self, customer: usize) -> bool {
        self.state().under_way.get(&customer).is_none_or(|ids| ids.len() < MAX_UNDER_WAY)
    }

    /// An event came in. It must be the next one of its purchase.
    pub(super) fn told(&self, customer: usize, event: &SseEvent) -> Option<Look> {
        let mut state = self.state();
        state.figures.events += 1;
        let data: serde_json::Value = match serde_json::from_str(&event.data) {
            Ok(data) => data,
            Err(error) => {
                state.fault(format!("I12: an event that is no JSON ({error}): {event:?}"));
                return None;
            }
        };
        let (id, seq) = (data["purchase_id"].as_u64()?, data["seq"].as_u64()?);
        let text = |field: &str| data[field].as_str().unwrap_or_default().to_owned();
        let step = Step {
            step: text("step"),
            status: text("status"),
            timestamp: data["timestamp"].as_u64().unwrap_or_default(),
        };
        let told = state.told.entry(id).or_insert(Told { customer, steps: Vec::new(), ended: false });
        let expected = told.steps.len() as u64 + 1;
        let fault = if told.customer != customer {
            Some("is told to two customers")
        } else if told.ended {
            Some("goes on after its end")
        } else if seq < expected {
            Some("comes twice")
        } else if seq > expected {
            Some("leaves a gap")
        } else if event.event != "data" || event.id.is_empty() {
            Some("has no name or no id")
        } else {
            None
        };
        if let Some(fault) = fault {
            let fault = format!("I12: an event of purchase {id} {fault}: {event:?} after {:?}", told.steps);
            state.fault(fault);
            return None;
        }
        let look = look(id, &step);
        told.steps.push(step);
        if let Some(Look::AtEnd { .. }) = look {
            told.ended = true;
            state.figures.ended += 1;
            let acknowledged = state.under_way.get_mut(&customer).and_then(|ids| ids.remove(&id));
            if let Some(acknowledged) = acknowledged {
                state.slowest = state.slowest.max(acknowledged.elapsed());
            }
            self.ended.notify_waiters();
        }
        look
    }

    /// An order was announced and is not there: a fault, unless its purchase is rolled back.
    pub(super) fn order_missing(&self, id: u64) {
        self.state().orders_missing.insert(id);
    }

    pub(super) fn orders_missing(&self) -> BTreeSet<u64> {
        self.state().orders_missing.clone()
    }

    /// Keeps a contradiction.
    pub(super) fn fault(&self, fault: String) {
        self.state().fault(fault);
    }

    /// The counts so far.
    pub fn figures(&self) -> Figures {
        self.state().figures
    }

    /// The longest time that a purchase took from its acknowledgement to its end as its stream told it, since this was last asked.
    pub fn take_slowest(&self) -> Duration {
        std::mem::take(&mut self.state().slowest)
    }

    /// Every purchase that was answered 201.
    pub fn acknowledged(&self) -> BTreeSet<u64> {
        self.state().bought.keys().copied().collect()
    }

    /// For each key that was answered 201, with which purchase.
    pub fn keys(&self) -> BTreeMap<String, u64> {
        self.state().keys.clone()
    }

    /// Whether the ends of all these purchases were told.
    pub fn were_told_the_end_of(&self, ids: &BTreeSet<u64>) -> bool {
        let state = self.state();
        ids.iter().all(|id| state.told.get(id).is_some_and(|told| told.ended))
    }

    /// Ends the test if anybody was told a contradiction.
    ///
    /// # Panics
    /// With all contradictions, if there is one.
    pub fn assert_no_faults(&self) {
        let faults = self.state().faults.clone();
        assert!(faults.is_empty(), "{} faults:\n  {}", faults.len(), faults.join("\n  "));
    }

    pub(super) fn bought(&self) -> BTreeMap<u64, Bought> {
        self.state().bought.clone()
    }

    pub(super) fn all_told(&self) -> BTreeMap<u64, Told> {
        self.state().told.clone()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn fault(&mut self, fault: String) {
        if self.faults.len() < MAX_FAULTS {
            self.faults.push(fault);
        }
    }
}

fn look(purchase: u64, step: &Step) -> Option<Look> {
    match (step.step.as_str(), step.status.as_str()) {
        ("CREATE_ORDER", "STATUS_SUCCESS") => Some(Look::AtOrder(purchase)),
        ("CREATE_PAYMENT", "STATUS_SUCCESS") => Some(Look::AtEnd { purchase, succeeded: true }),
        ("UPDATE_PRODUCT_INVENTORY", "STATUS_FAILED" | "STATUS_ROLLBACKED") => {
            Some(Look::AtEnd { purchase, succeeded: false })
        }
        _ => None,
    }
}

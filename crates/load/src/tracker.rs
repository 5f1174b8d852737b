//! Purchases under way, from their answers to their ends. Pure: answers, events and times come in, ends come out.
//!
//! An event may come before the answer of its purchase has been read, and may come again after a stream was resumed. Either is
//! sorted out here: a purchase ends once.

use std::time::{Duration, Instant};

use foldhash::{HashMap, HashSet};

use crate::told::{News, Step, Told};

/// The longest pause between two questions about one purchase, as a multiple of the first.
const LONGEST_PAUSE: u32 = 8;
/// Ended purchases that are remembered at least, so that an event that comes again is not taken for news.
const REMEMBERED_ENDS: usize = 65_536;
/// Purchases of which news came before an answer, at most. What more is told is forgotten, and asked for later.
const EARLY_NEWS: usize = 65_536;

/// How a purchase ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Outcome {
    Committed,
    /// This step said no. None where that was not told: nobody but the events tells it.
    Aborted(Option<Step>),
    /// It said no, and what was done could not be undone.
    NotRolledBack,
}

/// An accepted purchase.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Accepted {
    /// When it was sent, or should have been.
    pub(crate) due: Instant,
    pub(crate) cart: u32,
    /// Its customer's place among those of this thread.
    pub(crate) customer: u32,
    /// Its buyer's place among those of this thread.
    pub(crate) buyer: u32,
}

/// A purchase that has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Ended {
    pub(crate) id: u64,
    pub(crate) purchase: Accepted,
    pub(crate) outcome: Outcome,
    /// When that was heard.
    pub(crate) at: Instant,
}

#[derive(Debug)]
struct Open {
    purchase: Accepted,
    refused: Option<Step>,
    ask_at: Instant,
    pause: Duration,
}

/// News of a purchase whose answer has not been read, or never will be.
#[derive(Debug)]
struct Early {
    customer: u32,
    refused: Option<Step>,
    ended: Option<(Outcome, Instant)>,
}

/// See the module.
#[derive(Debug)]
pub(crate) struct Tracker {
    open: HashMap<u64, Open>,
    early: HashMap<u64, Early>,
    /// In two generations: the older one goes when the newer one is full.
    ended: HashSet<u64>,
    ended_before: HashSet<u64>,
    /// How long an event is waited for before the shop is asked.
    ask_after: Duration,
}

impl Tracker {
    /// One that asks for what has not ended after so long.
    pub(crate) fn new(ask_after: Duration) -> Tracker {
        Tracker {
            open: HashMap::default(),
            early: HashMap::default(),
            ended: HashSet::default(),
            ended_before: HashSet::default(),
            ask_after,
        }
    }

    /// A purchase was answered. It may have ended already.
    ///
    /// # Errors
    /// When its id is that of another one, which is a fault of the shop.
    pub(crate) fn accepted(
        &mut self,
        id: u64,
        purchase: Accepted,
        now: Instant,
    ) -> Result<Option<Ended>, SameId> {
        if self.open.contains_key(&id) || self.has_ended(id) {
            return Err(SameId(id));
        }
        let early = self.early.remove(&id);
        if let Some((outcome, at)) = early.as_ref().and_then(|early| early.ended) {
            self.remember(id);
            return Ok(Some(Ended { id, purchase, outcome, at }));
        }
        let refused = early.and_then(|early| early.refused);
        let (ask_at, pause) = (now + self.ask_after, self.ask_after);
        self.open.insert(id, Open { purchase, refused, ask_at, pause });
        Ok(None)
    }

    /// A stream told something about a purchase of this customer.
    pub(crate) fn told(&mut self, customer: u32, told: Told, now: Instant) -> Option<Ended> {
        let Told { purchase_id: id, news } = told;
        let Some(open) = self.open.get_mut(&id) else {
            let room = self.early.len() < EARLY_NEWS || self.early.contains_key(&id);
            if room && !self.has_ended(id) {
                self.told_early(customer, told, now);
            }
            return None;
        };
        let outcome = outcome(news, &mut open.refused)?;
        self.end(id, outcome, now)
    }

    fn told_early(&mut self, customer: u32, told: Told, now: Instant) {
        let early =
            self.early.entry(told.purchase_id).or_insert(Early { customer, refused: None, ended: None });
        if early.ended.is_none() {
            early.ended = outcome(told.news, &mut early.refused).map(|outcome| (outcome, now));
        }
    }

    /// The shop was asked, and said that it has ended.
    pub(crate) fn answered(&mut self, id: u64, committed: bool, now: Instant) -> Option<Ended> {
        let refused = self.open.get(&id)?.refused;
        let outcome = if committed { Outcome::Committed } else { Outcome::Aborted(refused) };
        self.end(id, outcome, now)
    }

    /// What is to be asked for now, at most so many. Each is due again after a pause that grows.
    pub(crate) fn take_due(&mut self, now: Instant, most: usize) -> Vec<(u64, u32)> {
        let longest = self.ask_after * LONGEST_PAUSE;
        let due = self.open.iter_mut().filter(|(_, open)| open.ask_at <= now).take(most);
        due.map(|(id, open)| {
            open.pause = (open.pause * 2).min(longest);
            open.ask_at = now + open.pause;
            (*id, open.purchase.customer)
        })
        .collect()
    }

    /// Every purchase that has not ended.
    pub(crate) fn open(&self) -> impl Iterator<Item = (u64, Accepted)> {
        self.open.iter().map(|(id, open)| (*id, open.purchase))
    }

    /// Purchases that have not ended.
    pub(crate) fn open_count(&self) -> usize {
        self.open.len()
    }

    /// Purchases that streams told the ends of and that no answer named, with their customers.
    pub(crate) fn unanswered(&self) -> impl Iterator<Item = (u64, u32, Outcome)> {
        self.early
            .iter()
            .filter_map(|(id, early)| early.ended.map(|(outcome, _)| (*id, early.customer, outcome)))
    }

    fn end(&mut self, id: u64, outcome: Outcome, at: Instant) -> Option<Ended> {
        let purchase = self.open.remove(&id)?.purchase;
        self.remember(id);
        Some(Ended { id, purchase, outcome, at })
    }

    fn has_ended(&self, id: u64) -> bool {
        self.ended.contains(&id) || self.ended_before.contains(&id)
    }

    fn remember(&mut self, id: u64) {
        if self.ended.len() == REMEMBERED_ENDS {
            self.ended_before = std::mem::take(&mut self.ended);
        }
        self.ended.insert(id);
    }
}

/// An id that was given to two purchases.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct SameId(pub(crate) u64);

/// Whether news are the end; if not, they say what to remember until it comes.
fn outcome(news: News, refused: &mut Option<Step>) -> Option<Outcome> {
    match news {
        News::Committed => Some(Outcome::Committed),
        News::RefusedAtOnce => Some(Outcome::Aborted(Some(Step::Stock))),
        News::RolledBack => Some(Outcome::Aborted(*refused)),
        News::NotRolledBack => Some(Outcome::NotRolledBack),
        News::Refused(step) => {
            *refused = Some(step);
            None
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ASK_AFTER: Duration = Duration::from_secs(5);

    fn purchase(due: Instant) -> Accepted {
        Accepted { due, cart: 3, customer: 1, buyer: 2 }
    }

    fn told(purchase_id: u64, news: News) -> Told {
        Told { purchase_id, news }
    }

    fn outcome_of(ended: Option<Ended>) -> Option<Outcome> {
        ended.map(|ended| ended.outcome)
    }

    #[test]
    fn a_purchase_ends_once() {
        let (mut tracker, now) = (Tracker::new(ASK_AFTER), Instant::now());
        assert_eq!(tracker.accepted(7, purchase(now), now), Ok(None));
        assert_eq!(tracker.open_count(), 1);
        let at = now + Duration::from_millis(3);
        let ended = tracker.told(1, told(7, News::Committed), at);
        assert_eq!(ended, Some(Ended { id: 7, purchase: purchase(now), outcome: Outcome::Committed, at }));
        assert_eq!(
            tracker.told(1, told(7, News::Committed), at),
            None,
            "a stream that was resumed tells it again"
        );
        assert_eq!(tracker.answered(7, true, at), None);
        assert_eq!((tracker.open_count(), tracker.unanswered().count()), (0, 0));
    }

    #[test]
    fn an_event_may_come_before_the_answer() {
        let (mut tracker, now) = (Tracker::new(ASK_AFTER), Instant::now());
        let (early, late) = (now + Duration::from_millis(1), now + Duration::from_millis(9));
        assert_eq!(tracker.told(1, told(7, News::Committed), early), None);
        assert_eq!(tracker.told(1, told(7, News::Committed), late), None);
        assert_eq!(tracker.unanswered().collect::<Vec<_>>(), [(7, 1, Outcome::Committed)]);
        let ended = tracker.accepted(7, purchase(now), late).expect("a new id");
        assert_eq!(ended.map(|ended| (ended.outcome, ended.at)), Some((Outcome::Committed, early)));
        assert_eq!((tracker.open_count(), tracker.unanswered().count()), (0, 0));
    }

    #[test]
    fn the_step_that_said_no_is_remembered_until_the_end() {
        let (mut tracker, now) = (Tracker::new(ASK_AFTER), Instant::now());
        // Half of it before the answer.
        assert_eq!(tracker.told(1, told(7, News::Refused(Step::Payment)), now), None);
        assert_eq!(tracker.accepted(7, purchase(now), now), Ok(None));
        let payment = Some(Outcome::Aborted(Some(Step::Payment)));
        assert_eq!(outcome_of(tracker.told(1, told(7, News::RolledBack), now)), payment);
        // All of it after the answer.
        assert_eq!(tracker.accepted(8, purchase(now), now), Ok(None));
        assert_eq!(tracker.told(1, told(8, News::Refused(Step::Payment)), now), None);
        assert_eq!(outcome_of(tracker.told(1, told(8, News::RolledBack), now)), payment);
        // All of it before the answer.
        tracker.told(1, told(9, News::Refused(Step::Payment)), now);
        tracker.told(1, told(9, News::RolledBack), now);
        assert_eq!(outcome_of(tracker.accepted(9, purchase(now), now).expect("a new id")), payment);
        // At the first step, which leaves nothing to be undone.
        assert_eq!(tracker.accepted(10, purchase(now), now), Ok(None));
        let stock = Some(Outcome::Aborted(Some(Step::Stock)));
        assert_eq!(outcome_of(tracker.told(1, told(10, News::RefusedAtOnce), now)), stock);
    }

    #[test]
    fn an_id_is_given_once() {
        let (mut tracker, now) = (Tracker::new(ASK_AFTER), Instant::now());
        assert_eq!(tracker.accepted(7, purchase(now), now), Ok(None));
        assert_eq!(tracker.accepted(7, purchase(now), now), Err(SameId(7)));
        tracker.told(1, told(7, News::Committed), now);
        assert_eq!(tracker.accepted(7, purchase(now), now), Err(SameId(7)));
    }

    #[test]
    fn what_no_event_ends_is_asked_for_at_growing_intervals() {
        let (mut tracker, now) = (Tracker::new(ASK_AFTER), Instant::now());
        for id in [7, 8] {
            assert_eq!(tracker.accepted(id, purchase(now), now), Ok(None));
        }
        let after = |seconds| now + Duration::from_secs(seconds);
        assert_eq!(tracker.take_due(after(4), 10), []);
        assert_eq!(tracker.take_due(after(5), 1).len(), 1);
        assert_eq!(tracker.take_due(after(5), 10).len(), 1, "the other one");
        assert_eq!(tracker.take_due(after(14), 10), []);
        assert_eq!(tracker.take_due(after(15), 10).len(), 2);
        assert_eq!(outcome_of(tracker.answered(7, true, after(15))), Some(Outcome::Committed));
        assert_eq!(outcome_of(tracker.answered(8, false, after(15))), Some(Outcome::Aborted(None)));
        assert_eq!(tracker.take_due(after(1000), 10), []);
    }

    #[test]
    fn what_is_remembered_is_bounded() {
        let (mut tracker, now) = (Tracker::new(ASK_AFTER), Instant::now());
        for id in 0..3 * REMEMBERED_ENDS as u64 {
            assert_eq!(tracker.accepted(id, purchase(now), now), Ok(None));
            tracker.told(1, told(id, News::Committed), now);
        }
        assert!(tracker.ended.len() + tracker.ended_before.len() <= 2 * REMEMBERED_ENDS);
        let last = 3 * REMEMBERED_ENDS as u64 - 1;
        assert_eq!(tracker.told(1, told(last, News::Committed), now), None);
        assert_eq!(tracker.unanswered().count(), 0);
    }
}

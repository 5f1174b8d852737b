//! What this process holds of one subject: frames that the servers delivered and that are not ended yet.
//!
//! The servers know frames, consumers take envelopes. A frame's envelopes wait here until consumers take them, in as many batches as it
//! pleases, together with those of other frames. When the last envelope of a frame has its end, so has the frame: it is acknowledged,
//! or asked for again.
//!
//! Never happens:
//! - a ready envelope that no consumer is on its way to, while one waits (see [`Held::next`]);
//! - a frame that is acknowledged before each of its envelopes has an end;
//! - a batch from before a loss that changes what came after it: each batch carries the epoch.

use std::collections::{HashMap, VecDeque};
use std::fmt;
use std::mem;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use async_nats::Subject as Address;
use async_nats::jetstream::AckKind;
use tokio::sync::Notify;
use tokio::time::Instant;

use crate::{Closed, Delivery, Stats};

pub(super) struct Held {
    state: Mutex<State>,
    /// Holds at most one permit, which means: some consumer has to look at the state.
    waiting: Notify,
    /// Holds at most one permit, which means: who brings frames has to look at the state.
    pub(super) tended: Notify,
}

/// What becomes of a message of the servers.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Told {
    pub(super) message: Address,
    /// None: it is done. Otherwise it comes again after so long.
    pub(super) again: Option<Duration>,
}

impl Told {
    pub(super) fn kind(&self) -> AckKind {
        match self.again {
            None => AckKind::Ack,
            Some(Duration::ZERO) => AckKind::Nak(None),
            Some(delay) => AckKind::Nak(Some(delay)),
        }
    }
}

/// What a consumer took.
#[derive(Debug)]
pub(super) struct Taken {
    pub(super) deliveries: Vec<Delivery>,
    /// Which frames they are of, in their order.
    pub(super) shares: Vec<Share>,
    pub(super) epoch: u64,
}

/// The part of a batch that is of one frame.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Share {
    frame: u64,
    pub(super) envelopes: usize,
    /// It is all of the frame, as the servers delivered it: they count its deliveries as we do.
    pub(super) whole: bool,
}

/// What became of a share.
#[derive(Debug)]
pub(super) struct Settled {
    share: Share,
    /// Those that come again at once.
    pub(super) back: Vec<Delivery>,
    /// The whole frame has to come again after so long, because one of this share's has no other way.
    pub(super) again: Option<Duration>,
}

impl Settled {
    /// All of it has its end.
    pub(super) fn ended(share: Share) -> Settled {
        Settled { share, back: Vec::new(), again: None }
    }

    /// The frame comes again after `delay`, and after any other that was asked for.
    pub(super) fn again_after(&mut self, delay: Duration) {
        self.again = self.again.max(Some(delay));
    }
}

/// The bus forgot the batch.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Forgotten;

impl Held {
    pub(super) fn new() -> Held {
        Held { state: Mutex::default(), waiting: Notify::new(), tended: Notify::new() }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Nothing under the lock panics half-way through a change, so a poisoned one is whole.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes a frame from the servers. None when the bus is closed and it has to go back.
    pub(super) fn push(&self, message: Address, deliveries: Vec<Delivery>, now: Instant) -> Option<()> {
        self.state().push(message, deliveries, now)?;
        self.waiting.notify_one();
        Some(())
    }

    /// Takes what is ready, or waits.
    ///
    /// No wakeup is lost although a permit wakes only one consumer and several permits merge into one: "somebody has to look" is
    /// handed on until nobody has to. Who leaves while anything is ready wakes the next, also when its future is dropped.
    pub(super) async fn next(&self, max_envelopes: usize) -> Result<Taken, Closed> {
        let leave = WakeNext(self);
        let mut idle = None;
        loop {
            match self.state().look(max_envelopes, Instant::now()) {
                Look::Taken { taken, more } => {
                    if !more {
                        mem::forget(leave);
                    }
                    // There is room for more.
                    self.tended.notify_one();
                    return Ok(taken);
                }
                Look::Nothing => {}
                Look::Closed => return Err(Closed),
            }
            idle.get_or_insert_with(|| Idle::new(self));
            self.waiting.notified().await;
        }
    }

    /// Whether a batch's epoch is this one.
    pub(super) fn knows(&self, epoch: u64) -> bool {
        self.state().epoch == epoch
    }

    /// Ends a batch of which each envelope is acknowledged.
    pub(super) fn end(&self, epoch: u64, shares: &[Share]) -> Result<Vec<Told>, Forgotten> {
        let mut state = self.state();
        state.check(epoch)?;
        state.stats.acked += shares.iter().map(|share| share.envelopes as u64).sum::<u64>();
        Ok(shares.iter().filter_map(|share| state.settle(Settled::ended(*share))).collect())
    }

    /// Ends a batch. `acked` and `parked` of its envelopes were.
    pub(super) fn settle(
        &self,
        epoch: u64,
        settled: Vec<Settled>,
        acked: usize,
        parked: usize,
    ) -> Result<Vec<Told>, Forgotten> {
        let mut state = self.state();
        state.check(epoch)?;
        state.stats.acked += acked as u64;
        state.stats.parked += parked as u64;
        let told = settled.into_iter().filter_map(|settled| state.settle(settled)).collect();
        drop(state);
        self.waiting.notify_one();
        Ok(told)
    }

    /// Takes a batch back that was dropped.
    pub(super) fn give_back(&self, taken: Taken) {
        let Taken { deliveries, shares, epoch } = taken;
        let mut state = self.state();
        if state.check(epoch).is_err() {
            return;
        }
        let mut deliveries = deliveries.into_iter();
        for share in shares {
            let back = deliveries.by_ref().take(share.envelopes).collect();
            let told = state.settle(Settled { back, ..Settled::ended(share) });
            state.untold.extend(told);
        }
        drop(state);
        self.waiting.notify_one();
        self.tended.notify_one();
    }

    /// Whether more frames are wanted: somebody takes them, and fewer than `envelopes` wait. Who has taken nothing for `patience` and
    /// does not ask either is taken for stuck.
    pub(super) fn wants(&self, envelopes: usize, patience: Duration, now: Instant) -> bool {
        let state = self.state();
        let works = state.idle > 0 || state.last_take.is_some_and(|last| now < last + patience);
        !state.closed && state.consumers > 0 && works && state.ready_envelopes < envelopes
    }

    /// The messages of frames that the servers have not heard of for `interval`.
    pub(super) fn unmentioned(&self, interval: Duration, now: Instant) -> Vec<Address> {
        let mut state = self.state();
        let unmentioned = state.open.values_mut().filter(|frame| now >= frame.mentioned + interval);
        unmentioned
            .map(|frame| {
                frame.mentioned = now;
                frame.message.clone()
            })
            .collect()
    }

    /// Gives up frames of which nothing was taken for `patience`: another process may be quicker. And what else has to be told.
    pub(super) fn returned(&self, patience: Duration, now: Instant) -> Vec<Told> {
        let mut state = self.state();
        let stale = |frame: &Open| !frame.begun && now >= frame.arrived + patience;
        let returned: Vec<u64> =
            state.open.iter().filter(|(_, frame)| stale(frame)).map(|(number, _)| *number).collect();
        let mut told = mem::take(&mut state.untold);
        told.extend(returned.into_iter().filter_map(|number| state.let_go(number)));
        told
    }

    /// Forgets everything, as the servers have.
    pub(super) fn forget(&self) {
        let mut state = self.state();
        state.stats.forgotten += state.open.values().map(|frame| frame.left as u64).sum::<u64>();
        state.open.clear();
        state.ready.clear();
        state.ready_envelopes = 0;
        state.untold.clear();
        state.epoch += 1;
        drop(state);
        self.tended.notify_one();
    }

    /// From now on nothing is delivered. What is ready is among what was [returned](Held::returned), as soon as nothing else of its frame
    /// is in hand.
    pub(super) fn close(&self) {
        let mut state = self.state();
        state.closed = true;
        let ready = mem::take(&mut state.ready);
        state.ready_envelopes = 0;
        let told = ready.into_iter().filter_map(|part| {
            let share = Share { frame: part.frame, envelopes: part.deliveries.len(), whole: false };
            state.settle(Settled { back: part.deliveries, ..Settled::ended(share) })
        });
        let told: Vec<Told> = told.collect();
        state.untold.extend(told);
        drop(state);
        self.waiting.notify_one();
        self.tended.notify_one();
    }

    pub(super) fn is_closed(&self) -> bool {
        self.state().closed
    }

    /// Whether nothing is held any more.
    pub(super) fn is_empty(&self) -> bool {
        let state = self.state();
        state.open.is_empty() && state.untold.is_empty()
    }

    pub(super) fn stats(&self) -> Stats {
        self.state().stats
    }

    pub(super) fn joined(&self) {
        self.state().consumers += 1;
    }

    pub(super) fn left(&self) {
        self.state().consumers -= 1;
    }
}

impl fmt::Debug for Held {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let state = self.state();
        f.debug_struct("Held")
            .field("frames", &state.open.len())
            .field("ready_envelopes", &state.ready_envelopes)
            .finish_non_exhaustive()
    }
}

/// Wakes another consumer when this one leaves, also when its future is dropped while it waits.
struct WakeNext<'a>(&'a Held);

impl Drop for WakeNext<'_> {
    fn drop(&mut self) {
        self.0.waiting.notify_one();
    }
}

/// A consumer that waits.
struct Idle<'a>(&'a Held);

impl<'a> Idle<'a> {
    fn new(held: &'a Held) -> Idle<'a> {
        held.state().idle += 1;
        held.tended.notify_one();
        Idle(held)
    }
}

impl Drop for Idle<'_> {
    fn drop(&mut self) {
        self.0.state().idle -= 1;
    }
}

#[derive(Default)]
struct State {
    ready: VecDeque<Part>,
    /// Envelopes in `ready`.
    ready_envelopes: usize,
    /// Frames with an envelope that has no end, by their number.
    open: HashMap<u64, Open>,
    frames: u64,
    /// What could not be told where it was decided.
    untold: Vec<Told>,
    consumers: usize,
    /// Consumers that wait.
    idle: usize,
    last_take: Option<Instant>,
    /// Grows with each loss; what was handed out in an earlier one is no longer known.
    epoch: u64,
    closed: bool,
    stats: Stats,
}

/// Envelopes of one frame that wait for a consumer.
struct Part {
    frame: u64,
    deliveries: Vec<Delivery>,
}

/// A frame with an envelope that has no end.
struct Open {
    message: Address,
    envelopes: usize,
    /// Those without an end.
    left: usize,
    arrived: Instant,
    /// When the servers last heard that it is held.
    mentioned: Instant,
    /// Some of it was taken.
    begun: bool,
    /// Some of it came back to be delivered from here again, which the servers do not count.
    came_back: bool,
    /// It has to come again, after so long.
    again: Option<Duration>,
}

enum Look {
    /// `more`: something is left that another consumer has to look after.
    Taken {
        taken: Taken,
        more: bool,
    },
    Nothing,
    Closed,
}

impl State {
    fn push(&mut self, message: Address, deliveries: Vec<Delivery>, now: Instant) -> Option<()> {
        if self.closed {
            return None;
        }
        let envelopes = deliveries.len();
        let open = Open {
            message,
            envelopes,
            left: envelopes,
            arrived: now,
            mentioned: now,
            begun: false,
            came_back: false,
            again: None,
        };
        self.frames += 1;
        self.open.insert(self.frames, open);
        self.make_ready(Part { frame: self.frames, deliveries });
        Some(())
    }

    fn make_ready(&mut self, part: Part) {
        self.ready_envelopes += part.deliveries.len();
        self.ready.push_back(part);
    }

    fn look(&mut self, max_envelopes: usize, now: Instant) -> Look {
        if self.closed {
            return Look::Closed;
        }
        let mut deliveries = Vec::new();
        let mut shares = Vec::new();
        while let Some(part) = self.ready.front_mut() {
            let room = max_envelopes - deliveries.len();
            if room == 0 {
                break;
            }
            let envelopes = part.deliveries.len().min(room);
            let all = envelopes == part.deliveries.len();
            if all && deliveries.is_empty() {
                deliveries = mem::take(&mut part.deliveries);
            } else {
                deliveries.extend(part.deliveries.drain(..envelopes));
            }
            let frame = part.frame;
            if all {
                self.ready.pop_front();
            }
            let whole = self.open.get_mut(&frame).is_some_and(|open| {
                open.begun = true;
                envelopes == open.envelopes && !open.came_back
            });
            shares.push(Share { frame, envelopes, whole });
        }
        if deliveries.is_empty() {
            return Look::Nothing;
        }
        self.ready_envelopes -= deliveries.len();
        self.last_take = Some(now);
        self.stats.delivered += deliveries.len() as u64;
        self.stats.redelivered += deliveries.iter().filter(|delivery| delivery.count > 1).count() as u64;
        Look::Taken { taken: Taken { deliveries, shares, epoch: self.epoch }, more: !self.ready.is_empty() }
    }

    fn check(&self, epoch: u64) -> Result<(), Forgotten> {
        if self.epoch == epoch { Ok(()) } else { Err(Forgotten) }
    }

    /// What the servers have to be told, once each envelope of the frame has its end.
    fn settle(&mut self, settled: Settled) -> Option<Told> {
        let Settled { share, mut back, mut again } = settled;
        if self.closed && !back.is_empty() {
            back.clear();
            again = again.max(Some(Duration::ZERO));
        }
        let frame = self.open.get_mut(&share.frame)?;
        frame.left -= share.envelopes - back.len();
        frame.again = frame.again.max(again);
        if !back.is_empty() {
            frame.came_back = true;
            let deliveries = back.into_iter().map(Delivery::again).collect();
            // To the back: a batch that kills each handler that takes it must not keep the others from the rest.
            self.make_ready(Part { frame: share.frame, deliveries });
            return None;
        }
        if frame.left > 0 {
            return None;
        }
        self.open.remove(&share.frame).map(|frame| Told { message: frame.message, again: frame.again })
    }

    /// Gives up a frame of which nothing was taken.
    fn let_go(&mut self, number: u64) -> Option<Told> {
        let frame = self.open.remove(&number)?;
        self.ready.retain(|part| part.frame != number);
        self.ready_envelopes -= frame.left;
        Some(Told { message: frame.message, again: Some(Duration::ZERO) })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::{Envelope, EnvelopeId};

    const SOON: Duration = Duration::from_secs(5);

    fn message(number: u64) -> Address {
        Address::from(format!("ack.{number}"))
    }

    fn deliveries(numbers: std::ops::Range<u64>) -> Vec<Delivery> {
        let one = |n| Delivery {
            envelope: Envelope { id: EnvelopeId::of(n, 0), body: Default::default() },
            count: 1,
        };
        numbers.map(one).collect()
    }

    /// Frames of so many envelopes, numbered from 0.
    fn held(frames: &[u64]) -> Held {
        let held = Held::new();
        let mut next = 0;
        for (number, envelopes) in frames.iter().enumerate() {
            let taken = held.push(message(number as u64), deliveries(next..next + envelopes), Instant::now());
            assert_eq!(taken, Some(()));
            next += envelopes;
        }
        held
    }

    fn take(held: &Held, max_envelopes: usize) -> Option<Taken> {
        match held.state().look(max_envelopes, Instant::now()) {
            Look::Taken { taken, .. } => Some(taken),
            Look::Nothing | Look::Closed => None,
        }
    }

    fn ids(taken: &Taken) -> Vec<u64> {
        taken.deliveries.iter().map(|delivery| delivery.envelope.id.parts().0).collect()
    }

    fn told(number: u64, again: Option<Duration>) -> Told {
        Told { message: message(number), again }
    }

    #[test]
    fn a_batch_joins_and_divides_frames_and_each_ends_with_its_last_envelope() {
        let held = held(&[3, 4, 2]);
        let first = take(&held, 5).expect("nine are ready");
        assert_eq!(ids(&first), [0, 1, 2, 3, 4]);
        assert_eq!(
            first.shares.iter().map(|share| (share.envelopes, share.whole)).collect::<Vec<_>>(),
            [(3, true), (2, false)]
        );
        let second = take(&held, 100).expect("four are ready");
        assert_eq!(ids(&second), [5, 6, 7, 8]);
        assert_eq!(held.end(0, &second.shares), Ok(vec![told(2, None)]));
        assert_eq!(held.end(0, &first.shares), Ok(vec![told(0, None), told(1, None)]));
        assert!(held.is_empty() && take(&held, 1).is_none());
    }

    #[test]
    fn what_is_given_back_goes_behind_the_rest_and_counts() {
        let held = held(&[2, 1]);
        held.give_back(take(&held, 1).expect("three are ready"));
        let rest = take(&held, 10).expect("three are ready");
        assert_eq!(ids(&rest), [1, 2, 0]);
        assert_eq!(rest.deliveries.iter().map(|delivery| delivery.count).collect::<Vec<_>>(), [1, 1, 2]);
        assert!(!rest.shares[2].whole, "the servers do not count what was delivered from here twice");
    }

    #[test]
    fn a_frame_comes_again_after_the_longest_delay_that_one_of_it_needs() {
        let held = held(&[4]);
        let (first, second) = (take(&held, 2).expect("two"), take(&held, 2).expect("two"));
        let settle = |taken: Taken, seconds: &[u64]| {
            let mut settled = Settled::ended(taken.shares[0]);
            seconds.iter().for_each(|seconds| settled.again_after(Duration::from_secs(*seconds)));
            held.settle(0, vec![settled], 0, 0)
        };
        assert_eq!(settle(first, &[7, 2]), Ok(vec![]));
        assert_eq!(settle(second, &[]), Ok(vec![told(0, Some(Duration::from_secs(7)))]));
    }

    #[test]
    fn frames_that_nobody_begins_are_given_up() {
        let held = held(&[2, 2]);
        let _in_hand = take(&held, 1).expect("four are ready");
        let later = Instant::now() + SOON;
        assert_eq!(held.returned(SOON, Instant::now()), []);
        assert_eq!(held.returned(SOON, later), [told(1, Some(Duration::ZERO))]);
        assert_eq!(ids(&take(&held, 10).expect("one is ready")), [1]);
    }

    #[test]
    fn the_servers_hear_of_all_that_is_held_now_and_then() {
        let held = held(&[1, 1]);
        let taken = take(&held, 1).expect("two are ready");
        assert_eq!(held.unmentioned(SOON, Instant::now()), []);
        let later = Instant::now() + SOON;
        let mut mentioned = held.unmentioned(SOON, later);
        mentioned.sort_by_key(ToString::to_string);
        assert_eq!(mentioned, [message(0), message(1)]);
        assert_eq!(held.unmentioned(SOON, later + SOON / 2), []);
        held.end(0, &taken.shares).expect("it is known");
        assert_eq!(held.unmentioned(SOON, later + SOON), [message(1)]);
    }

    #[test]
    fn a_close_gives_back_what_is_ready_and_the_rest_when_it_is_settled() {
        let held = held(&[2, 1, 1]);
        let (begun, dropped) = (take(&held, 1).expect("four"), take(&held, 2).expect("three"));
        held.close();
        assert_eq!(held.returned(SOON, Instant::now()), [told(2, Some(Duration::ZERO))]);
        assert!(take(&held, 1).is_none());
        assert_eq!(held.push(message(9), deliveries(9..10), Instant::now()), None);
        held.give_back(dropped);
        assert_eq!(held.returned(SOON, Instant::now()), [told(1, Some(Duration::ZERO))]);
        assert_eq!(held.end(0, &begun.shares), Ok(vec![told(0, Some(Duration::ZERO))]));
        assert!(held.is_empty());
    }

    #[test]
    fn a_batch_from_before_a_loss_is_not_known() {
        let held = held(&[2, 1]);
        let old = take(&held, 2).expect("three are ready");
        held.forget();
        held.push(message(7), deliveries(7..9), Instant::now()).expect("it is open");
        assert_eq!(held.end(old.epoch, &old.shares), Err(Forgotten));
        held.give_back(old);
        let new = take(&held, 10).expect("two are ready");
        assert_eq!(ids(&new), [7, 8]);
        assert_eq!((new.epoch, held.stats().forgotten), (1, 3));
    }

    #[test]
    fn more_is_wanted_while_somebody_takes_and_little_waits() {
        let held = held(&[3]);
        let now = Instant::now();
        assert!(!held.wants(10, SOON, now), "nobody is there");
        held.joined();
        assert!(!held.wants(10, SOON, now), "nobody asks");
        let taken = take(&held, 2).expect("three are ready");
        assert!(held.wants(10, SOON, now));
        assert!(!held.wants(1, SOON, now), "one waits already");
        assert!(!held.wants(10, SOON, now + 2 * SOON), "it is stuck");
        held.end(0, &taken.shares).expect("it is known");
        held.left();
        assert!(!held.wants(10, SOON, now));
    }

    #[derive(Clone, Debug)]
    enum Step {
        Push(u64),
        Take(usize),
        End(usize),
        GiveBack(usize),
        Again(usize),
    }

    fn steps() -> impl Strategy<Value = Vec<Step>> {
        let step = prop_oneof![
            (1..6_u64).prop_map(Step::Push),
            (1..8_usize).prop_map(Step::Take),
            (0..4_usize).prop_map(Step::End),
            (0..4_usize).prop_map(Step::GiveBack),
            (0..4_usize).prop_map(Step::Again),
        ];
        proptest::collection::vec(step, 1..80)
    }

    proptest! {
        /// Whatever happens, each frame gets exactly one end, after each of its envelopes has; and none that is not acknowledged
        /// throughout is acknowledged.
        #[test]
        fn each_frame_ends_once_and_not_too_early(steps in steps()) {
            let held = Held::new();
            let (mut pushed, mut next, mut in_hand) = (Vec::<std::ops::Range<u64>>::new(), 0, Vec::<Taken>::new());
            let (mut acked, mut returned) = (std::collections::BTreeSet::new(), std::collections::BTreeSet::new());
            let mut ends = Vec::new();
            let drain = [Step::Take(1_000), Step::End(0), Step::End(0), Step::End(0), Step::End(0)];
            let rest = std::iter::repeat_n(drain, 60).flatten();
            for step in steps.into_iter().chain(rest) {
                match step {
                    Step::Push(envelopes) => {
                        let numbers = next..next + envelopes;
                        next = numbers.end;
                        held.push(message(pushed.len() as u64), deliveries(numbers.clone()), Instant::now());
                        pushed.push(numbers);
                    }
                    Step::Take(max) => in_hand.extend(take(&held, max)),
                    Step::End(which) if which < in_hand.len() => {
                        let taken = in_hand.remove(which);
                        acked.extend(ids(&taken));
                        ends.extend(held.end(taken.epoch, &taken.shares).expect("it is known"));
                    }
                    Step::GiveBack(which) if which < in_hand.len() => held.give_back(in_hand.remove(which)),
                    Step::Again(which) if which < in_hand.len() => {
                        let taken = in_hand.remove(which);
                        returned.extend(ids(&taken));
                        let settled = taken.shares.iter().map(|share| {
                            let mut settled = Settled::ended(*share);
                            settled.again_after(SOON);
                            settled
                        });
                        ends.extend(held.settle(taken.epoch, settled.collect(), 0, 0).expect("it is known"));
                    }
                    Step::End(_) | Step::GiveBack(_) | Step::Again(_) => {}
                }
                for end in &ends {
                    let number: usize = end.message.rsplit('.').next().expect("a number").parse().expect("a number");
                    for n in pushed[number].clone() {
                        prop_assert!(acked.contains(&n) || returned.contains(&n), "{n} has no end");
                    }
                    let all_acked = pushed[number].clone().all(|n| acked.contains(&n));
                    prop_assert_eq!(end.again.is_none(), all_acked);
                }
            }
            prop_assert_eq!(ends.len(), pushed.len());
            let different: std::collections::BTreeSet<_> = ends.iter().map(|end| end.message.to_string()).collect();
            prop_assert_eq!(different.len(), pushed.len());
            prop_assert!(held.is_empty());
        }
    }
}

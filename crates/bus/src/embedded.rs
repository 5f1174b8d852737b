//! The bus in this process's memory: per subject one mutex around plain collections, no thread and no log.
//!
//! [`State`] holds a queue's rules and knows no lock, clock or waker; [`Queue`] wraps it with those.
//!
//! Never happens:
//! - a ready envelope that no consumer is on its way to, while one waits (see [`Queue::next`]);
//! - a place in the bound that is counted twice or not given back: an envelope is ready, delayed or in hand,
//!   and moves between these under the queue's lock;
//! - a batch from before [`Embedded::clear`] that changes what came after it: each batch carries the queue's
//!   epoch.
//!
//! Locks are taken in the order subjects, queue, dead letters.

use std::cmp::Ordering;
use std::collections::{BinaryHeap, HashMap, VecDeque};
use std::fmt;
use std::mem;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::time::Duration;

use tokio::sync::Notify;
use tokio::task::coop::consume_budget;
use tokio::time::{Instant, timeout_at};

use crate::{
    Closed, Delivery, Depth, Envelope, Limits, Parked, PublishError, RETRY_DELAY_MAX, SettleError, Stats,
    Subject, Verdict,
};

/// A handle to a bus in this process's memory. Made by [`crate::Bus::embedded`].
#[derive(Clone)]
pub struct Embedded(Arc<Shared>);

struct Shared {
    limits: Limits,
    subjects: RwLock<Subjects>,
    letters: Arc<Mutex<Letters>>,
}

#[derive(Default)]
struct Subjects {
    /// Kept here too, so that a queue made after the close is born closed.
    closed: bool,
    queues: HashMap<Subject, Arc<Queue>>,
}

impl Embedded {
    pub(crate) fn new(limits: Limits) -> Self {
        assert!(
            (1..=limits.queue_envelopes).contains(&limits.frame_envelopes),
            "a queue of {} envelopes can never take a full frame of {}",
            limits.queue_envelopes,
            limits.frame_envelopes,
        );
        let letters = Letters { kept: VecDeque::new(), capacity: limits.parked_letters, dropped: 0 };
        Self(Arc::new(Shared { limits, subjects: RwLock::default(), letters: Arc::new(Mutex::new(letters)) }))
    }

    pub(crate) fn limits(&self) -> Limits {
        self.0.limits
    }

    pub(crate) fn publish(&self, subject: Subject, frame: Vec<Envelope>) -> Result<(), PublishError> {
        if frame.is_empty() {
            return Ok(());
        }
        let queue = self.queue(subject);
        match self.0.limits.oversize(subject, &frame) {
            None => queue.publish(frame),
            Some(refusal) => {
                queue.state().stats.refused += frame.len() as u64;
                Err(refusal)
            }
        }
    }

    pub(crate) fn subscribe(&self, subject: Subject) -> Consumer {
        Consumer(self.queue(subject))
    }

    pub(crate) fn parked(&self) -> Vec<Parked> {
        lock(&self.0.letters).kept.iter().cloned().collect()
    }

    pub(crate) fn depth(&self, subject: Subject) -> Depth {
        match self.subjects().queues.get(&subject) {
            Some(queue) => {
                let mut state = queue.state();
                state.ripen(Instant::now());
                state.depth()
            }
            None => Depth::default(),
        }
    }

    pub(crate) fn stats(&self) -> Stats {
        let subjects = self.subjects();
        let mut sum = Stats::default();
        for queue in subjects.queues.values() {
            sum = sum.plus(queue.state().stats);
        }
        sum.letters_dropped = lock(&self.0.letters).dropped;
        sum
    }

    /// Holds all locks at once: were the queues emptied one after the other, a message could be lost and one
    /// that was sent before it survive, which no death of a bus brings about.
    pub(crate) fn clear(&self) {
        let subjects = self.subjects_mut();
        let mut states: Vec<_> = subjects.queues.values().map(|queue| queue.state()).collect();
        let mut letters = lock(&self.0.letters);
        states.iter_mut().for_each(|state| state.forget());
        letters.kept.clear();
    }

    pub(crate) fn close(&self) {
        let mut subjects = self.subjects_mut();
        subjects.closed = true;
        for queue in subjects.queues.values() {
            queue.state().closed = true;
            queue.waiting.notify_one();
        }
    }

    fn queue(&self, subject: Subject) -> Arc<Queue> {
        if let Some(queue) = self.subjects().queues.get(&subject) {
            return Arc::clone(queue);
        }
        let mut subjects = self.subjects_mut();
        let closed = subjects.closed;
        let queue = subjects.queues.entry(subject).or_insert_with(|| {
            Arc::new(Queue {
                subject,
                capacity_envelopes: self.0.limits.queue_envelopes,
                letters: Arc::clone(&self.0.letters),
                state: Mutex::new(State { closed, ..State::default() }),
                waiting: Notify::new(),
            })
        });
        Arc::clone(queue)
    }

    fn subjects(&self) -> RwLockReadGuard<'_, Subjects> {
        self.0.subjects.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn subjects_mut(&self) -> RwLockWriteGuard<'_, Subjects> {
        self.0.subjects.write().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for Embedded {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Embedded").field("limits", &self.0.limits).finish_non_exhaustive()
    }
}

/// Nothing under these locks panics half-way through a change, so a poisoned one is whole.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The dead letters of all subjects.
struct Letters {
    kept: VecDeque<Parked>,
    capacity: usize,
    dropped: u64,
}

impl Letters {
    fn keep(&mut self, letter: Parked) {
        self.kept.push_back(letter);
        if self.kept.len() > self.capacity {
            self.kept.pop_front();
            self.dropped += 1;
        }
    }
}

/// One subject's queue.
struct Queue {
    subject: Subject,
    capacity_envelopes: usize,
    letters: Arc<Mutex<Letters>>,
    state: Mutex<State>,
    /// Holds at most one permit, which means: some consumer has to look at the state.
    waiting: Notify,
}

impl Queue {
    fn state(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }

    fn publish(&self, frame: Vec<Envelope>) -> Result<(), PublishError> {
        self.state().accept(frame, self.capacity_envelopes).map_err(|refusal| match refusal {
            Refusal::Full => {
                PublishError::Full { subject: self.subject, capacity_envelopes: self.capacity_envelopes }
            }
            Refusal::Closed => PublishError::Closed,
        })?;
        self.waiting.notify_one();
        Ok(())
    }

    /// Takes what is ready, or waits.
    ///
    /// No wakeup is lost although a permit wakes only one consumer and several permits merge into one,
    /// because "somebody has to look" is handed on until nobody has to: who leaves while anything is ready or
    /// delayed wakes the next; who finds nothing ready stays, and sleeps until the first delay is over. The
    /// delayed count as well since the only consumer that sleeps on a delay may be dropped or leave with
    /// other work; and so nothing rests on the order in which waiters are woken.
    async fn next(self: &Arc<Self>, max_envelopes: usize) -> Result<Hand, Closed> {
        let leave = WakeNext(self);
        loop {
            let look = self.state().look(max_envelopes, Instant::now());
            match look {
                Look::Taken { deliveries, epoch, more } => {
                    if !more {
                        mem::forget(leave);
                    }
                    return Ok(Hand { queue: Arc::clone(self), epoch, deliveries });
                }
                Look::Nothing { due: None } => self.waiting.notified().await,
                Look::Nothing { due: Some(due) } => {
                    // Whether time or a permit ended the wait, the next look tells what there is.
                    let _ = timeout_at(due, self.waiting.notified()).await;
                }
                Look::Closed => return Err(Closed),
            }
        }
    }

    fn settle(
        &self,
        epoch: u64,
        deliveries: Vec<Delivery>,
        verdicts: Vec<Verdict>,
    ) -> Result<(), SettleError> {
        // What is acknowledged is freed here, before the lock is taken.
        let mut settled = Settled { hand: deliveries.len(), retried: Vec::new(), parked: Vec::new() };
        let now = Instant::now();
        for (delivery, verdict) in deliveries.into_iter().zip(verdicts) {
            match verdict {
                Verdict::Ack => {}
                Verdict::Retry { after } => settled.retried.push(Delayed::new(delivery, now, after)),
                Verdict::Park { reason } => settled.parked.push(Parked {
                    subject: self.subject,
                    envelope: delivery.envelope,
                    count: delivery.count,
                    reason,
                }),
            }
        }
        self.apply(epoch, settled)
    }

    fn apply(&self, epoch: u64, settled: Settled) -> Result<(), SettleError> {
        let returns = !settled.retried.is_empty();
        let mut state = self.state();
        if state.epoch != epoch {
            return Err(SettleError::Forgotten { subject: self.subject });
        }
        let parked = state.settle(settled);
        if !parked.is_empty() {
            // Under the queue's lock, or a clear in between would leave letters of before it behind.
            let mut letters = lock(&self.letters);
            parked.into_iter().for_each(|letter| letters.keep(letter));
        }
        drop(state);
        if returns {
            self.waiting.notify_one();
        }
        Ok(())
    }

    fn give_back(&self, epoch: u64, deliveries: Vec<Delivery>) {
        let mut state = self.state();
        if state.epoch == epoch {
            state.give_back(deliveries);
            drop(state);
            self.waiting.notify_one();
        }
    }
}

impl fmt::Debug for Queue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Queue").field("subject", &self.subject).finish_non_exhaustive()
    }
}

/// Wakes another consumer when this one leaves, also when its future is dropped while it waits.
struct WakeNext<'a>(&'a Queue);

impl Drop for WakeNext<'_> {
    fn drop(&mut self) {
        self.0.waiting.notify_one();
    }
}

/// What a queue holds, and its rules.
#[derive(Default)]
struct State {
    ready: VecDeque<Delivery>,
    delayed: BinaryHeap<Delayed>,
    /// Delivered and not settled; they themselves are with the consumers.
    in_hand: usize,
    /// Grows with each loss; what was handed out in an earlier one is no longer known.
    epoch: u64,
    closed: bool,
    stats: Stats,
}

enum Refusal {
    Full,
    Closed,
}

enum Look {
    /// `more`: something is left that another consumer has to look after.
    Taken {
        deliveries: Vec<Delivery>,
        epoch: u64,
        more: bool,
    },
    /// `due`: when the first delay is over.
    Nothing {
        due: Option<Instant>,
    },
    Closed,
}

/// The verdicts on a batch of `hand` envelopes; those in neither list are acknowledged.
struct Settled {
    hand: usize,
    retried: Vec<Delayed>,
    parked: Vec<Parked>,
}

impl State {
    fn depth(&self) -> Depth {
        Depth { ready: self.ready.len(), delayed: self.delayed.len(), in_hand: self.in_hand }
    }

    fn accept(&mut self, frame: Vec<Envelope>, capacity_envelopes: usize) -> Result<(), Refusal> {
        let envelopes = frame.len();
        let refusal = if self.closed {
            Some(Refusal::Closed)
        } else if self.depth().held() + envelopes > capacity_envelopes {
            Some(Refusal::Full)
        } else {
            None
        };
        if let Some(refusal) = refusal {
            self.stats.refused += envelopes as u64;
            return Err(refusal);
        }
        self.ready.extend(frame.into_iter().map(|envelope| Delivery { envelope, count: 1 }));
        self.stats.published += envelopes as u64;
        Ok(())
    }

    fn look(&mut self, max_envelopes: usize, now: Instant) -> Look {
        if self.closed {
            return Look::Closed;
        }
        self.ripen(now);
        if self.ready.is_empty() {
            return Look::Nothing { due: self.delayed.peek().map(|first| first.due) };
        }
        let deliveries: Vec<_> = self.ready.drain(..max_envelopes.min(self.ready.len())).collect();
        self.in_hand += deliveries.len();
        self.stats.delivered += deliveries.len() as u64;
        self.stats.redelivered += deliveries.iter().filter(|delivery| delivery.count > 1).count() as u64;
        let more = !(self.ready.is_empty() && self.delayed.is_empty());
        Look::Taken { deliveries, epoch: self.epoch, more }
    }

    /// Makes ready what was delayed until now.
    fn ripen(&mut self, now: Instant) {
        while self.delayed.peek().is_some_and(|first| first.due <= now) {
            self.ready.extend(self.delayed.pop().map(|first| first.delivery));
        }
    }

    /// Returns the letters to be kept.
    fn settle(&mut self, settled: Settled) -> Vec<Parked> {
        let Settled { hand, retried, parked } = settled;
        self.in_hand -= hand;
        self.stats.acked += (hand - retried.len() - parked.len()) as u64;
        self.stats.parked += parked.len() as u64;
        self.delayed.extend(retried);
        parked
    }

    /// They go to the back: a batch that kills each handler that takes it must not keep the others from the
    /// rest.
    fn give_back(&mut self, deliveries: Vec<Delivery>) {
        self.in_hand -= deliveries.len();
        self.ready.extend(deliveries.into_iter().map(Delivery::again));
    }

    fn forget(&mut self) {
        self.stats.forgotten += self.depth().held() as u64;
        self.ready = VecDeque::new();
        self.delayed = BinaryHeap::new();
        self.in_hand = 0;
        self.epoch += 1;
    }
}

/// An envelope that waits for its next delivery. The greatest is the one that is due first, as [`BinaryHeap`]
/// wants it.
struct Delayed {
    due: Instant,
    delivery: Delivery,
}

impl Delayed {
    fn new(delivery: Delivery, now: Instant, after: Duration) -> Self {
        Self { due: now + after.min(RETRY_DELAY_MAX), delivery: delivery.again() }
    }
}

impl Ord for Delayed {
    fn cmp(&self, other: &Self) -> Ordering {
        other.due.cmp(&self.due)
    }
}

impl PartialOrd for Delayed {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for Delayed {
    fn eq(&self, other: &Self) -> bool {
        self.due == other.due
    }
}

impl Eq for Delayed {}

/// One of the consumers that compete for a queue.
#[derive(Debug)]
pub(crate) struct Consumer(Arc<Queue>);

impl Consumer {
    pub(crate) async fn next(&mut self, max_envelopes: usize) -> Result<Hand, Closed> {
        // A consumer that is always served at once would otherwise never let its thread's other tasks run.
        consume_budget().await;
        self.0.next(max_envelopes).await
    }
}

/// Envelopes handed to a consumer. Empty only once it is settled, on its way to be dropped.
#[derive(Debug)]
pub(crate) struct Hand {
    queue: Arc<Queue>,
    epoch: u64,
    deliveries: Vec<Delivery>,
}

impl Hand {
    pub(crate) fn deliveries(&self) -> &[Delivery] {
        &self.deliveries
    }

    pub(crate) fn settle(mut self, verdicts: Vec<Verdict>) -> Result<(), SettleError> {
        let deliveries = mem::take(&mut self.deliveries);
        self.queue.settle(self.epoch, deliveries, verdicts)
    }

    pub(crate) fn ack_all(mut self) -> Result<(), SettleError> {
        let hand = mem::take(&mut self.deliveries).len();
        self.queue.apply(self.epoch, Settled { hand, retried: Vec::new(), parked: Vec::new() })
    }
}

impl Drop for Hand {
    fn drop(&mut self) {
        if !self.deliveries.is_empty() {
            self.queue.give_back(self.epoch, mem::take(&mut self.deliveries));
        }
    }
}

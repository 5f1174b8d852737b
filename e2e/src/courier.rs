//! A courier between services that have a bus each: it carries every message, and so can do to any of them what a
//! broker, a network or a crash does.
//!
//! Each service publishes to its own bus and takes from it. The courier takes what a service has published for another, asks
//! the test's judge what becomes of it, and publishes it there, in an order of chance: as often as the judge says,
//! each copy put off by some number of messages that pass it. So the buses keep their contract, and the services see
//! repeats, delays, losses and overtaking at every place.
//!
//! What never happens: it carries more at a time than [`LOAD_ENVELOPES`]; it invents a message.

use std::collections::HashSet;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bus::{Bus, Envelope, Subject};
use shop::purchase::{ORCHESTRATOR, PURCHASE_PROGRESS};
use testkit::Dice;
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;
use wire::messages::{Command, Progress, Reply, ToOrchestrator, ToParticipant};

/// Copies that are under way at most. Beyond, the courier takes nothing more from the buses.
const LOAD_ENVELOPES: usize = 4_096;
/// Messages by which a copy is put off at most.
const PUT_OFF_MESSAGES: u64 = 12;
/// With nothing coming in for so long, what was put off is delivered all the same.
const SILENCE: Duration = Duration::from_millis(1);

/// A message on its way.
#[derive(Clone, Debug)]
pub struct Passing {
    /// How many the courier had taken before it.
    pub number: u64,
    /// Where it goes.
    pub subject: Subject,
    /// The message.
    pub envelope: Envelope,
}

impl Passing {
    /// What a participant is asked in it, if it is that.
    pub fn command(&self) -> Option<Command> {
        if [ORCHESTRATOR, PURCHASE_PROGRESS].contains(&self.subject) {
            return None;
        }
        match ToParticipant::decode(self.envelope.body.clone()) {
            Ok(ToParticipant::Command(command)) => Some(command),
            Ok(ToParticipant::Purge(_)) | Err(_) => None,
        }
    }

    /// What a participant has answered in it, if it is that.
    pub fn reply(&self) -> Option<Reply> {
        match ToOrchestrator::decode(self.envelope.body.clone()) {
            Ok(ToOrchestrator::Reply(reply)) if self.subject == ORCHESTRATOR => Some(reply),
            _ => None,
        }
    }

    /// What is reported of a saga in it, if it is that.
    pub fn report(&self) -> Option<Progress> {
        if self.subject == PURCHASE_PROGRESS {
            Progress::decode(self.envelope.body.clone()).ok()
        } else {
            None
        }
    }

    /// Whether it is about no saga, but tells a participant what it may forget.
    pub fn is_purge(&self) -> bool {
        ![ORCHESTRATOR, PURCHASE_PROGRESS].contains(&self.subject) && self.command().is_none()
    }
}

/// What becomes of a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    /// It is delivered so many times; 0 loses it.
    Deliver(u8),
    /// It is kept until [`Courier::take_held`].
    Hold,
}

type Judge = Box<dyn FnMut(&Passing) -> Fate + Send>;

/// From one service's bus to another's.
pub(crate) struct Line {
    pub(crate) subject: Subject,
    pub(crate) from: Bus,
    pub(crate) to: Bus,
}

/// A handle to the courier. Clones share it.
#[derive(Clone)]
pub struct Courier(Arc<Shared>);

struct Shared {
    state: Mutex<State>,
    targets: Vec<(Subject, Bus)>,
    came: Notify,
    left: Notify,
}

struct State {
    judge: Judge,
    dice: Dice,
    taken: u64,
    load: Vec<Copied>,
    held: Vec<Passing>,
}

/// One copy of a message, to be delivered once so many messages have been taken.
struct Copied {
    due: u64,
    subject: Subject,
    envelope: Envelope,
}

impl fmt::Debug for Courier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let State { taken, load, held, .. } = &*self.state();
        write!(f, "Courier(taken {taken}, load {}, held {})", load.len(), held.len())
    }
}

impl Courier {
    /// A courier that delivers everything once, in an order of chance.
    pub(crate) fn start(lines: Vec<Line>, stop: &CancellationToken) -> Courier {
        let mut targets: Vec<(Subject, Bus)> = Vec::new();
        for line in &lines {
            if targets.iter().all(|(subject, _)| *subject != line.subject) {
                targets.push((line.subject, line.to.clone()));
            }
        }
        let state = State {
            judge: Box::new(|_| Fate::Deliver(1)),
            dice: Dice::new(1),
            taken: 0,
            load: Vec::new(),
            held: Vec::new(),
        };
        let (came, left) = (Notify::new(), Notify::new());
        let courier = Courier(Arc::new(Shared { state: Mutex::new(state), targets, came, left }));
        for line in lines {
            tokio::spawn(stop.clone().run_until_cancelled_owned(courier.clone().take_from(line)));
        }
        tokio::spawn(stop.clone().run_until_cancelled_owned(courier.clone().deliver_all()));
        courier
    }

    /// From now on this judge says what becomes of each message.
    pub fn judge(&self, judge: impl FnMut(&Passing) -> Fate + Send + 'static) {
        self.state().judge = Box::new(judge);
    }

    /// From now on everything is delivered once.
    pub fn be_honest(&self) {
        self.judge(|_| Fate::Deliver(1));
    }

    /// From now on what is about a saga and goes to one of these is held, and all else is delivered once.
    pub fn hold(&self, subjects: &[Subject]) {
        let subjects = subjects.to_vec();
        self.judge(move |passing| {
            let held = subjects.contains(&passing.subject) && !passing.is_purge();
            if held { Fate::Hold } else { Fate::Deliver(1) }
        });
    }

    /// From now on everything is delivered once, and so is what was held.
    pub fn release(&self) {
        self.be_honest();
        for Passing { subject, envelope, .. } in self.take_held() {
            self.deliver(subject, envelope);
        }
    }

    /// From now on each message is delivered `least` to `most` times when it is first seen, as the seed will have it. When it
    /// comes again, because what caused it was repeated, most times once and sometimes not at all: were every repetition
    /// repeated, they would multiply from step to step.
    pub fn repeat(&self, seed: u64, least: u8, most: u8) {
        self.state().dice = Dice::new(seed);
        let mut dice = Dice::new(!seed);
        let mut seen = HashSet::new();
        self.judge(move |passing| {
            let times = if seen.insert((passing.subject, passing.envelope.id)) {
                u64::from(least) + dice.below(u64::from(most - least) + 1)
            } else {
                u64::from(dice.chance(75))
            };
            Fate::Deliver(times as u8)
        });
    }

    /// So many more messages fare as before; from then on everything is held.
    pub fn hold_after(&self, messages: u64) {
        let mut state = self.state();
        let until = state.taken + messages;
        let mut before = std::mem::replace(&mut state.judge, Box::new(|_| Fate::Hold));
        state.judge =
            Box::new(move |passing| if passing.number < until { before(passing) } else { Fate::Hold });
    }

    /// How many messages were taken so far.
    pub fn taken(&self) -> u64 {
        self.state().taken
    }

    /// How many messages are held.
    pub fn held(&self) -> usize {
        self.state().held.len()
    }

    /// What is held; it is held no more.
    pub fn take_held(&self) -> Vec<Passing> {
        std::mem::take(&mut self.state().held)
    }

    /// Delivers a message once, without asking the judge.
    pub fn deliver(&self, subject: Subject, envelope: Envelope) {
        let mut state = self.state();
        let due = state.taken;
        state.load.push(Copied { due, subject, envelope });
        drop(state);
        self.0.came.notify_one();
    }

    /// Whether nothing is under way: what is left is held, or in the hands of the services.
    pub fn is_idle(&self) -> bool {
        self.state().load.is_empty()
    }

    /// Everything under way is lost, and everything that is held.
    pub fn forget(&self) {
        let mut state = self.state();
        state.load.clear();
        state.held.clear();
        drop(state);
        self.0.left.notify_waiters();
    }

    async fn take_from(self, line: Line) {
        let mut consumer = line.from.subscribe(line.subject);
        while let Ok(batch) = consumer.next(64).await {
            for delivery in batch.deliveries() {
                self.take(line.subject, delivery.envelope.clone());
            }
            // Forgotten by the bus in the meantime: then it is as if the courier had been a little faster.
            let _ = batch.ack_all().await;
            self.0.came.notify_one();
            loop {
                let room = self.0.left.notified();
                if self.state().load.len() < LOAD_ENVELOPES {
                    break;
                }
                room.await;
            }
        }
    }

    fn take(&self, subject: Subject, envelope: Envelope) {
        let mut state = self.state();
        let State { judge, dice, taken, load, held } = &mut *state;
        let passing = Passing { number: *taken, subject, envelope };
        *taken += 1;
        match judge(&passing) {
            Fate::Hold => held.push(passing),
            Fate::Deliver(times) => {
                for copy in 0..times {
                    let put_off = if times == 1 && copy == 0 { 0 } else { dice.below(PUT_OFF_MESSAGES) };
                    let envelope = passing.envelope.clone();
                    load.push(Copied { due: *taken + put_off, subject, envelope });
                }
            }
        }
    }

    async fn deliver_all(self) {
        loop {
            let Some(Copied { subject, envelope, .. }) = self.next().await else { continue };
            let (_, bus) = self.0.targets.iter().find(|(known, _)| *known == subject).unwrap();
            if bus.publish(subject, vec![envelope.clone()]).await.is_err() {
                // Full: it waits its turn again.
                self.deliver(subject, envelope);
            }
            self.0.left.notify_waiters();
            tokio::task::yield_now().await;
        }
    }

    /// A copy that is due, any of them; after a silence, one that is not.
    async fn next(&self) -> Option<Copied> {
        if let Some(due) = self.pick(true) {
            return Some(due);
        }
        let silent = tokio::time::timeout(SILENCE, self.0.came.notified()).await.is_err();
        if silent { self.pick(false) } else { None }
    }

    fn pick(&self, due_only: bool) -> Option<Copied> {
        let mut state = self.state();
        let State { dice, taken, load, .. } = &mut *state;
        let due: Vec<usize> =
            (0..load.len()).filter(|place| !due_only || load[*place].due <= *taken).collect();
        if due.is_empty() {
            return None;
        }
        let place = due[dice.below(due.len() as u64) as usize];
        Some(load.swap_remove(place))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

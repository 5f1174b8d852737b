//! The test's own hand on the shop's queues at the broker: it publishes what no process of the shop would, and competes for what is meant for
//! them, to pass it on otherwise than it came.

use std::collections::HashSet;

use bus::nats::Settings;
use bus::{Batch, Bus, Consumer, Envelope, Limits, Subject};
use saga::Phase;
use shop::purchase::{INVENTORY_COMMANDS, ORCHESTRATOR, ORDER_COMMANDS, PAYMENT_COMMANDS, PURCHASE_PROGRESS};
use testkit::{Dice, Engines, until};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use wire::messages::{Command, ToParticipant};

use super::SOON;

/// Every queue that the shop has.
pub(crate) const SUBJECTS: [Subject; 5] =
    [ORCHESTRATOR, INVENTORY_COMMANDS, ORDER_COMMANDS, PAYMENT_COMMANDS, PURCHASE_PROGRESS];

/// The ids of what a test has made up have this tag, which no message of the shop has.
pub(crate) const MADE_UP: u64 = 1 << 50;

/// Envelopes that are taken at a time.
const AT_ONCE: usize = 64;
/// Copies of one envelope at most.
const COPIES: u64 = 5;
/// Envelopes in a frame of copies at most: many small ones go to many hands.
const SMALL_FRAME: u64 = 4;
/// Out of a hundred copies, those that what is taken next overtakes.
const PUT_OFF_PERCENT: u64 = 50;

/// Joins the shop's queues, which are left as they are.
pub(crate) async fn join(engines: &Engines) -> Bus {
    let settings = Settings {
        prefix: engines.name().to_owned(),
        queue_bytes: engines.queue_bytes(),
        letter_replicas: 3,
        ..Settings::from_urls(engines.nats()).unwrap()
    };
    Bus::nats(settings, Limits::default(), &SUBJECTS).await.unwrap()
}

/// Waits until nothing is left in any queue, and in nobody's hands.
pub(crate) async fn until_idle(bus: &Bus) {
    for subject in SUBJECTS {
        until(&format!("{subject} is empty"), SOON, async || {
            bus.depth(subject).await.is_ok_and(|depth| depth.held() == 0)
        })
        .await;
    }
}

/// One of the consumers of a queue.
pub(crate) struct Tap {
    bus: Bus,
    subject: Subject,
    consumer: Consumer,
}

impl Tap {
    /// Competes from now on.
    pub(crate) async fn on(engines: &Engines, subject: Subject) -> Tap {
        let bus = join(engines).await;
        Tap { consumer: bus.subscribe(subject), bus, subject }
    }

    /// Takes what comes next: from now on nobody else has it.
    pub(crate) async fn take(&mut self) -> Vec<Envelope> {
        let batch = self.next().await;
        Tap::keep(batch).await
    }

    async fn next(&mut self) -> Batch {
        self.consumer.next(AT_ONCE).await.unwrap()
    }

    async fn keep(batch: Batch) -> Vec<Envelope> {
        let taken = batch.deliveries().iter().map(|delivery| delivery.envelope.clone()).collect();
        batch.ack_all().await.unwrap();
        taken
    }

    /// Publishes a frame.
    pub(crate) async fn put(&self, frame: Vec<Envelope>) {
        self.bus.publish(self.subject, frame).await.unwrap();
    }

    /// Competes no more. What it has not taken goes to others at once.
    pub(crate) async fn close(self) {
        self.bus.close().await;
    }

    /// Passes on what comes until it is a command that is wanted, and keeps that.
    pub(crate) async fn catch(mut self, wanted: Phase) -> (Envelope, Command) {
        loop {
            let mut taken = self.take().await;
            let caught = taken.iter().enumerate().find_map(|(place, envelope)| {
                let command = command(envelope).filter(|command| command.phase == wanted)?;
                Some((place, command))
            });
            let caught = caught.map(|(place, command)| (taken.swap_remove(place), command));
            self.put(taken).await;
            if let Some(caught) = caught {
                self.close().await;
                return caught;
            }
        }
    }
}

/// What a participant is asked in a message, if it is that.
fn command(envelope: &Envelope) -> Option<Command> {
    match ToParticipant::decode(envelope.body.clone()) {
        Ok(ToParticipant::Command(command)) => Some(command),
        Ok(ToParticipant::Purge(_)) | Err(_) => None,
    }
}

/// What was made of messages that were repeated.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Repeated {
    /// Different messages.
    pub(crate) messages: u64,
    /// Copies of them that were published.
    pub(crate) copies: u64,
}

/// Passes on what it gets of all queues 1 to 5 times, in an order of chance.
pub(crate) struct Repeater {
    stop: CancellationToken,
    tasks: Vec<JoinHandle<Repeated>>,
}

impl Repeater {
    /// Begins.
    pub(crate) async fn begin(engines: &Engines, dice: &mut Dice) -> Repeater {
        let (stop, mut tasks) = (CancellationToken::new(), Vec::new());
        for subject in SUBJECTS {
            let tap = Tap::on(engines, subject).await;
            tasks.push(tokio::spawn(repeat(tap, dice.fork(), stop.clone())));
        }
        Repeater { stop, tasks }
    }

    /// Ends, with what was put off on its way. What was made of the messages of each queue.
    pub(crate) async fn end(self) -> Vec<Repeated> {
        self.stop.cancel();
        let ended = futures_util::future::join_all(self.tasks).await;
        ended.into_iter().map(Result::unwrap).collect()
    }
}

async fn repeat(mut tap: Tap, mut dice: Dice, stop: CancellationToken) -> Repeated {
    let (mut seen, mut later, mut repeated) = (HashSet::new(), Vec::new(), Repeated::default());
    while let Some(batch) = stop.run_until_cancelled(tap.next()).await {
        let mut now = std::mem::take(&mut later);
        for envelope in Tap::keep(batch).await {
            // Its own copies come by here, too: they are passed on, or there would be more and more.
            let is_new = seen.insert(envelope.id);
            let copies = if is_new { 1 + dice.below(COPIES) } else { 1 };
            for _ in 0..copies {
                let when = if dice.chance(PUT_OFF_PERCENT) { &mut later } else { &mut now };
                when.insert(dice.below(when.len() as u64 + 1) as usize, envelope.clone());
            }
            repeated.messages += u64::from(is_new);
            repeated.copies += if is_new { copies } else { 0 };
        }
        put_in_small_frames(&tap, now, &mut dice).await;
    }
    put_in_small_frames(&tap, later, &mut dice).await;
    tap.close().await;
    repeated
}

async fn put_in_small_frames(tap: &Tap, mut copies: Vec<Envelope>, dice: &mut Dice) {
    while !copies.is_empty() {
        let size = copies.len().min(1 + dice.below(SMALL_FRAME) as usize);
        tap.put(copies.drain(..size).collect()).await;
    }
}

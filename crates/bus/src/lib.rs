//! Work queues that carry frames of envelopes between services.
//!
//! A [`Subject`] names a work queue. Publishers hand it frames of [`Envelope`]s, competing [`Consumer`]s take
//! whatever is waiting as a [`Batch`], and give a [`Verdict`] on every envelope of it. What an envelope says
//! is none of the bus's business.
//!
//! # The delivery contract
//!
//! Every backend keeps it; `tests/contract` holds a test for each clause and runs it against each backend.
//!
//! 1. **Publishing.** [`Bus::publish`] returns once the bus has taken the frame. A frame is taken whole or
//!    refused whole: a refused one left nothing behind. The one exception is [`PublishError::Unconfirmed`]: between a process and a
//!    server an answer can get lost, and then nobody here knows whether all of it was taken, a part, or nothing. Publishing never waits
//!    for room. Services publish in circles (a command one way, its reply the other), so two that wait for room in each other's
//!    queue would wait for ever; a refusal instead travels back to whoever can still say no, in the end to the customer. Nor does it
//!    wait for servers that are away: it ends within a bounded time.
//! 2. **At least once.** While the bus lives, every envelope taken is delivered until a verdict of
//!    [`Verdict::Ack`] or [`Verdict::Park`] ends it. It may come again after the effects of an earlier
//!    delivery are done, and a backend that cannot see its consumers die may deliver it to a second one while
//!    a slow first one still works on it (the embedded bus sees, and does not): consumers must recognise what
//!    was done.
//! 3. **Order.** None is promised, neither between frames nor within one.
//! 4. **Batches.** A batch is what is waiting, up to the size asked for: never empty, never waited for. It
//!    may join several frames or hold part of one. The verdicts are per envelope: one envelope's fate never
//!    touches that of its neighbours.
//! 5. **Redelivery.** [`Verdict::Retry`] brings the envelope back after its delay, not before. A batch that
//!    is dropped without verdicts (the handler panicked, its task was aborted) comes back whole and at once.
//! 6. **Delivery count.** [`Delivery::count`] is 1 at first and grows by 1 with each delivery. The bus itself
//!    never gives up on an envelope: who handles it decides, by the count, when to park it.
//! 7. **Parking.** [`Verdict::Park`] takes one envelope out and keeps it with the reason among the dead
//!    letters ([`Bus::parked`]). These are bounded: the oldest is dropped, and counted.
//! 8. **Bounds.** A queue holds at most [`Limits::queue_envelopes`], counting what is ready, delayed and in
//!    hand, and refuses what goes beyond. What it took it never drops: an envelope that is retried, or whose
//!    batch was dropped, still occupies its place, so there is always room for it to come back.
//! 9. **Closing.** After [`Bus::close`] publishing is refused and consumers are told [`Closed`] at once, even
//!    if something is ready. Batches in hand can still be settled. What is left goes with the bus, see 10.
//! 10. **Loss.** A bus that dies may forget everything: ready, delayed, in hand, parked ([`Bus::clear`] does
//!     it at will). That is enough because nobody uses the bus as the only place where something is known:
//!     whoever publishes can publish again from its own database, and does so until it sees the outcome.
//!     Hence the embedded bus writes nothing to disk, and no backend's durability is relied upon.
//!
//! # What the embedded bus promises beyond that, and NATS cannot
//!
//! Servers know frames, not envelopes; each process knows only what it did itself; between a decision and its effect lies a
//! network; and a process may die alone. Hence, on NATS:
//!
//! - To 2 and 4: an envelope may come again after its acknowledgement succeeded, if the acknowledgement is lost on its way, if its
//!   process dies before all of its frame has ended, or if the queue has no room for a frame in which a neighbour that is retried could
//!   leave. On the embedded bus it never does.
//! - To 5: what a process held when it died comes again after [`nats::Settings::ack_wait`]. What waited there for a consumer that
//!   takes nothing goes to another after that time, too. A retried envelope comes before its delay is over if the process that is to
//!   put it off dies right then, and `ack_wait` is shorter.
//! - To 6: the count is that of the servers, who count deliveries to processes, and what this process delivered beside that. So it may
//!   jump, and where a process dies it may fall behind. It is good for deciding when to give up, not for counting.
//! - To 7: the letters are those of all processes. [`Stats::letters_dropped`] counts those for which a letter of this one came.
//! - To 8: the bound counts frames, each of them for one however many envelopes it has, and [`nats::Settings::queue_bytes`]. So a queue
//!   takes at least [`Limits::queue_envelopes`] that come one by one, and more that come together.
//! - To 9: the queues live on for others. What waited in this process goes back to them at once.
//! - [`Bus::stats`] tells of this process alone, and [`Bus::depth`] of frames, of which some that count as in hand are delayed.
//!
//! # What never happens
//!
//! A consumer that asks for a batch never sleeps while an envelope is ready, or while it is in this process where there are
//! several ([`Pace`] says when it had better not ask yet). No queue, list or frame grows past its limit. What is settled of a stream that
//! the servers have lost never ends anything of the one that took its place.

mod embedded;
pub mod nats;
mod pace;

use std::fmt;
use std::time::Duration;

use bytes::Bytes;

pub use embedded::Embedded;
pub use nats::Nats;
pub use pace::{Gathering, Pace};

/// The longest delay of [`Verdict::Retry`]; a longer one is cut to it.
pub const RETRY_DELAY_MAX: Duration = Duration::from_secs(24 * 60 * 60);

/// The name of one work queue. Subjects are a closed set known when the program is compiled.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Subject(pub &'static str);

impl fmt::Display for Subject {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.0)
    }
}

/// Says which meaning an envelope has: publishing the same meaning again repeats the id, and two meanings
/// never share one. The bus carries it and promises nothing about repeats; consumers and logs rely on it.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct EnvelopeId(u128);

impl EnvelopeId {
    /// The id of part `tag` of a conversation. Both halves are kept as they are, so the id is unique exactly
    /// when the pair is.
    pub const fn of(conversation: u64, tag: u64) -> Self {
        Self(((conversation as u128) << u64::BITS) | tag as u128)
    }

    /// Both halves as one number, different for each id.
    pub const fn number(self) -> u128 {
        self.0
    }

    /// The two halves that [`EnvelopeId::of`] was given.
    pub const fn parts(self) -> (u64, u64) {
        ((self.0 >> u64::BITS) as u64, self.0 as u64)
    }
}

impl fmt::Display for EnvelopeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (conversation, tag) = self.parts();
        write!(f, "{conversation}.{tag:x}")
    }
}

impl fmt::Debug for EnvelopeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "EnvelopeId({self})")
    }
}

/// One message. Cloning shares the body.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Envelope {
    /// Which meaning this is.
    pub id: EnvelopeId,
    /// The encoded message, opaque to the bus.
    pub body: Bytes,
}

/// The bounds of a bus. In memory, each queue's bodies stay below `queue_envelopes * body_bytes`, the dead letters'
/// below `parked_letters * body_bytes`; on NATS, both below [`nats::Settings::queue_bytes`]. A body may be a slice of a buffer
/// that its publisher filled with several: what is kept keeps that buffer, of 16 KiB at most (`wire::messages::Pen`).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Limits {
    /// Envelopes that one subject's queue holds at most: ready, delayed and in hand. On NATS that many frames.
    pub queue_envelopes: usize,
    /// Envelopes in one published frame at most.
    pub frame_envelopes: usize,
    /// Bytes in one envelope's body at most.
    pub body_bytes: usize,
    /// Dead letters kept at most, over all subjects; 0 keeps none.
    pub parked_letters: usize,
}

impl Default for Limits {
    /// 65,536 envelopes a queue, 1,024 a frame, 64 KiB a body, 1,024 dead letters.
    fn default() -> Self {
        Self { queue_envelopes: 65_536, frame_envelopes: 1_024, body_bytes: 64 * 1024, parked_letters: 1_024 }
    }
}

impl Limits {
    /// Why a frame would always be refused, if it would.
    pub(crate) fn oversize(&self, subject: Subject, frame: &[Envelope]) -> Option<PublishError> {
        if frame.len() > self.frame_envelopes {
            return Some(PublishError::FrameTooLarge {
                subject,
                envelopes: frame.len(),
                limit_envelopes: self.frame_envelopes,
            });
        }
        let envelope = frame.iter().find(|envelope| envelope.body.len() > self.body_bytes)?;
        Some(PublishError::EnvelopeTooLarge {
            subject,
            id: envelope.id,
            bytes: envelope.body.len(),
            limit_bytes: self.body_bytes,
        })
    }
}

/// A bus; cloning gives another handle to the same one. The set of backends is closed.
#[derive(Clone, Debug)]
pub enum Bus {
    /// Queues in this process's memory.
    Embedded(Embedded),
    /// Queues on NATS JetStream.
    Nats(Nats),
}

impl Bus {
    /// A bus in this process's memory.
    ///
    /// # Panics
    /// When a queue could never take a full frame (`frame_envelopes` is 0 or above `queue_envelopes`).
    pub fn embedded(limits: Limits) -> Bus {
        Bus::Embedded(Embedded::new(limits))
    }

    /// A bus on NATS JetStream. `subjects` is the closed list of the queues it has: each gets a stream and a consumer,
    /// made or checked before this returns. Naming any other subject later is a bug, and panics.
    ///
    /// # Errors
    /// When the servers are not reached within [`nats::Settings::start_timeout`], or have streams of these names that cannot be used.
    pub async fn nats(
        settings: nats::Settings,
        limits: Limits,
        subjects: &[Subject],
    ) -> Result<Bus, nats::StartError> {
        Nats::start(settings, limits, subjects).await.map(Bus::Nats)
    }

    /// The bounds this bus keeps, for publishers that cut their output into frames.
    pub fn limits(&self) -> Limits {
        match self {
            Bus::Embedded(bus) => bus.limits(),
            Bus::Nats(bus) => bus.limits(),
        }
    }

    /// For one who publishes to this bus what clients wait for to be accepted. Between servers a quarter of what consumers gather is worth
    /// its wait; in memory nothing is: the clients of a closed loop then wait for each other (4 ms made a fifth less of the purchases).
    pub fn pace_of_clients(&self) -> Pace {
        Pace::new(match self {
            Bus::Embedded(_) => Gathering::NONE,
            Bus::Nats(bus) => bus.gathering().part(4),
        })
    }

    /// For a consumer that lets envelopes gather under load.
    pub fn pace(&self) -> Pace {
        Pace::new(match self {
            Bus::Embedded(_) => Gathering::IN_MEMORY,
            Bus::Nats(bus) => bus.gathering(),
        })
    }

    /// Hands a frame over; returns once the bus has taken all of it. Never waits for room. An empty frame is
    /// taken and is nothing.
    ///
    /// # Errors
    /// When the frame is refused; then no part of it was taken. Or when the bus did not say whether it took it:
    /// [`PublishError::Unconfirmed`]. See [`PublishError`] for what may be tried again.
    pub async fn publish(&self, subject: Subject, frame: Vec<Envelope>) -> Result<(), PublishError> {
        match self {
            Bus::Embedded(bus) => bus.publish(subject, frame),
            Bus::Nats(bus) => bus.publish(subject, frame).await,
        }
    }

    /// Joins the consumers that compete for one subject's envelopes. The queue exists from its first mention
    /// on, so what was published before the first subscription waits for it.
    pub fn subscribe(&self, subject: Subject) -> Consumer {
        match self {
            Bus::Embedded(bus) => Consumer(Backend::Embedded(bus.subscribe(subject))),
            Bus::Nats(bus) => Consumer(Backend::Nats(bus.subscribe(subject))),
        }
    }

    /// The dead letters, oldest first.
    ///
    /// # Errors
    /// When the servers did not answer. The embedded bus always does.
    pub async fn parked(&self) -> Result<Vec<Parked>, Unavailable> {
        match self {
            Bus::Embedded(bus) => Ok(bus.parked()),
            Bus::Nats(bus) => bus.parked().await,
        }
    }

    /// How much one subject's queue holds now.
    ///
    /// # Errors
    /// When the servers did not answer. The embedded bus always does.
    pub async fn depth(&self, subject: Subject) -> Result<Depth, Unavailable> {
        match self {
            Bus::Embedded(bus) => Ok(bus.depth(subject)),
            Bus::Nats(bus) => bus.depth(subject).await,
        }
    }

    /// Whether more than half of what a queue may hold is taken: of its envelopes in memory; on NATS of its frames or of its bytes, which
    /// fill up first. A time to add nothing that can wait.
    ///
    /// # Errors
    /// When the servers did not answer. The embedded bus always does.
    pub async fn is_half_full(&self, subject: Subject) -> Result<bool, Unavailable> {
        match self {
            Bus::Embedded(bus) => Ok(bus.depth(subject).held() > bus.limits().queue_envelopes / 2),
            Bus::Nats(bus) => bus.is_half_full(subject).await,
        }
    }

    /// What has happened through this handle and its clones since it was made, over all subjects.
    pub fn stats(&self) -> Stats {
        match self {
            Bus::Embedded(bus) => bus.stats(),
            Bus::Nats(bus) => bus.stats(),
        }
    }

    /// Forgets everything, as a bus that died would: what is ready, delayed and in hand, and the dead letters. The bus
    /// then goes on, empty. Batches in hand settle into nothing: [`SettleError::Forgotten`]. The counters go on. For tests of
    /// clause 10. The embedded bus does it in one instant.
    ///
    /// # Errors
    /// When the servers did not answer: it may have happened to a part. The embedded bus always does it.
    pub async fn clear(&self) -> Result<(), Unavailable> {
        match self {
            Bus::Embedded(bus) => {
                bus.clear();
                Ok(())
            }
            Bus::Nats(bus) => bus.clear().await,
        }
    }

    /// Ends the bus, see clause 9. Closing again does nothing. Call it when a process stops: what it holds on NATS and has
    /// not begun is then free for others at once.
    pub async fn close(&self) {
        match self {
            Bus::Embedded(bus) => bus.close(),
            Bus::Nats(bus) => bus.close().await,
        }
    }
}

/// One of the competing consumers of a subject.
#[derive(Debug)]
pub struct Consumer(Backend);

/// Which bus a consumer is of.
#[derive(Debug)]
enum Backend {
    Embedded(embedded::Consumer),
    Nats(nats::Consumer),
}

impl Consumer {
    /// Takes what is waiting, at most `max_envelopes`; waits only while there is nothing. Dropping the future
    /// before it is ready loses nothing.
    ///
    /// # Errors
    /// [`Closed`] once the bus is closed, and from then on every time.
    ///
    /// # Panics
    /// When `max_envelopes` is 0.
    pub async fn next(&mut self, max_envelopes: usize) -> Result<Batch, Closed> {
        assert!(max_envelopes > 0, "a batch of at most 0 envelopes was asked for");
        match &mut self.0 {
            Backend::Embedded(consumer) => {
                consumer.next(max_envelopes).await.map(|hand| Batch(Hand::Embedded(hand)))
            }
            Backend::Nats(consumer) => consumer.next(max_envelopes).await.map(|hand| Batch(Hand::Nats(hand))),
        }
    }
}

/// Envelopes in the hand of one consumer, never empty. Dropping the batch without settling brings all of
/// it back at once.
#[derive(Debug)]
#[must_use = "a batch that is dropped comes again"]
pub struct Batch(Hand);

#[derive(Debug)]
enum Hand {
    Embedded(embedded::Hand),
    Nats(nats::Hand),
}

impl Batch {
    /// What was delivered. The verdicts of [`Batch::settle`] go by this order.
    pub fn deliveries(&self) -> &[Delivery] {
        match &self.0 {
            Hand::Embedded(hand) => hand.deliveries(),
            Hand::Nats(hand) => hand.deliveries(),
        }
    }

    /// Ends the batch with one verdict per delivery, in the order of [`Batch::deliveries`].
    ///
    /// # Errors
    /// When the verdicts did not take effect. The caller has nothing to make good: what is still known to the
    /// bus comes again, what is not is published again by its sender.
    ///
    /// # Panics
    /// When there is not exactly one verdict per delivery: a bug in the caller. The batch comes again.
    pub async fn settle(self, verdicts: Vec<Verdict>) -> Result<(), SettleError> {
        assert_eq!(verdicts.len(), self.deliveries().len(), "one verdict is due per delivery");
        match self.0 {
            Hand::Embedded(hand) => hand.settle(verdicts),
            Hand::Nats(hand) => hand.settle(verdicts).await,
        }
    }

    /// [`Batch::settle`] with [`Verdict::Ack`] for each.
    ///
    /// # Errors
    /// As [`Batch::settle`].
    pub async fn ack_all(self) -> Result<(), SettleError> {
        match self.0 {
            Hand::Embedded(hand) => hand.ack_all(),
            Hand::Nats(hand) => hand.ack_all().await,
        }
    }
}

/// One delivery of an envelope.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Delivery {
    /// What was delivered.
    pub envelope: Envelope,
    /// Which delivery of this envelope it is; the first is 1.
    pub count: u32,
}

impl Delivery {
    /// The next delivery of the same envelope.
    pub(crate) fn again(self) -> Self {
        Self { count: self.count.saturating_add(1), ..self }
    }
}

/// What becomes of a delivered envelope.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Verdict {
    /// It is done and never comes again.
    Ack,
    /// It comes again once `after` has passed ([`RETRY_DELAY_MAX`] at most); at once when that is zero.
    Retry {
        /// The least time until the next delivery.
        after: Duration,
    },
    /// It cannot be handled: it becomes a dead letter.
    Park {
        /// Why, for whoever looks at the dead letters.
        reason: String,
    },
}

/// A dead letter.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Parked {
    /// The subject it was taken from.
    pub subject: Subject,
    /// The envelope as it was published.
    pub envelope: Envelope,
    /// How often it had been delivered.
    pub count: u32,
    /// Why its consumer gave up.
    pub reason: String,
}

/// What one queue holds, in envelopes; on NATS in frames, over all processes. The sum is what [`Limits::queue_envelopes`] bounds.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Depth {
    /// Waiting for a consumer, among them retried ones whose delay has passed.
    pub ready: usize,
    /// Waiting for their retry delay to pass. NATS counts them among those in hand.
    pub delayed: usize,
    /// Delivered and not yet settled; on NATS, delivered to a process.
    pub in_hand: usize,
}

impl Depth {
    /// All that occupies a place in the queue.
    pub const fn held(self) -> usize {
        self.ready + self.delayed + self.in_hand
    }
}

/// Counters of a bus in this process since it was made, in envelopes unless said otherwise. At any instant
/// `published = acked + parked + forgotten` + what the queues hold, on the embedded bus.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Stats {
    /// Taken from publishers.
    pub published: u64,
    /// In frames that were refused, for whichever reason.
    pub refused: u64,
    /// Delivered, the first time or again.
    pub delivered: u64,
    /// Delivered again: those of `delivered` whose count was above 1.
    pub redelivered: u64,
    /// Ended by [`Verdict::Ack`].
    pub acked: u64,
    /// Ended by [`Verdict::Park`].
    pub parked: u64,
    /// Dead letters that made room for newer ones.
    pub letters_dropped: u64,
    /// Lost in [`Bus::clear`] before they were settled.
    pub forgotten: u64,
}

impl Stats {
    pub(crate) fn plus(self, other: Stats) -> Stats {
        Stats {
            published: self.published + other.published,
            refused: self.refused + other.refused,
            delivered: self.delivered + other.delivered,
            redelivered: self.redelivered + other.redelivered,
            acked: self.acked + other.acked,
            parked: self.parked + other.parked,
            letters_dropped: self.letters_dropped + other.letters_dropped,
            forgotten: self.forgotten + other.forgotten,
        }
    }
}

/// Why a frame was not taken. But for [`PublishError::Unconfirmed`], no part of it was.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum PublishError {
    /// There is not room for the whole frame now. It may be tried again later.
    #[error("the queue {subject} has no room for the frame (it is made for {capacity_envelopes} envelopes)")]
    Full {
        /// The queue.
        subject: Subject,
        /// [`Limits::queue_envelopes`].
        capacity_envelopes: usize,
    },
    /// The frame is over the limit and would always be refused: cut it.
    #[error("a frame of {envelopes} envelopes for {subject} is above the limit of {limit_envelopes}")]
    FrameTooLarge {
        /// The queue.
        subject: Subject,
        /// Envelopes in the frame.
        envelopes: usize,
        /// [`Limits::frame_envelopes`].
        limit_envelopes: usize,
    },
    /// An envelope in it is over the limit and would always be refused.
    #[error("envelope {id} for {subject} has {bytes} bytes, above the limit of {limit_bytes}")]
    EnvelopeTooLarge {
        /// The queue.
        subject: Subject,
        /// The first such envelope.
        id: EnvelopeId,
        /// Bytes in its body.
        bytes: usize,
        /// [`Limits::body_bytes`].
        limit_bytes: usize,
    },
    /// The servers are not reached: nothing was taken. It may be tried again later.
    #[error("the queue {subject} is out of reach")]
    Unavailable {
        /// The queue.
        subject: Subject,
    },
    /// It is not known whether the frame was taken: all of it, a part, or nothing. It may be tried again later; what was taken
    /// then comes twice.
    #[error("the queue {subject} did not confirm that it took the frame")]
    Unconfirmed {
        /// The queue.
        subject: Subject,
    },
    /// The bus is closed for good.
    #[error("the bus is closed")]
    Closed,
}

impl PublishError {
    /// Whether the same frame may be taken later.
    pub const fn is_transient(&self) -> bool {
        matches!(self, Self::Full { .. } | Self::Unavailable { .. } | Self::Unconfirmed { .. })
    }
}

/// The servers did not answer a question about the bus. They may later.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("the bus's servers did not say {what}: {why}")]
pub struct Unavailable {
    /// What was asked.
    pub what: &'static str,
    /// What happened instead.
    pub why: String,
}

/// Why the verdicts on a batch did not take effect.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum SettleError {
    /// The bus has forgotten the batch (clause 10): there was nothing left to settle.
    #[error("the bus forgot the batch of {subject} before it was settled")]
    Forgotten {
        /// The queue the batch came from.
        subject: Subject,
    },
}

/// The bus is closed: nothing will ever be delivered again.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("the bus is closed")]
pub struct Closed;

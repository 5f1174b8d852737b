//! The bus on NATS JetStream: one stream and one durable consumer for each subject, which all processes share.
//!
//! - A published frame is one message of the stream ([`frame`]), or several where the servers' limit of a message asks for it. Publishing
//!   ends with the stream's acknowledgement ([`send`]).
//! - Frames are pulled by a request that waits at the servers ([`pull`]), and wait in this process until consumers take their envelopes,
//!   joined and divided as they like ([`held`]).
//! - Verdicts on envelopes become the fates of frames ([`hand`]). While a frame is held the servers hear of it, so that it is not
//!   delivered to another process; when this one dies, they do not, and it is.
//! - A stream that is gone is made again ([`watch`]), and is another one then ([`topology`]).
//!
//! What JetStream makes durable or recognises as a duplicate spares work. Nothing rests on it: see clauses 2 and 10 of the contract.

mod frame;
mod hand;
mod held;
mod inspect;
mod link;
mod pull;
mod queue;
mod send;
mod settings;
mod tls;
mod topology;
mod watch;

use std::collections::HashMap;
use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use async_nats::jetstream::consumer::pull::Config as PullConfig;
use async_nats::jetstream::stream::RawMessageErrorKind;
use futures_util::future::join_all;
use futures_util::{StreamExt, TryStreamExt, stream};
use tokio::runtime::Handle;
use tokio::sync::Notify;
use tokio::task::JoinSet;
use tokio::task::coop::consume_budget;
use tokio::time::{Instant, sleep, timeout};

pub(crate) use hand::Hand;
pub use inspect::{Found, Inspection, JetStream, Stream, inspect, streams_bytes};
pub use settings::{Identity, Login, Settings, Storage, Tls};

use crate::{Closed, Depth, Envelope, Gathering, Limits, Parked, PublishError, Stats, Subject, Unavailable};
use frame::Letter;
use link::Link;
use queue::{Queue, To};
use send::NotSent;
use topology::{Existing, Plan, Topology, Trouble};

/// The pause before a stream is asked for again at the start.
const START_AGAIN: Duration = Duration::from_millis(200);
/// How long a closing bus waits for what the servers still deliver.
const CLOSE_FOR: Duration = Duration::from_secs(4);
/// How long it takes at most until a deleted stream is replaced.
const CLEAR_FOR: Duration = Duration::from_secs(30);
/// The pause before it is looked again whether a deleted stream is gone.
const CLEAR_AGAIN: Duration = Duration::from_millis(50);
/// Dead letters that are asked for at a time.
const LETTERS_AT_ONCE: usize = 32;

/// A handle to a bus on NATS. Made by [`crate::Bus::nats`].
#[derive(Clone)]
pub struct Nats(Arc<Owner>);

/// Ends the tasks of a bus with its last handle or consumer.
struct Owner(Arc<Shared>);

impl Drop for Owner {
    fn drop(&mut self) {
        self.0.tasks.lock().unwrap_or_else(PoisonError::into_inner).abort_all();
    }
}

/// What all parts of a bus share.
struct Shared {
    settings: Settings,
    limits: Limits,
    link: Link,
    queues: HashMap<Subject, Arc<Queue>>,
    /// None where no dead letters are kept.
    letters: Option<Plan>,
    letters_dropped: AtomicU64,
    is_closed: AtomicBool,
    /// Holds a permit when something on the servers may not be as it should.
    in_doubt: Notify,
    runtime: Handle,
    tasks: Mutex<JoinSet<()>>,
}

impl Nats {
    pub(crate) async fn start(
        settings: Settings,
        limits: Limits,
        subjects: &[Subject],
    ) -> Result<Self, StartError> {
        settings.check()?;
        let deadline = Instant::now() + settings.start_timeout;
        let Topology { queues, letters } = topology::plan(&settings, &limits, subjects)?;
        let link = Link::connect(&settings, deadline).await?;
        check_limits(&limits, link.message_bytes())?;
        let queues = queues.into_iter().map(|(subject, plan)| (subject, Arc::new(Queue::new(subject, plan))));
        let shared = Arc::new(Shared {
            queues: queues.collect(),
            settings,
            limits,
            link,
            letters,
            letters_dropped: AtomicU64::new(0),
            is_closed: AtomicBool::new(false),
            in_doubt: Notify::new(),
            runtime: Handle::current(),
            tasks: Mutex::default(),
        });
        let bus = Nats(Arc::new(Owner(Arc::clone(&shared))));
        shared.set_up().await?;
        shared.be_near().await;
        shared.spawn(watch::run(Arc::clone(&shared)));
        Ok(bus)
    }

    fn shared(&self) -> &Arc<Shared> {
        &self.0.0
    }

    pub(crate) fn limits(&self) -> Limits {
        self.shared().limits
    }

    pub(crate) fn gathering(&self) -> Gathering {
        self.shared().settings.gathering
    }

    pub(crate) async fn publish(&self, subject: Subject, frame: Vec<Envelope>) -> Result<(), PublishError> {
        if frame.is_empty() {
            return Ok(());
        }
        let shared = self.shared();
        let queue = shared.queue(subject);
        let published = match shared.limits.oversize(subject, &frame) {
            _ if shared.is_closed.load(Ordering::Relaxed) => Err(PublishError::Closed),
            Some(refusal) => Err(refusal),
            None => shared
                .publish(queue, &frame)
                .await
                .map_err(|why| why.on(subject, shared.limits.queue_envelopes)),
        };
        let counter = if published.is_ok() { &queue.published } else { &queue.refused };
        counter.fetch_add(frame.len() as u64, Ordering::Relaxed);
        published
    }

    pub(crate) fn subscribe(&self, subject: Subject) -> Consumer {
        let queue = self.shared().queue(subject);
        pull::start(self.shared(), queue);
        queue.held.joined();
        Consumer { bus: self.clone(), queue: Arc::clone(queue) }
    }

    pub(crate) async fn parked(&self) -> Result<Vec<Parked>, Unavailable> {
        self.shared().parked().await.map_err(|why| Unavailable { what: "its dead letters", why })
    }

    pub(crate) async fn depth(&self, subject: Subject) -> Result<Depth, Unavailable> {
        let shared = self.shared();
        let queue = shared.queue(subject);
        shared.depth(queue).await.map_err(|why| Unavailable { what: "how much a queue holds", why })
    }

    pub(crate) async fn is_half_full(&self, subject: Subject) -> Result<bool, Unavailable> {
        let shared = self.shared();
        let queue = shared.queue(subject);
        shared.is_half_full(queue).await.map_err(|why| Unavailable { what: "how full a queue is", why })
    }

    pub(crate) fn stats(&self) -> Stats {
        let shared = self.shared();
        let mut sum = Stats::default();
        for queue in shared.queues.values() {
            sum = sum.plus(Stats {
                published: queue.published.load(Ordering::Relaxed),
                refused: queue.refused.load(Ordering::Relaxed),
                ..queue.held.stats()
            });
        }
        sum.letters_dropped = shared.letters_dropped.load(Ordering::Relaxed);
        sum
    }

    pub(crate) async fn clear(&self) -> Result<(), Unavailable> {
        self.shared().clear().await.map_err(|why| Unavailable { what: "that they have forgotten", why })
    }

    pub(crate) async fn close(&self) {
        let shared = self.shared();
        shared.is_closed.store(true, Ordering::Relaxed);
        shared.in_doubt.notify_one();
        for queue in shared.queues.values() {
            queue.held.close();
        }
        let pulled = shared.queues.values().filter(|queue| queue.is_pulled.load(Ordering::Relaxed));
        let drained = join_all(pulled.map(|queue| async {
            // An error would mean that the queue is gone.
            let _ = queue.drained.subscribe().wait_for(|drained| *drained).await;
        }));
        let _ = timeout(CLOSE_FOR, drained).await;
        shared.link.flush(CLOSE_FOR).await;
    }
}

impl fmt::Debug for Nats {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Shared { settings, limits, .. } = &**self.shared();
        f.debug_struct("Nats").field("settings", settings).field("limits", limits).finish_non_exhaustive()
    }
}

impl Shared {
    fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) {
        self.tasks.lock().unwrap_or_else(PoisonError::into_inner).spawn_on(task, &self.runtime);
    }

    fn queue(&self, subject: Subject) -> &Arc<Queue> {
        match self.queues.get(&subject) {
            Some(queue) => queue,
            None => panic!("{subject} is not among the subjects of this bus"),
        }
    }

    /// Makes or checks all that the bus needs on the servers.
    async fn set_up(&self) -> Result<(), StartError> {
        let deadline = Instant::now() + self.settings.set_up_timeout;
        for done in join_all(self.streams().into_iter().map(|stream| self.insist(stream, deadline))).await {
            done?;
        }
        Ok(())
    }

    /// Has the connection with the server that keeps what this process takes from, if there is such a one and it is known.
    async fn be_near(&self) {
        let Some(queue) = self.settings.near.and_then(|subject| self.queues.get(&subject)) else { return };
        let Some(consumer) = queue.consumer() else { return };
        if let Ok(Some(leader)) = topology::leader(&self.link.jetstream, &queue.plan, &consumer).await {
            self.link.be_near(&leader, &self.settings).await;
        }
    }

    /// Looks at a stream until it is as it should be. One that does not answer is given up when it is time for that and not before, however
    /// short the start is: most are slow, and others live on what is in them. But nobody else may be there to do it.
    async fn insist(&self, on: To<'_>, deadline: Instant) -> Result<(), StartError> {
        let stream = on.plan().name();
        let mut silent_since = None;
        loop {
            let began = Instant::now();
            let why = match self.look_at(on, Existing::Change).await {
                Ok(()) => return Ok(()),
                Err(Trouble::Unanswered(why)) if Instant::now() < deadline => why,
                Err(trouble) => {
                    return Err(StartError::Stream { stream: stream.to_owned(), why: trouble.to_string() });
                }
            };
            if silent_since.is_none() {
                tracing::info!(stream, why, "a stream is not there yet");
            }
            let since = *silent_since.get_or_insert(began);
            if self.may_abandon(on, since) {
                self.abandon(on).await;
                silent_since = None;
            }
            sleep(START_AGAIN).await;
        }
    }

    /// Sends a frame in as many messages as it takes. If one was taken and another not, the outcome is not known.
    async fn publish(&self, queue: &Queue, frame: &[Envelope]) -> Result<(), NotSent> {
        let parcels = frame.iter().map(|envelope| (envelope, 0));
        let mut messages =
            frame::encode(Duration::ZERO, parcels, self.limits.frame_envelopes, self.link.message_bytes());
        if messages.len() == 1
            && let Some(only) = messages.pop()
        {
            return self.send(To::Queue(queue), only.payload).await.map(drop);
        }
        let sent =
            join_all(messages.into_iter().map(|message| self.send(To::Queue(queue), message.payload))).await;
        sent.into_iter().map(|sent| sent.map(drop)).reduce(NotSent::and).unwrap_or(Ok(()))
    }

    async fn depth(&self, queue: &Queue) -> Result<Depth, String> {
        let Some(consumer) = queue.consumer() else { return Ok(Depth::default()) };
        let found =
            self.link.jetstream.get_consumer_from_stream::<PullConfig, _, _>(consumer, queue.plan.name());
        let found = found.await.map_err(|error| error.to_string())?;
        let info = found.cached_info();
        let ready = usize::try_from(info.num_pending).unwrap_or(usize::MAX);
        Ok(Depth { ready, delayed: 0, in_hand: info.num_ack_pending })
    }

    async fn is_half_full(&self, queue: &Queue) -> Result<bool, String> {
        let found = self.link.jetstream.get_stream(queue.plan.name()).await;
        let found = found.map_err(|error| error.to_string())?;
        let info = found.cached_info();
        // A limit below 0 is none.
        let is_over_half = |taken: u64, limit: i64| u64::try_from(limit).is_ok_and(|limit| taken > limit / 2);
        Ok(is_over_half(info.state.messages, info.config.max_messages)
            || is_over_half(info.state.bytes, info.config.max_bytes))
    }

    async fn parked(&self) -> Result<Vec<Parked>, String> {
        let Some(plan) = &self.letters else { return Ok(Vec::new()) };
        let found = self.link.jetstream.get_stream(plan.name()).await;
        let found = match found {
            Ok(found) => found,
            Err(error) if topology::is_missing(&error) => return Ok(Vec::new()),
            Err(error) => return Err(error.to_string()),
        };
        let state = &found.cached_info().state;
        if state.messages == 0 {
            return Ok(Vec::new());
        }
        let letters = stream::iter(state.first_sequence..=state.last_sequence).map(|place| {
            let found = &found;
            async move {
                match found.get_raw_message(place).await {
                    Ok(message) => Ok(self.parked_as(&message.payload)),
                    // It has made room for a newer one meanwhile.
                    Err(error) if error.kind() == RawMessageErrorKind::NoMessageFound => Ok(None),
                    Err(error) => Err(error.to_string()),
                }
            }
        });
        letters
            .buffered(LETTERS_AT_ONCE)
            .try_filter_map(|letter| async move { Ok(letter) })
            .try_collect()
            .await
    }

    /// None for a letter of another program, or of another version of this one.
    fn parked_as(&self, message: &bytes::Bytes) -> Option<Parked> {
        let letter = match Letter::decode(message) {
            Ok(letter) => letter,
            Err(error) => {
                tracing::warn!(%error, "a dead letter cannot be read");
                return None;
            }
        };
        let Some(subject) = self.queues.keys().find(|subject| subject.0 == letter.subject) else {
            tracing::warn!(subject = letter.subject, "a dead letter is of a subject that is not known here");
            return None;
        };
        let Letter { reason, delivery, .. } = letter;
        Some(Parked { subject: *subject, envelope: delivery.envelope, count: delivery.count, reason })
    }

    /// Deletes all streams and makes them again: they are others then, and what was held of the old ones is forgotten.
    async fn clear(&self) -> Result<(), String> {
        let deadline = Instant::now() + CLEAR_FOR;
        let replaced = self.streams().into_iter().map(|stream| self.replace(stream, deadline));
        for replaced in join_all(replaced).await {
            replaced.map_err(|trouble| trouble.to_string())?;
        }
        Ok(())
    }

    async fn replace(&self, stream: To<'_>, deadline: Instant) -> Result<(), Trouble> {
        let (jetstream, plan) = (&self.link.jetstream, stream.plan());
        // Nobody else looks meanwhile, and finds the old one.
        let _looking = match stream {
            To::Queue(queue) => Some(queue.checked.lock().await),
            To::Letters(_) => None,
        };
        let old = topology::made(jetstream, plan).await?;
        topology::delete_stream(jetstream, plan).await?;
        let until_then = |trouble| if Instant::now() < deadline { Ok(()) } else { Err(trouble) };
        let made = loop {
            match topology::ensure_stream(jetstream, plan, Existing::Leave).await {
                Ok(made) if Some(made) != old => break made,
                // For a moment, some server may still say that the old one is there, or say nothing.
                Ok(_) => until_then(Trouble::Unanswered("the old stream is still there".to_owned()))?,
                Err(trouble) => until_then(trouble)?,
            }
            sleep(CLEAR_AGAIN).await;
        };
        let To::Queue(queue) = stream else { return Ok(()) };
        let consumer = loop {
            match topology::ensure_consumer(jetstream, plan, made, &self.settings).await {
                Ok(consumer) => break consumer,
                Err(trouble) => until_then(trouble)?,
            }
            sleep(CLEAR_AGAIN).await;
        };
        queue.has_consumer(&consumer);
        Ok(())
    }
}

/// Refuses bounds that cannot be kept on these servers.
fn check_limits(limits: &Limits, message_bytes: usize) -> Result<(), StartError> {
    let Limits { queue_envelopes, frame_envelopes, body_bytes, .. } = *limits;
    let bad =
        |setting, value: usize, why| Err(StartError::BadSetting { setting, value: value.to_string(), why });
    if !(1..=queue_envelopes).contains(&frame_envelopes) {
        return bad(
            "frame_envelopes",
            frame_envelopes,
            format!("it is from 1 to queue_envelopes = {queue_envelopes}"),
        );
    }
    let largest = frame::bytes_for_one(body_bytes);
    if largest > message_bytes {
        let why = format!("the servers take messages of {message_bytes} bytes: raise their max_payload");
        return bad("body_bytes", body_bytes, why);
    }
    Ok(())
}

/// One of the consumers that compete for a queue.
pub(crate) struct Consumer {
    bus: Nats,
    queue: Arc<Queue>,
}

impl Consumer {
    pub(crate) async fn next(&mut self, max_envelopes: usize) -> Result<Hand, Closed> {
        // A consumer that is always served at once would otherwise never let its thread's other tasks run.
        consume_budget().await;
        let taken = self.queue.held.next(max_envelopes).await?;
        Ok(Hand::new(Arc::clone(self.bus.shared()), Arc::clone(&self.queue), taken))
    }
}

impl Drop for Consumer {
    fn drop(&mut self) {
        self.queue.held.left();
    }
}

impl fmt::Debug for Consumer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Consumer").field("subject", &self.queue.subject).finish_non_exhaustive()
    }
}

/// Why a bus on NATS did not start.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum StartError {
    /// There is nothing to connect to.
    #[error("no NATS server is configured")]
    NoServers,
    /// An address is not understood.
    #[error("{server:?} is not the address of a NATS server: {why}")]
    BadServer {
        /// The address, without any login.
        server: String,
        /// What is wrong with it.
        why: String,
    },
    /// A setting has a value that cannot work.
    #[error("the setting {setting} = {value} of the NATS bus cannot work: {why}")]
    BadSetting {
        /// The field of [`Settings`] or [`Limits`].
        setting: &'static str,
        /// Its value.
        value: String,
        /// The rule that it breaks.
        why: String,
    },
    /// A subject cannot have a stream of its own.
    #[error("the subject {:?} cannot have a stream on NATS: {why}", subject.0)]
    BadSubject {
        /// The subject.
        subject: Subject,
        /// What is wrong with it.
        why: String,
    },
    /// No server answered in time.
    #[error("no NATS server among {servers:?} let us in within {waited:?}: {why}")]
    Unreachable {
        /// The servers.
        servers: Vec<String>,
        /// [`Settings::start_timeout`].
        waited: Duration,
        /// What the last attempt met.
        why: String,
    },
    /// A stream is not there, and was not made in time; or it is there, differs from what is asked for, and cannot be changed into it.
    #[error("the stream {stream} on the NATS servers cannot be used: {why}")]
    Stream {
        /// Its name.
        stream: String,
        /// What the servers said, and what differs.
        why: String,
    },
}

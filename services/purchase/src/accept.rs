//! Accepting purchases: one local transaction for all that wait, then their sagas are started.
//!
//! What is written is the intent and the outbox in one. Once it is committed the purchase is accepted, whether or not the bus
//! takes its start: the reconciler publishes the start of whatever is open and due.
//!
//! Where other replicas accept into the same database, two may be asked for the same key at once: the unique key makes one of
//! their transactions fail, and it is run again, to find what the other accepted.
//!
//! There is one batch at a time. If it is stuck, most likely because the database does not answer or nobody can tell whether a commit
//! happened, those behind it are refused after a while instead of waiting as long as it does.
//!
//! What never happens: a 201 before the commit, an effect of a request that was refused, two purchases for one customer and key.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use bus::{Bus, Envelope, EnvelopeId};
use db::Db;
use db::ids::Ids;
use drive::{Book, Frames, Outgoing, Refusal};
use saga::Mode;
use shop::purchase::{ORCHESTRATOR, PURCHASE_SAGA, PURCHASE_SAGA_VERSION, Purchase};
use telemetry::Spans;
use telemetry::spans::{Cause, Detail, Handling, Kind, within};
use tokio::sync::{mpsc, oneshot};
use tokio::time::{Instant, timeout};
use wire::messages::{About, Pen};
use wire::time::{Clock, UnixMillis};

use crate::admission::Place;
use crate::live::Live;
use crate::metrics::SagaMetrics;
use crate::store::{self, Key, NewPurchase, OpenPurchase};

/// A request to be accepted: checked, priced and admitted.
#[derive(Debug)]
pub(crate) struct Request {
    pub(crate) purchase: Purchase,
    pub(crate) key: Option<Key>,
    pub(crate) trace: String,
    /// Kept if it becomes a purchase, and given back otherwise.
    pub(crate) place: Place,
}

/// What became of a request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Accepted {
    /// It is this purchase.
    As(u64),
    /// Its key belongs to this purchase, which was another request.
    OtherRequest(u64),
}

/// Why a request was not accepted. It had no effect, but where the outcome of the transaction is not known
/// ([`db::Error::OutcomeUnknown`]): then it may be accepted all the same, and whoever asks again under its key is told.
#[derive(Clone, Debug, thiserror::Error)]
pub(crate) enum NotAccepted {
    /// More requests wait than may.
    #[error("{bound_requests} requests are waiting")]
    QueueFull {
        /// The bound.
        bound_requests: usize,
    },
    /// The batch before this request has been under way for too long.
    #[error("the purchases before this one have taken over {patience_seconds} s to be accepted")]
    Stuck {
        /// How long is waited.
        patience_seconds: u64,
    },
    /// The service is stopping.
    #[error("the service is stopping")]
    Stopping,
    /// No ids could be had.
    #[error(transparent)]
    Ids(#[from] db::ids::IdsError),
    /// The database failed.
    #[error(transparent)]
    Database(#[from] db::Error),
}

/// The bounds of accepting.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Settings {
    /// Requests in one transaction at most. Under load they gather for as long as the bus says ([`Bus::pace_of_clients`]), otherwise never.
    pub(crate) batch_requests: usize,
    /// Requests that may wait.
    pub(crate) queue_requests: usize,
    /// How long a batch may be under way before those who wait behind it are refused.
    pub(crate) patience: Duration,
    /// The time after which a purchase that has not been decided is cancelled.
    pub(crate) deadline: Duration,
    /// The time after which the reconciler looks after a purchase for the first time.
    pub(crate) first_wake: Duration,
}

/// How often a batch is tried again because another replica has accepted one of its keys in the meantime: each time at least one key
/// more is known. The database has run it again a few times itself by then.
const MAX_RERUNS: u32 = 4;

type Waiting = (Request, oneshot::Sender<Result<Accepted, NotAccepted>>);

/// A handle to the task that accepts.
#[derive(Clone, Debug)]
pub(crate) struct Accept {
    queue: mpsc::Sender<Waiting>,
    bound_requests: usize,
}

impl Accept {
    /// Waits for a request to be accepted or refused.
    pub(crate) async fn accept(&self, request: Request) -> Result<Accepted, NotAccepted> {
        let (answer, answered) = oneshot::channel();
        self.queue.try_send((request, answer)).map_err(|refused| match refused {
            mpsc::error::TrySendError::Full(_) => {
                NotAccepted::QueueFull { bound_requests: self.bound_requests }
            }
            mpsc::error::TrySendError::Closed(_) => NotAccepted::Stopping,
        })?;
        answered.await.unwrap_or(Err(NotAccepted::Stopping))
    }
}

/// What the task works with.
pub(crate) struct Parts {
    pub(crate) db: Db,
    pub(crate) ids: Ids,
    pub(crate) bus: Bus,
    pub(crate) book: Book,
    pub(crate) clock: Clock,
    pub(crate) live: Live,
    pub(crate) metrics: SagaMetrics,
    pub(crate) spans: Spans,
    pub(crate) settings: Settings,
}

/// Starts the task. It ends when the last handle is dropped, with everything that waited accepted.
pub(crate) fn start(parts: Parts) -> (Accept, impl Future<Output = ()> + Send) {
    let bound_requests = parts.settings.queue_requests;
    let (queue, mut waiting) = mpsc::channel(bound_requests);
    let task = async move {
        let limit = parts.settings.batch_requests.min(parts.bus.limits().frame_envelopes);
        let mut batch = Vec::with_capacity(limit);
        let mut pace = parts.bus.pace_of_clients();
        // While a batch is being written, the next one gathers.
        while waiting.recv_many(&mut batch, limit).await > 0 {
            pace.took(batch.len(), limit, Instant::now());
            let patience = parts.settings.patience;
            unless_stuck(parts.work_off(&mut batch), patience, &mut waiting, |(request, answer)| {
                // Its place is free before it is told so.
                drop(request);
                // Whoever asked may have gone.
                let _ = answer.send(Err(NotAccepted::Stuck { patience_seconds: patience.as_secs() }));
            })
            .await;
            pace.gather().await;
        }
    };
    (Accept { queue, bound_requests }, task)
}

/// Waits for a batch. From the time on when it has taken longer than `patience`, and until it is over, whoever waits or comes is
/// refused.
async fn unless_stuck<T>(
    batch: impl Future<Output = ()>,
    patience: Duration,
    waiting: &mut mpsc::Receiver<T>,
    mut refuse: impl FnMut(T),
) {
    let mut batch = pin!(batch);
    if timeout(patience, &mut batch).await.is_ok() {
        return;
    }
    let mut refused = 0_u64;
    loop {
        tokio::select! {
            biased;
            () = &mut batch => break,
            Some(one) = waiting.recv() => {
                refuse(one);
                refused += 1;
            }
        }
    }
    tracing::warn!(refused, "a batch of purchases was under way for long; those behind it were refused");
}

/// A request without its place.
type Wanted = (Purchase, Option<Key>, String);

/// What a batch was accepted as.
struct Committed {
    /// One for each request, in their order.
    accepted: Vec<Accepted>,
    /// Likewise: whether it is a new purchase.
    is_new: Vec<bool>,
    /// The rows as the new ones were inserted.
    rows: Arc<Vec<NewPurchase>>,
    /// The number of an end before all of theirs.
    after: u64,
}

impl Parts {
    async fn work_off(&self, batch: &mut Vec<Waiting>) {
        let count = batch.len();
        let (mut requests, mut places) = (Vec::with_capacity(count), Vec::with_capacity(count));
        let mut answers = Vec::with_capacity(count);
        let mut traced = self.spans.handle(count);
        for (Request { purchase, key, trace, place }, answer) in batch.drain(..) {
            traced.add(requests.len(), trace.as_bytes(), Cause::Span);
            requests.push((purchase, key, trace));
            places.push(place);
            answers.push(answer);
        }
        self.metrics.accept_batch(requests.len());
        match within(traced.current(), self.commit(requests)).await {
            Ok(Committed { accepted, is_new, rows, after }) => {
                failpoint::hit("purchase.accept.committed");
                // A repeated request was admitted on top of the purchase that it repeats.
                let new_places = places.into_iter().zip(&is_new).filter(|(_, is_new)| **is_new);
                new_places.for_each(|(place, _)| place.keep());
                for (answer, accepted) in answers.into_iter().zip(accepted) {
                    // Whoever asked may have gone; the purchase is accepted all the same.
                    let _ = answer.send(Ok(accepted));
                }
                within(traced.current(), self.begin(after, &rows, &is_new, &mut traced)).await;
            }
            Err(error) => {
                drop(places);
                traced.failed("not accepted");
                tracing::warn!(%error, requests = answers.len(), "purchases were not accepted");
                for answer in answers {
                    let _ = answer.send(Err(error.clone()));
                }
            }
        }
        traced.end(Kind::Internal, "accept", &[]);
    }

    /// Accepts a batch in one transaction.
    async fn commit(&self, requests: Vec<Wanted>) -> Result<Committed, NotAccepted> {
        let now = self.clock.now();
        let count = u32::try_from(requests.len()).unwrap_or(u32::MAX);
        let ids = self.ids.take(count).await?;
        let wanted: Arc<Vec<NewPurchase>> = Arc::new(
            requests.into_iter().zip(ids).map(|(request, id)| self.new_purchase(request, id, now)).collect(),
        );
        let after = self.live.announced();
        let mut reruns = 0;
        let (accepted, is_new) = loop {
            match self.write(Arc::clone(&wanted)).await {
                Err(error) if reruns < MAX_RERUNS && store::is_key_taken(&error) => reruns += 1,
                written => break written?,
            }
        };
        Ok(Committed { accepted, is_new, rows: wanted, after })
    }

    /// Writes those that are new; what each is accepted as, and whether it is new.
    async fn write(&self, rows: Arc<Vec<NewPurchase>>) -> Result<(Vec<Accepted>, Vec<bool>), db::Error> {
        let write = move |tx: &mut db::Tx<'_>| {
            let keys = rows.iter().filter_map(|row| Some((row.customer_id, row.key.as_ref()?.key.as_str())));
            let earlier = store::by_keys(tx, keys)?;
            let (accepted, is_new) = sort_out(&rows, earlier);
            store::insert(tx, new(&rows, &is_new).map(|(_, row)| row))?;
            failpoint::hit("purchase.accept.before_commit");
            Ok((accepted, is_new))
        };
        self.db.write(write).await
    }

    fn new_purchase(&self, wanted: Wanted, id: u64, now: UnixMillis) -> NewPurchase {
        let (purchase, key, trace) = wanted;
        let Settings { deadline, first_wake, .. } = self.settings;
        let deadline_at = now.saturating_add(millis(deadline));
        NewPurchase {
            id,
            customer_id: purchase.customer_id,
            key,
            input: purchase.to_input(),
            trace,
            created_at: now,
            deadline_at,
            next_wake_at: now.saturating_add(millis(first_wake)).min(deadline_at),
        }
    }

    /// Starts the sagas of those of a batch that are new. If the bus does not take that now, the reconciler starts them later.
    async fn begin(&self, after: u64, rows: &[NewPurchase], is_new: &[bool], traced: &mut Handling) {
        let opened: Vec<OpenPurchase> = new(rows, is_new)
            .map(|(_, new)| OpenPurchase {
                id: new.id,
                customer_id: new.customer_id,
                created_at: new.created_at,
            })
            .collect();
        let count = opened.len();
        if count == 0 {
            return;
        }
        self.metrics.started(count);
        if self.live.opened(after, opened).await.is_err() {
            tracing::debug!("nobody watches purchases any more: the service is stopping");
        }
        let mut frames = Frames::of_batch(rows.len(), &self.bus);
        let mut pen = Pen::for_messages(count);
        for (place, new) in new(rows, is_new) {
            traced.detail(place, "saga.id", || Detail::Count(new.id));
            match frames.add(place, self.first_messages(new, &mut pen), traced) {
                Ok(()) => tracing::debug!(purchase = new.id, trace = new.trace, "a purchase was accepted"),
                Err(large) => {
                    tracing::error!(purchase = new.id, trace = new.trace, %large, "a purchase cannot be started");
                }
            }
        }
        for Refusal { error, causes } in frames.publish(&self.bus, self.metrics.accept(), traced).await {
            tracing::warn!(refused = %error, purchases = causes.len(), "accepted purchases will be started later");
        }
        failpoint::hit("purchase.accept.published");
    }

    /// What starts a purchase's saga: its first command, or word to an orchestrator when the saga is not in the book.
    fn first_messages(&self, new: &NewPurchase, pen: &mut Pen) -> [Option<Outgoing>; 2] {
        let about = about(new.created_at, &new.input, &new.trace);
        match self.book.start(new.id, Mode::Execute, &about, pen) {
            Some(messages) => messages.outgoing(),
            None => {
                let envelope = start_message(new.id, Mode::Execute, &about, pen);
                [None, Some(Outgoing { subject: ORCHESTRATOR, envelope, may_be_lost: false })]
            }
        }
    }
}

/// Those of the rows that are new, with their places.
fn new<'r>(rows: &'r [NewPurchase], is_new: &'r [bool]) -> impl Iterator<Item = (usize, &'r NewPurchase)> {
    rows.iter().enumerate().filter(|(place, _)| is_new[*place])
}

/// What each request is accepted as, and whether it is new. Requests of one batch may repeat each other.
fn sort_out(
    rows: &[NewPurchase],
    mut earlier: HashMap<(u64, String), store::Earlier>,
) -> (Vec<Accepted>, Vec<bool>) {
    let one = |row: &NewPurchase| {
        let Some(key) = &row.key else { return (Accepted::As(row.id), true) };
        match earlier.entry((row.customer_id, key.key.clone())) {
            Entry::Occupied(found) => (repeated(key, found.get()), false),
            Entry::Vacant(free) => {
                free.insert(store::Earlier { id: row.id, request_hash: key.request_hash.to_vec() });
                (Accepted::As(row.id), true)
            }
        }
    };
    rows.iter().map(one).unzip()
}

/// What a request is whose key was used before.
pub(crate) fn repeated(key: &Key, earlier: &store::Earlier) -> Accepted {
    if earlier.request_hash[..] == key.request_hash[..] {
        Accepted::As(earlier.id)
    } else {
        Accepted::OtherRequest(earlier.id)
    }
}

/// What a purchase's saga is about.
pub(crate) fn about(created_at: UnixMillis, input: &[u8], trace: &str) -> About {
    About::new(PURCHASE_SAGA, PURCHASE_SAGA_VERSION, created_at, input, trace.as_bytes())
}

/// Word to an orchestrator that a saga is to be started. The same saga in the same mode is the same message, however often it is
/// published.
pub(crate) fn start_message(id: u64, mode: Mode, about: &About, pen: &mut Pen) -> Envelope {
    let token = saga::Token { saga: id, mode, path: saga::Path::new() };
    Envelope { id: EnvelopeId::of(id, mode as u64), body: pen.start(&token, about) }
}

pub(crate) fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(id: u64, customer_id: u64, key: Option<(&str, u8)>) -> NewPurchase {
        let key = key.map(|(key, hash)| Key { key: key.to_owned(), request_hash: [hash; 32] });
        let (input, trace) = (bytes::Bytes::new(), String::new());
        NewPurchase { id, customer_id, key, input, trace, created_at: 0, deadline_at: 0, next_wake_at: 0 }
    }

    #[test]
    fn one_key_is_one_purchase_within_a_batch_and_across() {
        let rows = [
            row(1, 9, None),
            row(2, 9, None),
            row(3, 9, Some(("a", 1))),
            row(4, 9, Some(("a", 1))),
            row(5, 9, Some(("a", 2))),
            row(6, 8, Some(("a", 1))),
            row(7, 9, Some(("b", 1))),
            row(8, 9, Some(("b", 3))),
        ];
        let earlier = store::Earlier { id: 77, request_hash: vec![1; 32] };
        let (accepted, is_new) = sort_out(&rows, HashMap::from([((9, "b".to_owned()), earlier)]));
        use Accepted::*;
        let expected = [As(1), As(2), As(3), As(3), OtherRequest(3), As(6), As(77), OtherRequest(77)];
        assert_eq!(accepted, expected);
        assert_eq!(is_new, [true, true, true, false, false, true, false, false]);
    }

    /// A queue of numbers, and a batch that takes until something is sent.
    fn queue() -> (mpsc::Sender<u32>, mpsc::Receiver<u32>, oneshot::Sender<()>, oneshot::Receiver<()>) {
        let (send, waiting) = mpsc::channel(8);
        let (finish, finished) = oneshot::channel();
        (send, waiting, finish, finished)
    }

    #[tokio::test]
    async fn behind_a_batch_that_is_stuck_everybody_is_refused_until_it_is_over() {
        let (send, mut waiting, finish, finished) = queue();
        let (told, mut refused) = mpsc::unbounded_channel();
        send.send(1).await.unwrap();
        let batch = async { finished.await.unwrap() };
        let refuse = |one| told.send(one).unwrap();
        let stuck = unless_stuck(batch, Duration::from_millis(1), &mut waiting, refuse);
        let customers = async {
            assert_eq!(refused.recv().await, Some(1), "who waited already");
            send.send(2).await.unwrap();
            assert_eq!(refused.recv().await, Some(2), "who came later");
            finish.send(()).unwrap();
        };
        tokio::join!(stuck, customers);
        send.send(3).await.unwrap();
        assert_eq!(waiting.recv().await, Some(3), "it goes on");
    }

    #[tokio::test]
    async fn behind_a_batch_that_is_only_slow_everybody_waits() {
        let (send, mut waiting, finish, finished) = queue();
        let batch = async { finished.await.unwrap() };
        let refuse = |one| panic!("{one} was refused");
        let slow = unless_stuck(batch, Duration::from_secs(3600), &mut waiting, refuse);
        let customers = async {
            send.send(1).await.unwrap();
            tokio::task::yield_now().await;
            finish.send(()).unwrap();
        };
        tokio::join!(slow, customers);
        assert_eq!(waiting.recv().await, Some(1));
    }

    #[tokio::test]
    async fn a_batch_that_is_stuck_while_the_service_stops_is_waited_for() {
        let (send, mut waiting, finish, finished) = queue();
        drop(send);
        let mut over = false;
        let batch = async {
            finished.await.unwrap();
            over = true;
        };
        let ends = async {
            tokio::task::yield_now().await;
            finish.send(()).unwrap();
        };
        tokio::join!(unless_stuck(batch, Duration::ZERO, &mut waiting, |_| ()), ends);
        assert!(over);
    }
}

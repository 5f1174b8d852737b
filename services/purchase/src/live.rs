//! Who watches which purchases: one task that knows every open purchase's path so far, and every open event stream.
//!
//! The task owns its state ([`view`]); the others hold a [`Live`] and send. It never waits for a stream: one that does not take
//! its news in time is ended at a bound.
//!
//! Where other replicas work on the same database, their news may come late, out of order, twice, or not at all. Ends are put into the
//! order of their finish numbers ([`order`]), and what is missing is asked of the database (`follow.rs`). What is open at
//! another replica is known from its news only: if they are lost, its events come late, with its end.
//!
//! What never happens: a terminal path is announced before it is in the database, or out of the order of
//! the finish numbers; one of those numbers is left out; a purchase is told as open after its end was told; a path that is
//! shorter than one announced before.

mod order;
#[cfg(test)]
mod tests;
mod view;

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use foldhash::HashMap;
use saga::Path;
use tokio::sync::{mpsc, oneshot};
use tokio::time::{Instant, sleep_until};
use wire::time::UnixMillis;

use crate::admission::Admission;
use crate::feed::Outgoing;
use crate::news::{self, Ended, Grown, Section};
use crate::store::OpenPurchase;
use order::Gap;
pub(crate) use view::Replicas;
use view::{Memory, View};

/// Messages that wait for the task at most; who sends more waits.
const QUEUE_MESSAGES: usize = 1_024;

/// News that wait for one stream at most: more than one batch can bring. A stream that has not taken that many is ended: its
/// client resumes.
pub(crate) const STREAM_NEWS: usize = 2_048;

/// How long the news of an end may be late before it is read from the database. Under load news take a few
/// milliseconds from replica to replica.
const GAP_PATIENCE: Duration = Duration::from_millis(50);

/// A handle to the task.
#[derive(Clone, Debug)]
pub(crate) struct Live {
    messages: mpsc::Sender<Message>,
    announced: Arc<AtomicU64>,
    others: Outgoing,
}

/// The task has ended: the service is stopping.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Stopped;

/// How far a purchase is.
#[derive(Debug)]
pub(crate) struct News {
    pub(crate) id: u64,
    pub(crate) started_at: UnixMillis,
    pub(crate) path: Path,
    /// Its finish number, if it has ended.
    pub(crate) finished_no: Option<u64>,
}

/// A stream's beginning: what was known when it was opened, and the channel for what comes after.
#[derive(Debug)]
pub(crate) struct Subscription {
    /// Every purchase with a finish number up to this one is in the database; what ends later comes as news.
    pub(crate) announced: u64,
    /// The customer's open purchases.
    pub(crate) open: VecDeque<Arc<News>>,
    /// What comes after. It ends when the stream has to end.
    pub(crate) news: mpsc::Receiver<Arc<News>>,
}

/// Why there is no stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum NoStream {
    /// As many as may be are open.
    TooMany,
    /// The customer has as many open as one may.
    TooManyOfCustomer,
    /// The service is stopping.
    Stopped,
}

/// Asks for the ends with these numbers, which are known to have been given out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Missing {
    /// The number before the first one.
    pub(crate) after: u64,
    /// The last one.
    pub(crate) up_to: u64,
}

#[derive(Debug)]
enum Message {
    Opened {
        after: u64,
        purchases: Vec<OpenPurchase>,
    },
    Progressed(Vec<Grown>),
    Ended(Vec<Ended>),
    GivenUp(Vec<u64>),
    /// From another replica.
    Heard(Vec<Section>),
    /// The answer to [`Missing`]; empty if there is none now.
    Read(Vec<Ended>),
    /// This number was given out.
    GivenOut(u64),
    /// Likewise, and somebody waits for it to be announced.
    Reach(u64, oneshot::Sender<()>),
    Path(u64, oneshot::Sender<Option<Path>>),
    PathsOf(u64, oneshot::Sender<HashMap<u64, Path>>),
    Oldest(oneshot::Sender<Option<UnixMillis>>),
    Older {
        before: UnixMillis,
        behind: u64,
        limit: usize,
        answer: oneshot::Sender<Vec<u64>>,
    },
    Subscribe(u64, oneshot::Sender<Result<Subscription, NoStream>>),
}

/// The bounds of the streams.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Bounds {
    pub(crate) max_streams: usize,
    pub(crate) max_streams_per_customer: usize,
}

/// What the task works with.
pub(crate) struct Parts {
    /// The number of the last end in the database.
    pub(crate) announced: u64,
    pub(crate) bounds: Bounds,
    /// What was counted in here is counted out when it is heard of, by whichever way.
    pub(crate) admission: Admission,
    /// Tells the other replicas.
    pub(crate) others: Outgoing,
    /// Reads what is missing. None where there are no other replicas: then nothing is.
    pub(crate) reader: Option<mpsc::Sender<Missing>>,
}

impl Live {
    /// Starts the task. It ends when the last handle is dropped.
    pub(crate) fn start(parts: Parts) -> (Live, impl Future<Output = ()> + Send) {
        let Parts { announced, bounds, admission, others, reader } = parts;
        let (sender, receiver) = mpsc::channel(QUEUE_MESSAGES);
        let replicas = if reader.is_some() { Replicas::Many } else { Replicas::One };
        let shared = Arc::new(AtomicU64::new(announced));
        let task = Task {
            view: View::new(announced, replicas, Memory::default(), bounds, admission),
            announced: Arc::clone(&shared),
            reader,
            reading: false,
            reached: Vec::new(),
        };
        (Live { messages: sender, announced: shared, others }, task.run(receiver))
    }

    /// Every end with a number up to this one was announced here. What is not in the database yet will end with a higher one.
    pub(crate) fn announced(&self) -> u64 {
        self.announced.load(Ordering::Acquire)
    }

    /// These purchases are open, counted by the admission, and their paths are empty as far as is known. One that is known
    /// already keeps its path. `after` is what [`Live::announced`] said when they were certainly open or not there yet.
    pub(crate) async fn opened(&self, after: u64, purchases: Vec<OpenPurchase>) -> Result<(), Stopped> {
        if purchases.is_empty() {
            return Ok(());
        }
        self.others.tell(|| news::opened(after, &purchases));
        self.send(Message::Opened { after, purchases }).await
    }

    /// These paths have grown, unless they are known to be longer.
    pub(crate) async fn progressed(&self, grown: Vec<Grown>) -> Result<(), Stopped> {
        if grown.is_empty() {
            return Ok(());
        }
        self.others.tell(|| news::progressed(&grown));
        self.send(Message::Progressed(grown)).await
    }

    /// These purchases have ended, and the database knows it.
    pub(crate) async fn ended(&self, ended: Vec<Ended>) -> Result<(), Stopped> {
        if ended.is_empty() {
            return Ok(());
        }
        self.others.tell(|| news::ended(&ended));
        self.send(Message::Ended(ended)).await
    }

    /// These purchases are left to an operator.
    pub(crate) async fn given_up(&self, ids: Vec<u64>) -> Result<(), Stopped> {
        if ids.is_empty() {
            return Ok(());
        }
        self.others.tell(|| news::given_up(&ids));
        self.send(Message::GivenUp(ids)).await
    }

    /// These are not open any more, says the database. Others find out by themselves.
    pub(crate) async fn found_not_open(&self, ids: Vec<u64>) -> Result<(), Stopped> {
        self.send(Message::GivenUp(ids)).await
    }

    /// What another replica told.
    pub(crate) async fn heard(&self, sections: Vec<Section>) -> Result<(), Stopped> {
        self.send(Message::Heard(sections)).await
    }

    /// These ends were read from the database, because they were [`Missing`].
    pub(crate) async fn read(&self, ended: Vec<Ended>) -> Result<(), Stopped> {
        self.send(Message::Read(ended)).await
    }

    /// This finish number was given out, says the database.
    pub(crate) async fn given_out(&self, number: u64) -> Result<(), Stopped> {
        self.send(Message::GivenOut(number)).await
    }

    /// Waits until everything up to this number is announced. The number must have been given out.
    pub(crate) async fn reach(&self, number: u64) -> Result<(), Stopped> {
        let (answer, answered) = oneshot::channel();
        self.send(Message::Reach(number, answer)).await?;
        answered.await.map_err(|_| Stopped)
    }

    /// The path so far of a purchase, if it is open. What is not open any more is in the database with its end, so ask here
    /// first and there second: then no answer is older than one given before.
    pub(crate) async fn path(&self, id: u64) -> Result<Option<Path>, Stopped> {
        let (answer, answered) = oneshot::channel();
        self.send(Message::Path(id, answer)).await?;
        answered.await.map_err(|_| Stopped)
    }

    /// The paths so far of a customer's open purchases; ask as for [`Live::path`].
    pub(crate) async fn paths_of(&self, customer_id: u64) -> Result<HashMap<u64, Path>, Stopped> {
        let (answer, answered) = oneshot::channel();
        self.send(Message::PathsOf(customer_id, answer)).await?;
        answered.await.map_err(|_| Stopped)
    }

    /// When the oldest open purchase was accepted.
    pub(crate) async fn oldest(&self) -> Result<Option<UnixMillis>, Stopped> {
        let (answer, answered) = oneshot::channel();
        self.send(Message::Oldest(answer)).await?;
        answered.await.map_err(|_| Stopped)
    }

    /// Purchases behind this id that are open as far as is known and were accepted before that time, oldest first.
    pub(crate) async fn older(
        &self,
        before: UnixMillis,
        behind: u64,
        limit: usize,
    ) -> Result<Vec<u64>, Stopped> {
        let (answer, answered) = oneshot::channel();
        self.send(Message::Older { before, behind, limit, answer }).await?;
        answered.await.map_err(|_| Stopped)
    }

    /// Opens a stream of a customer's purchases. Dropping the subscription closes it.
    pub(crate) async fn subscribe(&self, customer_id: u64) -> Result<Subscription, NoStream> {
        let (answer, answered) = oneshot::channel();
        let sent = self.send(Message::Subscribe(customer_id, answer)).await;
        sent.map_err(|Stopped| NoStream::Stopped)?;
        answered.await.unwrap_or(Err(NoStream::Stopped))
    }

    async fn send(&self, message: Message) -> Result<(), Stopped> {
        self.messages.send(message).await.map_err(|_| Stopped)
    }
}

struct Task {
    view: View,
    /// What the handles read.
    announced: Arc<AtomicU64>,
    reader: Option<mpsc::Sender<Missing>>,
    /// Whether it was asked and has not answered.
    reading: bool,
    /// Who waits for which number to be announced. Each is a request in flight, and those are bounded.
    reached: Vec<(u64, oneshot::Sender<()>)>,
}

impl Task {
    async fn run(mut self, mut messages: mpsc::Receiver<Message>) {
        loop {
            let message = match self.read_at() {
                None => messages.recv().await,
                Some(at) => tokio::select! {
                    biased;
                    message = messages.recv() => message,
                    () = sleep_until(at) => {
                        self.ask();
                        continue;
                    }
                },
            };
            let Some(message) = message else { return };
            self.handle(message);
        }
    }

    /// When what is missing is to be read from the database.
    fn read_at(&self) -> Option<Instant> {
        if self.reading || self.reader.is_none() {
            return None;
        }
        let Gap { since, .. } = self.view.gap()?;
        // Whoever waits for a number was told of it by another replica: the news are late already.
        Some(if self.reached.is_empty() { since + GAP_PATIENCE } else { since })
    }

    fn ask(&mut self) {
        let (Some(reader), Some(Gap { after, up_to, .. })) = (&self.reader, self.view.gap()) else { return };
        // It takes one at a time and has answered the last one, so this fails only while it stops.
        self.reading = reader.try_send(Missing { after, up_to }).is_ok();
        if !self.reading {
            self.reader = None;
        }
    }

    fn handle(&mut self, message: Message) {
        match message {
            Message::Opened { after, purchases } => self.view.opened(after, purchases, true),
            Message::Progressed(grown) => self.view.progressed(grown),
            Message::Ended(ended) => self.ended(ended),
            Message::GivenUp(ids) => self.view.given_up(&ids),
            Message::Heard(sections) => sections.into_iter().for_each(|section| self.heard(section)),
            Message::Read(ended) => {
                self.reading = false;
                self.ended(ended);
            }
            Message::GivenOut(number) => self.view.given_out(number, Instant::now()),
            Message::Reach(number, answer) => {
                self.view.given_out(number, Instant::now());
                self.reached.push((number, answer));
                self.tell_reached();
            }
            // Whoever asked may have gone; then nobody needs the answer.
            Message::Path(id, answer) => drop(answer.send(self.view.path(id))),
            Message::PathsOf(customer_id, answer) => drop(answer.send(self.view.paths_of(customer_id))),
            Message::Oldest(answer) => drop(answer.send(self.view.oldest())),
            Message::Older { before, behind, limit, answer } => {
                drop(answer.send(self.view.older(before, behind, limit)));
            }
            Message::Subscribe(customer_id, answer) => drop(answer.send(self.view.subscribe(customer_id))),
        }
    }

    fn heard(&mut self, section: Section) {
        match section {
            Section::Opened { after, purchases } => self.view.opened(after, purchases, false),
            Section::Progressed(grown) => self.view.progressed(grown),
            Section::Ended(ended) => self.ended(ended),
            Section::GivenUp(ids) => self.view.given_up(&ids),
        }
    }

    fn ended(&mut self, ended: Vec<Ended>) {
        self.view.ended(ended, Instant::now());
        self.announced.store(self.view.announced(), Ordering::Release);
        self.tell_reached();
    }

    fn tell_reached(&mut self) {
        if self.reached.is_empty() {
            return;
        }
        let announced = self.view.announced();
        let waiting = std::mem::take(&mut self.reached).into_iter().filter(|(_, answer)| !answer.is_closed());
        let (reached, waiting): (Vec<_>, Vec<_>) = waiting.partition(|(number, _)| *number <= announced);
        self.reached = waiting;
        for (_, answer) in reached {
            let _ = answer.send(());
        }
    }
}

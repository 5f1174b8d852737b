//! Who watches which purchases: one task that knows every open purchase's path so far, and every open event stream.
//!
//! The task owns its state; the others hold a [`Live`] and send. It never waits for a stream: one that does not take its
//! news in time is ended at a bound.
//!
//! What never happens: a terminal path is announced before it is in the database, or out of the order of
//! the finish numbers; a path that is shorter than one announced before.

use std::collections::BTreeMap;
use std::sync::Arc;

use foldhash::{HashMap, HashMapExt, HashSet};
use saga::Path;
use tokio::sync::{mpsc, oneshot};
use wire::time::UnixMillis;

use crate::store::OpenPurchase;

/// Messages that wait for the task at most; who sends more waits.
const QUEUE_MESSAGES: usize = 1_024;

/// News that wait for one stream at most: more than one batch can bring. A stream that has not taken that many is ended: its
/// client resumes.
pub(crate) const STREAM_NEWS: usize = 2_048;

/// A handle to the task.
#[derive(Clone, Debug)]
pub(crate) struct Live(mpsc::Sender<Message>);

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

/// A purchase that has ended.
#[derive(Debug)]
pub(crate) struct Ended {
    pub(crate) customer_id: u64,
    pub(crate) news: News,
}

/// A stream's beginning: what was known when it was opened, and the channel for what comes after.
#[derive(Debug)]
pub(crate) struct Subscription {
    /// Every purchase with a finish number up to this one is in the database; what ends later comes as news.
    pub(crate) announced: u64,
    /// The customer's open purchases.
    pub(crate) open: Vec<Arc<News>>,
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

#[derive(Debug)]
enum Message {
    Opened(Vec<OpenPurchase>),
    Progressed(Vec<(u64, Path)>),
    Ended(Vec<Ended>),
    GivenUp(Vec<u64>),
    Path(u64, oneshot::Sender<Option<Path>>),
    PathsOf(u64, oneshot::Sender<HashMap<u64, Path>>),
    Oldest(oneshot::Sender<Option<UnixMillis>>),
    Subscribe(u64, oneshot::Sender<Result<Subscription, NoStream>>),
}

/// The bounds of the streams.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Bounds {
    pub(crate) max_streams: usize,
    pub(crate) max_streams_per_customer: usize,
}

impl Live {
    /// Starts the task. It ends when the last handle is dropped.
    pub(crate) fn start(announced: u64, bounds: Bounds) -> (Live, impl Future<Output = ()> + Send) {
        let (sender, receiver) = mpsc::channel(QUEUE_MESSAGES);
        let state = State {
            announced,
            bounds,
            open: BTreeMap::new(),
            by_customer: HashMap::new(),
            streams: HashMap::new(),
            stream_count: 0,
        };
        (Live(sender), state.run(receiver))
    }

    /// These purchases are open; their paths are empty as far as is known. One that is known already keeps its path.
    pub(crate) async fn opened(&self, purchases: Vec<OpenPurchase>) -> Result<(), Stopped> {
        self.send(Message::Opened(purchases)).await
    }

    /// These paths have grown, unless they are known to be longer.
    pub(crate) async fn progressed(&self, paths: Vec<(u64, Path)>) -> Result<(), Stopped> {
        self.send(Message::Progressed(paths)).await
    }

    /// These purchases have ended, in the order of their finish numbers, and the database knows it.
    pub(crate) async fn ended(&self, ended: Vec<Ended>) -> Result<(), Stopped> {
        self.send(Message::Ended(ended)).await
    }

    /// These purchases are left to an operator.
    pub(crate) async fn given_up(&self, ids: Vec<u64>) -> Result<(), Stopped> {
        self.send(Message::GivenUp(ids)).await
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

    /// Opens a stream of a customer's purchases. Dropping the subscription closes it.
    pub(crate) async fn subscribe(&self, customer_id: u64) -> Result<Subscription, NoStream> {
        let (answer, answered) = oneshot::channel();
        let sent = self.send(Message::Subscribe(customer_id, answer)).await;
        sent.map_err(|Stopped| NoStream::Stopped)?;
        answered.await.unwrap_or(Err(NoStream::Stopped))
    }

    async fn send(&self, message: Message) -> Result<(), Stopped> {
        self.0.send(message).await.map_err(|_| Stopped)
    }
}

struct State {
    announced: u64,
    bounds: Bounds,
    /// By id, and so by age.
    open: BTreeMap<u64, Open>,
    by_customer: HashMap<u64, HashSet<u64>>,
    streams: HashMap<u64, Vec<mpsc::Sender<Arc<News>>>>,
    stream_count: usize,
}

struct Open {
    customer_id: u64,
    news: Arc<News>,
}

impl State {
    async fn run(mut self, mut messages: mpsc::Receiver<Message>) {
        while let Some(message) = messages.recv().await {
            self.handle(message);
        }
    }

    fn handle(&mut self, message: Message) {
        match message {
            Message::Opened(purchases) => purchases.into_iter().for_each(|purchase| self.opened(purchase)),
            Message::Progressed(paths) => {
                paths.into_iter().for_each(|(id, path)| self.progressed(id, path));
            }
            Message::Ended(ended) => ended.into_iter().for_each(|ended| self.ended(ended)),
            Message::GivenUp(ids) => ids.into_iter().for_each(|id| {
                self.close(id);
            }),
            // Whoever asked may have gone; then nobody needs the answer.
            Message::Path(id, answer) => drop(answer.send(self.path(id))),
            Message::PathsOf(customer_id, answer) => drop(answer.send(self.paths_of(customer_id))),
            Message::Oldest(answer) => drop(answer.send(self.oldest())),
            Message::Subscribe(customer_id, answer) => drop(answer.send(self.subscribe(customer_id))),
        }
    }

    fn opened(&mut self, purchase: OpenPurchase) {
        let OpenPurchase { id, customer_id, created_at } = purchase;
        if self.open.contains_key(&id) {
            return;
        }
        let news = News { id, started_at: created_at, path: Path::new(), finished_no: None };
        let news = Arc::new(news);
        self.by_customer.entry(customer_id).or_default().insert(id);
        self.open.insert(id, Open { customer_id, news: Arc::clone(&news) });
        self.publish(customer_id, &news);
    }

    fn progressed(&mut self, id: u64, path: Path) {
        // One that is not open has ended, or belongs to another replica.
        let Some(open) = self.open.get_mut(&id) else { return };
        if path.len() <= open.news.path.len() {
            return;
        }
        open.news = Arc::new(News { id, started_at: open.news.started_at, path, finished_no: None });
        let (customer_id, news) = (open.customer_id, Arc::clone(&open.news));
        self.publish(customer_id, &news);
    }

    fn ended(&mut self, ended: Ended) {
        let Ended { customer_id, news } = ended;
        self.close(news.id);
        if let Some(number) = news.finished_no {
            debug_assert!(number > self.announced, "purchase {} is announced out of order", news.id);
            self.announced = number;
        }
        self.publish(customer_id, &Arc::new(news));
    }

    fn close(&mut self, id: u64) {
        let Some(open) = self.open.remove(&id) else { return };
        if let Some(ids) = self.by_customer.get_mut(&open.customer_id) {
            ids.remove(&id);
            if ids.is_empty() {
                self.by_customer.remove(&open.customer_id);
            }
        }
    }

    fn publish(&mut self, customer_id: u64, news: &Arc<News>) {
        let Some(streams) = self.streams.get_mut(&customer_id) else { return };
        let before = streams.len();
        streams.retain(|stream| stream.try_send(Arc::clone(news)).is_ok());
        self.stream_count -= before - streams.len();
        if streams.is_empty() {
            self.streams.remove(&customer_id);
        }
    }

    fn path(&self, id: u64) -> Option<Path> {
        self.open.get(&id).map(|open| open.news.path.clone())
    }

    fn paths_of(&self, customer_id: u64) -> HashMap<u64, Path> {
        let ids = self.by_customer.get(&customer_id).into_iter().flatten();
        ids.filter_map(|id| Some((*id, self.path(*id)?))).collect()
    }

    fn oldest(&self) -> Option<UnixMillis> {
        self.open.first_key_value().map(|(_, open)| open.news.started_at)
    }

    fn subscribe(&mut self, customer_id: u64) -> Result<Subscription, NoStream> {
        self.forget_closed_streams(customer_id);
        if self.stream_count >= self.bounds.max_streams {
            let customers: Vec<u64> = self.streams.keys().copied().collect();
            customers.into_iter().for_each(|customer_id| self.forget_closed_streams(customer_id));
        }
        if self.stream_count >= self.bounds.max_streams {
            return Err(NoStream::TooMany);
        }
        let own = self.streams.get(&customer_id).map_or(0, Vec::len);
        if own >= self.bounds.max_streams_per_customer {
            return Err(NoStream::TooManyOfCustomer);
        }
        let (stream, news) = mpsc::channel(STREAM_NEWS);
        self.streams.entry(customer_id).or_default().push(stream);
        self.stream_count += 1;
        let mut ids: Vec<u64> =
            self.by_customer.get(&customer_id).map(|ids| ids.iter().copied().collect()).unwrap_or_default();
        ids.sort_unstable();
        let open = ids.iter().filter_map(|id| self.open.get(id)).map(|open| Arc::clone(&open.news)).collect();
        Ok(Subscription { announced: self.announced, open, news })
    }

    /// Streams whose client has gone are only noticed when there is news for them; before anything is refused for their sake, they
    /// are looked for.
    fn forget_closed_streams(&mut self, customer_id: u64) {
        if let Some(streams) = self.streams.get_mut(&customer_id) {
            let before = streams.len();
            streams.retain(|stream| !stream.is_closed());
            self.stream_count -= before - streams.len();
            if streams.is_empty() {
                self.streams.remove(&customer_id);
            }
        }
    }
}

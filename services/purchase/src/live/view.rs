//! What is known of purchases that are open, and who watches: a state and what changes it, without I/O.

use std::collections::{BTreeMap, HashSet, VecDeque};
use std::ops::Bound;
use std::sync::Arc;

use foldhash::{HashMap, HashMapExt, HashSet as Set};
use saga::Path;
use tokio::sync::mpsc;
use tokio::time::Instant;
use wire::time::UnixMillis;

use super::order::{Gap, Order};
use super::{Bounds, News, NoStream, STREAM_NEWS, Subscription};
use crate::admission::Admission;
use crate::news::{Ended, Grown, Told};
use crate::store::OpenPurchase;

/// How much is kept of what others have done.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Memory {
    /// Ends that are held at most while one before them is missing. What goes beyond is read from the database.
    pub(crate) held_ends: usize,
    /// Ends that are remembered at most, so that nobody who tells late that a purchase is open opens it again.
    pub(crate) recent_ends: usize,
    /// Purchases left to an operator whose paths are kept at most: the database may have a shorter one, from another replica,
    /// and what was shown once must not be taken back.
    pub(crate) left_paths: usize,
}

impl Default for Memory {
    /// Some seconds of a busy shop, in a few MB.
    fn default() -> Memory {
        Memory { held_ends: 8_192, recent_ends: 65_536, left_paths: 1_024 }
    }
}

/// Which replicas work on the database.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Replicas {
    /// This one only: whatever happens, happens here, in order.
    One,
    /// Others too: their news are late, lost, repeated and out of order.
    Many,
}

/// Open purchases and event streams.
pub(crate) struct View {
    order: Order<Ended>,
    /// Where others tell of their purchases.
    recent: Option<Recent>,
    memory: Memory,
    bounds: Bounds,
    admission: Admission,
    /// By id, and so by age.
    open: BTreeMap<u64, Open>,
    by_customer: HashMap<u64, Set<u64>>,
    left: BTreeMap<u64, Told>,
    streams: HashMap<u64, Vec<mpsc::Sender<Arc<News>>>>,
    stream_count: usize,
}

struct Open {
    customer_id: u64,
    started_at: UnixMillis,
    /// Whether it is counted by this replica's admission.
    mine: bool,
    replies: usize,
    path: Far,
}

/// How far an open purchase is: as it is told, or, while nobody has listened, as it came.
enum Far {
    News(Arc<News>),
    Encoded(Told),
}

impl Open {
    /// To be told to a stream; none when the path cannot be read. It is decoded once.
    fn news(&mut self, id: u64) -> Option<Arc<News>> {
        if let Far::Encoded(told) = &self.path {
            let path = understood(id, told.clone())?;
            self.path =
                Far::News(Arc::new(News { id, started_at: self.started_at, path, finished_no: None }));
        }
        match &self.path {
            Far::News(news) => Some(Arc::clone(news)),
            Far::Encoded(_) => None,
        }
    }
}

/// The ids of the last purchases that ended, by their finish numbers.
struct Recent {
    /// The number before that of the first one kept.
    before: u64,
    ids: VecDeque<u64>,
    /// How many are kept.
    bound: usize,
}

impl Recent {
    fn push(&mut self, id: u64) {
        if self.ids.len() == self.bound {
            self.ids.pop_front();
            self.before += 1;
        }
        self.ids.push_back(id);
    }

    /// What ended with a number above this one; none when that is not known any more.
    fn since(&self, after: u64) -> Option<HashSet<u64>> {
        let skipped = after.checked_sub(self.before)?;
        let skipped = usize::try_from(skipped).unwrap_or(usize::MAX);
        Some(self.ids.iter().skip(skipped).copied().collect())
    }
}

fn understood(id: u64, told: Told) -> Option<Path> {
    told.into_path()
        .inspect_err(|error| tracing::warn!(purchase = id, %error, "a path that was told cannot be read"))
        .ok()
}

impl View {
    pub(crate) fn new(
        announced: u64,
        replicas: Replicas,
        memory: Memory,
        bounds: Bounds,
        admission: Admission,
    ) -> View {
        let recent = Recent { before: announced, ids: VecDeque::new(), bound: memory.recent_ends };
        View {
            order: Order::new(announced, memory.held_ends, Instant::now()),
            recent: (replicas == Replicas::Many).then_some(recent),
            memory,
            bounds,
            admission,
            open: BTreeMap::new(),
            by_customer: HashMap::new(),
            left: BTreeMap::new(),
            streams: HashMap::new(),
            stream_count: 0,
        }
    }

    /// Every purchase with a finish number up to this one is in the database, and was told to whoever listens.
    pub(crate) fn announced(&self) -> u64 {
        self.order.announced()
    }

    /// Ends that are known to be missing.
    pub(crate) fn gap(&self) -> Option<Gap> {
        self.order.gap()
    }

    /// This number was given out.
    pub(crate) fn given_out(&mut self, number: u64, now: Instant) {
        self.order.given_out(number, now);
    }

    /// These are open, and will end with numbers above `after`: so it can be told whether they have ended by now. One that is
    /// open already keeps its path. What is `mine` was counted by the admission, once for each time that it is opened.
    pub(crate) fn opened(&mut self, after: u64, purchases: Vec<OpenPurchase>, mine: bool) {
        let ended = match &self.recent {
            None => Some(HashSet::new()),
            Some(_) if after >= self.announced() => Some(HashSet::new()),
            Some(recent) => recent.since(after),
        };
        let mut leaving = Vec::new();
        for purchase in purchases {
            // Told so late that nobody knows whether it has ended: its end is told whole, if it comes.
            let over = ended.as_ref().is_none_or(|ended| ended.contains(&purchase.id));
            let counted_already = !over && self.open_one(purchase, mine);
            if mine && (over || counted_already) {
                leaving.push(purchase.customer_id);
            }
        }
        self.admission.leave(leaving.into_iter());
    }

    /// True if it is open and counted already.
    fn open_one(&mut self, purchase: OpenPurchase, mine: bool) -> bool {
        let OpenPurchase { id, customer_id, created_at } = purchase;
        if let Some(open) = self.open.get_mut(&id) {
            let counted = open.mine;
            open.mine |= mine;
            return counted;
        }
        let path = self.left.remove(&id).and_then(|told| understood(id, told)).unwrap_or_default();
        let replies = path.len();
        let news = Arc::new(News { id, started_at: created_at, path, finished_no: None });
        self.by_customer.entry(customer_id).or_default().insert(id);
        let path = Far::News(Arc::clone(&news));
        self.open.insert(id, Open { customer_id, started_at: created_at, mine, replies, path });
        self.publish(customer_id, &news);
        false
    }

    /// These paths have grown, unless they are known to be longer. What is not known to be open has ended, or is told with
    /// its end.
    pub(crate) fn progressed(&mut self, grown: Vec<Grown>) {
        for Grown { id, replies, path } in grown {
            let Some(open) = self.open.get_mut(&id).filter(|open| replies > open.replies) else { continue };
            let customer_id = open.customer_id;
            if matches!(path, Told::Encoded(_)) && !self.streams.contains_key(&customer_id) {
                (open.replies, open.path) = (replies, Far::Encoded(path));
                continue;
            }
            let Some(path) = understood(id, path) else { continue };
            let news = Arc::new(News { id, started_at: open.started_at, path, finished_no: None });
            (open.replies, open.path) = (replies, Far::News(Arc::clone(&news)));
            self.publish(customer_id, &news);
        }
    }

    /// These have ended, and the database knows it. They are not open any more from now on; they are told when it is
    /// their turn.
    pub(crate) fn ended(&mut self, ended: Vec<Ended>, now: Instant) {
        let mine: Vec<u64> = ended.iter().filter_map(|ended| self.close(ended.id)).collect();
        self.admission.leave(mine.into_iter());
        for ended in ended {
            if let Some(ended) = self.order.hear(ended.finished_no, ended, now) {
                self.announce(ended);
            }
            while let Some(ended) = self.order.next() {
                // While it waited for its turn, it may have been opened again by late news.
                let mine = self.close(ended.id);
                self.admission.leave(mine.into_iter());
                self.announce(ended);
            }
        }
    }

    fn announce(&mut self, ended: Ended) {
        let Ended { customer_id, finished_no, id, started_at, path } = ended;
        if let Some(recent) = &mut self.recent {
            recent.push(id);
        }
        if !self.streams.contains_key(&customer_id) {
            return;
        }
        match understood(id, path) {
            Some(path) => {
                let news = News { id, started_at, path, finished_no: Some(finished_no) };
                self.publish(customer_id, &Arc::new(news));
            }
            // They resume, and read it from the database.
            None => self.end_streams(customer_id),
        }
    }

    /// These are left to an operator, or have ended and are told of later.
    pub(crate) fn given_up(&mut self, ids: &[u64]) {
        let mut mine = Vec::new();
        for id in ids {
            if let Some(path) =
                self.open.get(id).filter(|open| open.replies > 0).map(|open| match &open.path {
                    Far::News(news) => Told::Path(news.path.clone()),
                    Far::Encoded(told) => told.clone(),
                })
            {
                self.left.insert(*id, path);
                if self.left.len() > self.memory.left_paths {
                    self.left.pop_first();
                }
            }
            mine.extend(self.close_keeping(*id));
        }
        self.admission.leave(mine.into_iter());
    }

    /// It is not open any more, nor left to an operator; its customer, if it was counted here.
    fn close(&mut self, id: u64) -> Option<u64> {
        if !self.left.is_empty() {
            self.left.remove(&id);
        }
        self.close_keeping(id)
    }

    fn close_keeping(&mut self, id: u64) -> Option<u64> {
        let open = self.open.remove(&id)?;
        if let Some(ids) = self.by_customer.get_mut(&open.customer_id) {
            ids.remove(&id);
            if ids.is_empty() {
                self.by_customer.remove(&open.customer_id);
            }
        }
        open.mine.then_some(open.customer_id)
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

    fn end_streams(&mut self, customer_id: u64) {
        let ended = self.streams.remove(&customer_id);
        self.stream_count -= ended.map_or(0, |streams| streams.len());
    }

    /// The path so far of a purchase that is open or left to an operator.
    pub(crate) fn path(&mut self, id: u64) -> Option<Path> {
        match self.open.get_mut(&id) {
            Some(open) => open.news(id).map(|news| news.path.clone()),
            None => self.left.get(&id).cloned().and_then(|told| understood(id, told)),
        }
    }

    /// The paths so far of a customer's open purchases.
    pub(crate) fn paths_of(&mut self, customer_id: u64) -> HashMap<u64, Path> {
        let ids: Vec<u64> = self.by_customer.get(&customer_id).into_iter().flatten().copied().collect();
        ids.into_iter().filter_map(|id| Some((id, self.path(id)?))).collect()
    }

    /// When the oldest open purchase was accepted.
    pub(crate) fn oldest(&self) -> Option<UnixMillis> {
        self.open.first_key_value().map(|(_, open)| open.started_at)
    }

    /// Open purchases behind this id that were accepted before that time, oldest first.
    pub(crate) fn older(&self, before: UnixMillis, behind: u64, limit: usize) -> Vec<u64> {
        let rest = self.open.range((Bound::Excluded(behind), Bound::Unbounded));
        rest.take_while(|(_, open)| open.started_at < before).map(|(id, _)| *id).take(limit).collect()
    }

    /// A new stream of a customer's purchases. Dropping it closes it.
    pub(crate) fn subscribe(&mut self, customer_id: u64) -> Result<Subscription, NoStream> {
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
        let open = ids.iter().filter_map(|id| self.open.get_mut(id)?.news(*id)).collect();
        Ok(Subscription { announced: self.announced(), open, news })
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

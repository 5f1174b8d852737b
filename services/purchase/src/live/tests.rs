//! The live views of several replicas on one database, under every fate that news can have, against an oracle: what the
//! database says in the end is what each client was told, in order, once.

use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;
use proptest::prelude::*;
use saga::{Entry, Outcome, Path, Reason, StepIndex};
use shop::purchase::purchase_saga;
use tokio::time::Instant;
use wire::messages::encode_path;

use super::order::Gap;
use super::view::{Memory, View};
use super::{Bounds, Replicas, Subscription};
use crate::admission::{Admission, Refused};
use crate::news::{self, Ended, Grown, ReplicaId, Section, Told};
use crate::store::OpenPurchase;

const REPLICAS: usize = 3;
const CUSTOMERS: u64 = 3;
/// So many purchases are handled at a time.
const LAST: usize = 8;
/// Small, so that the bounds are met. All paths are kept: what is shown is never taken back then.
const MEMORY: Memory = Memory { held_ends: 3, recent_ends: 4, left_paths: 1_000 };
const BOUNDS: Bounds = Bounds { max_streams: 1_000, max_streams_per_customer: 1_000 };

/// What happens next. The numbers choose among what there is.
#[derive(Clone, Debug)]
enum Step {
    /// A replica accepts a purchase, which will end in one of several ways.
    Accept { replica: usize, customer: u64, way: u8 },
    /// A replica tells itself and the others of one that it has accepted a while ago.
    TellAccepted(usize),
    /// A replica hears from the bus how far a purchase is. If that is its end, it writes it.
    Report { replica: usize, which: usize, replies: usize },
    /// A replica tells itself and the others of an end that it wrote a while ago.
    TellEnded(usize),
    /// A replica leaves a purchase to an operator.
    GiveUp { replica: usize, which: usize },
    /// An operator has it tried again.
    Retry { replica: usize, which: usize },
    /// A message of the feed arrives, the first time or again; what is never chosen is lost.
    Deliver { replica: usize, message: usize },
    /// A replica asks the database for the last number.
    Poll(usize),
    /// A replica reads what is missing, at most so many.
    Read { replica: usize, limit: usize },
    /// A replica looks up what is open.
    LookUp(usize),
    /// A client listens.
    Listen { replica: usize, customer: u64 },
    /// A client goes on at another replica.
    Move { client: usize, replica: usize },
    /// A client takes what is there for it.
    Take(usize),
}

fn any_step() -> impl Strategy<Value = Step> {
    let (replica, any) = (0..REPLICAS, any::<u16>().prop_map(usize::from));
    let customer = 0..CUSTOMERS;
    prop_oneof![
        4 => (replica.clone(), customer.clone(), 0..4_u8)
            .prop_map(|(replica, customer, way)| Step::Accept { replica, customer, way }),
        6 => any.clone().prop_map(Step::TellAccepted),
        8 => (replica.clone(), any.clone(), 0..5_usize)
            .prop_map(|(replica, which, replies)| Step::Report { replica, which, replies }),
        6 => any.clone().prop_map(Step::TellEnded),
        1 => (replica.clone(), any.clone()).prop_map(|(replica, which)| Step::GiveUp { replica, which }),
        1 => (replica.clone(), any.clone()).prop_map(|(replica, which)| Step::Retry { replica, which }),
        12 => (replica.clone(), any.clone())
            .prop_map(|(replica, message)| Step::Deliver { replica, message }),
        1 => replica.clone().prop_map(Step::Poll),
        2 => (replica.clone(), 1..5_usize).prop_map(|(replica, limit)| Step::Read { replica, limit }),
        1 => replica.clone().prop_map(Step::LookUp),
        1 => (replica.clone(), customer).prop_map(|(replica, customer)| Step::Listen { replica, customer }),
        1 => (any.clone(), replica.clone()).prop_map(|(client, replica)| Step::Move { client, replica }),
        4 => any.prop_map(Step::Take),
    ]
}

/// The paths that a purchase may take.
fn whole_path(way: u8) -> Path {
    let entry = |step, outcome| Entry { step: StepIndex(step), outcome, at: 7 };
    let done = |step| entry(step, Outcome::Done(vec![step]));
    let refused = |step| entry(step, Outcome::Rejected(Reason::Refused("no".to_owned())));
    let undone = |step| entry(step, Outcome::Compensated);
    match way {
        0 => vec![done(0), done(1), done(2)],
        1 => vec![refused(0)],
        2 => vec![done(0), refused(1), undone(0)],
        _ => vec![done(0), done(1), refused(2), undone(1), undone(0)],
    }
    .into_iter()
    .collect()
}

fn cut(path: &Path, replies: usize) -> Path {
    path.entries().iter().take(replies).cloned().collect()
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Open,
    Left,
    Ended,
}

/// A purchase in the database.
#[derive(Debug)]
struct Purchase {
    id: u64,
    customer: u64,
    path: Path,
    /// How far the bus may have reported it.
    replies: usize,
    state: State,
}

impl Purchase {
    fn open(&self) -> OpenPurchase {
        OpenPurchase { id: self.id, customer_id: self.customer, created_at: self.id }
    }
}

/// Something that a replica has written and not told yet.
enum Untold {
    Accepted { replica: usize, after: u64, which: usize },
    Ended { replica: usize, ended: Vec<Ended> },
}

/// Takes the events of paths as a browser takes those of a stream, and complains.
struct Client {
    customer: u64,
    replica: usize,
    /// Every purchase up to this finish number was told whole.
    finished: u64,
    first_finished: u64,
    sent: BTreeMap<u64, usize>,
    told: BTreeMap<u64, usize>,
    ended: BTreeSet<u64>,
    subscription: Subscription,
}

impl Client {
    fn tell(&mut self, id: u64, path: &Path, finished_no: Option<u64>) {
        assert!(!self.ended.contains(&id), "purchase {id} is told after its end");
        let events = saga::events(&purchase_saga(), id, path).expect("a path").len();
        let sent = self.sent.entry(id).or_default();
        *sent = (*sent).max(events);
        let told = self.told.entry(id).or_default();
        *told = (*told).max(events);
        if let Some(number) = finished_no {
            assert!(number > self.finished, "end {number} is told behind {}", self.finished);
            self.finished = number;
            self.sent.remove(&id);
            self.ended.insert(id);
        }
    }

    fn take(&mut self) {
        while let Ok(news) = self.subscription.news.try_recv() {
            self.tell(news.id, &news.path, news.finished_no);
        }
    }
}

struct World {
    views: Vec<View>,
    admissions: Vec<Admission>,
    purchases: Vec<Purchase>,
    /// By finish number, from 1.
    ended: Vec<Ended>,
    untold: Vec<Untold>,
    feed: Vec<Bytes>,
    clients: Vec<Client>,
    /// The longest path that each replica has shown.
    shown: BTreeMap<(usize, u64), usize>,
    now: Instant,
}

impl World {
    fn new() -> World {
        let admissions: Vec<Admission> = (0..REPLICAS).map(|_| Admission::new(10_000, 10_000)).collect();
        let view = |admission: &Admission| View::new(0, Replicas::Many, MEMORY, BOUNDS, admission.clone());
        World {
            views: admissions.iter().map(view).collect(),
            admissions,
            purchases: Vec::new(),
            ended: Vec::new(),
            untold: Vec::new(),
            feed: Vec::new(),
            clients: Vec::new(),
            shown: BTreeMap::new(),
            now: Instant::now(),
        }
    }

    fn send(&mut self, replica: usize, section: Bytes) {
        self.feed.push(news::message(ReplicaId(replica as u64), &[section]));
    }

    fn take(&mut self, step: Step) {
        match step {
            Step::Accept { replica, customer, way } => self.accept(replica, customer, way),
            Step::TellAccepted(any) => self.tell_untold(any, true),
            Step::TellEnded(any) => self.tell_untold(any, false),
            Step::Report { replica, which, replies } => {
                if let Some(which) = self.which(which) {
                    self.report(replica, which, replies);
                }
            }
            Step::GiveUp { replica, which } => {
                let Some(which) = self.which(which) else { return };
                if self.purchases[which].state == State::Open {
                    self.purchases[which].state = State::Left;
                    let ids = [self.purchases[which].id];
                    self.views[replica].given_up(&ids);
                    self.send(replica, news::given_up(&ids));
                }
            }
            Step::Retry { replica, which } => {
                let Some(which) = self.which(which) else { return };
                if self.purchases[which].state == State::Left {
                    let (after, open) = (self.views[replica].announced(), vec![self.purchases[which].open()]);
                    self.admissions[replica].found_open([self.purchases[which].customer].into_iter());
                    self.send(replica, news::opened(after, &open));
                    self.views[replica].opened(after, open, true);
                    self.purchases[which].state = State::Open;
                }
            }
            Step::Deliver { replica, message } => {
                if !self.feed.is_empty() {
                    let message = self.feed[message % self.feed.len()].clone();
                    self.deliver(replica, message);
                }
            }
            Step::Poll(replica) => {
                let last = self.ended.len() as u64;
                self.views[replica].given_out(last, self.now);
            }
            Step::Read { replica, limit } => {
                self.read(replica, limit);
            }
            Step::LookUp(replica) => self.look_up(replica),
            Step::Listen { replica, customer } => {
                let subscription = self.views[replica].subscribe(customer).expect("a stream");
                let finished = subscription.announced;
                let mut client = Client {
                    customer,
                    replica,
                    finished,
                    first_finished: finished,
                    sent: BTreeMap::new(),
                    told: BTreeMap::new(),
                    ended: BTreeSet::new(),
                    subscription,
                };
                for news in std::mem::take(&mut client.subscription.open) {
                    client.tell(news.id, &news.path, None);
                }
                self.clients.push(client);
            }
            Step::Move { client, replica } => {
                if !self.clients.is_empty() {
                    let client = client % self.clients.len();
                    self.move_to(client, replica);
                }
            }
            Step::Take(client) => {
                let count = self.clients.len().max(1);
                self.clients.iter_mut().skip(client % count).take(1).for_each(Client::take);
            }
        }
    }

    fn which(&self, any: usize) -> Option<usize> {
        // Mostly one of the last ones.
        (!self.purchases.is_empty()).then(|| self.purchases.len() - 1 - any % self.purchases.len().min(LAST))
    }

    fn accept(&mut self, replica: usize, customer: u64, way: u8) {
        let after = self.views[replica].announced();
        self.admissions[replica].enter(customer).expect("room").keep();
        let (id, which) = (1_000 + self.purchases.len() as u64, self.purchases.len());
        let (path, state) = (whole_path(way), State::Open);
        self.purchases.push(Purchase { id, customer, path, replies: 0, state });
        self.untold.push(Untold::Accepted { replica, after, which });
    }

    fn tell_untold(&mut self, any: usize, accepted: bool) {
        let of_kind = |untold: &Untold| matches!(untold, Untold::Accepted { .. }) == accepted;
        let places: Vec<usize> =
            (0..self.untold.len()).filter(|place| of_kind(&self.untold[*place])).collect();
        if places.is_empty() {
            return;
        }
        match self.untold.remove(places[any % places.len()]) {
            Untold::Accepted { replica, after, which } => {
                let open = vec![self.purchases[which].open()];
                self.send(replica, news::opened(after, &open));
                self.views[replica].opened(after, open, true);
            }
            Untold::Ended { replica, ended } => {
                self.send(replica, news::ended(&ended));
                self.views[replica].ended(ended, self.now);
            }
        }
    }

    fn report(&mut self, replica: usize, which: usize, replies: usize) {
        let purchase = &mut self.purchases[which];
        purchase.replies = purchase.replies.max(replies.min(purchase.path.len()));
        let Purchase { id, customer, state, .. } = *purchase;
        let path = cut(&purchase.path, replies);
        if path.len() < purchase.path.len() {
            let grown = vec![Grown::to(id, path)];
            self.send(replica, news::progressed(&grown));
            self.views[replica].progressed(grown);
        } else if state != State::Ended {
            purchase.state = State::Ended;
            let finished_no = self.ended.len() as u64 + 1;
            let path = Told::Path(path);
            let ended = Ended { customer_id: customer, finished_no, id, started_at: id, path };
            self.ended.push(ended.clone());
            self.untold.push(Untold::Ended { replica, ended: vec![ended] });
        }
    }

    fn deliver(&mut self, replica: usize, message: Bytes) {
        let Some(sections) = news::read(message, ReplicaId(replica as u64)).expect("news") else { return };
        let view = &mut self.views[replica];
        for section in sections {
            match section {
                Section::Opened { after, purchases } => view.opened(after, purchases, false),
                Section::Progressed(grown) => view.progressed(grown),
                Section::Ended(ended) => view.ended(ended, self.now),
                Section::GivenUp(ids) => view.given_up(&ids),
            }
        }
    }

    /// False if nothing is missing.
    fn read(&mut self, replica: usize, limit: usize) -> bool {
        let Some(Gap { after, up_to, .. }) = self.views[replica].gap() else { return false };
        let rows = self.ended.iter().filter(|row| (after + 1..=up_to).contains(&row.finished_no));
        let encoded = |row: &Ended| {
            let Told::Path(path) = &row.path else { panic!("a path in the database") };
            Ended { path: Told::Encoded(encode_path(path).into()), ..row.clone() }
        };
        let rows: Vec<Ended> = rows.take(limit).map(encoded).collect();
        assert!(!rows.is_empty(), "a number is missing that was never given out");
        self.views[replica].ended(rows, self.now);
        true
    }

    fn look_up(&mut self, replica: usize) {
        let ids = self.views[replica].older(u64::MAX, 0, usize::MAX);
        let is_open = |id: &u64| self.purchases[(id - 1_000) as usize].state == State::Open;
        let closed: Vec<u64> = ids.into_iter().filter(|id| !is_open(id)).collect();
        self.views[replica].given_up(&closed);
    }

    fn move_to(&mut self, client: usize, replica: usize) {
        self.clients[client].take();
        let finished = self.clients[client].finished;
        // As the door does: what the client was told must have been announced here.
        self.views[replica].given_out(finished, self.now);
        while self.views[replica].announced() < finished {
            assert!(self.read(replica, 2), "what was told is missing, and not known to be");
        }
        let customer = self.clients[client].customer;
        let subscription = self.views[replica].subscribe(customer).expect("a stream");
        let announced = subscription.announced;
        let missed = self.ended.iter().filter(|row| (finished + 1..=announced).contains(&row.finished_no));
        let missed = missed.filter(|row| row.customer_id == customer).cloned().collect::<Vec<_>>();
        let client = &mut self.clients[client];
        (client.replica, client.subscription) = (replica, subscription);
        for row in missed {
            client.tell(row.id, &row.path.into_path().expect("a path"), Some(row.finished_no));
        }
        for news in std::mem::take(&mut client.subscription.open) {
            client.tell(news.id, &news.path, None);
        }
    }

    /// A replica never shows less than before, of any of the last ones.
    fn look(&mut self) {
        for which in self.purchases.len().saturating_sub(LAST)..self.purchases.len() {
            (0..REPLICAS).for_each(|replica| self.look_at(replica, which));
        }
    }

    fn look_at(&mut self, replica: usize, which: usize) {
        let Purchase { id, state, .. } = self.purchases[which];
        let live = self.views[replica].path(id).map_or(0, |path| path.len());
        let kept = if state == State::Ended { self.purchases[which].path.len() } else { 0 };
        let shown = self.shown.entry((replica, id)).or_default();
        assert!(live.max(kept) >= *shown, "replica {replica} shows {live} replies of {id} after {shown}");
        *shown = live.max(kept);
    }

    /// Everything ends, and the database is read.
    fn settle(&mut self) {
        for which in 0..self.purchases.len() {
            let replies = self.purchases[which].path.len();
            self.report(which % REPLICAS, which, replies);
        }
        while !self.untold.is_empty() {
            self.tell_untold(7, true);
            self.tell_untold(7, false);
        }
        for replica in 0..REPLICAS {
            self.views[replica].given_out(self.ended.len() as u64, self.now);
            while self.read(replica, 3) {}
            // What was told too late to be known to have ended.
            self.look_up(replica);
        }
        self.clients.iter_mut().for_each(Client::take);
    }

    fn check(&mut self) {
        let last = self.ended.len() as u64;
        for replica in 0..REPLICAS {
            assert_eq!(self.views[replica].announced(), last);
            assert_eq!(self.views[replica].oldest(), None, "nothing is open");
            assert_eq!(self.admissions[replica].open(), 0, "replica {replica} counts what is not open");
        }
        for client in &self.clients {
            let theirs = |row: &&Ended| row.customer_id == client.customer;
            let expected: BTreeSet<u64> = self
                .ended
                .iter()
                .filter(theirs)
                .filter(|row| row.finished_no > client.first_finished)
                .map(|row| row.id)
                .collect();
            assert_eq!(client.ended, expected, "each end is told once");
            for id in &expected {
                let path = &self.purchases[(id - 1_000) as usize].path;
                let events = saga::events(&purchase_saga(), *id, path).expect("a path").len();
                assert_eq!(client.told[id], events);
            }
            let told: BTreeSet<u64> = client.told.keys().copied().collect();
            assert_eq!(told, expected, "nothing is told as open that had ended before");
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    #[test]
    fn whatever_becomes_of_the_news_each_client_is_told_everything_in_order_and_once(
        steps in prop::collection::vec(any_step(), 0..250),
    ) {
        let mut world = World::new();
        for step in steps {
            world.take(step);
            world.look();
        }
        world.settle();
        world.check();
    }
}

fn open(id: u64) -> OpenPurchase {
    OpenPurchase { id, customer_id: 7, created_at: id }
}

fn ended(id: u64, finished_no: u64) -> Ended {
    Ended { customer_id: 7, finished_no, id, started_at: id, path: Told::Path(whole_path(0)) }
}

fn view(replicas: Replicas, admission: &Admission) -> View {
    View::new(0, replicas, MEMORY, BOUNDS, admission.clone())
}

#[test]
fn what_was_counted_in_is_counted_out_once_however_its_end_is_heard_of() {
    let admission = Admission::new(3, 3);
    let mut one = view(Replicas::Many, &admission);
    let accept = |one: &mut View, ids: &[u64]| {
        ids.iter().for_each(|_| admission.enter(7).expect("room").keep());
        one.opened(one.announced(), ids.iter().copied().map(open).collect(), true);
    };
    accept(&mut one, &[1, 2, 3]);
    assert_eq!(admission.enter(7).map(drop), Err(Refused::Shop));
    // One end is heard before its turn, twice, and one that is not known here at all.
    let now = Instant::now();
    one.ended(vec![ended(2, 3)], now);
    assert_eq!((admission.open(), one.announced()), (2, 0), "there is room although it waits for its turn");
    one.ended(vec![ended(2, 3), ended(900, 2)], now);
    assert_eq!(admission.open(), 2);
    // It is told as open once more, by another replica, and ends when it is its turn.
    one.opened(0, vec![open(2)], false);
    one.ended(vec![ended(1, 1)], now);
    assert_eq!((admission.open(), one.announced()), (1, 3));
    // The last one is left to an operator elsewhere, retried here while that is not known here, and ends.
    admission.found_open([7].into_iter());
    one.opened(3, vec![open(3)], true);
    assert_eq!(admission.open(), 1, "it was counted already");
    one.ended(vec![ended(3, 4)], now);
    assert_eq!((admission.open(), one.oldest()), (0, None));
    // What has ended before this replica tells itself that it is open.
    accept(&mut one, &[]);
    admission.enter(7).expect("room").keep();
    one.opened(3, vec![open(3)], true);
    assert_eq!((admission.open(), one.oldest()), (0, None));
}

#[test]
fn what_was_shown_is_not_taken_back_when_it_is_left_to_an_operator_and_retried() {
    let admission = Admission::new(9, 9);
    let mut one = View::new(0, Replicas::Many, Memory { left_paths: 2, ..MEMORY }, BOUNDS, admission.clone());
    for id in [1, 2, 3] {
        one.opened(0, vec![open(id)], false);
        one.progressed(vec![Grown::to(id, cut(&whole_path(0), 1))]);
    }
    one.given_up(&[3, 2]);
    assert_eq!(one.path(2).map(|path| path.len()), Some(1));
    one.opened(0, vec![open(2)], false);
    assert_eq!(one.path(2).map(|path| path.len()), Some(1));
    // Of too many the oldest is forgotten.
    one.given_up(&[2, 1]);
    assert_eq!([1, 2, 3].map(|id| one.path(id).is_some()), [false, true, true]);
    one.ended(vec![ended(3, 1)], Instant::now());
    assert_eq!(one.path(3), None, "the database has all of it");
}

#[test]
fn what_is_told_too_late_to_be_checked_is_not_opened() {
    let admission = Admission::new(9, 9);
    let mut one = view(Replicas::Many, &admission);
    let now = Instant::now();
    (1..=5).for_each(|no| one.ended(vec![ended(no, no)], now));
    one.opened(1, vec![open(77), open(3)], false);
    assert_eq!(one.older(u64::MAX, 0, 9), [77], "the last four are remembered");
    one.opened(0, vec![open(78)], false);
    assert_eq!(one.older(u64::MAX, 0, 9), [77]);
    admission.enter(7).expect("room").keep();
    one.opened(0, vec![open(79)], true);
    assert_eq!((one.older(u64::MAX, 0, 9), admission.open()), (vec![77], 0));
}

#[test]
fn a_path_that_nobody_listens_to_stays_as_it_came_until_somebody_asks() {
    let admission = Admission::new(9, 9);
    let mut one = view(Replicas::Many, &admission);
    one.opened(0, vec![open(1)], false);
    let grown = |replies: usize, bytes: Bytes| vec![Grown { id: 1, replies, path: Told::Encoded(bytes) }];
    let path = cut(&whole_path(0), 2);
    one.progressed(grown(2, encode_path(&path).into()));
    one.progressed(grown(1, Bytes::from_static(b"nonsense that nobody reads, for it is shorter")));
    assert_eq!(one.path(1), Some(path.clone()));
    let mut subscription = one.subscribe(7).expect("a stream");
    assert_eq!(subscription.open[0].path, path);
    // With somebody listening it is read at once; what cannot be read changes nothing.
    one.progressed(grown(3, Bytes::from_static(b"\xff")));
    assert_eq!(one.path(1), Some(path));
    assert!(subscription.news.try_recv().is_err());
    // An end that cannot be read ends the stream: its client resumes and reads the database.
    let told = Told::Encoded(Bytes::from_static(b"\xff"));
    one.ended(vec![Ended { path: told, ..ended(1, 1) }], Instant::now());
    assert_eq!(
        subscription.news.try_recv().expect_err("no news"),
        tokio::sync::mpsc::error::TryRecvError::Disconnected
    );
    assert_eq!(one.announced(), 1);
}

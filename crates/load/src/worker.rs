//! One thread of load: its customers with their streams, its buyers with their connections, on a runtime of its own.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::io;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::runtime::{Builder, LocalOptions};
use tokio::sync::{Notify, mpsc, watch};
use tokio::task::JoinSet;

use crate::buyer::{Buyer, Sent};
use crate::customer::Customer;
use crate::desk::{Desk, Plan};
use crate::follow::{Follower, follow};
use crate::ledger::{Ledger, SAMPLE};
use crate::options::Until;
use crate::pacer::Pacer;
use crate::poll::poll;
use crate::record::{Failure, Measured, Recorder};
use crate::schedule::Schedule;
use crate::setup::Tokens;
use crate::tracker::Outcome;

/// Requests of an open loop that may wait for a free connection, on one thread. What is due beyond it is counted as not sent.
const MAX_WAITING: usize = 65_536;
/// Event streams that are opened at a time, on one thread.
const OPENED_AT_A_TIME: usize = 64;

/// How far the run is, as whoever leads it tells the threads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stage {
    /// Streams are opened; nothing is sent.
    Preparing,
    /// The load begins at this time.
    Running(Instant),
    /// Nothing new is sent.
    Closing,
    /// Nothing more is waited for.
    Over,
}

/// What a thread tells on its way.
#[derive(Debug)]
pub(crate) enum Message {
    /// Its streams are open.
    Ready,
    /// What was measured in one second of the load.
    Second {
        /// Counted from the beginning of the load; the seconds of the drain go on.
        number: u64,
        /// What was measured.
        measured: Box<Measured>,
        /// Purchases under way.
        open: usize,
    },
}

/// A thread's share.
pub(crate) struct Share {
    pub(crate) plan: Arc<Plan>,
    /// Its number, and of how many.
    pub(crate) thread: u32,
    pub(crate) threads: u32,
    /// Customers who buy, and the place of the first one among all.
    pub(crate) customers: Vec<Tokens>,
    pub(crate) first_customer: u32,
    /// How many buyers it has, and the number of the first one among all.
    pub(crate) buyers: u32,
    pub(crate) first_buyer: u32,
    /// Customers who only listen.
    pub(crate) listeners: Vec<Tokens>,
    /// Further streams, of the listeners if there are any, or of the customers who buy.
    pub(crate) streams: u32,
    pub(crate) stage: watch::Receiver<Stage>,
    pub(crate) messages: mpsc::UnboundedSender<Message>,
}

/// What a thread has measured.
pub(crate) struct Harvest {
    pub(crate) recorder: Recorder,
    pub(crate) ledger: Ledger,
    /// Purchases that were accepted and whose end is not known.
    pub(crate) unresolved: u64,
    /// Purchases that streams told the ends of and no answer named.
    pub(crate) unanswered: Vec<(u64, u32, Outcome)>,
    /// Its customers' newest access tokens.
    pub(crate) bearers: Vec<http::HeaderValue>,
}

impl Harvest {
    /// Puts another thread's to this one. The order of threads is that of their customers.
    pub(crate) fn add(&mut self, other: Harvest) {
        self.recorder.add(&other.recorder);
        self.ledger.add(other.ledger);
        self.unresolved += other.unresolved;
        self.unanswered.extend(other.unanswered);
        self.bearers.extend(other.bearers);
    }
}

/// Does a thread's share.
///
/// # Errors
/// When the system gives no runtime.
pub(crate) fn work(share: Share) -> io::Result<Harvest> {
    let runtime = Builder::new_current_thread().enable_all().build_local(LocalOptions::default())?;
    runtime.block_on(run(share))
}

async fn run(share: Share) -> io::Result<Harvest> {
    let Share { plan, threads, mut stage, messages, .. } = share;
    let options = &plan.options;
    let kept = match (options.verify, options.verify_all) {
        (false, _) => 0,
        (true, true) => usize::MAX,
        (true, false) => SAMPLE.div_ceil(threads as usize),
    };
    let seed = options.seed.wrapping_add(u64::from(share.thread));
    let far = Instant::now() + Duration::from_secs(1 << 30);
    let desk = Rc::new(Desk::new(
        Arc::clone(&plan),
        share.customers.into_iter().map(Customer::new).collect(),
        share.first_customer,
        share.buyers,
        Recorder::new(far, far),
        Ledger::new(plan.carts.all().len(), kept, seed),
    ));
    let mut tasks = JoinSet::new();
    if options.follows() {
        let listeners = share.listeners.into_iter().map(|tokens| Rc::new(Customer::new(tokens))).collect();
        open_streams(&desk, listeners, share.streams, &mut tasks).await;
        tasks.spawn_local(poll(Rc::clone(&desk)));
    }
    // Whoever leads is gone when this fails, and then the stage says so.
    let _ = messages.send(Message::Ready);
    let begin = loop {
        match *stage.borrow_and_update() {
            Stage::Running(begin) => break begin,
            Stage::Preparing => {}
            Stage::Closing | Stage::Over => return Ok(harvest(&desk)),
        }
        if stage.changed().await.is_err() {
            return Ok(harvest(&desk));
        }
    };
    let window = begin + options.warm_up;
    let end = window + options.duration;
    desk.recorder.replace(Recorder::new(window, end));
    tokio::time::sleep_until(begin.into()).await;

    let mut buyers = JoinSet::new();
    let waiting = Rc::new(Waiting::default());
    let _pacer = match options.rate {
        Some(rate) => {
            let schedule = Schedule::new(begin, end, rate, share.thread, threads);
            let pacer = Pacer::start(schedule.clone())?;
            tasks.spawn_local(dispatch(Rc::clone(&desk), schedule, pacer.ticks(), Rc::clone(&waiting)));
            Some(pacer)
        }
        None => None,
    };
    for place in 0..share.buyers {
        let customer = place % (desk.customers.len().max(1) as u32);
        let buyer = Buyer::new(Rc::clone(&desk), place, customer, share.first_buyer + place);
        match options.rate {
            Some(_) => buyers.spawn_local(buy_when_due(Rc::clone(&desk), buyer, Rc::clone(&waiting))),
            None => buyers.spawn_local(buy_again_and_again(Rc::clone(&desk), buyer, place)),
        };
    }

    let mut seconds =
        tokio::time::interval_at((begin + Duration::from_secs(1)).into(), Duration::from_secs(1));
    let mut number = 0;
    let mut buyers_done = false;
    loop {
        let closing = desk.closing.is_cancelled();
        if closing && buyers_done && desk.tracker.borrow().open_count() == 0 {
            break;
        }
        tokio::select! {
            _ = seconds.tick() => {
                tell(&desk, &messages, number);
                number += 1;
            }
            () = tokio::time::sleep_until(end.into()), if !closing => desk.closing.cancel(),
            joined = buyers.join_next(), if !buyers_done => buyers_done = joined.is_none(),
            () = desk.quiet.notified() => {}
            changed = stage.changed() => match *stage.borrow_and_update() {
                _ if changed.is_err() => break,
                Stage::Preparing | Stage::Running(_) => {}
                Stage::Closing => {
                    desk.recorder.borrow_mut().end_at(Instant::now());
                    desk.closing.cancel();
                }
                Stage::Over => break,
            },
        }
    }
    desk.over.cancel();
    while buyers.join_next().await.is_some() {}
    for due in waiting.requests.take() {
        let mut recorder = desk.recorder.borrow_mut();
        recorder.offered(due);
        recorder.failed(due, Failure::NotSent);
    }
    tell(&desk, &messages, number);
    while tasks.join_next().await.is_some() {}
    Ok(harvest(&desk))
}

fn harvest(desk: &Desk) -> Harvest {
    let mut ledger = desk.ledger.borrow().clone();
    let mut unresolved = 0;
    for (_, purchase) in desk.tracker.borrow().open() {
        ledger.unsure(purchase.cart);
        unresolved += 1;
    }
    Harvest {
        recorder: desk.recorder.borrow().clone(),
        ledger,
        unresolved,
        unanswered: desk.unanswered(),
        bearers: desk.customers.iter().map(Customer::bearer).collect(),
    }
}

fn tell(desk: &Desk, messages: &mpsc::UnboundedSender<Message>, number: u64) {
    let measured = Box::new(desk.recorder.borrow_mut().take_interval());
    let open = desk.tracker.borrow().open_count();
    // Whoever leads is gone when this fails, and then the stage says so.
    let _ = messages.send(Message::Second { number, measured, open });
}

/// Opens all streams of this thread, a bounded number at a time, and waits until each is open or was refused.
async fn open_streams(desk: &Rc<Desk>, listeners: Vec<Rc<Customer>>, further: u32, tasks: &mut JoinSet<()>) {
    let buying = desk.customers.len() as u32;
    let own = (0..buying).map(Follower::Buyer);
    let further = (0..further).map(|number| match listeners.get(number as usize % listeners.len().max(1)) {
        Some(listener) => Follower::Listener(Rc::clone(listener)),
        None => Follower::Buyer(number % buying.max(1)),
    });
    let (opening, changed) = (Rc::new(Cell::new(0)), Rc::new(Notify::new()));
    for follower in own.chain(further) {
        while opening.get() >= OPENED_AT_A_TIME {
            changed.notified().await;
        }
        opening.set(opening.get() + 1);
        let opened = {
            let (opening, changed) = (Rc::clone(&opening), Rc::clone(&changed));
            move || {
                opening.set(opening.get() - 1);
                changed.notify_one();
            }
        };
        tasks.spawn_local(follow(Rc::clone(desk), follower, opened));
    }
    while opening.get() > 0 {
        changed.notified().await;
    }
}

/// Closed loop: the next request is sent when the one before it is done.
async fn buy_again_and_again(desk: Rc<Desk>, mut buyer: Buyer, place: u32) {
    let until_completed = desk.plan.options.until == Until::Completed;
    while !desk.closing.is_cancelled() {
        match buyer.send(Instant::now()).await {
            Sent::Accepted if until_completed => desk.until_ended(place).await,
            Sent::Accepted => {}
            Sent::Failed(pause) => {
                tokio::select! {
                    () = tokio::time::sleep(pause) => {}
                    () = desk.closing.cancelled() => {}
                }
            }
        }
    }
}

/// Requests of an open loop that are due and wait for a connection.
#[derive(Default)]
struct Waiting {
    requests: RefCell<VecDeque<Instant>>,
    one_more: Notify,
}

/// Open loop: takes what is due as long as there is or will be something.
async fn buy_when_due(desk: Rc<Desk>, mut buyer: Buyer, waiting: Rc<Waiting>) {
    while !desk.over.is_cancelled() {
        let due = waiting.requests.borrow_mut().pop_front();
        match due {
            // Nothing is waited for after a failure: the rate is the rate.
            Some(due) => {
                let _ = buyer.send(due).await;
            }
            None => {
                tokio::select! {
                    biased;
                    () = waiting.one_more.notified() => {}
                    () = desk.closing.cancelled() => return,
                }
            }
        }
    }
}

/// Puts what is due where free connections look for it.
async fn dispatch(desk: Rc<Desk>, mut schedule: Schedule, ticks: Arc<Notify>, waiting: Rc<Waiting>) {
    while schedule.next_due().is_some() {
        tokio::select! {
            () = ticks.notified() => {}
            () = desk.closing.cancelled() => {}
        }
        let now = Instant::now();
        while let Some(due) = schedule.take(now) {
            let room = waiting.requests.borrow().len() < MAX_WAITING;
            if room {
                waiting.requests.borrow_mut().push_back(due);
                waiting.one_more.notify_one();
            } else {
                let mut recorder = desk.recorder.borrow_mut();
                recorder.offered(due);
                recorder.failed(due, Failure::NotSent);
            }
        }
        if desk.closing.is_cancelled() {
            return;
        }
    }
}

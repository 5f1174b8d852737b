//! The reconciler: whatever is open and due is driven again from its start, until it has ended.
//!
//! Participants answer a repeated command with their recorded reply, so a start that is published again brings a saga to where it
//! was, and on; one that was only slow is not disturbed. Past its deadline a purchase is started so that its deciding
//! step is asked to cancel. After as many tries of that as are allowed it is left to an operator.
//!
//! Where several replicas work on one database, each takes what is due and not taken by another, and puts off when it is due again in
//! the same transaction; a start of one wakes nothing, for the others are at work. Alone, a start wakes everything:
//! whatever messages there were are lost.
//!
//! What never happens: an open purchase that is never due; a replay that feeds an overload (nothing is replayed while
//! one of the queues that it would pass is more than half full); a saga that is given up because the process was restarted too
//! often, or because the bus took nothing.

use std::collections::{HashMap, VecDeque};
use std::time::Duration;

use bus::{Bus, Envelope, EnvelopeId, Subject};
use db::Db;
use saga::Mode;
use shop::purchase::{INVENTORY_COMMANDS, ORCHESTRATOR, ORDER_COMMANDS, PAYMENT_COMMANDS, PurchaseStep};
use telemetry::Spans;
use telemetry::spans::{Cause, Kind};
use tokio::time::MissedTickBehavior;
use tokio_util::sync::CancellationToken;
use wire::ids;
use wire::messages::{self, Pen, encode_path};
use wire::time::{Clock, UnixMillis};

use crate::accept::{about, millis, start_message};
use crate::admission::Admission;
use crate::live::{Live, Replicas};
use crate::metrics::SagaMetrics;
use crate::store::{self, Due, OpenPurchase, Take};

/// Purchases that are replayed in one frame at most.
const PAGE_PURCHASES: usize = 256;
/// The queues that a replay passes.
const REPLAY_QUEUES: [Subject; 4] = [ORCHESTRATOR, INVENTORY_COMMANDS, ORDER_COMMANDS, PAYMENT_COMMANDS];
/// Bounds that are noted at most while their grace time passes.
const MAX_NOTES: usize = 1_024;
/// Why an operator is asked.
const GIVEN_UP: &str = "it was tried as often as is allowed and has not ended";

/// How often, and how long, a purchase is tried.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Settings {
    /// The delay before the second try; it doubles with each.
    pub(crate) retry_first: Duration,
    /// The longest such delay.
    pub(crate) retry_max: Duration,
    /// After so many tries behind its deadline a purchase is left to an operator.
    pub(crate) max_tries: u32,
    /// How often the reconciler looks for what is due.
    pub(crate) look_interval: Duration,
    /// How often participants are told what they may forget.
    pub(crate) purge_interval: Duration,
    /// What has ended may be forgotten after this time: longer than any message stays under way.
    pub(crate) purge_grace: Duration,
    /// Who works on the database.
    pub(crate) replicas: Replicas,
}

/// Among several replicas a delay is cut by up to this part of it, each purchase's by another: so what became due at one time
/// spreads out.
const SPREAD: u32 = 4;

/// What the reconciler works with.
#[derive(Clone)]
pub(crate) struct Reconciler {
    pub(crate) db: Db,
    pub(crate) bus: Bus,
    pub(crate) clock: Clock,
    pub(crate) live: Live,
    pub(crate) admission: Admission,
    pub(crate) metrics: SagaMetrics,
    pub(crate) spans: Spans,
    pub(crate) settings: Settings,
}

/// What is to be done about a purchase that is due.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Next {
    /// Start its saga in this mode; look after it again at this time, with so many tries behind it.
    Start { mode: Mode, next_wake_at: UnixMillis, tries: u32 },
    /// Leave it to an operator.
    GiveUp,
}

/// A start that is being published, should the bus refuse it.
struct Untried {
    id: u64,
    /// The tries that were written for it.
    tries: u32,
    /// When it is due again at the latest.
    not_after: UnixMillis,
}

impl Settings {
    /// Pure: the reconciler's whole judgement.
    fn judge(&self, due: &Due, now: UnixMillis) -> Next {
        let Due { deadline_at, .. } = *due;
        let (mode, tries) = if now < deadline_at {
            (Mode::Execute, due.tries)
        } else if due.next_wake_at <= deadline_at {
            // So far it was only driven on; now it is decided, and that is to be tried as often.
            (Mode::Decide, 0)
        } else {
            (Mode::Decide, due.tries)
        };
        if mode == Mode::Decide && tries >= self.max_tries {
            return Next::GiveUp;
        }
        let delay = self.retry_first.saturating_mul(1 << tries.min(16)).min(self.retry_max);
        let mut next_wake_at = now.saturating_add(millis(self.spread(delay, due.id, tries)));
        if mode == Mode::Execute {
            // Not later than when it can be cancelled.
            next_wake_at = next_wake_at.min(deadline_at.max(now + 1));
        }
        Next::Start { mode, next_wake_at, tries: tries.saturating_add(1) }
    }

    /// Less of the delay, as the purchase's id and the try will have it.
    fn spread(&self, delay: Duration, id: u64, tries: u32) -> Duration {
        match self.replicas {
            Replicas::One => delay,
            Replicas::Many => {
                // Fibonacci hashing: consecutive ids fall far apart.
                let hash = (id ^ u64::from(tries) << 56).wrapping_mul(0x9E37_79B9_7F4A_7C15);
                delay - (delay / SPREAD).mul_f64((hash >> 40) as f64 / (1_u64 << 24) as f64)
            }
        }
    }

    /// When a start that the bus refused is tried again; it was not tried. One that was to be driven on is due at its deadline at the
    /// latest, and so is known then as one that nobody has asked to decide.
    fn refused(&self, untried: &Untried, now: UnixMillis) -> UnixMillis {
        let delay =
            self.spread(self.retry_first.min(self.retry_max), untried.id, untried.tries.saturating_sub(1));
        now.saturating_add(millis(delay)).min(untried.not_after)
    }
}

impl Reconciler {
    /// At a start, before anything else runs: everything open is due now, and is counted and watched. Whatever messages there
    /// were about it may be lost. Not so where other replicas are at work: it is theirs, or due when it is due.
    pub(crate) async fn adopt(&self) -> Result<usize, db::Error> {
        if self.settings.replicas == Replicas::Many {
            return Ok(0);
        }
        let (now, after) = (self.clock.now(), self.live.announced());
        let open: Vec<OpenPurchase> = self.db.write(move |tx| store::wake_all(tx, now)).await?;
        let count = open.len();
        self.admission.found_open(open.iter().map(|open| open.customer_id));
        // An error means that the service is stopping already.
        let _ = self.live.opened(after, open).await;
        Ok(count)
    }

    /// Runs until `stop`.
    pub(crate) async fn run(self, stop: CancellationToken) {
        let mut tick = tokio::time::interval(self.settings.look_interval);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut purge = tokio::time::interval(self.settings.purge_interval);
        purge.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut ended = EndedBelow::default();
        loop {
            let done = tokio::select! {
                biased;
                () = stop.cancelled() => return,
                _ = tick.tick() => self.reconcile(&stop).await,
                _ = purge.tick() => self.purge(&mut ended).await,
            };
            if let Err(error) = done {
                tracing::warn!(%error, "the reconciler could not do its work; it tries again");
            }
        }
    }

    /// Replays what is due, page by page, as long as the bus has room to spare.
    async fn reconcile(&self, stop: &CancellationToken) -> Result<(), db::Error> {
        let mut after = 0;
        while !stop.is_cancelled() {
            let limits = self.bus.limits();
            let room = limits.queue_envelopes / 2;
            if !self.has_room().await {
                break;
            }
            // A page is one frame, and it fits: what is refused would have been tried in vain.
            let page = PAGE_PURCHASES.min(limits.frame_envelopes).min(room).max(1);
            match self.replay_page(after, page).await? {
                Some(last) => after = last,
                None => break,
            }
        }
        let parked = self.db.read(store::count_left_to_operator).await?;
        let oldest = match self.settings.replicas {
            Replicas::One => self.live.oldest().await.ok().flatten(),
            Replicas::Many => self.db.read(store::oldest_open).await?,
        };
        let age = oldest.map_or(0, |since| self.clock.now().saturating_sub(since));
        self.metrics.standing(self.admission.open(), age, parked);
        Ok(())
    }

    /// Replays one page of what is due, behind this id; returns the last id of a full page, behind which there may be more.
    async fn replay_page(&self, after: u64, purchases: usize) -> Result<Option<u64>, db::Error> {
        let limit = u32::try_from(purchases).unwrap_or(u32::MAX);
        let now = self.clock.now();
        let settings = self.settings;
        // No purchase is ever postponed further than this. If one is, the clock was set back, and it is due.
        let horizon = now.saturating_add(millis(settings.retry_max));
        let judge = move |due: Due| {
            let next = settings.judge(&due, now);
            (due, next)
        };
        let due = self.db.read(move |tx| store::due(tx, Take::Look, now, horizon, after, limit)).await?;
        let Some(last) = due.last().map(|due| due.id) else { return Ok(None) };
        // Of these, other replicas may take some: whether there are more behind them is seen here.
        let last = (due.len() == purchases).then_some(last);
        let paths = self.paths_to_keep(due.into_iter().map(judge).collect()).await;
        let judged: Vec<(Due, Next)> = self
            .db
            .write(move |tx| {
                let due = store::due(tx, Take::Lock, now, horizon, after, limit)?;
                let judged: Vec<_> = due.into_iter().map(judge).collect();
                let postponed = judged.iter().filter_map(|(due, next)| match next {
                    Next::Start { next_wake_at, tries, .. } => Some((due.id, *next_wake_at, *tries)),
                    Next::GiveUp => None,
                });
                store::postpone(tx, postponed)?;
                let left = given_up(&judged).map(|due| (due.id, paths.get(&due.id).map(Vec::as_slice)));
                store::give_up(tx, left, GIVEN_UP)?;
                Ok::<_, db::Error>(judged)
            })
            .await?;
        failpoint::hit("purchase.reconcile.committed");
        self.let_go(&judged).await;
        self.publish(judged).await?;
        Ok(last)
    }

    /// Whether no queue that a replay passes is more than half full. One that does not say would not take a replay either.
    async fn has_room(&self) -> bool {
        for queue in REPLAY_QUEUES {
            match self.bus.is_half_full(queue).await {
                Ok(false) => {}
                Ok(true) => {
                    tracing::warn!(%queue, "nothing is replayed: a queue is more than half full");
                    return false;
                }
                Err(error) => {
                    tracing::warn!(%queue, %error, "nothing is replayed: a queue is out of reach");
                    return false;
                }
            }
        }
        true
    }

    /// How far those have come that are to be left to an operator: the operator and the customer want to see it.
    async fn paths_to_keep(&self, judged: Vec<(Due, Next)>) -> HashMap<u64, Vec<u8>> {
        let mut paths = HashMap::new();
        for due in given_up(&judged) {
            if let Ok(Some(path)) = self.live.path(due.id).await {
                paths.insert(due.id, encode_path(&path));
            }
        }
        paths
    }

    async fn let_go(&self, judged: &[(Due, Next)]) {
        for due in given_up(judged) {
            tracing::error!(
                purchase = due.id,
                customer = due.customer_id,
                trace = due.trace,
                "a purchase needs an operator: {GIVEN_UP}"
            );
        }
        // An error means that the service is stopping.
        let _ = self.live.given_up(given_up(judged).map(|due| due.id).collect()).await;
    }

    async fn publish(&self, judged: Vec<(Due, Next)>) -> Result<(), db::Error> {
        let mut frame = Vec::with_capacity(judged.len());
        let mut pen = Pen::for_messages(judged.len());
        let mut untried = Vec::with_capacity(judged.len());
        let mut traced = self.spans.handle(judged.len());
        for (due, next) in judged {
            let Next::Start { mode, tries, .. } = next else { continue };
            let not_after = if mode == Mode::Execute { due.deadline_at } else { UnixMillis::MAX };
            untried.push(Untried { id: due.id, tries, not_after });
            tracing::debug!(purchase = due.id, trace = due.trace, ?mode, tries = due.tries, "replaying");
            traced.add(frame.len(), due.trace.as_bytes(), Cause::Span);
            let trace = traced.carry(frame.len()).unwrap_or(due.trace);
            let about = about(due.created_at, &due.input, &trace);
            let start = start_message(due.id, mode, &about, &mut pen);
            traced.calls_for(frame.len(), ORCHESTRATOR.0, start.id.number());
            frame.push(start);
        }
        let (count, began) = (frame.len(), traced.publishing());
        let published = self.bus.publish(ORCHESTRATOR, frame).await;
        traced.published(ORCHESTRATOR.0, began, count, published.is_ok());
        traced.end(Kind::Internal, "reconcile", &[]);
        if let Err(refused) = published {
            tracing::warn!(%refused, sagas = count, "replays were refused; they come again");
            let (now, settings) = (self.clock.now(), self.settings);
            let put_back = move |tx: &mut db::Tx<'_>| {
                let rows = untried.iter().map(|untried| store::PutBack {
                    id: untried.id,
                    tries: untried.tries,
                    before: untried.tries.saturating_sub(1),
                    next_wake_at: settings.refused(untried, now),
                });
                store::put_back(tx, rows)
            };
            self.db.write(put_back).await?;
        }
        Ok(())
    }

    /// Opens a purchase again that was left to an operator. False when it is not such a one. Once begun it runs to its
    /// end, even if nobody waits for it any more.
    pub(crate) async fn retry(&self, id: u64) -> Result<bool, db::Error> {
        let reconciler = self.clone();
        let retrying = tokio::spawn(async move { reconciler.retry_to_the_end(id).await });
        retrying.await.unwrap_or(Err(db::Error::Panicked))
    }

    /// It is counted and watched before it is open: as soon as it is, it may end, and is counted out.
    async fn retry_to_the_end(&self, id: u64) -> Result<bool, db::Error> {
        let after = self.live.announced();
        let Some(parked) = self.db.read(move |tx| store::left_to_operator_as(tx, id)).await? else {
            return Ok(false);
        };
        let customer = [parked.customer_id];
        self.admission.found_open(customer.into_iter());
        // An error means that the service is stopping.
        let _ = self.live.opened(after, vec![parked]).await;
        let now = self.clock.now();
        let retried = self.db.write(move |tx| store::retry(tx, id, now)).await;
        if !matches!(retried, Ok(true)) {
            let _ = self.live.found_not_open(vec![id]).await;
        }
        retried
    }

    /// Tells the participants which barrier rows nobody will ask for again.
    async fn purge(&self, ended: &mut EndedBelow) -> Result<(), db::Error> {
        let (now, grace) = (self.clock.now(), self.settings.purge_grace);
        // Where nothing is open the bound is above the highest id, and that may be of a replica whose clock is ahead: others will yet give
        // out lower ones.
        let below = self.db.read(store::all_ended_below).await?.min(ids::lowest_at(now / 1_000));
        let Some(below) = ended.settle(now, below, grace) else {
            return Ok(());
        };
        let steps =
            [PurchaseStep::UpdateProductInventory, PurchaseStep::CreateOrder, PurchaseStep::CreatePayment];
        for step in steps {
            let body = messages::purge(below);
            let envelope = Envelope { id: EnvelopeId::of(below, u64::MAX), body };
            if let Err(refused) = self.bus.publish(step.commands(), vec![envelope]).await {
                tracing::debug!(%refused, "a participant was not told what it may forget");
            }
        }
        Ok(())
    }
}

/// The ids below which every saga had ended, and since when that is known. A saga that ends late has old replies; a
/// message about it may be younger than they are.
#[derive(Debug, Default)]
struct EndedBelow(VecDeque<(UnixMillis, u64)>);

impl EndedBelow {
    /// Takes note of a bound, and gives the newest that has been known for the grace time, and has held since.
    fn settle(&mut self, now: UnixMillis, below: u64, grace: Duration) -> Option<u64> {
        // A clock that was set back starts the time anew.
        self.0.retain(|(since, _)| *since <= now);
        if self.0.len() < MAX_NOTES {
            self.0.push_back((now, below));
        }
        let settled = self.0.iter().take_while(|(since, _)| since.saturating_add(millis(grace)) <= now);
        let count = settled.count();
        self.0.drain(..count.saturating_sub(1));
        let held = self.0.iter().map(|(_, below)| *below).min();
        held.filter(|_| count > 0)
    }
}

fn given_up(judged: &[(Due, Next)]) -> impl Iterator<Item = &Due> {
    judged.iter().filter(|(_, next)| *next == Next::GiveUp).map(|(due, _)| due)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU64, Ordering};

    use testdb::TestDb;

    use super::*;
    use crate::feed::Outgoing;
    use crate::live;

    const SETTINGS: Settings = Settings {
        retry_first: Duration::from_secs(5),
        retry_max: Duration::from_secs(60),
        max_tries: 6,
        look_interval: Duration::from_millis(500),
        purge_interval: Duration::from_secs(60),
        purge_grace: Duration::from_secs(600),
        replicas: Replicas::One,
    };

    fn due(tries: u32, next_wake_at: UnixMillis, deadline_at: UnixMillis) -> Due {
        let (input, trace) = (Vec::new(), String::new());
        let (id, customer_id, created_at) = (1, 1, 0);
        Due { id, customer_id, input, trace, created_at, deadline_at, next_wake_at, tries }
    }

    fn judge(tries: u32, next_wake_at: UnixMillis, deadline_at: UnixMillis, now: UnixMillis) -> Next {
        SETTINGS.judge(&due(tries, next_wake_at, deadline_at), now)
    }

    testdb::on_both! {
        #[tokio::test]
        a_start_that_the_bus_refuses_was_no_try;
    }

    /// A reconciler on a bus that takes nothing.
    async fn unheard(db: &Db, now: Arc<AtomicU64>) -> Reconciler {
        let bus = Bus::embedded(bus::Limits::default());
        bus.close().await;
        let admission = Admission::new(9, 9);
        let (live, watching) = Live::start(live::Parts {
            announced: 0,
            bounds: live::Bounds { max_streams: 1, max_streams_per_customer: 1 },
            admission: admission.clone(),
            others: Outgoing::nobody(),
            reader: None,
        });
        tokio::spawn(watching);
        let registry = telemetry::Registry::new();
        let metrics = SagaMetrics::new(&registry, &telemetry::PubsubMetrics::new(&registry, "test"));
        let clock = Clock::from_fn(move || now.load(Ordering::SeqCst));
        Reconciler {
            db: db.clone(),
            bus,
            clock,
            live,
            admission,
            metrics,
            spans: Spans::off(),
            settings: SETTINGS,
        }
    }

    /// One that was just accepted.
    fn purchase() -> store::NewPurchase {
        store::NewPurchase {
            id: 1,
            customer_id: 7,
            key: None,
            input: bytes::Bytes::from_static(b"input"),
            trace: String::new(),
            created_at: 0,
            deadline_at: 60_000,
            next_wake_at: 5_000,
        }
    }

    /// How often each open purchase was tried, and when it is due again.
    async fn tries(db: &Db) -> Vec<(u32, UnixMillis)> {
        let due = db.read(|tx| store::due(tx, Take::Look, u64::MAX >> 1, u64::MAX >> 1, 0, 9)).await;
        due.expect("what is due").iter().map(|due| (due.tries, due.next_wake_at)).collect()
    }

    async fn a_start_that_the_bus_refuses_was_no_try(at: &TestDb) {
        let (db, now) = (at.open(crate::MIGRATIONS), Arc::new(AtomicU64::new(0)));
        let new = purchase();
        db.write(move |tx| store::insert(tx, [&new].into_iter())).await.expect("a purchase");
        let reconciler = unheard(&db, Arc::clone(&now)).await;
        // However long nothing is taken, before the deadline and after: it is tried again soon, and not given up.
        for at in (5_000..=200_000).step_by(5_000) {
            now.store(at, Ordering::SeqCst);
            reconciler.reconcile(&CancellationToken::new()).await.expect("it looks");
            assert_eq!(tries(&db).await, [(0, at + 5_000)]);
        }
    }

    /// However often it was driven on before: what is decided is tried as often as is allowed.
    #[tokio::test]
    async fn a_start_that_is_refused_right_before_the_deadline_is_no_try_to_decide() {
        let (at, now) = (TestDb::sqlite(), Arc::new(AtomicU64::new(58_000)));
        let db = at.open(crate::MIGRATIONS);
        let new = purchase();
        let many = SETTINGS.max_tries + 1;
        let tried = move |tx: &mut db::Tx<'_>| {
            store::insert(tx, [&new].into_iter())?;
            store::postpone(tx, [(1, 58_000, many)].into_iter())
        };
        db.write(tried).await.expect("a purchase");
        let reconciler = unheard(&db, Arc::clone(&now)).await;
        for (at, expected) in [(58_000, (many, 60_000)), (60_000, (0, 65_000))] {
            now.store(at, Ordering::SeqCst);
            reconciler.reconcile(&CancellationToken::new()).await.expect("it looks");
            assert_eq!(tries(&db).await, [expected], "at {at}");
        }
    }

    #[test]
    fn what_has_ended_is_forgotten_only_after_the_grace_time() {
        let grace = Duration::from_secs(10);
        let mut ended = EndedBelow::default();
        assert_eq!(ended.settle(1_000, 5, grace), None);
        assert_eq!(ended.settle(6_000, 7, grace), None);
        assert_eq!(ended.settle(11_000, 9, grace), Some(5));
        assert_eq!(ended.settle(12_000, 9, grace), Some(5));
        assert_eq!(ended.settle(16_000, 9, grace), Some(7));
        assert_eq!(ended.settle(60_000, 9, grace), Some(9));
        assert_eq!(ended.settle(61_000, 8, grace), Some(8), "one of another worker has come since");
        assert_eq!(ended.settle(72_000, 9, grace), Some(8), "and may be under way");
        assert_eq!(ended.settle(83_000, 9, grace), Some(9));
        assert_eq!(ended.settle(2_000, 9, grace), None, "the clock was set back");
        assert_eq!(EndedBelow::default().settle(1, 3, Duration::ZERO), Some(3));
    }

    #[test]
    fn tries_back_off_up_to_the_deadline() {
        let execute = |next_wake_at, tries| Next::Start { mode: Mode::Execute, next_wake_at, tries };
        assert_eq!(judge(0, 1_000, 100_000, 1_000), execute(6_000, 1));
        assert_eq!(judge(2, 1_000, 100_000, 1_000), execute(21_000, 3));
        assert_eq!(judge(5, 1_000, 100_000, 1_000), execute(61_000, 6));
        assert_eq!(
            judge(60, 1_000, 100_000, 1_000),
            execute(61_000, 61),
            "nothing is given up before its deadline"
        );
        assert_eq!(judge(1, 1_000, 8_000, 1_000), execute(8_000, 2), "it can be cancelled in time");
    }

    #[test]
    fn among_replicas_what_was_due_at_one_time_spreads_out_and_is_never_later() {
        let many = Settings { replicas: Replicas::Many, ..SETTINGS };
        let wakes: Vec<u64> = (0..1_000)
            .map(|id| {
                let due = Due { id, ..due(2, 1_000, 100_000) };
                let Next::Start { next_wake_at, .. } = many.judge(&due, 1_000) else { panic!("given up") };
                next_wake_at
            })
            .collect();
        assert!(wakes.iter().all(|at| (16_000..=21_000).contains(at)), "a quarter of 20 s at most");
        let in_each_second = |second| wakes.iter().filter(|at| (**at - 16_000) / 1_000 == second).count();
        (0..5).for_each(|second| assert!((100..300).contains(&in_each_second(second)), "{wakes:?}"));
        assert!((many.retry_first * 3 / 4..=many.retry_first).contains(&many.spread(many.retry_first, 7, 3)));
    }

    #[test]
    fn what_is_late_is_decided_and_given_up_after_as_many_tries_as_are_allowed() {
        let decide = |next_wake_at, tries| Next::Start { mode: Mode::Decide, next_wake_at, tries };
        assert_eq!(judge(5, 8_000, 8_000, 8_000), decide(13_000, 1), "it is decided from the first try on");
        assert_eq!(judge(900, 7_000, 8_000, 9_000), decide(14_000, 1));
        assert_eq!(judge(1, 13_000, 8_000, 14_000), decide(24_000, 2));
        assert_eq!(judge(6, 13_000, 8_000, 14_000), Next::GiveUp);
        assert_eq!(judge(u32::MAX, 13_000, 8_000, 14_000), Next::GiveUp);
    }
}

//! The reconciler: whatever is open and due is driven again from its start, until it has ended.
//!
//! Participants answer a repeated command with their recorded reply, so a start that is published again brings a saga to where it
//! was, and on; one that was only slow is not disturbed. Past its deadline a purchase is started so that its deciding
//! step is asked to cancel. After as many tries as are allowed it is left to an operator.
//!
//! What never happens: an open purchase that is never due; a replay that feeds an overload (nothing is replayed while the
//! queue is half full); a saga that is given up because the process was restarted too often.

use std::time::Duration;

use bus::{Bus, Envelope, EnvelopeId};
use db::Db;
use saga::Mode;
use shop::purchase::{ORCHESTRATOR, PurchaseStep};
use tokio::time::MissedTickBehavior;
use tokio_util::sync::CancellationToken;
use wire::ids;
use wire::messages::{Purge, ToParticipant};
use wire::time::{Clock, UnixMillis};

use crate::accept::{millis, start_message};
use crate::admission::Admission;
use crate::live::Live;
use crate::metrics::SagaMetrics;
use crate::store::{self, Due, OpenPurchase};

/// With nothing open, everything older than this is known to have ended.
const PURGE_MARGIN: Duration = Duration::from_secs(3_600);
/// Purchases that are replayed in one frame at most.
const PAGE_PURCHASES: usize = 256;
/// Why an operator is asked.
const GIVEN_UP: &str = "it was tried as often as is allowed and has not ended";

/// How often, and how long, a purchase is tried.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Settings {
    /// The delay before the second try; it doubles with each.
    pub(crate) retry_first: Duration,
    /// The longest such delay.
    pub(crate) retry_max: Duration,
    /// After so many tries a purchase is left to an operator.
    pub(crate) max_tries: u32,
    /// How often the reconciler looks for what is due.
    pub(crate) look_interval: Duration,
    /// How often participants are told what they may forget.
    pub(crate) purge_interval: Duration,
}

/// What the reconciler works with.
#[derive(Clone)]
pub(crate) struct Reconciler {
    pub(crate) db: Db,
    pub(crate) bus: Bus,
    pub(crate) clock: Clock,
    pub(crate) live: Live,
    pub(crate) admission: Admission,
    pub(crate) metrics: SagaMetrics,
    pub(crate) settings: Settings,
}

/// What is to be done about a purchase that is due.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Next {
    /// Start its saga in this mode; look after it again at this time.
    Start { mode: Mode, next_wake_at: UnixMillis },
    /// Leave it to an operator.
    GiveUp,
}

impl Settings {
    /// Pure: the reconciler's whole judgement.
    fn judge(&self, tries: u32, deadline_at: UnixMillis, now: UnixMillis) -> Next {
        if tries >= self.max_tries {
            return Next::GiveUp;
        }
        let mode = if now >= deadline_at { Mode::Decide } else { Mode::Execute };
        let delay = self.retry_first.saturating_mul(1 << tries.min(16)).min(self.retry_max);
        let mut next_wake_at = now.saturating_add(millis(delay));
        if mode == Mode::Execute {
            // Not later than when it can be cancelled.
            next_wake_at = next_wake_at.min(deadline_at.max(now + 1));
        }
        Next::Start { mode, next_wake_at }
    }
}

impl Reconciler {
    /// At a start, before anything else runs: everything open is due now, and is counted and watched. Whatever messages there
    /// were about it may be lost.
    pub(crate) async fn adopt(&self) -> Result<usize, db::Error> {
        let now = self.clock.now();
        let open: Vec<OpenPurchase> = self.db.write(move |tx| store::wake_all(tx, now)).await?;
        let count = open.len();
        self.admission.found_open(open.iter().map(|open| open.customer_id));
        // An error means that the service is stopping already.
        let _ = self.live.opened(open).await;
        Ok(count)
    }

    /// Runs until `stop`.
    pub(crate) async fn run(self, stop: CancellationToken) {
        let mut tick = tokio::time::interval(self.settings.look_interval);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut purge = tokio::time::interval(self.settings.purge_interval);
        purge.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            let done = tokio::select! {
                biased;
                () = stop.cancelled() => return,
                _ = tick.tick() => self.reconcile(&stop).await,
                _ = purge.tick() => self.purge().await,
            };
            if let Err(error) = done {
                tracing::warn!(%error, "the reconciler could not do its work; it tries again");
            }
        }
    }

    /// Replays what is due, page by page, as long as the bus has room to spare.
    async fn reconcile(&self, stop: &CancellationToken) -> Result<(), db::Error> {
        while !stop.is_cancelled() {
            let limits = self.bus.limits();
            let room = limits.queue_envelopes / 2;
            if self.bus.depth(ORCHESTRATOR).held() > room {
                tracing::warn!("nothing is replayed: the queue is more than half full");
                break;
            }
            // A page is one frame, and it fits: what is refused would have been tried in vain.
            let page = PAGE_PURCHASES.min(limits.frame_envelopes).min(room).max(1);
            if self.replay_page(page).await? < page {
                break;
            }
        }
        let parked = self.db.read(store::count_left_to_operator).await?;
        let oldest = self.live.oldest().await.ok().flatten();
        let age = oldest.map_or(0, |since| self.clock.now().saturating_sub(since));
        self.metrics.standing(self.admission.open(), age, parked);
        Ok(())
    }

    /// Replays one page of what is due; returns how many there were.
    async fn replay_page(&self, purchases: usize) -> Result<usize, db::Error> {
        let limit = u32::try_from(purchases).unwrap_or(u32::MAX);
        let now = self.clock.now();
        let idle = self.db.read(move |tx| Ok::<_, db::Error>(store::due(tx, now, 1)?.is_empty())).await?;
        if idle {
            return Ok(0);
        }
        let settings = self.settings;
        let judged: Vec<(Due, Next)> = self
            .db
            .write(move |tx| {
                let judge = |due: Due| {
                    let next = settings.judge(due.tries, due.deadline_at, now);
                    (due, next)
                };
                let judged: Vec<_> = store::due(tx, now, limit)?.into_iter().map(judge).collect();
                let postponed = judged.iter().filter_map(|(due, next)| match next {
                    Next::Start { next_wake_at, .. } => Some((due.id, *next_wake_at, due.tries + 1)),
                    Next::GiveUp => None,
                });
                store::postpone(tx, postponed)?;
                store::give_up(tx, given_up(&judged).map(|due| due.id), GIVEN_UP)?;
                Ok::<_, db::Error>(judged)
            })
            .await?;
        failpoint::hit("purchase.reconcile.committed");
        let count = judged.len();
        self.let_go(&judged).await;
        self.publish(judged).await;
        Ok(count)
    }

    async fn let_go(&self, judged: &[(Due, Next)]) {
        for due in given_up(judged) {
            tracing::error!(purchase = due.id, trace = due.trace, "a purchase needs an operator: {GIVEN_UP}");
        }
        self.admission.leave(given_up(judged).map(|due| due.customer_id));
        // An error means that the service is stopping.
        let _ = self.live.given_up(given_up(judged).map(|due| due.id).collect()).await;
    }

    async fn publish(&self, judged: Vec<(Due, Next)>) {
        let mut frame = Vec::with_capacity(judged.len());
        for (due, next) in judged {
            let Next::Start { mode, .. } = next else { continue };
            tracing::debug!(purchase = due.id, trace = due.trace, ?mode, tries = due.tries, "replaying");
            frame.push(start_message(due.id, mode, due.created_at, due.input.into(), &due.trace));
        }
        let count = frame.len();
        if let Err(refused) = self.bus.publish(ORCHESTRATOR, frame).await {
            tracing::warn!(%refused, sagas = count, "replays were refused; they come again");
        }
    }

    /// Opens a purchase again that was left to an operator. False when it is not such a one.
    pub(crate) async fn retry(&self, id: u64) -> Result<bool, db::Error> {
        let now = self.clock.now();
        let Some(open) = self.db.write(move |tx| store::retry(tx, id, now)).await? else {
            return Ok(false);
        };
        self.admission.found_open([open.customer_id].into_iter());
        // An error means that the service is stopping.
        let _ = self.live.opened(vec![open]).await;
        Ok(true)
    }

    /// Tells the participants which barrier rows nobody will ask for again.
    async fn purge(&self) -> Result<(), db::Error> {
        let oldest = self.db.read(store::oldest_unfinished).await?;
        let now = self.clock.now();
        let below = oldest.unwrap_or_else(|| first_id_at(now.saturating_sub(millis(PURGE_MARGIN))));
        let steps =
            [PurchaseStep::UpdateProductInventory, PurchaseStep::CreateOrder, PurchaseStep::CreatePayment];
        for step in steps {
            let body = ToParticipant::Purge(Purge { below }).encode();
            let envelope = Envelope { id: EnvelopeId::of(below, u64::MAX), body };
            if let Err(refused) = self.bus.publish(step.commands(), vec![envelope]).await {
                tracing::debug!(%refused, "a participant was not told what it may forget");
            }
        }
        Ok(())
    }
}

fn given_up(judged: &[(Due, Next)]) -> impl Iterator<Item = &Due> {
    judged.iter().filter(|(_, next)| *next == Next::GiveUp).map(|(due, _)| due)
}

/// The smallest id that can be given out at a time.
fn first_id_at(at: UnixMillis) -> u64 {
    ids::Parts { second: ids::second_of(at / 1_000), worker: 0, sequence: 0 }.compose()
}

#[cfg(test)]
mod tests {
    use super::*;

    const SETTINGS: Settings = Settings {
        retry_first: Duration::from_secs(5),
        retry_max: Duration::from_secs(60),
        max_tries: 6,
        look_interval: Duration::from_millis(500),
        purge_interval: Duration::from_secs(60),
    };

    #[test]
    fn tries_back_off_then_decide_then_give_up() {
        let execute = |next_wake_at| Next::Start { mode: Mode::Execute, next_wake_at };
        let decide = |next_wake_at| Next::Start { mode: Mode::Decide, next_wake_at };
        assert_eq!(SETTINGS.judge(0, 100_000, 1_000), execute(6_000));
        assert_eq!(SETTINGS.judge(2, 100_000, 1_000), execute(21_000));
        assert_eq!(SETTINGS.judge(5, 100_000, 1_000), execute(61_000));
        assert_eq!(SETTINGS.judge(1, 8_000, 1_000), execute(8_000), "it can be cancelled in time");
        assert_eq!(SETTINGS.judge(1, 8_000, 8_000), decide(18_000));
        assert_eq!(SETTINGS.judge(1, 8_000, 9_000), decide(19_000));
        assert_eq!(SETTINGS.judge(6, 8_000, 9_000), Next::GiveUp);
        assert_eq!(SETTINGS.judge(u32::MAX, 8_000, 9_000), Next::GiveUp);
    }
}

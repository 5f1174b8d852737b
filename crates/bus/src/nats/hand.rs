//! A batch in the hand of a consumer, and its end.
//!
//! The servers know the fate of frames, consumers that of envelopes. So that an envelope which has to be retried does not drag its
//! neighbours along, it leaves their frame: it is sent again in a new frame, with its count and its delay, and then the old frame needs it
//! no more. Only when a whole frame is to be retried after one and the same delay, as when a database is away, the frame itself comes
//! again. And when the new frame finds no room, the old one has to: then the neighbours come again as well, which clause 2 allows.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;
use std::{fmt, mem};

use futures_util::future::join_all;
use tokio::time::{Instant, timeout_at};

use super::Shared;
use super::frame::{self, Letter};
use super::held::{Settled, Share, Taken, Told};
use super::queue::{Queue, To};
use crate::{Delivery, RETRY_DELAY_MAX, SettleError, Verdict};

/// When an envelope comes again whose dead letter was not taken.
const PARK_AGAIN: Duration = Duration::from_secs(1);
/// How long a settled batch waits at most for a connection that takes its acknowledgements. If none does, it comes again.
const TELL_FOR: Duration = Duration::from_secs(1);

/// Envelopes handed to a consumer. Empty only once it is settled, on its way to be dropped.
pub(crate) struct Hand {
    shared: Arc<Shared>,
    queue: Arc<Queue>,
    taken: Taken,
}

impl Hand {
    pub(super) fn new(shared: Arc<Shared>, queue: Arc<Queue>, taken: Taken) -> Hand {
        Hand { shared, queue, taken }
    }

    pub(crate) fn deliveries(&self) -> &[Delivery] {
        &self.taken.deliveries
    }

    pub(crate) async fn ack_all(mut self) -> Result<(), SettleError> {
        let told = self.queue.held.end(self.taken.epoch, &self.taken.shares);
        self.taken.deliveries.clear();
        let told = told.map_err(|_| self.forgotten())?;
        self.shared.tell(told).await;
        Ok(())
    }

    /// Nothing changes before all that has to be sent is sent, so when this is dropped on the way the batch comes back.
    pub(crate) async fn settle(mut self, verdicts: Vec<Verdict>) -> Result<(), SettleError> {
        if verdicts.iter().all(|verdict| *verdict == Verdict::Ack) {
            return self.ack_all().await;
        }
        if !self.queue.held.knows(self.taken.epoch) {
            return Err(self.forgotten());
        }
        let mut fates: Vec<Fate> = verdicts.into_iter().map(Fate::from).collect();
        self.park(&mut fates).await;
        spare(&self.taken.shares, &mut fates);
        self.send_again(&mut fates).await;

        let acked = fates.iter().filter(|fate| **fate == Fate::Acked).count();
        let parked = fates.iter().filter(|fate| **fate == Fate::Parked).count();
        let deliveries = mem::take(&mut self.taken.deliveries);
        let settled = settled(&self.taken.shares, deliveries, fates);
        let told = self.queue.held.settle(self.taken.epoch, settled, acked, parked);
        let told = told.map_err(|_| self.forgotten())?;
        self.shared.tell(told).await;
        Ok(())
    }

    fn forgotten(&self) -> SettleError {
        SettleError::Forgotten { subject: self.queue.subject }
    }

    /// Keeps the dead letters. One that is not taken is tried again with the envelope's next delivery.
    async fn park(&self, fates: &mut [Fate]) {
        let parking = fates.iter_mut().zip(&self.taken.deliveries).filter_map(|(fate, delivery)| {
            let Fate::Park(reason) = fate else { return None };
            let letter = Letter {
                subject: self.queue.subject.0.to_owned(),
                reason: mem::take(reason),
                delivery: delivery.clone(),
            };
            Some(async move {
                *fate = match self.shared.keep(letter).await {
                    true => Fate::Parked,
                    false => Fate::SentAgain(PARK_AGAIN),
                }
            })
        });
        join_all(parking).await;
    }

    /// Sends in new frames, one for each delay, what has to leave its frame.
    async fn send_again(&self, fates: &mut [Fate]) {
        let mut by_delay: BTreeMap<Duration, Vec<usize>> = BTreeMap::new();
        for (index, fate) in fates.iter().enumerate() {
            if let Fate::SentAgain(delay) = fate {
                by_delay.entry(*delay).or_default().push(index);
            }
        }
        let shared = &self.shared;
        let sending = by_delay.into_iter().map(|(delay, indexes)| async move {
            let parcels = indexes.iter().map(|index| {
                let delivery = &self.taken.deliveries[*index];
                (&delivery.envelope, delivery.count)
            });
            let limits = (shared.limits.frame_envelopes, shared.link.message_bytes());
            let mut failed = Vec::new();
            let mut rest = indexes.as_slice();
            for message in frame::encode(delay, parcels, limits.0, limits.1) {
                let (these, later) = rest.split_at(message.envelopes);
                rest = later;
                if let Err(why) = shared.send(To::Queue(&self.queue), message.payload).await {
                    tracing::warn!(
                        subject = %self.queue.subject, ?why, envelopes = these.len(),
                        "what is to be retried found no frame of its own; its neighbours come again with it"
                    );
                    failed.extend_from_slice(these);
                }
            }
            (delay, failed)
        });
        for (delay, failed) in join_all(sending).await {
            failed.into_iter().for_each(|index| fates[index] = Fate::WithItsFrame(delay));
        }
    }
}

impl Drop for Hand {
    fn drop(&mut self) {
        if !self.taken.deliveries.is_empty() {
            let epoch = self.taken.epoch;
            let taken =
                mem::replace(&mut self.taken, Taken { deliveries: Vec::new(), shares: Vec::new(), epoch });
            self.queue.held.give_back(taken);
        }
    }
}

impl fmt::Debug for Hand {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Hand").field("subject", &self.queue.subject).field("taken", &self.taken).finish()
    }
}

impl Shared {
    /// Tells the servers the fates of messages.
    pub(super) async fn tell(&self, told: Vec<Told>) {
        let deadline = Instant::now() + TELL_FOR;
        for told in told {
            let kind = told.kind();
            if timeout_at(deadline, self.link.tell(told.message, kind)).await.is_err() {
                tracing::debug!("the servers are away; what was settled comes again");
                return;
            }
        }
    }

    /// Keeps a dead letter. False when it was not taken.
    pub(super) async fn keep(&self, letter: Letter) -> bool {
        let Some(plan) = &self.letters else { return true };
        match self.send(To::Letters(plan), letter.encode()).await {
            Ok(kept) => {
                // One came in; if the stream was full, one went out.
                if kept.sequence > self.limits.parked_letters as u64 {
                    self.letters_dropped.fetch_add(1, Ordering::Relaxed);
                }
                true
            }
            Err(why) => {
                tracing::warn!(
                    ?why,
                    subject = letter.subject,
                    "a dead letter was not kept; its envelope comes again"
                );
                false
            }
        }
    }
}

/// What becomes of an envelope.
#[derive(Clone, PartialEq, Eq, Debug)]
enum Fate {
    Acked,
    /// It is to become a dead letter.
    Park(String),
    /// It has become one.
    Parked,
    /// It comes again from here, at once.
    Back,
    /// It leaves its frame and comes again in another, after so long.
    SentAgain(Duration),
    /// Its frame comes again, after so long.
    WithItsFrame(Duration),
}

impl From<Verdict> for Fate {
    fn from(verdict: Verdict) -> Fate {
        match verdict {
            Verdict::Ack => Fate::Acked,
            Verdict::Retry { after: Duration::ZERO } => Fate::Back,
            Verdict::Retry { after } => Fate::SentAgain(after.min(RETRY_DELAY_MAX)),
            Verdict::Park { reason } => Fate::Park(reason),
        }
    }
}

/// Lets a frame come again itself where all of it has to, after one delay: that spares a new one.
fn spare(shares: &[Share], fates: &mut [Fate]) {
    let mut rest = fates;
    for share in shares {
        let (fates, later) = rest.split_at_mut(share.envelopes);
        rest = later;
        if let [Fate::SentAgain(delay), others @ ..] = &*fates
            && share.whole
            && others.iter().all(|other| *other == Fate::SentAgain(*delay))
        {
            let delay = *delay;
            fates.fill(Fate::WithItsFrame(delay));
        }
    }
}

fn settled(shares: &[Share], deliveries: Vec<Delivery>, fates: Vec<Fate>) -> Vec<Settled> {
    let mut ends = deliveries.into_iter().zip(fates);
    let one = |share: &Share| {
        let mut settled = Settled::ended(*share);
        for (delivery, fate) in ends.by_ref().take(share.envelopes) {
            match fate {
                Fate::Acked | Fate::Parked | Fate::SentAgain(_) => {}
                Fate::Back => settled.back.push(delivery),
                Fate::WithItsFrame(delay) => settled.again_after(delay),
                Fate::Park(_) => unreachable!("a letter is kept or its envelope sent again"),
            }
        }
        settled
    };
    shares.iter().map(one).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_absurd_delay_is_cut() {
        assert_eq!(Fate::from(Verdict::Retry { after: Duration::MAX }), Fate::SentAgain(RETRY_DELAY_MAX));
    }
}

//! What a batch calls for, gathered into one frame a subject and published.

use std::time::{Duration, Instant};

use bus::{Bus, Delivery, Envelope, Subject, Verdict};
use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use telemetry::metrics::PubsubMetrics;
use telemetry::spans::Handling;

use crate::Outgoing;

/// How often, and when, what called for a refused message comes again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bounds {
    /// The delay before it comes again for the first time; it doubles with each delivery.
    pub retry_delay_min: Duration,
    /// The longest such delay.
    pub retry_delay_max: Duration,
    /// What has been delivered so often, for whatever reasons, is dropped when it is refused.
    pub drop_after_deliveries: u32,
}

impl Default for Bounds {
    /// 20 ms to 5 s, 8 deliveries (about 2.5 s).
    fn default() -> Bounds {
        Bounds {
            retry_delay_min: Duration::from_millis(20),
            retry_delay_max: Duration::from_secs(5),
            drop_after_deliveries: 8,
        }
    }
}

impl Bounds {
    /// What was delivered so often comes again.
    pub fn retry(&self, count: u32) -> Verdict {
        let doublings = count.saturating_sub(1).min(16);
        let after = self.retry_delay_min.saturating_mul(1 << doublings).min(self.retry_delay_max);
        Verdict::Retry { after }
    }
}

/// The messages that a batch calls for.
pub struct Frames {
    frames: Vec<Frame>,
    /// The deliveries in it.
    batch: usize,
    /// A message's size at most.
    limit_bytes: usize,
}

/// A frame in the making, and which deliveries come again if it is refused.
struct Frame {
    subject: Subject,
    envelopes: Vec<Envelope>,
    causes: Vec<usize>,
}

/// What became of a frame.
struct Published {
    subject: Subject,
    messages: usize,
    /// If it was refused: what that means for the messages that called for it, by their places in the batch.
    refused: Option<Vec<(usize, Verdict)>>,
}

/// A message that no frame takes: it has more bytes than the bus allows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("what it calls for has {bytes} bytes, above the bus's limit of {limit_bytes}")]
pub struct TooLarge {
    /// Its size.
    pub bytes: usize,
    /// The limit.
    pub limit_bytes: usize,
}

impl Frames {
    /// Of a batch of so many deliveries, each of which calls for at most one message on each subject. So no frame is larger than
    /// the batch.
    pub fn of_batch(deliveries: usize, bus: &Bus) -> Frames {
        Frames { frames: Vec::new(), batch: deliveries, limit_bytes: bus.limits().body_bytes }
    }

    /// Adds what the delivery at this place calls for: all of it, or nothing.
    ///
    /// # Errors
    /// When the bus would refuse it, now or later.
    pub fn add(
        &mut self,
        place: usize,
        messages: [Option<Outgoing>; 2],
        traced: &mut Handling,
    ) -> Result<(), TooLarge> {
        let limit_bytes = self.limit_bytes;
        let sizes = messages.iter().flatten().map(|outgoing| outgoing.envelope.body.len());
        if let Some(bytes) = sizes.max().filter(|bytes| *bytes > limit_bytes) {
            return Err(TooLarge { bytes, limit_bytes });
        }
        for Outgoing { subject, envelope, may_be_lost } in messages.into_iter().flatten() {
            traced.calls_for(place, subject.0, envelope.id.number());
            let frame = match self.frames.iter().position(|frame| frame.subject == subject) {
                Some(at) => &mut self.frames[at],
                None => {
                    let room = self.batch - place;
                    let (envelopes, causes) = (Vec::with_capacity(room), Vec::with_capacity(room));
                    self.frames.push(Frame { subject, envelopes, causes });
                    self.frames.last_mut().expect("a frame was pushed")
                }
            };
            frame.envelopes.push(envelope);
            frame.causes.extend((!may_be_lost).then_some(place));
        }
        Ok(())
    }

    /// Publishes all of it; what that means for the deliveries that called for it is written to their verdicts.
    pub async fn publish(
        self,
        bus: &Bus,
        bounds: Bounds,
        deliveries: &[Delivery],
        verdicts: &mut [Verdict],
        metrics: &PubsubMetrics,
        traced: &mut Handling,
    ) {
        let publishing = traced.publishing();
        let mut published: FuturesUnordered<_> =
            self.frames.into_iter().map(|frame| frame.publish(bus, bounds, deliveries, metrics)).collect();
        while let Some(Published { subject, messages, refused }) = published.next().await {
            traced.published(subject.0, publishing, messages, refused.is_none());
            for (place, verdict) in refused.into_iter().flatten() {
                verdicts[place] = verdict;
            }
        }
    }
}

impl Frame {
    async fn publish(
        self,
        bus: &Bus,
        bounds: Bounds,
        deliveries: &[Delivery],
        metrics: &PubsubMetrics,
    ) -> Published {
        let Frame { subject, envelopes, causes } = self;
        let (began, messages) = (Instant::now(), envelopes.len());
        let published = bus.publish(subject, envelopes).await;
        metrics.published(began.elapsed(), published.is_ok());
        let Err(refused) = published else { return Published { subject, messages, refused: None } };
        let (causes, dropped): (Vec<_>, Vec<_>) =
            causes.into_iter().partition(|place| deliveries[*place].count < bounds.drop_after_deliveries);
        tracing::warn!(
            %refused, messages = causes.len(), dropped = dropped.len(),
            "a frame was refused; its causes come again, or their sagas are started again"
        );
        let again = causes.into_iter().map(|place| (place, bounds.retry(deliveries[place].count))).collect();
        Published { subject, messages, refused: Some(again) }
    }
}

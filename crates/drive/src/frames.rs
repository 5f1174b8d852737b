//! What a batch calls for, gathered into one frame a subject and published.

use std::time::{Duration, Instant};

use bus::{Bus, Delivery, Envelope, PublishError, Subject, Verdict};
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

    /// What refused frames mean for the deliveries that called for them.
    pub fn judge(&self, refusals: Vec<Refusal>, deliveries: &[Delivery], verdicts: &mut [Verdict]) {
        for Refusal { error, causes } in refusals {
            let (again, dropped): (Vec<_>, Vec<_>) =
                causes.into_iter().partition(|place| deliveries[*place].count < self.drop_after_deliveries);
            tracing::warn!(
                refused = %error, messages = again.len(), dropped = dropped.len(),
                "a frame was refused; its causes come again, or their sagas are started again"
            );
            for place in again {
                verdicts[place] = self.retry(deliveries[place].count);
            }
        }
    }
}

/// The messages that a batch calls for.
pub struct Frames {
    frames: Vec<Frame>,
    /// What may be lost and nobody records; none where that goes with the rest.
    set_aside: Option<Vec<Outgoing>>,
    /// How many call for them.
    batch: usize,
    /// A message's size at most.
    limit_bytes: usize,
}

/// A frame in the making, and what called for it that must not be lost.
pub(crate) struct Frame {
    pub(crate) subject: Subject,
    pub(crate) envelopes: Vec<Envelope>,
    pub(crate) causes: Vec<usize>,
}

/// What became of a frame.
pub(crate) struct Published {
    subject: Subject,
    pub(crate) messages: usize,
    pub(crate) refusal: Option<Refusal>,
}

/// A frame that the bus refused.
#[derive(Debug)]
pub struct Refusal {
    /// Why.
    pub error: PublishError,
    /// The places in the batch of what called for its messages, but for those that may be lost.
    pub causes: Vec<usize>,
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
    /// Of a batch of so many, each of which calls for at most one message on each subject: places are below that, and no frame is
    /// larger.
    pub fn of_batch(batch: usize, bus: &Bus) -> Frames {
        Frames { frames: Vec::new(), set_aside: None, batch, limit_bytes: bus.limits().body_bytes }
    }

    /// The same, but what may be lost is set aside for [`crate::Reports::hold`], unless its saga is recorded: what tells of a step belongs to
    /// its trace.
    pub fn without_reports(batch: usize, bus: &Bus) -> Frames {
        Frames { set_aside: Some(Vec::new()), ..Frames::of_batch(batch, bus) }
    }

    /// Adds what the one at this place of the batch calls for: all of it, or nothing.
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
        for outgoing in messages.into_iter().flatten() {
            if let Some(aside) = &mut self.set_aside
                && outgoing.may_be_lost
                && !traced.records(place)
            {
                aside.push(outgoing);
                continue;
            }
            let Outgoing { subject, envelope, may_be_lost } = outgoing;
            traced.calls_for(place, subject.0, envelope.id.number());
            let frame = match self.frames.iter().position(|frame| frame.subject == subject) {
                Some(at) => &mut self.frames[at],
                None => {
                    let room = self.batch.saturating_sub(place);
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

    /// What was set aside.
    pub fn take_reports(&mut self) -> Vec<Outgoing> {
        self.set_aside.as_mut().map(std::mem::take).unwrap_or_default()
    }

    /// Publishes all of it, a frame a subject; the frames that the bus refused.
    pub async fn publish(self, bus: &Bus, metrics: &PubsubMetrics, traced: &mut Handling) -> Vec<Refusal> {
        let publishing = traced.publishing();
        let mut published: FuturesUnordered<_> =
            self.frames.into_iter().map(|frame| frame.publish(bus, metrics)).collect();
        let mut refusals = Vec::new();
        while let Some(Published { subject, messages, refusal }) = published.next().await {
            traced.published(subject.0, publishing, messages, refusal.is_none());
            refusals.extend(refusal);
        }
        refusals
    }
}

impl Frame {
    pub(crate) async fn publish(self, bus: &Bus, metrics: &PubsubMetrics) -> Published {
        let Frame { subject, envelopes, causes } = self;
        let (began, messages) = (Instant::now(), envelopes.len());
        let published = bus.publish(subject, envelopes).await;
        metrics.published(began.elapsed(), published.is_ok());
        let refusal = published.err().map(|error| Refusal { error, causes });
        Published { subject, messages, refusal }
    }
}

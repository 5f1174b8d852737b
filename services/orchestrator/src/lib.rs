//! The orchestrator: drives sagas from message to message and keeps nothing in between.
//!
//! A loop around the engine: take what is waiting, ask [`saga::start`] or [`saga::advance`] what each message
//! calls for, publish all of it, acknowledge. Any replica can take any message of any saga. When one dies, its batch is
//! delivered again, and what it had published comes a second time with the same ids and the same meaning.
//!
//! What never happens: a message is acknowledged before everything that it calls for has been taken by the bus, but for
//! a report that a later one implies, and unless the bus has refused it [`Settings::drop_after_deliveries`] times. A refusal of one frame is never hidden by the success
//! of another: the messages behind it come again.
//!
//! Why a message is dropped in the end: the orchestrator's queue may be full of replies that call for commands in a
//! participant's queue, while that one is full of commands whose replies find no room here. Neither would ever move
//! again. A saga whose message was dropped is started again by whoever keeps the list of open sagas, as after any loss.
//!
//! It knows no saga of its own. [`Book`] says which ones it drives, and where their participants take commands.

mod plan;

use std::time::{Duration, Instant};

use bus::{Batch, Bus, Delivery, Envelope, Subject, Verdict};
use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use telemetry::Spans;
use telemetry::metrics::PubsubMetrics;
use telemetry::spans::{Cause, Handling};
use tokio_util::sync::CancellationToken;
use wire::messages::Pen;

pub use plan::{Book, Messages, Outgoing, Refused};

/// The bounds of an orchestrator's loop.
#[derive(Clone, Copy, Debug)]
pub struct Settings {
    /// Messages handled together at most. A batch never waits to fill.
    pub batch_messages: usize,
    /// The delay before a message comes again whose effects the bus refused; it doubles with each delivery.
    pub retry_delay_min: Duration,
    /// The longest such delay.
    pub retry_delay_max: Duration,
    /// A message whose effects the bus has refused at so many deliveries is dropped.
    pub drop_after_deliveries: u32,
}

impl Default for Settings {
    /// 512 messages, 20 ms to 5 s, 8 deliveries (about 2.5 s).
    fn default() -> Self {
        Settings {
            batch_messages: 512,
            retry_delay_min: Duration::from_millis(20),
            retry_delay_max: Duration::from_secs(5),
            drop_after_deliveries: 8,
        }
    }
}

/// What an orchestrator works with.
pub struct Parts {
    /// The sagas it drives.
    pub book: Book,
    /// Where messages come from and go to.
    pub bus: Bus,
    /// Where its own messages wait.
    pub subject: Subject,
    /// Counts what it does.
    pub metrics: PubsubMetrics,
    /// Records what it does for sampled sagas.
    pub spans: Spans,
    /// Its bounds.
    pub settings: Settings,
}

/// Runs an orchestrator until `stop` or until the bus is closed. The batch in hand is finished first.
pub async fn run(parts: Parts, stop: CancellationToken) {
    let mut consumer = parts.bus.subscribe(parts.subject);
    // Each message calls for at most one message on each subject, so no frame is larger than the batch.
    let limit = parts.settings.batch_messages.min(parts.bus.limits().frame_envelopes);
    loop {
        let batch = tokio::select! {
            biased;
            () = stop.cancelled() => return,
            next = consumer.next(limit) => match next {
                Ok(batch) => batch,
                Err(bus::Closed) => return,
            },
        };
        parts.work_off(batch).await;
    }
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

impl Parts {
    async fn work_off(&self, batch: Batch) {
        failpoint::hit("orchestrator.received");
        let began = Instant::now();
        let deliveries = batch.deliveries();
        self.metrics.batch(deliveries.len());
        let mut verdicts = vec![Verdict::Ack; deliveries.len()];
        let mut traced = self.spans.handle(deliveries.len());
        let frames = self.plan(deliveries, &mut verdicts, &mut traced);
        let publishing = traced.publishing();
        let mut published: FuturesUnordered<_> =
            frames.into_iter().map(|frame| self.publish(frame, deliveries)).collect();
        while let Some(Published { subject, messages, refused }) = published.next().await {
            traced.published(subject.0, publishing, messages, refused.is_none());
            for (place, verdict) in refused.into_iter().flatten() {
                verdicts[place] = verdict;
            }
        }
        drop(published);
        traced.end_of(self.subject.0);
        failpoint::hit("orchestrator.published");
        let returned = verdicts.iter().filter(|verdict| matches!(verdict, Verdict::Retry { .. })).count();
        self.metrics.received(true, (verdicts.len() - returned) as u64);
        self.metrics.received(false, returned as u64);
        self.metrics.handled(began.elapsed(), returned == 0);
        if let Err(forgotten) = batch.settle(verdicts).await {
            tracing::debug!(%forgotten, "nothing left to acknowledge");
        }
    }

    /// What a batch calls for, one frame a subject. What cannot be decided is parked alone.
    fn plan(&self, deliveries: &[Delivery], verdicts: &mut [Verdict], traced: &mut Handling) -> Vec<Frame> {
        let mut frames: Vec<Frame> = Vec::new();
        let mut pen = Pen::for_messages(2 * deliveries.len());
        for (place, delivery) in deliveries.iter().enumerate() {
            match self.book.plan(delivery.envelope.body.clone(), &mut pen) {
                Ok(messages) => {
                    let message = Cause::Message(delivery.envelope.id.number());
                    traced.add(place, messages.about.trace(), message);
                    for Outgoing { subject, envelope, may_be_lost } in messages {
                        let frame = match frames.iter_mut().find(|frame| frame.subject == subject) {
                            Some(frame) => frame,
                            None => {
                                let room = deliveries.len() - place;
                                let (envelopes, causes) =
                                    (Vec::with_capacity(room), Vec::with_capacity(room));
                                frames.push(Frame { subject, envelopes, causes });
                                frames.last_mut().expect("a frame was pushed")
                            }
                        };
                        traced.calls_for(place, subject.0, envelope.id.number());
                        frame.envelopes.push(envelope);
                        frame.causes.extend((!may_be_lost).then_some(place));
                    }
                }
                Err(refused) => {
                    tracing::error!(id = %delivery.envelope.id, %refused, "a message was parked");
                    verdicts[place] = Verdict::Park { reason: refused.to_string() };
                }
            }
        }
        frames
    }

    async fn publish(&self, frame: Frame, deliveries: &[Delivery]) -> Published {
        let Frame { subject, envelopes, causes } = frame;
        let (began, messages) = (Instant::now(), envelopes.len());
        let published = self.bus.publish(subject, envelopes).await;
        self.metrics.published(began.elapsed(), published.is_ok());
        let Err(refused) = published else { return Published { subject, messages, refused: None } };
        let drop_after = self.settings.drop_after_deliveries;
        let (causes, dropped): (Vec<_>, Vec<_>) =
            causes.into_iter().partition(|place| deliveries[*place].count < drop_after);
        tracing::warn!(
            %refused, messages = causes.len(), dropped = dropped.len(),
            "a frame was refused; its causes come again, or their sagas are started again"
        );
        let again = causes
            .into_iter()
            .map(|place| (place, Verdict::Retry { after: self.delay(deliveries[place].count) }))
            .collect();
        Published { subject, messages, refused: Some(again) }
    }

    fn delay(&self, count: u32) -> Duration {
        let doublings = count.saturating_sub(1).min(16);
        let Settings { retry_delay_min, retry_delay_max, .. } = self.settings;
        retry_delay_min.saturating_mul(1 << doublings).min(retry_delay_max)
    }
}

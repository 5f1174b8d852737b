//! The orchestrator: takes up again what was left open, drives the sagas that those who would do it themselves do not know, and keeps
//! nothing in between.
//!
//! A loop around the engine: take what is waiting, ask the [`Book`] what each message calls for, publish all of it,
//! acknowledge. Any replica can take any message of any saga. When one dies, its batch is delivered again, and what it had published
//! comes a second time with the same ids and the same meaning.
//!
//! What never happens: a message is acknowledged before everything that it calls for has been taken by the bus. [`drive`] has the
//! two exceptions, and why.
//!
//! It knows no saga of its own. The book says which ones it drives, and where their participants take commands.

use std::time::Instant;

use bus::{Batch, Bus, Delivery, Subject, Verdict};
use drive::{Book, Bounds, Frames};
use telemetry::Spans;
use telemetry::metrics::PubsubMetrics;
use telemetry::spans::{Cause, Handling};
use tokio_util::sync::CancellationToken;
use wire::messages::Pen;

/// The bounds of an orchestrator's loop.
#[derive(Clone, Copy, Debug)]
pub struct Settings {
    /// Messages handled together at most. Under load they gather for as long as the bus says ([`bus::Pace`]), otherwise never.
    pub batch_messages: usize,
    /// When a message comes again that calls for one that the bus refused.
    pub bounds: Bounds,
}

impl Default for Settings {
    /// 1,024 messages.
    fn default() -> Self {
        Settings { batch_messages: 1_024, bounds: Bounds::default() }
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
    let mut pace = parts.bus.pace();
    loop {
        stop.run_until_cancelled(pace.gather()).await;
        let batch = tokio::select! {
            biased;
            () = stop.cancelled() => return,
            next = consumer.next(limit) => match next {
                Ok(batch) => batch,
                Err(bus::Closed) => return,
            },
        };
        pace.took(batch.deliveries().len(), limit, tokio::time::Instant::now());
        parts.work_off(batch).await;
    }
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
        let refusals = frames.publish(&self.bus, &self.metrics, &mut traced).await;
        self.settings.bounds.judge(refusals, deliveries, &mut verdicts);
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

    /// What a batch calls for. What cannot be decided is parked alone.
    fn plan(&self, deliveries: &[Delivery], verdicts: &mut [Verdict], traced: &mut Handling) -> Frames {
        let mut frames = Frames::of_batch(deliveries.len(), &self.bus);
        let mut pen = Pen::for_messages(2 * deliveries.len());
        for (place, delivery) in deliveries.iter().enumerate() {
            let planned = match self.book.plan(delivery.envelope.body.clone(), &mut pen) {
                Ok(messages) => {
                    let message = Cause::Message(delivery.envelope.id.number());
                    traced.add(place, messages.about.trace(), message);
                    frames.add(place, messages.outgoing(), traced).map_err(|large| large.to_string())
                }
                Err(refused) => Err(refused.to_string()),
            };
            if let Err(reason) = planned {
                tracing::error!(id = %delivery.envelope.id, reason, "a message was parked");
                verdicts[place] = Verdict::Park { reason };
            }
        }
        frames
    }
}

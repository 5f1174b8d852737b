//! Reports of sagas that are under way, held back for a moment.
//!
//! Who started a saga hears of each step, so that those who wait for it can be told how far it is. Most sagas end within milliseconds, and
//! the report of the end has the whole path. So the others wait until they are worth telling: then many go as one frame, and nearly all of
//! them come too late to be told to anybody, which costs least.
//!
//! What waits may be lost, as each such report may: a later one says all that it says.

use std::future::pending;
use std::mem;
use std::time::Duration;

use bus::{Bus, Envelope, Subject};
use telemetry::metrics::PubsubMetrics;
use tokio::time::{Instant, sleep_until};

use crate::Outgoing;

/// Reports that wait at most. One more, and all of them go.
const MAX_WAITING: usize = 8_192;

/// The reports of one driver.
#[derive(Debug)]
pub struct Reports {
    wait: Duration,
    waiting: Vec<Outgoing>,
    /// When the oldest has waited for long enough; only while there are some.
    due: Option<Instant>,
}

impl Reports {
    /// None yet. Each will wait for about so long.
    pub fn after(wait: Duration) -> Reports {
        Reports { wait, waiting: Vec::new(), due: None }
    }

    /// Takes what was [set aside](crate::Frames::without_reports).
    pub fn hold(&mut self, mut reports: Vec<Outgoing>, now: Instant) {
        if reports.is_empty() {
            return;
        }
        self.waiting.append(&mut reports);
        self.due.get_or_insert(now + self.wait);
        if self.waiting.len() > MAX_WAITING {
            self.due = Some(now);
        }
    }

    /// Waits until [`Reports::take`] has something to give; for ever, if nothing waits.
    pub async fn due(&self) {
        match self.due {
            Some(due) => sleep_until(due).await,
            None => pending().await,
        }
    }

    /// All that waits, if it has for long enough.
    pub fn take(&mut self, now: Instant) -> Due {
        match self.due {
            Some(due) if due <= now => self.take_all(),
            _ => Due(Vec::new()),
        }
    }

    /// All that waits, however short it has.
    pub fn take_all(&mut self) -> Due {
        self.due = None;
        Due(mem::take(&mut self.waiting))
    }
}

/// Reports whose time has come.
#[derive(Debug)]
#[must_use]
pub struct Due(Vec<Outgoing>);

impl Due {
    /// Publishes them. What the bus refuses is lost.
    pub async fn publish(self, bus: &Bus, metrics: &PubsubMetrics) {
        let limit = bus.limits().frame_envelopes;
        let mut frames: Vec<(Subject, Vec<Envelope>)> = Vec::new();
        for Outgoing { subject, envelope, .. } in self.0 {
            match frames.iter_mut().find(|(to, frame)| *to == subject && frame.len() < limit) {
                Some((_, frame)) => frame.push(envelope),
                None => frames.push((subject, vec![envelope])),
            }
        }
        for (subject, frame) in frames {
            let (began, reports) = (Instant::now(), frame.len());
            let published = bus.publish(subject, frame).await;
            metrics.published(began.elapsed(), published.is_ok());
            if let Err(refused) = published {
                tracing::debug!(%refused, reports, "reports of sagas under way were refused");
            }
        }
    }
}

//! Reports of sagas that are under way, held back for a moment.
//!
//! Who started a saga hears of each step, so that those who wait for it can be told how far it is. Most sagas end within milliseconds, and
//! the report of the end has the whole path. So the others wait until they are worth telling: then many go as one frame, and of a saga that
//! was not held up they come too late to be told to anybody, which costs least.
//!
//! What waits may be lost, as each such report may: a later one says all that it says.

use std::future::pending;
use std::mem;
use std::time::Duration;

use bus::Bus;
use futures_util::future::join_all;
use telemetry::metrics::PubsubMetrics;
use tokio::time::{Instant, sleep_until};

use crate::frames::{Frame, Published};
use crate::{Outgoing, Refusal};

/// Reports that wait at most, and the bytes of their bodies. What goes beyond sends all of them.
const MAX_WAITING: usize = 8_192;
const MAX_WAITING_BYTES: usize = 8 * 1024 * 1024;

/// The reports of one driver.
#[derive(Debug)]
pub struct Reports {
    wait: Duration,
    /// Those that will not have waited for long enough by then.
    young: Vec<Outgoing>,
    /// Those that will.
    old: Vec<Outgoing>,
    bytes: usize,
    /// When the old ones go, and the young ones become old; only while there are some.
    due: Option<Instant>,
}

impl Reports {
    /// None yet. Each will wait for so long at least, and twice as long at most; not at all, if that is zero.
    pub fn after(wait: Duration) -> Reports {
        Reports { wait, young: Vec::new(), old: Vec::new(), bytes: 0, due: None }
    }

    /// Takes what was [set aside](crate::Frames::without_reports).
    pub fn hold(&mut self, mut reports: Vec<Outgoing>, now: Instant) {
        if reports.is_empty() {
            return;
        }
        self.bytes += reports.iter().map(|report| report.envelope.body.len()).sum::<usize>();
        let all_at_once = self.wait.is_zero()
            || self.young.len() + self.old.len() + reports.len() > MAX_WAITING
            || self.bytes > MAX_WAITING_BYTES;
        if all_at_once {
            self.old.append(&mut self.young);
            self.old.append(&mut reports);
            self.due = Some(now);
        } else if self.due.is_none() {
            self.old.append(&mut reports);
            self.due = Some(now + self.wait);
        } else {
            self.young.append(&mut reports);
        }
    }

    /// Waits until [`Reports::take`] has something to do; for ever, if nothing waits.
    pub async fn due(&self) {
        match self.due {
            Some(due) => sleep_until(due).await,
            None => pending().await,
        }
    }

    /// What has waited for long enough.
    pub fn take(&mut self, now: Instant) -> Due {
        if self.due.is_none_or(|due| now < due) {
            return Due(Vec::new());
        }
        let young = mem::take(&mut self.young);
        let old = mem::replace(&mut self.old, young);
        self.bytes = self.old.iter().map(|report| report.envelope.body.len()).sum();
        self.due = (!self.old.is_empty()).then(|| now + self.wait);
        Due(old)
    }

    /// All that waits, however short it has.
    pub fn take_all(&mut self) -> Due {
        (self.bytes, self.due) = (0, None);
        let mut all = mem::take(&mut self.old);
        all.append(&mut self.young);
        Due(all)
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
        let mut frames: Vec<Frame> = Vec::new();
        for Outgoing { subject, envelope, .. } in self.0 {
            match frames.iter_mut().find(|frame| frame.subject == subject && frame.envelopes.len() < limit) {
                Some(frame) => frame.envelopes.push(envelope),
                None => frames.push(Frame { subject, envelopes: vec![envelope], causes: Vec::new() }),
            }
        }
        let publishing = frames.into_iter().map(|frame| frame.publish(bus, metrics));
        for Published { messages, refusal, .. } in join_all(publishing).await {
            if let Some(Refusal { error, .. }) = refusal {
                tracing::debug!(refused = %error, messages, "reports of sagas under way were refused");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use bus::{Envelope, EnvelopeId, Subject};
    use bytes::Bytes;

    use super::*;

    const WAIT: Duration = Duration::from_millis(100);

    fn reports(numbers: std::ops::Range<u64>, bytes: usize) -> Vec<Outgoing> {
        let one = |number| Outgoing {
            subject: Subject("test.reports"),
            envelope: Envelope { id: EnvelopeId::of(number, 0), body: Bytes::from(vec![0; bytes]) },
            may_be_lost: true,
        };
        numbers.map(one).collect()
    }

    fn taken(Due(reports): Due) -> Vec<u64> {
        reports.iter().map(|report| report.envelope.id.parts().0).collect()
    }

    #[test]
    fn each_waits_once_to_twice_the_time() {
        let (mut held, now) = (Reports::after(WAIT), Instant::now());
        held.hold(reports(1..3, 1), now);
        held.hold(reports(3..4, 1), now + WAIT / 2);
        assert!(taken(held.take(now + WAIT / 2)).is_empty());
        assert_eq!(taken(held.take(now + WAIT)), [1, 2]);
        held.hold(reports(4..5, 1), now + WAIT);
        assert_eq!(taken(held.take(now + WAIT * 2)), [3]);
        assert_eq!(taken(held.take(now + WAIT * 3)), [4]);
        assert!(held.due.is_none() && held.bytes == 0);
        held.hold(reports(5..7, 1), now + WAIT * 9);
        assert_eq!(taken(held.take_all()), [5, 6]);
        assert!(held.due.is_none() && held.bytes == 0);
    }

    #[test]
    fn too_many_or_too_large_ones_all_go() {
        let now = Instant::now();
        for (most, bytes) in [(MAX_WAITING, 1), (8, MAX_WAITING_BYTES / 8)] {
            let mut held = Reports::after(WAIT);
            held.hold(reports(0..1, bytes), now);
            held.hold(reports(1..most as u64, bytes), now);
            assert_eq!(taken(held.take(now + WAIT)), [0]);
            assert!(taken(held.take(now + WAIT)).is_empty());
            held.hold(reports(0..2, bytes), now + WAIT);
            assert_eq!(taken(held.take(now + WAIT)).len(), most + 1);
        }
        let mut at_once = Reports::after(Duration::ZERO);
        at_once.hold(reports(0..1, 1), now);
        assert_eq!(taken(at_once.take(now)), [0]);
    }
}

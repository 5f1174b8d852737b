//! Reports that wait for better ones.
//!
//! A report carries its saga's whole path, so a later one says all that an earlier one does, and the last one says everything. Reports of
//! sagas that are under way may be lost, so they may as well be late: they are held for a moment, and most of them are never
//! sent, because the next one comes first, or the end. What is held goes with the process, as it may.

use std::collections::HashMap;
use std::time::Duration;

use bus::{Envelope, Subject};
use tokio::time::Instant;

/// Sagas whose reports are held at most; with so many, all leave.
const SAGAS: usize = 4_096;

/// The newest report of each saga.
pub(crate) struct Held {
    hold_for: Duration,
    by_saga: HashMap<u64, (Subject, Envelope)>,
    /// When the oldest of them has waited long enough; none if there are none.
    due: Option<Instant>,
}

impl Held {
    pub(crate) fn new(hold_for: Duration) -> Held {
        Held { hold_for, by_saga: HashMap::new(), due: None }
    }

    /// Holds a report in place of the saga's earlier one.
    pub(crate) fn hold(&mut self, subject: Subject, report: Envelope, now: Instant) {
        let (saga, _) = report.id.parts();
        self.by_saga.insert(saga, (subject, report));
        let due = self.due.get_or_insert(now + self.hold_for);
        if self.by_saga.len() >= SAGAS {
            *due = now;
        }
    }

    /// The saga's last report is sent: what is held of it says nothing new.
    pub(crate) fn forget(&mut self, saga: u64) {
        self.by_saga.remove(&saga);
        if self.by_saga.is_empty() {
            self.due = None;
        }
    }

    /// When what is held has to be sent.
    pub(crate) fn due(&self) -> Option<Instant> {
        self.due
    }

    /// Lets go of all, in frames of at most so many.
    pub(crate) fn take(&mut self, limit: usize) -> Vec<(Subject, Vec<Envelope>)> {
        self.due = None;
        let mut frames: Vec<(Subject, Vec<Envelope>)> = Vec::new();
        for (_, (subject, report)) in self.by_saga.drain() {
            match frames.iter_mut().find(|(known, frame)| *known == subject && frame.len() < limit) {
                Some((_, frame)) => frame.push(report),
                None => frames.push((subject, vec![report])),
            }
        }
        frames
    }
}

#[cfg(test)]
mod tests {
    use bus::EnvelopeId;
    use bytes::Bytes;

    use super::*;

    const PROGRESS: Subject = Subject("progress");
    const OTHER: Subject = Subject("other");
    const HOLD_FOR: Duration = Duration::from_millis(20);

    fn report(saga: u64, length: u64) -> Envelope {
        Envelope { id: EnvelopeId::of(saga, length), body: Bytes::new() }
    }

    fn ids(frames: Vec<(Subject, Vec<Envelope>)>) -> Vec<(&'static str, Vec<(u64, u64)>)> {
        let mut frames: Vec<_> = frames
            .into_iter()
            .map(|(subject, frame)| {
                let mut ids: Vec<_> = frame.iter().map(|report| report.id.parts()).collect();
                ids.sort_unstable();
                (subject.0, ids)
            })
            .collect();
        frames.sort_unstable();
        frames
    }

    #[test]
    fn of_a_saga_the_newest_is_sent_and_after_its_end_none() {
        let (mut held, now) = (Held::new(HOLD_FOR), Instant::now());
        assert_eq!(held.due(), None);
        held.hold(PROGRESS, report(1, 1), now);
        held.hold(PROGRESS, report(2, 1), now + HOLD_FOR / 2);
        held.hold(PROGRESS, report(1, 2), now + HOLD_FOR / 2);
        held.hold(OTHER, report(3, 1), now + HOLD_FOR / 2);
        held.hold(PROGRESS, report(4, 1), now + HOLD_FOR / 2);
        held.forget(4);
        assert_eq!(held.due(), Some(now + HOLD_FOR), "the oldest counts");
        assert_eq!(ids(held.take(10)), [("other", vec![(3, 1)]), ("progress", vec![(1, 2), (2, 1)])]);
        assert_eq!((held.due(), held.take(10).len()), (None, 0));
    }

    #[test]
    fn nothing_is_due_when_all_have_ended() {
        let mut held = Held::new(HOLD_FOR);
        held.hold(PROGRESS, report(1, 1), Instant::now());
        held.forget(1);
        assert_eq!(held.due(), None);
    }

    #[test]
    fn what_is_held_is_bounded_and_so_are_frames() {
        let (mut held, now) = (Held::new(HOLD_FOR), Instant::now());
        (0..SAGAS as u64).for_each(|saga| held.hold(PROGRESS, report(saga, 1), now));
        assert_eq!(held.due(), Some(now));
        let frames = held.take(1_000);
        assert_eq!(
            frames.iter().map(|(_, frame)| frame.len()).collect::<Vec<_>>(),
            [1_000, 1_000, 1_000, 1_000, 96]
        );
    }
}

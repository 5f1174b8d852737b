//! What one thread measures. Each has its own; they are put together once a second and in the end.

use std::collections::BTreeMap;
use std::fmt;
use std::time::{Duration, Instant};

use hdrhistogram::Histogram;
use serde::{Serialize, Serializer};

use crate::told::Step;
use crate::tracker::Outcome;

/// The longest latency that is told from a longer one, in microseconds: an hour.
const LONGEST_MICROS: u64 = 3_600_000_000;
/// Latencies are kept to three digits: an error below 0.1 %.
const DIGITS: u8 = 3;

/// Latencies, in microseconds.
pub(crate) type Latencies = Histogram<u64>;

pub(crate) fn no_latencies() -> Latencies {
    Histogram::new_with_bounds(1, LONGEST_MICROS, DIGITS).expect("the bounds and digits are allowed")
}

/// A kind of failure.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Failure {
    /// An answer other than success.
    Status(u16),
    /// No connection could be opened.
    NoConnection,
    /// A connection broke before the answer was in.
    ConnectionLost,
    /// There was no answer in time.
    Timeout,
    /// An answer that is none.
    Unreadable,
    /// It was due, and no connection was free until the end.
    NotSent,
    /// An event stream ended, and was opened again.
    StreamCut,
    /// An event stream was refused or could not be opened.
    NoStream,
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Failure::Status(status) => return write!(f, "answered {status}"),
            Failure::NoConnection => "no connection",
            Failure::ConnectionLost => "connection lost",
            Failure::Timeout => "time-out",
            Failure::Unreadable => "answer not understood",
            Failure::NotSent => "not sent: no connection free",
            Failure::StreamCut => "event stream cut",
            Failure::NoStream => "no event stream",
        })
    }
}

/// As a key of a JSON object.
impl Serialize for Failure {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        if let Failure::Status(status) = self {
            return serializer.collect_str(status);
        }
        serializer.serialize_str(match self {
            Failure::Status(_) => "status",
            Failure::NoConnection => "no_connection",
            Failure::ConnectionLost => "connection_lost",
            Failure::Timeout => "timeout",
            Failure::Unreadable => "unreadable_answer",
            Failure::NotSent => "not_sent",
            Failure::StreamCut => "stream_cut",
            Failure::NoStream => "no_stream",
        })
    }
}

/// What happened, counted.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Counts {
    /// Requests that were sent, or should have been.
    pub(crate) offered: u64,
    /// Answers of success.
    pub(crate) accepted: u64,
    /// Ends of purchases.
    pub(crate) ended: BTreeMap<Outcome, u64>,
    /// Ends that no event told: they were asked for.
    pub(crate) polled: u64,
    /// Requests of which nobody knows whether they had an effect.
    pub(crate) unknown: u64,
    /// Requests that were sent again.
    pub(crate) resent: u64,
    /// What failed.
    pub(crate) failures: BTreeMap<Failure, u64>,
}

impl Counts {
    /// Purchases that ended, however.
    pub(crate) fn completed(&self) -> u64 {
        self.ended.values().sum()
    }

    /// Purchases that ended so.
    pub(crate) fn ended_as(&self, outcome: Outcome) -> u64 {
        self.ended.get(&outcome).copied().unwrap_or_default()
    }

    /// Every way in which a purchase can abort, with how many did.
    pub(crate) fn aborted(&self) -> impl Iterator<Item = (Option<Step>, u64)> {
        let steps = Step::ALL.into_iter().map(Some).chain([None]);
        steps.map(|step| (step, self.ended_as(Outcome::Aborted(step))))
    }

    pub(crate) fn add(&mut self, other: &Counts) {
        let Counts { offered, accepted, ended, polled, unknown, resent, failures } = other;
        self.offered += offered;
        self.accepted += accepted;
        self.polled += polled;
        self.unknown += unknown;
        self.resent += resent;
        for (outcome, count) in ended {
            *self.ended.entry(*outcome).or_default() += count;
        }
        for (failure, count) in failures {
            *self.failures.entry(*failure).or_default() += count;
        }
    }
}

/// Counts and latencies of some stretch of time.
#[derive(Clone, Debug)]
pub(crate) struct Measured {
    pub(crate) counts: Counts,
    pub(crate) acceptance: Latencies,
    pub(crate) completion: Latencies,
}

impl Default for Measured {
    fn default() -> Measured {
        let counts = Counts::default();
        Measured { counts, acceptance: no_latencies(), completion: no_latencies() }
    }
}

impl Measured {
    pub(crate) fn add(&mut self, other: &Measured) {
        self.counts.add(&other.counts);
        add(&mut self.acceptance, &other.acceptance);
        add(&mut self.completion, &other.completion);
    }
}

fn add(sum: &mut Latencies, more: &Latencies) {
    sum.add(more).expect("all histograms have the same bounds");
}

/// One thread's measurements.
#[derive(Clone, Debug)]
pub(crate) struct Recorder {
    begin: Instant,
    end: Instant,
    /// Counts: what happened within the window. Latencies: of what was due within it, however late it came.
    pub(crate) window: Measured,
    /// Latencies of refusals (429 and 503) of what was due within the window.
    pub(crate) refusals: Latencies,
    /// From the first request to the end of the drain.
    pub(crate) total: Counts,
    /// Since it was taken the last time.
    interval: Measured,
}

impl Recorder {
    /// One whose window is from `begin` until `end`.
    pub(crate) fn new(begin: Instant, end: Instant) -> Recorder {
        Recorder {
            begin,
            end,
            window: Measured::default(),
            refusals: no_latencies(),
            total: Counts::default(),
            interval: Measured::default(),
        }
    }

    /// The window ends early.
    pub(crate) fn end_at(&mut self, end: Instant) {
        self.end = self.end.min(end);
    }

    fn within(&self, at: Instant) -> bool {
        self.begin <= at && at < self.end
    }

    fn count(&mut self, at: Instant, count: impl Fn(&mut Counts)) {
        count(&mut self.total);
        count(&mut self.interval.counts);
        if self.within(at) {
            count(&mut self.window.counts);
        }
    }

    /// A request is due.
    pub(crate) fn offered(&mut self, due: Instant) {
        self.count(due, |counts| counts.offered += 1);
    }

    /// An answer of success came.
    pub(crate) fn accepted(&mut self, due: Instant, at: Instant) {
        self.count(at, |counts| counts.accepted += 1);
        let micros = micros(at.saturating_duration_since(due));
        self.interval.acceptance.saturating_record(micros);
        if self.within(due) {
            self.window.acceptance.saturating_record(micros);
        }
    }

    /// A purchase ended.
    pub(crate) fn ended(&mut self, due: Instant, at: Instant, outcome: Outcome, polled: bool) {
        self.count(at, |counts| {
            *counts.ended.entry(outcome).or_default() += 1;
            counts.polled += u64::from(polled);
        });
        let micros = micros(at.saturating_duration_since(due));
        self.interval.completion.saturating_record(micros);
        if self.within(due) {
            self.window.completion.saturating_record(micros);
        }
    }

    /// A request was refused for lack of room.
    pub(crate) fn refused(&mut self, due: Instant, at: Instant, status: u16) {
        self.failed(at, Failure::Status(status));
        if self.within(due) {
            self.refusals.saturating_record(micros(at.saturating_duration_since(due)));
        }
    }

    /// Something failed.
    pub(crate) fn failed(&mut self, at: Instant, failure: Failure) {
        self.count(at, |counts| *counts.failures.entry(failure).or_default() += 1);
    }

    /// Nobody knows whether a request had an effect.
    pub(crate) fn unknown(&mut self, at: Instant) {
        self.count(at, |counts| counts.unknown += 1);
    }

    /// A request is sent again.
    pub(crate) fn resent(&mut self, at: Instant) {
        self.count(at, |counts| counts.resent += 1);
    }

    /// What was measured since this was asked the last time.
    pub(crate) fn take_interval(&mut self) -> Measured {
        std::mem::take(&mut self.interval)
    }

    /// Puts another thread's measurements to these.
    pub(crate) fn add(&mut self, other: &Recorder) {
        self.window.add(&other.window);
        add(&mut self.refusals, &other.refusals);
        self.total.add(&other.total);
        self.interval.add(&other.interval);
    }
}

fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX).max(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_window_counts_what_happens_in_it_and_times_what_was_due_in_it() {
        let begin = Instant::now() + Duration::from_secs(100);
        let end = begin + Duration::from_secs(10);
        let mut recorder = Recorder::new(begin, end);
        let (before, inside, behind) =
            (begin - Duration::from_secs(1), begin + Duration::from_secs(1), end + Duration::from_secs(1));
        for (due, at) in
            [(before, before), (before, inside), (inside, inside), (inside, behind), (behind, behind)]
        {
            recorder.offered(due);
            recorder.accepted(due, at);
            recorder.ended(due, at, Outcome::Committed, false);
        }
        let Measured { counts, acceptance, completion } = &recorder.window;
        assert_eq!((counts.offered, counts.accepted, counts.completed()), (2, 2, 2));
        assert_eq!((acceptance.len(), completion.len()), (2, 2));
        assert_eq!(
            (acceptance.min(), acceptance.max() / 1_000_000),
            (1, 10),
            "what came late is not left out"
        );
        assert_eq!((recorder.total.offered, recorder.total.accepted, recorder.total.completed()), (5, 5, 5));
    }

    #[test]
    fn a_window_can_end_early() {
        let begin = Instant::now();
        let mut recorder = Recorder::new(begin, begin + Duration::from_secs(10));
        recorder.end_at(begin + Duration::from_secs(2));
        recorder.failed(begin + Duration::from_secs(1), Failure::Timeout);
        recorder.failed(begin + Duration::from_secs(3), Failure::Timeout);
        recorder.end_at(begin + Duration::from_secs(5));
        recorder.failed(begin + Duration::from_secs(3), Failure::Timeout);
        assert_eq!(recorder.window.counts.failures, BTreeMap::from([(Failure::Timeout, 1)]));
        assert_eq!(recorder.total.failures, BTreeMap::from([(Failure::Timeout, 3)]));
    }

    #[test]
    fn refusals_are_timed_apart() {
        let begin = Instant::now();
        let mut recorder = Recorder::new(begin, begin + Duration::from_secs(10));
        recorder.refused(begin, begin + Duration::from_millis(2), 503);
        assert_eq!((recorder.refusals.len(), recorder.window.acceptance.len()), (1, 0));
        assert_eq!(recorder.window.counts.failures, BTreeMap::from([(Failure::Status(503), 1)]));
    }

    #[test]
    fn threads_add_up_and_intervals_are_taken_once() {
        let begin = Instant::now();
        let mut sum = Recorder::new(begin, begin + Duration::from_secs(10));
        for polled in [true, false] {
            let mut other = Recorder::new(begin, begin + Duration::from_secs(10));
            other.accepted(begin, begin + Duration::from_millis(5));
            other.ended(
                begin,
                begin + Duration::from_millis(7),
                Outcome::Aborted(Some(Step::Payment)),
                polled,
            );
            other.unknown(begin);
            sum.add(&other);
        }
        let counts = &sum.window.counts;
        assert_eq!((counts.accepted, counts.polled, counts.unknown), (2, 1, 2));
        assert_eq!(counts.ended_as(Outcome::Aborted(Some(Step::Payment))), 2);
        assert_eq!(sum.take_interval().completion.len(), 2);
        assert_eq!(sum.take_interval().counts, Counts::default());
    }
}

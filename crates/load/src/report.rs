//! What a run has shown, as a table and as JSON. Pure.

use std::collections::BTreeMap;
use std::fmt::{self, Write as _};
use std::time::Duration;

use serde::Serialize;

use crate::options::{Options, Scenario};
use crate::record::{Counts, Failure, Latencies, Recorder};
use crate::tracker::Outcome;
use crate::verify::Verdict;

/// The result of a run. As JSON its fields are as they are named here; times carry their unit in their names.
#[derive(Debug, Serialize)]
pub struct Report {
    url: String,
    scenario: &'static str,
    /// `closed`, or `open` with a rate.
    load: &'static str,
    buyers: u32,
    customers: u32,
    #[serde(skip_serializing_if = "Option::is_none")]
    rate_per_second: Option<f64>,
    threads: u32,
    /// How long was measured.
    measured_seconds: f64,
    /// In the measured time, by the time of the answer. For a scenario that reads: answered 200.
    accepted_per_second: f64,
    /// In the measured time, by the time of the end.
    completed_per_second: f64,
    /// Of what was due in the measured time, however late it came.
    acceptance_us: Percentiles,
    completion_us: Percentiles,
    /// Answers 429 and 503.
    refused_us: Percentiles,
    /// What happened in the measured time.
    measured: Tally,
    /// What happened from the beginning of the warm-up to the end of the drain.
    total: Tally,
    /// Purchases that were accepted and whose end was not learned.
    unresolved: u64,
    /// Of the requests of unknown effect, those that turned out to have had one.
    resolved: u64,
    /// Processor time of the load generator in the measured time, in cores.
    #[serde(skip_serializing_if = "Option::is_none")]
    load_generator_cores: Option<f64>,
    /// The same for each answer of success.
    #[serde(skip_serializing_if = "Option::is_none")]
    load_generator_us_per_accepted: Option<f64>,
    /// Whether it was ended by a signal.
    interrupted: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    verify: Option<Verdict>,
    #[serde(skip)]
    follows: bool,
}

/// Percentiles of latencies, in microseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub(crate) struct Percentiles {
    count: u64,
    p50: u64,
    p90: u64,
    p99: u64,
    p99_9: u64,
    max: u64,
}

impl Percentiles {
    pub(crate) fn of(latencies: &Latencies) -> Percentiles {
        let at = |percentile| latencies.value_at_percentile(percentile).min(latencies.max());
        Percentiles {
            count: latencies.len(),
            p50: at(50.0),
            p90: at(90.0),
            p99: at(99.0),
            p99_9: at(99.9),
            max: latencies.max(),
        }
    }

    /// For a progress line.
    pub(crate) fn short(&self) -> String {
        let ms = |micros: u64| micros as f64 / 1000.0;
        format!("p50 {:.1} ms, p99 {:.1} ms", ms(self.p50), ms(self.p99))
    }
}

#[derive(Debug, Serialize)]
struct Tally {
    offered: u64,
    accepted: u64,
    completed: u64,
    committed: u64,
    /// By the step that said no.
    aborted: BTreeMap<&'static str, u64>,
    not_rolled_back: u64,
    polled: u64,
    resent: u64,
    unknown: u64,
    errors: BTreeMap<Failure, u64>,
}

impl Tally {
    fn of(counts: &Counts) -> Tally {
        let aborted =
            counts.aborted().map(|(step, count)| (step.map_or("NOT_TOLD", |step| step.name()), count));
        Tally {
            offered: counts.offered,
            accepted: counts.accepted,
            completed: counts.completed(),
            committed: counts.ended_as(Outcome::Committed),
            aborted: aborted.filter(|(_, count)| *count > 0).collect(),
            not_rolled_back: counts.ended_as(Outcome::NotRolledBack),
            polled: counts.polled,
            resent: counts.resent,
            unknown: counts.unknown,
            errors: counts.failures.clone(),
        }
    }
}

/// What a report is made of.
pub(crate) struct Facts<'a> {
    pub(crate) options: &'a Options,
    pub(crate) recorder: &'a Recorder,
    pub(crate) unresolved: u64,
    pub(crate) resolved: u64,
    /// How long was measured.
    pub(crate) measured: Duration,
    /// Processor time in that time.
    pub(crate) cpu: Option<Duration>,
    pub(crate) interrupted: bool,
    pub(crate) verdict: Option<Verdict>,
}

impl Report {
    pub(crate) fn new(facts: Facts<'_>) -> Report {
        let Facts { options, recorder, unresolved, resolved, measured, cpu, interrupted, verdict } = facts;
        let (window, seconds) = (&recorder.window, measured.as_secs_f64());
        let per_second = |count: u64| if seconds > 0.0 { count as f64 / seconds } else { 0.0 };
        let cpu = cpu.map(|cpu| cpu.as_secs_f64());
        Report {
            url: options.url.to_string(),
            scenario: match options.scenario {
                Scenario::Purchase => "purchase",
                Scenario::Product => "product",
                Scenario::Catalogue => "catalogue",
            },
            load: if options.rate.is_some() { "open" } else { "closed" },
            buyers: options.buyers,
            customers: options.buying_customers(),
            rate_per_second: options.rate,
            threads: options.threads(),
            measured_seconds: rounded(seconds, 3),
            accepted_per_second: rounded(per_second(window.counts.accepted), 1),
            completed_per_second: rounded(per_second(window.counts.completed()), 1),
            acceptance_us: Percentiles::of(&window.acceptance),
            completion_us: Percentiles::of(&window.completion),
            refused_us: Percentiles::of(&recorder.refusals),
            measured: Tally::of(&window.counts),
            total: Tally::of(&recorder.total),
            unresolved,
            resolved,
            load_generator_cores: cpu.filter(|_| seconds > 0.0).map(|cpu| rounded(cpu / seconds, 3)),
            load_generator_us_per_accepted: cpu
                .filter(|_| window.counts.accepted > 0)
                .map(|cpu| rounded(cpu * 1e6 / window.counts.accepted as f64, 2)),
            interrupted,
            verify: verdict,
            follows: options.follows(),
        }
    }

    /// Whether nothing contradicts what was promised.
    pub fn passed(&self) -> bool {
        self.verify.as_ref().is_none_or(|verdict| verdict.passed() && self.unresolved == 0)
    }
}

fn rounded(number: f64, digits: i32) -> f64 {
    let scale = 10f64.powi(digits);
    (number * scale).round() / scale
}

/// The table.
impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let load = match self.rate_per_second {
            Some(rate) => format!("open loop, {rate} due a second, {} connections", self.buyers),
            None => format!("closed loop, {} buyers", self.buyers),
        };
        let early = if self.interrupted { ", interrupted" } else { "" };
        writeln!(
            f,
            "{} at {}: {load}; {:.1} s measured{early}",
            self.scenario, self.url, self.measured_seconds
        )?;
        writeln!(f)?;
        writeln!(
            f,
            "{:>12} {:>11} {:>9} {:>9} {:>9} {:>9} {:>9}",
            "", "per second", "p50 ms", "p90", "p99", "p99.9", "max"
        )?;
        let mut row = |name: &str, rate: f64, it: &Percentiles| {
            let ms = |micros: u64| format!("{:.2}", micros as f64 / 1000.0);
            let [p50, p90, p99, p99_9, max] = [it.p50, it.p90, it.p99, it.p99_9, it.max].map(ms);
            writeln!(f, "{name:>12} {rate:>11.1} {p50:>9} {p90:>9} {p99:>9} {p99_9:>9} {max:>9}")
        };
        let accepted = if self.scenario == "purchase" { "accepted" } else { "answered" };
        row(accepted, self.accepted_per_second, &self.acceptance_us)?;
        if self.follows {
            row("completed", self.completed_per_second, &self.completion_us)?;
        }
        if self.refused_us.count > 0 {
            let rate = self.refused_us.count as f64 / self.measured_seconds.max(1e-9);
            row("refused", rate, &self.refused_us)?;
        }
        writeln!(f)?;
        line(f, "measured", &self.measured.to_string())?;
        line(f, "with warm-up and drain", &self.total.to_string())?;
        if self.follows {
            line(f, "ends not learned", &self.unresolved.to_string())?;
        }
        if self.total.unknown > 0 {
            let text =
                format!("{}, of which {} turned out to have had one", self.total.unknown, self.resolved);
            line(f, "of unknown effect", &text)?;
        }
        line(f, "errors", &self.errors())?;
        if let (Some(cores), Some(micros)) = (self.load_generator_cores, self.load_generator_us_per_accepted)
        {
            line(f, "load generator", &format!("{cores:.2} cores, {micros:.1} us for each {accepted}"))?;
        }
        match &self.verify {
            Some(verdict) => write!(f, "{verdict}"),
            None => Ok(()),
        }
    }
}

impl Report {
    fn errors(&self) -> String {
        let all = &self.total.errors;
        if all.is_empty() {
            return "none".to_owned();
        }
        let one = |(failure, total): (&Failure, &u64)| {
            let measured = self.measured.errors.get(failure).copied().unwrap_or_default();
            if measured == *total {
                format!("{total} {failure}")
            } else {
                format!("{measured} of {total} {failure}")
            }
        };
        all.iter().map(one).collect::<Vec<_>>().join(", ")
    }
}

fn line(f: &mut fmt::Formatter<'_>, name: &str, text: &str) -> fmt::Result {
    writeln!(f, "{name:>24}  {text}")
}

impl fmt::Display for Tally {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut text = format!("{} sent, {} accepted", self.offered, self.accepted);
        if self.completed > 0 {
            write!(text, ", {} committed", self.committed)?;
        }
        for (step, count) in &self.aborted {
            write!(text, ", {count} aborted by {step}")?;
        }
        for (count, name) in [
            (self.not_rolled_back, "not rolled back"),
            (self.polled, "of the ends asked for"),
            (self.resent, "sent again"),
        ] {
            if count > 0 {
                write!(text, ", {count} {name}")?;
            }
        }
        f.write_str(&text)
    }
}

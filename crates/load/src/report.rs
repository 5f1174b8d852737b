//! What a run has shown, as a table and as JSON. Pure.

use std::collections::BTreeMap;
use std::fmt;
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
        writeln!(f, "{:>36} {:>11} {:>11}", "", "measured", "in all")?;
        let (measured, total) = (self.measured.rows(), self.total.rows());
        for (row, total) in total.iter().filter(|(row, count)| **count > 0 || row.order < ALWAYS) {
            let measured = measured.get(row).copied().unwrap_or_default();
            writeln!(f, "{:>36} {measured:>11} {total:>11}", row.text)?;
        }
        if self.total.errors.is_empty() {
            line(f, "errors", "none")?;
        }
        if self.follows {
            line(f, "ends not learned", &self.unresolved.to_string())?;
        }
        if self.total.unknown > 0 {
            let text = format!("{} turned out to have had one", self.resolved);
            line(f, "of the unknown effects", &text)?;
        }
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

fn line(f: &mut fmt::Formatter<'_>, name: &str, text: &str) -> fmt::Result {
    writeln!(f, "{name:>36} {text}")
}

/// Rows before this one are shown even if there is nothing to count.
const ALWAYS: usize = 2;

/// A row of the counts: sorted by its place, then by its text.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Row {
    order: usize,
    text: String,
}

impl Tally {
    fn rows(&self) -> BTreeMap<Row, u64> {
        let row = |order, text: String, count| (Row { order, text }, count);
        let fixed = [
            ("sent", self.offered),
            ("accepted", self.accepted),
            ("committed", self.committed),
            ("not rolled back", self.not_rolled_back),
            ("ends that were asked for", self.polled),
            ("sent again", self.resent),
            ("of unknown effect", self.unknown),
        ];
        let fixed = fixed.into_iter().zip([0, 1, 2, 4, 5, 6, 7]);
        let aborted = self.aborted.iter().map(|(step, count)| row(3, format!("aborted by {step}"), *count));
        let errors = self.errors.iter().map(|(failure, count)| row(8, format!("error: {failure}"), *count));
        fixed
            .map(|((text, count), order)| row(order, text.to_owned(), count))
            .chain(aborted)
            .chain(errors)
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::Measured;
    use clap::Parser;
    use serde_json::Value;
    use std::time::Instant;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        options: Options,
    }

    fn options(line: &str) -> Options {
        Line::parse_from(["load"].into_iter().chain(line.split_whitespace())).options
    }

    /// 100 purchases answered after 1 to 100 ms, 90 of which ended after twice that, 10 refused.
    fn recorder(begin: Instant) -> Recorder {
        let mut recorder = Recorder::new(begin, begin + Duration::from_secs(10));
        for count in 1..=100 {
            let due = begin + Duration::from_secs(1);
            recorder.offered(due);
            recorder.accepted(due, due + Duration::from_millis(count));
            if count <= 90 {
                let end = due + Duration::from_millis(2 * count);
                recorder.ended(due, end, Outcome::Committed, count <= 5);
            }
        }
        for _ in 0..10 {
            recorder.refused(begin, begin + Duration::from_millis(7), 503);
        }
        recorder
    }

    fn report(line: &str, recorder: &Recorder, verdict: Option<Verdict>) -> Report {
        Report::new(Facts {
            options: &options(line),
            recorder,
            unresolved: 10,
            resolved: 0,
            measured: Duration::from_secs(4),
            cpu: Some(Duration::from_millis(1_000)),
            interrupted: false,
            verdict,
        })
    }

    #[test]
    fn rates_are_by_the_time_that_was_measured() {
        let report = report("", &recorder(Instant::now()), None);
        assert_eq!((report.accepted_per_second, report.completed_per_second), (25.0, 22.5));
        assert_eq!(report.load_generator_cores, Some(0.25));
        assert_eq!(report.load_generator_us_per_accepted, Some(10_000.0));
    }

    #[test]
    fn percentiles_are_exact_to_a_thousandth() {
        let report = report("", &recorder(Instant::now()), None);
        let Percentiles { count, p50, p90, p99, p99_9, max } = report.acceptance_us;
        assert_eq!(count, 100);
        for (found, expected) in
            [(p50, 50_000), (p90, 90_000), (p99, 99_000), (p99_9, 100_000), (max, 100_000)]
        {
            assert!(found.abs_diff(expected) <= expected / 1_000, "{found} for {expected}");
        }
        assert_eq!((report.completion_us.count, report.refused_us.count), (90, 10));
        assert_eq!(Percentiles::of(&Measured::default().acceptance), Percentiles::default(), "of nothing");
    }

    #[test]
    fn the_fields_of_the_json_stay() {
        let report = report("--rate 5", &recorder(Instant::now()), None);
        let json: Value = serde_json::to_value(&report).expect("it is JSON");
        let fields = |value: &Value| -> Vec<String> {
            value.as_object().into_iter().flatten().map(|(name, _)| name.clone()).collect()
        };
        let mut expected = vec![
            "url",
            "scenario",
            "load",
            "buyers",
            "customers",
            "rate_per_second",
            "threads",
            "measured_seconds",
            "accepted_per_second",
            "completed_per_second",
            "acceptance_us",
            "completion_us",
            "refused_us",
            "measured",
            "total",
            "unresolved",
            "resolved",
            "load_generator_cores",
            "load_generator_us_per_accepted",
            "interrupted",
        ];
        expected.sort_unstable();
        let sorted = |mut names: Vec<String>| {
            names.sort_unstable();
            names
        };
        assert_eq!(sorted(fields(&json)), expected);
        let percentiles = sorted(fields(&json["acceptance_us"]));
        assert_eq!(percentiles, ["count", "max", "p50", "p90", "p99", "p99_9"]);
        let tally = sorted(fields(&json["measured"]));
        let expected = [
            "aborted",
            "accepted",
            "committed",
            "completed",
            "errors",
            "not_rolled_back",
            "offered",
            "polled",
            "resent",
            "unknown",
        ];
        assert_eq!(tally, expected);
        assert_eq!(json["total"]["errors"], serde_json::json!({"503": 10}));
        assert_eq!(json["total"]["polled"], 5);
    }

    #[test]
    fn the_table_says_it_all() {
        let text = report("--rate 5", &recorder(Instant::now()), None).to_string();
        for part in ["open loop, 5 due a second", "25.0", "22.5", "refused", "answered 503", "0.25 cores"] {
            assert!(text.contains(part), "no {part:?} in\n{text}");
        }
        let reading = report("--scenario product", &recorder(Instant::now()), None).to_string();
        assert!(reading.contains("answered") && !reading.contains("completed"), "{reading}");
    }

    #[test]
    fn what_has_not_ended_does_not_pass_a_check() {
        let recorder = recorder(Instant::now());
        assert!(report("", &recorder, None).passed(), "nobody asked");
        let verdict = Verdict::new(1, 1, 1, 0, Vec::new());
        assert!(!report("--verify", &recorder, Some(verdict)).passed());
    }
}

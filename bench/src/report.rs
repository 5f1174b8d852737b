//! The one page about all records. Pure.

use std::fmt::Write as _;

use crate::machine::Machine;
use crate::record::{Asked, Figure, Record, Series, Taken, Unit, median};
use crate::scenario::Scenario;

/// Renders the page. `settings` are those of the measured shop that differ from the defaults, with their reasons.
pub(crate) fn page(records: &[(Scenario, Option<Record>)], settings: &[(&str, &str, &str)]) -> String {
    let mut page = format!("{HEAD}\n");
    page += "The measured shop runs with its defaults, except:\n\n| setting | value | why |\n|---|---|---|\n";
    for (name, value, why) in settings {
        page += &format!("| `{name}` | `{value}` | {why} |\n");
    }
    page += "\n## Asked and measured\n\n| | asked | measured | |\n|---|---|---|---|\n";
    for (scenario, record) in records {
        let figures = record.iter().flat_map(|record| &record.figures);
        for figure in figures.filter(|figure| figure.asked.is_some()) {
            page += &asked_row(*scenario, figure);
        }
        if record.is_none() {
            page += &format!("| {} | | not run | |\n", scenario.title());
        }
    }
    for (scenario, record) in records {
        page += &format!("\n## {}\n\n", scenario.title());
        page += &match record {
            Some(record) => section(*scenario, record),
            None => format!("Not run: `cargo xtask bench {}`.\n", scenario.name()),
        };
    }
    page
}

const HEAD: &str = "\
# Performance

This page is written by `cargo xtask bench`; what it says by hand is in `bench/src/report.rs`.

```sh
cargo xtask bench                # everything that takes minutes
cargo xtask bench --long         # and what takes longer
cargo xtask bench NAME...        # one scenario again; the other records stay
cargo xtask bench --quick        # whether it works: figures that mean nothing, in target/bench/quick
cargo xtask bench --render       # measures nothing, writes this page again
```

The raw results are in `docs/performance`, one file a scenario. Load generator, shop and bare server share one machine, over
loopback. The databases are on the disk of the target directory, durable at each commit (`synchronous=FULL`).

**Ratios compare, rates do not.** A machine is noisy, above all one that is shared: a figure is the median of its runs,
and what it is compared with (*beside*) was measured between those runs. Compare a ratio with a ratio; a rate with
another day's, or another machine's, says nothing.

The bare server (`bench/src/bin/bare.rs`) is the same HTTP stack without a shop: it parses the same JSON and answers.
It checks no token, reads no price, stores nothing.
";

fn machine_text(machine: &Machine) -> String {
    let Machine { processor, processors, memory_bytes, kernel, file_system } = machine;
    let memory = quantity(*memory_bytes as f64, Unit::Bytes);
    format!(
        "{processors} processors ({processor}), {memory} of memory, Linux {kernel}, data on {file_system}"
    )
}

fn asked_row(scenario: Scenario, figure: &Figure) -> String {
    let asked = figure.asked.map(|asked| asked_text(asked, figure.unit)).unwrap_or_default();
    let measured = match figure.asked {
        Some(Asked::RatioAtLeast(_)) => figure.ratio().map(ratio),
        Some(Asked::AtMost(_)) | None => figure.value().map(|value| quantity(value, figure.unit)),
    };
    let verdict = match figure.met() {
        Some(true) => "met",
        Some(false) => "**missed**",
        None => "not known",
    };
    let (name, what) = (scenario.name(), &figure.what);
    format!("| {name}: {what} | {asked} | {} | {verdict} |\n", measured.unwrap_or_default())
}

fn asked_text(asked: Asked, unit: Unit) -> String {
    match asked {
        Asked::RatioAtLeast(least) => format!("at least {}", ratio(least)),
        Asked::AtMost(most) => format!("at most {}", quantity(most, unit)),
    }
}

fn section(scenario: Scenario, record: &Record) -> String {
    let Taken { date, commit, machine } = &record.taken;
    let machine = machine_text(machine);
    let mut text =
        format!("{date}, commit {commit}, {machine}; `cargo xtask bench {}`.\n\n", scenario.name());
    text += "| | measured | runs | beside | ratio |\n|---|---:|---:|---:|---:|\n";
    for figure in &record.figures {
        let shown = |value: Option<f64>| value.map(|value| quantity(value, figure.unit)).unwrap_or_default();
        let _ = writeln!(
            text,
            "| {} | {} | {} | {} | {} |",
            figure.what,
            shown(figure.value()),
            spread(figure),
            shown(median(&figure.beside)),
            figure.ratio().map(ratio).unwrap_or_default(),
        );
    }
    for note in &record.notes {
        let _ = write!(text, "\n{note}\n");
    }
    if let Some(series) = &record.series {
        text += &table(series);
    }
    text
}

/// The least and the greatest of several runs.
fn spread(figure: &Figure) -> String {
    let least = figure.runs.iter().copied().min_by(f64::total_cmp);
    let greatest = figure.runs.iter().copied().max_by(f64::total_cmp);
    match (least, greatest) {
        (Some(least), Some(greatest)) if figure.runs.len() > 1 => {
            format!("{} to {}", quantity(least, figure.unit), quantity(greatest, figure.unit))
        }
        _ => String::new(),
    }
}

fn table(series: &Series) -> String {
    let mut text = format!("\n| {} |\n|", series.columns.join(" | "));
    text += &"---:|".repeat(series.columns.len());
    text += "\n";
    for row in &series.rows {
        let cells: Vec<String> = row.iter().map(|value| digits(*value)).collect();
        let _ = writeln!(text, "| {} |", cells.join(" | "));
    }
    text
}

fn ratio(value: f64) -> String {
    if value < 0.1 { format!("{value:.3}") } else { format!("{value:.2}") }
}

/// A number as one reads it: with its unit, and no more digits than mean something.
fn quantity(value: f64, unit: Unit) -> String {
    let (steps, base): (&[&str], f64) = match unit {
        Unit::PerSecond => return format!("{}/s", digits(value)),
        Unit::Count => return digits(value),
        Unit::Millis => (&["ms", "s"], 1000.0),
        Unit::Micros => (&["us", "ms", "s"], 1000.0),
        Unit::Nanos => (&["ns", "us", "ms", "s"], 1000.0),
        Unit::Bytes => (&["B", "KiB", "MiB", "GiB"], 1024.0),
    };
    let (mut value, mut step) = (value, 0);
    while value.abs() >= base && step + 1 < steps.len() {
        value /= base;
        step += 1;
    }
    format!("{} {}", digits(value), steps[step])
}

/// Three digits at least, and commas between thousands.
fn digits(value: f64) -> String {
    let decimals = match value.abs() {
        size if size >= 100.0 || value.fract() == 0.0 => 0,
        size if size >= 10.0 => 1,
        _ => 2,
    };
    let text = format!("{value:.decimals$}");
    let (whole, rest) = text.split_at(text.find('.').unwrap_or(text.len()));
    let (sign, whole) = whole.strip_prefix('-').map_or(("", whole), |whole| ("-", whole));
    let mut grouped = String::new();
    for (place, digit) in whole.chars().enumerate() {
        if place > 0 && (whole.len() - place) % 3 == 0 {
            grouped.push(',');
        }
        grouped.push(digit);
    }
    format!("{sign}{grouped}{rest}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::Findings;

    fn record(findings: Findings) -> Record {
        let machine = Machine { processors: 2, processor: "X".to_owned(), ..Machine::default() };
        Record::new(Taken { date: "2026-01-31".to_owned(), commit: "abc1234".to_owned(), machine }, findings)
    }

    #[test]
    fn numbers_are_short_and_have_their_unit() {
        for (value, unit, text) in [
            (81_234.4, Unit::PerSecond, "81,234/s"),
            (3.456, Unit::PerSecond, "3.46/s"),
            (1_500.0, Unit::Millis, "1.50 s"),
            (12.34, Unit::Millis, "12.3 ms"),
            (950.0, Unit::Micros, "950 us"),
            (2_500_000.0, Unit::Nanos, "2.50 ms"),
            (3.0 * 1024.0 * 1024.0, Unit::Bytes, "3 MiB"),
            (5e15, Unit::Nanos, "5,000,000 s"),
            (1_000_000.0, Unit::Count, "1,000,000"),
            (-1_000.0, Unit::Count, "-1,000"),
        ] {
            assert_eq!(quantity(value, unit), text);
        }
    }

    #[test]
    fn what_is_not_run_is_said_so() {
        let records = Scenario::ALL.map(|scenario| (scenario, None));
        let page = page(&records, &[]);
        for scenario in Scenario::ALL {
            assert!(page.contains(&format!("| {} | | not run | |", scenario.title())));
            assert!(page.contains(&format!("Not run: `cargo xtask bench {}`.", scenario.name())));
        }
    }

    #[test]
    fn a_figure_is_shown_with_its_ratio_and_its_verdict() {
        let rate = |runs: &[f64], least| {
            Figure::new("sold", Unit::PerSecond, runs).beside([100.0]).asked(Asked::RatioAtLeast(least))
        };
        let findings = Findings {
            figures: vec![
                rate(&[50.0, 70.0, 60.0], 0.5),
                rate(&[50.0], 0.7),
                rate(&[], 0.5),
                Figure::new("time", Unit::Millis, [4.0]).asked(Asked::AtMost(3.0)),
                Figure::new("size", Unit::Bytes, [2048.0]),
            ],
            notes: vec!["A note.".to_owned()],
            series: Some(Series {
                columns: vec!["seconds".to_owned(), "MiB".to_owned()],
                rows: vec![vec![1.0, 2.5]],
            }),
            ..Findings::default()
        };
        let page = page(&[(Scenario::Purchase, Some(record(findings)))], &[("A", "1", "because")]);
        for line in [
            "| `A` | `1` | because |",
            "| purchase: sold | at least 0.50 | 0.60 | met |",
            "| purchase: sold | at least 0.70 | 0.50 | **missed** |",
            "| purchase: sold | at least 0.50 |  | not known |",
            "| purchase: time | at most 3 ms | 4 ms | **missed** |",
            "2026-01-31, commit abc1234, 2 processors (X), 0 B of memory, Linux , data on ; `cargo xtask bench purchase`.",
            "| sold | 60/s | 50/s to 70/s | 100/s | 0.60 |",
            "| size | 2 KiB |  |  |  |",
            "A note.",
            "| seconds | MiB |",
            "| 1 | 2.50 |",
        ] {
            assert!(page.lines().any(|it| it == line), "no line {line:?} in\n{page}");
        }
    }
}

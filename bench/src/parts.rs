//! The parts alone: runs the criterion benches and reads their estimates.

use std::path::Path;
use std::process::Stdio;

use serde::Deserialize;
use tokio::process::Command;

use crate::Error;
use crate::bench::Bench;
use crate::record::{Figure, Findings, Unit};

/// What criterion says of a benchmark: `benchmark.json` beside `estimates.json`.
#[derive(Deserialize)]
struct Benchmark {
    full_id: String,
    throughput: Option<Throughput>,
}

#[derive(Clone, Copy, Deserialize)]
enum Throughput {
    Elements(u64),
}

#[derive(Deserialize)]
struct Estimates {
    median: Estimate,
}

#[derive(Deserialize)]
struct Estimate {
    /// In nanoseconds.
    point_estimate: f64,
}

/// Runs them all.
pub(crate) async fn parts(bench: &Bench) -> Result<Findings, Error> {
    let home = bench.work.join("criterion");
    if home.exists() {
        std::fs::remove_dir_all(&home)?;
    }
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut command = Command::new(cargo);
    command.args(["bench", "--locked", "--package", "bench", "--bench", "parts", "--"]);
    command.args(bench.pace.criterion);
    command.current_dir(&bench.root).env("CRITERION_HOME", &home).stdin(Stdio::null()).kill_on_drop(true);
    let status = command.status().await?;
    if !status.success() {
        return Err(format!("the benches of the parts failed: {status}").into());
    }
    let mut figures = Vec::new();
    read(&home, &mut figures)?;
    figures.sort_by_key(|figure| order(&figure.what));
    let notes = vec![
        "In one process, on the disk of the target directory, and without sockets but for the gateway; the median of \
         criterion's samples."
            .to_owned(),
    ];
    Ok(Findings { figures, notes, ..Findings::default() })
}

/// All benchmarks below a folder: the time of an element, and elements a second.
fn read(dir: &Path, figures: &mut Vec<Figure>) -> Result<(), Error> {
    let (about, estimates) = (dir.join("benchmark.json"), dir.join("estimates.json"));
    if dir.ends_with("new") && about.exists() {
        let Benchmark { full_id, throughput } = serde_json::from_slice(&std::fs::read(about)?)?;
        let Estimates { median } = serde_json::from_slice(&std::fs::read(estimates)?)?;
        figures.extend(figure(&full_id, throughput, median.point_estimate));
        return Ok(());
    }
    for entry in std::fs::read_dir(dir)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            read(&entry.path(), figures)?;
        }
    }
    Ok(())
}

fn figure(name: &str, throughput: Option<Throughput>, nanos: f64) -> [Figure; 2] {
    let Throughput::Elements(elements) = throughput.unwrap_or(Throughput::Elements(1));
    let each = nanos / elements as f64;
    [
        Figure::new(format!("{name}: each"), Unit::Nanos, [each]),
        Figure::new(format!("{name}: rate"), Unit::PerSecond, [1e9 / each]),
    ]
}

/// By name, with the numbers at the end in their order.
fn order(name: &str) -> (String, u64, String) {
    let (name, kind) = name.rsplit_once(": ").unwrap_or((name, ""));
    match name.rsplit_once('/') {
        Some((group, number)) if number.parse::<u64>().is_ok() => {
            (group.to_owned(), number.parse().unwrap_or_default(), kind.to_owned())
        }
        _ => (name.to_owned(), 0, kind.to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_element_is_a_part_of_an_iteration() {
        let [each, rate] = figure("bus/64", Some(Throughput::Elements(64)), 6_400.0);
        assert_eq!((each.what.as_str(), each.value()), ("bus/64: each", Some(100.0)));
        assert_eq!((rate.what.as_str(), rate.value()), ("bus/64: rate", Some(1e7)));
    }

    #[test]
    fn sizes_are_sorted_as_numbers() {
        let mut names = ["b/1024: each", "b/64: rate", "b/64: each", "a/x: each"];
        names.sort_by_key(|name| order(name));
        assert_eq!(names, ["a/x: each", "b/64: each", "b/64: rate", "b/1024: each"]);
    }
}

//! `bench`: measures the shop beside the bare server, and writes `docs/performance.md`. `cargo xtask bench` builds
//! what it needs and calls it.
//!
//! A scenario leaves a record in `docs/performance`, which belongs to the repository as the page does; the page is made of the records
//! that are there, so one scenario can be repeated alone, on any machine. What never happens: a figure in the page that no record holds; a quick try in the page; an
//! assertion on a time.

#![allow(clippy::print_stderr, reason = "a program for a developer's terminal")]

mod bench;
mod endurance;
mod load;
mod machine;
mod parts;
mod process;
mod rates;
mod record;
mod report;
mod scenario;
mod server;
mod servers;
mod stock;
mod wrk;

use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::Instant;

use clap::Parser;
use wire::time::Clock;

use crate::bench::{Bench, Pace};
use crate::machine::Machine;
use crate::record::{Record, Taken};
use crate::scenario::Scenario;
use crate::server::SHOP_SETTINGS;

/// What ends a measurement.
type Error = Box<dyn std::error::Error + Send + Sync>;

/// Measures the shop beside the bare server, and writes docs/performance.md
#[derive(Parser)]
#[command(name = "cargo xtask bench")]
struct Arguments {
    /// See that everything works, within seconds; the figures mean nothing and go to target/bench/quick
    #[arg(long)]
    quick: bool,
    /// Run what takes longer, too
    #[arg(long)]
    long: bool,
    /// Measure nothing; make the page again from the records that are there
    #[arg(long, conflicts_with_all = ["long", "scenarios"])]
    render: bool,
    /// Run these only; the page is made again with what is there of the others
    #[arg(value_name = "NAME", value_parser = scenario)]
    scenarios: Vec<Scenario>,
}

fn scenario(name: &str) -> Result<Scenario, String> {
    Scenario::ALL
        .into_iter()
        .find(|scenario| scenario.name() == name)
        .ok_or_else(|| format!("there are {}", Scenario::ALL.map(Scenario::name).join(", ")))
}

impl Arguments {
    /// What to run, in the order in which it can be run.
    fn chosen(&self) -> impl Iterator<Item = Scenario> {
        let wanted = |scenario: &Scenario| {
            if self.render {
                false
            } else if self.scenarios.is_empty() {
                self.long || !scenario.is_long()
            } else {
                self.scenarios.contains(scenario)
            }
        };
        Scenario::ALL.into_iter().filter(wanted)
    }
}

#[tokio::main]
async fn main() -> ExitCode {
    match run(&Arguments::parse()).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bench: {error}");
            ExitCode::FAILURE
        }
    }
}

async fn run(arguments: &Arguments) -> Result<(), Error> {
    // This package is one level below the workspace, and the program beside the others that were built.
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().ok_or("a package without a workspace")?;
    let program = std::env::current_exe()?;
    let built = program.parent().ok_or("a program without a folder")?;
    let results = built.join("../bench");
    let results = if arguments.quick { results.join("quick") } else { results };
    std::fs::create_dir_all(&results)?;
    let results = results.canonicalize()?;
    let machine = Machine::look(&results)?;
    machine.check_disk()?;
    let bench = Bench {
        saga: built.join("saga"),
        bare: built.join("bare"),
        root: root.to_owned(),
        work: results.join("work"),
        records: if arguments.quick { results } else { root.join("docs/performance") },
        pace: if arguments.quick { Pace::QUICK } else { Pace::FULL },
    };
    // What a run before has left that was killed.
    if bench.work.exists() {
        std::fs::remove_dir_all(&bench.work)?;
    }
    std::fs::create_dir_all(&bench.work)?;
    let taken = Taken { date: machine::date(Clock::system().now()), commit: commit(root)?, machine };
    let mut failed = Vec::new();
    for scenario in arguments.chosen() {
        let (name, begun) = (scenario.name(), Instant::now());
        eprintln!("bench: {name}: {}", scenario.title());
        match scenario.run(&bench).await {
            Ok(findings) => Record::new(taken.clone(), findings).save(&bench.records, name)?,
            Err(error) => {
                eprintln!("bench: {name} failed: {error}");
                failed.push(name);
            }
        }
        eprintln!("bench: {name}: {:.0} s", begun.elapsed().as_secs_f64());
    }
    write_page(&bench, arguments.quick)?;
    if failed.is_empty() { Ok(()) } else { Err(format!("failed: {}", failed.join(", ")).into()) }
}

fn write_page(bench: &Bench, quick: bool) -> Result<(), Error> {
    let load = |scenario: Scenario| Ok((scenario, Record::load(&bench.records, scenario.name())?));
    let records: Vec<_> = Scenario::ALL.into_iter().map(load).collect::<Result<_, std::io::Error>>()?;
    let path: PathBuf =
        if quick { bench.records.join("performance.md") } else { bench.root.join("docs/performance.md") };
    if let Some(dir) = path.parent() {
        std::fs::create_dir_all(dir)?;
    }
    std::fs::write(&path, report::page(&records, &SHOP_SETTINGS))?;
    eprintln!("bench: {}", path.display());
    Ok(())
}

/// The commit that is measured; `+changes` if the tree is another one.
fn commit(root: &Path) -> Result<String, Error> {
    let git = |arguments: &[&str]| {
        let output = Command::new("git").args(arguments).current_dir(root).output()?;
        Ok::<_, Error>(String::from_utf8_lossy(&output.stdout).trim().to_owned())
    };
    // The page itself and the records are written by the run before.
    let written = [":!docs/performance.md", ":!docs/performance"];
    let changes = git(&[&["status", "--porcelain", "--", "."], &written[..]].concat())?;
    let commit = git(&["rev-parse", "--short=10", "HEAD"])?;
    Ok(if changes.is_empty() { commit } else { format!("{commit}+changes") })
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    fn chosen(line: &str) -> Vec<&'static str> {
        let arguments = Arguments::parse_from(["bench"].into_iter().chain(line.split_whitespace()));
        arguments.chosen().map(Scenario::name).collect()
    }

    #[test]
    fn names_choose() {
        Arguments::command().debug_assert();
        assert_eq!(chosen("--long").len(), Scenario::ALL.len());
        assert!(chosen("--render --quick").is_empty());
        assert!(!chosen("").contains(&"steady") && chosen("").contains(&"parts"));
        assert_eq!(chosen("crash purchase"), ["purchase", "crash"], "in the order in which they can be run");
        let refused = Arguments::try_parse_from(["bench", "all"]).err().map(|error| error.to_string());
        assert!(refused.is_some_and(|text| text.contains("there are purchase, witness")));
    }
}

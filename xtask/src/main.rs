//! Developer commands: `cargo xtask test`, `cargo xtask ci`, `cargo xtask mutants`, `cargo xtask bench`.
//!
//! Only the standard library is used (`servers` uses nothing else), so that the first command on a new machine is compiled in a second. What
//! never happens: a command is run that is not printed; a step is skipped without a word; a failure is passed.

#![allow(clippy::print_stdout, clippy::print_stderr, reason = "a program for a developer's terminal")]

mod machine;
mod mutants;
mod mutation;
mod steps;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use servers::TestServers;
use steps::Steps;

const USAGE: &str = "\
usage: cargo xtask COMMAND

  test            install what the tests need (Debian packages; nats-server by Go; a script by npm), start the
                  servers that they share, run every test, doc tests included, stop the servers
  ci              check the format, lint, check the dependencies (if cargo-deny is installed), then test
  mutants [NAME]  put each known bug (or the one of this name) into a copy of the tree, and see a test fail
  bench [--quick] [--long | --render | NAME...]
                  measure the shop beside a bare server, by all scenarios that take minutes or by those named, and
                  write docs/performance.md
                  --long: the longer ones, too; --quick: see that it works; --render: write the page, measure nothing
";

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let mut steps = Steps::new(root());
    let done = match arguments[..] {
        ["test"] => test(&mut steps),
        ["ci"] => ci(&mut steps),
        ["mutants"] => mutation::run(root(), None),
        ["mutants", name] => mutation::run(root(), Some(name)),
        ["bench", ref scenarios @ ..] => bench(&mut steps, scenarios),
        _ => {
            eprint!("{USAGE}");
            return ExitCode::from(2);
        }
    };
    steps.summary();
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("xtask: {error}");
            ExitCode::FAILURE
        }
    }
}

/// What ends a command.
type Error = Box<dyn std::error::Error>;

fn root() -> &'static Path {
    // This package is one level below the workspace.
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap_or(Path::new("."))
}

/// The cargo that runs this command.
fn cargo() -> PathBuf {
    std::env::var_os("CARGO").map_or_else(|| PathBuf::from("cargo"), PathBuf::from)
}

fn test(steps: &mut Steps) -> Result<(), Error> {
    machine::install_missing_programs(steps, machine::FOR_TESTS)?;
    machine::install_missing_nats(steps)?;
    machine::install_missing_npm_packages(steps, root())?;
    let shared = steps.timed("servers", || Ok(TestServers::start()?))?;
    steps.cargo_with("tests", &["test", "--locked", "--workspace", "--no-fail-fast"], shared.variables())
}

/// The shop is built as its users build it: alone, so that no other package's features get into it.
fn bench(steps: &mut Steps, scenarios: &[&str]) -> Result<(), Error> {
    machine::install_missing_programs(steps, machine::FOR_MEASUREMENTS)?;
    // The names of scenarios that need the servers, and what stands for all of them.
    let needs_servers = |name: &&str| name.starts_with("servers") || ["broker", "--long"].contains(name);
    if scenarios.iter().any(needs_servers) {
        machine::install_missing_programs(steps, machine::FOR_TESTS)?;
        machine::install_missing_nats(steps)?;
    }
    steps.cargo("shop", &["build", "--locked", "--release"])?;
    steps.cargo("bench", &["build", "--locked", "--release", "--package", "bench", "--bins"])?;
    let run = ["run", "--locked", "--release", "--quiet", "--package", "bench", "--"];
    steps.cargo("measurements", &[&run, scenarios].concat())
}

fn ci(steps: &mut Steps) -> Result<(), Error> {
    machine::install_missing_components(steps)?;
    steps.cargo("format", &["fmt", "--all", "--check"])?;
    let lints = ["clippy", "--locked", "--workspace", "--all-targets", "--", "--deny", "warnings"];
    steps.cargo("lints", &lints)?;
    if servers::program::find("cargo-deny").is_some() {
        steps.cargo("dependencies", &["deny", "check"])?;
    } else {
        println!(
            "\n!! SKIPPED: dependencies are not checked against deny.toml; cargo install --locked cargo-deny\n"
        );
    }
    test(steps)
}

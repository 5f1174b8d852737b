//! Runs commands one after the other, prints each, and remembers how long each took.

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use crate::Error;

/// The steps of one developer command. The first that fails is the last.
pub(crate) struct Steps {
    root: &'static Path,
    done: Vec<(String, Duration)>,
}

impl Steps {
    /// Steps that run in `root`.
    pub(crate) fn new(root: &'static Path) -> Steps {
        Steps { root, done: Vec::new() }
    }

    /// Runs `cargo ARGUMENTS`.
    ///
    /// # Errors
    /// If it cannot be started or fails.
    pub(crate) fn cargo(&mut self, name: &str, arguments: &[&str]) -> Result<(), Error> {
        let mut command = Command::new(crate::cargo());
        command.args(arguments);
        self.run(name, &mut command)
    }

    /// Runs `cargo ARGUMENTS` with further variables in its environment. They are not printed: passwords may be among them.
    ///
    /// # Errors
    /// If it cannot be started or fails.
    pub(crate) fn cargo_with(
        &mut self,
        name: &str,
        arguments: &[&str],
        variables: impl IntoIterator<Item = (&'static str, String)>,
    ) -> Result<(), Error> {
        let mut command = Command::new(crate::cargo());
        command.args(arguments).envs(variables);
        self.run(name, &mut command)
    }

    /// Does something that is no command, and remembers how long it took.
    ///
    /// # Errors
    /// Its own.
    pub(crate) fn timed<T>(
        &mut self,
        name: &str,
        act: impl FnOnce() -> Result<T, Error>,
    ) -> Result<T, Error> {
        let begun = Instant::now();
        let result = act();
        self.done.push((name.to_owned(), begun.elapsed()));
        result
    }

    /// Runs a command whose input is empty and whose output is this process's.
    ///
    /// # Errors
    /// If it cannot be started or fails.
    pub(crate) fn run(&mut self, name: &str, command: &mut Command) -> Result<(), Error> {
        let line = line(command);
        println!("$ {line}");
        let begun = Instant::now();
        let status = command.current_dir(self.root).stdin(Stdio::null()).status();
        self.done.push((name.to_owned(), begun.elapsed()));
        match status {
            Ok(status) if status.success() => Ok(()),
            Ok(status) => Err(format!("`{line}` failed: {status}").into()),
            Err(error) => Err(format!("`{line}` cannot be started: {error}").into()),
        }
    }

    /// Prints one line: what was run, and for how long.
    pub(crate) fn summary(&self) {
        if self.done.is_empty() {
            return;
        }
        let total: Duration = self.done.iter().map(|(_, took)| *took).sum();
        let each: Vec<String> =
            self.done.iter().map(|(name, took)| format!("{name} {}", seconds(*took))).collect();
        println!("durations: {}; in all {}", each.join(", "), seconds(total));
    }
}

fn seconds(duration: Duration) -> String {
    format!("{:.1} s", duration.as_secs_f64())
}

/// The command as it would be typed.
pub(crate) fn line(command: &Command) -> String {
    let program = Path::new(command.get_program());
    // An absolute path to cargo tells nothing that its name does not.
    let name = program.file_name().unwrap_or(program.as_os_str());
    let words = std::iter::once(name).chain(command.get_args());
    words.map(|word| word.to_string_lossy().into_owned()).collect::<Vec<_>>().join(" ")
}

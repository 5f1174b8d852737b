//! `saga load` as a child process, and what it says.

use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use serde_json::Value;
use tokio::process::{Child, Command};

use crate::Error;

/// A run of `saga load` against one server.
pub(crate) struct Load {
    command: Command,
}

impl Load {
    /// One that measures for `duration` after `warm_up`.
    pub(crate) fn new(saga: &Path, base: &str, warm_up: Duration, duration: Duration) -> Load {
        let mut command = Command::new(saga);
        command.args(["load", base, "--json", "--quiet"]);
        command.arg("--duration").arg(millis(duration)).arg("--warm-up").arg(millis(warm_up));
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).kill_on_drop(true);
        Load { command }
    }

    /// With these options, as one would type them.
    pub(crate) fn with(mut self, options: &str) -> Load {
        self.command.args(options.split_whitespace());
        self
    }

    /// With a line a second in this file of that folder, where it runs: what it was called with is in the record, folders are not.
    pub(crate) fn series(mut self, folder: &Path, file: &str) -> Load {
        self.command.current_dir(folder).arg("--series").arg(file);
        self
    }

    /// Starts it.
    ///
    /// # Errors
    /// When it cannot be started.
    pub(crate) fn start(mut self) -> Result<Running, Error> {
        let line: Vec<_> = self.command.as_std().get_args().map(|word| word.to_string_lossy()).collect();
        let line = format!("saga {}", line.join(" "));
        Ok(Running { child: self.command.spawn()?, line })
    }

    /// Runs it to its end.
    ///
    /// # Errors
    /// When it cannot be run, or says nothing.
    pub(crate) async fn run(self) -> Result<Run, Error> {
        self.start()?.finish().await
    }
}

fn millis(duration: Duration) -> String {
    format!("{}ms", duration.as_millis())
}

/// A run that goes on.
pub(crate) struct Running {
    child: Child,
    line: String,
}

impl Running {
    /// Waits for its end, and before it for what can be seen while it runs.
    ///
    /// # Errors
    /// When it ends before that is seen, and as [`Running::finish`].
    pub(crate) async fn after<T>(
        self,
        seen: impl Future<Output = Result<T, Error>>,
    ) -> Result<(Run, T), Error> {
        let finish = self.finish();
        tokio::pin!(finish);
        let seen = tokio::select! {
            seen = seen => seen?,
            run = &mut finish => return Err(format!("the load ended too early: {}", run?.raw()).into()),
        };
        Ok((finish.await?, seen))
    }

    /// Waits for its end.
    ///
    /// # Errors
    /// When it says nothing. That it found something wrong is in what it says.
    pub(crate) async fn finish(self) -> Result<Run, Error> {
        let Running { child, line } = self;
        let output = child.wait_with_output().await?;
        let said = serde_json::from_slice(&output.stdout).map_err(|error| {
            let stderr = String::from_utf8_lossy(&output.stderr);
            format!("`{line}` ({}) did not say what it measured: {error}\n{stderr}", output.status)
        })?;
        Ok(Run { said, line, passed: output.status.success() })
    }
}

/// What a run has measured.
#[derive(Clone, Debug)]
pub(crate) struct Run {
    said: Value,
    /// The command.
    pub(crate) line: String,
    /// Whether it found nothing wrong.
    pub(crate) passed: bool,
}

/// Which of its latencies.
#[derive(Clone, Copy)]
pub(crate) enum Latency {
    /// Until the answer.
    Acceptance,
    /// Until the end of the purchase.
    Completion,
}

impl Run {
    /// Answers of success a second.
    ///
    /// # Errors
    /// When it does not say.
    pub(crate) fn accepted_per_second(&self) -> Result<f64, Error> {
        self.number("/accepted_per_second")
    }

    /// Purchases that ended, a second.
    ///
    /// # Errors
    /// When it does not say.
    pub(crate) fn completed_per_second(&self) -> Result<f64, Error> {
        self.number("/completed_per_second")
    }

    /// A quantile in milliseconds, such as `p50` or `p99`.
    ///
    /// # Errors
    /// When it does not say.
    pub(crate) fn latency(&self, of: Latency, quantile: &str) -> Result<f64, Error> {
        let of = match of {
            Latency::Acceptance => "acceptance_us",
            Latency::Completion => "completion_us",
        };
        Ok(self.number(&format!("/{of}/{quantile}"))? / 1e3)
    }

    /// Requests that were due, a second.
    ///
    /// # Errors
    /// When it does not say.
    pub(crate) fn offered_per_second(&self) -> Result<f64, Error> {
        Ok(self.number("/measured/offered")? / self.number("/measured_seconds")?)
    }

    /// Answers 503 and 429 a second.
    ///
    /// # Errors
    /// When it does not say how long it measured.
    pub(crate) fn refused_per_second(&self) -> Result<f64, Error> {
        Ok(self.errors_per_second("503")? + self.errors_per_second("429")?)
    }

    /// Requests a second that were due and found no free connection to the end.
    ///
    /// # Errors
    /// When it does not say how long it measured.
    pub(crate) fn not_sent_per_second(&self) -> Result<f64, Error> {
        self.errors_per_second("not_sent")
    }

    /// Processor time of the load generator for each answer of success, in microseconds.
    ///
    /// # Errors
    /// When it does not say.
    pub(crate) fn own_micros_per_answer(&self) -> Result<f64, Error> {
        self.number("/load_generator_us_per_accepted")
    }

    /// Only the kinds that there were are in what it said.
    fn errors_per_second(&self, kind: &str) -> Result<f64, Error> {
        let count = self.said.pointer(&format!("/measured/errors/{kind}")).and_then(Value::as_f64);
        Ok(count.unwrap_or_default() / self.number("/measured_seconds")?)
    }

    /// Answers of success from the beginning of the warm-up on.
    ///
    /// # Errors
    /// When it does not say.
    pub(crate) fn accepted_in_all(&self) -> Result<f64, Error> {
        self.number("/total/accepted")
    }

    /// Purchases that ended, from the beginning of the warm-up to the end of the drain.
    ///
    /// # Errors
    /// When it does not say.
    pub(crate) fn completed_in_all(&self) -> Result<f64, Error> {
        self.number("/total/completed")
    }

    /// Accepted purchases whose end was not told in time.
    ///
    /// # Errors
    /// When it does not say.
    pub(crate) fn unresolved(&self) -> Result<f64, Error> {
        self.number("/unresolved")
    }

    /// All that it said, for the record.
    pub(crate) fn raw(&self) -> Value {
        serde_json::json!({ "command": self.line, "passed": self.passed, "said": self.said })
    }

    fn number(&self, pointer: &str) -> Result<f64, Error> {
        let number = self.said.pointer(pointer).and_then(Value::as_f64);
        Ok(number.ok_or_else(|| format!("`{}` does not say {pointer}: {}", self.line, self.said))?)
    }
}

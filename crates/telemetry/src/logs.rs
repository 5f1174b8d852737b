//! The process's log: what is written, in which form, and where to (standard error).
//!
//! A person at a terminal gets lines to read, a collector gets one JSON object a line. A request that went
//! well is never a line: the metrics tell it.

use std::io::IsTerminal;

use tracing::Subscriber;
use tracing_subscriber::filter::Targets;
use tracing_subscriber::fmt::MakeWriter;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;

/// How a log line looks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// Aligned, coloured text.
    Human,
    /// One JSON object a line, the event's fields at its top.
    Json,
}

impl Format {
    /// Human if standard error is a terminal, JSON otherwise.
    pub fn detect() -> Format {
        if std::io::stderr().is_terminal() { Format::Human } else { Format::Json }
    }
}

/// Why the log could not be set up.
#[derive(Debug)]
pub enum InitError {
    /// The filter is not a list such as `info,hyper=warn`.
    Filter {
        /// The setting's value.
        filter: String,
        /// What is wrong with it.
        cause: String,
    },
    /// This process has a log already.
    AlreadySet,
}

impl std::fmt::Display for InitError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            InitError::Filter { filter, cause } => write!(
                f,
                "log filter {filter:?}: {cause}; expected a list such as \"info,hyper=warn\" of LEVEL or \
                 TARGET=LEVEL, LEVEL being off, error, warn, info, debug or trace"
            ),
            InitError::AlreadySet => f.write_str("the log is already set up in this process"),
        }
    }
}

impl std::error::Error for InitError {}

/// Sets up the process's log on standard error. `filter` is a comma-separated list of `LEVEL` (the default
/// for all targets) and `TARGET=LEVEL`.
///
/// # Errors
/// [`InitError::Filter`] for a list that does not parse, [`InitError::AlreadySet`] at a second call.
pub fn init(filter: &str, format: Format) -> Result<(), InitError> {
    let targets = parse_filter(filter)?;
    let set = match format {
        Format::Human => human(targets, std::io::stderr, std::io::stderr().is_terminal()).try_init(),
        Format::Json => json(targets, std::io::stderr).try_init(),
    };
    set.map_err(|_| InitError::AlreadySet)
}

fn parse_filter(filter: &str) -> Result<Targets, InitError> {
    filter.parse().map_err(|cause| InitError::Filter { filter: filter.to_owned(), cause: format!("{cause}") })
}

fn human<W>(targets: Targets, writer: W, ansi: bool) -> impl Subscriber + Send + Sync
where
    W: for<'w> MakeWriter<'w> + Send + Sync + 'static,
{
    let lines = tracing_subscriber::fmt::layer().with_writer(writer).with_ansi(ansi);
    tracing_subscriber::registry().with(targets).with(lines)
}

fn json<W>(targets: Targets, writer: W) -> impl Subscriber + Send + Sync
where
    W: for<'w> MakeWriter<'w> + Send + Sync + 'static,
{
    let lines =
        tracing_subscriber::fmt::layer().with_writer(writer).json().flatten_event(true).with_span_list(false);
    tracing_subscriber::registry().with(targets).with(lines)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::sync::{Arc, Mutex};

    #[derive(Clone, Default)]
    struct Captured(Arc<Mutex<Vec<u8>>>);

    impl Write for Captured {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0.lock().unwrap().write(bytes)
        }
        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    impl Captured {
        fn text(&self) -> String {
            String::from_utf8(self.0.lock().unwrap().clone()).unwrap()
        }
    }

    #[test]
    fn json_lines_carry_the_event_s_fields_at_the_top() {
        let captured = Captured::default();
        let writer = captured.clone();
        let log = json(parse_filter("info").unwrap(), move || writer.clone());
        tracing::subscriber::with_default(log, || tracing::info!(trace_id = "abc", "accepted"));
        let text = captured.text();
        assert!(text.contains(r#""message":"accepted""#) && text.contains(r#""trace_id":"abc""#), "{text}");
        assert_eq!(text.lines().count(), 1);
    }

    #[test]
    fn the_filter_holds_per_target() {
        let captured = Captured::default();
        let writer = captured.clone();
        let log = human(parse_filter("info,noisy=warn").unwrap(), move || writer.clone(), false);
        tracing::subscriber::with_default(log, || {
            tracing::info!(target: "noisy", "chatter");
            tracing::warn!(target: "noisy", "trouble");
            tracing::info!(target: "quiet", "news");
        });
        let text = captured.text();
        assert!(!text.contains("chatter") && text.contains("trouble") && text.contains("news"), "{text}");
    }

    #[test]
    fn a_bad_filter_is_named() {
        let error = parse_filter("info,hyper=loud").unwrap_err();
        assert!(error.to_string().contains("info,hyper=loud"), "{error}");
    }
}

//! The log of a child, in the supervisor's: every line says which process wrote it.

use std::io::Write;

use telemetry::logs::Format;
use tokio::io::{AsyncBufReadExt, AsyncRead, AsyncReadExt, BufReader};

/// The longest line that is kept in one piece, in bytes.
const MAX_LINE_BYTES: u64 = 64 * 1024;

/// Names are padded to this many characters, so that lines stand below each other.
const NAME_CHARS: usize = 14;

/// Copies what a child writes to this process's standard error, line by line, until it ends.
pub(super) async fn copy(name: &str, from: impl AsyncRead + Unpin, format: Format) {
    let mut lines = BufReader::new(from);
    let mut line = Vec::new();
    loop {
        line.clear();
        match (&mut lines).take(MAX_LINE_BYTES).read_until(b'\n', &mut line).await {
            Ok(0) | Err(_) => return,
            Ok(_) => {
                let text = String::from_utf8_lossy(&line);
                // Nobody is left to be told.
                let _ = std::io::stderr().lock().write_all(tagged(name, &text, format).as_bytes());
            }
        }
    }
}

/// A line with its writer's name: as the first member of a JSON object, in front of anything else.
fn tagged(name: &str, line: &str, format: Format) -> String {
    let line = line.trim_end_matches(['\r', '\n']);
    match (format, line.strip_prefix('{')) {
        (Format::Json, Some(members)) => format!("{{\"replica\":\"{name}\",{members}\n"),
        _ => format!("{name:NAME_CHARS$} | {line}\n"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_says_who_wrote_it() {
        assert_eq!(tagged("order-1", "a line\r\n", Format::Human), "order-1        | a line\n");
        let json = tagged("order-1", "{\"message\":\"ready\"}\n", Format::Json);
        assert_eq!(json, "{\"replica\":\"order-1\",\"message\":\"ready\"}\n");
        assert_eq!(tagged("order-1", "a panic\n", Format::Json), "order-1        | a panic\n");
    }
}

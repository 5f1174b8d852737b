//! Reading server-sent events (WHATWG HTML, section 9.2).

use std::collections::VecDeque;
use std::time::Duration;

use http_body_util::BodyExt;
use hyper::body::Incoming;

/// One event.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SseEvent {
    /// The last id that the stream gave: what to resume with.
    pub id: String,
    /// The event's name; `message` where it has none.
    pub event: String,
    /// Its data.
    pub data: String,
}

/// An open stream of events. Dropping it closes the connection.
#[derive(Debug)]
pub struct Events {
    body: Incoming,
    parser: Parser,
    ready: VecDeque<SseEvent>,
    ended: bool,
}

impl Events {
    pub(crate) fn new(body: Incoming) -> Events {
        Events { body, parser: Parser::default(), ready: VecDeque::new(), ended: false }
    }

    /// The next event. None when there is none within `limit`, or when the stream has ended ([`Events::ended`]). Nothing is lost
    /// when the limit is over: ask again.
    pub async fn next(&mut self, limit: Duration) -> Option<SseEvent> {
        tokio::time::timeout(limit, self.wait()).await.ok().flatten()
    }

    /// Whether the stream has ended, in order or by a broken connection.
    pub fn ended(&self) -> bool {
        self.ended
    }

    /// Comments seen so far; one opens the stream, others say that it is alive.
    pub fn comments(&self) -> usize {
        self.parser.comments
    }

    async fn wait(&mut self) -> Option<SseEvent> {
        loop {
            if let Some(event) = self.ready.pop_front() {
                return Some(event);
            }
            if self.ended {
                return None;
            }
            match self.body.frame().await {
                Some(Ok(frame)) => {
                    if let Ok(data) = frame.into_data() {
                        self.ready.extend(self.parser.feed(&data));
                    }
                }
                Some(Err(_)) | None => self.ended = true,
            }
        }
    }
}

/// What is known between two chunks.
#[derive(Debug, Default)]
struct Parser {
    /// The line that has not ended yet.
    line: Vec<u8>,
    id: String,
    event: String,
    data: Option<String>,
    comments: usize,
}

impl Parser {
    /// The events that this chunk completes. One that is cut off by the end of the stream never comes out.
    fn feed(&mut self, chunk: &[u8]) -> Vec<SseEvent> {
        let mut events = Vec::new();
        for byte in chunk {
            if *byte != b'\n' {
                self.line.push(*byte);
                continue;
            }
            let line = std::mem::take(&mut self.line);
            let line = String::from_utf8_lossy(&line);
            events.extend(self.take(line.trim_end_matches('\r')));
        }
        events
    }

    fn take(&mut self, line: &str) -> Option<SseEvent> {
        if line.is_empty() {
            let event = std::mem::take(&mut self.event);
            let event = if event.is_empty() { "message".to_owned() } else { event };
            return self.data.take().map(|data| SseEvent { id: self.id.clone(), event, data });
        }
        let (field, value) = line.split_once(':').unwrap_or((line, ""));
        let value = value.strip_prefix(' ').unwrap_or(value);
        match field {
            "" => self.comments += 1,
            "id" => self.id = value.to_owned(),
            "event" => self.event = value.to_owned(),
            "data" => match &mut self.data {
                None => self.data = Some(value.to_owned()),
                Some(data) => {
                    data.push('\n');
                    data.push_str(value);
                }
            },
            // Unknown fields are ignored, as a browser does.
            _ => {}
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_are_read_however_they_are_cut() {
        let text = ": hello\n\nevent: data\nid: 7\ndata: a\ndata: b\n\n: alive\ndata:c\r\n\r\nid: 8\n\ndata: cut off";
        let event = |id: &str, event: &str, data: &str| SseEvent {
            id: id.to_owned(),
            event: event.to_owned(),
            data: data.to_owned(),
        };
        let expected = [event("7", "data", "a\nb"), event("7", "message", "c")];
        for size in 1..text.len() {
            let mut parser = Parser::default();
            let events: Vec<SseEvent> =
                text.as_bytes().chunks(size).flat_map(|chunk| parser.feed(chunk)).collect();
            assert_eq!(events, expected, "in chunks of {size}");
            assert_eq!(parser.comments, 2);
        }
    }
}

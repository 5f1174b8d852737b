//! Server-sent events (WHATWG HTML, section 9.2), read from bytes as they come.
//!
//! Pure, and without an allocation for each event: a customer of a busy shop gets six of them for each purchase.

/// The longest event that is read, in bytes. One that is longer is left out.
const MAX_EVENT_BYTES: usize = 64 * 1024;

/// What is known between two chunks.
#[derive(Debug, Default)]
pub(crate) struct Parser {
    /// The line that has not ended yet.
    line: Vec<u8>,
    /// The data of the event that has not ended yet.
    data: Vec<u8>,
    has_data: bool,
    too_long: bool,
    /// The id of the event that has not ended yet, or of the last one.
    id: Vec<u8>,
    last_id: Vec<u8>,
}

impl Parser {
    /// Hands the data of each event that this chunk completes to `told`. An event that the end of the stream cuts off never
    /// comes out.
    pub(crate) fn feed(&mut self, mut chunk: &[u8], mut told: impl FnMut(&[u8])) {
        while let Some(end) = memchr::memchr(b'\n', chunk) {
            let (line, rest) = (&chunk[..end], &chunk[end + 1..]);
            chunk = rest;
            if self.line.is_empty() {
                self.take(line, &mut told);
            } else {
                self.keep(line);
                let mut line = std::mem::take(&mut self.line);
                self.take(&line, &mut told);
                line.clear();
                self.line = line;
            }
        }
        self.keep(chunk);
    }

    /// The id of the last whole event: what to resume behind. Empty while there was none.
    pub(crate) fn last_id(&self) -> &[u8] {
        &self.last_id
    }

    /// The connection is gone, and with it what had not ended.
    pub(crate) fn cut(&mut self) {
        self.line.clear();
        self.data.clear();
        (self.has_data, self.too_long) = (false, false);
        self.id.clone_from(&self.last_id);
    }

    fn keep(&mut self, part: &[u8]) {
        if self.line.len() + part.len() > MAX_EVENT_BYTES {
            self.too_long = true;
        } else {
            self.line.extend_from_slice(part);
        }
    }

    fn take(&mut self, line: &[u8], told: &mut impl FnMut(&[u8])) {
        let line = line.strip_suffix(b"\r").unwrap_or(line);
        if line.is_empty() {
            if self.has_data && !self.too_long {
                told(&self.data);
            }
            self.last_id.clone_from(&self.id);
            self.data.clear();
            (self.has_data, self.too_long) = (false, false);
            return;
        }
        let colon = memchr::memchr(b':', line).unwrap_or(line.len());
        let (field, value) = (&line[..colon], line.get(colon + 1..).unwrap_or_default());
        let value = value.strip_prefix(b" ").unwrap_or(value);
        match field {
            b"data" => {
                if self.data.len() + value.len() > MAX_EVENT_BYTES {
                    self.too_long = true;
                    return;
                }
                if self.has_data {
                    self.data.push(b'\n');
                }
                self.data.extend_from_slice(value);
                self.has_data = true;
            }
            b"id" => {
                self.id.clear();
                self.id.extend_from_slice(value);
            }
            // Names, comments and unknown fields say nothing about a purchase.
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(parser: &mut Parser, chunks: impl IntoIterator<Item = impl AsRef<[u8]>>) -> Vec<String> {
        let mut events = Vec::new();
        for chunk in chunks {
            parser.feed(chunk.as_ref(), |data| events.push(String::from_utf8_lossy(data).into_owned()));
        }
        events
    }

    #[test]
    fn events_are_read_however_they_are_cut() {
        let text = b": hello\n\nevent: data\nid: 7\ndata: a\ndata: b\n\n: alive\ndata:c\r\n\r\ndata\n\nid: 8\ndata: cut";
        for size in 1..=text.len() {
            let mut parser = Parser::default();
            assert_eq!(read(&mut parser, text.chunks(size)), ["a\nb", "c", ""], "in chunks of {size}");
            assert_eq!(parser.last_id(), b"7", "an id counts once its event is whole");
        }
    }

    #[test]
    fn a_cut_stream_goes_on_with_the_next_event() {
        let mut parser = Parser::default();
        assert_eq!(read(&mut parser, ["id: 1\ndata: a\n\nid: 2\ndata: half\nda"]), ["a"]);
        parser.cut();
        assert_eq!(parser.last_id(), b"1");
        assert_eq!(read(&mut parser, ["ta: x\n\ndata: b\n\n"]), ["b"], "the rest of a line is no field");
        assert_eq!(parser.last_id(), b"1");
    }

    #[test]
    fn what_is_too_long_is_left_out() {
        let mut parser = Parser::default();
        let long = format!("data: {}\n\ndata: short\n\n", "x".repeat(MAX_EVENT_BYTES + 1));
        assert_eq!(read(&mut parser, long.as_bytes().chunks(1000)), ["short"]);
        let many = "data: 0123456789\n".repeat(MAX_EVENT_BYTES / 10 + 1) + "\ndata: short\n\n";
        assert_eq!(read(&mut parser, [many]), ["short"]);
        assert!(
            parser.data.capacity() <= 2 * MAX_EVENT_BYTES && parser.line.capacity() <= 2 * MAX_EVENT_BYTES
        );
    }
}

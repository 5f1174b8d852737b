//! Where a client is in its stream of events, as text: the id of every event, and what `Last-Event-ID` brings back.
//!
//! A customer's stream is that of all its purchases, mixed. A cursor says exactly what of it has been sent: every
//! purchase with a finish number up to `finished`, whole; and of each purchase that had not ended, how many events. So
//! any replica can resume any stream from the database alone, with nothing missed and nothing twice.
//!
//! The text is `FINISHED`, then `-PURCHASE.EVENTS` for each purchase that was under way: `41-8391.3-8395.1`.

use std::collections::BTreeMap;
use std::fmt::Write as _;

/// Purchases under way that a cursor names at most. A customer who has more gets events whose id repeats the last cursor
/// that fitted: after a resume some events come twice then, and none is missed.
pub(crate) const MAX_UNDER_WAY: usize = 64;

/// The longest text that is read as a cursor, in bytes.
const MAX_TEXT_BYTES: usize = 64 + MAX_UNDER_WAY * 24;

/// What a client has been sent.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Cursor {
    pub(crate) finished: u64,
    under_way: BTreeMap<u64, u32>,
}

/// A text that is no cursor.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("invalid Last-Event-ID {0:?}: expected the id of an event of this stream")]
pub(crate) struct NoCursor(String);

impl Cursor {
    /// The cursor of a client that has been sent all that ended up to this number, and nothing else.
    pub(crate) fn after(finished: u64) -> Cursor {
        Cursor { finished, under_way: BTreeMap::new() }
    }

    /// How many events of this purchase the client has been sent.
    pub(crate) fn sent(&self, id: u64) -> usize {
        self.under_way.get(&id).map_or(0, |sent| *sent as usize)
    }

    /// One more event of a purchase is sent.
    pub(crate) fn send(&mut self, id: u64) {
        *self.under_way.entry(id).or_default() += 1;
    }

    /// A purchase's last event is sent.
    pub(crate) fn finish(&mut self, id: u64, finished_no: u64) {
        self.under_way.remove(&id);
        self.finished = self.finished.max(finished_no);
    }

    /// The text, if it is not too long.
    pub(crate) fn text(&self) -> Option<String> {
        if self.under_way.len() > MAX_UNDER_WAY {
            return None;
        }
        let mut text = self.finished.to_string();
        for (id, sent) in &self.under_way {
            // Writing to a string cannot fail.
            let _ = write!(text, "-{id}.{sent}");
        }
        Some(text)
    }

    /// Reads a text.
    pub(crate) fn parse(text: &str) -> Result<Cursor, NoCursor> {
        let no_cursor = || NoCursor(text.chars().take(64).collect());
        if text.len() > MAX_TEXT_BYTES {
            return Err(no_cursor());
        }
        let mut parts = text.split('-');
        let finished = parts.next().and_then(number).ok_or_else(no_cursor)?;
        let mut under_way = BTreeMap::new();
        for part in parts {
            let (id, sent) = part.split_once('.').ok_or_else(no_cursor)?;
            let id: u64 = number(id).ok_or_else(no_cursor)?;
            let sent: u32 = number(sent).ok_or_else(no_cursor)?;
            under_way.insert(id, sent);
        }
        if under_way.len() > MAX_UNDER_WAY {
            return Err(no_cursor());
        }
        Ok(Cursor { finished, under_way })
    }
}

/// Digits only: no sign, no space.
fn number<T: std::str::FromStr>(text: &str) -> Option<T> {
    text.bytes().all(|byte| byte.is_ascii_digit()).then(|| text.parse().ok()).flatten()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cursor_survives_its_text() {
        let mut cursor = Cursor::after(41);
        assert_eq!(cursor.text().unwrap(), "41");
        for id in [8395, 8391, 8391, 8391] {
            cursor.send(id);
        }
        assert_eq!(cursor.text().unwrap(), "41-8391.3-8395.1");
        assert_eq!(Cursor::parse("41-8391.3-8395.1").unwrap(), cursor);
        cursor.finish(8391, 43);
        cursor.finish(8390, 42);
        assert_eq!(cursor.text().unwrap(), "43-8395.1");
        assert_eq!((cursor.sent(8391), cursor.sent(8395)), (0, 1));
    }

    #[test]
    fn what_is_no_cursor_is_refused() {
        let too_long = format!("1{}", "-1.1".repeat(600));
        let too_large = format!("1{}", (1..66).map(|id| format!("-{id}.1")).collect::<String>());
        let bad =
            ["", "x", "-1", "+1", "1-", "1-2", "1-2.", "1-.3", "1-2.-3", "1.5", "99999999999999999999", " 1"];
        for text in bad.into_iter().chain([too_long.as_str(), too_large.as_str()]) {
            assert!(Cursor::parse(text).is_err(), "{text:?} was read as a cursor");
        }
    }

    #[test]
    fn a_cursor_that_names_too_many_purchases_has_no_text() {
        let mut cursor = Cursor::after(0);
        for id in 1..=MAX_UNDER_WAY as u64 {
            cursor.send(id);
        }
        let text = cursor.text().unwrap();
        assert_eq!(Cursor::parse(&text).unwrap(), cursor);
        cursor.send(1_000);
        assert_eq!(cursor.text(), None);
    }
}

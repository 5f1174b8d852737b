//! Where a client is in its stream of events, as text: the id of every event, and what `Last-Event-ID` brings back.
//!
//! A customer's stream is that of all its purchases, mixed. A cursor says exactly what of it has been sent: every
//! purchase with a finish number up to `finished`, whole; and of each purchase that had not ended, how many events. So
//! any replica can resume any stream from the database alone, with nothing missed and nothing twice.
//!
//! The text is `FINISHED`, then `-PURCHASE.EVENTS` for the first purchase that was under way, by id, in hexadecimal, and for each that
//! follows `~`, how much greater its id is than the one before, and its events: `41-20c7.3~4.1`. (Ids are long and grow. A decimal
//! id in it would be found by whoever looks for a purchase's events in the text of a stream.) Every event carries a text, and from one
//! event to the next nearly all of it stays: so it is kept, and changed in its place.

use std::collections::BTreeMap;

/// Purchases under way that a cursor names at most. A customer who has more gets events whose id repeats the last cursor
/// that fitted: after a resume some events come twice then, and none is missed.
pub(crate) const MAX_UNDER_WAY: usize = 64;

/// The longest text that is read as a cursor, in bytes.
const MAX_TEXT_BYTES: usize = 64 + MAX_UNDER_WAY * 24;

/// What a client has been sent.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Cursor {
    finished: u64,
    /// By id.
    under_way: Vec<UnderWay>,
    /// What the text says of those under way. It is not kept up while there are more than a text names.
    listed: Vec<u8>,
    /// The last text that fitted, while there are more than a text names.
    fitted: Vec<u8>,
}

/// A purchase of which some events have been sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct UnderWay {
    id: u64,
    events: u32,
    /// Where its part of [`Cursor::listed`] ends.
    end: usize,
}

/// A text that is no cursor.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("invalid Last-Event-ID {0:?}: expected the id of an event of this stream")]
pub(crate) struct NoCursor(String);

impl Cursor {
    /// The cursor of a client that has been sent all that ended up to this number, and nothing else.
    pub(crate) fn after(finished: u64) -> Cursor {
        Cursor { finished, ..Cursor::default() }
    }

    /// The client has been sent all that ended up to this number.
    pub(crate) fn finished(&self) -> u64 {
        self.finished
    }

    /// How many events of this purchase the client has been sent.
    pub(crate) fn sent(&self, id: u64) -> usize {
        self.place(id).map_or(0, |place| self.under_way[place].events as usize)
    }

    /// One more event of a purchase is sent.
    pub(crate) fn send(&mut self, id: u64) {
        let place = match self.place(id) {
            Ok(place) => place,
            Err(place) => {
                if self.under_way.len() == MAX_UNDER_WAY {
                    let mut text = Vec::new();
                    self.put(&mut text);
                    self.fitted = text;
                }
                self.under_way.insert(place, UnderWay { id, events: 0, end: self.begin(place) });
                place
            }
        };
        let is_new = self.under_way[place].events == 0;
        self.under_way[place].events += 1;
        if self.fits() {
            self.list(place);
            if is_new {
                self.list(place + 1);
            }
        }
    }

    /// A purchase's last event is sent.
    pub(crate) fn finish(&mut self, id: u64, finished_no: u64) {
        self.finished = self.finished.max(finished_no);
        let Ok(place) = self.place(id) else { return };
        if self.fits() {
            self.replace(place, b"");
            self.under_way.remove(place);
            self.list(place);
            return;
        }
        self.under_way.remove(place);
        if self.fits() {
            self.listed.clear();
            self.under_way.iter_mut().for_each(|one| one.end = 0);
            (0..self.under_way.len()).for_each(|place| self.list(place));
            self.fitted = Vec::new();
        }
    }

    /// Appends the text; if it would be too long, the last one that was not.
    pub(crate) fn put(&self, out: &mut Vec<u8>) {
        if self.fits() {
            out.extend_from_slice(itoa::Buffer::new().format(self.finished).as_bytes());
            out.extend_from_slice(&self.listed);
        } else {
            out.extend_from_slice(&self.fitted);
        }
    }

    /// About how long the text is, in bytes.
    pub(crate) fn text_bytes(&self) -> usize {
        20 + self.listed.len().max(self.fitted.len())
    }

    /// Reads a text.
    pub(crate) fn parse(text: &str) -> Result<Cursor, NoCursor> {
        let no_cursor = || NoCursor(text.chars().take(64).collect());
        if text.len() > MAX_TEXT_BYTES {
            return Err(no_cursor());
        }
        let (finished, mut rest) = cut(text);
        let finished = number(finished).ok_or_else(no_cursor)?;
        let mut under_way = BTreeMap::new();
        let mut before: Option<u64> = None;
        while let Some(sign) = rest.chars().next() {
            let (part, next) = cut(&rest[1..]);
            let (id, events) = part.split_once('.').ok_or_else(no_cursor)?;
            let events = number(events).ok_or_else(no_cursor)?;
            let id = match sign {
                '~' => before.zip(number(id)).and_then(|(before, more): (u64, u64)| before.checked_add(more)),
                _ => from_hex(id),
            };
            let id = id.ok_or_else(no_cursor)?;
            under_way.insert(id, events);
            (before, rest) = (Some(id), next);
        }
        if under_way.len() > MAX_UNDER_WAY {
            return Err(no_cursor());
        }
        let mut cursor = Cursor::after(finished);
        for (place, (id, events)) in under_way.into_iter().enumerate() {
            cursor.under_way.push(UnderWay { id, events, end: cursor.listed.len() });
            cursor.list(place);
        }
        Ok(cursor)
    }

    fn place(&self, id: u64) -> Result<usize, usize> {
        self.under_way.binary_search_by_key(&id, |one| one.id)
    }

    fn fits(&self) -> bool {
        self.under_way.len() <= MAX_UNDER_WAY
    }

    /// Where the part of the one at this place begins.
    fn begin(&self, place: usize) -> usize {
        place.checked_sub(1).map_or(0, |before| self.under_way[before].end)
    }

    /// Writes the part of the one at this place anew, if there is one.
    fn list(&mut self, place: usize) {
        let Some(UnderWay { id, events, .. }) = self.under_way.get(place).copied() else { return };
        let mut part = [0; 1 + 20 + 1 + 10];
        let mut length = 0;
        let mut put = |piece: &[u8]| {
            part[length..length + piece.len()].copy_from_slice(piece);
            length += piece.len();
        };
        match place.checked_sub(1) {
            None => {
                put(b"-");
                put(hex(id, &mut [0; 16]));
            }
            Some(before) => {
                put(b"~");
                put(itoa::Buffer::new().format(id - self.under_way[before].id).as_bytes());
            }
        }
        put(b".");
        put(itoa::Buffer::new().format(events).as_bytes());
        self.replace(place, &part[..length]);
    }

    fn replace(&mut self, place: usize, part: &[u8]) {
        let (begin, end) = (self.begin(place), self.under_way[place].end);
        let (length, new_end) = (self.listed.len(), begin + part.len());
        if new_end != end {
            if new_end > end {
                self.listed.resize(length + new_end - end, 0);
            }
            self.listed.copy_within(end..length, new_end);
            self.listed.truncate(length - end + new_end);
            self.under_way[place..].iter_mut().for_each(|one| one.end = one.end + new_end - end);
        }
        self.listed[begin..new_end].copy_from_slice(part);
    }
}

/// A number in lower-case hexadecimal, without zeros before it.
fn hex(mut number: u64, digits: &mut [u8; 16]) -> &[u8] {
    let mut begin = digits.len();
    loop {
        begin -= 1;
        digits[begin] = b"0123456789abcdef"[(number % 16) as usize];
        number /= 16;
        if number == 0 {
            return &digits[begin..];
        }
    }
}

fn from_hex(text: &str) -> Option<u64> {
    let lower_hex = |byte: u8| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte);
    text.bytes().all(lower_hex).then(|| u64::from_str_radix(text, 16).ok()).flatten()
}

/// A text up to where its next part begins, and from there on.
fn cut(text: &str) -> (&str, &str) {
    text.split_at(text.find(['-', '~']).unwrap_or(text.len()))
}

/// Digits only: no sign, no space.
fn number<T: std::str::FromStr>(text: &str) -> Option<T> {
    text.bytes().all(|byte| byte.is_ascii_digit()).then(|| text.parse().ok()).flatten()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn text(cursor: &Cursor) -> String {
        let mut text = Vec::new();
        cursor.put(&mut text);
        String::from_utf8(text).unwrap()
    }

    #[test]
    fn a_cursor_survives_its_text() {
        let mut cursor = Cursor::after(41);
        assert_eq!(text(&cursor), "41");
        for id in [8395, 8391, 8391, 8391] {
            cursor.send(id);
        }
        assert_eq!(text(&cursor), "41-20c7.3~4.1");
        assert_eq!(Cursor::parse("41-20c7.3~4.1").unwrap(), cursor);
        cursor.finish(8391, 43);
        cursor.finish(8390, 42);
        assert_eq!(text(&cursor), "43-20cb.1");
        assert_eq!((cursor.sent(8391), cursor.sent(8395)), (0, 1));
    }

    #[test]
    fn what_is_no_cursor_is_refused() {
        let too_long = format!("1{}", "-1.1".repeat(600));
        let too_large = format!("1{}", (1..66).map(|id| format!("-{id}.1")).collect::<String>());
        let bad = [
            "",
            "x",
            "-1",
            "+1",
            "1-",
            "1-2",
            "1-2.",
            "1-.3",
            "1-2.-3",
            "1.5",
            "1~2.1",
            "1-2.1~",
            "1-2.1~3",
            "1-2G.1",
            "1-20C7.1",
            "99999999999999999999",
            "1-1.1~18446744073709551615.1",
            " 1",
        ];
        for text in bad.into_iter().chain([too_long.as_str(), too_large.as_str()]) {
            assert!(Cursor::parse(text).is_err(), "{text:?} was read as a cursor");
        }
    }

    #[test]
    fn a_cursor_that_names_too_many_purchases_keeps_the_last_text_that_fitted() {
        let mut cursor = Cursor::after(0);
        for id in 1..=MAX_UNDER_WAY as u64 {
            cursor.send(id);
        }
        let fitted = text(&cursor);
        assert_eq!(Cursor::parse(&fitted).unwrap(), cursor);
        cursor.send(1_000);
        cursor.send(1);
        assert_eq!(text(&cursor), fitted);
        cursor.finish(2, 7);
        assert_eq!(text(&cursor), format!("7{}~936.1", fitted[1..].replace("-1.1~1.1~1.1", "-1.2~2.1")));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]

        /// The text is changed in its place, and says what one that is written anew would say.
        #[test]
        fn the_text_says_what_was_sent(steps in prop::collection::vec((0..100_u64, 0..4_u64), 0..400)) {
            let mut cursor = Cursor::after(5);
            let (mut finished, mut under_way) = (5, BTreeMap::<u64, u32>::new());
            let mut fitted = text(&cursor);
            for (number, step) in steps {
                // Of different lengths.
                let id = number * number * number;
                if step == 0 {
                    finished += number % 2;
                    cursor.finish(id, finished);
                    under_way.remove(&id);
                } else {
                    cursor.send(id);
                    *under_way.entry(id).or_default() += 1;
                }
                prop_assert_eq!(cursor.sent(id), under_way.get(&id).map_or(0, |sent| *sent as usize));
                if under_way.len() <= MAX_UNDER_WAY {
                    fitted = finished.to_string();
                    let mut before = None;
                    for (id, sent) in &under_way {
                        match before.replace(*id) {
                            None => fitted += &format!("-{id:x}.{sent}"),
                            Some(before) => fitted += &format!("~{}.{sent}", id - before),
                        }
                    }
                    prop_assert_eq!(&Cursor::parse(&fitted).unwrap(), &cursor);
                }
                prop_assert_eq!(text(&cursor), fitted.clone());
            }
        }
    }
}

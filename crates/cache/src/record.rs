//! How records are written into a shared cache: a few bytes, and a format number in front.
//!
//! Processes of different versions share Redis. What a process does not understand is a miss for it, never an error.

/// Something that can be kept in a shared cache.
pub trait Record: Sized + Send + Sync + 'static {
    /// Which fields there are, in which order. Give it a new number when that changes.
    const FORMAT: u8;

    /// Writes the fields.
    fn write(&self, to: &mut Writer);

    /// Reads the fields as [`Record::write`] wrote them; none if they are something else.
    fn read(from: &mut Reader<'_>) -> Option<Self>;
}

/// A record with its format number.
pub(crate) fn encode<R: Record>(record: &R) -> Vec<u8> {
    let mut writer = Writer { bytes: vec![R::FORMAT] };
    record.write(&mut writer);
    writer.bytes
}

/// None if it is of another format, or not whole, or more than that.
pub(crate) fn decode<R: Record>(bytes: &[u8]) -> Option<R> {
    let (format, rest) = bytes.split_first()?;
    let mut reader = Reader { rest };
    let record = (*format == R::FORMAT).then(|| R::read(&mut reader))??;
    reader.rest.is_empty().then_some(record)
}

/// Takes a record's fields.
#[derive(Debug)]
pub struct Writer {
    bytes: Vec<u8>,
}

impl Writer {
    /// A number, in as many groups of seven bits as it has.
    pub fn number(&mut self, mut number: u64) {
        while number >= 0x80 {
            self.bytes.push(number as u8 | 0x80);
            number >>= 7;
        }
        self.bytes.push(number as u8);
    }

    /// A number that may be negative; small ones of either sign are short.
    pub fn signed(&mut self, number: i64) {
        self.number(((number << 1) ^ (number >> 63)) as u64);
    }

    /// A text, with its length in front.
    pub fn text(&mut self, text: &str) {
        self.number(text.len() as u64);
        self.bytes.extend_from_slice(text.as_bytes());
    }
}

/// Gives a record's fields back, in the order in which they were written.
#[derive(Debug)]
pub struct Reader<'a> {
    rest: &'a [u8],
}

impl Reader<'_> {
    /// A number.
    pub fn number(&mut self) -> Option<u64> {
        let mut number = 0_u64;
        for shift in (0..64).step_by(7) {
            let (byte, rest) = self.rest.split_first()?;
            self.rest = rest;
            let bits = u64::from(byte & 0x7f);
            if (bits << shift) >> shift != bits {
                return None;
            }
            number |= bits << shift;
            if byte & 0x80 == 0 {
                return Some(number);
            }
        }
        None
    }

    /// A number that may be negative.
    pub fn signed(&mut self) -> Option<i64> {
        let number = self.number()?;
        Some((number >> 1) as i64 ^ -((number & 1) as i64))
    }

    /// A text.
    pub fn text(&mut self) -> Option<String> {
        let length = usize::try_from(self.number()?).ok()?;
        let (text, rest) = self.rest.split_at_checked(length)?;
        self.rest = rest;
        String::from_utf8(text.to_vec()).ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, PartialEq, Eq)]
    struct Sample {
        id: u64,
        amount: i64,
        name: String,
    }

    impl Record for Sample {
        const FORMAT: u8 = 3;

        fn write(&self, to: &mut Writer) {
            to.number(self.id);
            to.signed(self.amount);
            to.text(&self.name);
        }

        fn read(from: &mut Reader<'_>) -> Option<Sample> {
            Some(Sample { id: from.number()?, amount: from.signed()?, name: from.text()? })
        }
    }

    #[test]
    fn what_is_written_is_read() {
        for id in [0, 1, 127, 128, 1 << 53, u64::MAX] {
            for amount in [0, 1, -1, 63, -64, 64, i64::MAX, i64::MIN] {
                let sample = Sample { id, amount, name: "Mjölnir".to_owned() };
                assert_eq!(decode(&encode(&sample)), Some(sample));
            }
        }
        let small = Sample { id: 5, amount: -5, name: String::new() };
        assert_eq!(encode(&small).len(), 4, "a byte for each field, and one for the format");
    }

    #[test]
    fn anything_else_is_a_miss() {
        let whole = encode(&Sample { id: 300, amount: -7, name: "axe".to_owned() });
        for end in 0..whole.len() {
            assert_eq!(decode::<Sample>(&whole[..end]), None, "{end} bytes of it");
        }
        let more = [&whole[..], &[0]].concat();
        let mut other_format = whole.clone();
        other_format[0] += 1;
        let mut no_text = whole.clone();
        *no_text.last_mut().expect("not empty") = 0xff;
        let too_large = [&[Sample::FORMAT][..], &[0xff; 9], &[2, 0, 0]].concat();
        let too_long = [&[Sample::FORMAT, 0, 0][..], &[0xff; 9], &[1]].concat();
        for bytes in [more, other_format, no_text, too_large, too_long] {
            assert_eq!(decode::<Sample>(&bytes), None, "{bytes:?}");
        }
    }
}

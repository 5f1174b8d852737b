//! A set as the JSON text that `JSON_TABLE` reads: an array of rows, each an array of values.
//!
//! A blob is written in hexadecimal, because JSON has none; the statement decodes it (see `dialect.rs`).

use crate::{Set, Value};

/// The set in one text or more: one that has reached `full_bytes` takes no further row. The rows keep their order.
pub(super) fn texts(set: &Set, full_bytes: usize) -> impl Iterator<Item = String> {
    let mut rows = set.rows().peekable();
    std::iter::from_fn(move || {
        rows.peek()?;
        let mut text = String::from("[");
        while let Some(row) = rows.next() {
            push_row(&mut text, row);
            if rows.peek().is_none() || text.len() >= full_bytes {
                break;
            }
            text.push(',');
        }
        text.push(']');
        Some(text)
    })
}

fn push_row<'v>(text: &mut String, row: impl Iterator<Item = Value<'v>>) {
    text.push('[');
    for (place, value) in row.enumerate() {
        if place > 0 {
            text.push(',');
        }
        match value {
            Value::Null => text.push_str("null"),
            Value::Int(number) => push_int(text, number),
            Value::Text(value) => push_text(text, value),
            Value::Blob(bytes) => {
                text.push('"');
                push_hex(text, bytes);
                text.push('"');
            }
            // `Set::push` takes none.
            Value::Set(_) => unreachable!("a set in a set"),
        }
    }
    text.push(']');
}

pub(super) fn push_int(text: &mut String, number: i64) {
    use std::fmt::Write;
    write!(text, "{number}").expect("a string takes everything");
}

/// Escapes what RFC 8259 says must be; all else is UTF-8 as it is.
fn push_text(text: &mut String, value: &str) {
    text.push('"');
    let mut plain_from = 0;
    for (at, byte) in value.bytes().enumerate() {
        if byte >= 0x20 && byte != b'"' && byte != b'\\' {
            continue;
        }
        text.push_str(&value[plain_from..at]);
        plain_from = at + 1;
        match byte {
            b'"' => text.push_str("\\\""),
            b'\\' => text.push_str("\\\\"),
            control => {
                text.push_str("\\u00");
                push_hex(text, &[control]);
            }
        }
    }
    text.push_str(&value[plain_from..]);
    text.push('"');
}

pub(super) fn push_hex(text: &mut String, bytes: &[u8]) {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    text.reserve(2 * bytes.len() + 2);
    for byte in bytes {
        text.push(char::from(DIGITS[usize::from(byte >> 4)]));
        text.push(char::from(DIGITS[usize::from(byte & 0xf)]));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn whole(rows: &[&[Value<'_>]]) -> Vec<String> {
        let mut set = Set::new();
        rows.iter().for_each(|row| set.push(row));
        texts(&set, usize::MAX).collect()
    }

    #[test]
    fn every_kind_of_value() {
        let first: &[Value<'_>] =
            &[Value::Int(i64::MIN), Value::Text("a\"\\\u{1f}ü\u{1F980}\n"), Value::Blob(&[0, 0xaf])];
        let second: &[Value<'_>] = &[Value::Null, Value::Text(""), Value::Blob(&[])];
        let expected = r#"[[-9223372036854775808,"a\"\\\u001fü🦀\u000a","00af"],[null,"",""]]"#;
        assert_eq!(whole(&[first, second]), [expected]);
        assert!(whole(&[]).is_empty());
    }

    #[test]
    fn a_long_set_is_cut_between_rows() {
        let mut set = Set::new();
        (0..5_u64).for_each(|id| set.push(&[Value::from(id)]));
        assert_eq!(texts(&set, 7).collect::<Vec<_>>(), ["[[0],[1]]", "[[2],[3]]", "[[4]]"]);
        assert_eq!(texts(&set, 0).count(), 5);
    }
}

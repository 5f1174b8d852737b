//! The identity of a trace, as W3C Trace Context (level 1) writes it in the header `traceparent`.
//!
//! A purchase is one trace: its id is in the log lines of every service that works on it, and travels in
//! every message of its saga. What never happens: an all-zero trace id or span id, which the recommendation
//! forbids, whatever came in or whatever the random source yields.

use std::fmt;
use std::num::{NonZeroU64, NonZeroU128};
use std::str::FromStr;

/// A position in a trace.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct TraceContext {
    trace_id: NonZeroU128,
    span_id: NonZeroU64,
    sampled: bool,
}

/// Why a `traceparent` is not one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ParseError {
    /// Not `VERSION-TRACEID-SPANID-FLAGS` in lower-case hexadecimal digits of 2, 32, 16 and 2.
    Shape,
    /// Version ff, which is never valid.
    Version,
    /// A trace id or span id of zeros only.
    Zero,
}

impl fmt::Display for ParseError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            ParseError::Shape => "traceparent is not VERSION-TRACEID-SPANID-FLAGS in lower-case hex",
            ParseError::Version => "traceparent has version ff",
            ParseError::Zero => "traceparent has an id of zeros",
        })
    }
}

impl std::error::Error for ParseError {}

impl TraceContext {
    /// A context from its parts; None when an id is zero.
    pub fn new(trace_id: u128, span_id: u64, sampled: bool) -> Option<TraceContext> {
        Some(TraceContext {
            trace_id: NonZeroU128::new(trace_id)?,
            span_id: NonZeroU64::new(span_id)?,
            sampled,
        })
    }

    /// The root of a new trace. `fill` supplies the random bytes; zeros are replaced by ones.
    pub fn generate(mut fill: impl FnMut(&mut [u8]), sampled: bool) -> TraceContext {
        let mut trace_id = [0; 16];
        fill(&mut trace_id);
        TraceContext {
            trace_id: NonZeroU128::new(u128::from_be_bytes(trace_id)).unwrap_or(NonZeroU128::MIN),
            span_id: random_span_id(fill),
            sampled,
        }
    }

    /// A new span of the same trace.
    #[must_use]
    pub fn child(&self, fill: impl FnMut(&mut [u8])) -> TraceContext {
        TraceContext { span_id: random_span_id(fill), ..*self }
    }

    /// The same position, recorded or not.
    #[must_use]
    pub fn with_sampled(self, sampled: bool) -> TraceContext {
        TraceContext { sampled, ..self }
    }

    /// The trace's id, never zero.
    pub fn trace_id(&self) -> u128 {
        self.trace_id.get()
    }

    /// The span's id, never zero.
    pub fn span_id(&self) -> u64 {
        self.span_id.get()
    }

    /// Whether the caller records this trace.
    pub fn sampled(&self) -> bool {
        self.sampled
    }
}

fn random_span_id(mut fill: impl FnMut(&mut [u8])) -> NonZeroU64 {
    let mut span_id = [0; 8];
    fill(&mut span_id);
    NonZeroU64::new(u64::from_be_bytes(span_id)).unwrap_or(NonZeroU64::MIN)
}

/// The header's value, version 00.
impl fmt::Display for TraceContext {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Every request that is not traced yet gets one: formatting three numbers would cost ten times this.
        let mut text = *b"00-00000000000000000000000000000000-0000000000000000-00";
        put_hex(&mut text[3..35], &self.trace_id.get().to_be_bytes());
        put_hex(&mut text[36..52], &self.span_id.get().to_be_bytes());
        text[54] = b'0' + u8::from(self.sampled);
        f.write_str(str::from_utf8(&text).map_err(|_| fmt::Error)?)
    }
}

fn put_hex(text: &mut [u8], bytes: &[u8]) {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    for (pair, byte) in text.chunks_exact_mut(2).zip(bytes) {
        pair[0] = DIGITS[usize::from(byte >> 4)];
        pair[1] = DIGITS[usize::from(byte & 15)];
    }
}

impl FromStr for TraceContext {
    type Err = ParseError;

    /// Parses a header's value. A later version may carry more fields after the flags; they are ignored, as
    /// the recommendation asks (section 4.3, "Versioning of traceparent").
    fn from_str(text: &str) -> Result<TraceContext, ParseError> {
        let mut parts = text.split('-');
        let mut next = |digits| parts.next().and_then(|part| hex(part, digits)).ok_or(ParseError::Shape);
        let (version, trace_id, span_id, flags) = (next(2)?, next(32)?, next(16)?, next(2)?);
        match version {
            0xff => return Err(ParseError::Version),
            0 if parts.next().is_some() => return Err(ParseError::Shape),
            _ => {}
        }
        let span_id = u64::try_from(span_id).map_err(|_| ParseError::Shape)?;
        TraceContext::new(trace_id, span_id, flags & 1 == 1).ok_or(ParseError::Zero)
    }
}

fn hex(text: &str, digits: usize) -> Option<u128> {
    let lower_hex = |b: u8| b.is_ascii_digit() || (b'a'..=b'f').contains(&b);
    (text.len() == digits && text.bytes().all(lower_hex)).then(|| u128::from_str_radix(text, 16).ok())?
}

#[cfg(test)]
mod tests {
    use super::*;

    const EXAMPLE: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";

    #[test]
    fn the_recommendation_s_example_goes_through_unchanged() {
        let context: TraceContext = EXAMPLE.parse().unwrap();
        assert_eq!(context.trace_id(), 0x4bf9_2f35_77b3_4da6_a3ce_929d_0e0e_4736);
        assert_eq!(context.span_id(), 0x00f0_67aa_0ba9_02b7);
        assert!(context.sampled());
        assert_eq!(context.to_string(), EXAMPLE);
    }

    #[test]
    fn what_is_not_a_traceparent_is_refused() {
        for (text, error) in [
            ("", ParseError::Shape),
            ("00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7", ParseError::Shape),
            ("00-4BF92F3577B34DA6A3CE929D0E0E4736-00f067aa0ba902b7-01", ParseError::Shape),
            ("00-+bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01", ParseError::Shape),
            ("00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01-x", ParseError::Shape),
            ("ff-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01", ParseError::Version),
            ("00-00000000000000000000000000000000-00f067aa0ba902b7-01", ParseError::Zero),
            ("00-4bf92f3577b34da6a3ce929d0e0e4736-0000000000000000-01", ParseError::Zero),
        ] {
            assert_eq!(text.parse::<TraceContext>(), Err(error), "{text}");
        }
    }

    #[test]
    fn a_later_version_is_read_as_far_as_it_is_known() {
        let context: TraceContext =
            "cc-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-03-more".parse().unwrap();
        assert!(context.sampled());
        assert_eq!(context.to_string(), EXAMPLE);
    }

    #[test]
    fn a_broken_random_source_yields_valid_ids_all_the_same() {
        let context = TraceContext::generate(|bytes| bytes.fill(0), false);
        assert_eq!(context.to_string().parse(), Ok(context));
        let child = context.child(|bytes| bytes.fill(7));
        assert_eq!(child.trace_id(), context.trace_id());
        assert_ne!(child.span_id(), context.span_id());
    }
}

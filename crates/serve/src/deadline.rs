//! How long a gRPC call may take: what its caller says in `grpc-timeout`, as "gRPC over HTTP/2" defines it.
//!
//! What travels is a span of time, not a moment, so that nobody's clock is compared with another one's: whoever is called counts from the
//! moment when the call arrives, and tells whoever is called next what is left.

use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use axum::body::{Body, Bytes, HttpBody};
use http::header::{HeaderMap, HeaderName, HeaderValue};
use hyper::body::{Frame, SizeHint};
use tokio::time::{Instant, Sleep, sleep_until};

const GRPC_TIMEOUT: HeaderName = HeaderName::from_static("grpc-timeout");
const GRPC_STATUS: HeaderName = HeaderName::from_static("grpc-status");
const GRPC_MESSAGE: HeaderName = HeaderName::from_static("grpc-message");

/// The status DEADLINE_EXCEEDED.
const DEADLINE_EXCEEDED: HeaderValue = HeaderValue::from_static("4");

/// What a caller is told whose time is over.
pub const EXCEEDED: &str = "the deadline of the call has passed";

/// The most digits that a time may have.
const MAX_DIGITS: usize = 8;
/// The largest number of so many digits.
const MAX_COUNT: u128 = 99_999_999;

/// The units of time, from the smallest to the largest.
const UNITS: [(u8, Duration); 6] = [
    (b'n', Duration::from_nanos(1)),
    (b'u', Duration::from_micros(1)),
    (b'm', Duration::from_millis(1)),
    (b'S', Duration::from_secs(1)),
    (b'M', Duration::from_secs(60)),
    (b'H', Duration::from_secs(3_600)),
];

/// A `grpc-timeout` that is none.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("grpc-timeout: {0:?} is no time; expected 1 to {MAX_DIGITS} digits and one of H, M, S, m, u, n")]
pub struct InvalidTimeout(pub String);

/// When the time of the call with these headers is over; none if its caller has all the time in the world.
///
/// # Errors
/// [`InvalidTimeout`] for a time that is none.
pub fn of(headers: &HeaderMap) -> Result<Option<Instant>, InvalidTimeout> {
    let Some(value) = headers.get(&GRPC_TIMEOUT) else { return Ok(None) };
    let invalid = || InvalidTimeout(String::from_utf8_lossy(value.as_bytes()).into_owned());
    let left = parse(value.as_bytes()).ok_or_else(invalid)?;
    Ok(Instant::now().checked_add(left))
}

/// Tells whoever is called next what is left until the deadline.
pub fn put(headers: &mut HeaderMap, deadline: Instant) {
    let left = write(deadline.saturating_duration_since(Instant::now()));
    if let Ok(left) = HeaderValue::try_from(left) {
        headers.insert(GRPC_TIMEOUT, left);
    }
}

/// The answer to a call, which ends with DEADLINE_EXCEEDED if it has not ended before the deadline.
pub fn bounded(answer: Body, deadline: Instant) -> Body {
    if answer.is_end_stream() {
        return answer;
    }
    Body::new(Bounded { answer, late: Box::pin(sleep_until(deadline)) })
}

/// No sign, no space, no fraction. Zero is a time: it is over.
fn parse(text: &[u8]) -> Option<Duration> {
    let (unit, digits) = text.split_last()?;
    let (_, unit) = UNITS.iter().find(|(name, _)| name == unit)?;
    if digits.is_empty() || digits.len() > MAX_DIGITS {
        return None;
    }
    let count = digits.iter().try_fold(0, |count: u32, digit| {
        digit.is_ascii_digit().then(|| count * 10 + u32::from(digit - b'0'))
    })?;
    Some(*unit * count)
}

/// In the smallest unit that has room for it; what does not fit is left out, so that nobody is promised more than there is.
fn write(left: Duration) -> String {
    let mut in_units =
        UNITS.iter().map(|(name, unit)| (left.as_nanos() / unit.as_nanos(), char::from(*name)));
    let (count, unit) = in_units.find(|(count, _)| *count <= MAX_COUNT).unwrap_or((MAX_COUNT, 'H'));
    format!("{count}{unit}")
}

struct Bounded {
    answer: Body,
    late: Pin<Box<Sleep>>,
}

impl HttpBody for Bounded {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        if self.late.as_mut().poll(cx).is_pending() {
            return Pin::new(&mut self.answer).poll_frame(cx);
        }
        if self.answer.is_end_stream() {
            return Poll::Ready(None);
        }
        // Whoever makes it is told by this that nobody waits for it any more.
        self.answer = Body::empty();
        let status = [(GRPC_STATUS, DEADLINE_EXCEEDED), (GRPC_MESSAGE, HeaderValue::from_static(EXCEEDED))];
        Poll::Ready(Some(Ok(Frame::trailers(HeaderMap::from_iter(status)))))
    }

    fn is_end_stream(&self) -> bool {
        self.answer.is_end_stream()
    }

    /// It may be cut off, so nothing is certain but what it does not exceed.
    fn size_hint(&self) -> SizeHint {
        let mut hint = SizeHint::new();
        if let Some(most) = self.answer.size_hint().upper() {
            hint.set_upper(most);
        }
        hint
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_time_is_up_to_eight_digits_and_a_unit() {
        for (text, time) in [
            ("1H", Duration::from_secs(3_600)),
            ("2M", Duration::from_secs(120)),
            ("30S", Duration::from_secs(30)),
            ("250m", Duration::from_millis(250)),
            ("7u", Duration::from_micros(7)),
            ("99999999n", Duration::from_nanos(99_999_999)),
            ("00000001S", Duration::from_secs(1)),
            ("0n", Duration::ZERO),
            ("99999999H", Duration::from_secs(359_999_996_400)),
        ] {
            assert_eq!(parse(text.as_bytes()), Some(time), "{text}");
        }
    }

    #[test]
    fn what_is_no_time_is_refused_by_its_name() {
        for text in [
            "",
            "S",
            "5",
            "5s",
            "5h",
            "5x",
            "5SS",
            "5 S",
            " 5S",
            "5S ",
            "+5S",
            "-5S",
            "5.5S",
            "5e3m",
            "0x5S",
            "1_0S",
            "123456789n",
            "000000001S",
            "1S1S",
            "1S,1S",
            "٥S",
            "5\u{b5}",
        ] {
            let value = HeaderValue::from_bytes(text.as_bytes()).expect("a header");
            let headers = HeaderMap::from_iter([(GRPC_TIMEOUT, value)]);
            assert_eq!(of(&headers), Err(InvalidTimeout(text.to_owned())));
        }
        let refused = InvalidTimeout("5x".to_owned()).to_string();
        assert_eq!(
            refused,
            r#"grpc-timeout: "5x" is no time; expected 1 to 8 digits and one of H, M, S, m, u, n"#
        );
    }

    #[test]
    fn what_is_left_is_written_so_that_it_is_read_as_that_or_a_little_less() {
        for (left, text) in [
            (Duration::ZERO, "0n"),
            (Duration::from_nanos(99_999_999), "99999999n"),
            (Duration::from_nanos(100_000_999), "100000u"),
            (Duration::from_secs(2), "2000000u"),
            (Duration::from_secs(100_000), "100000S"),
            (Duration::MAX, "99999999H"),
        ] {
            assert_eq!(write(left), text);
        }
        let mut left = Duration::from_nanos(1);
        while left < Duration::from_secs(1 << 38) {
            let read = parse(write(left).as_bytes()).expect("a time");
            assert!(read <= left && left - read <= left / 100_000, "{left:?} as {read:?}");
            left = left * 3 + Duration::from_nanos(1);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_left_grows_less_on_the_way() {
        let mut headers = HeaderMap::from_iter([(GRPC_TIMEOUT, HeaderValue::from_static("5S"))]);
        let deadline = of(&headers).expect("a time").expect("there is one");
        tokio::time::advance(Duration::from_secs(2)).await;
        put(&mut headers, deadline);
        assert_eq!(headers[GRPC_TIMEOUT], "3000000u");
        tokio::time::advance(Duration::from_secs(4)).await;
        put(&mut headers, deadline);
        assert_eq!(headers[GRPC_TIMEOUT], "0n");
        assert_eq!(of(&HeaderMap::new()), Ok(None));
    }
}

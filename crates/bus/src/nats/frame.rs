//! What one message of a stream carries: a frame of envelopes, or one dead letter.
//!
//! ```text
//! message  = version (1 byte) checksum (CRC-32 of all that follows, 4 bytes) content
//! frame    = delay count envelope*count
//! envelope = id (16 bytes) earlier length body
//! letter   = deliveries subject reason id body           subject and reason = length text
//! ```
//!
//! Fixed numbers are little-endian; delay (milliseconds), count, earlier, deliveries and lengths are LEB128. A message is exactly as
//! long as its content: one byte less, one more, or one bit different is refused.

use std::time::Duration;

use bytes::{BufMut, Bytes, BytesMut};

use crate::{Delivery, Envelope, EnvelopeId};

/// The version that is written, and the only one that is read.
const VERSION: u8 = 1;
/// Bytes in front of the content.
const HEAD: usize = 5;
/// Bytes of an id.
const ID: usize = 16;
/// Bytes of the longest LEB128 number.
const NUMBER: usize = 10;
/// Bytes of a frame without its envelopes, at most.
const FRAME: usize = HEAD + 2 * NUMBER;
/// Bytes of an envelope without its body, at least.
const ENVELOPE_MIN: usize = ID + 2;

/// Bytes of a dead letter's reason; what goes beyond is cut off.
const REASON: usize = 1_024;
/// Bytes of a subject's name, which NATS itself bounds.
const SUBJECT: usize = 256;

/// Bytes of a message that carries one envelope with such a body, alone in a frame or as a dead letter, at most.
pub(super) const fn bytes_for_one(body: usize) -> usize {
    FRAME + ID + 2 * NUMBER + SUBJECT + REASON + body
}

/// A frame as it arrived.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Frame {
    /// How long whoever takes the frame first has to put it off.
    pub(super) delay: Duration,
    /// Its envelopes, each with the number of deliveries that it had before this frame was sent.
    pub(super) parcels: Vec<Delivery>,
}

/// Why a message was refused.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub(super) enum DecodeError {
    /// It may be understood by a newer program.
    #[error("it has the format {0}, and this program knows {VERSION}")]
    Version(u8),
    /// It is not what was sent.
    #[error("its checksum is wrong")]
    Checksum,
    /// It was never right.
    #[error("it does not have the form of a message")]
    Form,
}

/// Cuts envelopes into messages of at most `max_bytes`, and of at most `max_envelopes`. Each envelope goes with the number of
/// deliveries that it had. An envelope that does not fit alone gets a message of its own, which the servers refuse.
pub(super) fn encode<'a>(
    delay: Duration,
    parcels: impl Iterator<Item = (&'a Envelope, u32)>,
    max_envelopes: usize,
    max_bytes: usize,
) -> Vec<Message> {
    let mut messages = Vec::with_capacity(1);
    let mut parcels = parcels.peekable();
    let mut batch: Vec<(&Envelope, u32)> = Vec::with_capacity(parcels.size_hint().0);
    let mut bytes = FRAME;
    while let Some((envelope, earlier)) = parcels.next() {
        bytes += ID + 2 * NUMBER + envelope.body.len();
        batch.push((envelope, earlier));
        let fits = parcels.peek().is_some_and(|(next, _)| {
            bytes + ID + 2 * NUMBER + next.body.len() <= max_bytes && batch.len() < max_envelopes
        });
        if !fits {
            messages.push(Message { envelopes: batch.len(), payload: frame(delay, &batch, bytes) });
            batch.clear();
            bytes = FRAME;
        }
    }
    messages
}

/// A frame, ready to be sent.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Message {
    /// Envelopes in it.
    pub(super) envelopes: usize,
    pub(super) payload: Bytes,
}

fn frame(delay: Duration, parcels: &[(&Envelope, u32)], bytes: usize) -> Bytes {
    let mut out = Writer::new(bytes);
    // Rounded up: never too early.
    out.number(u64::try_from(delay.as_nanos().div_ceil(1_000_000)).unwrap_or(u64::MAX));
    out.number(parcels.len() as u64);
    for (envelope, earlier) in parcels {
        out.id(envelope.id);
        out.number(u64::from(*earlier));
        out.number(envelope.body.len() as u64);
        out.0.put_slice(&envelope.body);
    }
    out.done()
}

impl Frame {
    /// Reads a frame. The bodies share the message's memory.
    pub(super) fn decode(message: &Bytes) -> Result<Frame, DecodeError> {
        let mut rest = Reader::open(message)?;
        let delay = Duration::from_millis(rest.number()?);
        let count = rest.number()?;
        if count == 0 || count > (rest.0.len() / ENVELOPE_MIN) as u64 {
            return Err(DecodeError::Form);
        }
        let mut parcels = Vec::with_capacity(count as usize);
        for _ in 0..count {
            let id = rest.id()?;
            let count = u32::try_from(rest.number()?).map_err(|_| DecodeError::Form)?;
            let body = rest.bytes()?;
            parcels.push(Delivery { envelope: Envelope { id, body }, count });
        }
        rest.end(Frame { delay, parcels })
    }
}

/// A dead letter in its stream.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Letter {
    /// The subject it was taken from; not every program knows the same ones.
    pub(super) subject: String,
    pub(super) reason: String,
    /// The envelope, and how often it had been delivered.
    pub(super) delivery: Delivery,
}

impl Letter {
    pub(super) fn encode(&self) -> Bytes {
        let Letter { subject, reason, delivery: Delivery { envelope, count } } = self;
        let reason = &reason[..reason.floor_char_boundary(REASON)];
        let bytes = HEAD + 3 * NUMBER + subject.len() + reason.len() + ID + envelope.body.len();
        let mut out = Writer::new(bytes);
        out.number(u64::from(*count));
        for text in [subject.as_str(), reason] {
            out.number(text.len() as u64);
            out.0.put_slice(text.as_bytes());
        }
        out.id(envelope.id);
        out.0.put_slice(&envelope.body);
        out.done()
    }

    pub(super) fn decode(message: &Bytes) -> Result<Letter, DecodeError> {
        let mut rest = Reader::open(message)?;
        let count = u32::try_from(rest.number()?).map_err(|_| DecodeError::Form)?;
        let (subject, reason) = (rest.text()?, rest.text()?);
        let id = rest.id()?;
        let body = std::mem::take(&mut rest.0);
        rest.end(Letter { subject, reason, delivery: Delivery { envelope: Envelope { id, body }, count } })
    }
}

struct Writer(BytesMut);

impl Writer {
    fn new(bytes: usize) -> Writer {
        let mut out = BytesMut::with_capacity(bytes);
        out.put_u8(VERSION);
        out.put_u32_le(0);
        Writer(out)
    }

    fn number(&mut self, mut value: u64) {
        while value >= 0x80 {
            self.0.put_u8(value as u8 | 0x80);
            value >>= 7;
        }
        self.0.put_u8(value as u8);
    }

    fn id(&mut self, id: EnvelopeId) {
        self.0.put_u128_le(id.0);
    }

    fn done(mut self) -> Bytes {
        let checksum = crc32fast::hash(&self.0[HEAD..]);
        self.0[1..HEAD].copy_from_slice(&checksum.to_le_bytes());
        self.0.freeze()
    }
}

struct Reader(Bytes);

impl Reader {
    fn open(message: &Bytes) -> Result<Reader, DecodeError> {
        match message.first() {
            None => return Err(DecodeError::Form),
            Some(&VERSION) => {}
            Some(&other) => return Err(DecodeError::Version(other)),
        }
        let head = message.get(1..HEAD).ok_or(DecodeError::Form)?;
        let content = message.slice(HEAD..);
        if head != crc32fast::hash(&content).to_le_bytes() {
            return Err(DecodeError::Checksum);
        }
        Ok(Reader(content))
    }

    fn take(&mut self, bytes: usize) -> Result<Bytes, DecodeError> {
        if bytes > self.0.len() {
            return Err(DecodeError::Form);
        }
        Ok(self.0.split_to(bytes))
    }

    fn number(&mut self) -> Result<u64, DecodeError> {
        let mut value = 0;
        for (index, byte) in self.0.iter().enumerate().take(NUMBER) {
            let bits = u64::from(byte & 0x7f);
            let shift = 7 * index as u32;
            if shift == 63 && bits > 1 {
                return Err(DecodeError::Form);
            }
            value |= bits << shift;
            if byte & 0x80 == 0 {
                let _ = self.0.split_to(index + 1);
                return Ok(value);
            }
        }
        Err(DecodeError::Form)
    }

    fn id(&mut self) -> Result<EnvelopeId, DecodeError> {
        let bytes = self.take(ID)?;
        bytes[..].try_into().map(|id| EnvelopeId(u128::from_le_bytes(id))).map_err(|_| DecodeError::Form)
    }

    fn bytes(&mut self) -> Result<Bytes, DecodeError> {
        let length = usize::try_from(self.number()?).map_err(|_| DecodeError::Form)?;
        self.take(length)
    }

    fn text(&mut self) -> Result<String, DecodeError> {
        String::from_utf8(self.bytes()?.into()).map_err(|_| DecodeError::Form)
    }

    fn end<T>(&self, value: T) -> Result<T, DecodeError> {
        if self.0.is_empty() { Ok(value) } else { Err(DecodeError::Form) }
    }
}

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;

    const NO_LIMIT: usize = usize::MAX / 2;

    fn deliveries() -> impl Strategy<Value = Vec<Delivery>> {
        let one = (any::<u128>(), any::<u32>(), vec(any::<u8>(), 0..300));
        let one = one.prop_map(|(id, count, body)| Delivery {
            envelope: Envelope { id: EnvelopeId(id), body: body.into() },
            count,
        });
        vec(one, 1..40)
    }

    fn parcels(deliveries: &[Delivery]) -> impl Iterator<Item = (&Envelope, u32)> {
        deliveries.iter().map(|delivery| (&delivery.envelope, delivery.count))
    }

    fn one_message(delay: Duration, deliveries: &[Delivery]) -> Bytes {
        let mut messages = encode(delay, parcels(deliveries), NO_LIMIT, NO_LIMIT);
        assert_eq!(messages.len(), 1);
        messages.remove(0).payload
    }

    proptest! {
        #[test]
        fn a_frame_arrives_as_it_was_sent(delay in any::<u32>(), parcels in deliveries()) {
            let delay = Duration::from_millis(u64::from(delay));
            let message = one_message(delay, &parcels);
            prop_assert_eq!(Frame::decode(&message), Ok(Frame { delay, parcels }));
        }

        #[test]
        fn no_part_of_a_frame_and_nothing_longer_is_one(
            parcels in deliveries(), length in any::<prop::sample::Index>(), more in vec(any::<u8>(), 1..20),
        ) {
            let message = one_message(Duration::ZERO, &parcels);
            let length = length.index(message.len());
            prop_assert!(Frame::decode(&message.slice(..length)).is_err(), "its first {length} bytes");
            let longer = [&message[..], &more].concat();
            prop_assert!(Frame::decode(&longer.into()).is_err());
        }

        #[test]
        fn a_frame_with_a_bit_changed_is_none(parcels in deliveries(), place in any::<prop::sample::Index>(), bit in 0..8_u8) {
            let mut message = one_message(Duration::ZERO, &parcels).to_vec();
            let place = place.index(message.len());
            message[place] ^= 1_u8 << bit;
            prop_assert!(Frame::decode(&message.into()).is_err());
        }

        #[test]
        fn noise_is_refused_and_nothing_worse(noise in vec(any::<u8>(), 0..200)) {
            // With a checksum that fits, so that the form is looked at.
            let mut message = vec![VERSION, 0, 0, 0, 0];
            message.extend_from_slice(&noise);
            let checksum = crc32fast::hash(&noise).to_le_bytes();
            message[1..HEAD].copy_from_slice(&checksum);
            if let Ok(frame) = Frame::decode(&message.clone().into()) {
                prop_assert!(!frame.parcels.is_empty());
            }
            let _ = Letter::decode(&message.into());
        }

        #[test]
        fn a_cut_keeps_everything_in_order_and_within_the_bounds(
            parcels in deliveries(), max_envelopes in 1..20_usize, max_bytes in 600..3_000_usize,
        ) {
            let messages = encode(Duration::ZERO, self::parcels(&parcels), max_envelopes, max_bytes);
            let mut all = Vec::new();
            for message in messages {
                prop_assert!(message.payload.len() <= max_bytes);
                let frame = Frame::decode(&message.payload).expect("what was encoded");
                prop_assert_eq!(frame.parcels.len(), message.envelopes);
                prop_assert!(frame.parcels.len() <= max_envelopes);
                all.extend(frame.parcels);
            }
            prop_assert_eq!(all, parcels);
        }

        #[test]
        fn a_letter_arrives_as_it_was_sent(subject in ".{0,40}", reason in ".{0,200}", parcels in deliveries()) {
            let letter = Letter { subject, reason, delivery: parcels[0].clone() };
            let message = letter.encode();
            prop_assert_eq!(Letter::decode(&message), Ok(letter));
            for length in 0..message.len() {
                prop_assert!(Letter::decode(&message.slice(..length)).is_err());
            }
        }
    }

    #[test]
    fn an_envelope_fits_where_it_is_said_to() {
        let envelope = Envelope { id: EnvelopeId::of(u64::MAX, u64::MAX), body: vec![1; 500].into() };
        let delay = crate::RETRY_DELAY_MAX;
        let message = encode(delay, [(&envelope, u32::MAX)].into_iter(), NO_LIMIT, 0).remove(0);
        assert!(message.payload.len() <= bytes_for_one(500));
    }

    #[test]
    fn a_long_reason_is_cut_between_two_characters() {
        let reason = "\u{e9}".repeat(REASON);
        let envelope = Envelope { id: EnvelopeId::of(1, 1), body: vec![1; 500].into() };
        let letter = Letter {
            subject: "s".repeat(SUBJECT),
            reason: format!("a{reason}"),
            delivery: Delivery { envelope, count: u32::MAX },
        };
        let message = letter.encode();
        assert!(message.len() <= bytes_for_one(500));
        let kept = Letter::decode(&message).expect("what was encoded").reason;
        assert_eq!(kept.len(), REASON - 1);
        assert!(letter.reason.starts_with(&kept));
    }

    #[test]
    fn a_version_to_come_is_told_from_damage() {
        assert_eq!(Frame::decode(&Bytes::from_static(&[2, 9, 9])), Err(DecodeError::Version(2)));
        assert_eq!(Frame::decode(&Bytes::new()), Err(DecodeError::Form));
    }

    #[test]
    fn a_delay_is_rounded_up() {
        let envelope = Envelope { id: EnvelopeId::of(1, 1), body: Bytes::new() };
        let delays = |delay| {
            let message = encode(delay, [(&envelope, 1)].into_iter(), NO_LIMIT, NO_LIMIT).remove(0);
            Frame::decode(&message.payload).expect("what was encoded").delay
        };
        assert_eq!(delays(Duration::from_micros(1)), Duration::from_millis(1));
        assert_eq!(delays(Duration::from_micros(2_500)), Duration::from_millis(3));
        assert_eq!(delays(Duration::ZERO), Duration::ZERO);
    }
}

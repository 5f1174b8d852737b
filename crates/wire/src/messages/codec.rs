//! The encoding of the messages, by hand on the primitives of `prost`.
//!
//! A purchase is six messages. Structs with derived codecs would be filled, measured and copied for each of them, and cost more
//! than all else that an orchestrator does. Here a message is written from the engine's own types into one buffer, and read into
//! them; what is only handed on is a slice of the buffer that it came in. `tests/derived.rs` holds this against
//! structs with derived codecs, and `proto/saga.proto` against both.

use std::ops::Range;

use bytes::{Buf, BufMut, Bytes, BytesMut};
use prost::encoding::{DecodeContext, WireType, decode_varint, encoded_len_varint, skip_field};
use saga::{Entry, Mode, Outcome, Path, Phase, Reason, StepIndex, Token};

use super::{
    About, Carried, Command, DecodeError, FORMAT, MAX_REASON_BYTES, Progress, Purge, Recorded, Reply, Start,
    ToOrchestrator, ToParticipant,
};

/// The fields of a message. All of them are one Protocol Buffers message; its kind says which fields it has.
mod field {
    pub(super) const FORMAT: u32 = 1;
    pub(super) const KIND: u32 = 2;
    pub(super) const SAGA: u32 = 3;
    pub(super) const MODE: u32 = 4;
    pub(super) const PATH: u32 = 5;
    pub(super) const ABOUT: u32 = 6;
    pub(super) const STEP: u32 = 7;
    pub(super) const PHASE: u32 = 8;
    pub(super) const RECORDED: u32 = 9;
    pub(super) const BELOW: u32 = 10;
}

/// The fields of [`About`].
mod about {
    pub(super) const DEFINITION: u32 = 1;
    pub(super) const VERSION: u32 = 2;
    pub(super) const STARTED_AT: u32 = 3;
    pub(super) const INPUT: u32 = 4;
    pub(super) const TRACE: u32 = 5;
}

/// The fields of an entry of a path.
mod entry {
    pub(super) const STEP: u32 = 1;
    pub(super) const OUTCOME: u32 = 2;
    pub(super) const TEXT: u32 = 3;
    pub(super) const AT: u32 = 4;
}

/// The fields of a recorded reply.
mod recorded {
    pub(super) const OUTCOME: u32 = 1;
    pub(super) const TEXT: u32 = 2;
    pub(super) const AT: u32 = 3;
}

/// The entries of a path that is kept by itself.
const PATH_ENTRIES: u32 = 1;

/// What the numbers of a message take, beside those of its path, in bytes, at most: a key and a varint for each.
const NUMBERS_BYTES: usize = 64;
/// What an entry takes beside its text, in bytes, at most.
const ENTRY_BYTES: usize = 40;
/// What a message of an ordinary saga takes, in bytes.
const MESSAGE_BYTES: usize = 320;
/// What messages share a buffer of at most, in bytes, unless one of them is larger: as long as one of them is kept, the whole
/// buffer is.
const BUFFER_BYTES: usize = 16 * 1024;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Start = 1,
    Command = 2,
    Reply = 3,
    Progress = 4,
    Purge = 5,
}

/// Writes messages that leave together: they share buffers, because a buffer for each would cost more than what is in it.
#[derive(Debug)]
pub struct Pen(BytesMut);

impl Pen {
    /// For about so many messages.
    pub fn for_messages(count: usize) -> Pen {
        Pen(BytesMut::with_capacity(count.saturating_mul(MESSAGE_BYTES).min(BUFFER_BYTES)))
    }

    /// The encoded [`Start`].
    pub fn start(&mut self, token: &Token, about: &About) -> Bytes {
        let out = self.begin(Kind::Start, token, about, 0);
        put_bytes(out, field::ABOUT, &about.encoded);
        self.end()
    }

    /// The encoded [`Command`].
    pub fn command(&mut self, token: &Token, about: &About, step: StepIndex, phase: Phase) -> Bytes {
        let out = self.begin(Kind::Command, token, about, 0);
        put_question(out, step, phase);
        put_bytes(out, field::ABOUT, &about.encoded);
        self.end()
    }

    /// The encoded [`Reply`].
    pub fn reply(
        &mut self,
        token: &Token,
        about: &About,
        step: StepIndex,
        phase: Phase,
        recorded: &[u8],
    ) -> Bytes {
        let out = self.begin(Kind::Reply, token, about, recorded.len());
        put_question(out, step, phase);
        put_bytes(out, field::RECORDED, recorded);
        put_bytes(out, field::ABOUT, &about.encoded);
        self.end()
    }

    /// The encoded [`Progress`].
    pub fn progress(&mut self, token: &Token, about: &About) -> Bytes {
        let out = self.begin(Kind::Progress, token, about, 0);
        put_bytes(out, field::ABOUT, &about.encoded);
        self.end()
    }

    fn begin(&mut self, kind: Kind, token: &Token, about: &About, more_bytes: usize) -> &mut BytesMut {
        let entries = token.path.entries();
        let path_bytes: usize = entries.iter().map(|entry| ENTRY_BYTES + text(&entry.outcome).len()).sum();
        let bytes = NUMBERS_BYTES + path_bytes + about.encoded.len() + more_bytes;
        let Pen(out) = self;
        if out.capacity() < bytes {
            *out = BytesMut::with_capacity(bytes.max(BUFFER_BYTES));
        }
        let mut numbers = Numbers::new();
        numbers.put(field::FORMAT, FORMAT.into());
        numbers.put(field::KIND, kind as u64);
        numbers.put(field::SAGA, token.saga);
        numbers.put(field::MODE, mode_number(token.mode));
        out.put_slice(numbers.bytes());
        entries.iter().for_each(|entry| put_entry(out, field::PATH, entry));
        out
    }

    fn end(&mut self) -> Bytes {
        self.0.split().freeze()
    }
}

/// The encoded [`Purge`].
pub fn purge(below: u64) -> Bytes {
    let mut numbers = Numbers::new();
    numbers.put(field::FORMAT, FORMAT.into());
    numbers.put(field::KIND, Kind::Purge as u64);
    numbers.put(field::BELOW, below);
    Bytes::copy_from_slice(numbers.bytes())
}

fn put_question(out: &mut impl BufMut, step: StepIndex, phase: Phase) {
    let mut numbers = Numbers::new();
    numbers.put(field::STEP, step.0.into());
    numbers.put(field::PHASE, phase_number(phase));
    out.put_slice(numbers.bytes());
}

fn put_entry(out: &mut impl BufMut, tag: u32, entry: &Entry) {
    let (step, outcome, text) =
        (u64::from(entry.step.0), outcome_number(&entry.outcome), text(&entry.outcome));
    let bytes = number_len(step) + number_len(outcome) + bytes_len(text) + number_len(entry.at);
    let mut numbers = Numbers::new();
    numbers.key(tag, WireType::LengthDelimited);
    numbers.varint(bytes as u64);
    numbers.put(entry::STEP, step);
    numbers.put(entry::OUTCOME, outcome);
    if !text.is_empty() {
        out.put_slice(numbers.bytes());
        put_bytes(out, entry::TEXT, text);
        numbers = Numbers::new();
    }
    numbers.put(entry::AT, entry.at);
    out.put_slice(numbers.bytes());
}

/// proto3 leaves bytes out that are empty.
fn put_bytes(out: &mut impl BufMut, tag: u32, bytes: &[u8]) {
    if !bytes.is_empty() {
        let mut numbers = Numbers::new();
        numbers.key(tag, WireType::LengthDelimited);
        numbers.varint(bytes.len() as u64);
        out.put_slice(numbers.bytes());
        out.put_slice(bytes);
    }
}

/// Numbers that are written one after the other: gathered here, so that the buffer grows, and looks whether it has to, once.
struct Numbers {
    bytes: [u8; NUMBERS_BYTES],
    length: usize,
}

impl Numbers {
    fn new() -> Numbers {
        Numbers { bytes: [0; NUMBERS_BYTES], length: 0 }
    }

    fn bytes(&self) -> &[u8] {
        &self.bytes[..self.length]
    }

    /// proto3 leaves a number out that is 0.
    fn put(&mut self, tag: u32, number: u64) {
        if number != 0 {
            self.key(tag, WireType::Varint);
            self.varint(number);
        }
    }

    /// Of a field whose tag is below 16: its key is one byte.
    fn key(&mut self, tag: u32, wire_type: WireType) {
        debug_assert!(tag < 16);
        self.push((tag << 3) as u8 | wire_type as u8);
    }

    fn varint(&mut self, mut number: u64) {
        while number >= 0x80 {
            self.push(number as u8 | 0x80);
            number >>= 7;
        }
        self.push(number as u8);
    }

    fn push(&mut self, byte: u8) {
        self.bytes[self.length] = byte;
        self.length += 1;
    }
}

/// Of a field whose tag is below 16.
fn number_len(number: u64) -> usize {
    if number == 0 { 0 } else { 1 + encoded_len_varint(number) }
}

fn bytes_len(bytes: &[u8]) -> usize {
    if bytes.is_empty() { 0 } else { 1 + encoded_len_varint(bytes.len() as u64) + bytes.len() }
}

impl About {
    /// What a new saga is about.
    ///
    /// # Panics
    /// When the definition's name is not ASCII.
    pub fn new(definition: &str, version: u32, started_at: u64, input: &[u8], trace: &[u8]) -> About {
        assert!(definition.is_ascii(), "a definition is named {definition:?}");
        let texts = [definition.as_bytes(), input, trace];
        let (version_number, texts_len) = (version.into(), texts.into_iter().map(bytes_len).sum::<usize>());
        let mut out = Vec::with_capacity(number_len(version_number) + number_len(started_at) + texts_len);
        let put = |tag, text: &[u8], out: &mut Vec<u8>| {
            put_bytes(out, tag, text);
            if text.is_empty() { 0..0 } else { out.len() - text.len()..out.len() }
        };
        let definition = put(about::DEFINITION, definition.as_bytes(), &mut out);
        let mut numbers = Numbers::new();
        numbers.put(about::VERSION, version_number);
        numbers.put(about::STARTED_AT, started_at);
        out.put_slice(numbers.bytes());
        let input = put(about::INPUT, input, &mut out);
        let trace = put(about::TRACE, trace, &mut out);
        About { encoded: out.into(), definition, version, started_at, input, trace }
    }

    fn decode(encoded: Bytes) -> Result<About, prost::DecodeError> {
        let mut about = About {
            definition: 0..0,
            version: 0,
            started_at: 0,
            input: 0..0,
            trace: 0..0,
            encoded: Bytes::new(),
        };
        let mut reader = Reader::new(&encoded);
        while let Some(field) = reader.next()? {
            match field {
                (about::DEFINITION, Found::Bytes(at)) => about.definition = at,
                (about::VERSION, Found::Number(number)) => {
                    about.version = u32::try_from(number).map_err(|_| wrong("a version above 32 bits"))?;
                }
                (about::STARTED_AT, Found::Number(number)) => about.started_at = number,
                (about::INPUT, Found::Bytes(at)) => about.input = at,
                (about::TRACE, Found::Bytes(at)) => about.trace = at,
                (tag, _) => only_unknown(tag, about::TRACE)?,
            }
        }
        if !encoded[about.definition.clone()].is_ascii() {
            return Err(wrong("a definition that is not ASCII"));
        }
        about.encoded = encoded;
        Ok(about)
    }
}

impl Recorded {
    /// The bytes to keep.
    pub fn encode(&self) -> Bytes {
        let (outcome, text) = (outcome_number(&self.outcome), text(&self.outcome));
        // Exactly: `Bytes` of a vector with room to spare are one more allocation.
        let mut out = Vec::with_capacity(number_len(outcome) + bytes_len(text) + number_len(self.at));
        let mut numbers = Numbers::new();
        numbers.put(recorded::OUTCOME, outcome);
        if !text.is_empty() {
            out.put_slice(numbers.bytes());
            put_bytes(&mut out, recorded::TEXT, text);
            numbers = Numbers::new();
        }
        numbers.put(recorded::AT, self.at);
        out.put_slice(numbers.bytes());
        out.into()
    }

    /// Reads kept bytes.
    ///
    /// # Errors
    /// [`DecodeError`] when they are no recorded reply.
    pub fn decode(bytes: &[u8]) -> Result<Recorded, DecodeError> {
        let what = "recorded reply";
        let (mut number, mut text, mut at) = (0, 0..0, 0);
        let mut reader = Reader::new(bytes);
        while let Some(field) = reader.next().map_err(malformed(what))? {
            match field {
                (recorded::OUTCOME, Found::Number(found)) => number = found,
                (recorded::TEXT, Found::Bytes(found)) => text = found,
                (recorded::AT, Found::Number(found)) => at = found,
                (tag, _) => only_unknown(tag, recorded::AT).map_err(malformed(what))?,
            }
        }
        Ok(Recorded { outcome: outcome(what, number, &bytes[text])?, at })
    }
}

impl ToOrchestrator {
    /// Reads published bytes.
    ///
    /// # Errors
    /// [`DecodeError`] when they are no message for an orchestrator of this format.
    pub fn decode(bytes: Bytes) -> Result<ToOrchestrator, DecodeError> {
        let what = "saga";
        let message = Message::decode(what, bytes)?;
        match message.kind {
            kind if kind == Kind::Start as u64 => {
                Ok(ToOrchestrator::Start(Start { carried: message.carried(what)? }))
            }
            kind if kind == Kind::Reply as u64 => {
                let (step, phase) = message.question(what)?;
                let recorded = message.bytes.slice(message.recorded.clone());
                Ok(ToOrchestrator::Reply(Reply { carried: message.carried(what)?, step, phase, recorded }))
            }
            other => Err(DecodeError::Unknown { what, field: "kind", value: other }),
        }
    }
}

impl ToParticipant {
    /// Reads published bytes.
    ///
    /// # Errors
    /// [`DecodeError`] when they are no message for a participant of this format.
    pub fn decode(bytes: Bytes) -> Result<ToParticipant, DecodeError> {
        let what = "command";
        let message = Message::decode(what, bytes)?;
        match message.kind {
            kind if kind == Kind::Command as u64 => {
                let (step, phase) = message.question(what)?;
                Ok(ToParticipant::Command(Command { carried: message.carried(what)?, step, phase }))
            }
            kind if kind == Kind::Purge as u64 => Ok(ToParticipant::Purge(Purge { below: message.below })),
            other => Err(DecodeError::Unknown { what, field: "kind", value: other }),
        }
    }
}

impl Progress {
    /// Reads published bytes.
    ///
    /// # Errors
    /// [`DecodeError`] when they are no progress message of this format.
    pub fn decode(bytes: Bytes) -> Result<Progress, DecodeError> {
        let what = "progress";
        let message = Message::decode(what, bytes)?;
        match message.kind {
            kind if kind == Kind::Progress as u64 => Ok(Progress { carried: message.carried(what)? }),
            other => Err(DecodeError::Unknown { what, field: "kind", value: other }),
        }
    }
}

/// A message's fields, before it is known which of them it needs.
struct Message {
    bytes: Bytes,
    kind: u64,
    saga: u64,
    mode: u64,
    path: Vec<Entry>,
    about: Option<Range<usize>>,
    step: u64,
    phase: u64,
    recorded: Range<usize>,
    below: u64,
}

impl Message {
    fn decode(what: &'static str, bytes: Bytes) -> Result<Message, DecodeError> {
        let mut message = Message {
            bytes: Bytes::new(),
            kind: 0,
            saga: 0,
            mode: 0,
            path: Vec::new(),
            about: None,
            step: 0,
            phase: 0,
            recorded: 0..0,
            below: 0,
        };
        let mut format = 0;
        let mut reader = Reader::new(&bytes);
        while let Some(field) = reader.next().map_err(malformed(what))? {
            match field {
                (field::FORMAT, Found::Number(number)) => {
                    format = number;
                    // Another format may use the other fields in another way.
                    check_format(what, format)?;
                }
                (field::KIND, Found::Number(number)) => message.kind = number,
                (field::SAGA, Found::Number(number)) => message.saga = number,
                (field::MODE, Found::Number(number)) => message.mode = number,
                (field::PATH, Found::Bytes(at)) => message.path.push(entry(what, &bytes[at])?),
                (field::ABOUT, Found::Bytes(at)) => message.about = Some(at),
                (field::STEP, Found::Number(number)) => message.step = number,
                (field::PHASE, Found::Number(number)) => message.phase = number,
                (field::RECORDED, Found::Bytes(at)) => message.recorded = at,
                (field::BELOW, Found::Number(number)) => message.below = number,
                (tag, _) => only_unknown(tag, field::BELOW).map_err(malformed(what))?,
            }
        }
        check_format(what, format)?;
        message.bytes = bytes;
        Ok(message)
    }

    fn carried(self, what: &'static str) -> Result<Carried, DecodeError> {
        if self.saga == 0 {
            return Err(DecodeError::Missing { what, field: "a saga id" });
        }
        let mode = match self.mode {
            1 => Mode::Execute,
            2 => Mode::Decide,
            3 => Mode::Cancel,
            other => return Err(DecodeError::Unknown { what, field: "mode", value: other }),
        };
        let about = self.about.ok_or(DecodeError::Missing { what, field: "what it is about" })?;
        let about = About::decode(self.bytes.slice(about)).map_err(malformed(what))?;
        Ok(Carried { token: Token { saga: self.saga, mode, path: self.path.into_iter().collect() }, about })
    }

    fn question(&self, what: &'static str) -> Result<(StepIndex, Phase), DecodeError> {
        let phase = match self.phase {
            1 => Phase::Action,
            2 => Phase::Compensation,
            3 => Phase::Cancel,
            other => return Err(DecodeError::Unknown { what, field: "phase", value: other }),
        };
        Ok((step_index(what, self.step)?, phase))
    }
}

/// The bytes of a path, to be kept in a database.
pub fn encode_path(path: &Path) -> Vec<u8> {
    let mut out = Vec::with_capacity(ENTRY_BYTES * path.len());
    path.entries().iter().for_each(|entry| put_entry(&mut out, PATH_ENTRIES, entry));
    out
}

/// Reads a kept path.
///
/// # Errors
/// [`DecodeError`] when the bytes are no path.
pub fn decode_path(bytes: &[u8]) -> Result<Path, DecodeError> {
    let what = "path";
    let mut entries = Vec::new();
    let mut reader = Reader::new(bytes);
    while let Some(field) = reader.next().map_err(malformed(what))? {
        if let (PATH_ENTRIES, Found::Bytes(at)) = field {
            entries.push(entry(what, &bytes[at])?);
        }
    }
    Ok(entries.into_iter().collect())
}

fn entry(what: &'static str, bytes: &[u8]) -> Result<Entry, DecodeError> {
    let (mut step, mut number, mut text, mut at) = (0, 0, 0..0, 0);
    let mut reader = Reader::new(bytes);
    while let Some(field) = reader.next().map_err(malformed(what))? {
        match field {
            (entry::STEP, Found::Number(found)) => step = found,
            (entry::OUTCOME, Found::Number(found)) => number = found,
            (entry::TEXT, Found::Bytes(found)) => text = found,
            (entry::AT, Found::Number(found)) => at = found,
            (tag, _) => only_unknown(tag, entry::AT).map_err(malformed(what))?,
        }
    }
    Ok(Entry { step: step_index(what, step)?, outcome: outcome(what, number, &bytes[text])?, at })
}

fn step_index(what: &'static str, step: u64) -> Result<StepIndex, DecodeError> {
    let index = u8::try_from(step).map_err(|_| DecodeError::Unknown { what, field: "step", value: step })?;
    Ok(StepIndex(index))
}

fn mode_number(mode: Mode) -> u64 {
    match mode {
        Mode::Execute => 1,
        Mode::Decide => 2,
        Mode::Cancel => 3,
    }
}

fn phase_number(phase: Phase) -> u64 {
    match phase {
        Phase::Action => 1,
        Phase::Compensation => 2,
        Phase::Cancel => 3,
    }
}

fn outcome(what: &'static str, number: u64, text: &[u8]) -> Result<Outcome, DecodeError> {
    match number {
        1 => Ok(Outcome::Done(text.to_vec())),
        2 => Ok(Outcome::Rejected(Reason::Refused(String::from_utf8_lossy(text).into_owned()))),
        3 => Ok(Outcome::Rejected(Reason::Cancelled)),
        4 => Ok(Outcome::Compensated),
        other => Err(DecodeError::Unknown { what, field: "outcome", value: other }),
    }
}

fn outcome_number(outcome: &Outcome) -> u64 {
    match outcome {
        Outcome::Done(_) => 1,
        Outcome::Rejected(Reason::Refused(_)) => 2,
        Outcome::Rejected(Reason::Cancelled) => 3,
        Outcome::Compensated => 4,
    }
}

fn text(outcome: &Outcome) -> &[u8] {
    match outcome {
        Outcome::Done(data) => data,
        Outcome::Rejected(Reason::Refused(why)) => cut(why).as_bytes(),
        Outcome::Rejected(Reason::Cancelled) | Outcome::Compensated => &[],
    }
}

fn cut(reason: &str) -> &str {
    let end = (0..=MAX_REASON_BYTES.min(reason.len())).rev().find(|end| reason.is_char_boundary(*end));
    &reason[..end.unwrap_or(0)]
}

fn check_format(what: &'static str, format: u64) -> Result<(), DecodeError> {
    if format == FORMAT.into() { Ok(()) } else { Err(DecodeError::Format { what, format }) }
}

fn malformed(what: &'static str) -> impl Fn(prost::DecodeError) -> DecodeError {
    move |source| DecodeError::Malformed { what, source }
}

/// What a later version added is skipped; a field that is known and has another form than it should is damage.
fn only_unknown(tag: u32, last_known: u32) -> Result<(), prost::DecodeError> {
    if tag > last_known { Ok(()) } else { Err(wrong("a field of another type")) }
}

fn wrong(problem: &'static str) -> prost::DecodeError {
    #[allow(deprecated, reason = "it is the only public way to make one, and nothing replaces it")]
    prost::DecodeError::new(problem)
}

/// Reads the fields of an encoded message, one after the other. What a later version added is skipped.
struct Reader<'b> {
    whole: &'b [u8],
    rest: &'b [u8],
}

/// A field's value: a number, or where in the message its bytes are.
enum Found {
    Number(u64),
    Bytes(Range<usize>),
    Skipped,
}

impl<'b> Reader<'b> {
    fn new(whole: &'b [u8]) -> Reader<'b> {
        Reader { whole, rest: whole }
    }

    #[inline(always)]
    fn next(&mut self) -> Result<Option<(u32, Found)>, prost::DecodeError> {
        if self.rest.is_empty() {
            return Ok(None);
        }
        let key = self.varint()?;
        let wire_type = WireType::try_from(key & 7)?;
        let tag = u32::try_from(key >> 3).map_err(|_| wrong("a field number above 29 bits"))?;
        if tag == 0 {
            return Err(wrong("a field number of 0"));
        }
        let found = match wire_type {
            WireType::Varint => Found::Number(self.varint()?),
            WireType::LengthDelimited => {
                let length = self.varint()?;
                let start = self.whole.len() - self.rest.len();
                let length = usize::try_from(length).ok().filter(|length| *length <= self.rest.len());
                let length = length.ok_or_else(|| wrong("a field that is longer than its message"))?;
                self.rest.advance(length);
                Found::Bytes(start..start + length)
            }
            other => {
                skip_field(other, tag, &mut self.rest, DecodeContext::default())?;
                Found::Skipped
            }
        };
        Ok(Some((tag, found)))
    }

    /// Nearly all of them are one byte.
    #[inline(always)]
    fn varint(&mut self) -> Result<u64, prost::DecodeError> {
        match self.rest {
            [byte, rest @ ..] if *byte < 0x80 => {
                self.rest = rest;
                Ok((*byte).into())
            }
            _ => decode_varint(&mut self.rest),
        }
    }
}

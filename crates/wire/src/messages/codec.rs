//! The encoding of the messages, by hand on the primitives of `prost`.
//!
//! A purchase is ten messages. Structs with derived codecs would be filled, measured and copied for each of them, and cost more
//! than all else that an orchestrator does. Here a message is written from the engine's own types into one buffer, and read into
//! them; what is only handed on is a slice of the buffer that it came in. `tests/derived.rs` holds this against
//! structs with derived codecs, and `proto/saga.proto` against both.

use std::ops::Range;

use bytes::{Buf, Bytes};
use prost::encoding::{
    DecodeContext, WireType, decode_varint, encode_key, encode_varint, encoded_len_varint, skip_field,
};
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

/// What a message takes beside its path, its recorded reply and what the saga is about, in bytes, at most: a key and a
/// varint for each number.
const NUMBERS_BYTES: usize = 64;
/// What an entry takes beside its text, in bytes, at most.
const ENTRY_BYTES: usize = 32;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Start = 1,
    Command = 2,
    Reply = 3,
    Progress = 4,
    Purge = 5,
}

/// The encoded [`Start`].
pub fn start(token: &Token, about: &About) -> Bytes {
    let mut out = begin(Kind::Start, token, about, 0);
    put_bytes(&mut out, field::ABOUT, &about.encoded);
    out.into()
}

/// The encoded [`Command`].
pub fn command(token: &Token, about: &About, step: StepIndex, phase: Phase) -> Bytes {
    let mut out = begin(Kind::Command, token, about, 0);
    put_question(&mut out, step, phase);
    put_bytes(&mut out, field::ABOUT, &about.encoded);
    out.into()
}

/// The encoded [`Reply`].
pub fn reply(token: &Token, about: &About, step: StepIndex, phase: Phase, recorded: &[u8]) -> Bytes {
    let mut out = begin(Kind::Reply, token, about, recorded.len());
    put_question(&mut out, step, phase);
    put_bytes(&mut out, field::RECORDED, recorded);
    put_bytes(&mut out, field::ABOUT, &about.encoded);
    out.into()
}

/// The encoded [`Progress`].
pub fn progress(token: &Token, about: &About) -> Bytes {
    let mut out = begin(Kind::Progress, token, about, 0);
    put_bytes(&mut out, field::ABOUT, &about.encoded);
    out.into()
}

/// The encoded [`Purge`].
pub fn purge(below: u64) -> Bytes {
    let mut out = Vec::with_capacity(NUMBERS_BYTES);
    put_number(&mut out, field::FORMAT, FORMAT.into());
    put_number(&mut out, field::KIND, Kind::Purge as u64);
    put_number(&mut out, field::BELOW, below);
    out.into()
}

fn begin(kind: Kind, token: &Token, about: &About, more_bytes: usize) -> Vec<u8> {
    let entries = token.path.entries();
    let path_bytes: usize = entries.iter().map(|entry| ENTRY_BYTES + text(&entry.outcome).len()).sum();
    let mut out = Vec::with_capacity(NUMBERS_BYTES + path_bytes + about.encoded.len() + more_bytes);
    put_number(&mut out, field::FORMAT, FORMAT.into());
    put_number(&mut out, field::KIND, kind as u64);
    put_number(&mut out, field::SAGA, token.saga);
    put_number(&mut out, field::MODE, mode_number(token.mode));
    entries.iter().for_each(|entry| put_entry(&mut out, field::PATH, entry));
    out
}

fn put_question(out: &mut Vec<u8>, step: StepIndex, phase: Phase) {
    put_number(out, field::STEP, step.0.into());
    put_number(out, field::PHASE, phase_number(phase));
}

fn put_entry(out: &mut Vec<u8>, tag: u32, entry: &Entry) {
    let (step, outcome, text) =
        (u64::from(entry.step.0), outcome_number(&entry.outcome), text(&entry.outcome));
    let bytes = number_len(step) + number_len(outcome) + bytes_len(text) + number_len(entry.at);
    encode_key(tag, WireType::LengthDelimited, out);
    encode_varint(bytes as u64, out);
    put_number(out, entry::STEP, step);
    put_number(out, entry::OUTCOME, outcome);
    put_bytes(out, entry::TEXT, text);
    put_number(out, entry::AT, entry.at);
}

/// proto3 leaves a number out that is 0.
fn put_number(out: &mut Vec<u8>, tag: u32, number: u64) {
    if number != 0 {
        encode_key(tag, WireType::Varint, out);
        put_varint(out, number);
    }
}

/// Into a buffer of its own first: a vector grows, and looks whether it has to, once.
fn put_varint(out: &mut Vec<u8>, number: u64) {
    let mut bytes = [0; 10];
    let mut rest = &mut bytes[..];
    encode_varint(number, &mut rest);
    let length = 10 - rest.len();
    out.extend_from_slice(&bytes[..length]);
}

/// proto3 leaves bytes out that are empty.
fn put_bytes(out: &mut Vec<u8>, tag: u32, bytes: &[u8]) {
    if !bytes.is_empty() {
        encode_key(tag, WireType::LengthDelimited, out);
        encode_varint(bytes.len() as u64, out);
        out.extend_from_slice(bytes);
    }
}

/// Of a field whose tag is below 16: its key is one byte.
fn number_len(number: u64) -> usize {
    if number == 0 { 0 } else { 1 + encoded_len_varint(number) }
}

fn bytes_len(bytes: &[u8]) -> usize {
    if bytes.is_empty() { 0 } else { 1 + encoded_len_varint(bytes.len() as u64) + bytes.len() }
}

impl About {
    /// What a new saga is about.
    pub fn new(definition: &str, version: u32, started_at: u64, input: &[u8], trace: &[u8]) -> About {
        let mut out = Vec::with_capacity(NUMBERS_BYTES + definition.len() + input.len() + trace.len());
        put_bytes(&mut out, about::DEFINITION, definition.as_bytes());
        put_number(&mut out, about::VERSION, version.into());
        put_number(&mut out, about::STARTED_AT, started_at);
        put_bytes(&mut out, about::INPUT, input);
        put_bytes(&mut out, about::TRACE, trace);
        About::decode(out.into()).expect("it was written just above")
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
        let text = text(&self.outcome);
        let mut out = Vec::with_capacity(ENTRY_BYTES + text.len());
        put_number(&mut out, recorded::OUTCOME, outcome_number(&self.outcome));
        put_bytes(&mut out, recorded::TEXT, text);
        put_number(&mut out, recorded::AT, self.at);
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

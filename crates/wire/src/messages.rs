//! The messages that drive a saga: [`Start`], [`Command`], [`Reply`], [`Progress`], [`Purge`].
//!
//! Each is a Protocol Buffers message (proto3 encoding), so that replicas of two versions understand each other while
//! one replaces the other: fields are only ever added. What a reader could misunderstand instead of merely not know
//! raises [`FORMAT`], and is refused by readers of another format.
//!
//! The saga's token travels in every message as [`Carried`]; no one keeps it in between.

use bytes::Bytes;
use prost::Message as _;
use saga::{Entry, Mode, Outcome, Path, Phase, Reason, StepIndex};

/// The format of the messages in this file. A message of another format is not decoded.
pub const FORMAT: u32 = 1;

/// The longest reason that is recorded, in bytes of UTF-8. A longer one is cut at a character boundary.
pub const MAX_REASON_BYTES: usize = 512;

/// A message that cannot be understood.
#[derive(Debug, thiserror::Error)]
pub enum DecodeError {
    /// It is not the Protocol Buffers message that was expected.
    #[error("not a {what} message: {source}")]
    Malformed {
        /// The message expected.
        what: &'static str,
        /// What the decoder ran into.
        source: prost::DecodeError,
    },
    /// It was written by another generation of this software.
    #[error("a {what} message of format {format}; this version reads format {FORMAT}")]
    Format {
        /// The message expected.
        what: &'static str,
        /// The format it declares.
        format: u32,
    },
    /// A field that must be there is not.
    #[error("a {what} message without {field}")]
    Missing {
        /// The message expected.
        what: &'static str,
        /// The field that is missing.
        field: &'static str,
    },
    /// A field has a value that means nothing.
    #[error("a {what} message with {field} = {value}")]
    Unknown {
        /// The message expected.
        what: &'static str,
        /// The field.
        field: &'static str,
        /// Its value.
        value: u64,
    },
}

/// What travels with every message about a saga, from the start to the end.
#[derive(Clone, Debug, PartialEq)]
pub struct Carried {
    /// The engine's token: id, mode, path.
    pub token: saga::Token,
    /// The definition's name.
    pub definition: String,
    /// The definition's version.
    pub version: u32,
    /// When the saga was accepted, in Unix milliseconds.
    pub started_at: u64,
    /// What the saga is about; its participants know how to read it.
    pub input: Bytes,
    /// The trace that the saga belongs to, as a W3C `traceparent`; empty when there is none.
    pub trace: Bytes,
}

/// Drives a saga from its first step: to begin it, or again to recover it.
#[derive(Clone, Debug, PartialEq)]
pub struct Start {
    /// The saga; its path is empty.
    pub carried: Carried,
}

/// Asks a participant something.
#[derive(Clone, Debug, PartialEq)]
pub struct Command {
    /// The saga, as far as it has come.
    pub carried: Carried,
    /// The step asked for.
    pub step: StepIndex,
    /// What is asked.
    pub phase: Phase,
}

/// Answers a [`Command`].
#[derive(Clone, Debug, PartialEq)]
pub struct Reply {
    /// The command's own.
    pub carried: Carried,
    /// The command's own.
    pub step: StepIndex,
    /// The command's own.
    pub phase: Phase,
    /// The encoded [`Recorded`], byte for byte as the participant keeps it.
    pub recorded: Bytes,
}

/// Tells the one who started a saga how far it is.
#[derive(Clone, Debug, PartialEq)]
pub struct Progress {
    /// The saga with its whole path so far.
    pub carried: Carried,
}

/// Tells a participant which barrier rows nobody will ask for again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Purge {
    /// Every saga with a smaller id has ended.
    pub below: u64,
}

/// What an orchestrator receives.
#[derive(Clone, Debug, PartialEq)]
pub enum ToOrchestrator {
    /// A saga to drive from its first step.
    Start(Start),
    /// An answer from a participant.
    Reply(Reply),
}

/// What a participant receives.
#[derive(Clone, Debug, PartialEq)]
pub enum ToParticipant {
    /// A question.
    Command(Command),
    /// Leave to forget.
    Purge(Purge),
}

/// A participant's reply as it is kept in its barrier: encoded once, in the transaction of the effect, and sent as those
/// bytes ever after.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Recorded {
    /// What was answered.
    pub outcome: Outcome,
    /// When, in Unix milliseconds.
    pub at: u64,
}

impl Recorded {
    /// The bytes to keep.
    pub fn encode(&self) -> Bytes {
        proto::Recorded::from(self).encode_to_vec().into()
    }

    /// Reads kept bytes.
    ///
    /// # Errors
    /// [`DecodeError`] when they are no recorded reply.
    pub fn decode(bytes: &Bytes) -> Result<Recorded, DecodeError> {
        let what = "recorded reply";
        let decoded = proto::Recorded::decode(bytes.clone()).map_err(malformed(what))?;
        let outcome = outcome(what, decoded.outcome, decoded.text)?;
        Ok(Recorded { outcome, at: decoded.at })
    }
}

impl ToOrchestrator {
    /// The bytes to publish.
    pub fn encode(&self) -> Bytes {
        let kind = match self {
            ToOrchestrator::Start(start) => proto::OrchestratorKind::Start((&start.carried).into()),
            ToOrchestrator::Reply(reply) => proto::OrchestratorKind::Reply(proto::Reply {
                carried: Some((&reply.carried).into()),
                step: reply.step.0.into(),
                phase: phase_number(reply.phase),
                recorded: reply.recorded.clone(),
            }),
        };
        proto::ToOrchestrator { format: FORMAT, kind: Some(kind) }.encode_to_vec().into()
    }

    /// Reads published bytes.
    ///
    /// # Errors
    /// [`DecodeError`] when they are no message for an orchestrator of this format.
    pub fn decode(bytes: Bytes) -> Result<ToOrchestrator, DecodeError> {
        let what = "saga";
        let decoded = proto::ToOrchestrator::decode(bytes).map_err(malformed(what))?;
        check_format(what, decoded.format)?;
        match decoded.kind.ok_or(DecodeError::Missing { what, field: "a kind" })? {
            proto::OrchestratorKind::Start(inner) => {
                Ok(ToOrchestrator::Start(Start { carried: carried(what, Some(inner))? }))
            }
            proto::OrchestratorKind::Reply(reply) => Ok(ToOrchestrator::Reply(Reply {
                carried: carried(what, reply.carried)?,
                step: step_index(what, reply.step)?,
                phase: phase(what, reply.phase)?,
                recorded: reply.recorded,
            })),
        }
    }
}

impl ToParticipant {
    /// The bytes to publish.
    pub fn encode(&self) -> Bytes {
        let kind = match self {
            ToParticipant::Command(command) => proto::ParticipantKind::Command(proto::Command {
                carried: Some((&command.carried).into()),
                step: command.step.0.into(),
                phase: phase_number(command.phase),
            }),
            ToParticipant::Purge(purge) => proto::ParticipantKind::Purge(proto::Purge { below: purge.below }),
        };
        proto::ToParticipant { format: FORMAT, kind: Some(kind) }.encode_to_vec().into()
    }

    /// Reads published bytes.
    ///
    /// # Errors
    /// [`DecodeError`] when they are no message for a participant of this format.
    pub fn decode(bytes: Bytes) -> Result<ToParticipant, DecodeError> {
        let what = "command";
        let decoded = proto::ToParticipant::decode(bytes).map_err(malformed(what))?;
        check_format(what, decoded.format)?;
        match decoded.kind.ok_or(DecodeError::Missing { what, field: "a kind" })? {
            proto::ParticipantKind::Command(command) => Ok(ToParticipant::Command(Command {
                carried: carried(what, command.carried)?,
                step: step_index(what, command.step)?,
                phase: phase(what, command.phase)?,
            })),
            proto::ParticipantKind::Purge(purge) => Ok(ToParticipant::Purge(Purge { below: purge.below })),
        }
    }
}

impl Progress {
    /// The bytes to publish.
    pub fn encode(&self) -> Bytes {
        let message = proto::Progress { format: FORMAT, carried: Some((&self.carried).into()) };
        message.encode_to_vec().into()
    }

    /// Reads published bytes.
    ///
    /// # Errors
    /// [`DecodeError`] when they are no progress message of this format.
    pub fn decode(bytes: Bytes) -> Result<Progress, DecodeError> {
        let what = "progress";
        let decoded = proto::Progress::decode(bytes).map_err(malformed(what))?;
        check_format(what, decoded.format)?;
        Ok(Progress { carried: carried(what, decoded.carried)? })
    }
}

/// The bytes of a path, to be kept in a database.
pub fn encode_path(path: &Path) -> Vec<u8> {
    proto::Path { entries: path.entries().iter().map(Into::into).collect() }.encode_to_vec()
}

/// Reads a kept path.
///
/// # Errors
/// [`DecodeError`] when the bytes are no path.
pub fn decode_path(bytes: &[u8]) -> Result<Path, DecodeError> {
    let what = "path";
    let decoded = proto::Path::decode(bytes).map_err(malformed(what))?;
    path(what, decoded.entries)
}

fn malformed(what: &'static str) -> impl Fn(prost::DecodeError) -> DecodeError {
    move |source| DecodeError::Malformed { what, source }
}

fn check_format(what: &'static str, format: u32) -> Result<(), DecodeError> {
    if format == FORMAT { Ok(()) } else { Err(DecodeError::Format { what, format }) }
}

fn carried(what: &'static str, from: Option<proto::Carried>) -> Result<Carried, DecodeError> {
    let from = from.ok_or(DecodeError::Missing { what, field: "a saga" })?;
    if from.saga == 0 {
        return Err(DecodeError::Missing { what, field: "a saga id" });
    }
    let mode = match from.mode {
        1 => Mode::Execute,
        2 => Mode::Decide,
        3 => Mode::Cancel,
        other => return Err(DecodeError::Unknown { what, field: "mode", value: other.into() }),
    };
    Ok(Carried {
        token: saga::Token { saga: from.saga, mode, path: path(what, from.path)? },
        definition: from.definition,
        version: from.version,
        started_at: from.started_at,
        input: from.input,
        trace: from.trace,
    })
}

fn path(what: &'static str, entries: Vec<proto::Entry>) -> Result<Path, DecodeError> {
    let entry = |entry: proto::Entry| {
        Ok(Entry {
            step: step_index(what, entry.step)?,
            outcome: outcome(what, entry.outcome, entry.text)?,
            at: entry.at,
        })
    };
    entries.into_iter().map(entry).collect()
}

fn step_index(what: &'static str, step: u32) -> Result<StepIndex, DecodeError> {
    let index =
        u8::try_from(step).map_err(|_| DecodeError::Unknown { what, field: "step", value: step.into() })?;
    Ok(StepIndex(index))
}

fn phase_number(phase: Phase) -> u32 {
    match phase {
        Phase::Action => 1,
        Phase::Compensation => 2,
        Phase::Cancel => 3,
    }
}

fn phase(what: &'static str, number: u32) -> Result<Phase, DecodeError> {
    match number {
        1 => Ok(Phase::Action),
        2 => Ok(Phase::Compensation),
        3 => Ok(Phase::Cancel),
        other => Err(DecodeError::Unknown { what, field: "phase", value: other.into() }),
    }
}

fn outcome(what: &'static str, number: u32, text: Bytes) -> Result<Outcome, DecodeError> {
    match number {
        1 => Ok(Outcome::Done(text.into())),
        2 => Ok(Outcome::Rejected(Reason::Refused(String::from_utf8_lossy(&text).into_owned()))),
        3 => Ok(Outcome::Rejected(Reason::Cancelled)),
        4 => Ok(Outcome::Compensated),
        other => Err(DecodeError::Unknown { what, field: "outcome", value: other.into() }),
    }
}

fn outcome_parts(outcome: &Outcome) -> (u32, Bytes) {
    match outcome {
        Outcome::Done(data) => (1, Bytes::copy_from_slice(data)),
        Outcome::Rejected(Reason::Refused(why)) => (2, Bytes::copy_from_slice(cut(why).as_bytes())),
        Outcome::Rejected(Reason::Cancelled) => (3, Bytes::new()),
        Outcome::Compensated => (4, Bytes::new()),
    }
}

fn cut(reason: &str) -> &str {
    let end = (0..=MAX_REASON_BYTES.min(reason.len())).rev().find(|end| reason.is_char_boundary(*end));
    &reason[..end.unwrap_or(0)]
}

/// The Protocol Buffers messages themselves; `proto/saga.proto` says the same in the language of others.
mod proto {
    use super::{Bytes, Mode, outcome_parts};

    #[derive(Clone, PartialEq, prost::Message)]
    pub(super) struct Entry {
        #[prost(uint32, tag = "1")]
        pub(super) step: u32,
        /// 1 done, 2 rejected, 3 rejected because cancelled, 4 compensated.
        #[prost(uint32, tag = "2")]
        pub(super) outcome: u32,
        /// What a done step hands on, or why one was rejected.
        #[prost(bytes = "bytes", tag = "3")]
        pub(super) text: Bytes,
        #[prost(uint64, tag = "4")]
        pub(super) at: u64,
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub(super) struct Path {
        #[prost(message, repeated, tag = "1")]
        pub(super) entries: Vec<Entry>,
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub(super) struct Recorded {
        #[prost(uint32, tag = "1")]
        pub(super) outcome: u32,
        #[prost(bytes = "bytes", tag = "2")]
        pub(super) text: Bytes,
        #[prost(uint64, tag = "3")]
        pub(super) at: u64,
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub(super) struct Carried {
        #[prost(uint64, tag = "1")]
        pub(super) saga: u64,
        #[prost(string, tag = "2")]
        pub(super) definition: String,
        #[prost(uint32, tag = "3")]
        pub(super) version: u32,
        /// 1 execute, 2 decide, 3 cancel.
        #[prost(uint32, tag = "4")]
        pub(super) mode: u32,
        #[prost(message, repeated, tag = "5")]
        pub(super) path: Vec<Entry>,
        #[prost(uint64, tag = "6")]
        pub(super) started_at: u64,
        #[prost(bytes = "bytes", tag = "7")]
        pub(super) input: Bytes,
        #[prost(bytes = "bytes", tag = "8")]
        pub(super) trace: Bytes,
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub(super) struct Command {
        #[prost(message, optional, tag = "1")]
        pub(super) carried: Option<Carried>,
        #[prost(uint32, tag = "2")]
        pub(super) step: u32,
        /// 1 action, 2 compensation, 3 cancel.
        #[prost(uint32, tag = "3")]
        pub(super) phase: u32,
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub(super) struct Reply {
        #[prost(message, optional, tag = "1")]
        pub(super) carried: Option<Carried>,
        #[prost(uint32, tag = "2")]
        pub(super) step: u32,
        #[prost(uint32, tag = "3")]
        pub(super) phase: u32,
        #[prost(bytes = "bytes", tag = "4")]
        pub(super) recorded: Bytes,
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub(super) struct Purge {
        #[prost(uint64, tag = "1")]
        pub(super) below: u64,
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub(super) struct ToOrchestrator {
        #[prost(uint32, tag = "1")]
        pub(super) format: u32,
        #[prost(oneof = "OrchestratorKind", tags = "2, 3")]
        pub(super) kind: Option<OrchestratorKind>,
    }

    #[derive(Clone, PartialEq, prost::Oneof)]
    pub(super) enum OrchestratorKind {
        #[prost(message, tag = "2")]
        Start(Carried),
        #[prost(message, tag = "3")]
        Reply(Reply),
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub(super) struct ToParticipant {
        #[prost(uint32, tag = "1")]
        pub(super) format: u32,
        #[prost(oneof = "ParticipantKind", tags = "2, 3")]
        pub(super) kind: Option<ParticipantKind>,
    }

    #[derive(Clone, PartialEq, prost::Oneof)]
    pub(super) enum ParticipantKind {
        #[prost(message, tag = "2")]
        Command(Command),
        #[prost(message, tag = "3")]
        Purge(Purge),
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub(super) struct Progress {
        #[prost(uint32, tag = "1")]
        pub(super) format: u32,
        #[prost(message, optional, tag = "2")]
        pub(super) carried: Option<Carried>,
    }

    impl From<&saga::Entry> for Entry {
        fn from(entry: &saga::Entry) -> Entry {
            let (outcome, text) = outcome_parts(&entry.outcome);
            Entry { step: entry.step.0.into(), outcome, text, at: entry.at }
        }
    }

    impl From<&super::Recorded> for Recorded {
        fn from(recorded: &super::Recorded) -> Recorded {
            let (outcome, text) = outcome_parts(&recorded.outcome);
            Recorded { outcome, text, at: recorded.at }
        }
    }

    impl From<&super::Carried> for Carried {
        fn from(carried: &super::Carried) -> Carried {
            let mode = match carried.token.mode {
                Mode::Execute => 1,
                Mode::Decide => 2,
                Mode::Cancel => 3,
            };
            Carried {
                saga: carried.token.saga,
                definition: carried.definition.clone(),
                version: carried.version,
                mode,
                path: carried.token.path.entries().iter().map(Into::into).collect(),
                started_at: carried.started_at,
                input: carried.input.clone(),
                trace: carried.trace.clone(),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn carried() -> Carried {
        let entry = |step, outcome| Entry { step: StepIndex(step), outcome, at: 1_700_000_000_123 };
        let path = [
            entry(0, Outcome::Done(b"seat 12A".to_vec())),
            entry(1, Outcome::Rejected(Reason::Refused("no room".into()))),
            entry(0, Outcome::Compensated),
        ];
        Carried {
            token: saga::Token { saga: 7, mode: Mode::Cancel, path: path.into_iter().collect() },
            definition: "trip".into(),
            version: 3,
            started_at: 1_700_000_000_000,
            input: Bytes::from_static(b"input"),
            trace: Bytes::from_static(b"00-1-2-01"),
        }
    }

    #[test]
    fn messages_survive_the_wire() {
        let start = ToOrchestrator::Start(Start { carried: carried() });
        assert_eq!(ToOrchestrator::decode(start.encode()).unwrap(), start);

        for phase in [Phase::Action, Phase::Compensation, Phase::Cancel] {
            let command = ToParticipant::Command(Command { carried: carried(), step: StepIndex(2), phase });
            assert_eq!(ToParticipant::decode(command.encode()).unwrap(), command);
        }
        let purge = ToParticipant::Purge(Purge { below: 99 });
        assert_eq!(ToParticipant::decode(purge.encode()).unwrap(), purge);

        let recorded = Recorded { outcome: Outcome::Rejected(Reason::Cancelled), at: 5 }.encode();
        let reply = ToOrchestrator::Reply(Reply {
            carried: carried(),
            step: StepIndex(1),
            phase: Phase::Cancel,
            recorded: recorded.clone(),
        });
        let ToOrchestrator::Reply(back) = ToOrchestrator::decode(reply.encode()).unwrap() else {
            panic!("a reply came back as something else");
        };
        assert_eq!(back.recorded, recorded, "a recorded reply is sent byte for byte");

        let progress = Progress { carried: carried() };
        assert_eq!(Progress::decode(progress.encode()).unwrap(), progress);
        let path = carried().token.path;
        assert_eq!(decode_path(&encode_path(&path)).unwrap(), path);
    }

    #[test]
    fn what_cannot_be_understood_is_refused_with_the_reason() {
        let refused = |bytes: Vec<u8>| ToOrchestrator::decode(bytes.into()).unwrap_err().to_string();
        assert!(refused(b"\xff\xffnot protobuf".to_vec()).starts_with("not a saga message"));
        let future = proto::ToOrchestrator { format: 2, kind: None }.encode_to_vec();
        assert_eq!(refused(future), "a saga message of format 2; this version reads format 1");
        assert!(refused(Vec::new()).contains("format 0"), "an empty message is no message");

        let mut no_mode = proto::Carried::from(&carried());
        no_mode.mode = 9;
        let kind = Some(proto::OrchestratorKind::Start(no_mode));
        let message = proto::ToOrchestrator { format: FORMAT, kind }.encode_to_vec();
        assert_eq!(refused(message), "a saga message with mode = 9");
    }

    #[test]
    fn a_long_reason_is_cut_between_characters() {
        let outcome = Outcome::Rejected(Reason::Refused("é".repeat(MAX_REASON_BYTES)));
        let recorded = Recorded { outcome, at: 1 };
        let Outcome::Rejected(Reason::Refused(kept)) = Recorded::decode(&recorded.encode()).unwrap().outcome
        else {
            panic!("a rejection came back as something else");
        };
        assert_eq!(kept.len(), MAX_REASON_BYTES);
        assert!(kept.chars().all(|c| c == 'é'));
    }

    /// `MESSAGE.field = tag` for every field, from the lines of a file.
    fn fields(text: &str, message: &str, field: impl Fn(&str) -> Option<(String, u32)>) -> Vec<String> {
        let mut current = String::new();
        let mut fields = Vec::new();
        for line in text.lines().map(str::trim) {
            if let Some(rest) = line.split_once(message) {
                current = rest.1.trim_end_matches(" {").to_owned();
            }
            if let Some((name, tag)) = field(line) {
                fields.push(format!("{current}.{name} = {tag}"));
            }
        }
        fields.sort();
        fields
    }

    #[test]
    fn the_proto_file_says_what_the_code_does() {
        let proto = include_str!("../../../proto/saga.proto");
        let described = fields(proto, "message ", |line| {
            let (left, right) = line.split_once(" = ")?;
            let tag = right.split(';').next()?.parse().ok()?;
            Some((left.rsplit(' ').next()?.to_owned(), tag))
        });
        let code = include_str!("messages.rs");
        let code = &code[code.find("mod proto {").unwrap()..code.find("impl From<&saga::Entry>").unwrap()];
        let tag = std::cell::Cell::new(None);
        let coded = fields(&code.replace("OrchestratorKind", "ToOrchestrator"), " struct ", |line| {
            if let Some((_, rest)) = line.split_once("tag = \"") {
                tag.set(rest.split('"').next()?.parse().ok());
            }
            let name = line.strip_prefix("pub(super) ")?.split_once(": ")?.0.to_owned();
            Some((name, tag.take()?))
        });
        // The variants of a oneof are fields in the file and an enum in the code.
        let described: Vec<_> = described
            .into_iter()
            .filter(|line| {
                !["start", "reply", "command", "purge"]
                    .iter()
                    .any(|kind| line.contains(&format!(".{kind} = ")))
            })
            .collect();
        assert!(described.len() > 25, "only {} fields were found", described.len());
        assert_eq!(described, coded);
    }
}

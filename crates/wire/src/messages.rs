//! The messages that drive a saga: [`Start`], [`Command`], [`Reply`], [`Progress`], [`Purge`].
//!
//! Each is a Protocol Buffers message (proto3 encoding), so that replicas of two versions understand each other while
//! one replaces the other: fields are only ever added. What a reader could misunderstand instead of merely not know
//! raises [`FORMAT`], and is refused by readers of another format.
//!
//! The saga's token travels in every message; no one keeps it in between. So does what the saga is [`About`], which is
//! encoded when the saga starts and handed on as those bytes. `codec.rs` says why the encoding is written by hand.

mod codec;

use std::ops::Range;

use bytes::Bytes;
use saga::{Outcome, Phase, StepIndex, Token};

pub use codec::{Pen, decode_path, encode_path, purge};

/// The format of the messages in this file. A message of another format is not decoded.
pub const FORMAT: u32 = 2;

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
        format: u64,
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
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Carried {
    /// The engine's token: id, mode, path.
    pub token: Token,
    /// What never changes.
    pub about: About,
}

/// What a saga is about, as it is handed on from message to message: encoded once, never decoded in between but where it is
/// looked at. Cloning is cheap.
#[derive(Clone, PartialEq, Eq)]
pub struct About {
    encoded: Bytes,
    definition: Range<usize>,
    version: u32,
    started_at: u64,
    input: Range<usize>,
    trace: Range<usize>,
}

impl About {
    /// The name of the saga's definition: ASCII.
    pub fn definition(&self) -> &str {
        str::from_utf8(&self.encoded[self.definition.clone()]).unwrap_or_default()
    }

    /// Whether the saga is one of this definition.
    pub fn is_of(&self, definition: &str, version: u32) -> bool {
        self.version == version && self.encoded[self.definition.clone()] == *definition.as_bytes()
    }

    /// The definition's version.
    pub fn version(&self) -> u32 {
        self.version
    }

    /// When the saga was accepted, in Unix milliseconds.
    pub fn started_at(&self) -> u64 {
        self.started_at
    }

    /// What the saga is to do; its participants know how to read it.
    pub fn input(&self) -> Bytes {
        self.encoded.slice(self.input.clone())
    }

    /// The trace that the saga belongs to, as a W3C `traceparent`; empty when there is none.
    pub fn trace(&self) -> &[u8] {
        &self.encoded[self.trace.clone()]
    }
}

impl std::fmt::Debug for About {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("About")
            .field("definition", &self.definition())
            .field("version", &self.version)
            .field("started_at", &self.started_at)
            .field("input", &self.input())
            .field("trace", &String::from_utf8_lossy(self.trace()))
            .finish()
    }
}

/// Drives a saga from its first step: to begin it, or again to recover it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Start {
    /// The saga; its path is empty.
    pub carried: Carried,
}

/// Asks a participant something.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Command {
    /// The saga, as far as it has come.
    pub carried: Carried,
    /// The step asked for.
    pub step: StepIndex,
    /// What is asked.
    pub phase: Phase,
}

/// Answers a [`Command`].
#[derive(Clone, Debug, PartialEq, Eq)]
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
#[derive(Clone, Debug, PartialEq, Eq)]
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
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ToOrchestrator {
    /// A saga to drive from its first step.
    Start(Start),
    /// An answer from a participant.
    Reply(Reply),
}

/// What a participant receives.
#[derive(Clone, Debug, PartialEq, Eq)]
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

impl ToOrchestrator {
    /// The bytes to publish.
    pub fn encode(&self) -> Bytes {
        match self {
            ToOrchestrator::Start(Start { carried }) => {
                Pen::for_messages(1).start(&carried.token, &carried.about)
            }
            ToOrchestrator::Reply(Reply { carried, step, phase, recorded }) => {
                Pen::for_messages(1).reply(&carried.token, &carried.about, *step, *phase, recorded)
            }
        }
    }
}

impl ToParticipant {
    /// The bytes to publish.
    pub fn encode(&self) -> Bytes {
        match self {
            ToParticipant::Command(Command { carried, step, phase }) => {
                Pen::for_messages(1).command(&carried.token, &carried.about, *step, *phase)
            }
            ToParticipant::Purge(Purge { below }) => purge(*below),
        }
    }
}

impl Progress {
    /// The bytes to publish.
    pub fn encode(&self) -> Bytes {
        Pen::for_messages(1).progress(&self.carried.token, &self.carried.about)
    }
}

//! What to do next: the pure function at the heart of an orchestrator.
//!
//! It keeps nothing between two calls. All that it needs to know comes with the message and goes with the messages
//! that it asks to be sent, so any replica can take any message, at any time, as often as it comes.

use crate::definition::{Definition, Kind, StepIndex};
use crate::path::{End, Entry, Outcome, Path, Position};

/// How a saga is being driven. The mode never changes what a saga's path is, only who may still extend it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Mode {
    /// Each step is asked to act.
    Execute,
    /// The saga's time is up: the deciding step is asked to cancel, and its answer decides for good. Done: the saga
    /// is driven on in [`Mode::Execute`]. Rejected: it is replayed in [`Mode::Cancel`].
    Decide,
    /// The decision was against the saga: each step is asked for its reply without its effect, up to the first
    /// rejected one, and what is done before that one is compensated.
    Cancel,
}

/// What a participant is asked to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Phase {
    /// Have the effect, or say no.
    Action,
    /// Undo the effect. There is no saying no.
    Compensation,
    /// Say what came of the action; if it has not come yet, see to it that it never has an effect.
    Cancel,
}

/// What travels with every message about a saga; a saga has no other state.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Token {
    /// The saga's id, unique among all sagas that share a participant.
    pub saga: u64,
    /// How it is being driven by this message.
    pub mode: Mode,
    /// How far this message has driven it.
    pub path: Path,
}

/// A participant's answer to a command.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reply {
    /// The step that was asked.
    pub step: StepIndex,
    /// What it was asked.
    pub phase: Phase,
    /// What it answered.
    pub outcome: Outcome,
    /// When that was recorded, in Unix milliseconds.
    pub at: u64,
}

/// A command to be sent to a step's participant.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ask<S> {
    /// The caller's own name for the step.
    pub step: S,
    /// The step's place in the definition.
    pub index: StepIndex,
    /// What it is asked to do.
    pub phase: Phase,
}

/// What the one who started the saga is to be told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Standing {
    /// The path has grown; there is more to come.
    Open,
    /// The path has grown for the last time.
    Ended(End),
}

/// What is to be done about a message: data, for the caller to carry out. All of it must be published before the
/// message is acknowledged; publishing it again does no harm.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Effects<S> {
    /// The token that goes with every message published for this.
    pub token: Token,
    /// The command to send, unless the saga has ended.
    pub ask: Option<Ask<S>>,
    /// What to tell the one who started the saga, if the path has grown.
    pub tell: Option<Standing>,
}

/// A reply that cannot come where it came. It is nobody's retry or delay: those are all legal. Something is broken, so
/// the message is to be set aside for an operator.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Illegal {
    /// The definition has no such step.
    NoSuchStep {
        /// The step named.
        step: StepIndex,
    },
    /// Another step's reply was due.
    WrongStep {
        /// The step whose reply was due.
        expected: StepIndex,
        /// The step that replied.
        got: StepIndex,
    },
    /// The reply answers another question than the one that was due.
    WrongPhase {
        /// The step that replied.
        step: StepIndex,
        /// What it was due to be asked.
        expected: Phase,
        /// What it says that it was asked.
        got: Phase,
    },
    /// A retriable step said no.
    RetriableRejected {
        /// The step that replied.
        step: StepIndex,
    },
    /// A step was undone although nothing had been rejected.
    CompensatedWhileForward {
        /// The step that replied.
        step: StepIndex,
    },
    /// A step that was to be undone answered as if it had been asked to act.
    ActionReplyWhileBackward {
        /// The step that replied.
        step: StepIndex,
    },
    /// A reply to a saga that had ended.
    AfterTheEnd {
        /// How it had ended.
        end: End,
        /// The step that replied.
        step: StepIndex,
    },
    /// A saga whose cancellation is being decided has no path yet, and this one has.
    PathBeforeDecision {
        /// The length of its path.
        length: usize,
    },
    /// A saga in cancel mode got past its deciding step, which had been cancelled for good.
    CommittedWhileCancelled,
}

impl std::fmt::Display for Illegal {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Illegal::NoSuchStep { step } => write!(f, "the definition has no step {step}"),
            Illegal::WrongStep { expected, got } => {
                write!(f, "step {got} replied where step {expected} was asked")
            }
            Illegal::WrongPhase { step, expected, got } => {
                write!(f, "step {step} answered {got:?} where it was asked for {expected:?}")
            }
            Illegal::RetriableRejected { step } => write!(f, "step {step} is retriable and was rejected"),
            Illegal::CompensatedWhileForward { step } => {
                write!(f, "step {step} was compensated although no step had been rejected")
            }
            Illegal::ActionReplyWhileBackward { step } => {
                write!(f, "step {step} was to be compensated and replied as to an action")
            }
            Illegal::AfterTheEnd { end, step } => {
                write!(f, "step {step} replied to a saga that had ended ({end:?})")
            }
            Illegal::PathBeforeDecision { length } => {
                write!(f, "a saga whose cancellation is being decided came with a path of {length}")
            }
            Illegal::CommittedWhileCancelled => f.write_str("a cancelled saga got past its deciding step"),
        }
    }
}

impl std::error::Error for Illegal {}

/// What to do about a start message: ask the first step, or the deciding one where the mode is [`Mode::Decide`].
///
/// A start may come again at any time, in any mode: it drives the saga from its first step, every participant
/// answers what it has answered before, and so the saga comes to where it was, and on.
pub fn start<S: Copy>(definition: &Definition<S>, saga: u64, mode: Mode) -> Effects<S> {
    // A saga that nothing can reject cannot be cancelled: there is nothing to decide.
    let (mode, index, phase) = match (mode, definition.decider()) {
        (Mode::Decide, Some(decider)) => (Mode::Decide, decider, Phase::Cancel),
        (Mode::Cancel, Some(_)) => (Mode::Cancel, StepIndex(0), Phase::Cancel),
        (Mode::Execute, _) | (Mode::Decide | Mode::Cancel, None) => {
            (Mode::Execute, StepIndex(0), Phase::Action)
        }
    };
    let ask = definition.step(index).map(|step| Ask { step, index, phase });
    Effects { token: Token { saga, mode, path: Path::new() }, ask, tell: None }
}

/// What to do about a reply.
///
/// # Errors
/// [`Illegal`] when the reply is none that this token can get.
pub fn advance<S: Copy>(
    definition: &Definition<S>,
    token: Token,
    reply: Reply,
) -> Result<Effects<S>, Illegal> {
    match token.mode {
        Mode::Decide => decide(definition, &token, &reply),
        Mode::Execute | Mode::Cancel => extend(definition, token, reply),
    }
}

/// The deciding step has answered whether the saga can still be cancelled: it is driven from its start, one way or
/// the other.
fn decide<S: Copy>(definition: &Definition<S>, token: &Token, reply: &Reply) -> Result<Effects<S>, Illegal> {
    let decider = definition.decider().ok_or(Illegal::NoSuchStep { step: reply.step })?;
    if !token.path.is_empty() {
        return Err(Illegal::PathBeforeDecision { length: token.path.len() });
    }
    if reply.step != decider {
        return Err(Illegal::WrongStep { expected: decider, got: reply.step });
    }
    if reply.phase != Phase::Cancel {
        return Err(Illegal::WrongPhase { step: reply.step, expected: Phase::Cancel, got: reply.phase });
    }
    match reply.outcome {
        Outcome::Done(_) => Ok(start(definition, token.saga, Mode::Execute)),
        Outcome::Rejected(_) => Ok(start(definition, token.saga, Mode::Cancel)),
        Outcome::Compensated => Err(Illegal::CompensatedWhileForward { step: reply.step }),
    }
}

/// The path grows by the reply; what is due next follows from where it then stands.
fn extend<S: Copy>(
    definition: &Definition<S>,
    mut token: Token,
    reply: Reply,
) -> Result<Effects<S>, Illegal> {
    let here = token.path.position(definition)?;
    let (_, expected) =
        due(here, token.mode).map_err(|end| Illegal::AfterTheEnd { end, step: reply.step })?;
    if reply.phase != expected {
        return Err(Illegal::WrongPhase { step: reply.step, expected, got: reply.phase });
    }
    let entry = Entry { step: reply.step, outcome: reply.outcome, at: reply.at };
    let next = here.after(definition, &entry)?;
    if token.mode == Mode::Cancel && passed_the_decider(definition, next) {
        return Err(Illegal::CommittedWhileCancelled);
    }
    token.path.push(entry);
    let (ask, tell) = match due(next, token.mode) {
        Ok((index, phase)) => (definition.step(index).map(|step| Ask { step, index, phase }), Standing::Open),
        Err(end) => (None, Standing::Ended(end)),
    };
    Ok(Effects { token, ask, tell: Some(tell) })
}

/// What is to be asked of whom, at a position; or how the saga ended.
fn due(position: Position, mode: Mode) -> Result<(StepIndex, Phase), End> {
    match (position, mode) {
        (Position::Forward(step), Mode::Cancel) => Ok((step, Phase::Cancel)),
        (Position::Forward(step), Mode::Execute | Mode::Decide) => Ok((step, Phase::Action)),
        (Position::Backward(step), _) => Ok((step, Phase::Compensation)),
        (Position::Ended(end), _) => Err(end),
    }
}

fn passed_the_decider<S: Copy>(definition: &Definition<S>, position: Position) -> bool {
    match position {
        Position::Forward(step) => definition.kind(step) == Some(Kind::Retriable),
        Position::Ended(end) => end == End::Committed,
        Position::Backward(_) => false,
    }
}

//! How far a saga is: the replies that count, in order, and what can be told from them.
//!
//! A path never loses an entry and never changes one; it only grows. Everything else that there is to know about
//! a saga's progress (direction, next step, end, history) is a function of it and of the definition.

use crate::definition::{Definition, Kind, StepIndex};
use crate::machine::Illegal;

/// Why a step said no.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reason {
    /// The saga was cancelled before the step was done. The step can never be done any more.
    Cancelled,
    /// The participant's own reason, in its own words.
    Refused(String),
}

impl std::fmt::Display for Reason {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Reason::Cancelled => f.write_str("cancelled"),
            Reason::Refused(why) => f.write_str(why),
        }
    }
}

/// A participant's answer, as it recorded it in the transaction that had the effect.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The step's effect is there. The bytes are for the steps behind it; the engine does not read them.
    Done(Vec<u8>),
    /// The step has had no effect and never will.
    Rejected(Reason),
    /// The step's effect, if there ever was one, is undone for good.
    Compensated,
}

/// One reply in a saga's path.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// The step that replied.
    pub step: StepIndex,
    /// What it replied.
    pub outcome: Outcome,
    /// When the participant recorded the reply, in Unix milliseconds by its own clock. Recorded with the reply, so
    /// that everyone who drives the saga tells the same time.
    pub at: u64,
}

/// The replies that count, in order. It grows by one with each step forward or back.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Path(Vec<Entry>);

impl Path {
    /// The path of a saga that has no reply yet.
    pub fn new() -> Path {
        Path::default()
    }

    /// The replies so far, oldest first.
    pub fn entries(&self) -> &[Entry] {
        &self.0
    }

    /// The number of replies so far. Of two paths of one saga, the longer one tells all that the shorter one does.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether no reply is in yet.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// What the step at this place handed on when it was done.
    pub fn data(&self, step: StepIndex) -> Option<&[u8]> {
        self.0.iter().find_map(|entry| match &entry.outcome {
            Outcome::Done(data) if entry.step == step => Some(data.as_slice()),
            _ => None,
        })
    }

    /// The first reason that a step gave for saying no; it is why the saga rolls back.
    pub fn rejection(&self) -> Option<&Reason> {
        self.0.iter().find_map(|entry| match &entry.outcome {
            Outcome::Rejected(reason) => Some(reason),
            Outcome::Done(_) | Outcome::Compensated => None,
        })
    }

    /// Where a saga with this path stands.
    ///
    /// # Errors
    /// [`Illegal`] when no saga of this definition can have this path.
    pub fn position<S: Copy>(&self, definition: &Definition<S>) -> Result<Position, Illegal> {
        self.0.iter().try_fold(Position::START, |position, entry| position.after(definition, entry))
    }

    pub(crate) fn push(&mut self, entry: Entry) {
        self.0.push(entry);
    }
}

impl FromIterator<Entry> for Path {
    fn from_iter<I: IntoIterator<Item = Entry>>(entries: I) -> Path {
        Path(entries.into_iter().collect())
    }
}

/// How a saga ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum End {
    /// Every step is done, for good.
    Committed,
    /// A step was rejected, and every step done before it is undone, for good.
    Aborted,
}

/// Where a saga stands: a function of its path.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Position {
    /// The step's effect is asked for next.
    Forward(StepIndex),
    /// The step's effect is to be undone next.
    Backward(StepIndex),
    /// Nothing is to be done any more.
    Ended(End),
}

impl Position {
    /// Where every saga starts.
    pub const START: Position = Position::Forward(StepIndex(0));

    /// Where a saga stands after one more reply. The one match over position and reply; what it does not
    /// allow, nothing allows.
    ///
    /// # Errors
    /// [`Illegal`] when this reply cannot come here.
    pub fn after<S: Copy>(self, definition: &Definition<S>, entry: &Entry) -> Result<Position, Illegal> {
        use {Outcome::*, Position::*};
        match (self, &entry.outcome) {
            (Ended(end), _) => Err(Illegal::AfterTheEnd { end, step: entry.step }),
            (Forward(step) | Backward(step), _) if step != entry.step => {
                Err(Illegal::WrongStep { expected: step, got: entry.step })
            }
            (Forward(step), Done(_)) => Ok(match StepIndex(step.0 + 1) {
                next if next.at() < definition.len() => Forward(next),
                _ => Ended(End::Committed),
            }),
            (Forward(step), Rejected(_)) => match definition.kind(step) {
                Some(Kind::Compensatable | Kind::Pivot) => Ok(Position::back_from(step)),
                Some(Kind::Retriable) => Err(Illegal::RetriableRejected { step }),
                None => Err(Illegal::NoSuchStep { step }),
            },
            (Forward(step), Compensated) => Err(Illegal::CompensatedWhileForward { step }),
            (Backward(step), Compensated) => Ok(Position::back_from(step)),
            (Backward(step), Done(_) | Rejected(_)) => Err(Illegal::ActionReplyWhileBackward { step }),
        }
    }

    fn back_from(step: StepIndex) -> Position {
        match step.0.checked_sub(1) {
            Some(before) => Position::Backward(StepIndex(before)),
            None => Position::Ended(End::Aborted),
        }
    }
}

/// What the one who started a saga is told of a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Status {
    /// The step is being asked for.
    Execute,
    /// The step is done.
    Success,
    /// The step said no.
    Failed,
    /// The step is undone.
    RolledBack,
}

/// One line of a saga's history.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Event<'p, S> {
    /// The step it is about.
    pub step: S,
    /// What happened.
    pub status: Status,
    /// When, in Unix milliseconds: a time that was recorded with a reply, or the saga's start.
    pub at: u64,
    /// Why, where the step said no.
    pub reason: Option<&'p Reason>,
}

/// A saga's history: a pure function of its path, so that everybody who has the path tells the same.
///
/// The history of a path is the beginning of the history of every longer one. An event's place in it, from 1, is its
/// sequence number. No event precedes its effect: "rolled back" is told when the compensation's reply is in.
///
/// # Errors
/// [`Illegal`] when no saga of this definition can have this path.
pub fn events<'p, S: Copy>(
    definition: &Definition<S>,
    started_at: u64,
    path: &'p Path,
) -> Result<Vec<Event<'p, S>>, Illegal> {
    let name = |step| definition.step(step).ok_or(Illegal::NoSuchStep { step });
    let mut events = Vec::with_capacity(2 * path.len() + 1);
    events.push(Event { step: name(StepIndex(0))?, status: Status::Execute, at: started_at, reason: None });
    let mut position = Position::START;
    for entry in path.entries() {
        position = position.after(definition, entry)?;
        let (status, reason) = match &entry.outcome {
            Outcome::Done(_) => (Status::Success, None),
            Outcome::Rejected(reason) => (Status::Failed, Some(reason)),
            Outcome::Compensated => (Status::RolledBack, None),
        };
        events.push(Event { step: name(entry.step)?, status, at: entry.at, reason });
        if let Position::Forward(next) = position {
            events.push(Event { step: name(next)?, status: Status::Execute, at: entry.at, reason: None });
        }
    }
    Ok(events)
}

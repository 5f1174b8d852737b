//! Runs a participant of sagas: takes commands in batches, has their effects and records their replies in ONE local
//! transaction, publishes what the replies call for ([`drive`]), and only then acknowledges the commands.
//!
//! A participant implements [`Participant`]: how to have a step's effect, and how to undo it, for a set of commands at
//! once. Everything else is here: which commands need an effect at all ([`barrier`]), what is answered when
//! one comes twice, late or too early, and what happens when something fails ([`run`]).
//!
//! # What never happens
//!
//! - A step of a saga never has its effect twice in what is committed, nor after it has been compensated or cancelled.
//! - Two replies to one command never differ: the second one is the first one's bytes.
//! - A failure that is no business answer (a full disk, a lost connection, a bug) never becomes a rejection. The command
//!   comes again, and the bus counts how often.
//! - One bad command never holds up its neighbours.

pub mod barrier;
mod batch;
mod runner;

use bytes::Bytes;
use saga::{Path, StepIndex};
use wire::time::UnixMillis;

pub use batch::{Answer, Command, handle, handle_unseen};
pub use drive::{Book, Bounds};
pub use runner::{Parts, Settings, run};

/// The business of one participant. One implementation may serve several steps, of several sagas.
///
/// The methods run on a database thread inside the transaction that will also record their replies. They decide
/// only by what they read in it and by what they are given: no clock, no network.
pub trait Participant: Send + Sync + 'static {
    /// A saga's input as this participant understands it.
    type Input: Send + Sync + 'static;

    /// What a transaction changed, for whoever keeps copies of it; `()` where nobody does.
    type Changes: Default + Send + 'static;

    /// Understands a saga's input.
    ///
    /// # Errors
    /// [`BadInput`] sets the command aside as a dead letter: it will never be understood. It is not a rejection.
    fn read(&self, input: &Bytes) -> Result<Self::Input, BadInput>;

    /// Has the effect of each command, or says no. The answers are in the order of the work, one for each.
    ///
    /// Each saga is in the work at most once, and none of it has been done before in a transaction that was kept; where that turns out to
    /// be wrong, this one is not kept ([`handle_unseen`]). A command that is rejected or to be
    /// retried must leave no effect, and must not spoil the others.
    ///
    /// # Errors
    /// A database error rolls the whole transaction back; all of the work comes again.
    fn act(
        &self,
        tx: &mut db::Tx<'_>,
        work: &[Work<'_, Self::Input>],
        changes: &mut Self::Changes,
    ) -> Result<Vec<Outcome>, db::Error>;

    /// Undoes the effect of each command, which is there. The answers are in the order of the work, one for each.
    ///
    /// # Errors
    /// As [`Participant::act`].
    fn undo(
        &self,
        tx: &mut db::Tx<'_>,
        work: &[Work<'_, Self::Input>],
        changes: &mut Self::Changes,
    ) -> Result<Vec<Undone>, db::Error>;

    /// Every saga below this id has ended, for good: none of its commands comes any more. Called now and then, in a transaction.
    ///
    /// # Errors
    /// As [`Participant::act`].
    fn ended_below(&self, _tx: &mut db::Tx<'_>, _below: u64) -> Result<(), db::Error> {
        Ok(())
    }

    /// What was changed is now committed. Called before any reply is published, in the order of the commits, not on a
    /// database thread; it is skipped if the process dies in between.
    fn committed(&self, _changes: Self::Changes) {}
}

/// One command that needs an effect.
#[derive(Debug)]
pub struct Work<'a, I> {
    /// The saga's id: a natural key for what the step creates.
    pub saga: u64,
    /// The step asked for.
    pub step: StepIndex,
    /// The replies so far, with what earlier steps handed on.
    pub path: &'a Path,
    /// What the saga is about.
    pub input: &'a I,
    /// The time that will be recorded with the reply.
    pub now: UnixMillis,
}

/// What came of an action.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The effect is there. The bytes are for later steps.
    Done(Vec<u8>),
    /// A business answer: no, for this reason, for good.
    Rejected(String),
    /// No answer yet, for this reason. The command comes again; nothing is recorded.
    Retry(String),
}

/// What came of a compensation. There is no saying no.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Undone {
    /// The effect is gone.
    Done,
    /// Not yet, for this reason. The command comes again; nothing is recorded.
    Retry(String),
}

/// A saga's input that this participant will never understand.
#[derive(Debug, thiserror::Error)]
#[error("the input of the saga cannot be read: {0}")]
pub struct BadInput(#[source] pub Box<dyn std::error::Error + Send + Sync>);

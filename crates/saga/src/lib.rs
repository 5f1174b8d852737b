//! A saga engine: what a saga is, how far it is, and what to do next. Pure functions over plain data.
//!
//! A saga makes a change that spans several services all-or-nothing without a lock across them (Garcia-Molina and
//! Salem, *Sagas*, SIGMOD 1987): it runs as a sequence of local transactions, and when one says no,
//! those before it are compensated, in reverse.
//!
//! This crate decides; it never acts. It has no dependencies and knows no clock, socket, thread, database or
//! message format. Its parts:
//!
//! - [`Definition`]: the steps, under a name and a version. Compensatable ones, at most one pivot, retriable ones; any
//!   other order does not compile.
//! - [`Path`]: the replies so far. A saga's whole state, and its history ([`events`]).
//! - [`start`] and [`advance`]: from a message to the [`Effects`] to carry out.
//!
//! # What the caller owes
//!
//! The engine is right if its surroundings keep three promises:
//!
//! 1. **Participants answer a repeated command with their recorded reply**, and keep to the table of the `participant`
//!    crate for compensations and cancellations that come early. So at most one effect per step and phase.
//! 2. **Messages are delivered at least once, or the saga is started again.** Duplicates, delays and any order are fine.
//!    What was lost comes back by a new start message, from whoever keeps the list of open sagas.
//! 3. **Effects are published before the message that caused them is acknowledged.**
//!
//! In return a saga has exactly one path, whoever drives it, how often, and in whichever [`Mode`]: it ends
//! committed with every step done, or aborted with every step undone.
//!
//! # A saga in thirty lines
//!
//! ```
//! use saga::*;
//!
//! let trip = Definition::new("trip", 1).compensatable("flight").compensatable("hotel").pivot("card").build();
//!
//! // A stand-in for the participants: the hotel is full.
//! let answer = |ask: &Ask<&str>| match (ask.step, ask.phase) {
//!     (_, Phase::Compensation) => Outcome::Compensated,
//!     ("hotel", _) => Outcome::Rejected(Reason::Refused("no room left".into())),
//!     _ => Outcome::Done(Vec::new()),
//! };
//!
//! let mut effects = start(&trip, 42, Mode::Execute);
//! let mut now = 1_000;
//! while let Some(ask) = effects.ask {
//!     now += 1;
//!     let reply = Reply { step: ask.index, phase: ask.phase, outcome: answer(&ask), at: now };
//!     effects = advance(&trip, effects.token, reply)?;
//! }
//! assert_eq!(effects.tell, Some(Standing::Ended(End::Aborted)));
//!
//! let history: Vec<_> = events(&trip, 1_000, &effects.token.path)?
//!     .iter().map(|event| (event.step, event.status)).collect();
//! assert_eq!(history, [
//!     ("flight", Status::Execute), ("flight", Status::Success),
//!     ("hotel", Status::Execute), ("hotel", Status::Failed),
//!     ("flight", Status::RolledBack),
//! ]);
//! # Ok::<(), Illegal>(())
//! ```
//!
//! `examples/trip.rs` has the same saga with participants that keep their replies, and messages that come twice, late
//! and out of order.

mod definition;
mod machine;
mod path;

pub use definition::{Builder, Decided, Definition, Empty, Kind, MAX_STEPS, StepIndex, Undecided};
pub use machine::{Ask, Effects, Illegal, Mode, Phase, Reply, Standing, Token, advance, start};
pub use path::{End, Entry, Event, Outcome, Path, Position, Reason, Status, events};

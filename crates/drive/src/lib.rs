//! Drives sagas from message to message: asks the engine what a message or a recorded reply calls for ([`Book`]), publishes
//! all of it ([`Frames`]), and holds back for a moment what may be lost ([`Reports`]).
//!
//! Whoever has what a saga needs to go on may drive it, because everything is in the message: the service that starts it, the
//! participant that has just recorded a reply, or an orchestrator that is told of either, which costs a message and its handling
//! more. All do the same, and one saga may be driven by several at once.
//!
//! What never happens: the success of one frame hides the refusal of another. What called for a message that the bus refuses comes
//! again, unless a later message implies that one, or it has come [`Bounds::drop_after_deliveries`] times already.
//!
//! Why a message is dropped in the end: two queues may be full of what calls for messages in the other one. Neither would ever
//! move again. A saga whose message was dropped is started again by whoever keeps the list of open sagas, as after any loss.

mod frames;
mod plan;
mod reports;

pub use frames::{Bounds, Frames, Refusal, TooLarge};
pub use plan::{Answered, Book, Messages, Outgoing, Refused, is_old_report};
pub use reports::{Due, Reports};

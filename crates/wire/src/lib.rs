//! What crosses a process, whoever's sagas they are: ids, times, messages.
//!
//! Nothing here decides anything. A message that cannot be understood is an error that says why, never a default.

pub mod ids;
pub mod messages;
pub mod time;

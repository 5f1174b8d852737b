//! Copies of what is in the databases, in process and in Redis, and a filter that knows what is not there.
//!
//! The databases are the truth. Redis may be absent, late, cut off from some, emptied or replaced by a replica that is behind: then
//! answers are slower, never different. What that takes depends on what is copied:
//!
//! | what | copies | kept right by |
//! |---|---|---|
//! | what never changes (products' facts, payments, orders whose saga has ended) | [`Copies`]: in process and in Redis; [`Level2`]: in Redis | nothing: a copy is as good as the row |
//! | what changes (what is left of a product, customers' data) | [`Fenced`]: in Redis alone | versions and fences, and the agreement of [`life`] |
//! | that a row is not there | [`Members`]: in process | an agreement on which ids are used up, see [`members`] |
//!
//! What never happens:
//! - "There is no such thing" is remembered from one question for another one.
//! - Somebody is shown something that is older than what anybody was shown before.
//! - A copy is handed out without the owner that it belongs to: whether the one who asks may see it is decided by who reads the copy.
//! - Credentials are copied.
//! - A client waits for Redis longer than one time-out of one command, or sees an error of it.
//!
//! Nothing that changes is kept in process, so there are no messages that invalidate it, and no subscription that may break: a message
//! comes after the commit, and so after somebody may have been shown what it is about.
//!
//! Copies run out after a while; that is a backstop against what nobody has thought of, and no part of the argument.

pub mod copies;
pub mod fenced;
pub mod level2;
pub mod life;
pub mod mark;
pub mod members;
pub mod record;
pub mod redis;

pub use copies::{Copies, Loaded};
pub use fenced::{Fenced, Looked};
pub use level2::Level2;
pub use life::Life;
pub use members::Members;
pub use record::Record;
pub use redis::{Redis, Unanswered};

//! Everything between a socket and a service's handlers: the server and its limits, the edge around a router,
//! extractors and errors of the HTTP API, token verification, the admin door.
//!
//! It knows the API's conventions (JSON bodies, `{"msg": ...}` errors, bearer tokens) and no service. What
//! never happens here: a wait, a queue, a cache or a body without a bound; a handler that sees a request
//! before its limits were checked; an internal error's detail in an answer.

pub mod admin;
pub mod auth;
pub mod deadline;
pub mod edge;
pub mod error;
pub mod extract;
pub mod keys;
pub mod random;
mod remembered;
pub mod server;

pub use auth::{Claims, Customer, Keeper, KeySet, PublicKey, Verifier};
pub use error::ApiError;
pub use extract::{Id, Json, Page};
pub use random::Random;
pub use server::{Limits, serve};

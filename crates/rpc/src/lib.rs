//! gRPC between services: the services that are offered, and clients that ask any of several replicas.
//!
//! The messages are those of `proto/*.proto`, wire-compatible with the system that this shop succeeds. Code for them is
//! generated once and committed (`src/generated`; a test holds it against the protos), so that no build needs a generator.
//!
//! What never happens: a token that does not count is answered with anything but UNAUTHENTICATED; an internal error's text
//! reaches a caller; a call of ours without a deadline; work that is begun for a caller whose deadline has passed; a question that changes something is
//! asked twice (all of these only read).

mod ask;
mod client;
mod health;
mod server;

pub use ask::{CALL_TIMEOUT, channel};
pub use client::{check_products, get_products};
pub use health::{MAX_WATCHERS, health};
pub use server::{auth_service, product_service, reflection};

/// Messages and services, as generated.
#[allow(missing_docs, clippy::all, clippy::pedantic, unreachable_pub, reason = "generated")]
pub mod generated {
    /// Package `auth`.
    pub mod auth {
        include!("generated/auth.rs");
    }
    /// Package `product`.
    pub mod product {
        include!("generated/product.rs");
    }
    /// All of them, as a `FileDescriptorSet`, with package `purchase`, of which no service is.
    pub const DESCRIPTORS: &[u8] = include_bytes!("generated/descriptors.bin");
}

//! The gateway over real sockets, before replicas that live, die, stall and stop.

#![allow(clippy::unwrap_used, reason = "a test panics where something is not as it should be")]

mod fixture;
mod grpc;
mod health;
mod passing;
mod streams;

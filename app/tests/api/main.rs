//! The HTTP API of the real program, row by row: every success with its exact fields and types, every refusal with its
//! status and its exact body, and what must not be possible at all.
//!
//! One shop serves all tests that can live with its defaults, each with customers and products of its own; the others
//! start one with the settings that they are about. What never happens: a test that depends on another one, or on
//! what another one left behind.

#![allow(
    clippy::unwrap_used,
    reason = "an unwrap that fails is a test that fails, in a helper of tests, too"
)]

mod account;
mod auth;
mod bodies;
mod catalog;
mod edge;
mod fixture;
mod lookups;
mod operator;
mod purchase;
mod stream;

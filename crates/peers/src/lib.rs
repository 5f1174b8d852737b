//! The replicas of another service: where they are, which of them can be reached, and which one is asked next.
//!
//! A service's replicas are given as addresses ([`Addresses`]): `host:port`, separated by commas. A host that is a
//! name is resolved again and again, and each address behind it is a replica. [`Peers::pick`] chooses among those
//! that can be reached. Whoever finds that one cannot says so ([`Picked::unreachable`]); it is then left out, and
//! [`Peers::run`] asks it, at growing intervals, until it answers. So no customer's request is spent on finding out, unless there is
//! nobody else to ask ([`Peers::pick_lost`]).
//!
//! What never happens: a replica that could not be reached is picked by [`Peers::pick`] before it has answered; a wait, a lock that is held for longer
//! than a copy takes, or a system call in `pick`; a name that cannot be resolved takes away the addresses that are known.

mod address;
mod choice;
mod replicas;

pub use address::{AddressError, Addresses};
pub use choice::Choice;
pub use replicas::{CHECK_INTERVAL, CONNECT_TIMEOUT, Peers, Picked, RESOLVE_INTERVAL};

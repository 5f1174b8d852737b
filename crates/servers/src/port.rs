//! Ports for servers, which stay theirs while they are down.

use std::fs;
use std::net::{Ipv4Addr, TcpListener};

use crate::{Error, random};

/// The lowest port that is tried.
const LOWEST: u16 = 10_000;
/// Where outgoing connections begin if the system does not tell.
const USUAL_EPHEMERAL: u16 = 32_768;
/// How many ports are tried before giving up.
const TRIES: u16 = 500;
/// A second loopback address. Who listens on a port there has reserved it here.
const RESERVATIONS: Ipv4Addr = Ipv4Addr::new(127, 83, 71, 76);

/// A port of 127.0.0.1 that was free, and that no other owner of a `Port` uses, in this process or another.
///
/// It lies below those that the system gives to outgoing connections: so a server that was killed finds it free when it is
/// started again, whoever connects to whatever in the meantime.
#[derive(Debug)]
pub(crate) struct Port {
    number: u16,
    /// Given back by the system however this process ends.
    _reservation: TcpListener,
}

impl Port {
    /// Takes one.
    pub(crate) fn take() -> Result<Port, Error> {
        let span = ephemeral().saturating_sub(LOWEST).max(1);
        let random = u16::from_str_radix(&random::hex(2)?, 16).unwrap_or_default();
        // An odd step that is no divisor: two processes that meet once do not meet again at the next try.
        let step = 2 * (random % 499) + 1;
        let first = LOWEST + random % span;
        (0..TRIES)
            .map(|n| {
                LOWEST
                    + ((u32::from(first - LOWEST) + u32::from(n) * u32::from(step)) % u32::from(span)) as u16
            })
            .find_map(|number| {
                let reservation = TcpListener::bind((RESERVATIONS, number)).ok()?;
                // Bound for a moment only: the server is to have it.
                TcpListener::bind((Ipv4Addr::LOCALHOST, number)).ok()?;
                Some(Port { number, _reservation: reservation })
            })
            .ok_or(Error::NoPort)
    }

    /// Takes some.
    pub(crate) fn take_many(count: usize) -> Result<Vec<Port>, Error> {
        (0..count).map(|_| Port::take()).collect()
    }

    pub(crate) fn number(&self) -> u16 {
        self.number
    }
}

/// Where the ports of outgoing connections begin.
fn ephemeral() -> u16 {
    let range = fs::read_to_string("/proc/sys/net/ipv4/ip_local_port_range").unwrap_or_default();
    range.split_whitespace().next().and_then(|low| low.parse().ok()).unwrap_or(USUAL_EPHEMERAL)
}

/// How often a start is tried that finds its port taken by somebody who reserves none.
const CLASHES: usize = 5;

/// Starts something on free ports, and on others if somebody was quicker.
pub(crate) fn without_clash<T>(mut start: impl FnMut() -> Result<T, Error>) -> Result<T, Error> {
    for _ in 1..CLASHES {
        match start() {
            Err(error) if error.is_port_clash() => {}
            result => return result,
        }
    }
    start()
}

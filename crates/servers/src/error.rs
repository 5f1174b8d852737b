//! Why there is no server.

use std::fmt;
use std::io;
use std::process::ExitStatus;
use std::time::Duration;

/// What went wrong.
#[derive(Debug)]
pub enum Error {
    /// A program is not on this machine.
    Missing {
        /// Its name.
        program: &'static str,
        /// How to get it.
        install: &'static str,
    },
    /// A program is there, and too old.
    TooOld {
        /// Where it is.
        program: String,
        /// What it says that it is.
        found: String,
        /// The oldest version that will do.
        needed: &'static str,
        /// How to get it.
        install: &'static str,
    },
    /// The system refused.
    Io {
        /// What was to be done.
        what: String,
        /// Why not.
        source: io::Error,
    },
    /// A server ended by itself.
    Ended {
        /// Which.
        server: String,
        /// How.
        status: ExitStatus,
        /// The end of its log.
        log: String,
    },
    /// Something did not come to be in time.
    Late {
        /// What was waited for.
        what: String,
        /// For how long.
        limit: Duration,
        /// The end of the log of the server that is concerned.
        log: String,
    },
    /// A command failed.
    Command {
        /// What it was for.
        what: String,
        /// How it ended.
        status: ExitStatus,
        /// What it wrote to standard error.
        stderr: String,
    },
    /// A server refused a request, or answered something that makes no sense.
    Refused {
        /// What was asked.
        request: String,
        /// What it said.
        answer: String,
    },
    /// A server that should run does not.
    NotRunning {
        /// Which.
        server: String,
    },
    /// A server runs that should not.
    Running {
        /// Which.
        server: String,
    },
    /// No free port was found.
    NoPort,
    /// The address of a server cannot be used. The address itself is not shown: it may hold a password.
    Address {
        /// What is wrong with it.
        reason: &'static str,
    },
}

impl Error {
    /// For `map_err`: what was to be done when the system refused.
    pub(crate) fn io(what: impl Into<String>) -> impl FnOnce(io::Error) -> Error {
        move |source| Error::Io { what: what.into(), source }
    }

    /// Whether a server ended because somebody else listens on its port.
    pub(crate) fn is_port_clash(&self) -> bool {
        match self {
            Error::Ended { log, .. } => log.to_lowercase().contains("address already in use"),
            Error::Io { source, .. } => source.kind() == io::ErrorKind::AddrInUse,
            _ => false,
        }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Error::Missing { program, install } => write!(f, "{program} is not installed: {install}"),
            Error::TooOld { program, found, needed, install } => {
                write!(f, "{program} is {found}, and {needed} or newer is needed: {install}")
            }
            Error::Io { what, source } => write!(f, "cannot {what}: {source}"),
            Error::Ended { server, status, log } => write!(f, "{server} ended, {status}:\n{log}"),
            Error::Late { what, limit, log } => write!(f, "not within {limit:?}: {what}\n{log}"),
            Error::Command { what, status, stderr } => write!(f, "cannot {what}: {status}:\n{stderr}"),
            Error::Refused { request, answer } => write!(f, "the answer to {request:?} was {answer:?}"),
            Error::NotRunning { server } => write!(f, "{server} does not run"),
            Error::Running { server } => write!(f, "{server} runs"),
            Error::NoPort => write!(f, "no free port on 127.0.0.1"),
            Error::Address { reason } => write!(f, "the address of a server cannot be used: {reason}"),
        }
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Error::Io { source, .. } => Some(source),
            _ => None,
        }
    }
}

//! A Redis.

use std::net::{Ipv4Addr, SocketAddr};
use std::path::Path;
use std::time::Duration;

use crate::port::{self, Port};
use crate::process::Process;
use crate::{Error, Reply, program, resp};

/// How long a start may take, on a busy machine.
const START_LIMIT: Duration = Duration::from_secs(30);

/// A cache's settings: nothing is kept on disk, so a Redis that was killed comes back empty.
const SETTINGS: &[&str] = &[
    "--bind",
    "127.0.0.1",
    "--save",
    "",
    "--appendonly",
    "no",
    "--maxmemory",
    "256mb",
    "--maxmemory-policy",
    "allkeys-lru",
    "--repl-diskless-sync-delay",
    "0",
];

/// A Redis on a free port of 127.0.0.1. It keeps nothing on disk, and is killed when this is dropped.
#[derive(Debug)]
pub struct Redis {
    process: Process,
    port: Port,
}

impl Redis {
    /// Starts one and waits until it answers.
    ///
    /// # Errors
    /// [`Error::Missing`], [`Error::TooOld`]; others when it does not start.
    pub fn start() -> Result<Redis, Error> {
        let program = program::redis()?;
        port::without_clash(|| Redis::start_on(Port::take()?, "Redis", &program, &[]))
    }

    /// Starts one on this port, with further settings.
    pub(crate) fn start_on(
        port: Port,
        name: &str,
        program: &Path,
        settings: &[&str],
    ) -> Result<Redis, Error> {
        let mut process = Process::new(name, program)?;
        let number = port.number().to_string();
        process.set_args([&["--port", &number], SETTINGS, settings].concat());
        let redis = Redis { process, port };
        redis.restart()?;
        Ok(redis)
    }

    /// `redis://127.0.0.1:PORT`.
    pub fn url(&self) -> String {
        format!("redis://{}", self.socket_addr())
    }

    /// Where it listens: what a [`Proxy`](crate::Proxy) wants to know.
    pub fn socket_addr(&self) -> SocketAddr {
        (Ipv4Addr::LOCALHOST, self.port.number()).into()
    }

    /// Its process id, while it runs.
    pub fn pid(&self) -> Option<u32> {
        self.process.pid()
    }

    /// Whether its process is there.
    pub fn is_running(&self) -> bool {
        self.process.is_running()
    }

    /// The end of its log.
    pub fn log(&self) -> String {
        self.process.log_end()
    }

    /// Sends one command.
    ///
    /// # Errors
    /// [`Error::Io`] when there is no answer, [`Error::Refused`] when it is refused.
    pub fn call(&self, words: &[&str]) -> Result<Reply, Error> {
        let request = words.join(" ");
        match resp::call(self.socket_addr(), words) {
            Ok(Reply::Refused(answer)) => Err(Error::Refused { request, answer }),
            Ok(reply) => Ok(reply),
            Err(error) => Err(Error::io(format!("ask {} {request:?}", self.process.name()))(error)),
        }
    }

    /// Sends one command whose answer is text.
    pub(crate) fn ask(&self, words: &[&str]) -> Result<String, Error> {
        match self.call(words)? {
            Reply::Text(text) => Ok(text),
            other => Err(Error::Refused { request: words.join(" "), answer: format!("{other:?}") }),
        }
    }

    /// Deletes everything in it.
    ///
    /// # Errors
    /// As [`Redis::call`].
    pub fn flush_all(&self) -> Result<(), Error> {
        self.call(&["FLUSHALL"]).map(|_| ())
    }

    /// SIGKILL. Returns when it is gone, and with it all that it held.
    ///
    /// # Errors
    /// When the system does not let it.
    pub fn kill(&self) -> Result<(), Error> {
        self.process.kill()
    }

    /// SIGTERM. Returns when it is gone, and with it all that it held.
    ///
    /// # Errors
    /// When it does not end.
    pub fn stop(&self) -> Result<(), Error> {
        self.process.stop()
    }

    /// Starts it again, on the same port, and waits until it answers.
    ///
    /// # Errors
    /// [`Error::Running`] if it runs; others when it does not start.
    pub fn restart(&self) -> Result<(), Error> {
        let answers = || {
            resp::call(self.socket_addr(), &["PING"]).is_ok_and(|reply| reply == Reply::Text("PONG".into()))
        };
        self.process.start(START_LIMIT, answers)
    }

    /// SIGSTOP: connections stay open, and nobody answers.
    ///
    /// # Errors
    /// [`Error::NotRunning`] if it does not run.
    pub fn pause(&self) -> Result<(), Error> {
        self.process.pause()
    }

    /// SIGCONT.
    ///
    /// # Errors
    /// [`Error::NotRunning`] if it does not run.
    pub fn resume(&self) -> Result<(), Error> {
        self.process.resume()
    }

    /// Waits for something that this server has to bring about.
    pub(crate) fn wait_until(
        &self,
        what: &str,
        limit: Duration,
        holds: impl FnMut() -> bool,
    ) -> Result<(), Error> {
        self.process.wait_until(what, limit, holds)
    }
}

//! A link to Redis that never holds anybody up: a Redis Cluster or a plain Redis, which it finds out by itself.
//!
//! [`Redis::connect`] returns at once, whether or not Redis is there. While it is not, every command fails at once with
//! [`Unanswered`], which callers take for a miss; it is tried again in the background. A Redis that stalls costs those who wait
//! for it then one [`Settings::command_timeout`]; whoever comes later does not wait.

mod connection;
mod inspect;
mod key;
mod link;
mod script;
mod settings;
mod stream;

use std::sync::Arc;
use std::time::Duration;

use redis::{Cmd, Value};
use tokio_util::sync::{CancellationToken, DropGuard};

pub use inspect::{Found, Inspection, inspect};
pub(crate) use key::{BUCKETS, Key};
use link::Link;
pub(crate) use script::{Argument, Script};
pub use settings::{Settings, SettingsError};
pub use stream::{Begin, Entry, EntryId, Follower};

/// A handle to Redis. Clones share its connections; the last one that is dropped ends them.
#[derive(Clone)]
pub struct Redis {
    link: Arc<Link>,
    _keeper: Arc<DropGuard>,
}

/// Why Redis gave no answer. Callers of a cache take it for a miss.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Unanswered {
    /// It is not connected, or has not answered lately.
    #[error("Redis is not reachable")]
    Down,
    /// Too many commands are on their way already.
    #[error("{bound} commands to Redis are on their way already")]
    Busy {
        /// [`Settings::commands_in_flight`].
        bound: usize,
    },
    /// The connection failed, or there was no answer in time. Whether the command was carried out is not known.
    #[error("Redis did not answer: {0}")]
    Broken(String),
    /// It does not know the script.
    #[error("Redis does not know the script")]
    NoScript,
    /// It answered with an error.
    #[error("Redis refused: {0}")]
    Refused(String),
    /// It answered something else than what the command is for.
    #[error("Redis answered something unexpected to {0}")]
    Unexpected(&'static str),
    /// More than [`MAX_VALUE_BYTES`].
    #[error("a value of {bytes} bytes is too large for Redis; {MAX_VALUE_BYTES} is the most")]
    TooLarge {
        /// Its size.
        bytes: usize,
    },
}

/// The largest value sent, in bytes.
pub const MAX_VALUE_BYTES: usize = 4 << 20;

impl Redis {
    /// Begins to connect, and returns at once. Must be called on a tokio runtime.
    pub fn connect(settings: Settings) -> Redis {
        let link = Link::new(settings);
        let stop = CancellationToken::new();
        tokio::spawn(link.clone().keep(stop.clone()));
        Redis { link, _keeper: Arc::new(stop.drop_guard()) }
    }

    /// Where it is, without passwords.
    pub fn settings(&self) -> &Settings {
        &self.link.settings
    }

    /// Whether all of it answers, as far as is known.
    pub fn is_up(&self) -> bool {
        *self.link.healthy().borrow()
    }

    /// Waits until all of it answers, or until the time is over, and tells which.
    pub async fn wait_until_up(&self, at_most: Duration) -> bool {
        let mut healthy = self.link.healthy();
        let up = async { healthy.wait_for(|up| *up).await.is_ok() };
        tokio::time::timeout(at_most, up).await.unwrap_or(false)
    }

    /// Whether it is a cluster; none while that is not known.
    pub fn is_cluster(&self) -> Option<bool> {
        self.link.is_cluster()
    }

    pub(crate) fn prefix(&self) -> &str {
        &self.link.settings.prefix
    }

    /// Sends one command about this key.
    pub(crate) async fn send(&self, key: &Key, command: Cmd) -> Result<Value, Unanswered> {
        self.link.send(key.bucket, |_| command).await
    }

    /// Sends one command about keys of this bucket, which depends on the server process that will carry it out.
    pub(crate) async fn send_to_process(
        &self,
        bucket: usize,
        command: impl FnOnce(&str) -> Cmd,
    ) -> Result<Value, Unanswered> {
        self.link.send(bucket, command).await
    }

    /// Sends one command for each bucket, given its place and the server process that will carry it out: as many round trips as nodes, all
    /// at once. One failure spoils no other.
    pub(crate) async fn send_all(
        &self,
        buckets: &[usize],
        command: impl Fn(usize, &str) -> Cmd,
    ) -> Vec<Result<Value, Unanswered>> {
        self.link.send_all(buckets, command).await
    }

    /// As [`Redis::send_all`], for scripts: `call` is asked for the short form, and for the full one where a server does not know the
    /// script.
    pub(crate) async fn run_all(
        &self,
        buckets: &[usize],
        call: impl Fn(usize, &str, bool) -> Cmd,
    ) -> Vec<Result<Value, Unanswered>> {
        let mut answers = self.send_all(buckets, |place, process| call(place, process, false)).await;
        let unknown: Vec<usize> =
            (0..answers.len()).filter(|place| answers[*place] == Err(Unanswered::NoScript)).collect();
        if !unknown.is_empty() {
            let again: Vec<usize> = unknown.iter().map(|place| buckets[*place]).collect();
            let told = self.send_all(&again, |index, process| call(unknown[index], process, true)).await;
            for (place, answer) in unknown.into_iter().zip(told) {
                answers[place] = answer;
            }
        }
        answers
    }
}

fn check_size(bytes: usize) -> Result<(), Unanswered> {
    if bytes > MAX_VALUE_BYTES { Err(Unanswered::TooLarge { bytes }) } else { Ok(()) }
}

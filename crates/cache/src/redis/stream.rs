//! Streams: what one process appends, all that follow it read.
//!
//! A stream is news, not truth: it is trimmed, and it goes with Redis. Who follows one must have another way to what it says.

use std::time::Duration;

use bytes::Bytes;
use redis::Value;
use redis::aio::MultiplexedConnection;
use tokio::sync::mpsc;
use tokio_util::sync::{CancellationToken, DropGuard};

use super::connection::{Connection, ask};
use super::key::Key;
use super::settings::Settings;
use super::{Redis, Unanswered, check_size};

/// How long a follower's question waits for news in the server.
const BLOCK: Duration = Duration::from_secs(1);
/// Entries taken at once.
const COUNT: usize = 256;
/// Answers with entries that wait for their follower; beyond it the stream is not read.
const WAITING: usize = 8;
/// The field of an entry.
const FIELD: &str = "d";

/// An entry's place in its stream: milliseconds by the server's clock, and a number.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct EntryId {
    /// Unix milliseconds by the server's clock.
    pub millis: u64,
    /// Counts the entries of one millisecond.
    pub number: u64,
}

impl EntryId {
    fn parse(text: &[u8]) -> Option<EntryId> {
        let (millis, number) = std::str::from_utf8(text).ok()?.split_once('-')?;
        Some(EntryId { millis: millis.parse().ok()?, number: number.parse().ok()? })
    }
}

impl std::fmt::Display for EntryId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}-{}", self.millis, self.number)
    }
}

/// One entry of a stream.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Its place.
    pub id: EntryId,
    /// What was appended.
    pub bytes: Bytes,
}

/// Where a follower begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Begin {
    /// Behind what is there when it first reaches Redis.
    Now,
    /// Behind this entry; the default id is the beginning.
    After(EntryId),
}

impl Redis {
    /// Appends to a stream, which keeps about the newest `keep_entries`.
    ///
    /// # Errors
    /// [`Unanswered`]; after [`Unanswered::Broken`] it may have been appended.
    pub async fn append(&self, stream: &str, bytes: &[u8], keep_entries: u32) -> Result<EntryId, Unanswered> {
        check_size(bytes.len())?;
        let key = Key::of_name(self.prefix(), "stream", stream);
        let mut command = redis::cmd("XADD");
        command.arg(&key.text).arg("MAXLEN").arg("~").arg(keep_entries).arg("*").arg(FIELD).arg(bytes);
        let id = match self.send(&key, command).await? {
            Value::BulkString(id) => EntryId::parse(&id),
            Value::SimpleString(id) => EntryId::parse(id.as_bytes()),
            _ => None,
        };
        id.ok_or(Unanswered::Unexpected("XADD"))
    }

    /// Follows a stream, on a connection of its own. Must be called on a tokio runtime.
    pub fn follow(&self, stream: &str, begin: Begin) -> Follower {
        let after = match begin {
            Begin::Now => None,
            Begin::After(id) => Some(id),
        };
        let key = Key::of_name(self.prefix(), "stream", stream);
        let (sender, news) = mpsc::channel(WAITING);
        let stop = CancellationToken::new();
        let reader = Reader { settings: self.settings().clone(), key, connection: None, after };
        let stopped = stop.clone();
        tokio::spawn(async move { stopped.run_until_cancelled(reader.read_on(sender)).await });
        Follower { news, _stop: stop.drop_guard() }
    }
}

/// Follows one stream until it is dropped.
pub struct Follower {
    news: mpsc::Receiver<Result<Vec<Entry>, Unanswered>>,
    _stop: DropGuard,
}

impl Follower {
    /// The next entries, at least one, in their order: waits for them. It may be dropped and called again at any time.
    ///
    /// An error says once that the connection was lost, and that entries may be. It is connected again by itself, and goes on
    /// behind the last entry read, or from the beginning if the stream is shorter than that now, because Redis was emptied. So entries
    /// may come twice.
    ///
    /// # Errors
    /// [`Unanswered`].
    pub async fn next(&mut self) -> Result<Vec<Entry>, Unanswered> {
        self.news.recv().await.unwrap_or(Err(Unanswered::Down))
    }
}

/// Reads one stream.
struct Reader {
    settings: Settings,
    key: Key,
    connection: Option<MultiplexedConnection>,
    /// The last entry read; none before it first reached Redis.
    after: Option<EntryId>,
}

impl Reader {
    async fn read_on(mut self, news: mpsc::Sender<Result<Vec<Entry>, Unanswered>>) {
        let (min, max) = (self.settings.retry_min, self.settings.retry_max);
        let mut pause = min;
        loop {
            let read = self.read().await;
            match &read {
                Ok(entries) => {
                    pause = min;
                    match entries.last() {
                        None => continue,
                        Some(last) => self.after = Some(last.id),
                    }
                }
                Err(_) => self.connection = None,
            }
            let failed = read.is_err();
            // Once for each failure: what comes after it is news again.
            if (!failed || pause == min) && news.send(read).await.is_err() {
                return;
            }
            if failed {
                tokio::time::sleep(pause.mul_f64(0.5 + 0.5 * fastrand::f64())).await;
                pause = (pause * 2).min(max);
            }
        }
    }

    /// Asks once, and waits for at most [`BLOCK`].
    async fn read(&mut self) -> Result<Vec<Entry>, Unanswered> {
        let (mut connection, is_new) = match self.connection.clone() {
            Some(connection) => (connection, false),
            None => {
                let timeout = BLOCK + self.settings.command_timeout;
                let opened = Connection::open(&self.settings, timeout, None).await.map_err(broken)?;
                (opened.to(self.key.bucket).ok_or(Unanswered::Down)?.connection, true)
            }
        };
        let after = match self.after {
            Some(after) if !is_new => after,
            // Here for the first time, or again.
            known => self.place(&mut connection, known).await?,
        };
        self.after = Some(after);
        self.connection = Some(connection.clone());
        let mut command = redis::cmd("XREAD");
        command.arg("COUNT").arg(COUNT).arg("BLOCK").arg(BLOCK.as_millis() as u64);
        command.arg("STREAMS").arg(&self.key.text).arg(after.to_string());
        match ask(&mut connection, &command).await.map_err(broken)? {
            // Nothing is new, or nothing is above what was read before Redis was emptied.
            Value::Nil => {
                self.after = Some(self.place(&mut connection, Some(after)).await?);
                Ok(Vec::new())
            }
            answer => entries(answer).ok_or(Unanswered::Unexpected("XREAD")),
        }
    }

    /// Behind which entry to read on: the known one, unless the stream has been emptied since.
    async fn place(
        &self,
        connection: &mut MultiplexedConnection,
        known: Option<EntryId>,
    ) -> Result<EntryId, Unanswered> {
        let last = last_id(connection, &self.key).await?;
        Ok(known.map_or(last, |known| if last < known { EntryId::default() } else { known }))
    }
}

fn broken(error: redis::RedisError) -> Unanswered {
    Unanswered::Broken(error.to_string())
}

/// The last entry's id; the lowest, if there is none.
async fn last_id(connection: &mut MultiplexedConnection, key: &Key) -> Result<EntryId, Unanswered> {
    let mut command = redis::cmd("XREVRANGE");
    command.arg(&key.text).arg("+").arg("-").arg("COUNT").arg(1);
    let answer = ask(connection, &command).await.map_err(broken)?;
    let Value::Array(last) = answer else { return Err(Unanswered::Unexpected("XREVRANGE")) };
    let last =
        last.into_iter().map(entry).collect::<Option<Vec<_>>>().ok_or(Unanswered::Unexpected("XREVRANGE"))?;
    Ok(last.first().map_or(EntryId::default(), |entry| entry.id))
}

/// `[[key, [entry ...]]]`
fn entries(answer: Value) -> Option<Vec<Entry>> {
    let [stream] = <[Value; 1]>::try_from(array(answer)?).ok()?;
    let [_, entries] = <[Value; 2]>::try_from(array(stream)?).ok()?;
    array(entries)?.into_iter().map(entry).collect()
}

/// `[id, [field, value ...]]`
fn entry(answer: Value) -> Option<Entry> {
    let [id, fields] = <[Value; 2]>::try_from(array(answer)?).ok()?;
    let Value::BulkString(id) = id else { return None };
    let [_, bytes] = <[Value; 2]>::try_from(array(fields)?).ok()?;
    let Value::BulkString(bytes) = bytes else { return None };
    Some(Entry { id: EntryId::parse(&id)?, bytes: Bytes::from(bytes) })
}

fn array(value: Value) -> Option<Vec<Value>> {
    match value {
        Value::Array(values) => Some(values),
        _ => None,
    }
}

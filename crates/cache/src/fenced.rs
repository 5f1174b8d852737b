//! Copies in Redis of rows that change: never older than what anybody has been shown. See [`crate::life`] for why.
//!
//! A row has a version that rises with each change. Before a change is committed, while its row is locked, a **fence** is put in the copy's
//! place: the version that the row will have, without its content. From then on an older copy is refused, and readers ask the
//! database, until one of them has read that version there and puts its copy in the fence's place. If the change is
//! rolled back, the fence stays for a while, which costs reads of the database.
//!
//! No reader joins another one's question to the database: the answer might be older than what its own client has been shown.

use std::collections::BTreeMap;
use std::marker::PhantomData;
use std::sync::LazyLock;
use std::time::Duration;

use db::{Error, Tx};
use redis::Value;
use tokio::time::Instant;

use crate::life::Life;
use crate::record::{Record, decode, encode};
use crate::redis::{Argument, Key, Redis, Script};

/// How long a copy or a fence is kept. Far longer than a transaction lasts: a fence must outlive the commit that it announces.
const TTL: Duration = Duration::from_secs(600);
/// How long after the database was asked its answer may still be kept: far shorter than [`TTL`], so that it meets the fence of a change that
/// came after it.
const KEEP_WITHIN: Duration = Duration::from_secs(2);

/// Puts fences, if the life is the one that this server process has. An entry is its version, a space, and the content; a fence
/// has no content.
static FENCE: LazyLock<Script> = LazyLock::new(|| {
    Script::new(
        "if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end
         for i = 2, #KEYS do
             local entry = redis.call('GET', KEYS[i])
             local version = entry and tonumber(string.match(entry, '^%d+'))
             if not version or version <= tonumber(ARGV[i + 1]) then
                 redis.call('SET', KEYS[i], ARGV[i + 1] .. ' ', 'PX', ARGV[2])
             end
         end
         return 1",
    )
});

/// Keeps a copy, if the life is the one that this server process has, and nothing newer is there.
static KEEP: LazyLock<Script> = LazyLock::new(|| {
    Script::new(
        "if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end
         local entry = redis.call('GET', KEYS[2])
         local version = entry and tonumber(string.match(entry, '^%d+'))
         if version and version > tonumber(ARGV[3]) then return 0 end
         redis.call('SET', KEYS[2], ARGV[3] .. ' ' .. ARGV[4], 'PX', ARGV[2])
         return 1",
    )
});

/// Shared copies of one kind of rows. Clones share them.
pub struct Fenced<R> {
    life: Life,
    kind: &'static str,
    of: PhantomData<fn() -> R>,
}

impl<R> Clone for Fenced<R> {
    fn clone(&self) -> Fenced<R> {
        Fenced { life: self.life.clone(), kind: self.kind, of: PhantomData }
    }
}

/// What a lookup found.
#[derive(Debug, PartialEq, Eq)]
pub enum Looked<R> {
    /// The row's content, as it was at some moment since the question.
    Found(R),
    /// The database has to be asked; its answer may be kept with this.
    Ask(Ticket),
}

/// From before the database was asked; it tells whether its answer may be kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ticket {
    life: Option<u64>,
    asked: Instant,
}

impl<R: Record> Fenced<R> {
    /// Copies of rows of this kind, under this life.
    pub fn new(life: Life, kind: &'static str) -> Fenced<R> {
        Fenced { life, kind, of: PhantomData }
    }

    /// Under which life they are.
    pub fn life(&self) -> &Life {
        &self.life
    }

    /// The copy of the row with this id. One round trip to Redis, or none.
    pub async fn look(&self, id: u64) -> Looked<R> {
        let asked = Instant::now();
        let (Some(redis), Some(life)) = (self.life.redis(), self.life.current()) else {
            return Looked::Ask(Ticket { life: None, asked });
        };
        match self.find(redis, life, id).await {
            Some(found) => Looked::Found(found),
            None => Looked::Ask(Ticket { life: Some(life), asked }),
        }
    }

    async fn find(&self, redis: &Redis, life: u64, id: u64) -> Option<R> {
        let key = self.key(redis, life, id);
        let mut expected = String::new();
        let both = redis.send_to_process(key.bucket, |process| {
            expected = Life::value(life, process);
            let mut command = redis::cmd("MGET");
            command.arg(self.life.key(redis, key.bucket).text).arg(&key.text);
            command
        });
        let Ok(Value::Array(both)) = both.await else { return None };
        let [alive, entry] = &both[..] else { return None };
        // The life must have been relied on until Redis had answered.
        if self.life.current() != Some(life) {
            return None;
        }
        if !matches!(alive, Value::BulkString(alive) if *alive == expected.as_bytes()) {
            // Redis was emptied, or another one has taken over. The next change would find out, too, but that may take long.
            self.life.distrust(life);
            return None;
        }
        let Value::BulkString(entry) = entry else { return None };
        let content = entry.iter().position(|byte| *byte == b' ')? + 1;
        decode(&entry[content..])
    }

    /// Keeps what the database answered, in the background, unless something newer has come.
    pub fn keep(&self, ticket: Ticket, id: u64, version: u64, row: &R) {
        let (Some(redis), Some(life)) = (self.life.redis().cloned(), ticket.life) else { return };
        if ticket.asked.elapsed() > KEEP_WITHIN {
            return;
        }
        let key = self.key(&redis, life, id);
        let alive = self.life.key(&redis, key.bucket);
        let content = encode(row);
        tokio::spawn(async move {
            let call = |_, process: &str, full| {
                let expected = Life::value(life, process);
                let arguments = [
                    Argument::text(&expected),
                    millis(TTL),
                    Argument::Int(version),
                    Argument::Bytes(&content),
                ];
                KEEP.call(full, &[&alive, &key], &arguments)
            };
            // What is not kept is asked for again.
            let _ = redis.run_all(&[key.bucket], call).await;
        });
    }

    /// In a transaction that changes rows, when they are locked and before its end: announces the versions that they will have. Waits for
    /// Redis, one round trip for all of them; for a thread of a database.
    ///
    /// # Errors
    /// [`Error::PutOff`] when Redis did not confirm it: the transaction must be rolled back, and may come again. Others when the
    /// database fails.
    pub fn announce(&self, tx: &mut Tx<'_>, changes: impl Iterator<Item = (u64, u64)>) -> Result<(), Error> {
        let mut changes = changes.peekable();
        if changes.peek().is_none() {
            return Ok(());
        }
        let Some(life) = self.life.hold(tx)? else { return Ok(()) };
        let confirmed = match self.life.redis() {
            Some(redis) => self.life.block_on(self.put_fences(redis, life, changes)),
            None => false,
        };
        if confirmed { Ok(()) } else { Err(self.life.distrust(life)) }
    }

    async fn put_fences(&self, redis: &Redis, life: u64, changes: impl Iterator<Item = (u64, u64)>) -> bool {
        let mut by_bucket: BTreeMap<usize, Vec<(Key, u64)>> = BTreeMap::new();
        for (id, version) in changes {
            let key = self.key(redis, life, id);
            by_bucket.entry(key.bucket).or_default().push((key, version));
        }
        let groups: Vec<(usize, Vec<(Key, u64)>)> = by_bucket.into_iter().collect();
        let buckets: Vec<usize> = groups.iter().map(|(bucket, _)| *bucket).collect();
        let answers = redis.run_all(&buckets, |place, process, full| {
            let (bucket, group) = &groups[place];
            let (expected, alive) = (Life::value(life, process), self.life.key(redis, *bucket));
            let keys: Vec<&Key> = std::iter::once(&alive).chain(group.iter().map(|(key, _)| key)).collect();
            let versions = group.iter().map(|(_, version)| Argument::Int(*version));
            let arguments: Vec<Argument<'_>> =
                [Argument::text(&expected), millis(TTL)].into_iter().chain(versions).collect();
            FENCE.call(full, &keys, &arguments)
        });
        answers.await.iter().all(|answer| *answer == Ok(Value::Int(1)))
    }

    /// A life's copies are not seen under the next one.
    fn key(&self, redis: &Redis, life: u64, id: u64) -> Key {
        let kind = self.kind;
        Key::of_id(redis.prefix(), &format!("{kind}:{life:x}"), id)
    }
}

fn millis(duration: Duration) -> Argument<'static> {
    Argument::Int(u64::try_from(duration.as_millis()).unwrap_or(u64::MAX))
}

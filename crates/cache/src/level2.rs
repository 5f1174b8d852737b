//! Copies in Redis of what never changes. A copy is as good as the row; one that is lost is read again.
//!
//! Many processes that miss the same copy at once need not all ask the database: the first one takes a **lock** with a token of its own, and
//! the others wait for its answer, for a moment. A lock protects nothing: if it is lost, or runs out, the database is asked
//! twice. It is released by who holds its token and nobody else.

use std::marker::PhantomData;
use std::sync::LazyLock;
use std::time::Duration;

use redis::{Cmd, Value};

use crate::record::{Record, decode, encode};
use crate::redis::{Argument, Key, Redis, Script};

/// How long a copy is kept. A backstop: what never changes could stay for ever.
const TTL: Duration = Duration::from_secs(3_600);
/// After how long a lock is taken from one who does not release it.
const LOCK_TTL: Duration = Duration::from_secs(2);
/// How long others wait for the answer of one who holds the lock.
const WAIT: Duration = Duration::from_millis(60);
/// How often they look whether it is there.
const WAIT_STEP: Duration = Duration::from_millis(15);

/// The copy, or 1 if the lock was taken, or 0 if somebody else has it.
static FIND_OR_LOCK: LazyLock<Script> = LazyLock::new(|| {
    Script::new(
        "local entry = redis.call('GET', KEYS[1])
         if entry then return entry end
         if redis.call('SET', KEYS[2], ARGV[1], 'NX', 'PX', ARGV[2]) then return 1 end
         return 0",
    )
});

/// Keeps a copy, if there is one, and releases the lock of this token.
static UNLOCK: LazyLock<Script> = LazyLock::new(|| {
    Script::new(
        "if ARGV[2] ~= '' then redis.call('SET', KEYS[1], ARGV[2], 'PX', ARGV[3]) end
         if redis.call('GET', KEYS[2]) == ARGV[1] then return redis.call('DEL', KEYS[2]) end
         return 0",
    )
});

/// Shared copies of one kind of things that never change. Clones share them.
pub struct Level2<R> {
    redis: Redis,
    kind: &'static str,
    of: PhantomData<fn() -> R>,
}

impl<R> Clone for Level2<R> {
    fn clone(&self) -> Level2<R> {
        Level2 { redis: self.redis.clone(), kind: self.kind, of: PhantomData }
    }
}

/// What one finds who would load what is not there.
pub(crate) enum Claimed<R> {
    Found(R),
    /// Load it. Hand the lock back with what you found, if you hold one.
    Load(Option<Lock>),
}

/// A lock that this process holds, unless it has run out.
pub(crate) struct Lock {
    token: u64,
}

impl<R: Record> Level2<R> {
    /// Copies of this kind.
    pub fn new(redis: Redis, kind: &'static str) -> Level2<R> {
        Level2 { redis, kind, of: PhantomData }
    }

    /// The copy of what has this id. One round trip.
    pub async fn get(&self, id: u64) -> Option<R> {
        let key = self.key(id);
        let mut command = redis::cmd("GET");
        command.arg(&key.text);
        read(self.redis.send(&key, command).await.ok()?)
    }

    /// The copies of what has these ids, in their order: one round trip to each node, all at once.
    pub async fn get_many(&self, ids: &[u64]) -> Vec<Option<R>> {
        let groups = self.by_bucket(ids);
        let buckets: Vec<usize> = groups.iter().map(|(bucket, _)| *bucket).collect();
        let answers = self.redis.send_all(&buckets, |group, _| {
            let mut command = redis::cmd("MGET");
            for (_, key) in &groups[group].1 {
                command.arg(&key.text);
            }
            command
        });
        let mut found: Vec<Option<R>> = ids.iter().map(|_| None).collect();
        for ((_, group), answer) in groups.iter().zip(answers.await) {
            let Ok(Value::Array(values)) = answer else { continue };
            for ((place, _), value) in group.iter().zip(values) {
                found[*place] = read(value);
            }
        }
        found
    }

    /// Keeps copies, in the background: one round trip to each node.
    pub fn put_many(&self, copies: &[(u64, &R)]) {
        if copies.is_empty() {
            return;
        }
        let (buckets, commands): (Vec<usize>, Vec<Cmd>) = copies
            .iter()
            .map(|(id, record)| {
                let key = self.key(*id);
                let mut command = redis::cmd("SET");
                command.arg(&key.text).arg(encode(*record)).arg("PX").arg(millis(TTL));
                (key.bucket, command)
            })
            .unzip();
        let redis = self.redis.clone();
        tokio::spawn(async move {
            // What is not kept is loaded again.
            let _ = redis.send_all(&buckets, |place, _| commands[place].clone()).await;
        });
    }

    /// The copy, or else the right to load it, which one process has at a time; after a moment everybody.
    pub(crate) async fn find_or_lock(&self, id: u64) -> Claimed<R> {
        let (key, lock) = (self.key(id), self.lock_key(id));
        let token = fastrand::u64(..);
        let call = |_, _: &str, full| {
            FIND_OR_LOCK.call(full, &[&key, &lock], &[Argument::Int(token), Argument::Int(millis(LOCK_TTL))])
        };
        match self.redis.run_all(&[key.bucket], call).await.pop() {
            Some(Ok(Value::Int(1))) => Claimed::Load(Some(Lock { token })),
            Some(Ok(Value::Int(0))) => self.wait_for(id).await.map_or(Claimed::Load(None), Claimed::Found),
            Some(Ok(entry)) => read(entry).map_or(Claimed::Load(None), Claimed::Found),
            Some(Err(_)) | None => Claimed::Load(None),
        }
    }

    async fn wait_for(&self, id: u64) -> Option<R> {
        let mut waited = Duration::ZERO;
        while waited < WAIT {
            tokio::time::sleep(WAIT_STEP).await;
            waited += WAIT_STEP;
            if let Some(found) = self.get(id).await {
                return Some(found);
            }
        }
        None
    }

    /// Keeps what was loaded, if it may be kept, and releases the lock, in the background.
    pub(crate) fn unlock(&self, id: u64, lock: Option<Lock>, loaded: Option<&R>) {
        match (lock, loaded) {
            (Some(lock), loaded) => {
                let (level, entry) = (self.clone(), loaded.map(encode).unwrap_or_default());
                tokio::spawn(async move { level.release(id, lock, &entry).await });
            }
            (None, Some(loaded)) => self.put_many(&[(id, loaded)]),
            (None, None) => {}
        }
    }

    /// A lock that is not released runs out.
    async fn release(&self, id: u64, Lock { token }: Lock, entry: &[u8]) {
        let (key, lock) = (self.key(id), self.lock_key(id));
        let arguments = [Argument::Int(token), Argument::Bytes(entry), Argument::Int(millis(TTL))];
        let call = |_, _: &str, full| UNLOCK.call(full, &[&key, &lock], &arguments);
        let _ = self.redis.run_all(&[key.bucket], call).await;
    }

    fn key(&self, id: u64) -> Key {
        Key::of_id(self.redis.prefix(), self.kind, id)
    }

    fn lock_key(&self, id: u64) -> Key {
        Key::of_id(self.redis.prefix(), &format!("{}:lock", self.kind), id)
    }

    /// The ids' keys with their places, by bucket.
    fn by_bucket(&self, ids: &[u64]) -> Vec<(usize, Vec<(usize, Key)>)> {
        let mut keys: Vec<(usize, Key)> = ids.iter().map(|id| self.key(*id)).enumerate().collect();
        keys.sort_by_key(|(_, key)| key.bucket);
        let mut groups: Vec<(usize, Vec<(usize, Key)>)> = Vec::new();
        for (place, key) in keys {
            match groups.last_mut() {
                Some((bucket, group)) if *bucket == key.bucket => group.push((place, key)),
                _ => groups.push((key.bucket, vec![(place, key)])),
            }
        }
        groups
    }
}

fn read<R: Record>(entry: Value) -> Option<R> {
    match entry {
        Value::BulkString(bytes) => decode(&bytes),
        _ => None,
    }
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::{Reader, Writer};
    use crate::redis::Settings;

    struct Nothing;

    impl Record for Nothing {
        const FORMAT: u8 = 1;

        fn write(&self, _: &mut Writer) {}

        fn read(_: &mut Reader<'_>) -> Option<Nothing> {
            Some(Nothing)
        }
    }

    async fn lock(level: &Level2<Nothing>) -> Option<Lock> {
        match level.find_or_lock(7).await {
            Claimed::Load(lock) => lock,
            Claimed::Found(Nothing) => panic!("nothing was kept"),
        }
    }

    /// One that took too long must not release the lock of the one after it.
    #[tokio::test]
    async fn a_lock_is_released_by_its_holder_and_nobody_else() {
        let server = servers::Redis::start().expect("a Redis");
        let mut settings = Settings::parse(&server.url()).expect("an address");
        settings.command_timeout = Duration::from_secs(2);
        let redis = Redis::connect(settings);
        assert!(redis.wait_until_up(Duration::from_secs(60)).await);
        let level: Level2<Nothing> = Level2::new(redis, "nothing");
        let first = lock(&level).await.expect("nobody has it");
        assert!(lock(&level).await.is_none(), "the first one has it");
        // As if it had run out.
        server.flush_all().expect("emptied");
        let second = lock(&level).await.expect("nobody has it");
        level.release(7, first, b"").await;
        assert!(lock(&level).await.is_none(), "the second one has it");
        level.release(7, second, b"").await;
        assert!(lock(&level).await.is_some());
    }
}

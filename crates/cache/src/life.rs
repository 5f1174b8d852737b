//! Whether copies of rows that change may be used: an agreement between those who read them and those who change the rows.
//!
//! A copy in Redis can be answered to a client only if everybody who changes its row says so in Redis before the change is committed.
//! Redis cannot promise that: it may be out of reach of the writer alone, it may be emptied, and a replica that
//! takes over may not have what its primary acknowledged. So the copies have a **life**, a number that is drawn when they are begun and is
//! written down in two places:
//!
//! - in the database, as [`Mark::Life`]. Who changes rows reads it in that transaction and holds it until the commit. If it is
//!   positive, the change is announced in Redis first; if that is not confirmed, the transaction is rolled back and the life ended. Who reads
//!   copies asks for it every [`POLL`] and relies on the answer for [`LEASE`], counted from before the question.
//! - in Redis, in each bucket, together with the server process that holds the bucket. Who reads a copy reads it with the copy. A Redis
//!   that was emptied or restarted, or a replica that took over, does not have its own process there.
//!
//! An ended life is the same number, negative. Changes need no announcement once it has been ended for [`SETTLE`]: by then nobody
//! relies on it any more. What is kept under one life is not seen under the next. A new life begins when Redis has answered for a while; it cannot
//! begin before the transactions that hold the end of the old one have ended.
//!
//! So a failure of Redis holds up changes for less than a second, once, and reads not at all.
//!
//! What it relies on: clocks that run at about the same speed (not: that show the same time); connections that lead to one server
//! process, not to a proxy that changes it; and that Redis does not evict a key in the moment after it was written. After a database was
//! restored from a backup, Redis must be emptied.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use db::{Db, Error, Tx};
use redis::Value;
use tokio::runtime::Handle;
use tokio::sync::Notify;
use tokio::time::Instant;
use tokio_util::sync::{CancellationToken, DropGuard};

use crate::mark::Mark;
use crate::redis::{BUCKETS, Key, Redis};

/// How often the database is asked for the life.
pub const POLL: Duration = Duration::from_millis(100);
/// How long its answer is relied on.
pub const LEASE: Duration = Duration::from_millis(400);
/// After how long changes need no announcement any more. Longer than [`LEASE`] by what clocks may differ in speed, and more.
pub const SETTLE: Duration = Duration::from_millis(600);
/// How long a life must have been over before the next one begins, if that one lasted.
const PAUSE_MIN: Duration = Duration::from_secs(1);
/// The same, if one after the other ended soon: each end holds up changes.
const PAUSE_MAX: Duration = Duration::from_secs(60);
/// A life that lasted so long did not end soon.
const LASTED: Duration = Duration::from_secs(60);

/// What a change is told when it cannot be announced; it comes again.
const NOT_ANNOUNCED: Error = Error::PutOff { why: "the shared copies of what it changes are being given up" };

/// The life of a service's copies. Clones share it.
#[derive(Clone)]
pub struct Life {
    shared: Arc<Shared>,
    _stop: Arc<DropGuard>,
}

struct Shared {
    db: Db,
    redis: Option<Redis>,
    runtime: Handle,
    state: Mutex<State>,
    wake: Notify,
}

#[derive(Debug, Default)]
struct State {
    /// What the mark was, and when it was asked for.
    read: Option<(i64, Instant)>,
    /// The end of a life that was seen last, and when it was seen first.
    over: Option<(i64, Instant)>,
    /// A life that has to be ended.
    distrusted: Option<i64>,
}

impl State {
    /// What a read of the mark says.
    fn learn(&mut self, value: i64, asked: Instant, now: Instant) {
        if self.read.is_none_or(|(_, before)| before < asked) {
            self.read = Some((value, asked));
        }
        if value <= 0 && self.over.is_none_or(|(known, _)| known != value) {
            self.over = Some((value, now));
        }
    }

    /// The life that may be relied on.
    fn current(&self, now: Instant) -> Option<u64> {
        let (value, asked) = self.read?;
        let life = u64::try_from(value).ok().filter(|life| *life > 0)?;
        (now < asked + LEASE && self.distrusted != Some(value)).then_some(life)
    }

    /// Since when this end has been known.
    fn over_for(&self, value: i64, now: Instant) -> Option<Duration> {
        self.over.filter(|(known, _)| *known == value).map(|(_, since)| now.duration_since(since))
    }
}

impl Life {
    /// Takes part in the agreement, with `redis` or, where there is none, only as one who changes rows. A task keeps it up until the
    /// last clone is dropped. Must be called on a tokio runtime; the database needs [`crate::mark::migration`].
    ///
    /// # Errors
    /// When the database fails.
    pub async fn start(db: Db, redis: Option<Redis>) -> Result<Life, Error> {
        db.write(|tx| Mark::Life.ensure(tx)).await?;
        let shared = Arc::new(Shared {
            db,
            redis,
            runtime: Handle::current(),
            state: Mutex::default(),
            wake: Notify::new(),
        });
        let stop = CancellationToken::new();
        let (kept, stopped) = (shared.clone(), stop.clone());
        tokio::spawn(async move { stopped.run_until_cancelled(kept.keep()).await });
        Ok(Life { shared, _stop: Arc::new(stop.drop_guard()) })
    }

    /// Where the copies are.
    pub fn redis(&self) -> Option<&Redis> {
        self.shared.redis.as_ref()
    }

    /// The life that copies may be read and kept under now, if any.
    pub fn current(&self) -> Option<u64> {
        self.shared.state().current(Instant::now())
    }

    /// Waits until copies may be read and kept, or until the time is over, and tells which.
    pub async fn wait_until_alive(&self, at_most: Duration) -> bool {
        let alive = async {
            while self.current().is_none() {
                tokio::time::sleep(POLL / 4).await;
            }
        };
        tokio::time::timeout(at_most, alive).await.is_ok()
    }

    /// In a transaction that changes rows, before its end: the life under which the change must be announced, if there is one. It does not
    /// end, and none begins, before the transaction has ended.
    ///
    /// # Errors
    /// [`Error::PutOff`] when somebody may still rely on a life that has ended; others when the database fails.
    pub(crate) fn hold(&self, tx: &mut Tx<'_>) -> Result<Option<u64>, Error> {
        let asked = Instant::now();
        let value = Mark::Life.hold(tx)?;
        let now = Instant::now();
        let mut state = self.shared.state();
        state.learn(value, asked, now);
        match u64::try_from(value) {
            // There never was one.
            Ok(0) => Ok(None),
            Ok(life) => Ok(Some(life)),
            Err(_) if state.over_for(value, now).is_some_and(|over| over >= SETTLE) => Ok(None),
            Err(_) => Err(NOT_ANNOUNCED),
        }
    }

    /// A change could not be announced: ends this life.
    pub(crate) fn distrust(&self, life: u64) -> Error {
        self.shared.state().distrusted = i64::try_from(life).ok();
        self.shared.wake.notify_one();
        NOT_ANNOUNCED
    }

    /// Waits for Redis, on a thread of the database.
    pub(crate) fn block_on<T>(&self, future: impl Future<Output = T>) -> T {
        self.shared.runtime.block_on(future)
    }

    /// The key of a bucket's life.
    pub(crate) fn key(&self, redis: &Redis, bucket: usize) -> Key {
        key(redis, self.shared.db.name(), bucket)
    }

    /// What the key holds while this server process is entrusted with the life.
    pub(crate) fn value(life: u64, process: &str) -> String {
        format!("{life}:{process}")
    }
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn keep(&self) {
        let mut pause = PAUSE_MIN;
        let mut begun: Option<Instant> = None;
        loop {
            match self.poll().await {
                Ok(value) if value > 0 => {
                    begun.get_or_insert_with(Instant::now);
                    if self.state().distrusted == Some(value) {
                        self.end(value).await;
                        continue;
                    }
                }
                Ok(value) => {
                    if let Some(begun) = begun.take() {
                        let lasted = begun.elapsed() >= LASTED;
                        pause = if lasted { PAUSE_MIN } else { (pause + PAUSE_MIN).min(PAUSE_MAX) };
                    }
                    let over = self.state().over_for(value, Instant::now());
                    if value == 0 || over.is_some_and(|over| over >= pause) {
                        self.begin(value).await;
                    }
                }
                Err(error) => tracing::debug!(%error, "the life of the shared copies is not known"),
            }
            tokio::select! {
                () = tokio::time::sleep(POLL) => {}
                () = self.wake.notified() => {}
            }
        }
    }

    async fn poll(&self) -> Result<i64, Error> {
        let asked = Instant::now();
        let value = self.db.read(|tx| Mark::Life.read(tx)).await?;
        self.state().learn(value, asked, Instant::now());
        Ok(value)
    }

    async fn end(&self, life: i64) {
        match self.db.write(move |tx| Mark::Life.replace(tx, life, -life)).await {
            Ok(true) => tracing::warn!(
                database = self.db.name(),
                "the shared copies are given up for now: Redis did not confirm a change"
            ),
            Ok(false) => {}
            Err(error) => {
                tracing::warn!(%error, "the shared copies could not be given up; it is tried again");
                tokio::time::sleep(POLL).await;
            }
        }
    }

    /// Begins a new life: entrusts Redis with it, and then tells the others. One process does so at a time, because Redis holds one
    /// life: it waits for Redis in the transaction.
    async fn begin(&self, over: i64) {
        let Some(redis) = self.redis.clone().filter(Redis::is_up) else { return };
        let life = fastrand::i64(1..=i64::MAX);
        let (runtime, service) = (self.runtime.clone(), self.db.name());
        let begun = self.db.write(move |tx| {
            // From here on nobody else changes the mark, and no change of a row holds it.
            if !Mark::Life.replace(tx, over, life)? {
                return Ok(false);
            }
            if runtime.block_on(entrust(&redis, service, life.unsigned_abs())) {
                Ok(true)
            } else {
                Err(Error::PutOff { why: "Redis did not confirm that it has the new life" })
            }
        });
        match begun.await {
            Ok(true) => tracing::info!(database = service, "shared copies are in use"),
            Ok(false) => {}
            Err(error) => tracing::debug!(%error, "the shared copies were not begun"),
        }
    }
}

async fn entrust(redis: &Redis, service: &str, life: u64) -> bool {
    let buckets: Vec<usize> = (0..BUCKETS).collect();
    let entrusted = redis.send_all(&buckets, |bucket, process| {
        let mut command = redis::cmd("SET");
        command.arg(key(redis, service, bucket).text).arg(Life::value(life, process));
        command
    });
    entrusted.await.iter().all(|answer| matches!(answer, Ok(Value::Okay)))
}

/// The key of a bucket's life.
fn key(redis: &Redis, service: &str, bucket: usize) -> Key {
    Key::of_bucket(redis.prefix(), &format!("{service}:life"), bucket)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_is_relied_on_from_before_the_question_and_not_for_long() {
        let start = Instant::now();
        let mut state = State::default();
        assert_eq!(state.current(start), None);
        // The answer took longer than it is good for.
        state.learn(7, start, start + LEASE);
        assert_eq!(state.current(start + LEASE), None);
        assert_eq!(state.current(start + LEASE / 2), Some(7));
        // An older question that is answered later says nothing.
        state.learn(-7, start + LEASE, start + LEASE);
        state.learn(7, start, start + LEASE);
        assert_eq!(state.current(start + LEASE), None);
    }

    #[test]
    fn each_end_of_a_life_counts_for_itself() {
        let start = Instant::now();
        let mut state = State::default();
        state.learn(-7, start, start);
        assert_eq!(state.over_for(-7, start + SETTLE), Some(SETTLE));
        // It was begun and ended again without being seen alive here.
        assert_eq!(state.over_for(-8, start + SETTLE), None);
        state.learn(-8, start + SETTLE, start + SETTLE);
        assert_eq!(state.over_for(-8, start + SETTLE), Some(Duration::ZERO));
    }

    #[test]
    fn a_life_that_is_distrusted_here_is_not_relied_on_here() {
        let start = Instant::now();
        let mut state = State { distrusted: Some(7), ..State::default() };
        state.learn(7, start, start);
        assert_eq!(state.current(start), None);
        state.learn(8, start + POLL, start + POLL);
        assert_eq!(state.current(start + POLL), Some(8));
    }
}

//! Keeps the link to Redis: connects in the background, notices that it does not answer, and tries again.
//!
//! A **lane** is what fails together: all keys of a plain Redis, or those of one bucket in a cluster, because its node may be gone while
//! others serve. The first command of a lane that gets no answer closes it: whoever comes then is told so at once and does
//! not wait. A task probes closed lanes and opens those that answer.

use std::borrow::Cow;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use futures_util::future::join_all;
use redis::{Cmd, Pipeline, RedisError, RedisResult, Value};
use telemetry::spans::{self, Detail, ERROR_TYPE, Kind, Step};
use tokio::sync::{Notify, Semaphore, watch};
use tokio_util::sync::CancellationToken;

use super::Unanswered;
use super::connection::{Connection, Node, ask, ask_all, says_nothing_about_the_command};
use super::key::{BUCKETS, Key};
use super::settings::Settings;

/// What the span of several commands is called where none of them can be told.
const PIPELINE: &str = "PIPELINE";

/// A command's first word: what its span is called.
fn name_of(command: &Cmd) -> Cow<'static, str> {
    let word = command.args_iter().next();
    let word = word.and_then(|word| match word {
        redis::Arg::Simple(word) => std::str::from_utf8(word).ok().map(str::to_owned),
        _ => None,
    });
    word.map_or(Cow::Borrowed(PIPELINE), Cow::Owned)
}

/// What all handles and the background task share.
pub(super) struct Link {
    pub(super) settings: Settings,
    current: RwLock<Option<Current>>,
    /// Closed lanes, by bucket. A plain Redis has the first one only.
    closed: [AtomicBool; BUCKETS],
    /// How many connections there were: what an old one runs into says nothing about the new one.
    generations: AtomicU64,
    in_flight: Semaphore,
    /// Something failed, or has to begin.
    wake: Notify,
    /// Whether every lane is open.
    healthy: watch::Sender<bool>,
}

#[derive(Clone)]
struct Current {
    connection: Arc<Connection>,
    generation: u64,
}

impl Current {
    fn lane(&self, bucket: usize) -> usize {
        if self.connection.is_cluster() { bucket } else { 0 }
    }

    fn lanes(&self) -> usize {
        if self.connection.is_cluster() { BUCKETS } else { 1 }
    }
}

impl Link {
    pub(super) fn new(settings: Settings) -> Arc<Link> {
        let link = Link {
            current: RwLock::new(None),
            closed: std::array::from_fn(|_| AtomicBool::new(true)),
            generations: AtomicU64::new(0),
            in_flight: Semaphore::new(settings.commands_in_flight),
            wake: Notify::new(),
            healthy: watch::Sender::new(false),
            settings,
        };
        link.wake.notify_one();
        Arc::new(link)
    }

    pub(super) fn healthy(&self) -> watch::Receiver<bool> {
        self.healthy.subscribe()
    }

    /// None while there is no connection.
    pub(super) fn is_cluster(&self) -> Option<bool> {
        self.current().map(|current| current.connection.is_cluster())
    }

    fn current(&self) -> Option<Current> {
        self.current.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn set_current(&self, current: Option<Current>) {
        *self.current.write().unwrap_or_else(PoisonError::into_inner) = current;
    }

    fn is_open(&self, current: &Current, bucket: usize) -> bool {
        !self.closed[current.lane(bucket)].load(Ordering::Relaxed)
    }

    /// Sends a command about keys of this bucket; it may depend on the process that it will be sent to.
    pub(super) async fn send(
        &self,
        bucket: usize,
        command: impl FnOnce(&str) -> Cmd,
    ) -> Result<Value, Unanswered> {
        let current = self.current().ok_or(Unanswered::Down)?;
        let open = self.is_open(&current, bucket);
        let node = current.connection.to(bucket).filter(|_| open).ok_or(Unanswered::Down)?;
        let Node { mut connection, run_id } = node;
        let command = command(&run_id);
        let span = spans::step(Kind::Client, || name_of(&command));
        let asked = self.bounded(1, ask(&mut connection, &command)).await;
        self.record(span, 1, matches!(asked, Ok(Ok(_))));
        asked?.map_err(|error| self.failed(&current, bucket, error))
    }

    /// Sends one command for each of these buckets, which may be named more than once: as many round trips as nodes, all at once.
    /// The answers are in the order of the buckets.
    pub(super) async fn send_all(
        &self,
        buckets: &[usize],
        command: impl Fn(usize, &str) -> Cmd,
    ) -> Vec<Result<Value, Unanswered>> {
        let mut answers: Vec<Result<Value, Unanswered>> = vec![Err(Unanswered::Down); buckets.len()];
        let Some(current) = self.current() else { return answers };
        let mut places_of: [Vec<usize>; BUCKETS] = std::array::from_fn(|_| Vec::new());
        for (place, bucket) in buckets.iter().enumerate() {
            if self.is_open(&current, *bucket) {
                places_of[*bucket].push(place);
            }
        }
        let used = (0..BUCKETS).filter(|bucket| !places_of[*bucket].is_empty());
        let mut trips = Vec::new();
        for group in current.connection.by_node(used) {
            let Some(node) = group.first().and_then(|bucket| current.connection.to(*bucket)) else {
                continue;
            };
            let Node { mut connection, run_id } = node;
            let places: Vec<usize> =
                group.iter().flat_map(|bucket| places_of[*bucket].iter().copied()).collect();
            let mut pipeline = Pipeline::with_capacity(places.len());
            // Without this the first command that is refused would hide what the others got.
            pipeline.ignore_errors();
            for place in &places {
                pipeline.add_command(command(*place, &run_id));
            }
            trips.push(async move {
                let name = || pipeline.cmd_iter().next().map_or(Cow::Borrowed(PIPELINE), name_of);
                let span = spans::step(Kind::Client, name);
                let asked = self.bounded(places.len(), ask_all(&mut connection, &pipeline)).await;
                self.record(span, places.len(), matches!(asked, Ok(Ok(_))));
                (places, asked)
            });
        }
        for (places, asked) in join_all(trips).await {
            match asked {
                Ok(Ok(found)) => {
                    for (place, answer) in places.into_iter().zip(found) {
                        let bucket = buckets[place];
                        answers[place] = answer.map_err(|error| self.failed(&current, bucket, error));
                    }
                }
                Ok(Err(error)) => {
                    for place in places {
                        answers[place] = Err(self.failed(&current, buckets[place], error.clone()));
                    }
                }
                Err(unanswered) => {
                    for place in places {
                        answers[place] = Err(unanswered.clone());
                    }
                }
            }
        }
        answers
    }

    /// Waits for an answer within the bounds: of time, and of commands on their way.
    async fn bounded<T>(
        &self,
        commands: usize,
        answer: impl Future<Output = RedisResult<T>>,
    ) -> Result<RedisResult<T>, Unanswered> {
        let bound = self.settings.commands_in_flight;
        let permits = u32::try_from(commands).unwrap_or(u32::MAX);
        let _permits = self.in_flight.try_acquire_many(permits).map_err(|_| Unanswered::Busy { bound })?;
        let timed = tokio::time::timeout(self.settings.command_timeout, answer).await;
        Ok(timed.unwrap_or_else(|_| Err((redis::ErrorKind::Io, "no answer in time").into())))
    }

    fn record(&self, span: Option<Step>, commands: usize, well: bool) {
        let Some(span) = span else { return };
        let details = [
            ("db.system.name", Detail::Name("redis")),
            ("db.namespace", Detail::Text(self.settings.prefix.clone())),
            ("db.operation.batch.size", Detail::Count(commands as u64)),
            (ERROR_TYPE, Detail::Name("unanswered")),
        ];
        span.end(if well { &details[..3] } else { &details });
    }

    /// What a caller is told of an error, and what it means for its lane.
    fn failed(&self, current: &Current, bucket: usize, error: RedisError) -> Unanswered {
        if !says_nothing_about_the_command(&error) {
            return match error.kind() {
                redis::ErrorKind::Server(redis::ServerErrorKind::NoScript) => Unanswered::NoScript,
                _ => Unanswered::Refused(error.to_string()),
            };
        }
        let lane = current.lane(bucket);
        let is_current = current.generation == self.generations.load(Ordering::Relaxed);
        if is_current && !self.closed[lane].swap(true, Ordering::Relaxed) {
            if self.healthy.send_replace(false) {
                tracing::warn!(redis = %self.settings, why = %error, "Redis does not answer: going on without it");
            }
            self.wake.notify_one();
        }
        Unanswered::Broken(error.to_string())
    }

    /// Keeps the link until `stop`.
    pub(super) async fn keep(self: Arc<Self>, stop: CancellationToken) {
        let _ = stop.run_until_cancelled(self.keep_on()).await;
    }

    async fn keep_on(&self) {
        loop {
            self.wake.notified().await;
            let mut pause = self.settings.retry_min;
            let mut tries = 0_u32;
            while let Err(why) = self.heal().await {
                tries += 1;
                if tries == 1 {
                    tracing::warn!(redis = %self.settings, %why, "Redis cannot be reached; it is tried again and again");
                }
                tokio::time::sleep(pause.mul_f64(0.5 + 0.5 * fastrand::f64())).await;
                pause = (pause * 2).min(self.settings.retry_max);
            }
            if !self.healthy.send_replace(true) {
                let cluster = self.is_cluster() == Some(true);
                tracing::info!(redis = %self.settings, cluster, tries, "connected to Redis");
            }
        }
    }

    /// Opens the closed lanes, on the connection that is there or else on a new one.
    async fn heal(&self) -> RedisResult<()> {
        let earlier = self.current();
        if let Some(current) = &earlier
            && self.probe(current).await.is_ok()
        {
            return Ok(());
        }
        let earlier = earlier.as_ref().map(|current| &*current.connection);
        let opened = Connection::open(&self.settings, self.settings.command_timeout, earlier).await;
        let connection = opened.inspect_err(|_| {
            if self.closed.iter().all(|closed| closed.load(Ordering::Relaxed)) {
                self.set_current(None);
            }
        })?;
        // From here on nothing that an old connection runs into closes a lane.
        let generation = self.generations.fetch_add(1, Ordering::Relaxed) + 1;
        let current = Current { connection: Arc::new(connection), generation };
        self.set_current(Some(current.clone()));
        self.probe(&current).await
    }

    /// Asks all closed lanes' nodes, and opens the lanes of those that answer.
    async fn probe(&self, current: &Current) -> RedisResult<()> {
        let closed = (0..current.lanes()).filter(|lane| self.closed[*lane].load(Ordering::Relaxed));
        let probes = closed.map(|lane| async move {
            let Some(Node { mut connection, .. }) = current.connection.to(lane) else {
                return Err((redis::ErrorKind::Io, "a node of the cluster cannot be reached").into());
            };
            let key = Key::of_bucket(&self.settings.prefix, "probe", lane);
            let timeout: Duration = self.settings.command_timeout;
            // A write: a replica refuses it, and so does a primary that has lost its cluster.
            let mut command = redis::cmd("DEL");
            command.arg(&key.text);
            let asked = tokio::time::timeout(timeout, ask(&mut connection, &command)).await;
            asked.unwrap_or_else(|_| Err((redis::ErrorKind::Io, "no answer in time").into()))?;
            self.closed[lane].store(false, Ordering::Relaxed);
            Ok(())
        });
        join_all(probes).await.into_iter().collect()
    }
}

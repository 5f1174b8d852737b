//! Copies of what never changes, in this process and in Redis.

use std::sync::Arc;

use moka::future::Cache;

use crate::level2::{Claimed, Level2};
use crate::record::{Record, encode};
use crate::redis::Redis;

/// What a copy takes beside its fields, in bytes, roughly.
const COPY_BYTES: usize = 160;

/// What was loaded.
#[derive(Debug)]
pub enum Loaded<R> {
    /// It never changes, and is never gone: it may be kept.
    Final(R),
    /// It may be gone later. It is not kept.
    Passing(R),
    /// There is none. That is never kept: the next moment there may be one.
    Missing,
}

/// Copies of one kind of things that never change. Clones share them.
#[derive(Clone)]
pub struct Copies<R> {
    local: Cache<u64, Arc<R>>,
    shared: Option<Level2<R>>,
}

/// Why nothing was kept, so that the cache keeps nothing.
enum NotKept<R, E> {
    Passing(Arc<R>),
    Missing,
    Failed(E),
}

impl<R: Record> Copies<R> {
    /// Copies of this kind, at most `local_bytes` of them in this process.
    pub fn new(redis: Option<Redis>, kind: &'static str, local_bytes: u64) -> Copies<R> {
        let weight =
            |_: &u64, copy: &Arc<R>| u32::try_from(COPY_BYTES + encode(&**copy).len()).unwrap_or(u32::MAX);
        let local = Cache::builder().weigher(weight).max_capacity(local_bytes).build();
        Copies { local, shared: redis.map(|redis| Level2::new(redis, kind)) }
    }

    /// What has this id: a copy, or what `load` gets. Many who ask at once load once, in this process and nearly always among all
    /// processes.
    ///
    /// # Errors
    /// What `load` fails with.
    pub async fn get<E, F>(&self, id: u64, load: impl Fn() -> F) -> Result<Option<Arc<R>>, E>
    where
        E: Clone + Send + Sync + 'static,
        F: Future<Output = Result<Loaded<R>, E>>,
    {
        let mut own = false;
        let begin = async {
            own = true;
            self.find_or_load(id, &load).await
        };
        let missed = match self.local.try_get_with(id, begin).await {
            Ok(found) => return Ok(Some(found)),
            Err(missed) => missed,
        };
        match &*missed {
            NotKept::Failed(error) => Err(error.clone()),
            NotKept::Passing(passing) if own => Ok(Some(passing.clone())),
            NotKept::Missing if own => Ok(None),
            // Somebody else asked, perhaps before what this one's client knows of: only what never changes may be shared.
            NotKept::Passing(_) | NotKept::Missing => Ok(match load().await? {
                Loaded::Final(found) | Loaded::Passing(found) => Some(Arc::new(found)),
                Loaded::Missing => None,
            }),
        }
    }

    async fn find_or_load<E, F>(&self, id: u64, load: &impl Fn() -> F) -> Result<Arc<R>, NotKept<R, E>>
    where
        F: Future<Output = Result<Loaded<R>, E>>,
    {
        let lock = match &self.shared {
            Some(shared) => match shared.find_or_lock(id).await {
                Claimed::Found(found) => return Ok(Arc::new(found)),
                Claimed::Load(lock) => lock,
            },
            None => None,
        };
        let loaded = load().await;
        if let Some(shared) = &self.shared {
            let keep = match &loaded {
                Ok(Loaded::Final(found)) => Some(found),
                _ => None,
            };
            shared.unlock(id, lock, keep);
        }
        match loaded {
            Ok(Loaded::Final(found)) => Ok(Arc::new(found)),
            Ok(Loaded::Passing(found)) => Err(NotKept::Passing(Arc::new(found))),
            Ok(Loaded::Missing) => Err(NotKept::Missing),
            Err(error) => Err(NotKept::Failed(error)),
        }
    }
}

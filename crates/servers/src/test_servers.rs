//! The servers that the tests of several binaries share.

use std::env;
use std::thread::{self, ScopedJoinHandle};

use crate::{Error, MariaDb, Nats, RedisCluster, shared};

/// One of each kind that [`shared`] knows, but for those that the environment names already. They are stopped when this is dropped, and at the
/// latest when this process has ended.
#[derive(Debug)]
pub struct TestServers {
    mariadb: Option<MariaDb>,
    nats: Option<Nats>,
    redis: Option<RedisCluster>,
}

impl TestServers {
    /// Starts them, all at the same time.
    ///
    /// # Errors
    /// When one does not start.
    pub fn start() -> Result<TestServers, Error> {
        thread::scope(|scope| {
            let mariadb = scope.spawn(|| unless_given(shared::MYSQL_VARIABLE, MariaDb::start));
            let nats =
                scope.spawn(|| unless_given(shared::NATS_VARIABLE, || Nats::start(shared::NATS_NODES)));
            let redis = scope.spawn(|| unless_given(shared::REDIS_VARIABLE, RedisCluster::start));
            Ok(TestServers { mariadb: joined(mariadb)?, nats: joined(nats)?, redis: joined(redis)? })
        })
    }

    /// What tells the tests where they are: variables for their environment. The address of MariaDB holds its password.
    pub fn variables(&self) -> Vec<(&'static str, String)> {
        let mariadb = self.mariadb.iter().map(|server| (shared::MYSQL_VARIABLE, server.url().to_owned()));
        let nats = self.nats.iter().map(|cluster| (shared::NATS_VARIABLE, cluster.urls().join(",")));
        let redis = self.redis.iter().map(|cluster| (shared::REDIS_VARIABLE, cluster.urls().join(",")));
        mariadb.chain(nats).chain(redis).collect()
    }
}

fn unless_given<T>(variable: &str, start: impl FnOnce() -> Result<T, Error>) -> Result<Option<T>, Error> {
    if env::var_os(variable).is_some_and(|value| !value.is_empty()) {
        return Ok(None);
    }
    start().map(Some)
}

fn joined<T>(thread: ScopedJoinHandle<'_, T>) -> T {
    thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}

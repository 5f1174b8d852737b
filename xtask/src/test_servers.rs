//! The servers that all tests share.

use std::env;
use std::thread;

use servers::{MariaDb, Nats, RedisCluster, shared};

use crate::Error;

/// One of each kind, but for those that the environment names already. They are stopped when this is dropped, and at the
/// latest when this process has ended.
#[derive(Debug)]
pub(crate) struct TestServers {
    mariadb: Option<MariaDb>,
    nats: Option<Nats>,
    redis: Option<RedisCluster>,
}

impl TestServers {
    /// Starts them, all at the same time.
    ///
    /// # Errors
    /// When one does not start.
    pub(crate) fn start() -> Result<TestServers, Error> {
        thread::scope(|scope| {
            let mariadb = scope.spawn(|| unless_given(shared::MYSQL_VARIABLE, MariaDb::start));
            let nats =
                scope.spawn(|| unless_given(shared::NATS_VARIABLE, || Nats::start(shared::NATS_NODES)));
            let redis = scope.spawn(|| unless_given(shared::REDIS_VARIABLE, RedisCluster::start));
            let broke = |_| "a thread that starts servers has panicked";
            Ok(TestServers {
                mariadb: mariadb.join().map_err(broke)??,
                nats: nats.join().map_err(broke)??,
                redis: redis.join().map_err(broke)??,
            })
        })
    }

    /// What tells the tests where they are.
    pub(crate) fn variables(&self) -> Vec<(&'static str, String)> {
        let mariadb = self.mariadb.iter().map(|server| (shared::MYSQL_VARIABLE, server.url().to_owned()));
        let nats = self.nats.iter().map(|cluster| (shared::NATS_VARIABLE, cluster.urls().join(",")));
        let redis = self.redis.iter().map(|cluster| (shared::REDIS_VARIABLE, cluster.urls().join(",")));
        mariadb.chain(nats).chain(redis).collect()
    }
}

fn unless_given<T>(
    variable: &str,
    start: impl FnOnce() -> Result<T, servers::Error>,
) -> Result<Option<T>, servers::Error> {
    if env::var_os(variable).is_some_and(|value| !value.is_empty()) {
        println!("the tests use the server that {variable} names");
        return Ok(None);
    }
    start().map(Some)
}

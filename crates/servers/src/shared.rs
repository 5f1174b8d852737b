//! One server of each kind for a whole test binary, or for many.
//!
//! Where an environment variable names a server, that is used: `cargo xtask test` starts each once and sets the variables, and
//! who has servers of their own can. Otherwise the first who asks starts one; it goes when the process ends.
//!
//! Whoever shares a server takes a database of their own in it ([`MySqlAddress::database`]), or subjects and keys with a prefix of
//! their own ([`unique_name`](crate::unique_name)), and neither kills it nor empties it: what does that starts its own.

use std::env;
use std::sync::{Mutex, OnceLock, PoisonError};

use crate::{Error, MariaDb, MySqlAddress, Nats, Redis, RedisCluster};

/// Names a MariaDB or MySQL: `mysql://USER:PASSWORD@HOST:PORT`, of a user who may create databases.
pub const MYSQL_VARIABLE: &str = "SAGA_TEST_MYSQL";
/// Names a NATS cluster of three: `nats://HOST:PORT,...`.
pub const NATS_VARIABLE: &str = "SAGA_TEST_NATS";
/// Names a Redis Cluster: `redis://HOST:PORT,...`.
pub const REDIS_VARIABLE: &str = "SAGA_TEST_REDIS";

/// How many NATS servers are shared: as many as it takes to survive the loss of one.
pub const NATS_NODES: usize = 3;

/// A MariaDB.
///
/// # Panics
/// When it cannot be started, or the variable holds no address.
pub fn mariadb() -> &'static MySqlAddress {
    static SHARED: Shared<MySqlAddress, MariaDb> = Shared::new();
    SHARED.get(
        || given(MYSQL_VARIABLE).map(|url| MySqlAddress::parse(&url)).transpose(),
        || MariaDb::start().map(|server| (server.address().clone(), server)),
    )
}

/// The addresses of a NATS cluster of three, `nats://HOST:PORT` each.
///
/// # Panics
/// When it cannot be started.
pub fn nats() -> &'static [String] {
    static SHARED: Shared<Vec<String>, Nats> = Shared::new();
    SHARED.get(
        || Ok(given(NATS_VARIABLE).map(|urls| addresses(&urls))),
        || Nats::start(NATS_NODES).map(|cluster| (cluster.urls(), cluster)),
    )
}

/// The addresses of a Redis Cluster of six, `redis://HOST:PORT` each.
///
/// # Panics
/// When it cannot be started.
pub fn redis_cluster() -> &'static [String] {
    static SHARED: Shared<Vec<String>, RedisCluster> = Shared::new();
    SHARED.get(
        || Ok(given(REDIS_VARIABLE).map(|urls| addresses(&urls))),
        || RedisCluster::start().map(|cluster| (cluster.urls(), cluster)),
    )
}

/// The address of a plain Redis, `redis://HOST:PORT`. No variable names one: it is started within a moment.
///
/// # Panics
/// When it cannot be started.
pub fn redis() -> &'static str {
    static SHARED: Shared<String, Redis> = Shared::new();
    SHARED.get(|| Ok(None), || Redis::start().map(|server| (server.url(), server)))
}

/// An address, and the server if it is this process that runs it.
struct Shared<A, S> {
    address: OnceLock<A>,
    server: Mutex<Option<S>>,
}

impl<A, S> Shared<A, S> {
    const fn new() -> Shared<A, S> {
        Shared { address: OnceLock::new(), server: Mutex::new(None) }
    }

    fn get(
        &'static self,
        given: impl FnOnce() -> Result<Option<A>, Error>,
        start: impl FnOnce() -> Result<(A, S), Error>,
    ) -> &'static A {
        self.address.get_or_init(|| {
            let address = given().and_then(|given| match given {
                Some(address) => Ok(address),
                None => {
                    let (address, server) = start()?;
                    *self.server.lock().unwrap_or_else(PoisonError::into_inner) = Some(server);
                    Ok(address)
                }
            });
            match address {
                Ok(address) => address,
                Err(error) => panic!("{error}"),
            }
        })
    }
}

fn given(variable: &str) -> Option<String> {
    env::var(variable).ok().filter(|value| !value.is_empty())
}

fn addresses(list: &str) -> Vec<String> {
    list.split(',').map(str::trim).filter(|url| !url.is_empty()).map(str::to_owned).collect()
}

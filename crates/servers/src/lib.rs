//! Real servers as child processes, for tests and measurements: MariaDB, a cluster of NATS with JetStream, a cluster of Redis;
//! a browser; and a proxy that breaks connections.
//!
//! - [`MariaDb`], [`Nats`], [`Redis`], [`RedisCluster`]: started on free ports of 127.0.0.1, each with its data in a directory of its own;
//!   killed, paused, stopped and started again on the same port and the same data.
//! - `Certificates`, with the feature `certificates`: an authority of a test's own, and whom it vouches for.
//! - [`Chromium`]: a browser with a profile of its own, which shows one page.
//! - [`Proxy`]: between a client and a server, to cut, to stall, or to cut right behind a request.
//! - [`shared`]: one of each kind for a whole test binary; [`TestServers`]: for all of them.
//!
//! All methods block the thread that calls them, for seconds where a server starts.
//!
//! What never happens: a process or a data directory that outlives the process that started it, even if that is killed
//! with SIGKILL (see `nest.rs`); a server that listens beyond this machine; a missing program that is passed over.

#[cfg(feature = "certificates")]
mod certificates;
mod chromium;
mod error;
mod http;
mod mariadb;
mod mysql_address;
mod nats;
mod nest;
mod port;
mod process;
pub mod program;
mod proxy;
mod random;
mod redis;
mod redis_cluster;
mod resp;
pub mod shared;
mod test_servers;
mod wait;

#[cfg(feature = "certificates")]
pub use certificates::{Certificates, Identity};
pub use chromium::Chromium;
pub use error::Error;
pub use mariadb::MariaDb;
pub use mysql_address::{Database, MySqlAddress};
pub use nats::{Nats, NatsNode};
pub use proxy::Proxy;
pub use random::unique_name;
pub use redis::Redis;
pub use redis_cluster::RedisCluster;
pub use resp::Reply;
pub use test_servers::TestServers;

//! The servers under a distributed shop, with names in them that nobody else has.

use servers::{Error, MySqlAddress, shared, unique_name};

use crate::checks::Books;

/// Databases named by the design, each with the prefix of one test.
const DATABASES: [&str; 5] = ["account", "product", "order", "payment", "purchase"];
/// What a queue on the broker holds at most. Room is set aside, and what a test leaves behind stays until the servers go.
const QUEUE_MIB: u64 = 8;

/// Servers, and a prefix for all that a shop has in them. Its databases are dropped when this is.
#[derive(Debug)]
pub struct Engines {
    mysql: MySqlAddress,
    nats: String,
    redis: Option<String>,
    prefix: String,
}

impl Engines {
    /// The servers that tests share: a MariaDB, three NATS nodes, a Redis Cluster. Nobody kills them. Blocks while they start.
    ///
    /// # Panics
    /// When they do not start.
    pub fn shared() -> Engines {
        Engines::new(shared::mariadb().clone(), shared::nats(), Some(shared::redis_cluster()))
    }

    /// These servers.
    pub fn new(mysql: MySqlAddress, nats: &[String], redis: Option<&[String]>) -> Engines {
        let prefix = format!("{}_", unique_name());
        Engines { mysql, nats: nats.join(","), redis: redis.map(|nodes| nodes.join(",")), prefix }
    }

    /// Where the databases are.
    pub fn books(&self) -> Books {
        Books::Server { url: self.mysql.url().to_owned(), prefix: self.prefix.clone() }
    }

    /// What a shop is told of them.
    pub fn variables(&self) -> Vec<(String, String)> {
        let mut variables = vec![
            ("SAGA_MYSQL", self.mysql.url().to_owned()),
            ("SAGA_MYSQL__DATABASE_PREFIX", self.prefix.clone()),
            ("SAGA_NATS", self.nats.clone()),
            ("SAGA_NATS__QUEUE_MIB", QUEUE_MIB.to_string()),
            ("SAGA_NATS__PREFIX", self.name().to_owned()),
        ];
        if let Some(redis) = &self.redis {
            variables.push(("SAGA_REDIS", redis.clone()));
            variables.push(("SAGA_REDIS__PREFIX", self.name().to_owned()));
        }
        variables.into_iter().map(|(name, value)| (name.to_owned(), value)).collect()
    }

    /// The MariaDB, for statements of the test's own.
    pub fn mysql(&self) -> &MySqlAddress {
        &self.mysql
    }

    /// The NATS servers, `nats://HOST:PORT,...`, for messages of the test's own.
    pub fn nats(&self) -> &str {
        &self.nats
    }

    /// Bytes that a shop's queue on them holds at most.
    pub fn queue_bytes(&self) -> u64 {
        QUEUE_MIB * 1024 * 1024
    }

    /// What the names of all that a shop has in NATS and Redis begin with.
    pub fn name(&self) -> &str {
        self.prefix.trim_end_matches('_')
    }

    /// The name of a service's database.
    pub fn database(&self, service: &str) -> String {
        format!("{}{service}", self.prefix)
    }

    fn drop_databases(&self) -> Result<String, Error> {
        let drop = |name: &&str| format!("DROP DATABASE IF EXISTS {};", self.database(name));
        let all: String = DATABASES.iter().map(drop).collect();
        self.mysql.run(&format!("SET lock_wait_timeout = 1; {all}"))
    }
}

impl Drop for Engines {
    fn drop(&mut self) {
        // The server may be gone, or somebody may still hold a lock: then they are left to the server's end.
        let _ = self.drop_databases();
    }
}

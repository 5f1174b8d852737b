//! Looking at a server and a database without changing anything: for an operator who wants to know what a start would find.

use ::mysql::prelude::Queryable;
use ::mysql::{Conn, Error as MysqlError, OptsBuilder};

use super::Settings;
use super::connect::{self, OLDEST_MARIADB, OLDEST_MYSQL, numbers_of};
use super::migrate;
use crate::dialect::Dialect;
use crate::migrate::Plan;
use crate::{Migration, OpenError};

/// What a server says of itself, and how far a database is.
#[derive(Debug, Clone)]
pub struct Inspection {
    /// The server's host and port.
    pub address: String,
    /// The database's name.
    pub database: String,
    /// The server's version, as it says it.
    pub version: String,
    /// Whether the version is new enough.
    pub version_fits: bool,
    /// `innodb_flush_log_at_trx_commit`: 1 writes each commit to the disk.
    pub flush_log_at_trx_commit: u64,
    /// Whether there is a binary log.
    pub log_bin: bool,
    /// `sync_binlog`: 1 writes the binary log to the disk with each commit.
    pub sync_binlog: u64,
    /// Whether the server refuses to write.
    pub read_only: bool,
    /// `max_connections`.
    pub max_connections: u64,
    /// Connections open now.
    pub connections: u64,
    /// `max_allowed_packet`, in bytes.
    pub max_allowed_packet: u64,
    /// The server's clock, in Unix milliseconds.
    pub now_millis: i64,
    /// Migrations of this program that the database has not; None when there is no database yet.
    pub pending: Option<Vec<&'static Migration>>,
}

/// Asks a server of itself and of a database. Changes nothing. Blocks, at most for the settings' time-outs.
///
/// # Errors
/// As [`crate::Db::connect`].
pub fn inspect(settings: &Settings, migrations: &'static [Migration]) -> Result<Inspection, OpenError> {
    let (opts, database) = connect::parse(settings)?;
    let address = connect::address_of(&opts);
    let refused =
        |error: MysqlError| connect::Place { address: &address, database: &database }.refused(&error);
    // Without a database: it may not be there yet.
    let mut conn = Conn::new(OptsBuilder::from_opts(opts).db_name(None::<String>)).map_err(refused)?;
    type Known = (String, u64, u64, u64, u64, u64, u64, i64);
    let known: Option<Known> = conn
        .query_first(
            "SELECT VERSION(), @@innodb_flush_log_at_trx_commit, @@log_bin, @@sync_binlog, @@read_only,
                    @@max_connections, @@max_allowed_packet,
                    CAST(UNIX_TIMESTAMP(NOW(3)) * 1000 AS SIGNED)",
        )
        .map_err(refused)?;
    let (version, flush, log_bin, sync_binlog, read_only, max_connections, max_allowed_packet, now_millis) =
        known.unwrap_or_default();
    let status: Option<(String, u64)> =
        conn.query_first("SHOW GLOBAL STATUS LIKE 'Threads_connected'").map_err(refused)?;
    let exists: Option<String> = conn
        .exec_first("SELECT SCHEMA_NAME FROM information_schema.SCHEMATA WHERE SCHEMA_NAME = ?", (&database,))
        .map_err(refused)?;
    let pending = match exists {
        None => None,
        Some(_) => {
            conn.select_db(&database).map_err(refused)?;
            let applied = migrate::applied(&mut conn).map_err(refused)?;
            let at = format!("{database} on {address}");
            let plan = Plan::new(Dialect::Mysql, &at, migrations);
            plan.next_missing(&applied)?;
            Some(migrations[applied.len().min(migrations.len())..].iter().collect())
        }
    };
    let oldest = if version.contains("MariaDB") { OLDEST_MARIADB } else { OLDEST_MYSQL };
    Ok(Inspection {
        version_fits: numbers_of(&version) >= oldest,
        address,
        database,
        version,
        flush_log_at_trx_commit: flush,
        log_bin: log_bin != 0,
        sync_binlog,
        read_only: read_only != 0,
        max_connections,
        connections: status.map_or(0, |(_, connections)| connections),
        max_allowed_packet,
        now_millis,
        pending,
    })
}

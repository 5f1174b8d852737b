//! Migrations on a server: each under a lock of the server, recorded when its last statement is through.
//!
//! A server commits each change of a schema by itself, and what came before it. A crash in the middle leaves a migration half
//! applied and not recorded, and the next start runs its text again from the beginning; the texts are written for that. What
//! follows the last change of a schema is committed together with the record.

use std::time::{Duration, Instant};

use ::mysql::prelude::Queryable;
use ::mysql::{Conn, Error as MysqlError};

use super::connect::{Connector, run_script};
use super::outcome;
use crate::dialect::Dialect;
use crate::migrate::{Applied, Plan};
use crate::{Migration, OpenError};

/// How long a replica waits for another one that migrates.
const LOCK_PATIENCE: Duration = Duration::from_secs(15 * 60);

/// How long the server waits for the lock before it says that somebody else has it.
const LOCK_WAIT_SECONDS: u32 = 5;

const MIGRATIONS_TABLE: &str = "CREATE TABLE IF NOT EXISTS schema_migrations (
    number   INT          NOT NULL PRIMARY KEY,
    name     VARCHAR(255) NOT NULL,
    checksum VARCHAR(16)  NOT NULL
) ENGINE = InnoDB DEFAULT CHARSET = utf8mb4 COLLATE = utf8mb4_bin";

/// Applies what is missing. Where nothing is, it takes no lock and needs no right to create tables.
pub(super) fn migrate(
    conn: &mut Conn,
    connector: &Connector,
    migrations: &'static [Migration],
) -> Result<(), OpenError> {
    let database = format!("{} on {}", connector.database(), connector.address());
    let plan = Plan::new(Dialect::Mysql, &database, migrations);
    let refused = |error: MysqlError| connector.refused(&error);
    let needs_nothing = state(conn).map_err(refused)?.needs_nothing(&plan)?;
    conn.query_drop("COMMIT").map_err(refused)?;
    if needs_nothing {
        outcome::forget(conn, connector.address());
        return Ok(());
    }
    let mut conn = connector.connect_for_migrations()?;
    lock(&mut conn, connector)?;
    // The lock is given back with the connection.
    conn.query_drop(MIGRATIONS_TABLE).and_then(|()| conn.query_drop(outcome::TABLE)).map_err(refused)?;
    while let Some(next) = plan.next_missing(&state(&mut conn).map_err(refused)?.applied)? {
        let failed = |error: MysqlError| plan.failed(next, error);
        if !next.mysql.is_empty() {
            run_script(&mut conn, next.mysql).map_err(failed)?;
        }
        let row = (next.number, next.name, next.checksum(Dialect::Mysql));
        conn.exec_drop("INSERT INTO schema_migrations (number, name, checksum) VALUES (?, ?, ?)", row)
            .and_then(|()| conn.query_drop("COMMIT"))
            .map_err(failed)?;
        tracing::info!(database, number = next.number, name = next.name, "migration applied");
    }
    Ok(())
}

/// What a database has.
struct State {
    applied: Vec<Applied>,
    has_outcomes: bool,
}

impl State {
    fn needs_nothing(&self, plan: &Plan<'_>) -> Result<bool, OpenError> {
        Ok(plan.next_missing(&self.applied)?.is_none() && self.has_outcomes)
    }
}

fn state(conn: &mut Conn) -> Result<State, MysqlError> {
    let tables: Vec<String> = conn.query(
        "SELECT CONCAT(TABLE_NAME, '') FROM information_schema.TABLES
         WHERE TABLE_SCHEMA = DATABASE() AND TABLE_NAME IN ('schema_migrations', 'tx_outcome')",
    )?;
    let has = |name: &str| tables.iter().any(|table| table == name);
    let mut applied = Vec::new();
    if has("schema_migrations") {
        let one = |(number, name, checksum)| Applied { number, name, checksum };
        applied =
            conn.query_map("SELECT number, name, checksum FROM schema_migrations ORDER BY number", one)?;
    }
    Ok(State { applied, has_outcomes: has("tx_outcome") })
}

/// The migrations that a database has; none, if it has none of the tables.
pub(super) fn applied(conn: &mut Conn) -> Result<Vec<Applied>, MysqlError> {
    state(conn).map(|state| state.applied)
}

/// Waits for the lock of this database's migrations. Locks of a server are known by name to all of its databases.
fn lock(conn: &mut Conn, connector: &Connector) -> Result<(), OpenError> {
    let deadline = Instant::now() + LOCK_PATIENCE;
    let take = format!("SELECT GET_LOCK(CONCAT('saga:', MD5(DATABASE())), {LOCK_WAIT_SECONDS})");
    loop {
        let taken: Option<Option<u32>> =
            conn.query_first(&take).map_err(|error| connector.refused(&error))?;
        if taken.flatten() == Some(1) {
            return Ok(());
        }
        if Instant::now() >= deadline {
            return Err(OpenError::Server {
                database: format!("{} on {}", connector.database(), connector.address()),
                problem: format!("another process has been migrating it for {} s", LOCK_PATIENCE.as_secs()),
                advice: "wait for it, or end it",
                passing: true,
            });
        }
        tracing::info!(
            database = connector.database(),
            "waiting for another process that migrates the database"
        );
    }
}

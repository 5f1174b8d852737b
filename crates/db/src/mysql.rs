//! MySQL 8 and MariaDB 10.6: threads with a connection each, and the transactions that closures see.
//!
//! A closure of [`crate::Db::write`] is one transaction, on one of a few threads; the server shares an fsync among those that
//! commit at the same time. READ COMMITTED: a statement sees what is committed when it begins, and what was read
//! with `{for update}` stays as it is until the end. A closure of [`crate::Db::read`] sees one snapshot.
//!
//! What never happens here:
//! - An error that says "nothing was written" about a transaction that may have been: an outcome that is not known is found
//!   out (`outcome.rs`), and where it cannot be, it is [`Error::OutcomeUnknown`].
//! - A closure that goes on after its transaction is lost: each further statement of it fails with the same error, and
//!   what it returns is not believed.
//! - A duplicate key that is only one because somebody else committed since the closure looked: the closure is run again, and
//!   only a duplicate that comes twice is believed (`pool.rs`).
//! - A wait without an end: connecting, reading, writing, waiting for a lock, trying again are bounded, all of them here.
//! - A password in an error or a log.

mod connect;
mod fault;
pub(crate) mod insert;
mod inspect;
mod json;
mod migrate;
mod outcome;
mod pool;
mod session;
mod uniques;

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

pub use inspect::{Inspection, inspect};
pub use session::MysqlTx;

use crate::{Db, Migration, OpenError};
use connect::Connector;

/// Where a database is, and its bounds.
#[derive(Clone)]
pub struct Settings {
    /// `mysql://USER:PASSWORD@HOST:PORT/DATABASE?OPTIONS`. What is not a letter, a digit or one of `-._~` in the password is written as
    /// `%XX`. Without a database it is `saga_NAME`. It is created if it is not there and the user may.
    ///
    /// The options are those of the crate `mysql`, of which these matter: `tls=true` encrypts and checks the server's certificate
    /// against the public authorities, `root_cert_path=FILE` against those in a PEM file, `cert_chain_path=FILE` and
    /// `priv_key_path=FILE` show a certificate of one's own, `socket=PATH` connects through a Unix socket.
    pub url: String,
    /// The name for errors, logs and metrics.
    pub name: &'static str,
    /// Connections that write, each with a thread, at least 1. They are made when they are needed, and closed when they are not for
    /// a while.
    pub writers: usize,
    /// Connections that read, likewise.
    pub readers: usize,
    /// How many writes may wait before more are refused.
    pub write_queue_jobs: usize,
    /// How many reads may wait before more are refused.
    pub read_queue_jobs: usize,
    /// How long the network may take to connect.
    pub connect_timeout: Duration,
    /// How long the server may take for its greeting or for one answer, and the network for one packet. Longer than `lock_timeout`, in which the
    /// server says nothing.
    pub io_timeout: Duration,
    /// How long a statement waits for a row that another transaction holds. Whole seconds.
    pub lock_timeout: Duration,
    /// How long it is tried to find out whether a transaction was committed whose connection was lost meanwhile.
    pub outcome_patience: Duration,
}

impl Settings {
    /// The defaults.
    pub fn new(url: impl Into<String>, name: &'static str) -> Settings {
        Settings {
            url: url.into(),
            name,
            writers: 4,
            readers: 4,
            write_queue_jobs: 8192,
            read_queue_jobs: 8192,
            connect_timeout: Duration::from_secs(3),
            io_timeout: Duration::from_secs(15),
            lock_timeout: Duration::from_secs(5),
            outcome_patience: Duration::from_secs(30),
        }
    }
}

/// Without the URL, which holds a password.
impl fmt::Debug for Settings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Settings { name, writers, readers, .. } = self;
        f.debug_struct("Settings")
            .field("url", &"(not shown)")
            .field("name", name)
            .field("writers", writers)
            .field("readers", readers)
            .finish_non_exhaustive()
    }
}

/// Connects, brings the database to the newest migration, and starts the threads.
pub(crate) fn open(settings: &Settings, migrations: &'static [Migration]) -> Result<Db, OpenError> {
    let (connector, mut conn) = Connector::new(settings)?;
    migrate::migrate(&mut conn, &connector, migrations)?;
    let uniques = uniques::Uniques::read(&mut conn).map_err(|error| connector.refused(&error))?;
    drop(conn);
    pool::start(settings, Arc::new(connector), Arc::new(uniques))
}

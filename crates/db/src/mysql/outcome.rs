//! Whether a transaction was committed whose connection was lost while it was being committed.
//!
//! The last thing that a transaction does, if it wrote anything, is to leave word in `tx_outcome`: its number, in the row of its
//! connection. If the answer to COMMIT does not come, that row is read on another connection, with a lock. As
//! long as the lost transaction lives in the server (its COMMIT may still wait in a buffer, or be under way) it
//! holds that row, and the reader waits. Once the row can be read, the transaction is over: its number is there, or
//! it was rolled back and never will be.
//!
//! The word is answered before COMMIT is sent. Sent as one, both could wait in a buffer of the server, with no lock held yet, while the
//! row is read.
//!
//! There is a row for each connection, not for each transaction, so the table stays small, its rows stay in memory, and nobody
//! waits for another's row. It is one statement more for a transaction that writes; in return none is sent to begin it.
//!
//! What it cannot know: what a server does that loses what it had committed. A failover to a replica that lags is such a
//! loss, and whoever reads the replica sees the same.

use std::time::{Duration, Instant};

use ::mysql::Conn;
use ::mysql::Value as MysqlValue;
use ::mysql::prelude::Queryable;

use super::fault::Fault;
use super::session::Session;

/// The table. `at` is in Unix seconds of the server.
pub(super) const TABLE: &str = "CREATE TABLE IF NOT EXISTS tx_outcome (
    slot BIGINT NOT NULL PRIMARY KEY,
    no   BIGINT NOT NULL,
    at   BIGINT NOT NULL
) ENGINE = InnoDB";

/// A row is of no use to anybody so long after its connection's last transaction.
const KEEP_SECONDS: u64 = 24 * 60 * 60;

pub(super) const LEAVE_WORD: &str = "INSERT INTO tx_outcome (slot, no, at) VALUES (?, ?, UNIX_TIMESTAMP())
     ON DUPLICATE KEY UPDATE no = ?, at = UNIX_TIMESTAMP()";

pub(super) const LOOK_UP: &str = "SELECT no FROM tx_outcome WHERE slot = ? FOR UPDATE";

/// The pause between two tries to look up an outcome, when the server cannot be reached.
const LOOK_UP_PAUSE: Duration = Duration::from_millis(100);

/// A transaction of a connection: the connection's row, and the transaction's number in it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Mark {
    slot: i64,
    number: u64,
}

impl Mark {
    /// Of a new connection: no transaction yet. The row is nobody else's, as far as 63 random bits can tell.
    pub(super) fn new() -> Mark {
        Mark { slot: fastrand::i64(1..), number: 0 }
    }

    /// The next transaction.
    pub(super) fn next(&mut self) -> Mark {
        self.number += 1;
        *self
    }

    /// Whether this is the number of the transaction.
    pub(super) fn is(self, number: u64) -> bool {
        self.number == number
    }

    /// For [`LEAVE_WORD`].
    pub(super) fn values(self) -> Vec<MysqlValue> {
        vec![MysqlValue::Int(self.slot), MysqlValue::UInt(self.number), MysqlValue::UInt(self.number)]
    }

    /// For [`LOOK_UP`].
    pub(super) fn slot_value(self) -> Vec<MysqlValue> {
        vec![MysqlValue::Int(self.slot)]
    }
}

/// Whether the transaction was committed; none, if that could not be found out in time.
pub(super) fn find_out(session: &mut Session, mark: Mark, patience: Duration) -> Option<bool> {
    let deadline = Instant::now() + patience;
    loop {
        match session.was_committed(mark) {
            Ok(committed) => {
                let address = session.connector().address();
                tracing::info!(address, committed, "the outcome of a transaction was looked up");
                return Some(committed);
            }
            // The lost transaction still holds its row: the server waited for it as long as it waits for any row.
            Err(Fault::Conflict { .. }) => session.roll_back(),
            Err(fault) => {
                session.disconnect();
                tracing::debug!(?fault, "an outcome cannot be looked up now");
                std::thread::park_timeout(LOOK_UP_PAUSE);
            }
        }
        if Instant::now() >= deadline {
            return None;
        }
    }
}

/// Forgets connections that are long gone. If it cannot, another start will.
pub(super) fn forget(conn: &mut Conn, address: &str) {
    let delete = format!("DELETE FROM tx_outcome WHERE at < UNIX_TIMESTAMP() - {KEEP_SECONDS}");
    if let Err(error) = conn.query_drop(delete).and_then(|()| conn.query_drop("COMMIT")) {
        tracing::warn!(address, %error, "old rows of tx_outcome are still there");
    }
}

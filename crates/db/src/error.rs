//! What can go wrong with a statement or a transaction, sorted by what the caller can do about it.
//!
//! Every [`Error`] but one means that the transaction left nothing behind. On SQLite an outcome that is not known is never
//! an `Error`: the process ends before it answers (see `sqlite.rs`, `stop`). On MySQL it is found out (see
//! `mysql/outcome.rs`); where that cannot be done in time it is [`Error::OutcomeUnknown`].

use rusqlite::ffi;

/// Why a transaction did not happen. Nothing of it was written, unless it is [`Error::OutcomeUnknown`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// The disk, or the database's own page limit, is full. It heals by itself once there is space again.
    #[error("the database has no space left; nothing was written")]
    Full,
    /// A queue is at its bound: the caller is told at once instead of waiting without an end.
    #[error("the {queue} queue of database {database} holds its bound of {bound_jobs} jobs; try again later")]
    Overloaded {
        /// The database's name, from its settings.
        database: &'static str,
        /// `read` or `write`.
        queue: &'static str,
        /// How many jobs may wait.
        bound_jobs: usize,
    },
    /// A unique index or a primary key already has such a row.
    #[error("a row with the same {columns} exists")]
    Unique {
        /// The columns as `table.column`, separated by `, `, in the index's order.
        columns: String,
    },
    /// The database cannot be reached at the moment.
    #[error("the database is unavailable: {0}")]
    Unavailable(Outage),
    /// The closure panicked; it was rolled back, and the database goes on.
    #[error("the transaction panicked and was rolled back")]
    Panicked,
    /// A column's value does not fit the type that the code asked for.
    #[error("column {column} should hold {expected}, but holds {found}")]
    Column {
        /// The column's name in the result.
        column: String,
        /// The type asked for.
        expected: &'static str,
        /// An integer itself; of anything else only its kind and size, for it may be secret.
        found: String,
    },
    /// The closure itself put the transaction off: something outside of the database must be settled first. It may come again.
    #[error("the transaction was put off: {why}")]
    PutOff {
        /// What must be settled.
        why: &'static str,
    },
    /// Only on MySQL: the connection was lost while the transaction was being committed, and the server could not be
    /// asked in time whether it was. It may have been written. Whoever can repeat it without doing it twice should;
    /// nobody may say that nothing was done.
    #[error(
        "the connection was lost while committing, and for {patience_seconds} s the database could not be asked \
         whether the transaction was written"
    )]
    OutcomeUnknown {
        /// How long it was tried to find out.
        patience_seconds: u64,
    },
    /// Anything else: a mistake in a statement, a violated CHECK, NOT NULL or foreign key, a corrupt file.
    #[error("{message} (code {code}) in: {statement}")]
    Sql {
        /// The statement as the code has it, with its markers.
        statement: &'static str,
        /// The database's code, of SQLite the extended one; 0 if the fault was found before the database.
        code: i32,
        /// What the database says.
        message: String,
    },
}

/// Why a database cannot be reached.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Outage {
    /// [`crate::Db::close`] was called, or the database's thread has ended.
    #[error("it is closed")]
    Closed,
    /// Another connection, of another process, held a lock for longer than the busy time-out.
    #[error("it is locked by another process")]
    Busy,
    /// The operating system failed a read, a write or an allocation; the transaction was rolled back.
    #[error("{message} (code {code})")]
    System {
        /// The database's code, of SQLite the extended one.
        code: i32,
        /// What the database says.
        message: String,
    },
    /// Only on MySQL: no connection can be had, or it was lost before the commit.
    #[error("no connection to {address}: {why}")]
    Disconnected {
        /// The server's host and port.
        address: String,
        /// What the operating system or the server says.
        why: String,
    },
    /// Only on MySQL: others were in the way (deadlocks, locks held for too long), however often it was tried.
    #[error("it was in conflict with others in each of {runs} runs (code {code})")]
    Conflict {
        /// How often the transaction was run.
        runs: u32,
        /// The server's code for the last conflict.
        code: i32,
    },
}

impl Error {
    /// Whether the same transaction may succeed later without anything being changed in it. After
    /// [`Error::OutcomeUnknown`] only one may be repeated that finds out what an earlier run of it did.
    pub fn is_transient(&self) -> bool {
        let passing = matches!(
            self,
            Error::Full | Error::Overloaded { .. } | Error::Unavailable(_) | Error::PutOff { .. }
        );
        passing || self.is_unknown()
    }

    /// Whether the transaction may have been written all the same.
    pub fn is_unknown(&self) -> bool {
        matches!(self, Error::OutcomeUnknown { .. })
    }

    /// Whether this is a violation of uniqueness in which `column`, given as `table.column`, takes part.
    pub fn violates(&self, column: &str) -> bool {
        matches!(self, Error::Unique { columns } if columns.split(", ").any(|each| each == column))
    }

    /// Sorts an error of SQLite. Only for errors that leave no doubt about the outcome.
    pub(crate) fn from_sqlite(statement: &'static str, error: rusqlite::Error) -> Error {
        let code = extended_code(&error);
        let message = match &error {
            rusqlite::Error::SqliteFailure(_, Some(message)) => message.clone(),
            other => other.to_string(),
        };
        match code & 0xff {
            ffi::SQLITE_FULL => Error::Full,
            ffi::SQLITE_BUSY | ffi::SQLITE_LOCKED => Error::Unavailable(Outage::Busy),
            ffi::SQLITE_IOERR | ffi::SQLITE_NOMEM | ffi::SQLITE_CANTOPEN | ffi::SQLITE_PROTOCOL => {
                Error::Unavailable(Outage::System { code, message })
            }
            ffi::SQLITE_CONSTRAINT if is_uniqueness(code) => {
                let columns = message.split_once("failed: ").map_or("", |(_, columns)| columns);
                Error::Unique { columns: columns.to_owned() }
            }
            _ => Error::Sql { statement, code, message },
        }
    }
}

fn is_uniqueness(extended_code: i32) -> bool {
    matches!(
        extended_code,
        ffi::SQLITE_CONSTRAINT_UNIQUE | ffi::SQLITE_CONSTRAINT_PRIMARYKEY | ffi::SQLITE_CONSTRAINT_ROWID
    )
}

/// SQLite's extended result code, 0 where the error did not come from SQLite itself.
pub(crate) fn extended_code(error: &rusqlite::Error) -> i32 {
    match error {
        rusqlite::Error::SqliteFailure(failure, _) => failure.extended_code,
        rusqlite::Error::SqlInputError { error, .. } => error.extended_code,
        _ => 0,
    }
}

/// Why a database could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// SQLite 3.7.0 to 3.51.2 can corrupt a database whose WAL is reset while another connection reads it.
    #[error("SQLite {found} has a bug that can corrupt a WAL database; {needed} or newer is needed")]
    SqliteTooOld {
        /// The version that is linked.
        found: &'static str,
        /// The oldest version without the bug.
        needed: &'static str,
    },
    /// SQLite refused. The file may be on a file system without locks, not writable, or not a database.
    #[error("cannot open the database {path}: {source}")]
    Sqlite {
        /// The database's file.
        path: String,
        /// SQLite's reason.
        source: rusqlite::Error,
    },
    /// The journal mode could not be set: the file system cannot share memory between processes.
    #[error("the database {path} stays in journal mode {mode}, but WAL is needed; is it on a network drive?")]
    NoWal {
        /// The database's file.
        path: String,
        /// The mode it is in.
        mode: String,
    },
    /// The URL of a MySQL server cannot be understood. It is not shown: it may hold a password.
    #[error("the URL of the MySQL server for {database} is wrong: {problem}")]
    Url {
        /// The database's name, from its settings.
        database: &'static str,
        /// What is wrong with it.
        problem: String,
    },
    /// The server is too old.
    #[error("the server at {address} is {found}; MySQL 8.0.19 or MariaDB 10.6 or newer is needed")]
    ServerTooOld {
        /// The server's host and port.
        address: String,
        /// The version that it says it has.
        found: String,
    },
    /// The server cannot be reached, or refuses.
    #[error("cannot open the database {database}: {problem}; {advice}")]
    Server {
        /// The database and where it is.
        database: String,
        /// What the server or the operating system says.
        problem: String,
        /// What to do about it.
        advice: &'static str,
        /// Whether trying again later may help.
        passing: bool,
    },
    /// A newer binary has been here, and its tables are not known to this one.
    #[error(
        "the database {database} is at migration {found}, newer than this program's {known}: update the program"
    )]
    Newer {
        /// The database's file, or its name and server.
        database: String,
        /// The newest migration in the database.
        found: u32,
        /// The newest migration of this program.
        known: u32,
    },
    /// What this program would apply is not what was applied.
    #[error(
        "migration {number} ({name}) of the database {database} differs from the one that was applied as {applied}"
    )]
    Changed {
        /// The database's file, or its name and server.
        database: String,
        /// The migration's number.
        number: u32,
        /// Its name in this program.
        name: &'static str,
        /// The number and name that the database has in this place.
        applied: String,
    },
    /// A migration failed; those before it stay. On SQLite it left nothing behind; on MySQL, which commits each change of
    /// a schema by itself, it is taken up again at the next start.
    #[error("migration {number} ({name}) of the database {database} failed: {source}")]
    Migration {
        /// The database's file, or its name and server.
        database: String,
        /// The migration's number.
        number: u32,
        /// Its name.
        name: &'static str,
        /// The database's reason.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The operating system refused a thread.
    #[error("cannot start a thread for the database {database}: {source}")]
    Thread {
        /// The database's name, from its settings.
        database: &'static str,
        /// The system's reason.
        source: std::io::Error,
    },
}

impl OpenError {
    /// Whether the same call may succeed later: the server cannot be reached now, or is busy.
    pub fn is_transient(&self) -> bool {
        matches!(self, OpenError::Server { passing: true, .. })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn failure(code: i32, message: &str) -> rusqlite::Error {
        rusqlite::Error::SqliteFailure(ffi::Error::new(code), Some(message.to_owned()))
    }

    #[test]
    fn errors_are_sorted_by_what_the_caller_can_do() {
        let sort = |code| Error::from_sqlite("S", failure(code, "m"));
        assert_eq!(sort(ffi::SQLITE_FULL), Error::Full);
        assert_eq!(sort(ffi::SQLITE_BUSY), Error::Unavailable(Outage::Busy));
        assert_eq!(
            sort(ffi::SQLITE_IOERR_READ),
            Error::Unavailable(Outage::System { code: ffi::SQLITE_IOERR_READ, message: "m".into() })
        );
        assert!(sort(ffi::SQLITE_NOMEM).is_transient());
        assert!(!sort(ffi::SQLITE_CORRUPT).is_transient());
        assert!(!sort(ffi::SQLITE_CONSTRAINT_CHECK).is_transient());
    }

    #[test]
    fn a_uniqueness_error_names_its_columns() {
        let two =
            failure(ffi::SQLITE_CONSTRAINT_UNIQUE, "UNIQUE constraint failed: person.email, person.shop");
        let error = Error::from_sqlite("S", two);
        assert!(error.violates("person.email") && error.violates("person.shop"));
        assert!(!error.violates("person.e") && !error.violates("email"));
    }
}

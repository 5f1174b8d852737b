//! What went wrong, sorted by what is to be done about it.

use std::io;

use ::mysql::{DriverError, Error as MysqlError, MySqlError};

use crate::{Error, Outage};

/// An error of a statement, sorted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Fault {
    /// The connection is gone, and with it the transaction.
    Lost {
        /// What the operating system or the server says.
        why: String,
        /// Nothing was heard in time: the server may be there, and may still be at it.
        timed_out: bool,
    },
    /// Another transaction was in the way; the whole transaction is to be run again.
    Conflict {
        /// The server's code.
        code: u16,
    },
    /// The server refuses for now, and another connection may find one that does not: it is read-only or stopping.
    Refused {
        /// The server's code.
        code: u16,
        /// What it says.
        message: String,
    },
    /// There is no space.
    Full,
    /// A row with the same key is there.
    Duplicate {
        /// What the server says: it holds the key's name and the row's values.
        message: String,
    },
    /// The statement is at fault.
    Statement {
        /// The server's code, or 0.
        code: u16,
        /// What the server, or the driver, says.
        message: String,
    },
}

impl Fault {
    pub(super) fn of(error: &MysqlError) -> Fault {
        match error {
            MysqlError::MySqlError(said) => of_server(said),
            MysqlError::IoError(error) => lost_by(error),
            MysqlError::CodecError(error) => match std::error::Error::source(error) {
                Some(source) => source.downcast_ref().map_or_else(|| lost(error), lost_by),
                None => lost(error),
            },
            MysqlError::TlsError(error) => lost(error),
            MysqlError::DriverError(error) => match error {
                DriverError::ConnectTimeout | DriverError::Timeout => {
                    Fault::Lost { why: error.to_string(), timed_out: true }
                }
                DriverError::CouldNotConnect(Some((_, why, _))) => lost(why),
                DriverError::CouldNotConnect(None)
                | DriverError::PacketOutOfSync
                | DriverError::UnexpectedPacket
                | DriverError::SetupError => lost(error),
                other => Fault::Statement { code: 0, message: other.to_string() },
            },
            // Never the values: they may be secret.
            MysqlError::FromValueError(_) | MysqlError::FromRowError(_) => {
                Fault::Statement { code: 0, message: "a value of another type than expected".to_owned() }
            }
            MysqlError::UrlError(error) => Fault::Statement { code: 0, message: error.to_string() },
        }
    }

    /// The error for the caller of a transaction that this one ended, or of a statement that it failed.
    pub(super) fn error(self, statement: &'static str, address: &str) -> Error {
        match self {
            Fault::Lost { why, .. } => {
                Error::Unavailable(Outage::Disconnected { address: address.to_owned(), why })
            }
            Fault::Conflict { code } => {
                Error::Unavailable(Outage::Conflict { runs: 1, code: i32::from(code) })
            }
            Fault::Refused { code, message } => {
                Error::Unavailable(Outage::System { code: i32::from(code), message })
            }
            Fault::Full => Error::Full,
            Fault::Duplicate { message } => Error::Unique { columns: key_name(&message).to_owned() },
            Fault::Statement { code, message } => Error::Sql { statement, code: i32::from(code), message },
        }
    }
}

fn lost(why: &impl ToString) -> Fault {
    Fault::Lost { why: why.to_string(), timed_out: false }
}

fn lost_by(error: &io::Error) -> Fault {
    let timed_out = matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut);
    let why = if timed_out { "the server did not answer in time".to_owned() } else { error.to_string() };
    Fault::Lost { why, timed_out }
}

/// The codes are those of both servers, from MySQL's "Server Error Message Reference" and MariaDB's "Error Codes".
fn of_server(said: &MySqlError) -> Fault {
    let MySqlError { code, message, .. } = said;
    match code {
        // CHECKREAD, LOCK_WAIT_TIMEOUT, LOCK_DEADLOCK, LOCK_NOWAIT (both servers').
        1020 | 1205 | 1213 | 1875 | 3572 => Fault::Conflict { code: *code },
        // DUP_ENTRY, DUP_ENTRY_WITH_KEY_NAME.
        1062 | 1586 => Fault::Duplicate { message: message.clone() },
        // DISK_FULL, RECORD_FILE_FULL, ENGINE_OUT_OF_... as "error 28", ENOSPC.
        1021 | 1114 => Fault::Full,
        1026 | 1030 | 3675 if message.contains("28") || message.contains("space") => Fault::Full,
        // NORMAL_SHUTDOWN, SERVER_SHUTDOWN, CONNECTION_KILLED, NEW_ABORTING_CONNECTION, CLIENT_INTERACTION_TIMEOUT, and
        // errors of the network as the server saw them.
        1053 | 1077 | 1079 | 1152..=1161 | 1184 | 1927 | 4031 => lost(message),
        // CON_COUNT, TOO_MANY_USER_CONNECTIONS, USER_LIMIT_REACHED.
        1040 | 1203 | 1226 => Fault::Refused { code: *code, message: message.clone() },
        // OPTION_PREVENTS_STATEMENT (--read-only), READ_ONLY_MODE, WSREP "not prepared for use".
        1290 | 1836 | 1047 => Fault::Refused { code: *code, message: message.clone() },
        // OUTOFMEMORY, OUT_OF_SORTMEMORY, OUT_OF_RESOURCES, LOCK_TABLE_FULL, QUERY_INTERRUPTED, STATEMENT_TIMEOUT,
        // QUERY_TIMEOUT, too many prepared statements.
        1037 | 1038 | 1041 | 1206 | 1317 | 1461 | 1969 | 3024 => {
            Fault::Refused { code: *code, message: message.clone() }
        }
        _ => Fault::Statement { code: *code, message: message.clone() },
    }
}

/// The key's name in "Duplicate entry '...' for key 'name'", without the table that MySQL puts before it. It stands last:
/// what the entry holds may look like anything.
pub(super) fn key_name(message: &str) -> &str {
    let name = message.rsplit_once("for key '").map_or("", |(_, name)| name.trim_end_matches('\''));
    name.rsplit_once('.').map_or(name, |(_, name)| name)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn server(code: u16, message: &str) -> Fault {
        let (state, message) = ("HY000".to_owned(), message.to_owned());
        Fault::of(&MysqlError::MySqlError(MySqlError { state, message, code }))
    }

    #[test]
    fn errors_are_sorted_by_what_is_to_be_done() {
        for code in [1020, 1205, 1213] {
            assert_eq!(server(code, "m"), Fault::Conflict { code });
        }
        assert_eq!(server(1114, "The table 't' is full"), Fault::Full);
        assert_eq!(
            server(1026, "Error writing file '/x' (Errcode: 28 \"No space left on device\")"),
            Fault::Full
        );
        assert_ne!(server(1026, "Error writing file '/x' (Errcode: 5 \"Input/output error\")"), Fault::Full);
        for code in [1290, 1836, 1040] {
            assert!(matches!(server(code, "m"), Fault::Refused { .. }), "{code}");
            assert!(server(code, "m").error("S", "a").is_transient());
        }
        for code in [1053, 1927, 4031] {
            assert!(matches!(server(code, "m"), Fault::Lost { timed_out: false, .. }), "{code}");
        }
        for code in [1064, 1146, 1048, 4025, 3819, 1406, 1452] {
            assert!(!server(code, "m").error("S", "a").is_transient(), "{code}");
        }
        let timeout = MysqlError::IoError(io::Error::from(io::ErrorKind::WouldBlock));
        assert!(matches!(Fault::of(&timeout), Fault::Lost { timed_out: true, .. }));
        let broken = MysqlError::IoError(io::Error::from(io::ErrorKind::BrokenPipe));
        assert!(matches!(Fault::of(&broken), Fault::Lost { timed_out: false, .. }));
    }

    #[test]
    fn the_name_of_a_key_is_found_whatever_the_entry_holds() {
        assert_eq!(key_name("Duplicate entry 'a' for key 'PRIMARY'"), "PRIMARY");
        assert_eq!(key_name("Duplicate entry 'for key 'x'' for key 'customer.email_key'"), "email_key");
        assert_eq!(key_name("?"), "");
    }
}

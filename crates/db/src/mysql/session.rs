//! A connection with its prepared statements, and the transaction that a closure sees on it.

use std::collections::HashMap;
use std::sync::Arc;

use ::mysql::prelude::Queryable;
use ::mysql::{Conn, Error as MysqlError, Params, Statement, Value as MysqlValue};

use super::connect::{Connector, Role};
use super::fault::{Fault, key_name};
use super::json;
use super::outcome::{self, Mark};
use super::uniques::Uniques;
use crate::dialect::{Dialect, Statements};
use crate::{Error, Row, Value};

/// The connection of one thread; made when it is needed.
pub(super) struct Session {
    connector: Arc<Connector>,
    uniques: Arc<Uniques>,
    role: Role,
    statements: Statements,
    live: Option<Live>,
}

/// What is sent for a statement.
#[derive(Clone)]
enum Request {
    /// These, for the `?` of its text.
    Values(Vec<MysqlValue>),
    /// A text in its place, whose rows nobody wants.
    Written(String),
}

/// What there is once a connection is made.
struct Live {
    conn: Conn,
    /// By address and length of the static text, as in [`Statements`]. No more than the program has statements.
    prepared: HashMap<(usize, usize), Statement>,
    /// Under which the transactions of this connection leave word that they were committed.
    mark: Mark,
}

/// Why a statement failed.
enum Failed {
    /// There was no connection to send it on.
    NotSent(Fault),
    Fault(Fault),
    /// The closure did not like a row.
    Row(Error),
}

impl From<MysqlError> for Failed {
    fn from(error: MysqlError) -> Failed {
        Failed::Fault(Fault::of(&error))
    }
}

/// Why there was no commit.
pub(super) enum CommitFailed {
    /// Certainly none.
    NotWritten(Fault),
    /// The connection was lost between asking and hearing. Whether it was committed is known under this mark.
    Unknown(Mark),
}

impl Session {
    pub(super) fn new(connector: Arc<Connector>, uniques: Arc<Uniques>, role: Role) -> Session {
        Session { connector, uniques, role, statements: Statements::new(Dialect::Mysql), live: None }
    }

    pub(super) fn connector(&self) -> &Connector {
        &self.connector
    }

    pub(super) fn is_connected(&self) -> bool {
        self.live.is_some()
    }

    /// Closes the connection. The server rolls back what was not committed.
    pub(super) fn disconnect(&mut self) {
        self.live = None;
    }

    /// Leaves whatever transaction there is. A connection that cannot is of no use.
    pub(super) fn roll_back(&mut self) {
        if self.end("ROLLBACK").is_err() {
            self.disconnect();
        }
    }

    /// Commits, leaving word of it if something was written.
    pub(super) fn commit(&mut self, wrote: bool) -> Result<(), CommitFailed> {
        if !wrote {
            // Nothing depends on it but locks, and they go with the connection.
            if self.end("COMMIT").is_err() {
                self.disconnect();
            }
            return Ok(());
        }
        let mark = self.leave_word().map_err(CommitFailed::NotWritten)?;
        match self.end("COMMIT") {
            Ok(()) => Ok(()),
            // The server says that it has rolled back instead.
            Err(fault @ Fault::Conflict { .. }) => Err(CommitFailed::NotWritten(fault)),
            Err(fault) => {
                let address = self.connector.address();
                tracing::warn!(address, ?fault, "the outcome of a transaction is unknown: looking it up");
                self.disconnect();
                Err(CommitFailed::Unknown(mark))
            }
        }
    }

    /// Whether the transaction that left word under this mark was committed. Waits for it, if the server is still at it.
    pub(super) fn was_committed(&mut self, mark: Mark) -> Result<bool, Fault> {
        let mut found = None;
        let mut read = |row: &Row<'_>| {
            found = Some(row.get::<u64>(0)?);
            Ok(true)
        };
        let asked = self.send(outcome::LOOK_UP, Request::Values(mark.slot_value()), &mut read);
        asked.map_err(fault_of)?;
        self.roll_back();
        Ok(found.is_some_and(|number| mark.is(number)))
    }

    fn leave_word(&mut self) -> Result<Mark, Fault> {
        let Some(live) = &mut self.live else {
            return Err(Fault::Lost { why: "the connection is closed".to_owned(), timed_out: false });
        };
        let mark = live.mark.next();
        self.send(outcome::LEAVE_WORD, Request::Values(mark.values()), &mut |_| Ok(true))
            .map_err(fault_of)?;
        Ok(mark)
    }

    /// A statement that ends the transaction.
    fn end(&mut self, statement: &str) -> Result<(), Fault> {
        match &mut self.live {
            Some(live) => live.conn.query_drop(statement).map_err(|error| Fault::of(&error)),
            None => Ok(()),
        }
    }

    /// Sends a statement and gives its rows to `each`, until that says false.
    fn send(
        &mut self,
        sql: &'static str,
        request: Request,
        each: &mut dyn FnMut(&Row<'_>) -> Result<bool, Error>,
    ) -> Result<u64, Failed> {
        let live = match &mut self.live {
            Some(live) => live,
            none => {
                let made = self.connector.connect(self.role);
                let conn = made.map_err(|refused| Failed::NotSent(refused.fault))?;
                none.insert(Live { conn, prepared: HashMap::new(), mark: Mark::new() })
            }
        };
        let values = match request {
            Request::Values(values) => values,
            Request::Written(text) => {
                live.conn.query_drop(text)?;
                return Ok(live.conn.affected_rows());
            }
        };
        let key = (sql.as_ptr().addr(), sql.len());
        let statement = match live.prepared.get(&key) {
            Some(prepared) => prepared.clone(),
            None => {
                let prepared = live.conn.prep(self.statements.text(sql))?;
                live.prepared.insert(key, prepared.clone());
                prepared
            }
        };
        let params = if values.is_empty() { Params::Empty } else { Params::Positional(values) };
        let mut rows = live.conn.exec_iter(&statement, params)?;
        let changed = rows.affected_rows();
        for row in rows.by_ref() {
            if !each(&Row::mysql(&row?)).map_err(Failed::Row)? {
                break;
            }
        }
        Ok(changed)
    }
}

fn fault_of(failed: Failed) -> Fault {
    match failed {
        Failed::NotSent(fault) | Failed::Fault(fault) => fault,
        Failed::Row(error) => Fault::Statement { code: 0, message: error.to_string() },
    }
}

/// A running transaction on MySQL, as a closure sees it.
pub struct MysqlTx<'c> {
    session: &'c mut Session,
    ran: Ran,
}

/// What is known of a transaction.
#[derive(Default)]
pub(super) struct Ran {
    /// The server has answered a statement of it.
    pub(super) began: bool,
    /// It has sent a statement that may have changed something.
    pub(super) wrote: bool,
    /// Why it is lost as a whole, and at which statement.
    pub(super) lost: Option<(Fault, &'static str)>,
    /// What the server said of the last duplicate key.
    pub(super) duplicate: Option<String>,
}

impl<'c> MysqlTx<'c> {
    pub(super) fn new(session: &'c mut Session) -> MysqlTx<'c> {
        MysqlTx { session, ran: Ran::default() }
    }

    pub(super) fn into_ran(self) -> Ran {
        self.ran
    }

    pub(crate) fn execute(&mut self, sql: &'static str, params: &[Value<'_>]) -> Result<u64, Error> {
        self.run_parts(sql, params, true, &mut |_| Ok(true))
    }

    /// Gives the rows to `each`, until it says false.
    pub(crate) fn query(
        &mut self,
        sql: &'static str,
        params: &[Value<'_>],
        mut each: impl FnMut(&Row<'_>) -> Result<bool, Error>,
    ) -> Result<(), Error> {
        self.run_parts(sql, params, false, &mut each).map(drop)
    }

    /// Runs a statement; one with a set once for each part of it, and not at all for an empty one.
    fn run_parts(
        &mut self,
        sql: &'static str,
        params: &[Value<'_>],
        writes: bool,
        each: &mut dyn FnMut(&Row<'_>) -> Result<bool, Error>,
    ) -> Result<u64, Error> {
        let [Value::Set(set), others @ ..] = params else {
            return self.run(sql, Request::Values(values(None, params)), writes, each);
        };
        let full_bytes = self.session.connector.set_bytes();
        if let Some(insert) = self.session.statements.insert(sql) {
            // A bug of the statement's author, found at its first use.
            assert!(others.is_empty(), "a statement that inserts a set takes nothing else: {sql}");
            let texts = insert.texts(set, full_bytes);
            return texts.map(|text| self.run(sql, Request::Written(text), writes, each)).sum();
        }
        let (mut changed, mut go_on) = (0, true);
        for text in json::texts(set, full_bytes) {
            let mut tell = |row: &Row<'_>| {
                go_on = each(row)?;
                Ok(go_on)
            };
            changed += self.run(sql, Request::Values(values(Some(text), others)), writes, &mut tell)?;
            if !go_on {
                break;
            }
        }
        Ok(changed)
    }

    fn run(
        &mut self,
        sql: &'static str,
        request: Request,
        writes: bool,
        each: &mut dyn FnMut(&Row<'_>) -> Result<bool, Error>,
    ) -> Result<u64, Error> {
        if let Some((fault, statement)) = &self.ran.lost {
            return Err(fault.clone().error(statement, self.session.connector.address()));
        }
        self.ran.wrote |= writes;
        // A connection that was idle may be dead. If nothing was done on it in this transaction, the statement is sent again on
        // a new one, unless rows of it have come already.
        let spare = (!self.ran.began && self.session.live.is_some()).then(|| request.clone());
        let mut rows_came = false;
        let mut tell = |row: &Row<'_>| {
            rows_came = true;
            each(row)
        };
        let mut sent = self.session.send(sql, request, &mut tell);
        if let (Err(Failed::Fault(Fault::Lost { timed_out: false, .. })), Some(request), false) =
            (&sent, spare, rows_came)
        {
            self.session.disconnect();
            sent = self.session.send(sql, request, each);
        }
        match sent {
            Ok(changed) => {
                self.ran.began = true;
                Ok(changed)
            }
            Err(Failed::Row(error)) => {
                self.ran.began = true;
                Err(error)
            }
            Err(Failed::NotSent(fault) | Failed::Fault(fault)) => Err(self.note(fault, sql)),
        }
    }

    /// Remembers what a fault means for the transaction, and gives the error for the closure.
    fn note(&mut self, fault: Fault, statement: &'static str) -> Error {
        match &fault {
            Fault::Lost { .. } | Fault::Conflict { .. } | Fault::Refused { .. } | Fault::Full => {
                self.ran.lost = Some((fault.clone(), statement));
            }
            Fault::Duplicate { message } => {
                self.ran.began = true;
                self.ran.duplicate = Some(message.clone());
                let columns = self.session.uniques.columns(statement, key_name(message));
                return Error::Unique { columns };
            }
            Fault::Statement { .. } => self.ran.began = true,
        }
        fault.error(statement, self.session.connector.address())
    }
}

fn values(set: Option<String>, others: &[Value<'_>]) -> Vec<MysqlValue> {
    let set = set.map(|text| MysqlValue::Bytes(text.into_bytes()));
    set.into_iter().chain(others.iter().map(|value| mysql_value(*value))).collect()
}

fn mysql_value(value: Value<'_>) -> MysqlValue {
    match value {
        Value::Null => MysqlValue::NULL,
        Value::Int(number) => MysqlValue::Int(number),
        Value::Text(text) => MysqlValue::Bytes(text.as_bytes().to_vec()),
        Value::Blob(bytes) => MysqlValue::Bytes(bytes.to_vec()),
        // A bug of the statement's author, found at its first use.
        Value::Set(_) => panic!("a set is a statement's first parameter, or none"),
    }
}

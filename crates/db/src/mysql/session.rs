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

/// A statement that is sent together with what follows it: nobody needs its answer to go on.
pub(super) struct PutOff {
    /// As its author wrote it, for errors.
    sql: &'static str,
    /// As the server gets it.
    text: String,
}

/// What there is once a connection is made.
struct Live {
    conn: Conn,
    /// By address and length of the static text, as in [`Statements`]. No more than the program has statements.
    prepared: HashMap<(usize, usize), Statement>,
    /// Under which the transactions of this connection leave word that they were committed.
    mark: Mark,
}

/// Whether word is left of a transaction, see `outcome.rs`.
#[derive(Clone, Copy)]
enum Word {
    Left,
    None,
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
    /// Certainly none, because of this statement.
    NotWritten(Fault, &'static str),
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

    /// The error for this duplicate key, of which the server said this.
    pub(super) fn duplicate(&self, statement: &'static str, message: &str) -> Error {
        Error::Unique { columns: self.uniques.columns(statement, key_name(message)) }
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

    /// Commits what was done, after what was put off. If anything was written, word is left of it.
    pub(super) fn commit(
        &mut self,
        began: bool,
        wrote: bool,
        put_off: &[PutOff],
    ) -> Result<(), CommitFailed> {
        if !wrote {
            // Nothing depends on it but locks, and they go with the connection.
            if self.end("COMMIT").is_err() {
                self.disconnect();
            }
            return Ok(());
        }
        let mark = self
            .send_put_off(began, put_off, Word::Left)
            .map_err(|(fault, statement)| CommitFailed::NotWritten(fault, statement))?;
        match self.end("COMMIT") {
            Ok(()) => Ok(()),
            // The server says that it has rolled back instead.
            Err(fault @ Fault::Conflict { .. }) => Err(CommitFailed::NotWritten(fault, "COMMIT")),
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
        let asked = self.send(outcome::LOOK_UP, mark.slot_value(), &mut read);
        asked.map_err(fault_of)?;
        self.roll_back();
        Ok(found.is_some_and(|number| mark.is(number)))
    }

    /// Sends at once what was put off and, if that is wanted, the word. A connection that was idle may be dead: if nothing was done
    /// on it in this transaction, it is sent again on a new one. In an error the fault, and the statement that it is of: none behind
    /// that was run.
    fn send_put_off(
        &mut self,
        began: bool,
        put_off: &[PutOff],
        word: Word,
    ) -> Result<Mark, (Fault, &'static str)> {
        if began && self.live.is_none() {
            let fault = Fault::Lost { why: "the connection is closed".to_owned(), timed_out: false };
            return Err((fault, outcome::LEAVE_WORD));
        }
        let may_be_dead = !began && self.live.is_some();
        match self.try_put_off(put_off, word) {
            Err((Fault::Lost { timed_out: false, .. }, _)) if may_be_dead => {
                self.disconnect();
                self.try_put_off(put_off, word)
            }
            sent => sent,
        }
    }

    fn try_put_off(&mut self, put_off: &[PutOff], word: Word) -> Result<Mark, (Fault, &'static str)> {
        let live = self.live().map_err(|fault| (fault, outcome::LEAVE_WORD))?;
        let word = match word {
            Word::Left => Some(PutOff { sql: outcome::LEAVE_WORD, text: live.mark.next().word() }),
            Word::None => None,
        };
        let mut statements = put_off.iter().chain(&word);
        let text = statements.clone().map(|one| one.text.as_str()).collect::<Vec<_>>().join(";");
        let mut at = || statements.next().map_or(outcome::LEAVE_WORD, |one| one.sql);
        let mut answers = live.conn.query_iter(text).map_err(|error| (Fault::of(&error), at()))?;
        // An answer is read to its end before the next one comes. The server stops behind an error.
        while let Some(mut answer) = answers.iter() {
            let statement = at();
            if let Some(Err(error)) = answer.find(Result::is_err) {
                return Err((Fault::of(&error), statement));
            }
        }
        Ok(live.mark)
    }

    /// The connection; made if there is none.
    fn live(&mut self) -> Result<&mut Live, Fault> {
        match &mut self.live {
            Some(live) => Ok(live),
            none => {
                let made = self.connector.connect(self.role);
                let conn = made.map_err(|refused| refused.fault)?;
                Ok(none.insert(Live { conn, prepared: HashMap::new(), mark: Mark::new() }))
            }
        }
    }

    /// A statement that ends the transaction.
    fn end(&mut self, statement: &str) -> Result<(), Fault> {
        match &mut self.live {
            Some(live) => live.conn.query_drop(statement).map_err(|error| Fault::of(&error)),
            None => Ok(()),
        }
    }

    /// Sends a statement, with these for the `?` of its text, and gives its rows to `each`, until that says false.
    fn send(
        &mut self,
        sql: &'static str,
        values: Vec<MysqlValue>,
        each: &mut dyn FnMut(&Row<'_>) -> Result<bool, Error>,
    ) -> Result<u64, Failed> {
        self.live().map_err(Failed::NotSent)?;
        let Session { live: Some(live), statements, .. } = self else { unreachable!("it was just made") };
        let key = (sql.as_ptr().addr(), sql.len());
        let statement = match live.prepared.get(&key) {
            Some(prepared) => prepared.clone(),
            None => {
                let prepared = live.conn.prep(statements.text(sql))?;
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
    /// Statements that are still to be sent.
    pub(super) put_off: Vec<PutOff>,
    /// A statement that was put off has failed, with this fault: whatever the closure makes of it, nothing is committed.
    pub(super) failed: Option<(Fault, &'static str)>,
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
            return self.run(sql, values(None, params), writes, each);
        };
        let full_bytes = self.session.connector.set_bytes();
        if let Some(insert) = self.session.statements.insert(sql) {
            // A bug of the statement's author, found at its first use.
            assert!(others.is_empty(), "a statement that inserts a set takes nothing else: {sql}");
            let texts: Vec<String> = insert.texts(set, full_bytes).collect();
            for text in texts {
                self.put_off(PutOff { sql, text }, full_bytes)?;
            }
            return Ok(set.len() as u64);
        }
        let (mut changed, mut go_on) = (0, true);
        for text in json::texts(set, full_bytes) {
            let mut tell = |row: &Row<'_>| {
                go_on = each(row)?;
                Ok(go_on)
            };
            changed += self.run(sql, values(Some(text), others), writes, &mut tell)?;
            if !go_on {
                break;
            }
        }
        Ok(changed)
    }

    /// An insert of a set goes with what is sent next, at the latest with the word before the commit: a lone transaction takes
    /// as long as its round trips. So it fails later, too; then the transaction can only be rolled back.
    fn put_off(&mut self, statement: PutOff, full_bytes: usize) -> Result<(), Error> {
        let waiting: usize = self.ran.put_off.iter().map(|one| one.text.len()).sum();
        if waiting + statement.text.len() > full_bytes {
            self.send_put_off()?;
        }
        self.ran.wrote = true;
        self.ran.put_off.push(statement);
        Ok(())
    }

    fn send_put_off(&mut self) -> Result<(), Error> {
        if let Some((fault, statement)) = self.ran.lost.as_ref().or(self.ran.failed.as_ref()) {
            return Err(fault.clone().error(statement, self.session.connector.address()));
        }
        let put_off = std::mem::take(&mut self.ran.put_off);
        if put_off.is_empty() {
            return Ok(());
        }
        match self.session.send_put_off(self.ran.began, &put_off, Word::None) {
            Ok(_) => {
                self.ran.began = true;
                Ok(())
            }
            Err((fault, statement)) => {
                self.ran.failed = Some((fault.clone(), statement));
                Err(self.note(fault, statement))
            }
        }
    }

    fn run(
        &mut self,
        sql: &'static str,
        values: Vec<MysqlValue>,
        writes: bool,
        each: &mut dyn FnMut(&Row<'_>) -> Result<bool, Error>,
    ) -> Result<u64, Error> {
        self.send_put_off()?;
        self.ran.wrote |= writes;
        // A connection that was idle may be dead. If nothing was done on it in this transaction, the statement is sent again on
        // a new one, unless rows of it have come already.
        let spare = (!self.ran.began && self.session.live.is_some()).then(|| values.clone());
        let mut rows_came = false;
        let mut tell = |row: &Row<'_>| {
            rows_came = true;
            each(row)
        };
        let mut sent = self.session.send(sql, values, &mut tell);
        if let (Err(Failed::Fault(Fault::Lost { timed_out: false, .. })), Some(values), false) =
            (&sent, spare, rows_came)
        {
            self.session.disconnect();
            sent = self.session.send(sql, values, each);
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
                return self.session.duplicate(statement, message);
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

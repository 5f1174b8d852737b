//! SQLite: one writer thread with group commit, and the transactions that closures see.
//!
//! What never happens here:
//! - An answer before its transaction is on the disk, or after an error that leaves the outcome open: then
//!   the process ends instead ([`stop`]).
//! - A closure that takes others of its group with it: each runs in its own savepoint, and a panic counts as
//!   an error. Only a failure of the whole transaction (disk full) fails the group, and nothing is written.
//! - A checkpoint out of sight: SQLite's own would hide a failed fsync behind a successful COMMIT, so it is
//!   off, and the writer runs them between its transactions.
//! - A wait without an end: the queues are bounded, and so is the wait for another process's lock.

use std::collections::VecDeque;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rusqlite::{Connection, OpenFlags, ffi};

use crate::dialect::{Dialect, Many, ROWS_AT_ONCE, Statements};
use crate::error::extended_code;
use crate::job::{Counters, Job};
use crate::queue::Queue;
use crate::{Error, OpenError, Row, Settings, Tx, Value};

/// The first version in which resetting the WAL cannot corrupt the database (the bug is in 3.7.0 to 3.51.2).
const OLDEST_SQLITE: (i32, &str) = (3_051_003, "3.51.3");

/// Prepared statements kept per connection: more than any service has.
const CACHED_STATEMENTS: usize = 256;

/// A passive checkpoint cannot reset the WAL while a reader still reads from it. When the WAL has grown to
/// this many times `checkpoint_pages`, the writer waits for the readers (at most the busy time-out).
const RESTART_CHECKPOINT_FACTOR: u64 = 4;

/// After a failed or incomplete checkpoint, the next one waits until the WAL has grown by this part of
/// `checkpoint_pages`.
const CHECKPOINT_RETRY_FRACTION: u64 = 4;

/// While the disk is full, a checkpoint is tried at most this often: it may free the WAL for reuse.
const FULL_CHECKPOINT_INTERVAL: Duration = Duration::from_secs(1);

/// While another process switches a new database to WAL, SQLite refuses without waiting; this is the pause
/// between two tries.
const OPEN_RETRY_PAUSE: Duration = Duration::from_millis(5);

/// Refuses a SQLite that can corrupt a database.
pub(crate) fn check_version() -> Result<(), OpenError> {
    if rusqlite::version_number() < OLDEST_SQLITE.0 {
        return Err(OpenError::SqliteTooOld { found: rusqlite::version(), needed: OLDEST_SQLITE.1 });
    }
    Ok(())
}

/// A connection with its settings, in no transaction.
pub(crate) struct Session {
    conn: Connection,
    statements: Statements,
    database: &'static str,
}

impl Session {
    pub(crate) fn open_writer(settings: &Settings) -> Result<Session, OpenError> {
        let flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_CREATE;
        let session = Session::open(settings, flags)?;
        let at = |source| sqlite_open_error(&settings.path, source);
        let mode = session.switch_to_wal(settings).map_err(at)?;
        if mode != "wal" {
            return Err(OpenError::NoWal { path: settings.path.display().to_string(), mode });
        }
        // FULL: every COMMIT reaches the disk. The fullfsync pair means something on macOS only, where a plain
        // fsync leaves the data in the drive's cache. After a peak the WAL file shrinks to the limit.
        let wal_limit_bytes = i64::from(settings.checkpoint_pages) * RESTART_CHECKPOINT_FACTOR as i64 * 4096;
        let pragmas = format!(
            "PRAGMA synchronous = FULL; PRAGMA fullfsync = ON; PRAGMA checkpoint_fullfsync = ON;
             PRAGMA wal_autocheckpoint = 0; PRAGMA journal_size_limit = {wal_limit_bytes};"
        );
        session.conn.execute_batch(&pragmas).map_err(at)?;
        Ok(session)
    }

    pub(crate) fn open_reader(settings: &Settings) -> Result<Session, OpenError> {
        Session::open(settings, OpenFlags::SQLITE_OPEN_READ_ONLY)
    }

    fn open(settings: &Settings, flags: OpenFlags) -> Result<Session, OpenError> {
        let at = |source| sqlite_open_error(&settings.path, source);
        let flags = flags | OpenFlags::SQLITE_OPEN_NO_MUTEX;
        let conn = Connection::open_with_flags(&settings.path, flags).map_err(at)?;
        conn.busy_timeout(Duration::from_millis(u64::from(settings.busy_timeout_millis))).map_err(at)?;
        // No mmap: with it an I/O error is a signal that kills the process, not an error code.
        let pragmas = format!(
            "PRAGMA foreign_keys = ON; PRAGMA trusted_schema = OFF; PRAGMA temp_store = MEMORY;
             PRAGMA mmap_size = 0; PRAGMA cache_size = -{};",
            settings.cache_kib
        );
        conn.execute_batch(&pragmas).map_err(at)?;
        conn.set_prepared_statement_cache_capacity(CACHED_STATEMENTS);
        Ok(Session { conn, statements: Statements::new(Dialect::Sqlite), database: settings.name })
    }

    /// The journal mode after the switch. SQLite does not wait here for another process that opens the new
    /// database at the same time, so this does, for the busy time-out.
    fn switch_to_wal(&self, settings: &Settings) -> rusqlite::Result<String> {
        let deadline = Instant::now() + Duration::from_millis(u64::from(settings.busy_timeout_millis));
        loop {
            let mode = self.conn.query_row("PRAGMA journal_mode = WAL", (), |row| row.get(0));
            match mode {
                Err(error) if is_busy(&error) && Instant::now() < deadline => {
                    std::thread::park_timeout(OPEN_RETRY_PAUSE);
                }
                settled => return settled,
            }
        }
    }

    pub(crate) fn connection(&mut self) -> &mut Connection {
        &mut self.conn
    }

    fn run(&self, statement: &'static str) -> Result<(), rusqlite::Error> {
        self.conn.prepare_cached(statement)?.execute(()).map(drop)
    }

    /// A statement of transaction control that may fail without a doubt about the outcome: not COMMIT.
    fn control(&self, statement: &'static str) -> Result<(), Error> {
        self.run(statement).map_err(|error| sort(self.database, statement, error))
    }

    /// Leaves whatever transaction there is. A connection that cannot is of no use, and what it holds open
    /// would be committed by the next one.
    fn leave(&self) {
        if self.conn.is_autocommit() {
            return;
        }
        if let Err(error) = self.run("ROLLBACK")
            && !self.conn.is_autocommit()
        {
            stop(self.database, "ROLLBACK", &error);
        }
    }
}

fn sqlite_open_error(path: &Path, source: rusqlite::Error) -> OpenError {
    OpenError::Sqlite { path: path.display().to_string(), source }
}

fn is_busy(error: &rusqlite::Error) -> bool {
    matches!(extended_code(error) & 0xff, ffi::SQLITE_BUSY | ffi::SQLITE_LOCKED)
}

/// A running transaction on SQLite, as a closure sees it.
pub struct SqliteTx<'c> {
    conn: &'c Connection,
    statements: &'c mut Statements,
    database: &'static str,
    /// Set once SQLite has rolled the whole transaction back by itself, as it does when the disk is full.
    lost: Option<Error>,
}

impl<'c> SqliteTx<'c> {
    fn new(session: &'c mut Session) -> SqliteTx<'c> {
        let Session { conn, statements, database } = session;
        SqliteTx { conn, statements, database, lost: None }
    }

    pub(crate) fn execute(&mut self, sql: &'static str, params: &[Value<'_>]) -> Result<u64, Error> {
        self.refuse_if_lost()?;
        let (one, many) = self.statements.texts(sql);
        let changed = execute(self.conn, one, many, params);
        let changed = changed.map_err(|error| sort(self.database, sql, error));
        self.note_loss(changed)
    }

    /// Gives the rows to `each`, until it says false.
    pub(crate) fn query(
        &mut self,
        sql: &'static str,
        params: &[Value<'_>],
        each: impl FnMut(&Row<'_>) -> Result<bool, Error>,
    ) -> Result<(), Error> {
        self.refuse_if_lost()?;
        let all = query_rows(self.conn, self.statements.text(sql), params, each);
        let all = all.map_err(|error| match error {
            QueryError::Sqlite(error) => sort(self.database, sql, error),
            QueryError::Row(error) => error,
        });
        self.note_loss(all)
    }

    /// Outside of a transaction SQLite would commit each statement by itself.
    fn refuse_if_lost(&self) -> Result<(), Error> {
        self.lost.clone().map_or(Ok(()), Err)
    }

    fn note_loss<T>(&mut self, result: Result<T, Error>) -> Result<T, Error> {
        if let Err(error) = &result
            && self.conn.is_autocommit()
        {
            self.lost = Some(error.clone());
        }
        result
    }
}

enum QueryError {
    Sqlite(rusqlite::Error),
    Row(Error),
}

impl From<rusqlite::Error> for QueryError {
    fn from(error: rusqlite::Error) -> QueryError {
        QueryError::Sqlite(error)
    }
}

fn query_rows(
    conn: &Connection,
    text: &str,
    params: &[Value<'_>],
    mut each: impl FnMut(&Row<'_>) -> Result<bool, Error>,
) -> Result<(), QueryError> {
    let mut statement = conn.prepare_cached(text)?;
    let [Value::Set(set), others @ ..] = params else {
        let mut rows = statement.query(rusqlite::params_from_iter(params))?;
        while let Some(row) = rows.next()? {
            if !each(&Row::sqlite(row)).map_err(QueryError::Row)? {
                break;
            }
        }
        return Ok(());
    };
    for row in set.rows() {
        bind(&mut statement, row, others)?;
        let mut rows = statement.raw_query();
        while let Some(row) = rows.next()? {
            if !each(&Row::sqlite(row)).map_err(QueryError::Row)? {
                return Ok(());
            }
        }
    }
    Ok(())
}

/// Runs a statement, for each row of its set if it has one; `many` are for [`ROWS_AT_ONCE`] of them. Returns how many rows it changed.
fn execute(conn: &Connection, one: &str, many: Option<&Many>, params: &[Value<'_>]) -> rusqlite::Result<u64> {
    let [Value::Set(set), others @ ..] = params else {
        return Ok(conn.prepare_cached(one)?.execute(rusqlite::params_from_iter(params))? as u64);
    };
    let mut changed = 0;
    let mut rows = set.rows();
    let mut left = set.len();
    let several =
        many.into_iter().flat_map(|many| ROWS_AT_ONCE.into_iter().zip(many.iter().map(String::as_str)));
    for (at_once, text) in several.chain([(1, one)]) {
        if left < at_once {
            continue;
        }
        let mut statement = conn.prepare_cached(text)?;
        while left >= at_once {
            bind(&mut statement, rows.by_ref().take(at_once).flatten(), others)?;
            changed += statement.raw_execute()? as u64;
            left -= at_once;
        }
    }
    Ok(changed)
}

/// Binds rows of a set, and behind them the statement's other parameters.
fn bind<'v>(
    statement: &mut rusqlite::Statement<'_>,
    rows: impl Iterator<Item = Value<'v>>,
    others: &[Value<'v>],
) -> rusqlite::Result<()> {
    let mut bound = 0;
    for value in rows.chain(others.iter().copied()) {
        bound += 1;
        statement.raw_bind_parameter(bound, value)?;
    }
    match statement.parameter_count() {
        count if count == bound => Ok(()),
        count => Err(rusqlite::Error::InvalidParameterCount(bound, count)),
    }
}

/// Sorts an error. One of fsync never comes out: what it failed to write is gone from the system's memory,
/// and the next fsync would succeed without it.
fn sort(database: &'static str, statement: &'static str, error: rusqlite::Error) -> Error {
    if is_lost_sync(&error) {
        stop(database, statement, &error);
    }
    Error::from_sqlite(statement, error)
}

fn is_lost_sync(error: &rusqlite::Error) -> bool {
    matches!(extended_code(error), ffi::SQLITE_IOERR_FSYNC | ffi::SQLITE_IOERR_DIR_FSYNC)
}

/// Ends the process, now, without answering anybody, because nobody here knows what is on the disk.
///
/// When COMMIT fails in a way that leaves the outcome open, or when any fsync fails, the transaction may or
/// may not be there after a restart. Whatever would be answered could be wrong, and to go on would be worse: after a failed fsync
/// the system marks the pages as clean, so a later fsync reports success for data that was never written (see
/// Rebello et al., "Can Applications Recover from fsync Failures?", USENIX ATC 2020). A restart reads what
/// is really there: SQLite recovers the WAL up to its last whole transaction, and whoever was not
/// answered asks again.
///
/// An abort, not an exit: no destructor may run that checkpoints or closes a database.
fn stop(database: &'static str, during: &str, error: &rusqlite::Error) -> ! {
    tracing::error!(
        database,
        during,
        %error,
        code = extended_code(error),
        "cannot know what is on the disk: stopping without answering; a restart recovers"
    );
    std::process::abort()
}

/// What a failed COMMIT means: an error that is certain, or none.
///
/// `SQLITE_FULL` is certain in WAL mode. COMMIT appends frames to the WAL and ends with the one that carries
/// the commit mark and a checksum over all before it. `SQLITE_FULL` comes from a write that did not fit,
/// so that last frame was not written whole: nothing is written behind it (padding to the sector is off where
/// the file system keeps its neighbours' bytes, as SQLite assumes everywhere), and fsync, the only step after
/// it, fails with `SQLITE_IOERR_FSYNC`, never with `SQLITE_FULL`. A recovery after a crash finds no commit mark
/// with a right checksum and ignores the frames; without a crash, the index of the WAL was not advanced and
/// the next transaction overwrites them. The database's own page limit is checked before anything is written.
///
/// `SQLITE_BUSY` and `SQLITE_CONSTRAINT` (a deferred foreign key) are found before the first write.
fn certain_commit_error(error: rusqlite::Error) -> Result<Error, rusqlite::Error> {
    match extended_code(&error) & 0xff {
        ffi::SQLITE_FULL | ffi::SQLITE_BUSY | ffi::SQLITE_CONSTRAINT => {
            Ok(Error::from_sqlite("COMMIT", error))
        }
        _ => Err(error),
    }
}

/// The writer thread's state.
pub(crate) struct Writer {
    session: Session,
    queue: Arc<Queue<Box<dyn Job>>>,
    counters: Arc<Counters>,
    group_jobs: usize,
    checkpoint: CheckpointPlan,
    /// When the last checkpoint was tried because the disk was full.
    full_checkpoint_at: Option<Instant>,
}

impl Writer {
    pub(crate) fn new(
        mut session: Session,
        settings: &Settings,
        queue: Arc<Queue<Box<dyn Job>>>,
        counters: Arc<Counters>,
    ) -> Result<Writer, OpenError> {
        let seen = counters.clone();
        let hook = move |_: &mut rusqlite::hooks::Wal, pages: i32| {
            seen.wal_pages.store(u64::try_from(pages).unwrap_or(0), Ordering::Relaxed);
            Ok(())
        };
        let hooked = session.connection().wal_hook(Some(hook));
        hooked.map_err(|source| sqlite_open_error(&settings.path, source))?;
        let checkpoint = CheckpointPlan::new(settings.checkpoint_pages);
        let group_jobs = settings.group_jobs.max(1);
        Ok(Writer { session, queue, counters, group_jobs, checkpoint, full_checkpoint_at: None })
    }

    /// Works until the queue is closed and empty, then waits for the readers, empties the WAL and closes.
    pub(crate) fn work(mut self, readers: Vec<JoinHandle<()>>) {
        let mut waiting = VecDeque::new();
        while self.queue.take(self.group_jobs, &mut waiting) {
            while !waiting.is_empty() {
                self.commit_group(&mut waiting);
            }
            let pages = self.counters.wal_pages.load(Ordering::Relaxed);
            if let Some(mode) = self.checkpoint.due(pages) {
                self.run_checkpoint(mode);
            }
        }
        for reader in readers {
            // A reader that panicked has logged so; it holds no lock any more.
            let _ = reader.join();
        }
        self.run_checkpoint(Checkpoint::Truncate);
        if let Err((_, error)) = self.session.conn.close() {
            tracing::warn!(database = self.session.database, %error, "could not close the database");
        }
    }

    /// One transaction for all that wait; shorter, if it is lost on the way. All that ran are answered.
    fn commit_group(&mut self, waiting: &mut VecDeque<Box<dyn Job>>) {
        if let Err(error) = self.session.control("BEGIN IMMEDIATE") {
            waiting.drain(..).for_each(|job| job.answer(Err(error.clone())));
            return;
        }
        let alone = waiting.len() == 1;
        let mut ran = Vec::with_capacity(waiting.len());
        let mut kept = Ok(false);
        while kept.is_ok()
            && let Some(mut job) = waiting.pop_front()
        {
            // A single job needs no savepoint: what fails takes only itself along.
            let keep = if alone { self.run_job(&mut *job) } else { self.run_in_savepoint(&mut *job) };
            kept = kept.and_then(|before| Ok(keep? || before));
            ran.push(job);
        }
        let outcome = kept.and_then(|any| if any { self.commit(ran.len()) } else { Ok(()) });
        self.session.leave();
        if outcome == Err(Error::Full) {
            self.checkpoint_for_space();
        }
        ran.into_iter().for_each(|job| job.answer(outcome.clone()));
    }

    /// Whether anything of the job is to be kept; an error means that the whole transaction is lost.
    fn run_in_savepoint(&mut self, job: &mut dyn Job) -> Result<bool, Error> {
        self.session.control("SAVEPOINT job")?;
        let keep = self.run_job(job)?;
        if !keep {
            self.session.control("ROLLBACK TO job")?;
        }
        self.session.control("RELEASE job")?;
        Ok(keep)
    }

    fn run_job(&mut self, job: &mut dyn Job) -> Result<bool, Error> {
        let mut tx = Tx::Sqlite(SqliteTx::new(&mut self.session));
        let keep = job.run(&mut tx);
        match tx {
            Tx::Sqlite(tx) => tx.lost.map_or(Ok(keep), Err),
            Tx::Mysql(_) => unreachable!("it was made for SQLite"),
        }
    }

    fn commit(&mut self, jobs: usize) -> Result<(), Error> {
        let started = Instant::now();
        if let Err(error) = self.session.run("COMMIT") {
            return match certain_commit_error(error) {
                Ok(error) => Err(error),
                Err(error) => stop(self.session.database, "COMMIT", &error),
            };
        }
        let micros = u64::try_from(started.elapsed().as_micros()).unwrap_or(u64::MAX);
        self.counters.commit_micros.fetch_add(micros, Ordering::Relaxed);
        self.counters.groups.fetch_add(1, Ordering::Relaxed);
        self.counters.jobs.fetch_add(jobs as u64, Ordering::Relaxed);
        Ok(())
    }

    /// A checkpoint often needs no space, and lets the next transactions reuse that of the WAL.
    fn checkpoint_for_space(&mut self) {
        let now = Instant::now();
        let too_early =
            self.full_checkpoint_at.is_some_and(|at| now.duration_since(at) < FULL_CHECKPOINT_INTERVAL);
        if !too_early {
            tracing::warn!(database = self.session.database, "no space left; transactions are refused");
            self.full_checkpoint_at = Some(now);
            self.run_checkpoint(Checkpoint::Passive);
        }
    }

    /// A checkpoint that finds no space or is in another's way leaves all in the WAL, for the next one. Any
    /// other failure may be one of fsync.
    fn run_checkpoint(&mut self, mode: Checkpoint) {
        self.counters.checkpoints.fetch_add(1, Ordering::Relaxed);
        let database = self.session.database;
        match self.session.conn.query_row(mode.statement(), (), |row| row.get::<_, bool>(0)) {
            Ok(_) => {}
            Err(error) if is_busy(&error) || extended_code(&error) & 0xff == ffi::SQLITE_FULL => {
                tracing::warn!(database, %error, "the checkpoint is put off");
            }
            Err(error) => stop(database, mode.statement(), &error),
        }
    }
}

/// How much a checkpoint insists.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Checkpoint {
    /// Waits for nobody.
    Passive,
    /// Waits for readers, so that the WAL begins anew.
    Restart,
    /// The same, and empties the file.
    Truncate,
}

impl Checkpoint {
    fn statement(self) -> &'static str {
        match self {
            Checkpoint::Passive => "PRAGMA wal_checkpoint(PASSIVE)",
            Checkpoint::Restart => "PRAGMA wal_checkpoint(RESTART)",
            Checkpoint::Truncate => "PRAGMA wal_checkpoint(TRUNCATE)",
        }
    }
}

/// Decides when to run a checkpoint, from the size of the WAL after each commit.
struct CheckpointPlan {
    pages: u64,
    next_at_pages: u64,
    seen_pages: u64,
}

impl CheckpointPlan {
    fn new(checkpoint_pages: u32) -> CheckpointPlan {
        let pages = u64::from(checkpoint_pages.max(1));
        CheckpointPlan { pages, next_at_pages: pages, seen_pages: 0 }
    }

    fn due(&mut self, wal_pages: u64) -> Option<Checkpoint> {
        let began_anew = wal_pages < self.seen_pages;
        self.seen_pages = wal_pages;
        if began_anew {
            self.next_at_pages = self.pages;
        }
        if wal_pages < self.next_at_pages {
            return None;
        }
        self.next_at_pages = wal_pages + (self.pages / CHECKPOINT_RETRY_FRACTION).max(1);
        let insist = wal_pages >= self.pages * RESTART_CHECKPOINT_FACTOR;
        Some(if insist { Checkpoint::Restart } else { Checkpoint::Passive })
    }
}

/// A reader thread: each closure sees one snapshot, that of its first statement.
pub(crate) fn read_until_closed(mut session: Session, queue: &Queue<Box<dyn Job>>) {
    let mut waiting = VecDeque::new();
    while queue.take(1, &mut waiting) {
        for mut job in waiting.drain(..) {
            let begun = session.control("BEGIN DEFERRED");
            if begun.is_ok() {
                job.run(&mut Tx::Sqlite(SqliteTx::new(&mut session)));
                session.leave();
            }
            job.answer(begun);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Outage;

    #[test]
    fn only_errors_from_before_the_commit_mark_are_certain() {
        let verdict =
            |code| certain_commit_error(rusqlite::Error::SqliteFailure(ffi::Error::new(code), None)).ok();
        assert_eq!(verdict(ffi::SQLITE_FULL), Some(Error::Full));
        assert_eq!(verdict(ffi::SQLITE_BUSY), Some(Error::Unavailable(Outage::Busy)));
        assert!(verdict(ffi::SQLITE_CONSTRAINT_FOREIGNKEY).is_some());
        for unknown in [
            ffi::SQLITE_IOERR_FSYNC,
            ffi::SQLITE_IOERR_WRITE,
            ffi::SQLITE_IOERR_SHMSIZE,
            ffi::SQLITE_NOMEM,
            ffi::SQLITE_CORRUPT,
        ] {
            assert_eq!(verdict(unknown), None);
        }
    }

    #[test]
    fn a_checkpoint_comes_when_the_wal_has_grown_and_insists_when_it_does_not_shrink() {
        let mut plan = CheckpointPlan::new(100);
        assert_eq!(plan.due(99), None);
        assert_eq!(plan.due(100), Some(Checkpoint::Passive));
        assert_eq!(plan.due(110), None);
        assert_eq!(plan.due(125), Some(Checkpoint::Passive));
        assert_eq!(plan.due(3), None);
        assert_eq!(plan.due(100), Some(Checkpoint::Passive));
        assert_eq!(plan.due(400), Some(Checkpoint::Restart));
        assert_eq!(plan.due(401), None);
    }
}

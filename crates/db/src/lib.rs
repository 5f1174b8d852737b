//! Databases: transactions as plain closures that run to their end on a thread of the database.
//!
//! [`Db::write`] and [`Db::read`] are called from async code; the closure gets a [`Tx`] and is synchronous.
//! That is faster than an async driver, which hops between threads for each statement, and a future that
//! is dropped halfway cannot leave a transaction open: once queued, a closure runs to its end, whether or not
//! its caller still waits.
//!
//! - Writes are grouped: what queued up while a group was being committed is the next one, so one fsync serves
//!   many. A caller is answered after the commit of its group.
//! - A closure that returns an error or panics is rolled back alone. (A build with `panic = "abort"` ends at a
//!   panic instead; then nothing was answered and nothing of the group is written.)
//! - An `Err` means that nothing was written, but for [`Error::OutcomeUnknown`]. On SQLite an outcome that is not known is
//!   never answered: the process ends (see `sqlite.rs`). On MySQL it is looked up (see `mysql/outcome.rs`), and only
//!   where the server cannot be reached for long is it that error.
//! - A full queue refuses at once with [`Error::Overloaded`].
//!
//! There are two kinds of databases behind one [`Db`], with one text for each statement (see [`dialect`]):
//!
//! | | SQLite, [`Db::open`] | MySQL 8 or MariaDB 10.6, [`Db::connect`] |
//! |---|---|---|
//! | who works on it | this process alone | any number of processes |
//! | writes | one after the other | at the same time, READ COMMITTED, with row locks (`{for update}`) |
//! | a closure is run | once | again, if others were in the way, or wrote what it did not see |
//! | a commit | of a group of closures | of one closure; the server shares its fsync |

pub mod dialect;
mod error;
pub mod ids;
mod job;
mod migrate;
pub mod mysql;
mod queue;
mod sqlite;
mod time;
mod value;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;

pub use error::{Error, OpenError, Outage};
pub use migrate::Migration;
pub use time::ServerClock;
pub use value::{FromValue, Row, Set, Value};

use job::{Answer, Counters, Job, Transaction};
use queue::{Queue, Refused};
use sqlite::{Session, SqliteTx, Writer};
use telemetry::spans::{self, Detail, ERROR_TYPE, Kind, Step};
use tokio::sync::{oneshot, watch};

/// Where a SQLite database is, and its bounds.
#[derive(Debug, Clone)]
pub struct Settings {
    /// The database's file. Its folder must exist.
    pub path: PathBuf,
    /// The name for errors, logs and metrics.
    pub name: &'static str,
    /// Reader threads, at least 1. More than there are processors is of no use.
    pub readers: usize,
    /// How many writes may wait before more are refused.
    pub write_queue_jobs: usize,
    /// How many reads may wait before more are refused.
    pub read_queue_jobs: usize,
    /// How many writes share one commit at most.
    pub group_jobs: usize,
    /// The size of the WAL, in pages of 4 KiB, from which on it is written back to the database. The default is
    /// well below 4,062 pages, from which on SQLite needs space for a second index page: on a full disk, it
    /// might not get it after the commit is written, which would be a case for stopping the process.
    pub checkpoint_pages: u32,
    /// How long to wait for a lock that another process holds.
    pub busy_timeout_millis: u32,
    /// The page cache of each connection; it is filled as needed.
    pub cache_kib: u32,
}

impl Settings {
    /// The defaults.
    pub fn new(path: impl Into<PathBuf>, name: &'static str) -> Settings {
        Settings {
            path: path.into(),
            name,
            readers: 2,
            write_queue_jobs: 8192,
            read_queue_jobs: 8192,
            group_jobs: 256,
            checkpoint_pages: 2000,
            busy_timeout_millis: 5000,
            cache_kib: 8 * 1024,
        }
    }
}

/// A handle to an open database; clones are cheap and share its threads.
///
/// When the last one is dropped, the threads finish what is queued and end. [`Db::close`] waits for that.
#[derive(Clone)]
pub struct Db(Arc<Inner>);

struct Inner {
    name: &'static str,
    shared: bool,
    writes: Arc<Queue<Box<dyn Job>>>,
    reads: Arc<Queue<Box<dyn Job>>>,
    counters: Arc<Counters>,
    /// Its sender lives in the thread that is the last to end.
    ended: watch::Receiver<()>,
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.writes.close();
        self.reads.close();
    }
}

impl Db {
    /// Opens a SQLite database, creating it if needed, and brings it to the newest migration. Blocks; for the start
    /// of a process.
    ///
    /// # Errors
    /// See [`OpenError`]. Migrations before a failed one stay applied.
    pub fn open(settings: Settings, migrations: &'static [Migration]) -> Result<Db, OpenError> {
        sqlite::check_version()?;
        let mut writer = Session::open_writer(&settings)?;
        migrate::migrate(writer.connection(), &settings.path, migrations)?;

        let writes = Arc::new(Queue::new(settings.write_queue_jobs));
        let reads = Arc::new(Queue::new(settings.read_queue_jobs));
        let counters = Arc::new(Counters::default());
        let writer = Writer::new(writer, &settings, writes.clone(), counters.clone())?;
        let (alive, ended) = watch::channel(());
        // From here on, an early return drops this and so ends the threads that were already started.
        let db = Db(Arc::new(Inner { name: settings.name, shared: false, writes, reads, counters, ended }));

        let mut readers = Vec::new();
        for _ in 0..settings.readers.max(1) {
            let session = Session::open_reader(&settings)?;
            let queue = db.0.reads.clone();
            let reader = spawn(settings.name, "reader", move || sqlite::read_until_closed(session, &queue))?;
            readers.push(reader);
        }
        spawn(settings.name, "writer", move || {
            writer.work(readers);
            drop(alive);
        })?;
        Ok(db)
    }

    /// Which migrations a SQLite database would get when it is opened; None when there is no such file yet. Changes nothing.
    ///
    /// # Errors
    /// As [`Db::open`].
    pub fn pending(
        path: &Path,
        migrations: &'static [Migration],
    ) -> Result<Option<Vec<&'static Migration>>, OpenError> {
        migrate::pending(path, migrations)
    }

    /// Connects to a MySQL or MariaDB, creating the database if needed, and brings it to the newest migration. Any number of
    /// processes may do so at once. Blocks; for the start of a process.
    ///
    /// # Errors
    /// See [`OpenError`]; [`OpenError::is_transient`] tells whether it makes sense to try again. Migrations before a
    /// failed one stay applied.
    pub fn connect(settings: mysql::Settings, migrations: &'static [Migration]) -> Result<Db, OpenError> {
        mysql::open(&settings, migrations)
    }

    /// Runs the closure in a transaction that can write, and answers once it is durable.
    ///
    /// The closure may be run more than once before one run is committed (not by SQLite), so it must not have
    /// effects outside of `tx`. Dropping the future does not stop it once it is queued.
    ///
    /// # Errors
    /// The closure's own, or an [`Error`] of the transaction around it. In both cases nothing was written, unless it is
    /// [`Error::OutcomeUnknown`].
    pub async fn write<T, E>(
        &self,
        mut closure: impl FnMut(&mut Tx<'_>) -> Result<T, E> + Send + 'static,
    ) -> Result<T, E>
    where
        T: Send + 'static,
        E: From<Error> + Send + 'static,
    {
        let span = self.span("write");
        let current = span.as_ref().map(Step::current);
        let on_behalf = move |tx: &mut Tx<'_>| match &current {
            None => closure(tx),
            Some(current) => current.run(|| closure(tx)),
        };
        let (job, answer) = Transaction::new(on_behalf);
        self.enqueue(&self.0.writes, "write", job)?;
        let result = received(answer).await;
        self.record(span, "write", result.is_ok());
        result
    }

    /// Runs the closure in a transaction that only reads: one snapshot, which has every write that was
    /// answered before.
    ///
    /// # Errors
    /// The closure's own, or an [`Error`] of the transaction around it.
    pub async fn read<T, E>(
        &self,
        closure: impl FnOnce(&mut Tx<'_>) -> Result<T, E> + Send + 'static,
    ) -> Result<T, E>
    where
        T: Send + 'static,
        E: From<Error> + Send + 'static,
    {
        let mut closure = Some(closure);
        let run_once = move |tx: &mut Tx<'_>| {
            let closure = closure.take().expect("a read is run once");
            closure(tx)
        };
        let span = self.span("read");
        let (job, answer) = Transaction::new(run_once);
        self.enqueue(&self.0.reads, "read", job)?;
        let result = received(answer).await;
        self.record(span, "read", result.is_ok());
        result
    }

    /// The span of a transaction, for whoever's traces are recorded.
    fn span(&self, operation: &'static str) -> Option<Step> {
        spans::step(Kind::Client, || format!("{operation} {}", self.0.name))
    }

    fn record(&self, span: Option<Step>, operation: &'static str, well: bool) {
        let Some(span) = span else { return };
        let system = if self.0.shared { "mysql" } else { "sqlite" };
        let details = [
            ("db.system.name", Detail::Name(system)),
            ("db.namespace", Detail::Name(self.0.name)),
            ("db.operation.name", Detail::Name(operation)),
            (ERROR_TYPE, Detail::Name("transaction failed")),
        ];
        span.end(if well { &details[..3] } else { &details });
    }

    fn enqueue(
        &self,
        queue: &Queue<Box<dyn Job>>,
        queue_name: &'static str,
        job: Box<dyn Job>,
    ) -> Result<(), Error> {
        queue.push(job).map_err(|refused| match refused {
            Refused::Closed => Error::Unavailable(Outage::Closed),
            Refused::Full => {
                let bound_jobs = queue.bound();
                Error::Overloaded { database: self.0.name, queue: queue_name, bound_jobs }
            }
        })
    }

    /// Refuses new transactions, finishes those that are queued, empties the WAL into the database and ends the
    /// threads. May be called more than once.
    pub async fn close(&self) {
        self.0.writes.close();
        self.0.reads.close();
        // The sender sends nothing; an error means that it is gone, and the threads with it.
        let _ = self.0.ended.clone().changed().await;
    }

    /// The name from the settings.
    pub fn name(&self) -> &'static str {
        self.0.name
    }

    /// Whether other processes may work on the database at the same time. If not, this process knows of every change.
    pub fn is_shared(&self) -> bool {
        self.0.shared
    }

    /// How busy the database is, for metrics.
    pub fn stats(&self) -> Stats {
        let Inner { writes, reads, counters, .. } = &*self.0;
        Stats {
            queued_writes: writes.len(),
            queued_reads: reads.len(),
            groups: counters.groups.load(Ordering::Relaxed),
            jobs: counters.jobs.load(Ordering::Relaxed),
            commit_micros: counters.commit_micros.load(Ordering::Relaxed),
            checkpoints: counters.checkpoints.load(Ordering::Relaxed),
            wal_pages: counters.wal_pages.load(Ordering::Relaxed),
            reruns: counters.reruns.load(Ordering::Relaxed),
            lookups: counters.lookups.load(Ordering::Relaxed),
        }
    }
}

/// How busy a database is. The totals count from the start of the process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stats {
    /// Writes that wait now.
    pub queued_writes: usize,
    /// Reads that wait now.
    pub queued_reads: usize,
    /// Commits, in total.
    pub groups: u64,
    /// Writes in those commits, in total; divided by `groups` it is the mean size of a group.
    pub jobs: u64,
    /// Time spent in COMMIT, in microseconds, in total.
    pub commit_micros: u64,
    /// Checkpoints tried, in total. Of SQLite.
    pub checkpoints: u64,
    /// Pages in the WAL after the last commit. Of SQLite.
    pub wal_pages: u64,
    /// Writes that were run again because others were in the way, in total. Of MySQL.
    pub reruns: u64,
    /// Commits whose outcome was not known and had to be looked up, in total. Of MySQL.
    pub lookups: u64,
}

fn spawn(
    database: &'static str,
    role: &str,
    work: impl FnOnce() + Send + 'static,
) -> Result<std::thread::JoinHandle<()>, OpenError> {
    let thread = std::thread::Builder::new().name(format!("{database}-{role}"));
    let work = move || {
        // What closures do is caught where they run. Should anything else panic, nobody would be answered any more.
        if catch_unwind(AssertUnwindSafe(work)).is_err() {
            tracing::error!("a database thread has died: stopping; a restart recovers");
            std::process::abort();
        }
    };
    thread.spawn(work).map_err(|source| OpenError::Thread { database, source })
}

async fn received<T, E: From<Error>>(answer: oneshot::Receiver<Answer<T, E>>) -> Result<T, E> {
    // A job that was dropped without an answer was dropped with its closed queue.
    answer.await.unwrap_or(Err(Error::Unavailable(Outage::Closed)))?
}

/// A running transaction.
///
/// `?` stands for a parameter. The text is a constant: it is translated for the database (see [`dialect`]) and
/// prepared once, and no value can ever become part of it.
pub enum Tx<'c> {
    /// On SQLite.
    Sqlite(SqliteTx<'c>),
    /// On MySQL or MariaDB.
    Mysql(mysql::MysqlTx<'c>),
}

impl Tx<'_> {
    /// Runs a statement that returns no rows, and tells how many rows it inserted, updated or deleted.
    ///
    /// # Errors
    /// See [`Error`]. The transaction goes on without the statement, but of a set that is inserted, SQLite keeps the rows before the one
    /// that fails; after [`Error::Full`] and [`Error::Unavailable`] it may be lost as a whole, and everything in it then fails with the
    /// same error.
    pub fn execute(&mut self, sql: &'static str, params: &[Value<'_>]) -> Result<u64, Error> {
        match self {
            Tx::Sqlite(tx) => tx.execute(sql, params),
            Tx::Mysql(tx) => tx.execute(sql, params),
        }
    }

    /// Runs a query and collects what `each` makes of its rows.
    ///
    /// # Errors
    /// As [`Tx::execute`], or the first error of `each`.
    pub fn query<T>(
        &mut self,
        sql: &'static str,
        params: &[Value<'_>],
        mut each: impl FnMut(&Row<'_>) -> Result<T, Error>,
    ) -> Result<Vec<T>, Error> {
        let mut all = Vec::new();
        let collect = |row: &Row<'_>| {
            all.push(each(row)?);
            Ok(true)
        };
        match self {
            Tx::Sqlite(tx) => tx.query(sql, params, collect)?,
            Tx::Mysql(tx) => tx.query(sql, params, collect)?,
        }
        Ok(all)
    }

    /// Runs a query and gives what `each` makes of its first row, if there is one.
    ///
    /// # Errors
    /// As [`Tx::query`].
    pub fn query_opt<T>(
        &mut self,
        sql: &'static str,
        params: &[Value<'_>],
        each: impl FnOnce(&Row<'_>) -> Result<T, Error>,
    ) -> Result<Option<T>, Error> {
        let mut each = Some(each);
        let mut first = None;
        let take_first = |row: &Row<'_>| {
            if let Some(each) = each.take() {
                first = Some(each(row)?);
            }
            Ok(false)
        };
        match self {
            Tx::Sqlite(tx) => tx.query(sql, params, take_first)?,
            Tx::Mysql(tx) => tx.query(sql, params, take_first)?,
        }
        Ok(first)
    }
}

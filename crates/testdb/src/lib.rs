//! A database of a test's own, on SQLite or on MariaDB, so that one suite shows both.
//!
//! [`on_both!`] makes two tests of each function that it is given; a function that is not given is dead code, which the compiler
//! reports. The server is the one that all tests share ([`servers::shared::mariadb`]), each in a database of its own.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use db::{Db, Migration, OpenError};

/// A database that is gone with this. It can be opened any number of times: each handle is what another process would be.
pub enum TestDb {
    /// A file in a folder.
    Sqlite(Folder),
    /// A database on a server.
    MariaDb(servers::Database),
}

/// How many threads a handle has, and how many jobs may wait for them.
#[derive(Clone, Copy, Debug)]
pub struct Bounds {
    /// Threads that write. SQLite has one.
    pub writers: usize,
    /// Threads that read.
    pub readers: usize,
    /// Writes that may wait.
    pub write_queue_jobs: usize,
    /// Reads that may wait.
    pub read_queue_jobs: usize,
}

impl Default for Bounds {
    /// Two threads that write, and the defaults of both databases.
    fn default() -> Bounds {
        Bounds { writers: 2, readers: 2, write_queue_jobs: 8192, read_queue_jobs: 8192 }
    }
}

impl TestDb {
    /// On SQLite.
    ///
    /// # Panics
    /// When there is no folder to be had.
    pub fn sqlite() -> TestDb {
        TestDb::Sqlite(Folder::new())
    }

    /// On MariaDB.
    ///
    /// # Panics
    /// When the server cannot be started or reached.
    pub fn mariadb() -> TestDb {
        match servers::shared::mariadb().database() {
            Ok(database) => TestDb::MariaDb(database),
            Err(error) => panic!("a database for a test: {error}"),
        }
    }

    /// Another one of the same kind.
    ///
    /// # Panics
    /// As [`TestDb::sqlite`] and [`TestDb::mariadb`].
    pub fn another(&self) -> TestDb {
        match self {
            TestDb::Sqlite(_) => TestDb::sqlite(),
            TestDb::MariaDb(_) => TestDb::mariadb(),
        }
    }

    /// Opens it.
    ///
    /// # Panics
    /// When it cannot be opened.
    pub fn open(&self, migrations: &'static [Migration]) -> Db {
        self.open_bounded(migrations, Bounds::default())
    }

    /// Opens it with these bounds.
    ///
    /// # Panics
    /// When it cannot be opened.
    pub fn open_bounded(&self, migrations: &'static [Migration], bounds: Bounds) -> Db {
        match self.try_open(migrations, bounds) {
            Ok(db) => db,
            Err(error) => panic!("a database for a test: {error}"),
        }
    }

    /// Opens it, or says why not.
    ///
    /// # Errors
    /// See [`OpenError`].
    pub fn try_open(&self, migrations: &'static [Migration], bounds: Bounds) -> Result<Db, OpenError> {
        let Bounds { writers, readers, write_queue_jobs, read_queue_jobs } = bounds;
        match self {
            TestDb::Sqlite(folder) => {
                let settings = db::Settings::new(folder.path().join("test.db"), "test");
                let settings = db::Settings { readers, write_queue_jobs, read_queue_jobs, ..settings };
                Db::open(settings, migrations)
            }
            TestDb::MariaDb(database) => {
                let settings = db::mysql::Settings::new(database.url(), "test");
                let settings =
                    db::mysql::Settings { writers, readers, write_queue_jobs, read_queue_jobs, ..settings };
                Db::connect(settings, migrations)
            }
        }
    }

    /// Whether it is on SQLite, for what differs by its nature.
    pub fn is_sqlite(&self) -> bool {
        matches!(self, TestDb::Sqlite(_))
    }
}

/// A folder that is gone with this.
pub struct Folder(PathBuf);

impl Folder {
    fn new() -> Folder {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        let path = std::env::temp_dir().join(format!("sagaline-testdb-{}-{number}", std::process::id()));
        // Of an earlier process with this id.
        let _ = std::fs::remove_dir_all(&path);
        if let Err(error) = std::fs::create_dir_all(&path) {
            panic!("a folder for a test, {}: {error}", path.display());
        }
        Folder(path)
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        // What cannot be removed is left to the system.
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// Makes a test on SQLite and one on MariaDB of each async function named. A function takes a [`TestDb`] by reference.
///
/// ```ignore
/// testdb::on_both! {
///     #[tokio::test]
///     what_is_written_is_read, what_is_deleted_is_gone;
///     #[tokio::test(flavor = "multi_thread", worker_threads = 4)]
///     many_write_at_once;
/// }
/// ```
#[macro_export]
macro_rules! on_both {
    ($(#[$attribute:meta] $($test:ident),+ $(,)?;)+) => {
        mod on_sqlite {
            $($crate::on_both!(@each #[$attribute] sqlite $($test),+);)+
        }
        mod on_mariadb {
            $($crate::on_both!(@each #[$attribute] mariadb $($test),+);)+
        }
    };
    (@each #[$attribute:meta] $kind:ident $($test:ident),+) => {
        $(#[$attribute] async fn $test() { super::$test(&$crate::TestDb::$kind()).await; })+
    };
}

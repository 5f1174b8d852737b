//! Where rows are read from: a SQLite file, or a database on a MySQL or MariaDB. One snapshot each.

use std::path::{Path, PathBuf};

use mysql::prelude::Queryable;
use mysql::{Conn, Opts, OptsBuilder};
use rusqlite::{Connection, OpenFlags};

use super::violation::Database;

/// How long to wait for the shop's own lock on a file.
const BUSY_TIMEOUT: std::time::Duration = std::time::Duration::from_secs(10);

/// Where a shop's five databases are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Books {
    /// Files in a data directory.
    Files(PathBuf),
    /// On a server: `PREFIX` with the service's name behind it.
    Server {
        /// `mysql://USER:PASSWORD@HOST:PORT`.
        url: String,
        /// What the names of the databases begin with.
        prefix: String,
    },
}

impl From<&Path> for Books {
    fn from(data_dir: &Path) -> Books {
        Books::Files(data_dir.to_owned())
    }
}

impl From<&PathBuf> for Books {
    fn from(data_dir: &PathBuf) -> Books {
        Books::Files(data_dir.clone())
    }
}

/// A database cannot be read.
#[derive(Debug, thiserror::Error)]
#[error("{database}: {why}")]
pub struct CheckError {
    /// The database's file, or its name on the server.
    pub database: String,
    /// Why.
    pub why: ReadError,
}

/// Why a database cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// SQLite refuses.
    #[error(transparent)]
    Sqlite(#[from] rusqlite::Error),
    /// The server refuses, or is not there.
    #[error(transparent)]
    Mysql(#[from] mysql::Error),
    /// The address of the server is none.
    #[error("no address of a MySQL server: {0}")]
    Url(#[from] mysql::UrlError),
    /// A column holds something else than it should.
    #[error("column {column} holds {found}")]
    Column {
        /// Its place, from 0.
        column: usize,
        /// The kind of what it holds.
        found: &'static str,
    },
}

/// One database, open in one snapshot.
pub(super) enum Source {
    Sqlite(Connection),
    Mysql(Box<Conn>),
}

/// A row. Values are asked for by their place, from 0.
pub(super) struct Cells(Vec<Cell>);

enum Cell {
    Null,
    Integer(i64),
    Bytes(Vec<u8>),
}

impl Books {
    /// What a database is called in errors.
    pub(super) fn name_of(&self, database: Database) -> String {
        match self {
            Books::Files(dir) => dir.join(database.name()).with_extension("db").display().to_string(),
            Books::Server { prefix, .. } => format!("{prefix}{}", database.name()),
        }
    }

    pub(super) fn open(&self, database: Database) -> Result<Source, ReadError> {
        let name = self.name_of(database);
        match self {
            Books::Files(_) => {
                let conn = Connection::open_with_flags(name, OpenFlags::SQLITE_OPEN_READ_ONLY)?;
                conn.busy_timeout(BUSY_TIMEOUT)?;
                conn.execute_batch("BEGIN")?;
                Ok(Source::Sqlite(conn))
            }
            Books::Server { url, .. } => {
                let opts =
                    OptsBuilder::from_opts(Opts::from_url(url)?).db_name(Some(name)).prefer_socket(false);
                let mut conn = Conn::new(opts)?;
                conn.query_drop("SET SESSION TRANSACTION ISOLATION LEVEL REPEATABLE READ")?;
                conn.query_drop("START TRANSACTION WITH CONSISTENT SNAPSHOT, READ ONLY")?;
                Ok(Source::Mysql(Box::new(conn)))
            }
        }
    }
}

impl Source {
    /// What the database itself finds wrong with its files.
    pub(super) fn damages(&mut self) -> Result<Vec<String>, ReadError> {
        match self {
            Source::Sqlite(_) => {
                let found = self.all("PRAGMA quick_check", |row| row.text(0))?;
                Ok(found.into_iter().filter(|what| what != "ok").collect())
            }
            // A server checks its pages whenever it reads them.
            Source::Mysql(_) => Ok(Vec::new()),
        }
    }

    /// Whether there is such a table.
    pub(super) fn has_table(&mut self, name: &str) -> Result<bool, ReadError> {
        match self {
            Source::Sqlite(conn) => {
                let sql = "SELECT EXISTS (SELECT 1 FROM sqlite_schema WHERE type = 'table' AND name = ?)";
                Ok(conn.query_row(sql, [name], |row| row.get(0))?)
            }
            Source::Mysql(conn) => {
                let sql = "SELECT COUNT(*) FROM information_schema.TABLES
                           WHERE TABLE_SCHEMA = DATABASE() AND TABLE_NAME = ?";
                Ok(conn.exec_first::<u64, _, _>(sql, (name,))? == Some(1))
            }
        }
    }

    /// What `each` makes of the rows.
    pub(super) fn all<T>(
        &mut self,
        sql: &str,
        each: impl FnMut(&Cells) -> Result<T, ReadError>,
    ) -> Result<Vec<T>, ReadError> {
        let rows = match self {
            Source::Sqlite(conn) => sqlite_rows(conn, sql)?,
            Source::Mysql(conn) => {
                let rows: Vec<mysql::Row> = conn.exec(sql, ())?;
                rows.into_iter()
                    .map(|row| Cells(row.unwrap().into_iter().map(Cell::from).collect()))
                    .collect()
            }
        };
        rows.iter().map(each).collect()
    }
}

fn sqlite_rows(conn: &Connection, sql: &str) -> Result<Vec<Cells>, ReadError> {
    let mut statement = conn.prepare(sql)?;
    let columns = statement.column_count();
    let cells = statement.query_map((), |row| {
        let cells = (0..columns).map(|column| Ok(Cell::from(row.get::<_, rusqlite::types::Value>(column)?)));
        Ok(Cells(cells.collect::<rusqlite::Result<_>>()?))
    })?;
    Ok(cells.collect::<rusqlite::Result<_>>()?)
}

impl From<rusqlite::types::Value> for Cell {
    fn from(value: rusqlite::types::Value) -> Cell {
        use rusqlite::types::Value;
        match value {
            Value::Null => Cell::Null,
            Value::Integer(number) => Cell::Integer(number),
            // No column of the shop holds one: whoever asks is told what it holds.
            Value::Real(number) => Cell::Bytes(number.to_string().into_bytes()),
            Value::Text(text) => Cell::Bytes(text.into_bytes()),
            Value::Blob(bytes) => Cell::Bytes(bytes),
        }
    }
}

impl From<mysql::Value> for Cell {
    fn from(value: mysql::Value) -> Cell {
        match value {
            mysql::Value::NULL => Cell::Null,
            mysql::Value::Int(number) => Cell::Integer(number),
            mysql::Value::UInt(number) => Cell::Integer(number.cast_signed()),
            mysql::Value::Bytes(bytes) => Cell::Bytes(bytes),
            other => Cell::Bytes(other.as_sql(true).into_bytes()),
        }
    }
}

impl Cells {
    fn wrong<T>(&self, column: usize) -> Result<T, ReadError> {
        let found = match self.0.get(column) {
            None => "nothing: there is no such column",
            Some(Cell::Null) => "NULL",
            Some(Cell::Integer(_)) => "an integer",
            Some(Cell::Bytes(_)) => "text or bytes",
        };
        Err(ReadError::Column { column, found })
    }

    pub(super) fn integer(&self, column: usize) -> Result<i64, ReadError> {
        match self.0.get(column) {
            Some(Cell::Integer(number)) => Ok(*number),
            _ => self.wrong(column),
        }
    }

    /// A negative number is read as one far above 2^53: out of range it is either way.
    pub(super) fn id(&self, column: usize) -> Result<u64, ReadError> {
        self.integer(column).map(i64::cast_unsigned)
    }

    pub(super) fn small(&self, column: usize) -> Result<u8, ReadError> {
        self.integer(column)?.try_into().or_else(|_| self.wrong(column))
    }

    pub(super) fn bytes(&self, column: usize) -> Result<Vec<u8>, ReadError> {
        match self.0.get(column) {
            Some(Cell::Bytes(bytes)) => Ok(bytes.clone()),
            _ => self.wrong(column),
        }
    }

    pub(super) fn text(&self, column: usize) -> Result<String, ReadError> {
        String::from_utf8(self.bytes(column)?).or_else(|_| self.wrong(column))
    }

    /// What `get` gives, or None for NULL.
    pub(super) fn optional<T>(
        &self,
        column: usize,
        get: impl FnOnce(&Cells, usize) -> Result<T, ReadError>,
    ) -> Result<Option<T>, ReadError> {
        match self.0.get(column) {
            Some(Cell::Null) => Ok(None),
            _ => get(self, column).map(Some),
        }
    }
}

//! What goes into a statement and what comes out of it: [`Value`], [`Set`], [`Row`].
//!
//! A conversion never changes a value silently: what does not fit its Rust type is an error that names the
//! column.

use rusqlite::types::{ToSqlOutput, ValueRef};

use crate::Error;

/// One parameter of a statement, or one column of a result; borrowed, so that binding copies nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Value<'a> {
    /// SQL's NULL.
    Null,
    /// Any integer or boolean.
    Int(i64),
    /// Text, UTF-8.
    Text(&'a str),
    /// Bytes.
    Blob(&'a [u8]),
    /// Rows: the first parameter of a statement with a set, never a column of a result.
    Set(&'a Set),
}

impl Value<'_> {
    /// The kind and size for an error message. Texts and blobs may be secret and are not shown.
    fn describe(self) -> String {
        match self {
            Value::Null => "NULL".to_owned(),
            Value::Int(number) => number.to_string(),
            Value::Text(text) => format!("a text of {} bytes", text.len()),
            Value::Blob(bytes) => format!("a blob of {} bytes", bytes.len()),
            Value::Set(set) => format!("a set of {} rows", set.len()),
        }
    }
}

macro_rules! value_from_int {
    ($($int:ty),*) => {$(
        impl From<$int> for Value<'_> {
            fn from(number: $int) -> Self {
                Value::Int(i64::from(number))
            }
        }
    )*};
}
value_from_int!(i64, u32, u16, u8, bool);

impl From<u64> for Value<'_> {
    /// SQL integers have a sign: above `i64::MAX` this is a bug of the caller, which debug builds refuse. A
    /// release build stores `i64::MAX`, never a negative number.
    fn from(number: u64) -> Self {
        debug_assert!(i64::try_from(number).is_ok(), "{number} does not fit a SQL integer");
        Value::Int(i64::try_from(number).unwrap_or(i64::MAX))
    }
}

impl<'a> From<&'a str> for Value<'a> {
    fn from(text: &'a str) -> Self {
        Value::Text(text)
    }
}

impl<'a> From<&'a String> for Value<'a> {
    fn from(text: &'a String) -> Self {
        Value::Text(text)
    }
}

impl<'a> From<&'a [u8]> for Value<'a> {
    fn from(bytes: &'a [u8]) -> Self {
        Value::Blob(bytes)
    }
}

impl<'a> From<&'a Vec<u8>> for Value<'a> {
    fn from(bytes: &'a Vec<u8>) -> Self {
        Value::Blob(bytes)
    }
}

impl<'a, T: Into<Value<'a>>> From<Option<T>> for Value<'a> {
    fn from(option: Option<T>) -> Self {
        option.map_or(Value::Null, Into::into)
    }
}

impl<'a> From<&'a Set> for Value<'a> {
    fn from(set: &'a Set) -> Self {
        Value::Set(set)
    }
}

impl rusqlite::ToSql for Value<'_> {
    fn to_sql(&self) -> rusqlite::Result<ToSqlOutput<'_>> {
        Ok(ToSqlOutput::Borrowed(match *self {
            Value::Null => ValueRef::Null,
            Value::Int(number) => ValueRef::Integer(number),
            Value::Text(text) => ValueRef::Text(text.as_bytes()),
            Value::Blob(bytes) => ValueRef::Blob(bytes),
            // Its rows are bound one by one; as a whole it has no place in a statement of SQLite.
            Value::Set(_) => return Err(rusqlite::Error::InvalidQuery),
        }))
    }
}

/// A set of rows as the first parameter of a statement: see [`crate::dialect`] on what it means there.
///
/// A statement that joins or changes has the same text whatever the number of rows, so it is prepared once; one that inserts is written
/// anew on a server. Neither runs into a limit on the number of parameters. Texts and bytes are copied, into one buffer for all of them.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Set {
    cells: Vec<Cell>,
    bytes: Vec<u8>,
    rows: usize,
}

/// One value of a row; a text or a blob ends where it says and begins where the one before it ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Cell {
    Null,
    Int(i64),
    Text { start: usize, end: usize },
    Blob { start: usize, end: usize },
}

impl Set {
    /// The empty set.
    pub fn new() -> Set {
        Set::default()
    }

    /// Adds a row; its values stand in the order of the marker's columns.
    ///
    /// # Panics
    /// When it has another number of values than the rows before it, or a set among them.
    pub fn push(&mut self, row: &[Value<'_>]) {
        assert!(
            self.rows == 0 || row.len() * self.rows == self.cells.len(),
            "a row of {} values in a set of {} rows with {} values in all",
            row.len(),
            self.rows,
            self.cells.len(),
        );
        for value in row {
            let start = self.bytes.len();
            let cell = match value {
                Value::Null => Cell::Null,
                Value::Int(number) => Cell::Int(*number),
                Value::Text(text) => {
                    self.bytes.extend_from_slice(text.as_bytes());
                    Cell::Text { start, end: self.bytes.len() }
                }
                Value::Blob(bytes) => {
                    self.bytes.extend_from_slice(bytes);
                    Cell::Blob { start, end: self.bytes.len() }
                }
                Value::Set(_) => panic!("a set in a set"),
            };
            self.cells.push(cell);
        }
        self.rows += 1;
    }

    /// How many rows it has.
    pub fn len(&self) -> usize {
        self.rows
    }

    /// Whether it has no row.
    pub fn is_empty(&self) -> bool {
        self.rows == 0
    }

    /// Its rows, in the order in which they were added.
    pub(crate) fn rows(&self) -> impl Iterator<Item = impl Iterator<Item = Value<'_>>> {
        let columns = self.cells.len().checked_div(self.rows).unwrap_or(0);
        self.cells.chunks_exact(columns.max(1)).map(|row| row.iter().map(|cell| self.value(*cell)))
    }

    fn value(&self, cell: Cell) -> Value<'_> {
        match cell {
            Cell::Null => Value::Null,
            Cell::Int(number) => Value::Int(number),
            Cell::Text { start, end } => {
                Value::Text(std::str::from_utf8(&self.bytes[start..end]).expect("it was copied from a str"))
            }
            Cell::Blob { start, end } => Value::Blob(&self.bytes[start..end]),
        }
    }
}

/// One row of a result, valid while its closure runs.
pub struct Row<'r>(Source<'r>);

/// The databases' own rows. Another database is another variant.
enum Source<'r> {
    Sqlite(&'r rusqlite::Row<'r>),
    Mysql(&'r ::mysql::Row),
}

impl<'r> Row<'r> {
    pub(crate) fn sqlite(row: &'r rusqlite::Row<'r>) -> Row<'r> {
        Row(Source::Sqlite(row))
    }

    pub(crate) fn mysql(row: &'r ::mysql::Row) -> Row<'r> {
        Row(Source::Mysql(row))
    }

    /// The column at `index`, from 0, as a Rust value.
    ///
    /// # Errors
    /// [`Error::Column`] if it does not fit: another kind, NULL without an `Option`, out of the type's range,
    /// or no such column.
    pub fn get<T: FromValue>(&self, index: usize) -> Result<T, Error> {
        let value = self.value(index, T::EXPECTED)?;
        T::from_value(value).ok_or_else(|| self.mismatch(index, T::EXPECTED, value.describe()))
    }

    fn value(&self, index: usize, expected: &'static str) -> Result<Value<'r>, Error> {
        let value = match self.0 {
            Source::Sqlite(row) => sqlite_value(row, index),
            Source::Mysql(row) => mysql_value(row, index),
        };
        value.map_err(|found| self.mismatch(index, expected, found))
    }

    fn mismatch(&self, index: usize, expected: &'static str, found: String) -> Error {
        let name = match self.0 {
            Source::Sqlite(row) => row.as_ref().column_name(index).map(str::to_owned).ok(),
            Source::Mysql(row) => row.columns_ref().get(index).map(|column| column.name_str().into_owned()),
        };
        Error::Column { column: name.unwrap_or_else(|| index.to_string()), expected, found }
    }
}

const NO_COLUMN: &str = "no such column";

/// The value, or what there is instead.
fn sqlite_value<'r>(row: &'r rusqlite::Row<'_>, index: usize) -> Result<Value<'r>, String> {
    match row.get_ref(index) {
        Ok(ValueRef::Null) => Ok(Value::Null),
        Ok(ValueRef::Integer(number)) => Ok(Value::Int(number)),
        Ok(ValueRef::Text(bytes)) => text(bytes),
        Ok(ValueRef::Blob(bytes)) => Ok(Value::Blob(bytes)),
        Ok(ValueRef::Real(number)) => Err(format!("the real {number}")),
        Err(_) => Err(NO_COLUMN.to_owned()),
    }
}

/// The value, or what there is instead. VARBINARY is a text that is compared byte by byte; BINARY and BLOB are bytes.
fn mysql_value(row: &::mysql::Row, index: usize) -> Result<Value<'_>, String> {
    use ::mysql::consts::ColumnType;
    /// The "character set" of what has none.
    const BINARY: u16 = 63;
    let (Some(value), Some(column)) = (row.as_ref(index), row.columns_ref().get(index)) else {
        return Err(NO_COLUMN.to_owned());
    };
    match value {
        ::mysql::Value::NULL => Ok(Value::Null),
        ::mysql::Value::Int(number) => Ok(Value::Int(*number)),
        ::mysql::Value::UInt(number) => {
            i64::try_from(*number).map(Value::Int).map_err(|_| format!("the integer {number}"))
        }
        ::mysql::Value::Bytes(bytes) => match column.column_type() {
            ColumnType::MYSQL_TYPE_DECIMAL | ColumnType::MYSQL_TYPE_NEWDECIMAL => {
                Err(format!("the real {}", String::from_utf8_lossy(bytes)))
            }
            ColumnType::MYSQL_TYPE_VARCHAR | ColumnType::MYSQL_TYPE_VAR_STRING => text(bytes),
            _ if column.character_set() == BINARY => Ok(Value::Blob(bytes)),
            _ => text(bytes),
        },
        ::mysql::Value::Float(number) => Err(format!("the real {number}")),
        ::mysql::Value::Double(number) => Err(format!("the real {number}")),
        ::mysql::Value::Date(..) | ::mysql::Value::Time(..) => Err("a time".to_owned()),
    }
}

fn text(bytes: &[u8]) -> Result<Value<'_>, String> {
    std::str::from_utf8(bytes).map(Value::Text).map_err(|error| format!("a text with {error}"))
}

/// A Rust type that a column can be read as.
pub trait FromValue: Sized {
    /// What the type holds, for an error message.
    const EXPECTED: &'static str;

    /// The value, or none if it does not fit.
    fn from_value(value: Value<'_>) -> Option<Self>;
}

macro_rules! int_from_value {
    ($($int:ty: $expected:literal),*) => {$(
        impl FromValue for $int {
            const EXPECTED: &'static str = $expected;
            fn from_value(value: Value<'_>) -> Option<Self> {
                match value {
                    Value::Int(number) => <$int>::try_from(number).ok(),
                    _ => None,
                }
            }
        }
    )*};
}
int_from_value!(i64: "an i64", u64: "a u64", u32: "a u32", u16: "a u16", u8: "a u8");

impl FromValue for bool {
    const EXPECTED: &'static str = "a bool (0 or 1)";

    fn from_value(value: Value<'_>) -> Option<Self> {
        match value {
            Value::Int(0) => Some(false),
            Value::Int(1) => Some(true),
            _ => None,
        }
    }
}

impl FromValue for String {
    const EXPECTED: &'static str = "a text";

    fn from_value(value: Value<'_>) -> Option<Self> {
        match value {
            Value::Text(text) => Some(text.to_owned()),
            _ => None,
        }
    }
}

impl FromValue for Vec<u8> {
    const EXPECTED: &'static str = "a blob";

    fn from_value(value: Value<'_>) -> Option<Self> {
        match value {
            Value::Blob(bytes) => Some(bytes.to_owned()),
            _ => None,
        }
    }
}

impl<T: FromValue> FromValue for Option<T> {
    const EXPECTED: &'static str = T::EXPECTED;

    fn from_value(value: Value<'_>) -> Option<Self> {
        match value {
            Value::Null => Some(None),
            some => T::from_value(some).map(Some),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rows(set: &Set) -> Vec<Vec<Value<'_>>> {
        set.rows().map(Iterator::collect).collect()
    }

    #[test]
    fn a_set_gives_back_what_was_put_in() {
        let mut set = Set::new();
        assert!(set.is_empty());
        assert_eq!(rows(&set), Vec::<Vec<Value<'_>>>::new());
        let first = [Value::Int(i64::MIN), Value::Text("a\"b"), Value::Blob(&[0, 255, 16])];
        let second = [Value::Null, Value::Text(""), Value::Blob(&[])];
        set.push(&first);
        set.push(&second);
        assert_eq!(rows(&set), [first, second]);
        assert_eq!(set.len(), 2);
    }

    #[test]
    #[should_panic(expected = "a row of 1 values in a set of 1 rows with 2 values")]
    fn rows_of_a_set_are_of_one_length() {
        let mut set = Set::new();
        set.push(&[Value::Int(1), Value::Int(2)]);
        set.push(&[Value::Int(1)]);
    }

    #[test]
    fn an_option_is_null_or_its_value() {
        assert_eq!(Value::from(None::<u32>), Value::Null);
        assert_eq!(Value::from(Some("a")), Value::Text("a"));
        assert_eq!(Value::from(true), Value::Int(1));
    }

    #[test]
    fn what_does_not_fit_is_no_value() {
        assert_eq!(u64::from_value(Value::Int(-1)), None);
        assert_eq!(u8::from_value(Value::Int(256)), None);
        assert_eq!(bool::from_value(Value::Int(2)), None);
        assert_eq!(String::from_value(Value::Blob(b"a")), None);
        assert_eq!(i64::from_value(Value::Null), None);
        assert_eq!(Option::<i64>::from_value(Value::Null), Some(None));
    }
}

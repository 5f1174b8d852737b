//! Where the databases' SQL differs: markers in the text, translated once per statement.
//!
//! A statement is written once. It keeps to what SQLite, MySQL 8 and MariaDB 10.6 have in common, with `?`
//! for parameters, and puts a marker where they differ. Markers are in lower case, between braces:
//!
//! | marker | SQLite | MySQL |
//! |---|---|---|
//! | `{for update}` | nothing: a writer is alone | `FOR UPDATE` |
//! | `{insert ignore}` | `INSERT OR IGNORE` | `INSERT IGNORE` |
//! | `{set(id INT, name TEXT, reply BLOB)}` | a subselect over `json_each(?)` | one over `JSON_TABLE(?, ..)` |
//! | `{update product AS p join set(id INT, n INT) AS s on p.id = s.id set stock = p.stock - s.n}` | `UPDATE .. SET .. FROM .. WHERE` | `UPDATE .. JOIN .. ON .. SET` |
//!
//! `{set(..)}` takes one parameter, a [`crate::Set`], and is followed by an alias: `FROM {set(id INT)} AS s`.
//! Its types are `INT`, `TEXT` and `BLOB`. `{update ..}` is a whole statement; its first parameter is the
//! set, further ones may stand after `on`. There is none after `set`, because the databases differ in the
//! order of the clauses and so of the parameters: put such a value into the set. A row should be matched by
//! one row of the set at most, and no assignment may read what another one assigns.
//!
//! Both `insert ignore`s also ignore violations other than uniqueness: check the values before.
//!
//! A marker that is not known, and a statement that would begin or end a transaction, never reaches a
//! database: it is a bug in the text, and a panic at its first use.

use std::borrow::Cow;
use std::collections::HashMap;

/// A kind of database.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Dialect {
    /// SQLite 3.51.3 or newer.
    Sqlite,
    /// MySQL 8 and MariaDB 10.6 or newer.
    Mysql,
}

/// The translated statements of one connection.
pub(crate) struct Statements {
    dialect: Dialect,
    /// By address and length of the static text: looking up does not read the text.
    translated: HashMap<(usize, usize), Cow<'static, str>>,
}

impl Statements {
    pub(crate) fn new(dialect: Dialect) -> Statements {
        Statements { dialect, translated: HashMap::new() }
    }

    /// The text for this database.
    pub(crate) fn text(&mut self, sql: &'static str) -> &str {
        let key = (sql.as_ptr().addr(), sql.len());
        self.translated.entry(key).or_insert_with(|| translate(self.dialect, sql))
    }
}

/// The statement's text for one database.
///
/// # Panics
/// If a marker is not known or not well-formed, or if the statement begins or ends a transaction.
pub fn translate(dialect: Dialect, sql: &'static str) -> Cow<'static, str> {
    refuse_transaction_control(sql);
    if !sql.contains('{') {
        return Cow::Borrowed(sql);
    }
    let mut text = String::with_capacity(2 * sql.len());
    let mut rest = sql;
    while let Some((before, from_marker)) = rest.split_once('{') {
        let Some((marker, after)) = from_marker.split_once('}') else {
            panic!("a marker without its closing brace in: {sql}");
        };
        let marker = marker.split_whitespace().collect::<Vec<_>>().join(" ");
        text.push_str(before);
        match marker.as_str() {
            "for update" if dialect == Dialect::Mysql => text.push_str("FOR UPDATE"),
            "for update" => {}
            "insert ignore" if dialect == Dialect::Mysql => text.push_str("INSERT IGNORE"),
            "insert ignore" => text.push_str("INSERT OR IGNORE"),
            other => match parse_set(other) {
                Some((set, "")) => text.push_str(&set.table(dialect)),
                _ => {
                    let update = parse_update(other);
                    let alone = before.trim().is_empty() && after.trim().is_empty();
                    let Some(update) = update.filter(|_| alone) else {
                        panic!("the marker {{{other}}} is unknown or misplaced in: {sql}");
                    };
                    text.push_str(&update.statement(dialect));
                }
            },
        }
        rest = after;
    }
    text.push_str(rest);
    Cow::Owned(text)
}

/// Transactions belong to the database's thread: a closure that committed would tear its group apart.
fn refuse_transaction_control(sql: &str) {
    const CONTROL: [&str; 7] = ["BEGIN", "START", "COMMIT", "END", "ROLLBACK", "SAVEPOINT", "RELEASE"];
    let first = sql.split(|c: char| !c.is_ascii_alphabetic()).find(|word| !word.is_empty()).unwrap_or("");
    assert!(
        !CONTROL.iter().any(|word| word.eq_ignore_ascii_case(first)),
        "a closure must not begin or end its own transaction: {sql}"
    );
}

/// `set(id INT, name TEXT)`.
struct SetColumns<'m>(Vec<(&'m str, ColumnType)>);

#[derive(Clone, Copy, PartialEq)]
enum ColumnType {
    Int,
    Text,
    Blob,
}

/// A set at the beginning of `marker`, and what follows it.
fn parse_set(marker: &str) -> Option<(SetColumns<'_>, &str)> {
    let (columns, rest) = marker.strip_prefix("set(")?.split_once(')')?;
    let columns = columns.split(',').map(|column| {
        let (name, kind) = column.trim().split_once(' ')?;
        let kind = match kind {
            "INT" => ColumnType::Int,
            "TEXT" => ColumnType::Text,
            "BLOB" => ColumnType::Blob,
            _ => return None,
        };
        Some((name, kind))
    });
    Some((SetColumns(columns.collect::<Option<_>>()?), rest))
}

impl SetColumns<'_> {
    /// A derived table over one parameter, without its alias.
    fn table(&self, dialect: Dialect) -> String {
        match dialect {
            Dialect::Sqlite => format!("(SELECT {} FROM json_each(?))", self.list(sqlite_column)),
            Dialect::Mysql => format!(
                "(SELECT {} FROM JSON_TABLE(?, '$[*]' COLUMNS ({})) AS json_rows)",
                self.list(mysql_column),
                self.list(mysql_path)
            ),
        }
    }

    fn list(&self, each: fn(usize, &str, ColumnType) -> String) -> String {
        let columns = self.0.iter().enumerate().map(|(index, (name, kind))| each(index, name, *kind));
        columns.collect::<Vec<_>>().join(", ")
    }
}

fn sqlite_column(index: usize, name: &str, kind: ColumnType) -> String {
    match kind {
        ColumnType::Int | ColumnType::Text => format!("value ->> {index} AS {name}"),
        ColumnType::Blob => format!("unhex(value ->> {index}) AS {name}"),
    }
}

fn mysql_column(_: usize, name: &str, kind: ColumnType) -> String {
    match kind {
        ColumnType::Int | ColumnType::Text => name.to_owned(),
        ColumnType::Blob => format!("UNHEX({name}) AS {name}"),
    }
}

fn mysql_path(index: usize, name: &str, kind: ColumnType) -> String {
    let kind = if kind == ColumnType::Int { "BIGINT" } else { "LONGTEXT" };
    format!("{name} {kind} PATH '$[{index}]'")
}

/// `update product AS p join set(id INT) AS s on p.id = s.id set stock = 0`.
struct UpdateFromSet<'m> {
    table: &'m str,
    set: SetColumns<'m>,
    set_alias: &'m str,
    condition: &'m str,
    assignments: &'m str,
}

fn parse_update(marker: &str) -> Option<UpdateFromSet<'_>> {
    let (table, rest) = marker.strip_prefix("update ")?.split_once(" join ")?;
    let (set, rest) = parse_set(rest)?;
    let (set_alias, rest) = rest.trim_start().strip_prefix("AS ")?.split_once(" on ")?;
    let (condition, assignments) = rest.split_once(" set ")?;
    let well_formed = table.contains(" AS ") && !assignments.contains('?');
    well_formed.then_some(UpdateFromSet { table, set, set_alias, condition, assignments })
}

impl UpdateFromSet<'_> {
    fn statement(&self, dialect: Dialect) -> String {
        let UpdateFromSet { table, set, set_alias, condition, assignments } = self;
        let set = set.table(dialect);
        match dialect {
            Dialect::Sqlite => {
                format!("UPDATE {table} SET {assignments} FROM {set} AS {set_alias} WHERE {condition}")
            }
            Dialect::Mysql => {
                let assignments = self.qualified_assignments();
                format!("UPDATE {table} JOIN {set} AS {set_alias} ON {condition} SET {assignments}")
            }
        }
    }

    /// MySQL finds a bare column ambiguous when the set has one of the same name; SQLite takes only bare ones.
    fn qualified_assignments(&self) -> String {
        let alias = self.table.rsplit(' ').next().unwrap_or(self.table);
        let assignments = split_at_top_level_commas(self.assignments);
        let qualified = assignments.into_iter().map(|assignment| format!("{alias}.{}", assignment.trim()));
        qualified.collect::<Vec<_>>().join(", ")
    }
}

fn split_at_top_level_commas(list: &str) -> Vec<&str> {
    let mut depth = 0_i32;
    list.split(|c| {
        match c {
            '(' => depth += 1,
            ')' => depth -= 1,
            _ => {}
        }
        c == ',' && depth == 0
    })
    .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const SET: &str = "SELECT p.id FROM product p JOIN {set(id INT, name TEXT, reply BLOB)} AS s ON s.id = p.id {for update}";
    const UPDATE: &str = "{update product AS p join set(id INT, n INT) AS s on p.id = s.id AND p.shop = ?
                           set stock = max(p.stock - s.n, 0), version = p.version + 1}";

    #[test]
    fn a_text_without_markers_is_not_copied() {
        assert!(matches!(translate(Dialect::Sqlite, "SELECT 1"), Cow::Borrowed("SELECT 1")));
    }

    #[test]
    fn sqlite() {
        assert_eq!(
            translate(Dialect::Sqlite, SET),
            "SELECT p.id FROM product p JOIN (SELECT value ->> 0 AS id, value ->> 1 AS name, \
             unhex(value ->> 2) AS reply FROM json_each(?)) AS s ON s.id = p.id "
        );
        assert_eq!(
            translate(Dialect::Sqlite, UPDATE),
            "UPDATE product AS p SET stock = max(p.stock - s.n, 0), version = p.version + 1 FROM \
             (SELECT value ->> 0 AS id, value ->> 1 AS n FROM json_each(?)) AS s \
             WHERE p.id = s.id AND p.shop = ?"
        );
        assert_eq!(translate(Dialect::Sqlite, "{insert ignore} INTO t"), "INSERT OR IGNORE INTO t");
    }

    #[test]
    fn mysql() {
        assert_eq!(
            translate(Dialect::Mysql, SET),
            "SELECT p.id FROM product p JOIN (SELECT id, name, UNHEX(reply) AS reply FROM JSON_TABLE(?, '$[*]' \
             COLUMNS (id BIGINT PATH '$[0]', name LONGTEXT PATH '$[1]', reply LONGTEXT PATH '$[2]')) AS json_rows) \
             AS s ON s.id = p.id FOR UPDATE"
        );
        assert_eq!(
            translate(Dialect::Mysql, UPDATE),
            "UPDATE product AS p JOIN (SELECT id, n FROM JSON_TABLE(?, '$[*]' \
             COLUMNS (id BIGINT PATH '$[0]', n BIGINT PATH '$[1]')) AS json_rows) AS s \
             ON p.id = s.id AND p.shop = ? \
             SET p.stock = max(p.stock - s.n, 0), p.version = p.version + 1"
        );
        assert_eq!(translate(Dialect::Mysql, "{insert ignore} INTO t"), "INSERT IGNORE INTO t");
    }

    #[test]
    fn a_wrong_text_is_a_panic_at_its_first_use() {
        const WRONG: [&str; 11] = [
            "SELECT 1 {for share}",
            "SELECT 1 {for update",
            "SELECT * FROM {set(id FLOAT)} AS s",
            "SELECT * FROM {set()} AS s",
            "{update t AS t join set(id INT) AS s on t.id = s.id set n = ?}",
            "{update t AS t join set(id INT) AS s on t.id = s.id set n = 1} AND t.id = 3",
            "{update t join set(id INT) AS s on t.id = s.id set n = 1}",
            "{}",
            "commit",
            " ROLLBACK TO SAVEPOINT job",
            "BEGIN IMMEDIATE",
        ];
        for dialect in [Dialect::Sqlite, Dialect::Mysql] {
            for sql in WRONG {
                assert!(std::panic::catch_unwind(|| translate(dialect, sql)).is_err(), "{sql}");
            }
        }
    }

    #[test]
    fn a_statement_is_translated_once() {
        let mut statements = Statements::new(Dialect::Sqlite);
        let first = statements.text(SET).as_ptr();
        assert_eq!(statements.text(SET).as_ptr(), first);
    }
}

//! Where the databases' SQL differs: markers in the text, translated once per statement.
//!
//! A statement is written once. It keeps to what SQLite, MySQL 8 and MariaDB 10.6 have in common, with `?`
//! for parameters, and puts a marker where they differ. Markers are in lower case, between braces:
//!
//! | marker | SQLite | MySQL |
//! |---|---|---|
//! | `{for update}` | nothing: a writer is alone | `FOR UPDATE` |
//! | `{insert ignore}` | `INSERT OR IGNORE` | `INSERT IGNORE` |
//! | `{insert into t (id, n) from set(id INT) AS s values (s.id, 7)}` | `INSERT .. VALUES` | `INSERT .. SELECT .. FROM` a subselect over `JSON_TABLE(?, ..)` |
//! | `{from set(id INT) AS s join product AS p on p.id = s.id}` | `FROM product AS p WHERE ..` | `FROM .. JOIN .. ON ..` |
//! | `{update product AS p join set(id INT, n INT) AS s on p.id = s.id set stock = p.stock - s.n}` | `UPDATE .. SET .. WHERE` | `UPDATE .. JOIN .. ON .. SET` |
//! | `{delete from product AS p join set(id INT) AS s on p.id = s.id}` | `DELETE FROM .. WHERE` | `DELETE p FROM .. JOIN .. ON` |
//!
//! # Statements over a set
//!
//! A statement with a set takes a [`crate::Set`] as its first parameter and means: for each row of the set. A server gets
//! all rows at once, because a round trip costs more than the work. SQLite is called in this thread, so there
//! the statement is run row by row, with `s.id` bound like any other parameter: a point lookup without a join, several times
//! faster than a table function.
//!
//! So that both mean the same: no `LIMIT`, no aggregate, no `ORDER BY` (SQLite answers in the order of the set), and no
//! other parameter in front of the marker. The set's types are `INT`, `TEXT` and `BLOB`. `{insert ..}`, `{update ..}` and `{delete ..}` are whole statements;
//! further parameters may stand after `on`, none after `set`, because the databases differ in the order of
//! the clauses: put such a value into the set. A row should be matched by one row of the set at most, and no
//! assignment may read what another one assigns. When a row fails, those before it have been written: a closure that
//! goes on after such an error is a bug, one that returns it has its transaction rolled back.
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
    let mut set = None;
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
            other => {
                let clause = SetClause::parse(&marker);
                let first = set.is_none() && !text.contains('?');
                let whole = before.trim().is_empty() && after.trim().is_empty();
                let Some(clause) = clause.filter(|clause| first && (whole || !clause.is_whole_statement()))
                else {
                    panic!("the marker {{{other}}} is unknown or misplaced in: {sql}");
                };
                text.push_str(&clause.text(dialect));
                set = Some(clause.set.names());
            }
        }
        rest = after;
    }
    text.push_str(rest);
    match (set, dialect) {
        (Some((alias, columns)), Dialect::Sqlite) => Cow::Owned(bind_columns(&text, &alias, &columns)),
        _ => Cow::Owned(text),
    }
}

/// Puts `?1` for `s.first`, `?2` for `s.second`, and so on; the statement's own `?` are counted on from there.
fn bind_columns(text: &str, alias: &str, columns: &[String]) -> String {
    let in_name = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == '.';
    let mut bound = String::with_capacity(text.len());
    let mut next = columns.len() + 1;
    let mut rest = text;
    while let Some(first) = rest.chars().next() {
        let name = rest.find(|c| !in_name(c)).map_or(rest, |end| &rest[..end]);
        if name.is_empty() {
            match first {
                '?' => {
                    bound.push_str(&format!("?{next}"));
                    next += 1;
                }
                other => bound.push(other),
            }
            rest = &rest[first.len_utf8()..];
            continue;
        }
        let column = name.strip_prefix(alias).and_then(|name| name.strip_prefix('.'));
        match column {
            None => bound.push_str(name),
            Some(column) => {
                let place = columns.iter().position(|known| known == column);
                let Some(place) = place else { panic!("the set has no column {column} in: {text}") };
                bound.push_str(&format!("?{}", place + 1));
            }
        }
        rest = &rest[name.len()..];
    }
    bound
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

/// `set(id INT, name TEXT) AS s`.
struct SetTable<'m> {
    columns: Vec<(&'m str, ColumnType)>,
    alias: &'m str,
}

#[derive(Clone, Copy, PartialEq)]
enum ColumnType {
    Int,
    Text,
    Blob,
}

impl SetTable<'_> {
    /// A set at the beginning of `marker`, and what follows it.
    fn parse(marker: &str) -> Option<(SetTable<'_>, &str)> {
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
        let columns = columns.collect::<Option<_>>()?;
        let rest = rest.strip_prefix(" AS ")?;
        let (alias, rest) = rest.split_once(' ').unwrap_or((rest, ""));
        Some((SetTable { columns, alias }, rest))
    }

    fn names(&self) -> (String, Vec<String>) {
        (self.alias.to_owned(), self.columns.iter().map(|(name, _)| (*name).to_owned()).collect())
    }

    /// A derived table over one parameter, with its alias.
    fn mysql(&self) -> String {
        let list = |each: fn((usize, &(&str, ColumnType))) -> String| {
            self.columns.iter().enumerate().map(each).collect::<Vec<_>>().join(", ")
        };
        let selected = list(|(_, (name, kind))| match kind {
            ColumnType::Int | ColumnType::Text => (*name).to_owned(),
            ColumnType::Blob => format!("UNHEX({name}) AS {name}"),
        });
        let paths = list(|(index, (name, kind))| {
            let kind = if *kind == ColumnType::Int { "BIGINT" } else { "LONGTEXT" };
            format!("{name} {kind} PATH '$[{index}]'")
        });
        let alias = self.alias;
        format!("(SELECT {selected} FROM JSON_TABLE(?, '$[*]' COLUMNS ({paths})) AS json_rows) AS {alias}")
    }
}

/// A marker that brings a set in.
struct SetClause<'m> {
    set: SetTable<'m>,
    verb: SetVerb<'m>,
}

enum SetVerb<'m> {
    /// `insert into t (id, n) from set(id INT) AS s values (s.id, 7)`
    Insert { into: &'m str, values: &'m str },
    /// `from set(id INT) AS s join product AS p on p.id = s.id`
    Join { table: &'m str, condition: &'m str },
    /// `delete from product AS p join set(id INT) AS s on p.id = s.id`
    Delete { table: &'m str, condition: &'m str },
    /// `update product AS p join set(id INT) AS s on p.id = s.id set stock = 0`
    Update { table: &'m str, condition: &'m str, assignments: &'m str },
}

impl SetClause<'_> {
    fn parse(marker: &str) -> Option<SetClause<'_>> {
        if let Some(rest) = marker.strip_prefix("from ") {
            let (set, rest) = SetTable::parse(rest)?;
            let (table, condition) = rest.strip_prefix("join ")?.split_once(" on ")?;
            return Some(SetClause { set, verb: SetVerb::Join { table, condition } });
        }
        if let Some(rest) = marker.strip_prefix("insert into ") {
            let (into, rest) = rest.split_once(" from ")?;
            let (set, rest) = SetTable::parse(rest)?;
            let values = rest.strip_prefix("values (")?.strip_suffix(')')?;
            let well_formed = into.ends_with(')') && !values.contains('?');
            return well_formed.then_some(SetClause { set, verb: SetVerb::Insert { into, values } });
        }
        if let Some(rest) = marker.strip_prefix("delete from ") {
            let (table, rest) = rest.split_once(" join ")?;
            let (set, rest) = SetTable::parse(rest)?;
            let condition = rest.strip_prefix("on ")?;
            let verb = SetVerb::Delete { table, condition };
            return table.contains(" AS ").then_some(SetClause { set, verb });
        }
        let (table, rest) = marker.strip_prefix("update ")?.split_once(" join ")?;
        let (set, rest) = SetTable::parse(rest)?;
        let (condition, assignments) = rest.strip_prefix("on ")?.split_once(" set ")?;
        let well_formed = table.contains(" AS ") && !assignments.contains('?');
        let verb = SetVerb::Update { table, condition, assignments };
        well_formed.then_some(SetClause { set, verb })
    }

    fn is_whole_statement(&self) -> bool {
        !matches!(self.verb, SetVerb::Join { .. })
    }

    /// For SQLite with the set's columns by name: [`bind_columns`] puts parameters for them.
    fn text(&self, dialect: Dialect) -> String {
        match (&self.verb, dialect) {
            // VALUES, not SELECT: one that might insert several rows writes a journal of its own, to be undone alone.
            (SetVerb::Insert { into, values }, Dialect::Sqlite) => {
                format!("INSERT INTO {into} VALUES ({values})")
            }
            (SetVerb::Insert { into, values }, Dialect::Mysql) => {
                format!("INSERT INTO {into} SELECT {values} FROM {}", self.set.mysql())
            }
            (SetVerb::Join { table, condition }, Dialect::Sqlite) => {
                format!("FROM {table} WHERE {condition}")
            }
            (SetVerb::Join { table, condition }, Dialect::Mysql) => {
                format!("FROM {} JOIN {table} ON {condition}", self.set.mysql())
            }
            (SetVerb::Delete { table, condition }, Dialect::Sqlite) => {
                format!("DELETE FROM {table} WHERE {condition}")
            }
            (SetVerb::Delete { table, condition }, Dialect::Mysql) => {
                format!("DELETE {} FROM {table} JOIN {} ON {condition}", alias(table), self.set.mysql())
            }
            // The parameters after `on` must be numbered behind the set's, wherever the clause stands: there are none
            // in the assignments.
            (SetVerb::Update { table, condition, assignments }, Dialect::Sqlite) => {
                format!("UPDATE {table} SET {assignments} WHERE {condition}")
            }
            (SetVerb::Update { table, condition, assignments }, Dialect::Mysql) => {
                let assignments = qualified(assignments, table);
                format!("UPDATE {table} JOIN {} ON {condition} SET {assignments}", self.set.mysql())
            }
        }
    }
}

/// The `p` of `product AS p`.
fn alias(table: &str) -> &str {
    table.rsplit(' ').next().unwrap_or(table)
}

/// MySQL finds a bare column ambiguous when the set has one of the same name; SQLite takes only bare ones.
fn qualified(assignments: &str, table: &str) -> String {
    let alias = alias(table);
    let assignments = split_at_top_level_commas(assignments);
    let qualified = assignments.into_iter().map(|assignment| format!("{alias}.{}", assignment.trim()));
    qualified.collect::<Vec<_>>().join(", ")
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

    const INSERT: &str =
        "{insert into t (id, reply, n) from set(id INT, reply BLOB) AS s values (s.id, s.reply, 7)}";
    const SELECT: &str = "SELECT p.id, gas.id {from set(id INT, name TEXT) AS s join product AS p on p.id = s.id AND p.n = s.name}
                          AND p.shop = ? {for update}";
    const UPDATE: &str = "{update product AS p join set(id INT, n INT) AS s on p.id = s.id AND p.shop = ?
                           set stock = max(p.stock - s.n, 0), version = p.version + 1}";

    const DELETE: &str = "{delete from product AS p join set(id INT) AS s on p.id = s.id}";

    #[test]
    fn a_text_without_markers_is_not_copied() {
        assert!(matches!(translate(Dialect::Sqlite, "SELECT 1"), Cow::Borrowed("SELECT 1")));
    }

    #[test]
    fn sqlite() {
        assert_eq!(translate(Dialect::Sqlite, INSERT), "INSERT INTO t (id, reply, n) VALUES (?1, ?2, 7)");
        assert_eq!(
            translate(Dialect::Sqlite, SELECT).split_whitespace().collect::<Vec<_>>().join(" "),
            "SELECT p.id, gas.id FROM product AS p WHERE p.id = ?1 AND p.n = ?2 AND p.shop = ?3"
        );
        assert_eq!(
            translate(Dialect::Sqlite, UPDATE),
            "UPDATE product AS p SET stock = max(p.stock - ?2, 0), version = p.version + 1 \
             WHERE p.id = ?1 AND p.shop = ?3"
        );
        assert_eq!(translate(Dialect::Sqlite, DELETE), "DELETE FROM product AS p WHERE p.id = ?1");
        assert_eq!(translate(Dialect::Sqlite, "{insert ignore} INTO t"), "INSERT OR IGNORE INTO t");
    }

    #[test]
    fn mysql() {
        assert_eq!(
            translate(Dialect::Mysql, INSERT),
            "INSERT INTO t (id, reply, n) SELECT s.id, s.reply, 7 FROM (SELECT id, UNHEX(reply) AS reply FROM \
             JSON_TABLE(?, '$[*]' COLUMNS (id BIGINT PATH '$[0]', reply LONGTEXT PATH '$[1]')) AS json_rows) AS s"
        );
        assert_eq!(
            translate(Dialect::Mysql, SELECT).split_whitespace().collect::<Vec<_>>().join(" "),
            "SELECT p.id, gas.id FROM (SELECT id, name FROM JSON_TABLE(?, '$[*]' \
             COLUMNS (id BIGINT PATH '$[0]', name LONGTEXT PATH '$[1]')) AS json_rows) AS s \
             JOIN product AS p ON p.id = s.id AND p.n = s.name AND p.shop = ? FOR UPDATE"
        );
        assert_eq!(
            translate(Dialect::Mysql, UPDATE),
            "UPDATE product AS p JOIN (SELECT id, n FROM JSON_TABLE(?, '$[*]' \
             COLUMNS (id BIGINT PATH '$[0]', n BIGINT PATH '$[1]')) AS json_rows) AS s \
             ON p.id = s.id AND p.shop = ? \
             SET p.stock = max(p.stock - s.n, 0), p.version = p.version + 1"
        );
        assert_eq!(
            translate(Dialect::Mysql, DELETE),
            "DELETE p FROM product AS p JOIN (SELECT id FROM JSON_TABLE(?, '$[*]' \
             COLUMNS (id BIGINT PATH '$[0]')) AS json_rows) AS s ON p.id = s.id"
        );
        assert_eq!(translate(Dialect::Mysql, "{insert ignore} INTO t"), "INSERT IGNORE INTO t");
    }

    #[test]
    fn a_wrong_text_is_a_panic_at_its_first_use() {
        const WRONG: [&str; 18] = [
            "SELECT 1 {for share}",
            "SELECT 1 {for update",
            "{insert into t (id) from set(id FLOAT) AS s values (s.id)}",
            "{insert into t (id) from set() AS s values (s.id)}",
            "{insert into t (id) from set(id INT) values (s.id)}",
            "{insert into t (id) from set(id INT) AS s values (?)}",
            "{insert into t (id) from set(id INT) AS s values (s.id)} ON CONFLICT DO NOTHING",
            "{insert into t from set(id INT) AS s values (s.id)}",
            "SELECT s.id {from set(id INT) AS s}",
            "SELECT s.id, ? {from set(id INT) AS s join t AS t on t.id = s.id}",
            "SELECT 1 {from set(id INT) AS s join t AS t on t.id = s.id} {from set(id INT) AS s join t AS t on t.id = s.id}",
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
        let unknown = "{insert into t (id) from set(id INT) AS s values (s.name)}";
        assert!(std::panic::catch_unwind(|| translate(Dialect::Sqlite, unknown)).is_err());
    }

    #[test]
    fn a_statement_is_translated_once() {
        let mut statements = Statements::new(Dialect::Sqlite);
        let first = statements.text(INSERT).as_ptr();
        assert_eq!(statements.text(INSERT).as_ptr(), first);
    }
}

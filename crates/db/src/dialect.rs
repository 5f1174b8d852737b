//! Where the databases' SQL differs: markers in the text, translated once per statement.
//!
//! A statement is written once. It keeps to what SQLite, MySQL 8 and MariaDB 10.6 have in common, with `?`
//! for parameters, and puts a marker where they differ. Markers are in lower case, between braces:
//!
//! | marker | SQLite | MySQL |
//! |---|---|---|
//! | `{for update}` | nothing: a writer is alone | `FOR UPDATE`; on MySQL 8 `OF` the table that a set is joined with |
//! | `{for update skip locked}` | nothing | `FOR UPDATE SKIP LOCKED`: rows that others hold are left out |
//! | `{for share}` | nothing | `LOCK IN SHARE MODE`, which both servers know |
//! | `{now millis}` | the machine's time in milliseconds since the Unix epoch | the server's |
//! | `{insert ignore}` | `INSERT OR IGNORE` | `INSERT IGNORE` |
//! | `{insert many} INTO t SELECT ..` | `INSERT OR FAIL`, without a journal of the statement | `INSERT` |
//! | `{insert into t (id, n) from set(id INT) AS s values (s.id, 7)}` | `INSERT .. VALUES`, of one row or a few | `INSERT .. VALUES`, of all rows |
//! | `{from set(id INT) AS s join product AS p on p.id = s.id}` | `FROM product AS p WHERE ..` | `FROM .. STRAIGHT_JOIN .. FORCE INDEX .. ON ..` |
//! | `{update product AS p join set(id INT, n INT) AS s on p.id = s.id set stock = p.stock - s.n}` | `UPDATE .. SET .. WHERE` | `UPDATE .. STRAIGHT_JOIN .. ON .. SET` |
//! | `{delete from product AS p join set(id INT) AS s on p.id = s.id}` | `DELETE FROM .. WHERE` | `DELETE p FROM .. STRAIGHT_JOIN .. ON` |
//!
//! # Statements over a set
//!
//! A statement with a set takes a [`crate::Set`] as its first parameter and means: for each row of the set. A server gets
//! all rows at once, because a round trip costs more than the work: as one parameter, a table in JSON (`JSON_TABLE(?, ..)`), or, to insert them,
//! as literals (`mysql/insert.rs`). SQLite is called in this thread, so there
//! the statement is run row by row, with `s.id` bound like any other parameter: a point lookup without a join, several times
//! faster than a table function. Inserts take some rows at a time ([`ROWS_AT_ONCE`]), because to begin and end a statement costs SQLite as
//! much as a row.
//!
//! A server joins the set with the table by the table's primary key, in the order of the set, whatever its optimizer thinks of
//! small tables: so a transaction locks the rows that it asks for and no others, in the order in which it asks. Another key
//! is named: `join purchase_accepted AS p by purchase_accepted_key on ..`; a view, which has no keys, is `join view purchase AS p on ..`.
//!
//! So that both mean the same: no `LIMIT`, no aggregate, no `ORDER BY` (both answer in the order of the set), and no
//! other parameter in front of the marker. The set's types are `INT`, `TEXT` and `BLOB`. `{insert ..}`, `{update ..}` and `{delete ..}` are whole statements;
//! further parameters may stand after `on`, none after `set`, because the databases differ in the order of
//! the clauses: put such a value into the set. A row should be matched by one row of the set at most, and no
//! assignment may read what another one assigns. When a row fails, those before it have been written: a closure that
//! goes on after such an error is a bug, one that returns it has its transaction rolled back.
//!
//! What is compared on MySQL is a number, or VARBINARY, which is compared byte by byte like a text in SQLite: its other texts
//! leave out spaces at the end when they compare.
//!
//! Both `insert ignore`s also ignore violations other than uniqueness: check the values before.
//!
//! A marker that is not known, and a statement that would begin or end a transaction, never reaches a
//! database: it is a bug in the text, and a panic at its first use.

use std::borrow::Cow;
use std::collections::HashMap;
use std::sync::Arc;

use crate::mysql::insert::Insert;

/// So many rows of a set are one statement when SQLite inserts them, as many as there are of the first number, then of the next; what is left
/// over goes row by row.
///
/// Each statement that inserts several rows with their numbers as keys is prepared to be undone alone, whatever it is told: at each one
/// SQLite copies the pages that it touches. So many rows at once are cheaper than few. SQLite alone takes 3,810 instructions a
/// row for a batch of 100 by 8, 3,490 by 32 and 8, 3,560 by 64 and 8; for one of 450 3,650, 3,310 and 3,250.
pub(crate) const ROWS_AT_ONCE: [usize; 2] = [32, 8];

/// A session's time zone is UTC (`mysql/connect.rs`): elsewhere an hour comes twice a year.
const MYSQL_NOW_MILLIS: &str = "CAST(UNIX_TIMESTAMP(NOW(3)) * 1000 AS SIGNED)";

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
    translated: HashMap<(usize, usize), Translated>,
}

/// A statement for one database.
struct Translated {
    text: Cow<'static, str>,
    /// What SQLite runs instead for [`ROWS_AT_ONCE`] rows each, if it inserts a set.
    many: Option<Many>,
    /// What a server is sent instead, if it inserts a set.
    insert: Option<Arc<Insert>>,
}

/// A statement for each of [`ROWS_AT_ONCE`].
pub(crate) type Many = [String; ROWS_AT_ONCE.len()];

impl Statements {
    pub(crate) fn new(dialect: Dialect) -> Statements {
        Statements { dialect, translated: HashMap::new() }
    }

    /// The text for this database.
    pub(crate) fn text(&mut self, sql: &'static str) -> &str {
        &self.translated(sql).text
    }

    /// The text, and those for [`ROWS_AT_ONCE`] rows if the statement inserts a set on SQLite.
    pub(crate) fn texts(&mut self, sql: &'static str) -> (&str, Option<&Many>) {
        let Translated { text, many, .. } = self.translated(sql);
        (text, many.as_ref())
    }

    /// What a server is sent instead of the text, if the statement inserts a set.
    pub(crate) fn insert(&mut self, sql: &'static str) -> Option<Arc<Insert>> {
        self.translated(sql).insert.clone()
    }

    fn translated(&mut self, sql: &'static str) -> &Translated {
        let key = (sql.as_ptr().addr(), sql.len());
        self.translated.entry(key).or_insert_with(|| translated(self.dialect, sql))
    }
}

/// The statement's text for one database.
///
/// # Panics
/// If a marker is not known or not well-formed, or if the statement begins or ends a transaction.
pub fn translate(dialect: Dialect, sql: &'static str) -> Cow<'static, str> {
    translated(dialect, sql).text
}

fn translated(dialect: Dialect, sql: &'static str) -> Translated {
    refuse_transaction_control(sql);
    if !sql.contains('{') {
        return Translated { text: Cow::Borrowed(sql), many: None, insert: None };
    }
    let mut text = String::with_capacity(2 * sql.len());
    let (mut set, mut many, mut joined) = (None, None, None);
    let mut rest = sql;
    while let Some((before, from_marker)) = rest.split_once('{') {
        let Some((marker, after)) = from_marker.split_once('}') else {
            panic!("a marker without its closing brace in: {sql}");
        };
        let marker = marker.split_whitespace().collect::<Vec<_>>().join(" ");
        text.push_str(before);
        match marker.as_str() {
            "for update" if dialect == Dialect::Mysql => {
                text.push_str(&for_update(joined.as_deref()));
            }
            "for update skip locked" if dialect == Dialect::Mysql => {
                text.push_str(&for_update(joined.as_deref()));
                text.push_str(" SKIP LOCKED");
            }
            "for share" if dialect == Dialect::Mysql => text.push_str("LOCK IN SHARE MODE"),
            "for update" | "for update skip locked" | "for share" => {}
            "now millis" if dialect == Dialect::Mysql => text.push_str(MYSQL_NOW_MILLIS),
            "now millis" => text.push_str("CAST(unixepoch('subsec') * 1000 AS INTEGER)"),
            "insert ignore" if dialect == Dialect::Mysql => text.push_str("INSERT IGNORE"),
            "insert ignore" => text.push_str("INSERT OR IGNORE"),
            "insert many" if dialect == Dialect::Mysql => text.push_str("INSERT"),
            "insert many" => text.push_str("INSERT OR FAIL"),
            other => {
                let clause = SetClause::parse(&marker);
                let first = set.is_none() && !text.contains('?');
                let whole = before.trim().is_empty() && after.trim().is_empty();
                let Some(clause) = clause.filter(|clause| first && (whole || !clause.is_whole_statement()))
                else {
                    panic!("the marker {{{other}}} is unknown or misplaced in: {sql}");
                };
                text.push_str(&clause.text(dialect));
                if let (SetVerb::Insert { into, values }, Dialect::Sqlite) = (&clause.verb, dialect) {
                    many = Some(ROWS_AT_ONCE.map(|rows| clause.set.insert_many(rows, into, values, sql)));
                }
                if let SetVerb::Join { joined: table, .. } = &clause.verb {
                    joined = Some(table.alias().to_owned());
                }
                set = Some((clause.set, matches!(clause.verb, SetVerb::Insert { .. })));
            }
        }
        rest = after;
    }
    text.push_str(rest);
    let Some((set, is_insert)) = set else {
        return Translated { text: Cow::Owned(text), many: None, insert: None };
    };
    let mut own = set.columns.len();
    let text = replace_names(&text, |name| match (dialect, name) {
        // The set's columns are the first parameters; the statement's own are counted on from there.
        (Dialect::Sqlite, "?") => {
            own += 1;
            Some(format!("?{own}"))
        }
        (Dialect::Sqlite, name) => Some(format!("?{}", set.place(name, sql)? + 1)),
        // For each row, what is written for it.
        (Dialect::Mysql, name) if is_insert => Some(format!("?{}", set.place(name, sql)? + 1)),
        // JSON has no bytes: they come in hexadecimal.
        (Dialect::Mysql, name) => {
            let is_blob = set.columns[set.place(name, sql)?].1 == ColumnType::Blob;
            is_blob.then(|| format!("UNHEX({name})"))
        }
    });
    let for_server = is_insert && dialect == Dialect::Mysql;
    let insert = for_server.then(|| Arc::new(Insert::new(&text, set.columns.len())));
    Translated { text: Cow::Owned(text), many, insert }
}

/// What locks the rows that were read. Beside a set it names the table: MySQL 8 refuses to lock a `JSON_TABLE` (error 3569), and so must be told what is
/// to be locked, for which MariaDB has no word. It passes over what is for MySQL 8 alone.
fn for_update(joined: Option<&str>) -> String {
    match joined {
        Some(alias) => format!("FOR UPDATE /*!80000 OF {alias} */"),
        None => "FOR UPDATE".to_owned(),
    }
}

/// Puts something else for names, dots included, and for `?`.
fn replace_names(text: &str, mut instead: impl FnMut(&str) -> Option<String>) -> String {
    let in_name = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == '.';
    let mut replaced = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(first) = rest.chars().next() {
        let length = rest.find(|c| !in_name(c)).unwrap_or(rest.len()).max(first.len_utf8());
        let (name, behind) = rest.split_at(length);
        match instead(name) {
            Some(other) => replaced.push_str(&other),
            None => replaced.push_str(name),
        }
        rest = behind;
    }
    replaced
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
struct SetTable {
    columns: Vec<(String, ColumnType)>,
    alias: String,
}

#[derive(Clone, Copy, PartialEq)]
enum ColumnType {
    Int,
    Text,
    Blob,
}

impl SetTable {
    /// A set at the beginning of `marker`, and what follows it.
    fn parse(marker: &str) -> Option<(SetTable, &str)> {
        let (columns, rest) = marker.strip_prefix("set(")?.split_once(')')?;
        let columns = columns.split(',').map(|column| {
            let (name, kind) = column.trim().split_once(' ')?;
            let kind = match kind {
                "INT" => ColumnType::Int,
                "TEXT" => ColumnType::Text,
                "BLOB" => ColumnType::Blob,
                _ => return None,
            };
            Some((name.to_owned(), kind))
        });
        let columns = columns.collect::<Option<_>>()?;
        let rest = rest.strip_prefix(" AS ")?;
        let (alias, rest) = rest.split_once(' ').unwrap_or((rest, ""));
        Some((SetTable { columns, alias: alias.to_owned() }, rest))
    }

    /// Which of the columns `s.id` is; none, if it is a name of something else.
    fn place(&self, name: &str, sql: &str) -> Option<usize> {
        let column = name.strip_prefix(self.alias.as_str())?.strip_prefix('.')?;
        let place = self.columns.iter().position(|(known, _)| known == column);
        assert!(place.is_some(), "the set has no column {column} in: {sql}");
        place
    }

    /// An insert of so many rows. Not OR ABORT, which is what SQLite does unless it is told: it would write a journal for the statement, to undo
    /// the rows before one that fails. (It does so all the same where a row's number is its key, because that may turn out to be none.)
    fn insert_many(&self, rows: usize, into: &str, values: &str, sql: &str) -> String {
        let rows = (0..rows).map(|row| {
            let bound = row * self.columns.len();
            let values =
                replace_names(values, |name| Some(format!("?{}", bound + self.place(name, sql)? + 1)));
            format!("({values})")
        });
        format!("INSERT OR FAIL INTO {into} VALUES {}", rows.collect::<Vec<_>>().join(", "))
    }

    /// A table over one parameter, with its alias.
    fn mysql(&self) -> String {
        let paths = self.columns.iter().enumerate().map(|(index, (name, kind))| {
            // Without its character set a text would have the database's, whatever that is.
            let kind = if *kind == ColumnType::Int { "BIGINT" } else { "LONGTEXT CHARACTER SET utf8mb4" };
            format!("{name} {kind} PATH '$[{index}]'")
        });
        let paths = paths.collect::<Vec<_>>().join(", ");
        format!("JSON_TABLE(?, '$[*]' COLUMNS ({paths})) AS {}", self.alias)
    }
}

/// The table that a set is joined with: `product AS p`, `purchase_accepted AS p by purchase_accepted_key`, `view purchase AS p`.
struct Joined<'m> {
    /// With its alias.
    table: &'m str,
    /// The key to find its rows by; a view has none.
    key: Option<&'m str>,
}

impl<'m> Joined<'m> {
    fn parse(text: &'m str) -> Option<Joined<'m>> {
        let joined = match (text.strip_prefix("view "), text.split_once(" by ")) {
            (Some(table), None) => Joined { table, key: None },
            (None, Some((table, key))) => Joined { table, key: Some(key) },
            (None, None) => Joined { table: text, key: Some("PRIMARY") },
            (Some(_), Some(_)) => return None,
        };
        joined.table.contains(" AS ").then_some(joined)
    }

    /// The `p` of `product AS p`.
    fn alias(&self) -> &str {
        self.table.rsplit(' ').next().unwrap_or(self.table)
    }

    /// The set first, row by row, and for each its rows by the key.
    fn mysql(&self, set: &SetTable) -> String {
        let key = self.key.map(|key| format!(" FORCE INDEX ({key})")).unwrap_or_default();
        format!("{} STRAIGHT_JOIN {}{key}", set.mysql(), self.table)
    }
}

/// A marker that brings a set in.
struct SetClause<'m> {
    set: SetTable,
    verb: SetVerb<'m>,
}

enum SetVerb<'m> {
    /// `insert into t (id, n) from set(id INT) AS s values (s.id, 7)`
    Insert { into: &'m str, values: &'m str },
    /// `from set(id INT) AS s join product AS p on p.id = s.id`
    Join { joined: Joined<'m>, condition: &'m str },
    /// `delete from product AS p join set(id INT) AS s on p.id = s.id`
    Delete { joined: Joined<'m>, condition: &'m str },
    /// `update product AS p join set(id INT) AS s on p.id = s.id set stock = 0`
    Update { joined: Joined<'m>, condition: &'m str, assignments: &'m str },
}

impl SetClause<'_> {
    fn parse(marker: &str) -> Option<SetClause<'_>> {
        if let Some(rest) = marker.strip_prefix("from ") {
            let (set, rest) = SetTable::parse(rest)?;
            let (joined, condition) = rest.strip_prefix("join ")?.split_once(" on ")?;
            return Some(SetClause {
                set,
                verb: SetVerb::Join { joined: Joined::parse(joined)?, condition },
            });
        }
        if let Some(rest) = marker.strip_prefix("insert into ") {
            let (into, rest) = rest.split_once(" from ")?;
            let (set, rest) = SetTable::parse(rest)?;
            let values = rest.strip_prefix("values (")?.strip_suffix(')')?;
            let well_formed = into.ends_with(')') && !values.contains('?');
            return well_formed.then_some(SetClause { set, verb: SetVerb::Insert { into, values } });
        }
        if let Some(rest) = marker.strip_prefix("delete from ") {
            let (joined, rest) = rest.split_once(" join ")?;
            let (set, rest) = SetTable::parse(rest)?;
            let condition = rest.strip_prefix("on ")?;
            return Some(SetClause {
                set,
                verb: SetVerb::Delete { joined: Joined::parse(joined)?, condition },
            });
        }
        let (joined, rest) = marker.strip_prefix("update ")?.split_once(" join ")?;
        let (set, rest) = SetTable::parse(rest)?;
        let (condition, assignments) = rest.strip_prefix("on ")?.split_once(" set ")?;
        let verb = SetVerb::Update { joined: Joined::parse(joined)?, condition, assignments };
        (!assignments.contains('?')).then_some(SetClause { set, verb })
    }

    fn is_whole_statement(&self) -> bool {
        !matches!(self.verb, SetVerb::Join { .. })
    }

    /// With the set's columns by name: [`translate`] puts for them what the database needs.
    fn text(&self, dialect: Dialect) -> String {
        let set = &self.set;
        match (&self.verb, dialect) {
            // VALUES, not SELECT: one that might insert several rows writes a journal of its own, to be undone alone
            // (but for OR FAIL, see `SetTable::insert_many`).
            (SetVerb::Insert { into, values }, Dialect::Sqlite | Dialect::Mysql) => {
                format!("INSERT INTO {into} VALUES ({values})")
            }
            (SetVerb::Join { joined, condition }, Dialect::Sqlite) => {
                format!("FROM {} WHERE {condition}", joined.table)
            }
            (SetVerb::Join { joined, condition }, Dialect::Mysql) => {
                format!("FROM {} ON {condition}", joined.mysql(set))
            }
            (SetVerb::Delete { joined, condition }, Dialect::Sqlite) => {
                format!("DELETE FROM {} WHERE {condition}", joined.table)
            }
            (SetVerb::Delete { joined, condition }, Dialect::Mysql) => {
                format!("DELETE {} FROM {} ON {condition}", joined.alias(), joined.mysql(set))
            }
            // The parameters after `on` must be numbered behind the set's, wherever the clause stands: there are none
            // in the assignments.
            (SetVerb::Update { joined, condition, assignments }, Dialect::Sqlite) => {
                format!("UPDATE {} SET {assignments} WHERE {condition}", joined.table)
            }
            (SetVerb::Update { joined, condition, assignments }, Dialect::Mysql) => {
                let assignments = qualified(assignments, joined.alias());
                format!("UPDATE {} ON {condition} SET {assignments}", joined.mysql(set))
            }
        }
    }
}

/// MySQL finds a bare column ambiguous when the set has one of the same name; SQLite takes only bare ones.
fn qualified(assignments: &str, alias: &str) -> String {
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
        assert_eq!(translate(Dialect::Sqlite, "{insert many} INTO t"), "INSERT OR FAIL INTO t");
    }

    #[test]
    fn sqlite_inserts_some_rows_at_once() {
        let mut statements = Statements::new(Dialect::Sqlite);
        let eight = "(?1, ?2, 7), (?3, ?4, 7), (?5, ?6, 7), (?7, ?8, 7), (?9, ?10, 7), (?11, ?12, 7), (?13, ?14, 7), (?15, ?16, 7)";
        let (one, many) = statements.texts(INSERT);
        assert_eq!(one, "INSERT INTO t (id, reply, n) VALUES (?1, ?2, 7)");
        let [thirty_two, of_eight] = many.expect("it inserts a set");
        assert_eq!(*of_eight, format!("INSERT OR FAIL INTO t (id, reply, n) VALUES {eight}"));
        assert!(thirty_two.starts_with(of_eight.as_str()) && thirty_two.ends_with(", (?63, ?64, 7)"));
        assert_eq!(statements.texts(DELETE).1, None);
        assert_eq!(Statements::new(Dialect::Mysql).texts(INSERT).1, None);
    }

    #[test]
    fn mysql() {
        assert_eq!(translate(Dialect::Mysql, INSERT), "INSERT INTO t (id, reply, n) VALUES (?1, ?2, 7)");
        assert_eq!(
            translate(Dialect::Mysql, SELECT).split_whitespace().collect::<Vec<_>>().join(" "),
            "SELECT p.id, gas.id FROM JSON_TABLE(?, '$[*]' \
             COLUMNS (id BIGINT PATH '$[0]', name LONGTEXT CHARACTER SET utf8mb4 PATH '$[1]')) AS s \
             STRAIGHT_JOIN product AS p FORCE INDEX (PRIMARY) ON p.id = s.id AND p.n = s.name AND p.shop = ? \
             FOR UPDATE /*!80000 OF p */"
        );
        assert_eq!(
            translate(Dialect::Mysql, UPDATE),
            "UPDATE JSON_TABLE(?, '$[*]' COLUMNS (id BIGINT PATH '$[0]', n BIGINT PATH '$[1]')) AS s \
             STRAIGHT_JOIN product AS p FORCE INDEX (PRIMARY) ON p.id = s.id AND p.shop = ? \
             SET p.stock = max(p.stock - s.n, 0), p.version = p.version + 1"
        );
        assert_eq!(
            translate(
                Dialect::Mysql,
                "{update t AS t join set(id INT, hash BLOB) AS s on t.id = s.id set hash = s.hash}"
            ),
            "UPDATE JSON_TABLE(?, '$[*]' COLUMNS (id BIGINT PATH '$[0]', hash LONGTEXT CHARACTER SET utf8mb4 PATH '$[1]')) AS s \
             STRAIGHT_JOIN t AS t FORCE INDEX (PRIMARY) ON t.id = s.id SET t.hash = UNHEX(s.hash)"
        );
        assert_eq!(
            translate(Dialect::Mysql, DELETE),
            "DELETE p FROM JSON_TABLE(?, '$[*]' COLUMNS (id BIGINT PATH '$[0]')) AS s \
             STRAIGHT_JOIN product AS p FORCE INDEX (PRIMARY) ON p.id = s.id"
        );
        assert_eq!(translate(Dialect::Mysql, "{insert ignore} INTO t"), "INSERT IGNORE INTO t");
        assert_eq!(translate(Dialect::Mysql, "{insert many} INTO t"), "INSERT INTO t");
        assert_eq!(
            translate(Dialect::Mysql, "SELECT 1 {for update skip locked}"),
            "SELECT 1 FOR UPDATE SKIP LOCKED"
        );
    }

    #[test]
    fn a_table_is_joined_by_the_key_that_is_named_and_a_view_by_none() {
        const KEY: &str = "SELECT t.id {from set(k TEXT) AS s join t AS t by t_key on t.k = s.k}";
        const VIEW: &str = "SELECT t.id {from set(k TEXT) AS s join view t AS t on t.k = s.k}";
        for (text, force) in [(KEY, " FORCE INDEX (t_key)"), (VIEW, "")] {
            let expected = format!(
                "SELECT t.id FROM JSON_TABLE(?, '$[*]' COLUMNS (k LONGTEXT CHARACTER SET utf8mb4 PATH '$[0]')) AS s \
                 STRAIGHT_JOIN t AS t{force} ON t.k = s.k"
            );
            assert_eq!(translate(Dialect::Mysql, text), expected);
            assert_eq!(translate(Dialect::Sqlite, text), "SELECT t.id FROM t AS t WHERE t.k = ?1");
        }
    }

    #[test]
    fn a_wrong_text_is_a_panic_at_its_first_use() {
        const WRONG: [&str; 19] = [
            "SELECT 1 {for nobody}",
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
            "SELECT t.id {from set(id INT) AS s join view t AS t by t_key on t.id = s.id}",
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

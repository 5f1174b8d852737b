//! Which columns a unique key is about: a server names the key only, and MariaDB not even its table.

use std::collections::HashMap;

use ::mysql::prelude::Queryable;
use ::mysql::{Conn, Error as MysqlError};

/// The unique keys of a database: by table and key, their columns as `table.column`, separated by `, `.
#[derive(Debug, Default)]
pub(super) struct Uniques(HashMap<String, HashMap<String, String>>);

impl Uniques {
    pub(super) fn read(conn: &mut Conn) -> Result<Uniques, MysqlError> {
        // As text: MySQL's and MariaDB's own tables have columns of different types here.
        let rows: Vec<(String, String, String)> = conn.query(
            "SELECT CONCAT(TABLE_NAME, ''), CONCAT(INDEX_NAME, ''), CONCAT(COLUMN_NAME, '')
             FROM information_schema.STATISTICS WHERE TABLE_SCHEMA = DATABASE() AND NON_UNIQUE = 0
             ORDER BY TABLE_NAME, INDEX_NAME, SEQ_IN_INDEX",
        )?;
        let mut uniques = Uniques::default();
        for (table, key, column) in rows {
            let columns = uniques.0.entry(table.clone()).or_default().entry(key).or_default();
            if !columns.is_empty() {
                columns.push_str(", ");
            }
            columns.push_str(&format!("{table}.{column}"));
        }
        Ok(uniques)
    }

    /// The columns of a key of the table that the statement writes to; the key's name, where that is not known.
    pub(super) fn columns(&self, statement: &str, key: &str) -> String {
        let table = written_table(statement).unwrap_or_default();
        let columns = self.0.get(table).and_then(|keys| keys.get(key));
        columns.cloned().unwrap_or_else(|| format!("{table}.{key}"))
    }
}

/// The table that an INSERT or UPDATE writes to.
fn written_table(statement: &str) -> Option<&str> {
    let mut words =
        statement.split(|c: char| !c.is_ascii_alphanumeric() && c != '_').filter(|word| !word.is_empty());
    let verb = |word: &str| word.eq_ignore_ascii_case("into") || word.eq_ignore_ascii_case("update");
    words.find(|word| verb(word))?;
    words.next()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_of_a_statement() {
        for statement in [
            "INSERT INTO t (id) VALUES (?)",
            "{insert ignore} INTO t(id) VALUES (?)",
            "{insert into t (id) from set(id INT) AS s values (s.id)}",
            "{update t AS x join set(id INT) AS s on x.id = s.id set n = 1}",
            "UPDATE t SET n = 1",
        ] {
            assert_eq!(written_table(statement), Some("t"), "{statement}");
        }
        assert_eq!(written_table("SELECT 1"), None);
    }

    #[test]
    fn a_key_that_is_not_known_is_named() {
        assert_eq!(Uniques::default().columns("INSERT INTO t (id) VALUES (1)", "t_key"), "t.t_key");
    }
}

//! Every setting with its value and where it came from, as a table or as JSON. Secrets are masked.

use std::fmt::Write;

use serde::Serialize;
use serde_json::Value;

use super::layers::{Loaded, Source};

/// One setting.
#[derive(Debug, Serialize)]
pub(crate) struct Setting {
    /// Its name: `section.name`, or `name` alone at the top.
    pub key: String,
    /// Its value; null if it is not set.
    pub value: Value,
    /// Where the value came from.
    pub source: Origin,
}

/// Where a value came from, for programs.
#[derive(Debug, Serialize)]
pub(crate) struct Origin {
    /// `default`, `file`, `environment` or `flag`.
    pub kind: &'static str,
    /// The file, the variable or the flag.
    pub name: Option<String>,
    /// The two in words.
    #[serde(skip)]
    text: String,
}

impl From<Source> for Origin {
    fn from(source: Source) -> Origin {
        let text = source.to_string();
        let (kind, name) = match source {
            Source::Default => ("default", None),
            Source::File(path) => ("file", Some(path.display().to_string())),
            Source::Environment(name) => ("environment", Some(name)),
            Source::Flag(name) => ("flag", Some(name.to_owned())),
        };
        Origin { kind, name, text }
    }
}

/// All settings: first those at the top, then section by section.
///
/// # Errors
/// A value that is not JSON, such as a path that is not Unicode.
pub(crate) fn settings(loaded: &Loaded) -> Result<Vec<Setting>, serde_json::Error> {
    let mut settings = Vec::new();
    collect(serde_json::to_value(&loaded.config)?, String::new(), &mut |key, value| {
        let source = loaded.source(&key).into();
        settings.push(Setting { key, value, source });
    });
    settings.sort_by_key(|setting| setting.key.contains('.'));
    Ok(settings)
}

fn collect(value: Value, key: String, visit: &mut impl FnMut(String, Value)) {
    let Value::Object(fields) = value else { return visit(key, value) };
    for (name, value) in fields {
        let key = if key.is_empty() { name } else { format!("{key}.{name}") };
        collect(value, key, visit);
    }
}

/// Three columns for people.
pub(crate) fn table(settings: &[Setting]) -> String {
    let rows: Vec<[String; 3]> = settings
        .iter()
        .map(|Setting { key, value, source }| {
            let value = if value.is_null() { "(not set)".to_owned() } else { value.to_string() };
            [key.clone(), value, source.text.clone()]
        })
        .collect();
    let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
    let (keys, values) = (width(0), width(1));
    let mut text = String::new();
    for [key, value, source] in &rows {
        // Writing to a String cannot fail.
        let _ = writeln!(text, "{key:keys$}  {value:values$}  {source}");
    }
    text
}

//! Reads the settings: defaults, then the TOML file, then `SAGA_...` variables, then flags; the last one wins.
//!
//! A variable is named after its setting, in capitals, with `__` between section and name:
//! `payment.limit` is `SAGA_PAYMENT__LIMIT`. Its text is read as the type that the setting has, so a token of
//! digits stays a text; the items of a list are separated by commas. A secret may come from a file: `NAME_file` in
//! place of `NAME`, in the file and the environment, is the path of a file that holds it. What never happens: a layer names a
//! setting that does not exist and is not told so; a wrong value is reported without its source, or a secret
//! one in plain text.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fmt;
use std::path::{Path, PathBuf};

use figment::providers::{Format, Serialized, Toml};
use figment::value::{Dict, Num, Value};
use figment::{Figment, error};

use super::role::{Lack, Role};
use super::secret::MASK;
use super::{ADMIN_TOKEN_MIN_CHARS, BOUNDS, Config, Conflict, FRACTIONS};

/// What all variables begin with.
const PREFIX: &str = "SAGA_";

/// The variable that names the file. The command line reads it.
pub(crate) const FILE_VARIABLE: &str = "SAGA_CONFIG";

/// The edit distance up to which a misspelt name is taken for an existing one.
const TYPO_MAX_EDITS: usize = 3;

/// The settings that are not shown whole. Each has a twin, with [`FILE_SUFFIX`], that names a file.
const SECRETS: &[(&str, Form)] = &[
    (ADMIN_TOKEN, Form::Token),
    ("mysql.url", MYSQL),
    ("mysql.account", MYSQL),
    ("mysql.product", MYSQL),
    ("mysql.order", MYSQL),
    ("mysql.payment", MYSQL),
    ("mysql.purchase", MYSQL),
    ("nats.url", Form::Url { schemes: &["nats", "tls"], like: "nats://HOST:PORT,..." }),
    ("redis.url", Form::Url { schemes: &["redis", "rediss"], like: "redis://HOST:PORT,..." }),
];

const ADMIN_TOKEN: &str = "catalog.admin_token";

const MYSQL: Form = Form::Url { schemes: &["mysql"], like: "mysql://USER:PASSWORD@HOST:PORT" };

/// What a secret looks like.
#[derive(Clone, Copy, Debug)]
enum Form {
    Token,
    Url { schemes: &'static [&'static str], like: &'static str },
}

/// What a secret's name ends with where the value is the name of a file.
const FILE_SUFFIX: &str = "_file";

/// Short names of variables.
const SHORT_NAMES: &[(&str, &str)] =
    &[("SAGA_MYSQL", "mysql.url"), ("SAGA_NATS", "nats.url"), ("SAGA_REDIS", "redis.url")];

/// Where a value came from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Source {
    /// Nobody set it.
    Default,
    /// The configuration file.
    File(PathBuf),
    /// The environment variable of this name.
    Environment(String),
    /// The flag of this name, with its dashes.
    Flag(&'static str),
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Source::Default => f.write_str("default"),
            Source::File(path) => write!(f, "file {}", path.display()),
            Source::Environment(name) => write!(f, "environment variable {name}"),
            Source::Flag(name) => write!(f, "flag {name}"),
        }
    }
}

/// A setting given on the command line.
#[derive(Clone, Debug)]
pub(crate) struct FlagSetting {
    /// The setting, such as `data_dir`.
    pub key: &'static str,
    /// The flag, such as `--data-dir`.
    pub flag: &'static str,
    /// Its value.
    pub value: Value,
}

/// Why there is no configuration.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    /// The file named by `--config` or `SAGA_CONFIG` cannot be read.
    #[error("cannot read the configuration file {}: {cause}", path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        cause: std::io::Error,
    },
    /// It is not TOML. The line itself is not shown: a secret may stand in it.
    #[error("the configuration file {}, line {line}, is not valid TOML: {problem}", path.display())]
    NotToml {
        /// The file.
        path: PathBuf,
        /// The line, counted from 1.
        line: usize,
        /// What is wrong with it.
        problem: String,
    },
    /// Some settings are not allowed. All are named that could be told.
    #[error("{}", lines(.0))]
    Invalid(Vec<Problem>),
}

fn lines(problems: &[Problem]) -> String {
    problems.iter().map(Problem::to_string).collect::<Vec<_>>().join("\n")
}

/// One thing wrong with one setting.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Problem {
    /// Something is set that does not exist.
    #[error("{name} ({source_name}): no such setting{}", did_you_mean(nearest))]
    Unknown {
        /// What was set, as it is written there.
        name: String,
        /// Where.
        source_name: Source,
        /// What it could have been meant to be.
        nearest: Option<String>,
    },
    /// A section is set as if it were a setting.
    #[error("{name} ({source_name}): this is a section; set what is in it, such as {example}")]
    Section {
        /// The section.
        name: String,
        /// Where.
        source_name: Source,
        /// One of its settings.
        example: String,
    },
    /// The value has the wrong type or is out of range.
    #[error("{key} = {value} ({source_name}): expected {allowed}")]
    Value {
        /// The setting.
        key: String,
        /// Its value, a secret one masked.
        value: String,
        /// Where it was set.
        source_name: Source,
        /// What is allowed.
        allowed: String,
    },
    /// A variable is not Unicode.
    #[error("the value of the environment variable {0} is not valid UTF-8")]
    NotUnicode(String),
    /// A secret is to come from a file that cannot be read.
    #[error("{name} = {path:?} ({source_name}): cannot read this file: {cause}")]
    SecretFile {
        /// The setting, with its suffix.
        name: String,
        /// Where it was set.
        source_name: Source,
        /// The file.
        path: String,
        /// Why not.
        cause: String,
    },
    /// Two settings contradict each other.
    #[error(transparent)]
    Conflict(#[from] Conflict),
    /// A setting is needed for what the process is to be.
    #[error(transparent)]
    Lack(#[from] Lack),
}

fn did_you_mean(nearest: &Option<String>) -> String {
    match nearest {
        Some(name) => format!("; did you mean {name}?"),
        None => "; `saga config show` lists all".to_owned(),
    }
}

/// The settings, and where each came from.
pub(crate) struct Loaded {
    /// The settings, within their bounds.
    pub config: Config,
    /// What is not a default.
    sources: BTreeMap<String, Source>,
    /// The settings as they were given, secrets among them.
    merged: Figment,
}

impl fmt::Debug for Loaded {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Loaded").field("config", &self.config).finish_non_exhaustive()
    }
}

impl Loaded {
    /// Where a setting's value came from.
    pub(crate) fn source(&self, key: &str) -> Source {
        self.sources.get(key).cloned().unwrap_or(Source::Default)
    }

    /// Tells what is missing for a role.
    ///
    /// # Errors
    /// [`Error::Invalid`], if anything is.
    pub(crate) fn check_for(&self, role: Role) -> Result<(), Error> {
        let lacks: Vec<_> = self.config.lacks_for(role).into_iter().map(Problem::Lack).collect();
        if lacks.is_empty() { Ok(()) } else { Err(Error::Invalid(lacks)) }
    }

    /// The variables that give another process all settings that are not defaults here. Secrets stand in them.
    pub(crate) fn variables(&self) -> BTreeMap<String, String> {
        let text = |key| self.merged.find_value(key).ok().and_then(|value| as_variable(&value));
        self.sources.keys().filter_map(|key| Some((variable_name(key), text(key)?))).collect()
    }
}

/// Puts the layers on top of each other and checks the result.
///
/// # Errors
/// An [`Error`] that names every setting that is unknown, or else every one that is out of range.
pub(crate) fn load(
    file: Option<&Path>,
    variables: impl IntoIterator<Item = (OsString, OsString)>,
    flags: Vec<FlagSetting>,
) -> Result<Loaded, Error> {
    let mut layers = Layers::new();
    if let Some(path) = file {
        layers.file(path)?;
    }
    layers.environment(variables);
    layers.flags(flags);
    layers.finish()
}

struct Layers {
    /// Every setting with its default, whose kind says how a variable's text is read.
    schema: BTreeMap<String, Value>,
    merged: Figment,
    sources: BTreeMap<String, Source>,
    problems: Vec<Problem>,
}

impl Layers {
    fn new() -> Layers {
        let merged = Figment::from(Serialized::defaults(Config::default()));
        let mut schema = BTreeMap::new();
        if let Ok(Value::Dict(_, defaults)) = Value::serialize(Config::default()) {
            leaves(defaults, "", &mut |key, value| {
                schema.insert(key, value);
            });
        }
        Layers { schema, merged, sources: BTreeMap::new(), problems: Vec::new() }
    }

    fn set(&mut self, key: &str, value: Value, source: Source) {
        let merged = std::mem::take(&mut self.merged);
        self.merged = merged.merge(Serialized::default(key, value));
        self.sources.insert(key.to_owned(), source);
    }

    fn file(&mut self, path: &Path) -> Result<(), Error> {
        let text = std::fs::read_to_string(path)
            .map_err(|cause| Error::Unreadable { path: path.to_owned(), cause })?;
        let values: Dict = Toml::from_str(&text).map_err(|error| {
            let before = error.span().and_then(|span| text.get(..span.start)).unwrap_or_default();
            let line = 1 + before.matches('\n').count();
            Error::NotToml { path: path.to_owned(), line, problem: error.message().replace('\n', ", ") }
        })?;
        leaves(values, "", &mut |key, value| {
            let source = Source::File(path.to_owned());
            if let (Some(secret), Some(file)) = (secret_in_file(&key), value.as_str()) {
                self.secret_file(secret, key, file, source);
            } else if self.schema.contains_key(&key) {
                self.set(&key, value, source);
            } else {
                let problem = self.unknown(key, source, |setting| setting.to_owned());
                self.problems.push(problem);
            }
        });
        Ok(())
    }

    fn environment(&mut self, variables: impl IntoIterator<Item = (OsString, OsString)>) {
        for (name, value) in variables {
            let Some(name) = name.to_str().filter(|name| name.starts_with(PREFIX)) else { continue };
            if name == FILE_VARIABLE || name == failpoint::VARIABLE {
                continue;
            }
            match value.into_string() {
                Ok(text) => self.variable(name, &text),
                Err(_) => self.problems.push(Problem::NotUnicode(name.to_owned())),
            }
        }
    }

    fn variable(&mut self, name: &str, text: &str) {
        let source = Source::Environment(name.to_owned());
        let in_file = SECRETS.iter().map(|(key, _)| *key).find(|key| {
            let name = name.strip_suffix(&FILE_SUFFIX.to_uppercase());
            name.is_some_and(|name| is_variable_of(name, key))
        });
        if let Some(key) = in_file {
            return self.secret_file(key, name.to_owned(), text, source);
        }
        let found = self.schema.iter().find(|(key, _)| is_variable_of(name, key));
        match found.map(|(key, default)| (key.clone(), parse_as(default, text))) {
            Some((key, value)) => self.set(&key, value, source),
            None => {
                let problem = self.unknown(name.to_owned(), source, variable_name);
                self.problems.push(problem);
            }
        }
    }

    /// A line end behind the secret, as editors leave it, is not part of it.
    fn secret_file(&mut self, key: &'static str, name: String, path: &str, source: Source) {
        match std::fs::read_to_string(path) {
            Ok(text) => self.set(key, Value::from(text.trim_end_matches(['\r', '\n'])), source),
            Err(cause) => self.problems.push(Problem::SecretFile {
                name,
                source_name: source,
                path: path.to_owned(),
                cause: cause.to_string(),
            }),
        }
    }

    fn flags(&mut self, flags: Vec<FlagSetting>) {
        for FlagSetting { key, flag, value } in flags {
            debug_assert!(self.schema.contains_key(key), "{flag} sets {key}, which is no setting");
            self.set(key, value, Source::Flag(flag));
        }
    }

    /// `spell` writes a setting as the layer would.
    fn unknown(&self, name: String, source_name: Source, spell: impl Fn(&str) -> String) -> Problem {
        let inside = |key: &str| key.split_once('.').is_some_and(|(section, _)| spell(section) == name);
        if let Some(key) = self.schema.keys().find(|key| inside(key)) {
            return Problem::Section { name, source_name, example: spell(key) };
        }
        let nearest = self
            .schema
            .keys()
            .map(|key| spell(key))
            .map(|known| (edits(&known, &name), known))
            .min()
            .filter(|(edits, _)| *edits <= TYPO_MAX_EDITS)
            .map(|(_, known)| known);
        Problem::Unknown { name, source_name, nearest }
    }

    fn finish(self) -> Result<Loaded, Error> {
        if !self.problems.is_empty() {
            return Err(Error::Invalid(self.problems));
        }
        let config: Config =
            self.merged.extract().map_err(|error| Error::Invalid(vec![self.mistyped(&error)]))?;
        let mut problems = self.out_of_bounds(&config);
        if problems.is_empty() {
            problems.extend(config.conflicts().into_iter().map(Problem::Conflict));
        }
        if !problems.is_empty() {
            return Err(Error::Invalid(problems));
        }
        Ok(Loaded { config, sources: self.sources, merged: self.merged })
    }

    fn mistyped(&self, error: &error::Error) -> Problem {
        // An item of a list has a path below the setting's own.
        let path = error.path.join(".");
        let of_setting = |key: &&String| path == **key || path.starts_with(&format!("{key}."));
        let key = self.schema.keys().find(of_setting).cloned().unwrap_or(path);
        let value = self.merged.find_value(&key).ok();
        let value = value.and_then(|value| serde_json::to_string(&value).ok()).unwrap_or_default();
        self.problem(&key, value)
    }

    fn out_of_bounds(&self, config: &Config) -> Vec<Problem> {
        let number = |key: &str| self.merged_number(key);
        let mut problems: Vec<Problem> = BOUNDS
            .iter()
            .filter_map(|(key, min, max)| {
                let value = number(key)?;
                (!(i128::from(*min)..=i128::from(*max)).contains(&value))
                    .then(|| self.problem(key, value.to_string()))
            })
            .collect();
        for (key, min, max) in FRACTIONS {
            let value = self.merged.find_value(key).ok().and_then(|value| value.to_num()?.to_f64());
            if let Some(value) = value.filter(|value| !(*min..=*max).contains(value)) {
                problems.push(self.problem(key, value.to_string()));
            }
        }
        if let Some(endpoint) = config.trace.endpoint.as_ref().filter(|endpoint| !is_endpoint(endpoint)) {
            problems.push(self.problem("trace.endpoint", format!("{endpoint:?}")));
        }
        for (key, form) in SECRETS {
            let value = self.merged.find_value(key).ok().and_then(Value::into_string);
            if value.is_some_and(|value| !form.fits(&value)) {
                problems.push(self.problem(key, String::new()));
            }
        }
        let prefixes = [
            ("mysql.database_prefix", &config.mysql.database_prefix),
            ("nats.prefix", &config.nats.prefix),
            ("redis.prefix", &config.redis.prefix),
        ];
        for (key, value) in prefixes.into_iter().filter(|(_, value)| !is_name(value)) {
            problems.push(self.problem(key, format!("{value:?}")));
        }
        problems
    }

    fn merged_number(&self, key: &str) -> Option<i128> {
        let number = self.merged.find_value(key).ok()?.to_num()?;
        number.to_i128().or_else(|| number.to_u128().and_then(|n| i128::try_from(n).ok()))
    }

    fn problem(&self, key: &str, value: String) -> Problem {
        let secret = SECRETS.iter().any(|(secret, _)| *secret == key);
        let value = if secret { MASK.to_owned() } else { value };
        let source_name = self.sources.get(key).cloned().unwrap_or(Source::Default);
        Problem::Value { key: key.to_owned(), value, source_name, allowed: allowed(key) }
    }
}

/// What a setting can be, in words.
fn allowed(key: &str) -> String {
    if let Some((_, min, max)) = BOUNDS.iter().find(|(bounded, ..)| *bounded == key) {
        return format!("a whole number from {min} to {max}");
    }
    if let Some((_, min, max)) = FRACTIONS.iter().find(|(bounded, ..)| *bounded == key) {
        return format!("a number from {min:.1} to {max:.1}");
    }
    match key {
        "listen" | "admin_listen" => "IP:PORT, such as 127.0.0.1:8080 or [::]:8080".to_owned(),
        "demo_data" => "true or false".to_owned(),
        "log.format" => "\"auto\", \"human\" or \"json\"".to_owned(),
        "nats.storage" => "\"file\" or \"memory\"".to_owned(),
        "catalog.write" => "\"auto\", \"open\" or \"admin\"".to_owned(),
        "trace.endpoint" => "http://HOST:PORT, such as http://127.0.0.1:4317".to_owned(),
        "http.cors_allowed_origins" => "a list of texts, such as [\"https://shop.example\"]".to_owned(),
        "mysql.database_prefix" | "nats.prefix" | "redis.prefix" => {
            format!("1 to {NAME_MAX_CHARS} letters, digits, - and _, such as \"saga\"")
        }
        _ if key.starts_with("peers.") => {
            "HOST:PORT, or several separated by commas, such as 10.0.0.7:8080,10.0.0.8:8080".to_owned()
        }
        _ => match SECRETS.iter().find(|(secret, _)| *secret == key) {
            Some((_, Form::Token)) => format!("a text of at least {ADMIN_TOKEN_MIN_CHARS} characters"),
            Some((_, Form::Url { like, .. })) => (*like).to_owned(),
            None => "a text".to_owned(),
        },
    }
}

/// The longest prefix of names on a server, in characters.
const NAME_MAX_CHARS: usize = 32;

fn is_name(text: &str) -> bool {
    (1..=NAME_MAX_CHARS).contains(&text.len())
        && text.chars().all(|c| c.is_ascii_alphanumeric() || c == '_' || c == '-')
}

/// Spans are sent without TLS: to a collector beside the process, or on a network that is trusted.
fn is_endpoint(text: &str) -> bool {
    let parsed: Option<axum::http::Uri> = text.parse().ok();
    parsed.is_some_and(|uri| {
        let login = uri.authority().is_some_and(|authority| authority.as_str().contains('@'));
        let somewhere = uri.host().is_some_and(|host| !host.is_empty()) && uri.port().is_some();
        uri.scheme_str() == Some("http") && somewhere && !login
    })
}

impl Form {
    fn fits(self, value: &str) -> bool {
        match self {
            Form::Token => value.chars().count() >= ADMIN_TOKEN_MIN_CHARS,
            Form::Url { schemes, .. } => {
                let scheme = value.split_once("://").filter(|(_, rest)| !rest.is_empty());
                scheme.is_some_and(|(scheme, _)| schemes.contains(&scheme))
            }
        }
    }
}

/// The secret that this setting names a file of.
fn secret_in_file(key: &str) -> Option<&'static str> {
    let key = key.strip_suffix(FILE_SUFFIX)?;
    SECRETS.iter().map(|(secret, _)| *secret).find(|secret| *secret == key)
}

fn is_variable_of(name: &str, key: &str) -> bool {
    let short = SHORT_NAMES.iter().find(|(short, _)| *short == name);
    short.map_or_else(|| variable_name(key) == name, |(_, meant)| *meant == key)
}

/// What [`parse_as`] reads as this value. None for what is not set.
fn as_variable(value: &Value) -> Option<String> {
    match value {
        Value::String(_, text) => Some(text.clone()),
        Value::Bool(_, flag) => Some(flag.to_string()),
        Value::Num(_, Num::F32(_) | Num::F64(_)) => Some(value.to_num()?.to_f64()?.to_string()),
        Value::Num(..) => {
            Some(value.to_i128().map(|n| n.to_string()).or_else(|| value.to_u128().map(|n| n.to_string()))?)
        }
        Value::Array(_, items) => {
            items.iter().map(as_variable).collect::<Option<Vec<_>>>().map(|items| items.join(","))
        }
        Value::Char(_, c) => Some(c.to_string()),
        Value::Dict(..) | Value::Empty(..) => None,
    }
}

fn variable_name(key: &str) -> String {
    format!("{PREFIX}{}", key.replace('.', "__").to_uppercase())
}

/// Reads a variable's text as what the setting is. A text that is no such thing stays a text, which is
/// reported as the wrong type.
fn parse_as(default: &Value, text: &str) -> Value {
    let parsed = match default {
        Value::Bool(..) => text.parse().ok().map(|flag: bool| Value::from(flag)),
        Value::Num(_, Num::F32(_) | Num::F64(_)) => text.parse().ok().map(|number: f64| Value::from(number)),
        Value::Num(..) => text.parse().ok().map(|number: i64| Value::from(number)),
        Value::Array(..) => {
            let items = text.split(',').map(str::trim).filter(|item| !item.is_empty());
            Some(Value::from(items.map(Value::from).collect::<Vec<_>>()))
        }
        _ => None,
    };
    parsed.unwrap_or_else(|| Value::from(text))
}

/// Visits what is in nested tables, each with its dotted path.
fn leaves(dict: Dict, prefix: &str, visit: &mut impl FnMut(String, Value)) {
    for (name, value) in dict {
        let key = if prefix.is_empty() { name } else { format!("{prefix}.{name}") };
        match value {
            Value::Dict(_, inner) => leaves(inner, &key, visit),
            leaf => visit(key, leaf),
        }
    }
}

/// The Levenshtein distance, by the row-by-row method of Wagner and Fischer (1974).
fn edits(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, from) in a.chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, to) in b.iter().enumerate() {
            let replaced = diagonal + usize::from(from != *to);
            diagonal = row[j + 1];
            row[j + 1] = replaced.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn variables(pairs: &[(&str, &str)]) -> Vec<(OsString, OsString)> {
        pairs.iter().map(|(name, value)| ((*name).into(), (*value).into())).collect()
    }

    fn with(pairs: &[(&str, &str)]) -> Result<Loaded, String> {
        load(None, variables(pairs), Vec::new()).map_err(|error| error.to_string())
    }

    #[test]
    fn every_number_has_bounds_and_a_default_within_them() {
        let layers = Layers::new();
        let numbers: Vec<&str> =
            layers.schema.iter().filter(|(_, v)| v.to_num().is_some()).map(|(key, _)| key.as_str()).collect();
        let (fractions, numbers): (Vec<&str>, Vec<&str>) =
            numbers.into_iter().partition(|key| FRACTIONS.iter().any(|(bounded, ..)| bounded == key));
        assert_eq!(fractions.len(), FRACTIONS.len());
        assert!(numbers.len() > 20, "{numbers:?}");
        for key in &numbers {
            let (_, min, max) = BOUNDS.iter().find(|(bounded, ..)| bounded == key).expect(key);
            let value = layers.merged_number(key).unwrap();
            assert!((i128::from(*min)..=i128::from(*max)).contains(&value), "{key} = {value}");
        }
        assert_eq!(numbers.len(), BOUNDS.len());
        assert!(SECRETS.iter().all(|(key, _)| layers.schema.contains_key(*key)));
    }

    #[test]
    fn every_bound_is_kept() {
        for (key, min, max) in BOUNDS {
            for outside in [min - 1, max + 1] {
                let error = with(&[(&variable_name(key), &outside.to_string())]).unwrap_err();
                let expected = format!(
                    "{key} = {outside} (environment variable {}): expected a whole number from {min} to {max}",
                    variable_name(key)
                );
                assert_eq!(error, expected);
            }
        }
    }

    #[test]
    fn a_variable_is_read_as_what_its_setting_is() {
        let loaded = with(&[
            ("SAGA_CATALOG__ADMIN_TOKEN", "12345678901234567890"),
            ("SAGA_LOG__FILTER", "true"),
            ("SAGA_HTTP__CORS_ALLOWED_ORIGINS", "https://a.example, https://b.example"),
            ("SAGA_DEMO_DATA", "false"),
            ("SAGA_PAYMENT__LIMIT", "5"),
            ("SAGA_TRACE__ENDPOINT", "http://127.0.0.1:4317"),
            ("SAGA_TRACE__SAMPLE_RATIO", "0.01"),
            ("SAGA_FAILPOINT", "participant.committed=1"),
            ("SAGA_CONFIG", "elsewhere.toml"),
            ("OTHER", "x"),
        ])
        .unwrap();
        let config = &loaded.config;
        assert_eq!(config.catalog.admin_token.as_ref().unwrap().expose(), "12345678901234567890");
        assert_eq!(config.log.filter, "true");
        assert_eq!(config.http.cors_allowed_origins, ["https://a.example", "https://b.example"]);
        assert!(!config.demo_data);
        assert_eq!(config.payment.limit, 5);
        assert_eq!(config.trace.endpoint.as_deref(), Some("http://127.0.0.1:4317"));
        assert_eq!(config.trace.sample_ratio, 0.01);
        assert_eq!(loaded.variables()["SAGA_TRACE__SAMPLE_RATIO"], "0.01");
        assert_eq!(loaded.source("payment.limit"), Source::Environment("SAGA_PAYMENT__LIMIT".to_owned()));
        assert_eq!(loaded.source("listen"), Source::Default);
    }

    #[test]
    fn what_a_variable_cannot_be_is_told() {
        for (name, value, expected) in [
            (
                "SAGA_PAYMENT__LIMIT",
                "many",
                "payment.limit = \"many\" (environment variable SAGA_PAYMENT__LIMIT): expected a whole number from 0 to 9007199254740991",
            ),
            (
                "SAGA_PAYMENT__LIMIT",
                "1.5",
                "payment.limit = \"1.5\" (environment variable SAGA_PAYMENT__LIMIT): expected a whole number from 0 to 9007199254740991",
            ),
            (
                "SAGA_DEMO_DATA",
                "yes",
                "demo_data = \"yes\" (environment variable SAGA_DEMO_DATA): expected true or false",
            ),
            (
                "SAGA_TRACE__SAMPLE_RATIO",
                "1.01",
                "trace.sample_ratio = 1.01 (environment variable SAGA_TRACE__SAMPLE_RATIO): expected a number from 0.0 to 1.0",
            ),
            (
                "SAGA_TRACE__SAMPLE_RATIO",
                "NaN",
                "trace.sample_ratio = NaN (environment variable SAGA_TRACE__SAMPLE_RATIO): expected a number from 0.0 to 1.0",
            ),
            (
                "SAGA_TRACE__ENDPOINT",
                "localhost:4317",
                "trace.endpoint = \"localhost:4317\" (environment variable SAGA_TRACE__ENDPOINT): expected http://HOST:PORT, such as http://127.0.0.1:4317",
            ),
            (
                "SAGA_LISTEN",
                "8080",
                "listen = \"8080\" (environment variable SAGA_LISTEN): expected IP:PORT, such as 127.0.0.1:8080 or [::]:8080",
            ),
            (
                "SAGA_CATALOG__WRITE",
                "all",
                "catalog.write = \"all\" (environment variable SAGA_CATALOG__WRITE): expected \"auto\", \"open\" or \"admin\"",
            ),
            (
                "SAGA_CATALOG__ADMIN_TOKEN",
                "hush",
                "catalog.admin_token = ******** (environment variable SAGA_CATALOG__ADMIN_TOKEN): expected a text of at least 16 characters",
            ),
            (
                "SAGA_PAYMENT__LIMITS",
                "1",
                "SAGA_PAYMENT__LIMITS (environment variable SAGA_PAYMENT__LIMITS): no such setting; did you mean SAGA_PAYMENT__LIMIT?",
            ),
            (
                "SAGA_PAYMENT",
                "1",
                "SAGA_PAYMENT (environment variable SAGA_PAYMENT): this is a section; set what is in it, such as SAGA_PAYMENT__LIMIT",
            ),
            (
                "SAGA_SOMETHING_ELSE",
                "1",
                "SAGA_SOMETHING_ELSE (environment variable SAGA_SOMETHING_ELSE): no such setting; `saga config show` lists all",
            ),
        ] {
            assert_eq!(with(&[(name, value)]).unwrap_err(), expected);
        }
    }

    #[test]
    fn all_that_is_out_of_range_is_told_at_once() {
        let error = with(&[("SAGA_DB__READERS", "0"), ("SAGA_SAGA__BATCH", "0")]).unwrap_err();
        assert_eq!(error.lines().count(), 2, "{error}");
    }

    #[test]
    fn edit_distances() {
        for (a, b, distance) in [("", "", 0), ("abc", "", 3), ("kitten", "sitting", 3), ("ab", "ba", 2)] {
            assert_eq!(edits(a, b), distance, "{a} {b}");
            assert_eq!(edits(b, a), distance, "{b} {a}");
        }
    }
}

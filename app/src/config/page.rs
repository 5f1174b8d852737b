//! docs/settings.md, made of what the code says: the fields' documentation, [`BOUNDS`], the defaults. A setting without documentation
//! and a page that is not what the code says fail the test.

use std::collections::BTreeMap;
use std::fmt::Write;

use serde_json::Value;

use super::{BOUNDS, Config};

/// Where settings are defined. The structs of the others have names of their own.
const SOURCES: [&str; 4] = [
    include_str!("../config.rs"),
    include_str!("servers.rs"),
    include_str!("../../../services/account/src/password.rs"),
    include_str!("../../../services/account/src/limits.rs"),
];
const ACCOUNT: &str = include_str!("../../../services/account/src/lib.rs");
const PAGE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/settings.md");
/// Set to have the page written.
const WRITE: &str = "SAGA_WRITE_SETTINGS_PAGE";

const INTRODUCTION: &str = "# Settings

Each comes from its flag, if it has one, or else from its environment variable (`payment.limit` is `SAGA_PAYMENT__LIMIT`), or else from the TOML file
of `--config` (`SAGA_CONFIG`), or else it has its default. One that is misspelt or out of its bounds is refused at the start. A secret, or a
URL with one, may be in a file instead: `SAGA_CATALOG__ADMIN_TOKEN_FILE=/run/secrets/token`. `saga config show` prints each with its value and where that
came from.

```toml
listen = \"0.0.0.0:8080\"

[catalog]
write = \"admin\"

[payment]
limit = 50000
```

This page is made of the code's own documentation: `SAGA_WRITE_SETTINGS_PAGE=1 cargo test -p sagaline --bin saga the_settings_page` writes it.
";

/// A field or a variant, with what its comment says.
struct Item {
    name: String,
    kind: String,
    meaning: String,
}

/// The items of each struct and enum in a source.
fn items(source: &str) -> BTreeMap<String, Vec<Item>> {
    let (mut all, mut inside, mut meaning) =
        (BTreeMap::<String, Vec<Item>>::new(), None::<String>, String::new());
    for line in source.lines().map(str::trim) {
        let line = line.trim_start_matches("pub(crate) ").trim_start_matches("pub ");
        if let Some(text) = line.strip_prefix("///") {
            if !meaning.is_empty() {
                meaning.push(' ');
            }
            meaning.push_str(text.trim());
            continue;
        }
        let opened = line.strip_prefix("struct ").or_else(|| line.strip_prefix("enum "));
        if let Some(name) = opened.and_then(|rest| rest.strip_suffix(" {")) {
            inside = Some(name.to_owned());
        } else if line == "}" {
            inside = None;
        } else if let (Some(name), Some(item)) = (&inside, line.strip_suffix(',')) {
            let (field, kind) = item.split_once(": ").unwrap_or((item, ""));
            let item =
                Item { name: field.to_owned(), kind: kind.to_owned(), meaning: std::mem::take(&mut meaning) };
            all.entry(name.clone()).or_default().push(item);
        }
        if !line.starts_with('#') {
            meaning.clear();
        }
    }
    all
}

/// Goes through a section and those in it.
fn tell(page: &mut String, types: &BTreeMap<String, Vec<Item>>, of: &str, path: &str, defaults: &Value) {
    let fields = types.get(of).unwrap_or_else(|| panic!("{of} is nowhere defined"));
    let is_section = |item: &Item| defaults[&item.name].is_object();
    let own: Vec<&Item> = fields.iter().filter(|item| !is_section(item)).collect();
    if !own.is_empty() {
        page.push_str("\n| setting | default | bounds | meaning |\n|---|---|---|---|\n");
    }
    for Item { name, kind, meaning } in own {
        let key = format!("{path}{name}");
        assert!(!meaning.is_empty(), "{key} has no documentation");
        let default = match &defaults[name] {
            Value::Null => "-".to_owned(),
            value => format!("`{value}`"),
        };
        let bounds = BOUNDS.iter().find(|(bounded, ..)| *bounded == key);
        let bounds = bounds.map_or(String::new(), |(_, least, greatest)| format!("{least} to {greatest}"));
        let variants = types
            .get(kind)
            .into_iter()
            .flatten()
            .map(|Item { name, meaning, .. }| format!(" `{}`: {}", name.to_lowercase(), meaning));
        let meaning: String = std::iter::once(meaning.clone()).chain(variants).collect();
        let _ = writeln!(page, "| `{key}` | {default} | {bounds} | {} |", meaning.replace('|', "\\|"));
    }
    for Item { name, kind, meaning } in fields.iter().filter(|item| is_section(item)) {
        let key = format!("{path}{name}");
        let _ = writeln!(page, "\n## {key}\n\n{meaning}");
        let of = if kind == "account::Config" { kind } else { kind.rsplit("::").next().unwrap_or(kind) };
        tell(page, types, of, &format!("{key}."), &defaults[name]);
    }
}

fn page() -> String {
    let mut types: BTreeMap<String, Vec<Item>> = SOURCES.into_iter().flat_map(items).collect();
    let account = items(ACCOUNT).remove("Config").expect("it has settings");
    types.insert("account::Config".to_owned(), account);
    let defaults = serde_json::to_value(Config::default()).expect("settings can be written as JSON");
    let mut page = INTRODUCTION.to_owned();
    tell(&mut page, &types, "Config", "", &defaults);
    page
}

#[test]
fn the_settings_page_says_what_the_code_says() {
    let page = page();
    for (key, ..) in BOUNDS {
        assert!(page.contains(&format!("| `{key}` |")), "{key} is not on the page");
    }
    if std::env::var_os(WRITE).is_some() {
        std::fs::write(PAGE, &page).unwrap();
    }
    let written = std::fs::read_to_string(PAGE).unwrap_or_default();
    assert!(written == page, "docs/settings.md is not what the code says; {WRITE}=1 and this test write it");
}

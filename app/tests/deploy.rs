//! What `deploy/` sets are settings that exist.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::Command;

/// `SAGA_...` variables in a file of `deploy/`, in the form `NAME: VALUE`, `NAME=VALUE` or `name: NAME, value: VALUE`.
fn variables(file: &str) -> BTreeMap<String, String> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy").join(file);
    let text = fs::read_to_string(&path).expect("the file is there");
    let of_line = |line: &str| {
        let rest = &line[line.find("SAGA_")?..];
        let end = rest.find(|c: char| !c.is_ascii_alphanumeric() && c != '_')?;
        let (name, rest) = rest.split_at(end);
        let value = rest.trim_start_matches([':', '=', ',', ' ']).trim_start_matches("value: ");
        Some((name.to_owned(), value.trim().trim_end_matches('}').trim_matches('"').to_owned()))
    };
    text.lines().filter(|line| !line.trim_start().starts_with('#')).filter_map(of_line).collect()
}

#[test]
fn every_variable_in_deploy_is_a_setting() {
    for file in ["compose.yaml", "kubernetes/kustomization.yaml", "kubernetes/gateway.yaml"] {
        let mut set = variables(file);
        assert!(!set.is_empty(), "{file} sets nothing");
        // The files of secrets are not here.
        set.remove("SAGA_CONFIG");
        let shown = Command::new(env!("CARGO_BIN_EXE_saga"))
            .args(["config", "show"])
            .env_clear()
            .envs(&set)
            .output()
            .expect("saga runs");
        assert!(shown.status.success(), "{file}: {}", String::from_utf8_lossy(&shown.stderr));
    }
}

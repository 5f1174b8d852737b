//! What `deploy/` sets are settings that exist, and enough for each service to start.

use std::collections::BTreeMap;
use std::fs;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use testkit::TempDir;

/// What `saga run` takes, as `deploy/` starts it.
const SERVICES: [&str; 7] = ["account", "product", "order", "payment", "purchase", "orchestrator", "gateway"];

fn deploy() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy")
}

fn text_of(file: &str) -> String {
    fs::read_to_string(deploy().join(file)).expect("the file is there")
}

/// `SAGA_...` variables in a text, in the form `NAME: VALUE`, `NAME=VALUE` or `name: NAME, value: VALUE`.
fn variables(text: &str) -> BTreeMap<String, String> {
    let of_line = |line: &str| {
        let rest = &line[line.find("SAGA_")?..];
        let end = rest.find(|c: char| !c.is_ascii_alphanumeric() && c != '_')?;
        let (name, rest) = rest.split_at(end);
        let value = rest.trim_start_matches([':', '=', ',', ' ']).trim_start_matches("value: ");
        Some((name.to_owned(), value.trim().trim_end_matches('}').trim_matches('"').to_owned()))
    };
    text.lines().filter(|line| !line.trim_start().starts_with('#')).filter_map(of_line).collect()
}

/// What stands below a line of this beginning: all that is indented deeper.
fn block(text: &str, beginning: &str) -> String {
    let depth = |line: &str| line.len() - line.trim_start().len();
    let mut lines = text.lines().skip_while(|line| !line.starts_with(beginning));
    let first = lines.next().unwrap_or_else(|| panic!("no line begins with {beginning:?}"));
    let below = lines.take_while(|line| line.trim().is_empty() || depth(line) > depth(first));
    below.collect::<Vec<&str>>().join("\n")
}

/// What `secrets.sh` makes, in a folder of this test's own.
struct Secrets(TempDir);

impl Secrets {
    fn make() -> Secrets {
        let secrets = Secrets(TempDir::new());
        fs::copy(deploy().join("secrets.sh"), secrets.script()).expect("the script is copied");
        secrets.run();
        secrets
    }

    fn script(&self) -> PathBuf {
        self.0.path().join("secrets.sh")
    }

    fn run(&self) {
        let made = Command::new("sh").arg(self.script()).output().expect("sh runs");
        assert!(made.status.success(), "{made:?}");
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join("secrets").join(name)
    }

    /// All of them, by name.
    fn read(&self) -> BTreeMap<String, String> {
        let files = fs::read_dir(self.path("")).expect("the folder of secrets");
        let read = |entry: fs::DirEntry| {
            let text = fs::read_to_string(entry.path()).expect("a secret is a text");
            (entry.file_name().to_string_lossy().into_owned(), text)
        };
        files.map(|entry| read(entry.expect("an entry"))).collect()
    }
}

/// Starts a replica, whose address is somebody else's: if its settings are enough it comes as far as this, and no further. It has
/// asked no server then.
fn start(service: &str, variables: &BTreeMap<String, String>) -> (Output, String) {
    let taken = TcpListener::bind("127.0.0.1:0").expect("a free port");
    let address = taken.local_addr().expect("an address").to_string();
    let started = Command::new(env!("CARGO_BIN_EXE_saga"))
        .args(["run", service, "--listen", &address, "--admin-listen", "127.0.0.1:0"])
        .env_clear()
        .envs(variables)
        .output()
        .expect("saga runs");
    (started, address)
}

#[test]
fn every_variable_in_deploy_is_a_setting() {
    for file in ["compose.yaml", "kubernetes/kustomization.yaml", "kubernetes/gateway.yaml"] {
        let mut set = variables(&text_of(file));
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

#[test]
fn what_each_service_is_given_is_enough_for_it_to_start() {
    let secrets = Secrets::make();
    let compose = text_of("compose.yaml");
    let (of_all, cluster) =
        (block(&compose, "x-environment:"), variables(&text_of("kubernetes/kustomization.yaml")));
    for service in SERVICES {
        let own = block(&compose, &format!("  {service}:"));
        assert!(own.contains(&format!("command: [run, {service}]")), "{own}");
        let mut in_compose = variables(&of_all);
        in_compose.extend(variables(&own));
        let mut in_cluster = cluster.clone();
        in_cluster.extend(variables(&text_of(&format!("kubernetes/{service}.yaml"))));
        for mut set in [in_compose, in_cluster] {
            // Both mount the file that the script makes for the service.
            if let Some(mounted) = set.get_mut("SAGA_CONFIG") {
                *mounted = secrets.path(&format!("{service}.toml")).display().to_string();
            }
            let (started, address) = start(service, &set);
            let log = String::from_utf8_lossy(&started.stderr);
            assert_eq!(started.status.code(), Some(1), "{service} with {set:?}: {log}");
            assert!(log.contains(&format!("cannot listen on {address}")), "{service}: {log}");
        }
    }
}

#[test]
fn every_file_that_compose_mounts_is_there() {
    let secrets = Secrets::make();
    let compose = text_of("compose.yaml");
    let files: Vec<&str> = compose.lines().filter_map(|line| line.trim().strip_prefix("file: ./")).collect();
    assert!(files.len() > 20, "{files:?}");
    for file in files {
        let path =
            file.strip_prefix("secrets/").map_or_else(|| deploy().join(file), |name| secrets.path(name));
        assert!(path.is_file(), "{file} is not there");
    }
}

#[test]
fn secrets_are_kept_and_no_two_are_the_same() {
    let (secrets, others) = (Secrets::make(), Secrets::make());
    let (made, elsewhere) = (secrets.read(), others.read());
    secrets.run();
    assert_eq!(secrets.read(), made);
    assert_eq!(made.keys().collect::<Vec<_>>(), elsewhere.keys().collect::<Vec<_>>());
    for (name, secret) in &made {
        let as_well: Vec<&String> = made
            .iter()
            .filter(|(other, text)| *other != name && *text == secret)
            .map(|(other, _)| other)
            .collect();
        assert!(as_well.is_empty(), "{name} is also in {as_well:?}");
        assert_ne!(Some(secret), elsewhere.get(name), "{name} is not made at random");
    }
}

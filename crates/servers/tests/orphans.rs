//! Nothing outlives the process that started it, however that ends.

#![allow(clippy::unwrap_used, reason = "what fails here fails the test")]

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use servers::shared;

/// How long the janitor may take.
const LIMIT: Duration = Duration::from_secs(30);
/// A MariaDB, three NATS and six Redis.
const SERVERS: usize = 10;

struct Parent {
    child: Child,
    /// Their process ids.
    servers: Vec<String>,
    temp: PathBuf,
}

/// A process with servers of all kinds, whose directory for temporary files is its own.
fn start() -> Parent {
    let temp = std::env::temp_dir().join(servers::unique_name());
    std::fs::create_dir(&temp).unwrap();
    // Whoever runs the tests in the background of a shell has them ignore the signal, and what they start.
    let mut command = Command::new("env");
    command.args(["--default-signal=INT", env!("CARGO_BIN_EXE_servers")]);
    for variable in [shared::MYSQL_VARIABLE, shared::NATS_VARIABLE, shared::REDIS_VARIABLE] {
        command.env_remove(variable);
    }
    let mut child = command.env("TMPDIR", &temp).stdout(Stdio::piped()).spawn().unwrap();
    let lines: Vec<_> =
        BufReader::new(child.stdout.take().unwrap()).lines().take(4).map(Result::unwrap).collect();
    assert_eq!(lines.last().unwrap(), "# until Ctrl-C");
    let servers = pids(&temp);
    assert_eq!(servers.len(), SERVERS);
    assert!(servers.iter().all(|pid| runs(pid)));
    Parent { child, servers, temp }
}

/// What the processes have written down.
fn pids(temp: &Path) -> Vec<String> {
    let nests = std::fs::read_dir(temp).unwrap().map(|nest| nest.unwrap().path());
    let files = nests.flat_map(|nest| std::fs::read_dir(nest).unwrap()).map(|file| file.unwrap().path());
    let groups = files.filter(|file| file.extension().is_some_and(|ending| ending == "group"));
    groups.map(|file| std::fs::read_to_string(file).unwrap().trim().to_owned()).collect()
}

/// One that is dead, and that nobody has asked about yet, runs no more.
fn runs(pid: &str) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"));
    stat.is_ok_and(|stat| !stat.contains(") Z "))
}

fn entries(dir: &Path) -> usize {
    std::fs::read_dir(dir).unwrap().count()
}

impl Parent {
    fn send(&self, signal: &str) {
        let line = format!("kill -s {signal} {}", self.child.id());
        assert!(Command::new("sh").args(["-c", &line]).status().unwrap().success());
    }

    fn assert_nothing_is_left(mut self) {
        self.child.wait().unwrap();
        let deadline = Instant::now() + LIMIT;
        while self.servers.iter().any(|pid| runs(pid)) || entries(&self.temp) > 0 {
            let left: Vec<_> =
                std::fs::read_dir(&self.temp).unwrap().map(|entry| entry.unwrap().path()).collect();
            assert!(Instant::now() < deadline, "of {:?} or {left:?} something is left", self.servers);
            std::thread::yield_now();
        }
        std::fs::remove_dir(&self.temp).unwrap();
    }
}

#[test]
fn nothing_is_left_when_the_parent_is_killed() {
    let parent = start();
    parent.send("KILL");
    parent.assert_nothing_is_left();
}

#[test]
fn nothing_is_left_when_the_parent_is_interrupted() {
    let parent = start();
    parent.send("INT");
    parent.assert_nothing_is_left();
}

#[test]
fn not_even_a_server_that_stands_still() {
    let parent = start();
    let line = format!("kill -s STOP {}", parent.servers.join(" "));
    assert!(Command::new("sh").args(["-c", &line]).status().unwrap().success());
    parent.send("KILL");
    parent.assert_nothing_is_left();
}

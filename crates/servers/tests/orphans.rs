//! Nothing outlives the process that started it, however that ends.

#![allow(clippy::unwrap_used, reason = "what fails here fails the test")]

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// How long the janitor may take.
const LIMIT: Duration = Duration::from_secs(30);

/// The example, which cargo builds beside this test.
fn orphanage() -> PathBuf {
    let test = std::env::current_exe().unwrap();
    let profile = test.ancestors().nth(2).unwrap();
    profile.join("examples/orphan")
}

struct Parent {
    child: Child,
    servers: Vec<String>,
    temp: PathBuf,
}

/// A process with servers of all kinds, whose directory for temporary files is its own.
fn start() -> Parent {
    let temp = std::env::temp_dir().join(servers::unique_name());
    std::fs::create_dir(&temp).unwrap();
    let mut command = Command::new(orphanage());
    let mut child = command.env("TMPDIR", &temp).stdout(Stdio::piped()).spawn().unwrap();
    let mut line = String::new();
    BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
    let servers: Vec<String> = line.split_whitespace().map(str::to_owned).collect();
    assert_eq!(servers.len(), 3, "it started: {line}");
    assert!(servers.iter().all(|pid| runs(pid)));
    assert_ne!(entries(&temp), 0);
    Parent { child, servers, temp }
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

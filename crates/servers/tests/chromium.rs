//! A browser asks for its page, and leaves nothing behind.

#![allow(clippy::unwrap_used, reason = "what fails here fails the test")]

use std::fs;
use std::io::ErrorKind;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use servers::Chromium;

/// How long a start or an end may take, on a busy machine.
const LIMIT: Duration = Duration::from_secs(60);

fn until(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + LIMIT;
    while !condition() {
        assert!(Instant::now() < deadline, "not within {LIMIT:?}: {what}");
        std::thread::yield_now();
    }
}

/// The arguments of a process; none of one that has ended.
fn arguments(process: &Path) -> Vec<String> {
    let line = fs::read(process.join("cmdline")).unwrap_or_default();
    line.split(|byte| *byte == 0).map(|word| String::from_utf8_lossy(word).into_owned()).collect()
}

/// The processes that name this directory, whatever their process group.
fn processes(dir: &Path) -> Vec<PathBuf> {
    let name = dir.to_str().unwrap();
    let processes = fs::read_dir("/proc").unwrap().map(|entry| entry.unwrap().path());
    processes.filter(|process| arguments(process).iter().any(|word| word.contains(name))).collect()
}

#[test]
fn a_browser_ends_with_all_its_processes_and_files() {
    let site = TcpListener::bind("127.0.0.1:0").unwrap();
    site.set_nonblocking(true).unwrap();
    let browser = Chromium::open(&format!("http://{}/", site.local_addr().unwrap())).unwrap();
    until("it asks for the page", || match site.accept() {
        Ok(_) => true,
        Err(error) => {
            assert_eq!(error.kind(), ErrorKind::WouldBlock);
            assert!(browser.is_running(), "{}", browser.log());
            false
        }
    });
    let process = Path::new("/proc").join(browser.pid().unwrap().to_string());
    let arguments = arguments(&process);
    let profile = arguments.iter().find_map(|word| word.strip_prefix("--user-data-dir=")).unwrap();
    let dir = Path::new(profile).parent().unwrap();
    assert!(processes(dir).len() > 1 && dir.exists());
    drop(browser);
    until("all of it is gone", || processes(dir).is_empty() && !dir.exists());
}

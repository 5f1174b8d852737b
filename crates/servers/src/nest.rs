//! One directory for all that this process starts, and a janitor that removes it with all its processes.
//!
//! The janitor is a shell that waits for the end of its input, a pipe that only this process holds. However this process ends,
//! the system closes the pipe; then the janitor kills what runs and removes the directory. It needs to be told nothing: before a
//! server's program is loaded its process has written its group's number into the nest, and where there is no nest any more
//! that write fails, and the program is not loaded.

use std::io::{BufRead, BufReader};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::{env, fs};

use crate::{Error, random};

/// How long the nest's path may be, in bytes: the longest path of a socket is 107, and servers add to it; Chromium most.
const LONGEST_ROOT: usize = 58;

/// The nest is moved first, and a file takes its name: who has not written the group's number by then never can, and a server that makes
/// its directory with all above it in its last moment does not make the nest again. Two rounds, for one who was about to write it.
const JANITOR: &str = r#"
trap '' HUP INT QUIT TERM
umask 077
mkdir "$1" || exit 1
echo ready
while read -r _; do :; done
gone=$1.gone
mv "$1" "$gone"
until (: > "$1"); do rm -rf "$1"; done
for round in 1 2; do
    for file in "$gone"/*.group; do
        [ -s "$file" ] && read -r group < "$file" && kill -s KILL -- "-$group"
    done
    sleep 0.05
done
tries=0
until rm -rf "$gone" "$1" || [ $tries -ge 200 ]; do
    tries=$((tries + 1))
    sleep 0.05
done
"#;

/// The directory.
#[derive(Debug)]
pub(crate) struct Nest {
    root: PathBuf,
    places: AtomicU64,
    /// Holds the pipe.
    _janitor: Child,
}

/// Where one server lives.
#[derive(Clone, Debug)]
pub(crate) struct Place {
    /// Its working directory; all its files are below.
    pub(crate) dir: PathBuf,
    /// Its process group, while it runs.
    pub(crate) group: PathBuf,
    /// What it writes to standard output and standard error.
    pub(crate) log: PathBuf,
}

impl Nest {
    /// This process's nest.
    pub(crate) fn get() -> Result<&'static Nest, Error> {
        static NEST: Mutex<Option<&'static Nest>> = Mutex::new(None);
        let mut nest = NEST.lock().unwrap_or_else(PoisonError::into_inner);
        match *nest {
            Some(nest) => Ok(nest),
            None => Ok(*nest.insert(Box::leak(Box::new(Nest::build()?)))),
        }
    }

    fn build() -> Result<Nest, Error> {
        let root = short_temp_dir().join(format!("sagaline-{}", random::hex(4)?));
        let mut command = Command::new("sh");
        command.args(["-c", JANITOR, "sh"]).arg(&root);
        // In a group of its own: a Ctrl-C at the terminal is not for it. It holds no output open for longer than this process.
        command.process_group(0).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null());
        let mut janitor = command.spawn().map_err(Error::io("start sh"))?;
        let mut answer = String::new();
        if let Some(stdout) = janitor.stdout.take() {
            BufReader::new(stdout).read_line(&mut answer).map_err(Error::io("read from sh"))?;
        }
        if answer != "ready\n" {
            return Err(Error::Refused { request: format!("mkdir {}", root.display()), answer });
        }
        Ok(Nest { root, places: AtomicU64::new(0), _janitor: janitor })
    }

    /// A new place, empty.
    pub(crate) fn place(&self) -> Result<Place, Error> {
        let number = self.places.fetch_add(1, Ordering::Relaxed);
        let path = |ending| self.root.join(format!("{number}{ending}"));
        let place = Place { dir: path(""), group: path(".group"), log: path(".log") };
        fs::create_dir(&place.dir).map_err(Error::io(format!("create {}", place.dir.display())))?;
        Ok(place)
    }
}

/// The system's directory for temporary files, unless its path is too long for a socket.
fn short_temp_dir() -> PathBuf {
    let dir = env::temp_dir();
    if dir.as_os_str().len() + "/sagaline-00000000".len() <= LONGEST_ROOT {
        dir
    } else {
        Path::new("/tmp").into()
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "what fails here fails the test")]

    use super::*;
    use std::time::{Duration, Instant};

    /// How long the janitor may take to begin.
    const LIMIT: Duration = Duration::from_secs(30);

    #[test]
    fn a_server_that_makes_its_directory_again_in_its_last_moment_leaves_nothing() {
        loop {
            let Nest { root, _janitor: mut janitor, .. } = Nest::build().unwrap();
            let gone = root.with_extension("gone");
            drop(janitor.stdin.take());
            let deadline = Instant::now() + LIMIT;
            while !gone.exists() {
                assert!(Instant::now() < deadline, "the nest is not moved");
            }
            let _ = fs::create_dir_all(root.join("0"));
            let in_time = janitor.try_wait().unwrap().is_none();
            assert!(janitor.wait().unwrap().success());
            if in_time {
                assert!(!root.exists() && !gone.exists());
                return;
            }
            // It may have been made after the janitor's end; no server lives so long.
            let _ = fs::remove_dir_all(root);
        }
    }
}

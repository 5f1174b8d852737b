//! Puts each of [`MUTANTS`] into a copy of the tree and looks whether its test fails.
//!
//! A mutant is killed if its test command fails or runs into the time limit, and it survives if the command
//! passes. What never happens: a mutant counts as killed because it does not compile, because its test fails
//! without it too, or because the test was not there; the tree itself is changed.

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::fs::{self, File};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::thread;
use std::time::{Duration, Instant};

use crate::Error;
use crate::mutants::{MUTANTS, Mutant};
use crate::steps::line;

/// How long one command may take to compile.
const BUILD_LIMIT: Duration = Duration::from_secs(30 * 60);

/// How long one test command may run. A mutant that hangs is killed by it.
const TEST_LIMIT: Duration = Duration::from_secs(10 * 60);

/// Runs all mutants, or the one of this name.
///
/// # Errors
/// If one survives, or if the question could not be asked.
pub(crate) fn run(root: &Path, name: Option<&str>) -> Result<(), Error> {
    let chosen: Vec<&Mutant> =
        MUTANTS.iter().filter(|mutant| name.is_none_or(|name| name == mutant.name)).collect();
    if chosen.is_empty() {
        let names: Vec<&str> = MUTANTS.iter().map(|mutant| mutant.name).collect();
        return Err(format!("no such mutant; there are:\n{}", names.join("\n")).into());
    }
    let laboratory = Laboratory::set_up(root)?;
    for test in chosen.iter().map(|mutant| mutant.test).collect::<BTreeSet<_>>() {
        laboratory.expect_pass(test)?;
    }
    let mut killed = 0;
    let mut table = String::new();
    for mutant in &chosen {
        let begun = Instant::now();
        let fate = laboratory.try_out(mutant);
        let word = fate.as_ref().map_or("ERROR", |fate| fate.word());
        killed += usize::from(matches!(fate, Ok(Fate::Killed | Fate::TimedOut)));
        let row = format!("{word:<10} {:>5} s  {}", begun.elapsed().as_secs(), mutant.name);
        println!("{row}");
        let note = fate.err().map_or_else(|| mutant.why.to_owned(), |error| error.to_string());
        table += &format!("{row}\n{:20}{note}\n", "");
    }
    println!("\n{table}\n{killed} of {} killed", chosen.len());
    match chosen.len() - killed {
        0 => Ok(()),
        alive => Err(format!("{alive} not killed: no test would notice these bugs").into()),
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Fate {
    Killed,
    TimedOut,
    Survived,
}

impl Fate {
    fn word(self) -> &'static str {
        match self {
            Fate::Killed => "killed",
            Fate::TimedOut => "timed out",
            Fate::Survived => "SURVIVED",
        }
    }
}

/// How a command ended.
enum Ended {
    Passed,
    Failed,
    TimedOut,
}

/// A copy of the tree with a target directory of its own, both kept for the next run.
struct Laboratory {
    tree: PathBuf,
    target: PathBuf,
    logs: PathBuf,
}

impl Laboratory {
    fn set_up(root: &Path) -> Result<Laboratory, Error> {
        let base = root.join("target/mutants");
        let [tree, target, logs] = ["tree", "target", "logs"].map(|name| base.join(name));
        let laboratory = Laboratory { tree, target, logs };
        for dir in [&laboratory.tree, &laboratory.logs] {
            fs::create_dir_all(dir).map_err(|error| format!("{}: {error}", dir.display()))?;
        }
        let files = sources(root)?;
        remove_others(&laboratory.tree, &laboratory.tree, &files)?;
        for file in &files {
            let content =
                fs::read(root.join(file)).map_err(|error| format!("{}: {error}", file.display()))?;
            laboratory.put(file, &content)?;
        }
        Ok(laboratory)
    }

    /// Writes a file unless it has this content. A written one is newer than everything that was built, which
    /// is what tells cargo to build it again, both when a mutant comes and when it goes.
    fn put(&self, file: &Path, content: &[u8]) -> Result<(), Error> {
        let path = self.tree.join(file);
        if fs::read(&path).is_ok_and(|old| old == content) {
            return Ok(());
        }
        let written =
            path.parent().map_or(Ok(()), fs::create_dir_all).and_then(|()| fs::write(&path, content));
        written.map_err(|error| format!("{}: {error}", path.display()).into())
    }

    /// The command must pass on the tree as it is.
    fn expect_pass(&self, test: &[&str]) -> Result<(), Error> {
        println!("$ cargo {}  (unchanged)", test.join(" "));
        self.build("unchanged", test)?;
        match self.test("unchanged", test)? {
            Ended::Passed => Ok(()),
            Ended::Failed | Ended::TimedOut => {
                let log = self.log("unchanged").display().to_string();
                Err(format!("`cargo {}` fails without any mutant: see {log}", test.join(" ")).into())
            }
        }
    }

    fn try_out(&self, mutant: &Mutant) -> Result<Fate, Error> {
        let file = Path::new(mutant.file);
        let path = self.tree.join(file);
        let sound = fs::read_to_string(&path).map_err(|error| format!("{}: {error}", mutant.file))?;
        let mutated = mutate(&sound, mutant)?;
        self.put(file, mutated.as_bytes())?;
        let fate = self.fate(mutant);
        self.put(file, sound.as_bytes())?;
        fate
    }

    fn fate(&self, mutant: &Mutant) -> Result<Fate, Error> {
        self.build(mutant.name, mutant.test)?;
        Ok(match self.test(mutant.name, mutant.test)? {
            Ended::Passed => Fate::Survived,
            Ended::Failed => Fate::Killed,
            Ended::TimedOut => Fate::TimedOut,
        })
    }

    fn build(&self, name: &str, test: &[&str]) -> Result<(), Error> {
        let own = test.iter().position(|argument| *argument == "--").unwrap_or(test.len());
        let mut arguments = test[..own].to_vec();
        arguments.push("--no-run");
        match self.cargo(name, &arguments, BUILD_LIMIT)? {
            Ended::Passed => Ok(()),
            Ended::Failed | Ended::TimedOut => {
                Err(format!("{name} does not compile: see {}", self.log(name).display()).into())
            }
        }
    }

    fn test(&self, name: &str, test: &[&str]) -> Result<Ended, Error> {
        let ended = self.cargo(name, test, TEST_LIMIT)?;
        let log = fs::read_to_string(self.log(name)).unwrap_or_default();
        if log.lines().any(ran_a_test) {
            return Ok(ended);
        }
        Err(format!("`cargo {}` ran no test: see {}", test.join(" "), self.log(name).display()).into())
    }

    fn log(&self, name: &str) -> PathBuf {
        self.logs.join(format!("{name}.log"))
    }

    /// Runs a command to its end or to the time limit, its output in the log.
    fn cargo(&self, name: &str, arguments: &[&str], limit: Duration) -> Result<Ended, Error> {
        let log = File::create(self.log(name))?;
        let mut command = Command::new(crate::cargo());
        command
            .args(arguments)
            .current_dir(&self.tree)
            .env("CARGO_TARGET_DIR", &self.target)
            .env("CARGO_TERM_COLOR", "never")
            .stdin(Stdio::null())
            .stderr(log.try_clone()?)
            .stdout(log)
            .process_group(0);
        let mut child = command.spawn().map_err(|error| format!("`{}`: {error}", line(&command)))?;
        let group = child.id();
        let (sender, receiver) = channel::<io::Result<ExitStatus>>();
        let waiter = thread::spawn(move || sender.send(child.wait()));
        let ended = match receiver.recv_timeout(limit) {
            Ok(status) => match status?.success() {
                true => Ended::Passed,
                false => Ended::Failed,
            },
            Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => {
                kill_group(group)?;
                Ended::TimedOut
            }
        };
        let _ = waiter.join();
        Ok(ended)
    }
}

/// The test and whatever it started: they share a process group, which is not this program's.
fn kill_group(group: u32) -> Result<(), Error> {
    let status = Command::new("sh").args(["-c", &format!("kill -KILL -{group}")]).status()?;
    if status.success() { Ok(()) } else { Err(format!("cannot end process group {group}").into()) }
}

/// Whether this is the line in which a test binary says that it ran some.
fn ran_a_test(line: &str) -> bool {
    line.strip_prefix("running ")
        .and_then(|rest| rest.split(' ').next())
        .is_some_and(|count| count.parse().is_ok_and(|count: u32| count > 0))
}

fn mutate(sound: &str, mutant: &Mutant) -> Result<String, Error> {
    let Mutant { name, file, find, replace, .. } = mutant;
    match sound.matches(find).count() {
        1 if find != replace => Ok(sound.replacen(find, replace, 1)),
        1 => Err(format!("{name}: it changes nothing").into()),
        count => {
            Err(format!("{name}: its text stands {count} times in {file}, and has to stand once").into())
        }
    }
}

/// The tracked files and the new ones that are not ignored.
fn sources(root: &Path) -> Result<BTreeSet<PathBuf>, Error> {
    let mut git = Command::new("git");
    git.args(["ls-files", "--cached", "--others", "--exclude-standard", "-z"]).current_dir(root);
    let listed = git.output().map_err(|error| format!("`{}`: {error}", line(&git)))?;
    if !listed.status.success() {
        return Err(format!("`{}`: {}", line(&git), String::from_utf8_lossy(&listed.stderr)).into());
    }
    let names = listed.stdout.split(|byte| *byte == 0).filter(|name| !name.is_empty());
    // A tracked file may have been deleted from the work tree.
    let paths = names.map(|name| PathBuf::from(OsStr::from_bytes(name)));
    Ok(paths.filter(|path| root.join(path).is_file()).collect())
}

/// Removes from the copy what is no longer in the tree.
fn remove_others(tree: &Path, dir: &Path, files: &BTreeSet<PathBuf>) -> Result<(), Error> {
    for entry in fs::read_dir(dir)? {
        let path = entry?.path();
        if path.is_dir() {
            remove_others(tree, &path, files)?;
        } else if !files.contains(path.strip_prefix(tree)?) {
            fs::remove_file(&path)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_mutant_applies_to_the_tree_as_it_is() {
        let mut names = BTreeSet::new();
        for mutant in MUTANTS {
            let sound = fs::read_to_string(crate::root().join(mutant.file)).unwrap();
            mutate(&sound, mutant).unwrap_or_else(|error| panic!("{error}"));
            assert_eq!(mutant.test.first(), Some(&"test"), "{}", mutant.name);
            assert!(names.insert(mutant.name), "two mutants are called {}", mutant.name);
        }
    }

    #[test]
    fn a_mutant_whose_text_is_missing_or_ambiguous_is_refused() {
        let mutant = |find, replace| Mutant { name: "m", file: "f", find, replace, test: &["test"], why: "" };
        assert_eq!(mutate("a b", &mutant("a", "c")).unwrap(), "c b");
        for (text, find, replace, expected) in [
            ("a b", "x", "y", "m: its text stands 0 times in f, and has to stand once"),
            ("a a", "a", "y", "m: its text stands 2 times in f, and has to stand once"),
            ("a b", "a", "a", "m: it changes nothing"),
        ] {
            assert_eq!(mutate(text, &mutant(find, replace)).unwrap_err().to_string(), expected);
        }
    }

    #[test]
    fn a_run_without_tests_is_noticed() {
        assert!(ran_a_test("running 1 test"));
        assert!(ran_a_test("running 12 tests"));
        assert!(!ran_a_test("running 0 tests"));
        assert!(!ran_a_test("test result: ok. 0 passed"));
    }
}

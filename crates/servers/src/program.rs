//! Where the programs are that tests start, and whether they are new enough.

use std::env;
use std::ffi::OsString;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::Error;

/// How to get a NATS server. What Debian 12 has is too old.
pub const INSTALL_NATS: &str = "go install github.com/nats-io/nats-server/v2@latest (Go: https://go.dev/dl), \
                                or take a binary from https://github.com/nats-io/nats-server/releases";
const INSTALL_MARIADB: &str = "apt-get install mariadb-server";
const INSTALL_REDIS: &str = "apt-get install redis-server";
const INSTALL_CHROMIUM: &str = "apt-get install chromium";
/// What is taken from npm is taken for this workspace alone, with the checksums of a lock file.
const INSTALL_FROM_NPM: &str = "cargo xtask test takes it from npm (apt-get install npm)";
const INSTALL_PROTOC: &str = "apt-get install protobuf-compiler protobuf-compiler-grpc";
const INSTALL_PYTHON_GRPC: &str = "apt-get install python3-grpcio python3-protobuf";
/// Before it, a consumer cannot be created unless it is new, nor have metadata.
const OLDEST_NATS: (&str, [u32; 2]) = ("2.10", [2, 10]);
/// Before it, the port of the cluster's bus cannot be chosen.
const OLDEST_REDIS: (&str, [u32; 2]) = ("7.0", [7, 0]);

/// Where programs are that are not on everybody's path.
const FURTHER_DIRS: [&str; 4] = ["/usr/sbin", "/usr/local/sbin", "/usr/local/bin", "/usr/local/go/bin"];

/// The programs of MariaDB.
#[derive(Debug)]
pub struct MariaDbPrograms {
    pub(crate) server: PathBuf,
    pub(crate) install_db: PathBuf,
    /// What the server says of its version, without spaces.
    pub(crate) version: String,
}

/// Finds MariaDB.
///
/// # Errors
/// [`Error::Missing`] if one of its programs is not there.
pub fn mariadb() -> Result<MariaDbPrograms, Error> {
    let missing = |program| Error::Missing { program, install: INSTALL_MARIADB };
    let server = find("mariadbd").ok_or_else(|| missing("mariadbd"))?;
    let install_db = find("mariadb-install-db").ok_or_else(|| missing("mariadb-install-db"))?;
    let version = version_of(&server)?;
    // mariadbd  Ver 10.11.19-MariaDB-0+deb12u1 for debian-linux-gnu on x86_64 (Debian 12)
    let version = version.split_whitespace().skip_while(|word| *word != "Ver").nth(1).unwrap_or("unknown");
    let version = version.chars().map(|c| if c.is_ascii_alphanumeric() { c } else { '.' }).collect();
    Ok(MariaDbPrograms { server, install_db, version })
}

/// Finds the client of MariaDB or MySQL.
///
/// # Errors
/// [`Error::Missing`] if there is none.
pub(crate) fn mysql_client() -> Result<PathBuf, Error> {
    let found = find("mariadb").or_else(|| find("mysql"));
    found.ok_or(Error::Missing { program: "mariadb", install: "apt-get install mariadb-client" })
}

/// Finds a NATS server that is new enough, on the path or where Go installs programs.
///
/// # Errors
/// [`Error::Missing`] if there is none, [`Error::TooOld`] if all are too old.
pub fn nats() -> Result<PathBuf, Error> {
    let found = dirs()
        .into_iter()
        .chain(go_dirs())
        .map(|dir| dir.join("nats-server"))
        .filter(|path| is_program(path));
    newest_enough(found, "nats-server", OLDEST_NATS, INSTALL_NATS)
}

/// Finds a Redis server that is new enough.
///
/// # Errors
/// [`Error::Missing`] if there is none, [`Error::TooOld`] if all are too old.
pub fn redis() -> Result<PathBuf, Error> {
    let found = dirs().into_iter().map(|dir| dir.join("redis-server")).filter(|path| is_program(path));
    newest_enough(found, "redis-server", OLDEST_REDIS, INSTALL_REDIS)
}

/// Finds Chromium.
///
/// # Errors
/// [`Error::Missing`] if it is not there.
pub fn chromium() -> Result<PathBuf, Error> {
    find("chromium").ok_or(Error::Missing { program: "chromium", install: INSTALL_CHROMIUM })
}

/// Where packages from npm are installed that tests use.
pub fn npm_dir() -> PathBuf {
    // This package is two levels below the workspace.
    let workspace = Path::new(env!("CARGO_MANIFEST_DIR")).ancestors().nth(2);
    workspace.unwrap_or(Path::new(".")).join("target/npm")
}

/// Finds the script of `event-source-polyfill`, a package from npm with which pages read event streams that ask for a header.
///
/// # Errors
/// [`Error::Missing`] if it is not there.
pub fn event_source_polyfill() -> Result<PathBuf, Error> {
    let script = npm_dir().join("node_modules/event-source-polyfill/src/eventsource.js");
    let missing = Error::Missing { program: "event-source-polyfill", install: INSTALL_FROM_NPM };
    if script.is_file() { Ok(script) } else { Err(missing) }
}

/// What a gRPC client in Python is generated and run with.
#[derive(Debug)]
pub struct GrpcPrograms {
    /// The compiler of `.proto` files.
    pub protoc: PathBuf,
    /// Its plugin that writes gRPC stubs in Python.
    pub plugin: PathBuf,
    /// A Python that has the modules `grpc` and `google.protobuf`.
    pub python: PathBuf,
}

/// Finds what a gRPC client in Python is generated and run with.
///
/// # Errors
/// [`Error::Missing`] if one of them is not there.
pub fn grpc() -> Result<GrpcPrograms, Error> {
    let compiler = |program| find(program).ok_or(Error::Missing { program, install: INSTALL_PROTOC });
    let python = python_with_grpc()
        .ok_or(Error::Missing { program: "a Python with gRPC", install: INSTALL_PYTHON_GRPC })?;
    Ok(GrpcPrograms { protoc: compiler("protoc")?, plugin: compiler("grpc_python_plugin")?, python })
}

/// A Python that has the modules `grpc` and `google.protobuf`. If the system has one of its own, only that counts: its modules are the
/// distribution's, of one age with its compiler, and what is first on the path may be another.
pub fn python_with_grpc() -> Option<PathBuf> {
    let systems_own = Some(PathBuf::from("/usr/bin/python3")).filter(|path| is_program(path));
    let python = systems_own.or_else(|| find("python3"))?;
    let import = Command::new(&python).args(["-c", "import grpc, google.protobuf"]).output();
    import.is_ok_and(|output| output.status.success()).then_some(python)
}

/// A program of this name, on the path or where administrators' programs are.
pub fn find(name: &str) -> Option<PathBuf> {
    dirs().into_iter().map(|dir| dir.join(name)).find(|path| is_program(path))
}

fn newest_enough(
    found: impl Iterator<Item = PathBuf>,
    program: &'static str,
    (needed, oldest): (&'static str, [u32; 2]),
    install: &'static str,
) -> Result<PathBuf, Error> {
    let mut error = Error::Missing { program, install };
    for path in found {
        let text = version_of(&path)?;
        if major_minor(&text).is_some_and(|version| version >= oldest) {
            return Ok(path);
        }
        if matches!(error, Error::Missing { .. }) {
            let found = text.lines().next().unwrap_or_default().to_owned();
            error = Error::TooOld { program: path.display().to_string(), found, needed, install };
        }
    }
    Err(error)
}

/// The first two numbers behind the word that begins with a v: `nats-server: v2.10.7`, `Redis server v=7.0.15 ...`.
fn major_minor(text: &str) -> Option<[u32; 2]> {
    text.split_whitespace().find_map(|word| {
        let mut numbers = word.strip_prefix('v')?.trim_start_matches('=').split('.');
        Some([numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?])
    })
}

fn version_of(program: &Path) -> Result<String, Error> {
    let start = Error::io(format!("start {}", program.display()));
    let output = Command::new(program).arg("--version").output().map_err(start)?;
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

fn dirs() -> Vec<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    env::split_paths(&path).chain(FURTHER_DIRS.map(PathBuf::from)).collect()
}

/// Where `go install` puts programs.
fn go_dirs() -> Vec<PathBuf> {
    let told = |name: &str| {
        let output = Command::new(find("go")?).args(["env", name]).output().ok()?;
        let text = String::from_utf8(output.stdout).ok()?;
        Some(OsString::from(text.trim())).filter(|text| !text.is_empty())
    };
    let of = |name: &str| env::var_os(name).filter(|value| !value.is_empty()).or_else(|| told(name));
    let gopath = of("GOPATH").or_else(|| Some(Path::new(&env::var_os("HOME")?).join("go").into()));
    let bins = gopath.iter().flat_map(env::split_paths).map(|dir| dir.join("bin"));
    of("GOBIN").map(PathBuf::from).into_iter().chain(bins).collect()
}

fn is_program(path: &Path) -> bool {
    path.metadata().is_ok_and(|file| file.is_file() && file.permissions().mode() & 0o111 != 0)
}

#[cfg(test)]
mod tests {
    use std::fs::{self, Permissions};
    use std::os::unix::fs::PermissionsExt;
    use std::path::PathBuf;

    use super::{INSTALL_NATS, OLDEST_NATS, major_minor, newest_enough};
    use crate::{Error, unique_name};

    /// Programs that say that they are of these versions, and what is found among them.
    fn found(versions: &[&str]) -> Result<PathBuf, Error> {
        let dir = std::env::temp_dir().join(unique_name());
        fs::create_dir(&dir).unwrap();
        let program = |version: &&str| {
            let path = dir.join(version);
            fs::write(&path, format!("#!/bin/sh\necho nats-server: v{version}\n")).unwrap();
            fs::set_permissions(&path, Permissions::from_mode(0o700)).unwrap();
            path
        };
        let programs: Vec<PathBuf> = versions.iter().map(program).collect();
        let found = newest_enough(programs.into_iter(), "nats-server", OLDEST_NATS, INSTALL_NATS);
        fs::remove_dir_all(&dir).unwrap();
        found
    }

    #[test]
    fn a_program_that_is_too_old_is_refused_by_name_or_passed_over() {
        assert!(found(&["2.9.10", "2.10.0", "2.11.0"]).unwrap().ends_with("2.10.0"));
        let error = found(&["2.9.10", "2.9.1"]).unwrap_err();
        assert!(matches!(&error, Error::TooOld { program, .. } if program.ends_with("/2.9.10")), "{error}");
        assert!(
            error.to_string().contains("nats-server: v2.9.10, and 2.10 or newer is needed: go install"),
            "{error}"
        );
    }

    #[test]
    fn a_program_that_is_not_there_is_named_with_how_to_get_it() {
        let error = found(&[]).unwrap_err().to_string();
        assert!(error.starts_with("nats-server is not installed: go install github.com/nats-io/"), "{error}");
    }

    #[test]
    fn versions_are_read_as_the_programs_write_them() {
        assert_eq!(major_minor("nats-server: v2.9.10\n"), Some([2, 9]));
        assert_eq!(major_minor("nats-server: v2.12.0-RC.1\n"), Some([2, 12]));
        assert_eq!(major_minor("Redis server v=7.0.15 sha=00000000:0 malloc=jemalloc"), Some([7, 0]));
        assert_eq!(major_minor("nothing of the kind"), None);
    }
}

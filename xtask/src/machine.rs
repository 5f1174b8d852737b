//! What the machine has to have, and how it gets there.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::Command;

use servers::program;

use crate::Error;
use crate::steps::Steps;

/// A program, or a library for one, that has to be there. (A C compiler is there: without its linker this program could not run.)
pub(crate) struct Program {
    name: &'static str,
    /// Whether one of this name is there.
    is_there: fn(&str) -> bool,
    /// The Debian package that has it.
    package: &'static str,
    why: &'static str,
}

fn on_path(name: &str) -> bool {
    program::find(name).is_some()
}

/// Both libraries have to be there for one and the same Python.
fn in_python(_library: &str) -> bool {
    program::python_with_grpc().is_some()
}

const GRPC: &str = "a client in another language, of protos of its own, asks the gRPC services";

/// What tests start.
pub(crate) const FOR_TESTS: &[Program] = &[
    Program {
        name: "curl",
        is_there: on_path,
        package: "curl",
        why: "the tests of the API drive it as its users do",
    },
    Program { name: "strace", is_there: on_path, package: "strace", why: "a test makes fdatasync fail" },
    Program {
        name: "mariadbd",
        is_there: on_path,
        package: "mariadb-server",
        why: "services of several processes keep their rows in it",
    },
    Program {
        name: "redis-server",
        is_there: on_path,
        package: "redis-server",
        why: "several processes share what they remember in it",
    },
    Program {
        name: "chromium",
        is_there: on_path,
        package: "chromium",
        why: "an event stream is read as a page in a browser reads it",
    },
    Program {
        name: "npm",
        is_there: on_path,
        package: "npm",
        why: "that page has a front end's library from there",
    },
    Program { name: "protoc", is_there: on_path, package: "protobuf-compiler", why: GRPC },
    Program { name: "grpc_python_plugin", is_there: on_path, package: "protobuf-compiler-grpc", why: GRPC },
    Program { name: "grpc for Python", is_there: in_python, package: "python3-grpcio", why: GRPC },
    Program { name: "protobuf for Python", is_there: in_python, package: "python3-protobuf", why: GRPC },
    Program {
        name: "faketime",
        is_there: on_path,
        package: "faketime",
        why: "a test sets the clocks of replicas back",
    },
];

/// What measurements start.
pub(crate) const FOR_MEASUREMENTS: &[Program] =
    &[Program { name: "wrk", is_there: on_path, package: "wrk", why: "it is the witness from outside" }];

/// A component of the Rust toolchain.
struct Component {
    name: &'static str,
    /// The program that it brings.
    program: &'static str,
}

const COMPONENTS: &[Component] = &[
    Component { name: "rustfmt", program: "cargo-fmt" },
    Component { name: "clippy", program: "cargo-clippy" },
];

/// Installs the Debian packages of the programs that are missing.
///
/// # Errors
/// If one is missing and cannot be installed here; the message tells how to do it by hand.
pub(crate) fn install_missing_programs(steps: &mut Steps, programs: &[Program]) -> Result<(), Error> {
    let missing: Vec<&Program> =
        programs.iter().filter(|program| !(program.is_there)(program.name)).collect();
    if missing.is_empty() {
        return Ok(());
    }
    for Program { name, package, why, .. } in &missing {
        println!("missing: {name} (Debian package {package}), because {why}");
    }
    let packages: Vec<&str> = missing.iter().map(|program| program.package).collect();
    let by_hand =
        format!("install the missing programs yourself (Debian: apt-get install {})", packages.join(" "));
    let Some(privileged) = privileged() else {
        return Err(format!("not root, and there is no sudo: {by_hand}").into());
    };
    if program::find("apt-get").is_none() {
        return Err(format!("this machine has no apt-get: {by_hand}").into());
    }
    let apt = |arguments: &[&str]| {
        let mut command = privileged();
        command.args(["DEBIAN_FRONTEND=noninteractive", "apt-get"]).args(arguments);
        command
    };
    let install = [&["install", "--yes", "--no-install-recommends"], &packages[..]].concat();
    steps
        .run("package lists", &mut apt(&["update"]))
        .and_then(|()| steps.run("packages", &mut apt(&install)))
        .map_err(|error| format!("{error}; {by_hand}").into())
}

/// Installs what the tests take from npm: the versions, with the checksums, of the lock file in `app/tests/outside/npm`. The scripts of
/// packages are not run.
///
/// # Errors
/// If npm fails; the message tells which command.
pub(crate) fn install_missing_npm_packages(steps: &mut Steps, root: &Path) -> Result<(), Error> {
    let (from, to) = (root.join("app/tests/outside/npm"), program::npm_dir());
    let lock = from.join("package-lock.json");
    // Written last, so that what was interrupted is done again.
    let installed = to.join("installed-lock.json");
    if fs::read(&installed).is_ok_and(|done| fs::read(&lock).is_ok_and(|wanted| wanted == done)) {
        return Ok(());
    }
    let copy = |from: &Path, to: &Path| {
        fs::copy(from, to).map(|_| ()).map_err(|error| format!("cannot copy {}: {error}", from.display()))
    };
    fs::create_dir_all(&to).map_err(|error| format!("cannot create {}: {error}", to.display()))?;
    for name in ["package.json", "package-lock.json"] {
        copy(&from.join(name), &to.join(name))?;
    }
    let npm = program::find("npm").ok_or("the tests need npm (Debian: apt-get install npm)")?;
    let mut install = Command::new(npm);
    install.args(["ci", "--ignore-scripts", "--no-audit", "--no-fund", "--prefix"]).arg(&to);
    steps.run("npm packages", &mut install)?;
    Ok(copy(&lock, &installed)?)
}

/// Installs a NATS server where there is none that is new enough. Debian's own is not, so Go builds one.
///
/// # Errors
/// If there is no Go, or it fails; the message tells how to do it by hand.
pub(crate) fn install_missing_nats(steps: &mut Steps) -> Result<(), Error> {
    let Err(why) = program::nats() else { return Ok(()) };
    println!("{why}");
    let Some(go) = program::find("go") else {
        return Err(
            format!("the tests need a NATS server, and there is no Go to build it with; {why}").into()
        );
    };
    let package = "github.com/nats-io/nats-server/v2@latest";
    steps.run("nats-server", Command::new(go).args(["install", package]))?;
    program::nats().map(|_| ()).map_err(|error| format!("it was installed, but is not found: {error}").into())
}

/// Starts commands as root: as who already is, or by a sudo that asks no question.
fn privileged() -> Option<fn() -> Command> {
    let root = Path::new("/proc/self").metadata().is_ok_and(|process| process.uid() == 0);
    if root {
        return Some(|| Command::new("env"));
    }
    program::find("sudo").is_some().then_some(|| {
        let mut command = Command::new("sudo");
        command.args(["--non-interactive", "env"]);
        command
    })
}

/// Adds the toolchain's components that are missing.
///
/// # Errors
/// If one is missing and there is no rustup, or rustup fails.
pub(crate) fn install_missing_components(steps: &mut Steps) -> Result<(), Error> {
    for Component { name, program } in COMPONENTS {
        // With rustup the program is always there, and says whether the component is.
        let there = Command::new(program).arg("--version").output().is_ok_and(|out| out.status.success());
        if there {
            continue;
        }
        if program::find("rustup").is_none() {
            return Err(
                format!("{program} is missing and there is no rustup: install the component {name}").into()
            );
        }
        steps.run(name, Command::new("rustup").args(["component", "add", name]))?;
    }
    Ok(())
}

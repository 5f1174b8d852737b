//! What the machine has to have, and how it gets there.

use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::Command;

use servers::program;

use crate::Error;
use crate::steps::Steps;

/// A program that has to be there. (A C compiler is there: without its linker this program could not run.)
pub(crate) struct Program {
    name: &'static str,
    /// The Debian package that has it.
    package: &'static str,
    why: &'static str,
}

/// What tests start.
pub(crate) const FOR_TESTS: &[Program] = &[
    Program { name: "curl", package: "curl", why: "the tests of the API drive it as its users do" },
    Program { name: "strace", package: "strace", why: "a test makes fdatasync fail" },
    Program {
        name: "mariadbd",
        package: "mariadb-server",
        why: "services of several processes keep their rows in it",
    },
    Program {
        name: "redis-server",
        package: "redis-server",
        why: "several processes share what they remember in it",
    },
    Program { name: "faketime", package: "faketime", why: "a test sets the clocks of replicas back" },
];

/// What measurements start.
pub(crate) const FOR_MEASUREMENTS: &[Program] =
    &[Program { name: "wrk", package: "wrk", why: "it is the witness from outside" }];

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
        programs.iter().filter(|program| program::find(program.name).is_none()).collect();
    if missing.is_empty() {
        return Ok(());
    }
    for Program { name, package, why } in &missing {
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

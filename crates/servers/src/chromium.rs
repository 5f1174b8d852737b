//! A browser.

use std::ffi::OsString;

use crate::process::Process;
use crate::{Error, program};

/// A Chromium without a window that shows one page. It is killed, and its profile removed, when this is dropped.
#[derive(Debug)]
pub struct Chromium {
    process: Process,
}

/// It is given nothing of the user's, and asks nobody but this machine.
const SETTINGS: &[&str] = &[
    "--headless=new",
    // Its sandbox wants privileges that root in a container does not have; it is shown the test's own pages only.
    "--no-sandbox",
    "--disable-gpu",
    // The system's shared memory may be small, in a container.
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-breakpad",
    "--disable-sync",
    "--disable-background-networking",
    "--disable-component-update",
    "--password-store=basic",
    "--no-proxy-server",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
];

impl Chromium {
    /// Opens a page. Whether it is there, the page has to say itself.
    ///
    /// # Errors
    /// [`Error::Missing`]; others when it does not start.
    pub fn open(url: &str) -> Result<Chromium, Error> {
        let mut process = Process::new("Chromium", &program::chromium()?)?;
        let dir = process.dir().to_owned();
        let mut profile = OsString::from("--user-data-dir=");
        profile.push(dir.join("profile"));
        process.set_variables([("HOME", &dir), ("TMPDIR", &dir)]);
        let settings = SETTINGS.iter().map(OsString::from);
        process.set_args(std::iter::once(profile).chain(settings).chain([url.into()]));
        process.spawn()?;
        Ok(Chromium { process })
    }

    /// Its process id, while it runs; its children are of its process group.
    pub fn pid(&self) -> Option<u32> {
        self.process.pid()
    }

    /// Whether its process is there.
    pub fn is_running(&self) -> bool {
        self.process.is_running()
    }

    /// The end of its log.
    pub fn log(&self) -> String {
        self.process.log_end()
    }
}

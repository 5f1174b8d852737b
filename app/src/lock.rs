//! The data directory belongs to one process at a time.
//!
//! The lock is the kernel's, on the open file `lock`: it ends with the process, however that ends, and the
//! file itself means nothing. What never happens: two processes write one directory's databases; a directory
//! that this process made can be read by another user.

use std::fs::{DirBuilder, File, OpenOptions, TryLockError};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

/// The file that is locked. It holds its owner's process id, for the message to who comes second.
const FILE: &str = "lock";

/// Why the directory is not this process's.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    /// Another process has it.
    #[error(
        "the data directory {} is in use by {}; stop that process, or choose another directory with --data-dir",
        dir.display(), owner(pid.as_deref())
    )]
    InUse {
        /// The directory.
        dir: PathBuf,
        /// The other process's id, unless it has not written it yet.
        pid: Option<String>,
    },
    /// It cannot be made or written.
    #[error("cannot use {} as the data directory: {cause}", dir.display())]
    Unusable {
        /// The directory.
        dir: PathBuf,
        /// Why.
        #[source]
        cause: io::Error,
    },
}

fn owner(pid: Option<&str>) -> String {
    pid.map_or_else(|| "another process".to_owned(), |pid| format!("process {pid}"))
}

/// The right to the data directory, for as long as the value lives.
#[derive(Debug)]
pub(crate) struct DataDir {
    path: PathBuf,
    _locked: File,
}

impl DataDir {
    /// Makes the directory if it is not there (mode 0700) and locks it.
    ///
    /// # Errors
    /// [`Error::InUse`] if another process has it, [`Error::Unusable`] if the file system refuses.
    pub(crate) fn acquire(dir: &Path) -> Result<DataDir, Error> {
        let unusable = |cause| Error::Unusable { dir: dir.to_owned(), cause };
        DirBuilder::new().recursive(true).mode(0o700).create(dir).map_err(unusable)?;
        let path = dir.canonicalize().map_err(unusable)?;
        let mut file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(path.join(FILE))
            .map_err(unusable)?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                return Err(Error::InUse { dir: path, pid: read_pid(&mut file) });
            }
            Err(TryLockError::Error(cause)) => return Err(unusable(cause)),
        }
        file.set_len(0).and_then(|()| writeln!(file, "{}", std::process::id())).map_err(unusable)?;
        Ok(DataDir { path, _locked: file })
    }

    /// The directory, absolute and without symbolic links.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }
}

fn read_pid(file: &mut File) -> Option<String> {
    let mut text = String::new();
    file.read_to_string(&mut text).ok()?;
    let pid: u32 = text.trim().parse().ok()?;
    Some(pid.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    fn fresh(name: &str) -> PathBuf {
        let dir = std::env::temp_dir().join(format!("saga-lock-{}-{name}", std::process::id()));
        let _ = std::fs::remove_dir_all(&dir);
        dir
    }

    #[test]
    fn the_second_is_told_who_was_first_and_gets_it_afterwards() {
        let dir = fresh("second").join("inner");
        let first = DataDir::acquire(&dir).unwrap();
        // The lock belongs to the open file, so a second attempt from this process fails as another's would.
        let message = DataDir::acquire(&dir).unwrap_err().to_string();
        let pid = std::process::id();
        assert!(message.contains(&format!("in use by process {pid};")), "{message}");
        assert!(message.contains(&first.path().display().to_string()), "{message}");
        drop(first);
        DataDir::acquire(&dir).unwrap();
        std::fs::remove_dir_all(dir.parent().unwrap()).unwrap();
    }

    #[test]
    fn what_it_makes_is_closed_to_other_users() {
        let dir = fresh("mode");
        let _held = DataDir::acquire(&dir).unwrap();
        let mode = |path: &Path| path.metadata().unwrap().permissions().mode() & 0o777;
        assert_eq!(mode(&dir), 0o700);
        assert_eq!(mode(&dir.join(FILE)), 0o600);
        std::fs::remove_dir_all(dir).unwrap();
    }

    #[test]
    fn a_file_in_the_way_is_told() {
        let dir = fresh("file");
        std::fs::write(&dir, "").unwrap();
        let message = DataDir::acquire(&dir).unwrap_err().to_string();
        assert!(message.starts_with(&format!("cannot use {} as", dir.display())), "{message}");
        std::fs::remove_file(dir).unwrap();
    }
}

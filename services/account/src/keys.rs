//! The keys that sign access tokens: Ed25519 private keys, one a file, in a folder of their own.
//!
//! The first is made at the first start. The newest, by the time in its name, signs; the older ones still
//! verify what they signed, until their files are taken away. So a rotation is: add a key, restart, wait for
//! the access tokens' life, delete the old file.
//!
//! What never happens: a key file that others than its owner may read is used; a key file is there in part
//! (it is written beside, synced, and renamed); a key is made while there is one.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use aws_lc_rs::encoding::AsDer;
use aws_lc_rs::signature::{Ed25519KeyPair, KeyPair};
use serve::auth::{KeySet, PublicKey};
use serve::random::Random;
use wire::time::Clock;

/// Key files are PKCS#8, DER (RFC 8410).
const EXTENSION: &str = "pk8";

/// More keys than a rotation can need: a folder with more is not ours.
const MAX_KEYS: usize = 16;

/// A PKCS#8 Ed25519 key takes 85 bytes at most.
const MAX_KEY_FILE_BYTES: u64 = 1024;

/// Permissions of the group and of others.
const NOT_THE_OWNER: u32 = 0o077;

/// Why there are no signing keys.
#[derive(Debug, thiserror::Error)]
pub enum KeyError {
    /// A file or the folder could not be read or written.
    #[error("cannot {action} {}: {source}", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// Where.
        path: PathBuf,
        /// What the system says.
        source: io::Error,
    },
    /// Others may read a private key.
    #[error(
        "{} has mode {mode:04o}, so others than its owner may use this private key. If nobody had access to it, \
         run `chmod 600` on it; otherwise delete it, and a new key is made", path.display()
    )]
    Mode {
        /// The key's file.
        path: PathBuf,
        /// Its permissions.
        mode: u32,
    },
    /// A file is no key.
    #[error("{} is not an Ed25519 private key in PKCS#8 DER; restore it, or move it away", path.display())]
    NotAKey {
        /// The file.
        path: PathBuf,
    },
    /// More files than keys can be.
    #[error("{} has more than {MAX_KEYS} keys; delete those that no unexpired token is signed with", path.display())]
    TooMany {
        /// The folder.
        path: PathBuf,
    },
}

/// A key that can sign.
pub(crate) struct SigningKey {
    pkcs8: Vec<u8>,
    public: PublicKey,
}

impl SigningKey {
    /// The private key, as PKCS#8 DER.
    pub(crate) fn pkcs8(&self) -> &[u8] {
        &self.pkcs8
    }

    /// Its public half.
    pub(crate) fn public(&self) -> &PublicKey {
        &self.public
    }

    fn parse(pkcs8: Vec<u8>) -> Option<SigningKey> {
        let pair = Ed25519KeyPair::from_pkcs8(&pkcs8).ok()?;
        let public = PublicKey::new(pair.public_key().as_ref().try_into().ok()?);
        Some(SigningKey { pkcs8, public })
    }
}

impl std::fmt::Debug for SigningKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "SigningKey({})", self.public.kid())
    }
}

/// All keys, the newest last; never empty.
#[derive(Debug)]
pub(crate) struct SigningKeys(Vec<SigningKey>);

impl SigningKeys {
    /// The key to sign with.
    pub(crate) fn newest(&self) -> &SigningKey {
        self.0.last().expect("a set of signing keys is never empty")
    }

    /// The public halves of all keys.
    pub(crate) fn public_keys(&self) -> KeySet {
        KeySet::new(self.0.iter().map(|key| key.public.clone()))
    }
}

/// Reads the folder's keys; makes the folder and a first key where there is none.
pub(crate) fn load_or_create(dir: &Path, clock: &Clock, random: &Random) -> Result<SigningKeys, KeyError> {
    let keys = if dir.exists() { load(dir)? } else { Vec::new() };
    if !keys.is_empty() {
        return Ok(SigningKeys(keys));
    }
    add_key(dir, clock, random)?;
    load(dir).map(SigningKeys)
}

/// Adds a key to the folder; the next start signs with it and still verifies with the older ones.
///
/// # Errors
/// See [`KeyError`].
pub fn rotate_keys(dir: &Path, clock: &Clock, random: &Random) -> Result<(), KeyError> {
    add_key(dir, clock, random)
}

fn load(dir: &Path) -> Result<Vec<SigningKey>, KeyError> {
    let read = failed("read", dir);
    let mut paths = Vec::new();
    for entry in fs::read_dir(dir).map_err(&read)? {
        let path = entry.map_err(&read)?.path();
        if path.extension().is_some_and(|extension| extension == EXTENSION) {
            paths.push(path);
        }
    }
    if paths.len() > MAX_KEYS {
        return Err(KeyError::TooMany { path: dir.to_owned() });
    }
    paths.sort();
    paths.iter().map(|path| load_key(path)).collect()
}

fn load_key(path: &Path) -> Result<SigningKey, KeyError> {
    let not_a_key = || KeyError::NotAKey { path: path.to_owned() };
    let read = failed("read", path);
    let metadata = fs::metadata(path).map_err(&read)?;
    let mode = metadata.permissions().mode() & 0o7777;
    if mode & NOT_THE_OWNER != 0 {
        return Err(KeyError::Mode { path: path.to_owned(), mode });
    }
    if !metadata.is_file() || metadata.len() > MAX_KEY_FILE_BYTES {
        return Err(not_a_key());
    }
    SigningKey::parse(fs::read(path).map_err(&read)?).ok_or_else(not_a_key)
}

fn add_key(dir: &Path, clock: &Clock, random: &Random) -> Result<(), KeyError> {
    DirBuilder::new().recursive(true).mode(0o700).create(dir).map_err(failed("create", dir))?;
    let pkcs8 = generate(random);
    // The time first, in a fixed width, so that the names sort by age.
    let key = SigningKey::parse(pkcs8).expect("a key that was just made can be read");
    let name = format!("{:015}-{}.{EXTENSION}", clock.now(), key.public.kid());
    write_atomically(dir, &name, &key.pkcs8)
}

fn generate(random: &Random) -> Vec<u8> {
    let pair = Ed25519KeyPair::from_seed_unchecked(&random.bytes::<32>());
    let pkcs8 = pair.ok().and_then(|pair| {
        let der: aws_lc_rs::encoding::Pkcs8V2Der<'_> = pair.as_der().ok()?;
        Some(der.as_ref().to_vec())
    });
    pkcs8.expect("any 32 bytes are the seed of an Ed25519 key")
}

/// The file appears under its name complete, durable, and with mode 0600 from its first byte on.
fn write_atomically(dir: &Path, name: &str, bytes: &[u8]) -> Result<(), KeyError> {
    let unfinished = dir.join(format!(".{name}.tmp"));
    let write = || -> io::Result<()> {
        let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&unfinished)?;
        file.write_all(bytes)?;
        file.sync_all()
    };
    write().map_err(failed("write", &unfinished))?;
    let path = dir.join(name);
    fs::rename(&unfinished, &path).map_err(failed("create", &path))?;
    File::open(dir).and_then(|dir| dir.sync_all()).map_err(failed("sync", dir))
}

fn failed<'a>(action: &'static str, path: &'a Path) -> impl Fn(io::Error) -> KeyError + use<'a> {
    move |source| KeyError::Io { action, path: path.to_owned(), source }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicU64, Ordering};

    /// A folder of its own that goes with the test.
    struct Folder(PathBuf);

    impl Folder {
        fn new(name: &str) -> Folder {
            static NEXT: AtomicU64 = AtomicU64::new(0);
            let unique = format!("{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
            Folder(std::env::temp_dir().join(format!("sagaline-keys-{name}-{unique}")))
        }

        fn files(&self) -> Vec<PathBuf> {
            let mut files: Vec<_> = fs::read_dir(&self.0).unwrap().map(|e| e.unwrap().path()).collect();
            files.sort();
            files
        }
    }

    impl Drop for Folder {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    fn at(millis: u64) -> Clock {
        Clock::from_fn(move || millis)
    }

    #[test]
    fn the_first_start_makes_a_private_file_and_the_second_reads_it() {
        let folder = Folder::new("first");
        let first = load_or_create(&folder.0, &at(5), &Random::secure()).unwrap();
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o7777;
        assert_eq!(folder.files().len(), 1);
        assert_eq!(mode(&folder.files()[0]), 0o600);
        assert_eq!(mode(&folder.0), 0o700);
        let second = load_or_create(&folder.0, &at(9), &Random::secure()).unwrap();
        assert_eq!(second.public_keys(), first.public_keys());
        assert_eq!(folder.files().len(), 1);
    }

    #[test]
    fn a_rotation_signs_with_the_newest_and_keeps_the_old_for_verification() {
        let folder = Folder::new("rotation");
        let first = load_or_create(&folder.0, &at(9), &Random::secure()).unwrap();
        rotate_keys(&folder.0, &at(10), &Random::secure()).unwrap();
        let both = load_or_create(&folder.0, &at(11), &Random::secure()).unwrap();
        assert_eq!(both.public_keys().keys().len(), 2);
        assert_eq!(both.public_keys().keys()[0], *first.newest().public());
        assert_ne!(both.newest().public(), first.newest().public());
    }

    #[test]
    fn a_key_that_others_may_read_is_refused_with_what_to_do() {
        let folder = Folder::new("mode");
        load_or_create(&folder.0, &at(5), &Random::secure()).unwrap();
        fs::set_permissions(&folder.files()[0], fs::Permissions::from_mode(0o640)).unwrap();
        let error = load_or_create(&folder.0, &at(5), &Random::secure()).unwrap_err();
        assert!(matches!(error, KeyError::Mode { mode: 0o640, .. }), "{error}");
        assert!(error.to_string().contains("0640") && error.to_string().contains("chmod 600"), "{error}");
    }

    #[test]
    fn a_damaged_key_is_refused_and_no_other_takes_its_place() {
        let folder = Folder::new("damaged");
        load_or_create(&folder.0, &at(5), &Random::secure()).unwrap();
        fs::write(&folder.files()[0], b"half a k").unwrap();
        let error = load_or_create(&folder.0, &at(5), &Random::secure()).unwrap_err();
        assert!(matches!(error, KeyError::NotAKey { .. }), "{error}");
        assert_eq!(folder.files().len(), 1);
    }

    #[test]
    fn a_file_left_half_written_by_a_crash_is_no_key() {
        let folder = Folder::new("crash");
        load_or_create(&folder.0, &at(5), &Random::secure()).unwrap();
        fs::write(folder.0.join(".000000000000009-x.pk8.tmp"), b"half").unwrap();
        assert!(load_or_create(&folder.0, &at(5), &Random::secure()).is_ok());
    }
}

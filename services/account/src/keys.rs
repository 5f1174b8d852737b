//! The keys that sign access tokens: Ed25519 private keys, one a file, in a folder that all replicas of the service share.
//!
//! The first is made at the first start; of replicas that start at once one makes it, under a lock on the folder, and the others find
//! it. Each replica reads the folder again every [`REREAD`], so a rotation needs no restart: add a key ([`rotate_keys`], or a new file in
//! the mounted secret), wait for [`PUBLISHED_FIRST`] and the access tokens' life, take the old file away.
//!
//! Why nobody is turned away meanwhile. A key is published as soon as it is read, and signs only when it is [`PUBLISHED_FIRST`] old by
//! the time in its name. Until then every replica has read it (a mounted secret reaches all machines within two minutes), and every
//! verifier elsewhere has fetched it ([`serve::keys::REFRESH`]), even if clocks are a minute apart. The old key verifies what it signed
//! until its file goes. Should a verifier meet a key that it does not know all the same, it asks all replicas for it at once, the
//! signer among them. A key that is alone signs at once: the first one, or one that takes the place of a key that was stolen.
//!
//! A key that is withdrawn, by deleting its file, is used by no replica after [`REREAD`]. Elsewhere its tokens, remembered or not, count
//! for [`serve::keys::REFRESH`] more at most, or until the next successful fetch where there is none.
//!
//! A mounted secret belongs to somebody else, who lets a group of ours read it: that is the one case in which anybody but the owner may
//! read a key.
//!
//! What never happens: a key file is used that others may read, or that anybody but its owner may change; a key file is
//! there in part (it is written beside, synced, and renamed); a first key is made while there is one; a folder that cannot be read, or is
//! empty, takes away the keys that are known.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use aws_lc_rs::encoding::AsDer;
use aws_lc_rs::signature::{Ed25519KeyPair, KeyPair};
use serve::auth::{KeySet, PublicKey};
use serve::random::Random;
use wire::time::{Clock, UnixMillis};

/// Key files are PKCS#8, DER (RFC 8410).
const EXTENSION: &str = "pk8";

/// More keys than a rotation can need: a folder with more is not ours.
const MAX_KEYS: usize = 16;

/// A PKCS#8 Ed25519 key takes 85 bytes at most.
const MAX_KEY_FILE_BYTES: u64 = 1024;

/// Permissions of the group and of others.
const NOT_THE_OWNER: u32 = 0o077;

/// The group may read.
const GROUP_READS: u32 = 0o040;

/// Held while the first key is made.
const LOCK_FILE: &str = ".lock";

/// How often the folder is read again.
pub(crate) const REREAD: Duration = Duration::from_secs(5);

/// How old a key is before it signs, if there is an older one.
pub const PUBLISHED_FIRST: Duration = Duration::from_secs(5 * 60);

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
         run `chmod 600` on it (a secret that is mounted for our group: mode 0440); otherwise delete it, and a new \
         key is made", path.display()
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
    /// By its name; 0 if that tells no time.
    made_at: UnixMillis,
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

    /// When it was made.
    pub(crate) fn made_at(&self) -> UnixMillis {
        self.made_at
    }

    fn parse(made_at: UnixMillis, pkcs8: Vec<u8>) -> Option<SigningKey> {
        let pair = Ed25519KeyPair::from_pkcs8(&pkcs8).ok()?;
        let public = PublicKey::new(pair.public_key().as_ref().try_into().ok()?);
        Some(SigningKey { made_at, pkcs8, public })
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
    /// All of them, the newest last.
    pub(crate) fn keys(&self) -> &[SigningKey] {
        &self.0
    }

    /// The public halves of all keys.
    pub(crate) fn public_keys(&self) -> KeySet {
        KeySet::new(self.0.iter().map(|key| key.public.clone()))
    }
}

/// The place of the key that signs at this time, among keys that were made at these: the newest that everybody knows by now, or else
/// the oldest, which is the best known.
pub(crate) fn signs(
    made_at: impl ExactSizeIterator<Item = UnixMillis> + DoubleEndedIterator,
    now: UnixMillis,
) -> usize {
    let first = u64::try_from(PUBLISHED_FIRST.as_millis()).unwrap_or(u64::MAX);
    made_at
        .enumerate()
        .rev()
        .find(|(_, made_at)| made_at.saturating_add(first) <= now)
        .map_or(0, |(place, _)| place)
}

/// Reads the folder's keys; makes the folder and a first key where there is none.
pub(crate) fn load_or_create(dir: &Path, clock: &Clock, random: &Random) -> Result<SigningKeys, KeyError> {
    if let Some(keys) = load_existing(dir)? {
        return Ok(keys);
    }
    create_dir(dir)?;
    let path = dir.join(LOCK_FILE);
    let lock = OpenOptions::new().write(true).create(true).truncate(false).mode(0o600).open(&path);
    let lock = lock.map_err(failed("create", &path))?;
    // Held for as long as it takes to write a file; the system takes it from one who dies.
    lock.lock().map_err(failed("lock", &path))?;
    if let Some(keys) = load_existing(dir)? {
        return Ok(keys);
    }
    add_key(dir, clock, random)?;
    load(dir).map(SigningKeys)
}

/// Reads the folder's keys. None when there is none.
pub(crate) fn load_existing(dir: &Path) -> Result<Option<SigningKeys>, KeyError> {
    let keys = if dir.exists() { load(dir)? } else { Vec::new() };
    Ok((!keys.is_empty()).then_some(SigningKeys(keys)))
}

/// Adds a key to the folder. All replicas publish it within seconds and sign with it once it is [`PUBLISHED_FIRST`] old; the older ones
/// verify until their files are deleted.
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
    if !is_private(mode, metadata.uid(), own_uid()) {
        return Err(KeyError::Mode { path: path.to_owned(), mode });
    }
    if !metadata.is_file() || metadata.len() > MAX_KEY_FILE_BYTES {
        return Err(not_a_key());
    }
    SigningKey::parse(made_at(path), fs::read(path).map_err(&read)?).ok_or_else(not_a_key)
}

/// Whether a key with this mode and owner is nobody else's, if we are `us`.
fn is_private(mode: u32, owner: u32, us: Option<u32>) -> bool {
    match mode & NOT_THE_OWNER {
        0 => true,
        GROUP_READS => us.is_some_and(|us| us != owner),
        _ => false,
    }
}

/// Whom this process runs as, where the system tells.
fn own_uid() -> Option<u32> {
    fs::metadata("/proc/self").ok().map(|process| process.uid())
}

/// The time in a file's name, which comes first.
fn made_at(path: &Path) -> UnixMillis {
    let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    name.split_once('-').and_then(|(time, _)| time.parse().ok()).unwrap_or(0)
}

fn create_dir(dir: &Path) -> Result<(), KeyError> {
    DirBuilder::new().recursive(true).mode(0o700).create(dir).map_err(failed("create", dir))
}

fn add_key(dir: &Path, clock: &Clock, random: &Random) -> Result<(), KeyError> {
    create_dir(dir)?;
    let (now, pkcs8) = (clock.now(), generate(random));
    let key = SigningKey::parse(now, pkcs8).expect("a key that was just made can be read");
    // The time first, in a fixed width, so that the names sort by age.
    let name = format!("{now:015}-{}.{EXTENSION}", key.public.kid());
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
            let paths = fs::read_dir(&self.0).unwrap().map(|entry| entry.unwrap().path());
            let mut files: Vec<_> = paths.filter(|path| !path.ends_with(LOCK_FILE)).collect();
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
    fn of_many_that_start_at_once_one_makes_the_key() {
        let folder = Folder::new("race");
        let made = std::thread::scope(|scope| {
            let start =
                |_| scope.spawn(|| load_or_create(&folder.0, &Clock::system(), &Random::secure()).unwrap());
            let started: Vec<_> = (0..8).map(start).collect();
            started.into_iter().map(|one| one.join().unwrap().public_keys()).collect::<Vec<_>>()
        });
        assert_eq!(folder.files().len(), 1);
        assert!(made.iter().all(|keys| *keys == made[0] && keys.keys().len() == 1));
    }

    #[test]
    fn a_new_key_is_published_at_once_and_signs_once_everybody_knows_it() {
        let folder = Folder::new("rotation");
        let first = load_or_create(&folder.0, &at(9), &Random::secure()).unwrap();
        rotate_keys(&folder.0, &at(1_000), &Random::secure()).unwrap();
        let both = load_or_create(&folder.0, &at(1_001), &Random::secure()).unwrap();
        assert_eq!(both.public_keys().keys().len(), 2);
        assert_eq!(both.public_keys().keys()[0], *first.keys()[0].public());
        assert_eq!(both.keys().iter().map(SigningKey::made_at).collect::<Vec<_>>(), [9, 1_000]);
    }

    #[test]
    fn which_key_signs() {
        let known = u64::try_from(PUBLISHED_FIRST.as_millis()).unwrap();
        let signs = |made_at: &[u64], now| signs(made_at.iter().copied(), now);
        assert_eq!(signs(&[5], 5), 0, "one that is alone signs at once");
        assert_eq!(signs(&[5, 1_000], 1_000 + known - 1), 0);
        assert_eq!(signs(&[5, 1_000], 1_000 + known), 1);
        assert_eq!(signs(&[5, 1_000, 2_000], 2_000), 0);
        assert_eq!(signs(&[5, 1_000, 2_000], 1_000 + known), 1);
        assert_eq!(signs(&[0, 0, u64::MAX], known), 1, "a name that tells no time is as good as old");
    }

    #[test]
    fn who_may_read_a_key() {
        let (us, root) = (Some(1000), 0);
        for mode in [0o600, 0o400, 0o700] {
            assert!(is_private(mode, 1000, us) && is_private(mode, root, us) && is_private(mode, root, None));
        }
        // A secret that is mounted for our group.
        assert!(is_private(0o440, root, us) && is_private(0o640, root, us));
        // A file of our own that our group may read, and a system that does not tell who we are.
        assert!(
            !is_private(0o440, 1000, us) && !is_private(0o640, 1000, us) && !is_private(0o440, root, None)
        );
        for mode in [0o460, 0o660, 0o450, 0o444, 0o604, 0o602, 0o601, 0o620, 0o610] {
            assert!(!is_private(mode, root, us) && !is_private(mode, 1000, us), "{mode:o}");
        }
    }

    #[test]
    fn a_file_of_ours_tells_who_we_are() {
        let folder = Folder::new("owner");
        load_or_create(&folder.0, &at(5), &Random::secure()).unwrap();
        assert_eq!(own_uid(), Some(fs::metadata(&folder.files()[0]).unwrap().uid()));
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

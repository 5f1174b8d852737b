//! Password hashing: Argon2id (RFC 9106), with the parameters that OWASP's cheat sheet gives first for it.
//!
//! A hash takes tens of milliseconds of a processor and 19 MiB on purpose, which makes it the cheapest thing
//! to attack. So it runs on blocking threads, as many at once as the settings allow; a bounded number waits;
//! the rest is refused at once. What never happens: a hash on a thread that serves others; a place given back
//! while its hash still runs, because its client has gone; a quick answer for an unknown customer.

use std::sync::Arc;

use argon2::password_hash::phc::PasswordHash;
use argon2::password_hash::{PasswordHasher, PasswordVerifier};
use argon2::{Algorithm, Argon2, Params, Version};
use serde::{Deserialize, Serialize};
use serve::ApiError;
use serve::random::Random;
use tokio::sync::Semaphore;

use crate::model::Password;

/// Memory of one hash.
const MEMORY_KIB: u32 = 19 * 1024;
/// Passes over it.
const PASSES: u32 = 2;
/// Lanes.
const PARALLELISM: u32 = 1;
const SALT_BYTES: usize = 16;

/// When to come back after a refusal.
const RETRY_AFTER_SECONDS: u32 = 2;

/// The bounds of hashing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct PasswordLimits {
    /// Hashes at once; 0 means as many as there are processors. Each takes 19 MiB.
    pub max_running_hashes: usize,
    /// Hashes that may wait for their turn.
    pub max_waiting_hashes: usize,
}

impl Default for PasswordLimits {
    fn default() -> PasswordLimits {
        PasswordLimits { max_running_hashes: 0, max_waiting_hashes: 128 }
    }
}

/// Why there is no hash.
#[derive(Debug, thiserror::Error)]
pub(crate) enum PasswordError {
    /// As many as may wait are waiting.
    #[error("too many logins at once, try again")]
    Busy,
    /// The hash function failed or the stored hash is damaged.
    #[error("password hash: {0}")]
    Hash(argon2::password_hash::Error),
    /// The hashing thread panicked or the runtime is shutting down.
    #[error("password hash: {0}")]
    Thread(tokio::task::JoinError),
}

impl From<PasswordError> for ApiError {
    fn from(error: PasswordError) -> ApiError {
        match error {
            PasswordError::Busy => {
                ApiError::unavailable("too many logins at once, try again", RETRY_AFTER_SECONDS)
            }
            other => ApiError::internal(other),
        }
    }
}

/// Hashes passwords and verifies them.
pub(crate) struct Passwords {
    /// Everybody who runs or waits.
    line: Arc<Semaphore>,
    /// Those who run.
    running: Arc<Semaphore>,
    argon2: Argon2<'static>,
    random: Random,
    /// What the password of an unknown customer is compared with.
    nobody: Arc<str>,
}

impl Passwords {
    /// Takes the time of one hash, to make the one that belongs to nobody.
    pub(crate) fn new(limits: &PasswordLimits, random: Random) -> Passwords {
        let running = match limits.max_running_hashes {
            0 => std::thread::available_parallelism().map_or(1, std::num::NonZero::get),
            given => given.min(Semaphore::MAX_PERMITS),
        };
        let line = running.saturating_add(limits.max_waiting_hashes).min(Semaphore::MAX_PERMITS);
        let params =
            Params::new(MEMORY_KIB, PASSES, PARALLELISM, None).expect("these parameters are in range");
        let argon2 = Argon2::new(Algorithm::Argon2id, Version::V0x13, params);
        let nobody = hash(&argon2, &random.bytes::<32>(), &random.bytes())
            .expect("a hash of 32 bytes with a salt of 16 can be made");
        Passwords {
            line: Arc::new(Semaphore::new(line)),
            running: Arc::new(Semaphore::new(running)),
            argon2,
            random,
            nobody: nobody.into(),
        }
    }

    /// The hash to store, in PHC string format with its salt.
    pub(crate) async fn hash(&self, password: Password) -> Result<String, PasswordError> {
        let (argon2, salt) = (self.argon2.clone(), self.random.bytes());
        self.in_turn(move || hash(&argon2, password.expose(), &salt)).await
    }

    /// Whether the password is the one that was hashed. Without a hash the answer is false, after the same
    /// work.
    pub(crate) async fn verify(
        &self,
        password: Password,
        stored: Option<String>,
    ) -> Result<bool, PasswordError> {
        let (argon2, nobody) = (self.argon2.clone(), self.nobody.clone());
        self.in_turn(move || {
            let matches = verify(&argon2, password.expose(), stored.as_deref().unwrap_or(&nobody))?;
            Ok(matches && stored.is_some())
        })
        .await
    }

    /// Runs the work when its turn comes. Its places go with it onto the thread: there they are held to its
    /// end, even if nobody waits for it any more.
    async fn in_turn<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> argon2::password_hash::Result<T> + Send + 'static,
    ) -> Result<T, PasswordError> {
        let in_line = self.line.clone().try_acquire_owned().map_err(|_| PasswordError::Busy)?;
        let turn = self.running.clone().acquire_owned().await.map_err(|_| PasswordError::Busy)?;
        let done = tokio::task::spawn_blocking(move || {
            let result = work();
            drop((turn, in_line));
            result
        });
        done.await.map_err(PasswordError::Thread)?.map_err(PasswordError::Hash)
    }
}

fn hash(
    argon2: &Argon2<'_>,
    password: &[u8],
    salt: &[u8; SALT_BYTES],
) -> argon2::password_hash::Result<String> {
    Ok(argon2.hash_password_with_salt(password, salt)?.to_string())
}

fn verify(argon2: &Argon2<'_>, password: &[u8], stored: &str) -> argon2::password_hash::Result<bool> {
    match argon2.verify_password(password, &PasswordHash::new(stored)?) {
        Ok(()) => Ok(true),
        Err(argon2::password_hash::Error::PasswordInvalid) => Ok(false),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn password(text: &str) -> Password {
        Password::parse(text.to_owned()).unwrap()
    }

    #[tokio::test]
    async fn a_password_is_verified_by_its_hash_and_nobody_has_one() {
        let passwords = Passwords::new(&PasswordLimits::default(), Random::secure());
        let stored = passwords.hash(password("abcd5432")).await.unwrap();
        assert!(stored.starts_with("$argon2id$v=19$m=19456,t=2,p=1$"), "{stored}");
        assert!(passwords.verify(password("abcd5432"), Some(stored.clone())).await.unwrap());
        assert!(!passwords.verify(password("abcd5433"), Some(stored.clone())).await.unwrap());
        assert!(!passwords.verify(password("abcd5432"), None).await.unwrap());
        assert_ne!(passwords.hash(password("abcd5432")).await.unwrap(), stored);
    }

    #[tokio::test]
    async fn even_the_password_of_nobody_is_wrong_for_nobody() {
        let predictable = Random::from_fn(|bytes| bytes.fill(b'x'));
        let passwords = Passwords::new(&PasswordLimits::default(), predictable);
        let nobody = passwords.nobody.to_string();
        assert!(passwords.verify(password(&"x".repeat(32)), Some(nobody)).await.unwrap());
        assert!(!passwords.verify(password(&"x".repeat(32)), None).await.unwrap());
    }

    #[tokio::test]
    async fn an_unknown_customer_costs_the_same_hash() {
        let mut passwords = Passwords::new(&PasswordLimits::default(), Random::secure());
        let stored = passwords.hash(password("abcd5432")).await.unwrap();
        let parameters = |hash: &str| hash.split('$').take(4).map(str::to_owned).collect::<Vec<_>>();
        assert_eq!(parameters(&passwords.nobody), parameters(&stored));
        passwords.nobody = "damaged".into();
        let read = passwords.verify(password("abcd5432"), None).await;
        assert!(
            matches!(read, Err(PasswordError::Hash(_))),
            "the hash of nobody was not looked at: {read:?}"
        );
    }

    #[tokio::test]
    async fn who_finds_the_line_full_is_refused_at_once_and_an_abandoned_hash_keeps_its_place() {
        let limits = PasswordLimits { max_running_hashes: 1, max_waiting_hashes: 1 };
        let passwords = Arc::new(Passwords::new(&limits, Random::secure()));
        let (entered, seen) = tokio::sync::oneshot::channel();
        let (release, wait) = std::sync::mpsc::channel::<()>();
        let first = tokio::spawn({
            let passwords = passwords.clone();
            async move {
                let held = passwords.in_turn(move || {
                    entered.send(()).unwrap();
                    wait.recv().unwrap();
                    Ok(())
                });
                held.await
            }
        });
        seen.await.unwrap();
        // Its client goes away; the thread still works.
        first.abort();
        assert!(first.await.unwrap_err().is_cancelled());

        let mut second = Box::pin(passwords.hash(password("abcd5432")));
        assert!(futures_util::poll!(second.as_mut()).is_pending());
        let third = passwords.hash(password("abcd5432")).await;
        assert!(matches!(third, Err(PasswordError::Busy)));
        release.send(()).unwrap();
        assert!(second.await.is_ok());
    }
}

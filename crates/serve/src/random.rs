//! Randomness as a parameter: logic that depends on it takes a [`Random`], so that a test can fix it.

use std::fmt;
use std::sync::Arc;

/// A source of random bytes. Cloning is cheap.
#[derive(Clone)]
pub struct Random(Arc<Fill>);

type Fill = dyn Fn(&mut [u8]) + Send + Sync;

impl Random {
    /// The operating system's cryptographically secure source, by way of AWS-LC's generator.
    ///
    /// # Panics
    /// Its use panics when the source fails: no secret may be made from bytes that are not random.
    pub fn secure() -> Random {
        Random::from_fn(|bytes| aws_lc_rs::rand::fill(bytes).expect("the system's random source works"))
    }

    /// A source that a test drives.
    pub fn from_fn(fill: impl Fn(&mut [u8]) + Send + Sync + 'static) -> Random {
        Random(Arc::new(fill))
    }

    /// Overwrites `bytes` with random ones.
    pub fn fill(&self, bytes: &mut [u8]) {
        (self.0)(bytes);
    }

    /// `N` random bytes.
    pub fn bytes<const N: usize>(&self) -> [u8; N] {
        let mut bytes = [0; N];
        self.fill(&mut bytes);
        bytes
    }
}

impl fmt::Debug for Random {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Random")
    }
}

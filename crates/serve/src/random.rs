//! Randomness as a parameter: logic that depends on it takes a [`Random`], so that a test can fix it.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

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

    /// A source of bytes that come evenly and differ from those of any other, and that can be foretold from earlier ones: for ids that
    /// are no secret, at a fiftieth of the cost. This one gives the seed.
    #[must_use]
    pub fn for_ids(&self) -> Random {
        let seeds = [u64::from_le_bytes(self.bytes()), u64::from_le_bytes(self.bytes())];
        let drawn = AtomicU64::new(0);
        Random::from_fn(move |bytes| {
            let words = bytes.len().div_ceil(size_of::<u64>()) as u64;
            let first = drawn.fetch_add(words, Ordering::Relaxed);
            for (bytes, number) in bytes.chunks_mut(size_of::<u64>()).zip(first..) {
                // Two words in a row come from two seeds: who draws 16 bytes meets no other source that shares one of them.
                let word = split_mix(seeds[number as usize % 2], number);
                bytes.copy_from_slice(&word.to_le_bytes()[..bytes.len()]);
            }
        })
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

/// A number of the sequence SplitMix64 (Steele, Lea and Flood, 2014).
fn split_mix(seed: u64, number: u64) -> u64 {
    let mut z = seed.wrapping_add(number.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

impl fmt::Debug for Random {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Random")
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn split_mix_gives_the_published_numbers() {
        let drawn: Vec<u64> = (0..3).map(|number| split_mix(1_234_567, number)).collect();
        assert_eq!(drawn, [6457827717110365317, 3203168211198807973, 9817491932198370423]);
    }

    #[test]
    fn ids_never_repeat_within_a_source_and_differ_between_two() {
        let (one, other) = (Random::secure().for_ids(), Random::secure().for_ids());
        let drawn: HashSet<[u8; 24]> = (0..10_000).flat_map(|_| [one.bytes(), other.bytes()]).collect();
        assert_eq!(drawn.len(), 20_000);
        assert_eq!(one.bytes::<3>().len(), 3, "less than a word");
    }
}

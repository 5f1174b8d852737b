//! Chance that can be repeated: a generator with a seed that a failing test prints.

/// SplitMix64 (Steele, Lea, Flood: Fast Splittable Pseudorandom Number Generators, OOPSLA 2014).
#[derive(Clone, Debug)]
pub struct Dice(u64);

impl Dice {
    /// The same seed throws the same numbers.
    pub fn new(seed: u64) -> Dice {
        Dice(seed)
    }

    /// A seed: the number in this environment variable, so that a run can be repeated, or one that nobody chose.
    ///
    /// # Panics
    /// When the variable holds anything but a number.
    pub fn seed(variable: &str) -> u64 {
        use std::hash::{BuildHasher, RandomState};
        match std::env::var(variable) {
            Ok(text) => match text.parse() {
                Ok(seed) => seed,
                Err(_) => panic!("{variable}={text:?}: a whole number expected"),
            },
            Err(_) => RandomState::new().hash_one(std::process::id()),
        }
    }

    /// The next number.
    pub fn throw(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// A number from 0 up to, and without, `end`, which is at least 1. (The bias of the remainder is of no concern to a test.)
    pub fn below(&mut self, end: u64) -> u64 {
        self.throw() % end
    }

    /// Whether a throw that succeeds `percent` times in a hundred does.
    pub fn chance(&mut self, percent: u64) -> bool {
        self.below(100) < percent
    }

    /// Another generator, for somebody who throws at the same time.
    pub fn fork(&mut self) -> Dice {
        Dice(self.throw())
    }
}

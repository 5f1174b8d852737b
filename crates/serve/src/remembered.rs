//! Which tokens were verified, in a bounded memory.
//!
//! A token is looked up with every request. It is found by a hash that nobody outside can foretell, and compared whole: no
//! other text is ever taken for it.

use std::hash::BuildHasher;
use std::sync::{PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use foldhash::quality::RandomState;
use foldhash::{HashMap, HashMapExt};
use wire::time::UnixMillis;

use crate::auth::Claims;

/// Parts that are locked one by one, so that threads seldom meet.
const PARTS: usize = 16;

/// Remembers as many tokens as it may. Which of them were used of late is known roughly: those of which nothing was heard while a
/// half of the room was filled are forgotten.
pub(crate) struct Remembered {
    state: RandomState,
    parts: [RwLock<Part>; PARTS],
    /// Of one generation in one part.
    max_tokens: usize,
}

#[derive(Default)]
struct Part {
    young: HashMap<Box<str>, Known>,
    old: HashMap<Box<str>, Known>,
}

/// What is known of a token that was verified.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Known {
    pub(crate) claims: Claims,
    /// That of the keys with which it was verified: whoever asks knows whether they still count.
    pub(crate) generation: u64,
    /// From then on it is as if it had never been verified.
    pub(crate) until: UnixMillis,
}

impl Remembered {
    /// Room for about so many tokens.
    pub(crate) fn new(max_tokens: usize) -> Remembered {
        let parts = std::array::from_fn(|_| RwLock::default());
        Remembered { state: RandomState::default(), parts, max_tokens: max_tokens.div_ceil(2 * PARTS) }
    }

    /// What is known of a token that was verified and may still be remembered.
    pub(crate) fn get(&self, token: &str, now: UnixMillis) -> Option<Known> {
        let part = self.part(token);
        let fresh = |known: &Known| (now < known.until).then_some(*known);
        {
            let part = read(part);
            if let Some(known) = part.young.get(token) {
                return fresh(known);
            }
            if !part.old.contains_key(token) {
                return None;
            }
        }
        let mut part = write(part);
        let (token, known) = part.old.remove_entry(token)?;
        self.put(&mut part, token, known);
        fresh(&known)
    }

    /// Remembers a token that was verified.
    pub(crate) fn insert(&self, token: &str, known: Known) {
        self.put(&mut write(self.part(token)), token.into(), known);
    }

    /// Forgets a token.
    pub(crate) fn forget(&self, token: &str) {
        let mut part = write(self.part(token));
        part.young.remove(token);
        part.old.remove(token);
    }

    fn put(&self, part: &mut Part, token: Box<str>, known: Known) {
        if part.young.len() >= self.max_tokens {
            part.old = std::mem::replace(&mut part.young, HashMap::new());
        }
        part.young.insert(token, known);
    }

    fn part(&self, token: &str) -> &RwLock<Part> {
        // The end of a token is its signature: the rest of it is much the same for all. The map hashes all of it.
        let tail = &token.as_bytes()[token.len().saturating_sub(16)..];
        &self.parts[self.state.hash_one(tail) as usize % PARTS]
    }
}

/// Nothing under these locks panics half-way through a change, so a poisoned one is whole.
fn read(part: &RwLock<Part>) -> RwLockReadGuard<'_, Part> {
    part.read().unwrap_or_else(PoisonError::into_inner)
}

fn write(part: &RwLock<Part>) -> RwLockWriteGuard<'_, Part> {
    part.write().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn known(customer_id: u64) -> Known {
        Known { claims: Claims { customer_id, expires_at: 1_000 }, generation: customer_id + 3, until: 50 }
    }

    #[test]
    fn a_token_is_known_until_its_time_is_over_or_it_is_forgotten() {
        let remembered = Remembered::new(100);
        remembered.insert("a.token", known(7));
        assert_eq!(remembered.get("a.token", 49), Some(known(7)));
        assert_eq!(remembered.get("a.token", 50), None);
        for other in ["a.toke", "a.token ", "b.token", ""] {
            assert_eq!(remembered.get(other, 1), None, "{other:?}");
        }
        remembered.forget("a.token");
        assert_eq!(remembered.get("a.token", 1), None);
    }

    #[test]
    fn the_room_is_bounded_and_what_is_used_stays() {
        let remembered = Remembered::new(1_000);
        remembered.insert("in use", known(1));
        for number in 0..100_000 {
            remembered.insert(&format!("token {number}"), known(2));
            assert_eq!(remembered.get("in use", 1), Some(known(1)), "after {number}");
        }
        let tokens = |part: &RwLock<Part>| read(part).young.len() + read(part).old.len();
        let tokens: usize = remembered.parts.iter().map(tokens).sum();
        assert!((500..=1_100).contains(&tokens), "{tokens} tokens are remembered");
        assert_eq!(remembered.get("token 99999", 1), Some(known(2)));
        assert_eq!(remembered.get("token 0", 1), None);
    }
}

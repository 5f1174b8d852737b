//! Which of several replicas is asked. Pure.

use std::hash::{BuildHasher, Hash};

use foldhash::fast::FixedState;

/// How a replica is chosen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Choice {
    /// The less busy one of two that are drawn (the power of two choices).
    LeastBusy,
    /// The same one for the same number, as long as it can be reached; others take its place while it cannot. Every
    /// process chooses the same (rendezvous hashing), and nothing else moves when one goes or comes.
    Same(u64),
}

impl Choice {
    /// The same replica for everything that has the same hash.
    pub fn same_for(thing: impl Hash) -> Choice {
        Choice::Same(hash(thing))
    }
}

/// The same number for the same thing, in every process.
pub(crate) fn hash(thing: impl Hash) -> u64 {
    FixedState::default().hash_one(thing)
}

/// A number that looks random for each pair (the finalizer of SplitMix64). foldhash is too weak for that: of four replicas one
/// would get a third.
fn score(number: u64, identity: u64) -> u64 {
    let mut x = number ^ identity;
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

/// What a choice looks at.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Standing {
    /// Requests that the replica has in hand.
    pub(crate) busy: usize,
    /// A number that is its own in every process.
    pub(crate) identity: u64,
}

/// Chooses among `candidates`. `draw(n)` yields a random number below n.
pub(crate) fn choose<C: Copy>(
    choice: Choice,
    candidates: impl Iterator<Item = C> + Clone,
    standing: impl Fn(C) -> Standing,
    mut draw: impl FnMut(usize) -> usize,
) -> Option<C> {
    match choice {
        Choice::Same(number) => {
            candidates.max_by_key(|candidate| score(number, standing(*candidate).identity))
        }
        Choice::LeastBusy => {
            let count = candidates.clone().count();
            if count < 2 {
                return candidates.into_iter().next();
            }
            let first = draw(count);
            // Another one, each of them as likely.
            let second = (first + 1 + draw(count - 1)) % count;
            let at = |place| candidates.clone().nth(place);
            [at(first)?, at(second)?].into_iter().min_by_key(|candidate| standing(*candidate).busy)
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use super::*;

    fn standings(busy: &[usize]) -> Vec<Standing> {
        busy.iter().zip(1..).map(|(busy, identity)| Standing { busy: *busy, identity }).collect()
    }

    fn same(number: impl Hash, standings: impl Iterator<Item = Standing> + Clone) -> u64 {
        choose(Choice::same_for(number), standings, |it| it, |_| 0).unwrap().identity
    }

    #[test]
    fn the_busiest_is_never_chosen_and_the_others_all_are() {
        let (standings, mut chosen) = (standings(&[5, 9, 5]), HashMap::new());
        let mut random = fastrand::Rng::with_seed(1);
        for _ in 0..300 {
            let one = choose(Choice::LeastBusy, standings.iter(), |it| *it, |n| random.usize(..n)).unwrap();
            *chosen.entry(one.identity).or_insert(0) += 1;
        }
        assert!(!chosen.contains_key(&2) && chosen[&1] > 100 && chosen[&3] > 100, "{chosen:?}");
        assert!(choose(Choice::LeastBusy, [].into_iter(), |it: Standing| it, |_| 0).is_none());
    }

    #[test]
    fn one_that_goes_takes_only_its_own_with_it() {
        let standings = standings(&[0, 0, 0, 0]);
        let before: Vec<u64> = (0..4_000).map(|n: u64| same(n, standings.iter().copied())).collect();
        for identity in 1..=4 {
            let share = before.iter().filter(|chosen| **chosen == identity).count();
            assert!((800..1_200).contains(&share), "{identity} has {share} of 4000");
        }
        for (n, before) in (0_u64..).zip(before) {
            let left = standings.iter().copied().filter(|standing| standing.identity != 2);
            let after = same(n, left);
            assert!(after == before || before == 2, "{n} moved from {before} to {after}");
        }
    }

    /// Processes of different builds choose the same.
    #[test]
    fn the_choice_is_the_same_everywhere() {
        let standings = standings(&[0, 0, 0]);
        let chosen = ["a", "b", "c", "d", "e", "f"].map(|text| same(text, standings.iter().copied()));
        assert_eq!(chosen, [3, 1, 2, 2, 1, 1]);
    }
}

//! How long to wait before something is tried again.

use std::time::Duration;

/// The first pause.
const FIRST: Duration = Duration::from_millis(20);
/// The longest pause that is not asked for by the shop.
const LONGEST: Duration = Duration::from_secs(1);

/// Pauses that double, each with a share of chance, so that what failed together does not come back together.
#[derive(Clone, Debug)]
pub(crate) struct Backoff {
    pause: Duration,
}

impl Default for Backoff {
    fn default() -> Backoff {
        Backoff { pause: FIRST }
    }
}

impl Backoff {
    /// The next pause: at least what the shop asked for.
    pub(crate) fn next(&mut self, asked: Option<Duration>) -> Duration {
        let pause = self.pause;
        self.pause = (pause * 2).min(LONGEST);
        match asked {
            Some(asked) => asked + jitter(FIRST.max(asked / 4)),
            None => pause / 2 + jitter(pause / 2),
        }
    }
}

fn jitter(most: Duration) -> Duration {
    most.mul_f64(fastrand::f64())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_grow_up_to_a_bound() {
        let mut backoff = Backoff::default();
        for count in 0..20 {
            let expected = (FIRST * 2u32.pow(count.min(10))).min(LONGEST);
            let pause = backoff.next(None);
            assert!(pause >= expected / 2 && pause <= expected, "{count}: {pause:?}");
        }
    }

    #[test]
    fn what_the_shop_asks_for_is_honoured() {
        let pause = Backoff::default().next(Some(Duration::from_secs(4)));
        assert!((4..=5).contains(&pause.as_secs()), "{pause:?}");
    }
}

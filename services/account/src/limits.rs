//! How often a login may be tried: for each e-mail address, for each client address, and in all.
//!
//! Each limit is a token bucket (GCRA): a burst, then one try per interval. What never happens: the memory
//! of the limits grows with the number of addresses that somebody makes up; a clock that is set back locks
//! anybody out (it counts as no time at all), and one set forward only refills.

use std::hash::Hash;
use std::net::{IpAddr, Ipv6Addr};
use std::num::NonZeroU32;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use governor::clock::Clock as _;
use governor::middleware::NoOpMiddleware;
use governor::state::keyed::DefaultKeyedStateStore;
use governor::state::{InMemoryState, NotKeyed};
use governor::{NotUntil, Quota, RateLimiter};
use serde::{Deserialize, Serialize};
use wire::time::{Clock, UnixMillis};

use crate::model::Email;

/// How many addresses each limit remembers. An address is forgotten one interval after its bucket is full again; while none
/// can be forgotten, new ones are refused.
pub(crate) const MAX_REMEMBERED_ADDRESSES: usize = 16_384;

/// How often a login may be tried. A burst of 0 counts as 1, an interval of 0 as 1 ms.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct LoginLimits {
    /// Tries at once with one e-mail address, right or wrong.
    pub burst_per_email: u32,
    /// Time until one more.
    pub interval_per_email_ms: u64,
    /// Tries at once from one client address (of IPv6, from one /64). Behind a proxy, all clients are one.
    pub burst_per_client: u32,
    /// Time until one more.
    pub interval_per_client_ms: u64,
    /// Tries at once, in all.
    pub burst_total: u32,
    /// Time until one more.
    pub interval_total_ms: u64,
}

impl Default for LoginLimits {
    fn default() -> LoginLimits {
        LoginLimits {
            burst_per_email: 10,
            interval_per_email_ms: 6_000,
            burst_per_client: 200,
            interval_per_client_ms: 10,
            burst_total: 400,
            interval_total_ms: 5,
        }
    }
}

/// A try too many.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct TooOften {
    /// Time until the next try can succeed, at least 1.
    pub(crate) retry_after_seconds: u32,
}

/// The limits and what they remember.
pub(crate) struct Limiter {
    total: RateLimiter<NotKeyed, InMemoryState, Elapsed, NoOpMiddleware<Duration>>,
    clients: Addresses<IpAddr>,
    emails: Addresses<String>,
    elapsed: Elapsed,
}

impl Limiter {
    pub(crate) fn new(limits: &LoginLimits, clock: Clock) -> Limiter {
        let elapsed = Elapsed::new(clock);
        let total = quota(limits.burst_total, limits.interval_total_ms);
        let client = quota(limits.burst_per_client, limits.interval_per_client_ms);
        let email = quota(limits.burst_per_email, limits.interval_per_email_ms);
        Limiter {
            total: RateLimiter::new(total, InMemoryState::default(), elapsed.clone()),
            clients: Addresses::new(client, elapsed.clone()),
            emails: Addresses::new(email, elapsed.clone()),
            elapsed,
        }
    }

    /// Counts a try. The client's own limit is asked first, so that a client beyond it neither uses up what is
    /// left for all, nor fills the memory of e-mail addresses.
    pub(crate) fn check(&self, client: Option<IpAddr>, email: &Email) -> Result<(), TooOften> {
        if let Some(client) = client {
            self.clients.check(&network(client), &self.elapsed)?;
        }
        self.total.check().map_err(|until| too_often(&until, &self.elapsed))?;
        self.emails.check(&email.key().to_owned(), &self.elapsed)
    }
}

/// A limit for each address of a kind.
struct Addresses<K: Hash + Eq + Clone> {
    limiter: RateLimiter<K, DefaultKeyedStateStore<K>, Elapsed, NoOpMiddleware<Duration>>,
}

impl<K: Hash + Eq + Clone> Addresses<K> {
    fn new(quota: Quota, elapsed: Elapsed) -> Addresses<K> {
        Addresses { limiter: RateLimiter::new(quota, DefaultKeyedStateStore::default(), elapsed) }
    }

    fn check(&self, key: &K, elapsed: &Elapsed) -> Result<(), TooOften> {
        if self.limiter.len() >= MAX_REMEMBERED_ADDRESSES {
            self.limiter.retain_recent();
            if self.limiter.len() >= MAX_REMEMBERED_ADDRESSES {
                return Err(TooOften { retry_after_seconds: 1 });
            }
        }
        self.limiter.check_key(key).map_err(|until| too_often(&until, elapsed))
    }
}

fn too_often(until: &NotUntil<Duration>, elapsed: &Elapsed) -> TooOften {
    let wait = until.wait_time_from(elapsed.now());
    let seconds = wait.as_secs() + u64::from(wait.subsec_nanos() > 0);
    TooOften { retry_after_seconds: u32::try_from(seconds).unwrap_or(u32::MAX).max(1) }
}

fn quota(burst: u32, interval_ms: u64) -> Quota {
    let interval = Duration::from_millis(interval_ms.max(1));
    let quota = Quota::with_period(interval).expect("the interval is above zero");
    quota.allow_burst(NonZeroU32::new(burst).unwrap_or(NonZeroU32::MIN))
}

/// Who has one IPv6 address commonly has a /64 of them.
fn network(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V4(v4) => IpAddr::V4(v4),
        IpAddr::V6(v6) => IpAddr::V6(Ipv6Addr::from_bits(v6.to_bits() & (u128::MAX << 64))),
    }
}

/// The time that passed by a clock that may jump. Steps back count as none.
#[derive(Clone)]
struct Elapsed(Arc<ElapsedState>);

struct ElapsedState {
    clock: Clock,
    /// When the clock was last read, and what had passed by then.
    read: Mutex<(UnixMillis, Duration)>,
}

impl Elapsed {
    fn new(clock: Clock) -> Elapsed {
        let read = Mutex::new((clock.now(), Duration::ZERO));
        Elapsed(Arc::new(ElapsedState { clock, read }))
    }
}

impl governor::clock::Clock for Elapsed {
    type Instant = Duration;

    fn now(&self) -> Duration {
        let mut read = self.0.read.lock().unwrap_or_else(PoisonError::into_inner);
        let now = self.0.clock.now();
        let passed = Duration::from_millis(now.saturating_sub(read.0));
        *read = (now, read.1.saturating_add(passed));
        read.1
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicU64, Ordering};

    struct Fixture {
        limiter: Limiter,
        millis: Arc<AtomicU64>,
    }

    fn fixture(limits: LoginLimits) -> Fixture {
        let millis = Arc::new(AtomicU64::new(1_000_000));
        let read = millis.clone();
        let limiter = Limiter::new(&limits, Clock::from_fn(move || read.load(Ordering::SeqCst)));
        Fixture { limiter, millis }
    }

    impl Fixture {
        fn advance(&self, millis: u64) {
            self.millis.fetch_add(millis, Ordering::SeqCst);
        }

        fn try_login(&self, email: &str) -> Result<(), TooOften> {
            self.limiter.check(None, &Email::parse(email).unwrap())
        }

        fn passed(&self, email: &str, tries: usize) -> usize {
            (0..tries).filter(|_| self.try_login(email).is_ok()).count()
        }
    }

    #[test]
    fn an_address_has_a_burst_then_one_try_per_interval() {
        let f = fixture(LoginLimits::default());
        assert_eq!(f.passed("a@b", 30), 10);
        assert_eq!(f.try_login("A@B"), Err(TooOften { retry_after_seconds: 6 }));
        f.advance(5_500);
        assert_eq!(f.try_login("a@b"), Err(TooOften { retry_after_seconds: 1 }));
        f.advance(500);
        assert_eq!(f.passed("a@b", 5), 1);
        assert_eq!(f.passed("other@b", 30), 10);
    }

    #[test]
    fn a_clock_set_back_locks_nobody_out() {
        let f = fixture(LoginLimits::default());
        assert_eq!(f.passed("a@b", 30), 10);
        f.millis.store(0, Ordering::SeqCst);
        assert_eq!(f.passed("a@b", 5), 0);
        f.advance(6_000);
        assert_eq!(f.passed("a@b", 5), 1);
    }

    #[test]
    fn clients_and_the_total_are_limited_too() {
        let limits = LoginLimits { burst_per_client: 3, burst_total: 5, ..LoginLimits::default() };
        let f = fixture(limits);
        let client = |text: &str| Some(text.parse().unwrap());
        let tries = |address: &str, n: usize| {
            let tries = (0..n).filter(|i| {
                let email = Email::parse(&format!("{i}@{}", address.len())).unwrap();
                f.limiter.check(client(address), &email).is_ok()
            });
            tries.count()
        };
        assert_eq!(tries("2001:db8::1", 2), 2);
        // The same /64.
        assert_eq!(tries("2001:db8::ffff:2", 9), 1);
        assert_eq!(tries("192.0.2.1", 9), 2, "two are left of the total");
    }

    #[test]
    fn made_up_addresses_do_not_fill_the_memory() {
        let wide = LoginLimits { burst_total: u32::MAX, interval_total_ms: 1, ..LoginLimits::default() };
        let f = fixture(wide);
        for n in 0..MAX_REMEMBERED_ADDRESSES + 100 {
            let _ = f.try_login(&format!("{n}@b"));
        }
        assert_eq!(f.limiter.emails.limiter.len(), MAX_REMEMBERED_ADDRESSES);
        assert!(f.try_login("new@b").is_err());
        f.advance(12_000);
        assert!(f.try_login("new@b").is_ok());
        assert!(f.limiter.emails.limiter.len() < 10);
    }
}

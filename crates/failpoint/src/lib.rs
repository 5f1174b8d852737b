//! Named points in the code where a test can kill the process, as `kill -9` would.
//!
//! A point is written `failpoint::hit("participant.committed")`. Without the feature `enabled` the call is
//! empty and compiles to nothing; with it, the environment variable `SAGA_FAILPOINT` names one point and the
//! hit at which the process dies: `participant.committed=3` aborts the process at the third hit. Nothing is
//! flushed, no destructor runs, no lock is released: what the operating system has is what is left.
//!
//! The points are at every boundary between a commit, a publish and an acknowledgement; `POINTS` lists them,
//! so that a test can walk through all of them.

/// Every point there is, in the order in which a purchase passes them.
pub const POINTS: &[&str] = &[
    "purchase.accept.before_commit",
    "purchase.accept.committed",
    "purchase.accept.published",
    "orchestrator.received",
    "orchestrator.published",
    "participant.received",
    "participant.before_commit",
    "participant.committed",
    "participant.published",
    "purchase.result.received",
    "purchase.result.committed",
    "purchase.result.announced",
    "purchase.reconcile.committed",
];

/// The environment variable that arms one point: `NAME=N`, N counted from 1.
pub const VARIABLE: &str = "SAGA_FAILPOINT";

/// Whether failpoints are compiled into this build.
pub const ENABLED: bool = cfg!(feature = "enabled");

/// Dies here if this is the armed point and its count is reached; otherwise returns at once.
#[inline]
pub fn hit(name: &'static str) {
    #[cfg(feature = "enabled")]
    armed::hit(name);
    #[cfg(not(feature = "enabled"))]
    let _ = name;
}

#[cfg(feature = "enabled")]
mod armed {
    use std::sync::OnceLock;
    use std::sync::atomic::{AtomicU64, Ordering};

    struct Armed {
        name: String,
        left: AtomicU64,
    }

    static ARMED: OnceLock<Option<Armed>> = OnceLock::new();

    fn from_environment() -> Option<Armed> {
        let text = std::env::var(super::VARIABLE).ok()?;
        let parsed = text.split_once('=').and_then(|(name, count)| {
            let count: u64 = count.parse().ok().filter(|n| *n > 0)?;
            super::POINTS.contains(&name).then(|| (name.to_owned(), count))
        });
        let Some((name, count)) = parsed else {
            panic!(
                "{}={text:?}: expected NAME=N with N >= 1 and NAME one of {:?}",
                super::VARIABLE,
                super::POINTS
            );
        };
        Some(Armed { name, left: AtomicU64::new(count) })
    }

    pub(super) fn hit(name: &'static str) {
        debug_assert!(super::POINTS.contains(&name), "failpoint {name:?} is not in POINTS");
        let Some(armed) = ARMED.get_or_init(from_environment) else { return };
        if armed.name == name && armed.left.fetch_sub(1, Ordering::SeqCst) == 1 {
            std::process::abort();
        }
    }
}

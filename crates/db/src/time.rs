//! The time of a server: one for all who work on its database.
//!
//! Whoever compares what is written in a database with the clock of its own machine may find overdue what another machine has just
//! written. So processes that decide by such times go by the server's clock, whatever their own clocks say.
//!
//! The server is asked every [`INTERVAL`]. In between time goes on as the machine's monotonic clock does, so it makes no difference if somebody sets the
//! machine's other clock. An answer tells that the server's clock stood at its time between the question and the answer: what was
//! believed is kept if that is possible, so that the time does not jump about by what a question takes, and otherwise moved as little as
//! makes it possible (the interval of Marzullo's algorithm, of one source).
//!
//! While the server does not answer, the time goes on.

use std::convert::Infallible;
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::{Duration, Instant};

use wire::time::{Clock, UnixMillis};

use crate::{Db, Error};

/// How often the server is asked. A machine's monotonic clock is off by less than a millisecond after so long.
const INTERVAL: Duration = Duration::from_secs(10);
/// Clocks that are further apart than this, or jump by more, are worth a line in the log.
const WORTH_TELLING_MILLIS: u64 = 1_000;

/// A clock that follows that of a database's server.
pub struct ServerClock {
    db: Db,
    time: Arc<Time>,
}

/// What is believed.
struct Time {
    start: Instant,
    /// The server's time at `start`, in milliseconds since the Unix epoch.
    at_start: AtomicI64,
}

impl Time {
    fn now(&self) -> UnixMillis {
        let elapsed = millis(self.start.elapsed());
        UnixMillis::try_from(self.at_start.load(Ordering::Relaxed).saturating_add(elapsed)).unwrap_or(0)
    }
}

/// A server's answer: what its clock said at some time between two, which are counted from the start.
#[derive(Clone, Copy)]
struct Answer {
    asked: Duration,
    told: UnixMillis,
    answered: Duration,
}

impl Answer {
    /// What the server's clock may have stood at when this process's stood at its start: the earliest and the latest.
    fn bounds(self) -> (i64, i64) {
        // Each of the times is cut off to a whole millisecond.
        let told = i64::try_from(self.told).unwrap_or(i64::MAX);
        (told - millis(self.answered) - 1, told - millis(self.asked) + 1)
    }

    fn middle(self) -> i64 {
        let (least, most) = self.bounds();
        least.midpoint(most)
    }

    /// What to believe from now on.
    fn settle(self, believed: i64) -> i64 {
        let (least, most) = self.bounds();
        believed.clamp(least, most)
    }
}

impl ServerClock {
    /// Asks the server for the first time. If this machine's own clock is more than a second away, that is logged.
    ///
    /// # Errors
    /// As [`Db::read`].
    pub async fn read(db: Db, own: &Clock) -> Result<ServerClock, Error> {
        let start = Instant::now();
        let answer = ask(&db, start).await?;
        let time = Arc::new(Time { start, at_start: AtomicI64::new(answer.middle()) });
        let (servers, machines) = (time.now(), own.now());
        if servers.abs_diff(machines) > WORTH_TELLING_MILLIS {
            let ahead_seconds = seconds(machines.cast_signed() - servers.cast_signed());
            tracing::warn!(
                database = db.name(),
                ahead_seconds,
                "this machine's clock is not that of the database's server, which is gone by"
            );
        }
        Ok(ServerClock { db, time })
    }

    /// The server's time.
    pub fn clock(&self) -> Clock {
        let time = Arc::clone(&self.time);
        Clock::from_fn(move || time.now())
    }

    /// Keeps in step with the server for as long as it is polled.
    pub async fn keep(self) -> Infallible {
        let mut interval = tokio::time::interval(INTERVAL);
        interval.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            // At once for the first time: the first answer may have waited for its connection, and so say little.
            interval.tick().await;
            if let Err(error) = self.follow().await {
                tracing::debug!(database = self.db.name(), %error, "the server does not tell its time; it goes on");
            }
        }
    }

    async fn follow(&self) -> Result<(), Error> {
        let answer = ask(&self.db, self.time.start).await?;
        let believed = self.time.at_start.load(Ordering::Relaxed);
        let settled = answer.settle(believed);
        self.time.at_start.store(settled, Ordering::Relaxed);
        if settled.abs_diff(believed) > WORTH_TELLING_MILLIS {
            let by_seconds = seconds(settled - believed);
            tracing::warn!(
                database = self.db.name(),
                by_seconds,
                "the server's clock was set; it is followed"
            );
        }
        Ok(())
    }
}

async fn ask(db: &Db, start: Instant) -> Result<Answer, Error> {
    let asked = start.elapsed();
    let told = db.read(|tx| tx.query_opt("SELECT {now millis}", &[], |row| row.get::<u64>(0))).await?;
    let told = told.expect("what is asked of no table has one row");
    Ok(Answer { asked, told, answered: start.elapsed() })
}

fn millis(duration: Duration) -> i64 {
    i64::try_from(duration.as_millis()).unwrap_or(i64::MAX)
}

fn seconds(millis: i64) -> f64 {
    millis as f64 / 1e3
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer(asked: u64, told: UnixMillis, answered: u64) -> Answer {
        Answer { asked: Duration::from_millis(asked), told, answered: Duration::from_millis(answered) }
    }

    #[test]
    fn what_an_answer_allows_is_kept_and_what_it_does_not_is_moved_as_little_as_possible() {
        // The server's clock said 10,000 at some time between 100 and 140 after the start.
        let answer = answer(100, 10_000, 140);
        assert_eq!(answer.middle(), 9_880);
        for possible in [9_859, 9_870, 9_880, 9_901] {
            assert_eq!(answer.settle(possible), possible);
        }
        assert_eq!(answer.settle(9_858), 9_859, "it was believed to be earlier than it is");
        assert_eq!(answer.settle(-7_000), 9_859);
        assert_eq!(answer.settle(9_902), 9_901, "later");
        assert_eq!(answer.settle(86_400_000), 9_901, "by a day");
    }

    #[test]
    fn a_slow_answer_tells_little_and_a_fast_one_more() {
        let slow = answer(0, 10_000, 4_000).middle();
        assert_eq!(slow, 8_000);
        assert_eq!(answer(5_000, 14_990, 5_002).settle(slow), 9_987, "two seconds were the network's");
        assert_eq!(answer(15_000, 25_500, 20_000).settle(9_987), 9_987, "a slow one later does not undo it");
    }

    #[test]
    fn time_goes_on_between_answers() {
        let time = Time { start: Instant::now(), at_start: AtomicI64::new(1_000) };
        let first = time.now();
        assert!(first >= 1_000);
        while time.now() == first {
            std::hint::spin_loop();
        }
        assert!(time.now() > first);
    }
}

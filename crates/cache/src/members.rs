//! A membership filter: answers "there certainly is no such row" without the database, and never wrongly.
//!
//! A Bloom filter that is filled from the database says "no" rightly only if it has every row up to some id, and no such row is
//! created later. Ids are in the order of time, but rows are not committed in the order of their ids, and clocks differ. So the
//! replicas agree in the database: [`Mark::Closed`] says up to which id no row is created any more. Who creates a row holds the mark
//! until the commit, and takes another id if its own is not above ([`hold_open`]). The mark is raised to what the ids of a few seconds ago
//! were, which waits for those who hold it; then the rows up to it are all there, for good, and are read into the filter. An id above
//! what the filter has read passes, and the database decides.
//!
//! Rows must never be deleted for the filter to stay sharp; were they, it would only pass more. So there is no need for a cuckoo
//! filter, whose one advantage is that it forgets. It is not shared in Redis (`BF.*`), where it could be lost without a trace, and would cost a
//! round trip where a look into memory does.

use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use db::{Db, Error, Tx};
use fastbloom::BloomFilter;
use tokio_util::sync::{CancellationToken, DropGuard};
use wire::ids::{IDS_PER_SECOND, Parts, WORKERS, second_of};
use wire::time::Clock;

use crate::mark::Mark;

/// How far behind the clock ids are closed, in seconds: so long a creation may take before it has to take another id.
const CLOSE_BEHIND_SECONDS: u64 = 10;
/// How often they are closed, and the filter is filled up.
const FILL_EVERY: Duration = Duration::from_secs(5);
/// Rows read at once.
const PAGE_ROWS: u32 = 2_000;
/// How often a filter of one layer wrongly says "perhaps".
const FALSE_POSITIVES: f64 = 0.001;
/// What the first layer holds; each further one holds twice as much as the one before.
const FIRST_LAYER_ROWS: usize = 1 << 16;
/// What the filter holds at most: about 60 MB. Rows beyond it pass.
const MAX_ROWS: usize = 1 << 25;

/// One page of the ids of rows: those above the first number, up to the second, in their order, as many as the third at most.
pub type PageOfIds = fn(&mut Tx<'_>, u64, u64, u32) -> Result<Vec<u64>, Error>;

/// Which rows there are, as far as is known. Clones share it.
#[derive(Clone)]
pub struct Members {
    filter: Arc<RwLock<Filter>>,
    _stop: Arc<DropGuard>,
}

/// In a transaction that creates a row, before it: whether a row with this id may still be created. If not, the transaction must be
/// rolled back, and may come again with another id.
///
/// # Errors
/// When the database fails.
pub fn hold_open(tx: &mut Tx<'_>, id: u64) -> Result<bool, Error> {
    Ok(i64::try_from(id).is_ok_and(|id| id > 0)
        && u64::try_from(Mark::Closed.hold(tx)?).is_ok_and(|closed| id > closed))
}

impl Members {
    /// Knows nothing yet, and passes everything. A task fills it until the last clone is dropped. Must be called on a tokio runtime; the
    /// database needs [`crate::mark::migration`], and [`Mark::ensure`] for the mark before anybody creates rows.
    pub fn start(db: Db, clock: Clock, page: PageOfIds) -> Members {
        let filter = Arc::new(RwLock::new(Filter::default()));
        let stop = CancellationToken::new();
        let builder = Builder { db, clock, page, filter: filter.clone() };
        let stopped = stop.clone();
        tokio::spawn(async move { stopped.run_until_cancelled(builder.keep_filling()).await });
        Members { filter, _stop: Arc::new(stop.drop_guard()) }
    }

    /// False if there certainly is no row with this id, and never will be.
    pub fn may_have(&self, id: u64) -> bool {
        self.filter.read().unwrap_or_else(PoisonError::into_inner).may_have(id)
    }

    /// Up to which id it knows all rows.
    pub fn complete_up_to(&self) -> u64 {
        self.filter.read().unwrap_or_else(PoisonError::into_inner).complete
    }
}

struct Builder {
    db: Db,
    clock: Clock,
    page: PageOfIds,
    filter: Arc<RwLock<Filter>>,
}

impl Builder {
    async fn keep_filling(&self) {
        loop {
            if let Err(error) = self.fill().await {
                tracing::debug!(%error, database = self.db.name(), "the membership filter was not filled up");
            }
            tokio::time::sleep(FILL_EVERY).await;
        }
    }

    async fn fill(&self) -> Result<(), Error> {
        let close = closed_at(self.clock.now() / 1_000);
        let closed = self.db.write(move |tx| {
            Mark::Closed.raise(tx, i64::try_from(close).unwrap_or(i64::MAX))?;
            // Somebody's clock may be ahead.
            Mark::Closed.read(tx)
        });
        let closed = u64::try_from(closed.await?).unwrap_or(0);
        let page = self.page;
        loop {
            let after = self.filter.read().unwrap_or_else(PoisonError::into_inner).complete;
            if after >= closed {
                return Ok(());
            }
            let ids = self.db.read(move |tx| page(tx, after, closed, PAGE_ROWS)).await?;
            let is_last = ids.len() < PAGE_ROWS as usize;
            let mut filter = self.filter.write().unwrap_or_else(PoisonError::into_inner);
            if !filter.take(&ids) {
                // It stays right: what is above passes.
                tracing::warn!(rows = MAX_ROWS, database = self.db.name(), "the membership filter is full");
                return Ok(());
            }
            if is_last {
                filter.complete = closed;
            }
        }
    }
}

/// The last id of the second that ids are closed up to.
fn closed_at(unix_seconds: u64) -> u64 {
    match second_of(unix_seconds.saturating_sub(CLOSE_BEHIND_SECONDS)) {
        0 => 0,
        second => Parts { second, worker: WORKERS - 1, sequence: (IDS_PER_SECOND - 1) as u16 }.compose(),
    }
}

/// Layers of Bloom filters, each twice as large as the one before.
#[derive(Default)]
struct Filter {
    layers: Vec<BloomFilter>,
    rows: usize,
    /// It has all rows up to this id.
    complete: u64,
}

impl Filter {
    fn may_have(&self, id: u64) -> bool {
        id > self.complete || self.layers.iter().any(|layer| layer.contains(&id))
    }

    /// Takes the next rows, in the order of their ids; false if there is no room for all of them.
    fn take(&mut self, ids: &[u64]) -> bool {
        for id in ids {
            if self.rows == MAX_ROWS {
                return false;
            }
            if self.rows + FIRST_LAYER_ROWS == FIRST_LAYER_ROWS << self.layers.len() {
                let rows = FIRST_LAYER_ROWS << self.layers.len();
                self.layers.push(BloomFilter::with_false_pos(FALSE_POSITIVES).expected_items(rows));
            }
            if let Some(layer) = self.layers.last_mut() {
                layer.insert(id);
            }
            self.rows += 1;
            self.complete = *id;
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_knows_what_it_has_and_hardly_anything_else() {
        let mut filter = Filter::default();
        let ids: Vec<u64> = (0..300_000).map(|number| 10 * number + 7).collect();
        for page in ids.chunks(999) {
            assert!(filter.take(page));
        }
        assert_eq!(filter.layers.len(), 3, "65,536 and 131,072 and 262,144");
        assert!(ids.iter().all(|id| filter.may_have(*id)));
        let wrong = ids.iter().filter(|id| filter.may_have(**id - 1)).count();
        assert!(wrong < ids.len() / 100, "{wrong} of {} are not there and pass", ids.len());
    }

    #[test]
    fn what_is_above_what_it_has_read_passes() {
        let mut filter = Filter::default();
        assert!(filter.may_have(1), "it knows nothing yet");
        assert!(filter.take(&[10, 20]));
        assert!(!filter.may_have(15), "all rows up to 20 are known");
        assert!(filter.may_have(21) && filter.may_have(u64::MAX));
        filter.complete = 30;
        assert!(!filter.may_have(25) && filter.may_have(31));
    }

    #[test]
    fn ids_of_the_last_seconds_are_not_closed() {
        let now = wire::ids::EPOCH_UNIX_SECONDS + 1_000;
        let closed = Parts::of(closed_at(now)).expect("an id");
        assert_eq!(u64::from(closed.second), 1_000 - CLOSE_BEHIND_SECONDS);
        assert_eq!(closed_at(now).count_ones(), closed.second.count_ones() + 22, "the last id of its second");
        assert_eq!(closed_at(5), 0);
    }
}

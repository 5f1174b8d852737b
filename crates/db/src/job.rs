//! A closure on its way through a database's threads: what runs it, and what answers its caller.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::AtomicU64;

use tokio::sync::oneshot;

use crate::{Error, Outage, Tx};

/// A closure waiting for a database thread, with its type erased.
pub(crate) trait Job: Send {
    /// Runs the closure. True, if its effects are to be kept.
    fn run(&mut self, tx: &mut Tx<'_>) -> bool;

    /// Answers the caller: with the closure's own result, or with the error of the transaction around it.
    fn answer(self: Box<Self>, transaction: Result<(), Error>);
}

/// What a caller waits for: the closure's result, unless the transaction around it failed.
pub(crate) type Answer<T, E> = Result<Result<T, E>, Error>;

/// The one implementation of [`Job`].
pub(crate) struct Transaction<T, E, F> {
    closure: F,
    result: Answer<T, E>,
    caller: oneshot::Sender<Answer<T, E>>,
}

impl<T, E, F> Transaction<T, E, F> {
    pub(crate) fn new(closure: F) -> (Box<Self>, oneshot::Receiver<Answer<T, E>>) {
        let (caller, answer) = oneshot::channel();
        let result = Err(Error::Unavailable(Outage::Closed));
        (Box::new(Transaction { closure, result, caller }), answer)
    }
}

impl<T, E, F> Job for Transaction<T, E, F>
where
    T: Send,
    E: Send,
    F: FnMut(&mut Tx<'_>) -> Result<T, E> + Send,
{
    fn run(&mut self, tx: &mut Tx<'_>) -> bool {
        // A panicked closure is not run again and its effects are rolled back, so nothing that it left half
        // done can be seen.
        self.result = catch_unwind(AssertUnwindSafe(|| (self.closure)(tx))).map_err(|_| Error::Panicked);
        matches!(self.result, Ok(Ok(_)))
    }

    /// The transaction's error goes before the closure's own: the closure may have decided to refuse because
    /// of what an earlier one of its group wrote, and that is now gone.
    fn answer(self: Box<Self>, transaction: Result<(), Error>) {
        // A caller that has gone away does not want to know.
        let _ = self.caller.send(transaction.and(self.result));
    }
}

/// Numbers that anybody may read at any time.
#[derive(Default)]
pub(crate) struct Counters {
    pub(crate) groups: AtomicU64,
    pub(crate) jobs: AtomicU64,
    pub(crate) commit_micros: AtomicU64,
    pub(crate) wal_pages: AtomicU64,
    pub(crate) checkpoints: AtomicU64,
    pub(crate) reruns: AtomicU64,
    pub(crate) lookups: AtomicU64,
}

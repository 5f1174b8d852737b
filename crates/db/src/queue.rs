//! A bounded queue from async callers to database threads.
//!
//! Never waits on the side that pushes: a full or closed queue refuses. Never drops what it took: after
//! [`Queue::close`] the threads still get everything that was pushed before.

use std::collections::VecDeque;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

pub(crate) struct Queue<T> {
    state: Mutex<State<T>>,
    ready: Condvar,
    bound: usize,
}

struct State<T> {
    items: VecDeque<T>,
    /// Threads that sleep in `take`. Waking costs a system call, so it is spared while all are busy.
    sleepers: usize,
    closed: bool,
}

/// Why a queue did not take an item.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Refused {
    Full,
    Closed,
}

/// What came of waiting for items.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Taken {
    Some,
    /// There was none for as long as was to be waited.
    Nothing,
    /// The queue is closed and empty.
    Closed,
}

impl<T> Queue<T> {
    pub(crate) fn new(bound: usize) -> Queue<T> {
        let state = State { items: VecDeque::new(), sleepers: 0, closed: false };
        Queue { state: Mutex::new(state), ready: Condvar::new(), bound }
    }

    pub(crate) fn bound(&self) -> usize {
        self.bound
    }

    pub(crate) fn len(&self) -> usize {
        self.lock().items.len()
    }

    pub(crate) fn push(&self, item: T) -> Result<(), Refused> {
        let mut state = self.lock();
        if state.closed {
            return Err(Refused::Closed);
        }
        if state.items.len() >= self.bound {
            return Err(Refused::Full);
        }
        state.items.push_back(item);
        let wake = state.sleepers > 0;
        drop(state);
        if wake {
            self.ready.notify_one();
        }
        Ok(())
    }

    /// Waits until there is something and moves up to `max` items, oldest first, to `into`. False, once the
    /// queue is closed and empty.
    pub(crate) fn take(&self, max: usize, into: &mut VecDeque<T>) -> bool {
        let mut state = self.lock();
        while state.items.is_empty() {
            if state.closed {
                return false;
            }
            state.sleepers += 1;
            state = self.ready.wait(state).unwrap_or_else(PoisonError::into_inner);
            state.sleepers -= 1;
        }
        let count = max.min(state.items.len());
        into.extend(state.items.drain(..count));
        true
    }

    /// As [`Queue::take`], but waits for so long at most.
    pub(crate) fn take_within(&self, max: usize, into: &mut VecDeque<T>, patience: Duration) -> Taken {
        let deadline = Instant::now() + patience;
        let mut state = self.lock();
        while state.items.is_empty() {
            if state.closed {
                return Taken::Closed;
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Taken::Nothing;
            }
            state.sleepers += 1;
            state = self.ready.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
            state.sleepers -= 1;
        }
        let count = max.min(state.items.len());
        into.extend(state.items.drain(..count));
        Taken::Some
    }

    /// Refuses whatever comes from now on.
    pub(crate) fn close(&self) {
        self.lock().closed = true;
        self.ready.notify_all();
    }

    /// No code that can panic runs under the lock, so a poisoned one still guards a whole state.
    fn lock(&self) -> MutexGuard<'_, State<T>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refuses_at_its_bound_and_after_the_close_but_keeps_what_it_took() {
        let queue = Queue::new(2);
        let mut taken = VecDeque::new();
        assert_eq!(queue.push(1), Ok(()));
        assert_eq!(queue.push(2), Ok(()));
        assert_eq!(queue.push(3), Err(Refused::Full));
        queue.close();
        assert_eq!(queue.push(4), Err(Refused::Closed));
        assert!(queue.take(1, &mut taken));
        assert!(queue.take(9, &mut taken));
        assert_eq!(taken, [1, 2]);
        assert!(!queue.take(1, &mut taken));
    }

    #[test]
    fn a_wait_for_items_ends() {
        let queue = Queue::new(2);
        let mut taken = VecDeque::new();
        assert_eq!(queue.take_within(9, &mut taken, Duration::ZERO), Taken::Nothing);
        assert_eq!(queue.push(1), Ok(()));
        queue.close();
        assert_eq!(queue.take_within(9, &mut taken, Duration::ZERO), Taken::Some);
        assert_eq!(queue.take_within(9, &mut taken, Duration::ZERO), Taken::Closed);
        assert_eq!(taken, [1]);
    }

    #[test]
    fn a_sleeping_thread_is_woken_by_an_item_and_by_the_close() {
        let queue = Queue::new(10);
        std::thread::scope(|scope| {
            let threads: Vec<_> = (0..3)
                .map(|_| {
                    scope.spawn(|| {
                        let mut taken = VecDeque::new();
                        while queue.take(1, &mut taken) {}
                        taken.len()
                    })
                })
                .collect();
            for item in 0..1000 {
                while queue.push(item) == Err(Refused::Full) {
                    std::thread::yield_now();
                }
            }
            queue.close();
            let total: usize = threads.into_iter().map(|thread| thread.join().unwrap()).sum();
            assert_eq!(total, 1000);
        });
    }
}

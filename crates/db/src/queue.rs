//! A bounded queue from async callers to database threads.
//!
//! Never waits on the side that pushes: a full or closed queue refuses. Never drops what it took: after
//! [`Queue::close`] the threads still get everything that was pushed before.
//!
//! Of several threads that sleep, the one that fell asleep last is woken: what it works with, and the connection that it works on, was in
//! use a moment ago. (A condition variable would wake them in turns.) The others sleep on, until their connections are closed for want of work.

use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread::{self, Thread};
use std::time::{Duration, Instant};

pub(crate) struct Queue<T> {
    state: Mutex<State<T>>,
    bound: usize,
}

struct State<T> {
    items: VecDeque<T>,
    /// Threads that sleep in `take`, or are about to; the last came last. Waking costs a system call, so it is spared while all are busy.
    sleepers: Vec<Thread>,
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
        let state = State { items: VecDeque::new(), sleepers: Vec::new(), closed: false };
        Queue { state: Mutex::new(state), bound }
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
        let sleeper = state.sleepers.pop();
        drop(state);
        if let Some(sleeper) = sleeper {
            sleeper.unpark();
        }
        Ok(())
    }

    /// Waits until there is something and moves up to `max` items, oldest first, to `into`. False, once the
    /// queue is closed and empty.
    pub(crate) fn take(&self, max: usize, into: &mut VecDeque<T>) -> bool {
        self.take_until(max, into, None) == Taken::Some
    }

    /// As [`Queue::take`], but waits for so long at most.
    pub(crate) fn take_within(&self, max: usize, into: &mut VecDeque<T>, patience: Duration) -> Taken {
        self.take_until(max, into, Some(Instant::now() + patience))
    }

    fn take_until(&self, max: usize, into: &mut VecDeque<T>, deadline: Option<Instant>) -> Taken {
        let mut state = self.lock();
        while state.items.is_empty() {
            if state.closed {
                return Taken::Closed;
            }
            let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
            if left == Some(Duration::ZERO) {
                return Taken::Nothing;
            }
            let me = thread::current();
            let id = me.id();
            state.sleepers.push(me);
            drop(state);
            // Woken between the two, it does not fall asleep. Woken as its time is over, it does not the next time that it parks, wherever that
            // is: so nothing may depend on how long a park lasts.
            match left {
                Some(left) => thread::park_timeout(left),
                None => thread::park(),
            }
            state = self.lock();
            // Nobody has woken it: its time is over, or it woke for no reason.
            state.sleepers.retain(|sleeper| sleeper.id() != id);
        }
        let count = max.min(state.items.len());
        into.extend(state.items.drain(..count));
        Taken::Some
    }

    /// Refuses whatever comes from now on.
    pub(crate) fn close(&self) {
        let sleepers = {
            let mut state = self.lock();
            state.closed = true;
            std::mem::take(&mut state.sleepers)
        };
        sleepers.iter().for_each(Thread::unpark);
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

    /// Three threads, each of which falls asleep after the one before it, are given one item after the other.
    #[test]
    fn who_fell_asleep_last_is_woken() {
        let queue = Queue::new(1);
        let asleep = |count| {
            while queue.lock().sleepers.len() != count {
                thread::yield_now();
            }
        };
        let (tell, told) = std::sync::mpsc::channel();
        let woken: Vec<Option<usize>> = thread::scope(|scope| {
            for number in 0..3 {
                let (queue, tell) = (&queue, tell.clone());
                scope.spawn(move || {
                    let mut taken = VecDeque::new();
                    while queue.take(1, &mut taken) {
                        taken.clear();
                        tell.send(number).unwrap();
                    }
                });
                asleep(number + 1);
            }
            let one = |()| {
                queue.push(()).ok()?;
                let woken = told.recv_timeout(Duration::from_secs(20)).ok()?;
                asleep(3);
                Some(woken)
            };
            let woken = std::iter::repeat_n((), 10).map(one).collect();
            queue.close();
            woken
        });
        assert_eq!(woken, [Some(2); 10]);
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

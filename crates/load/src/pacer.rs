//! The pulse of an open loop: a thread that sleeps until something is due and then wakes the thread that sends.
//!
//! The runtime's own timers are exact to a millisecond, which is as long as a purchase takes.

use std::io;
use std::sync::Arc;
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use tokio::sync::Notify;

use crate::schedule::Schedule;

/// What is due within so long of each other is sent together: waking a thread costs microseconds.
const TOGETHER: Duration = Duration::from_micros(100);

/// Stops when it is dropped.
pub(crate) struct Pacer {
    ticks: Arc<Notify>,
    stop: Option<Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Pacer {
    /// Starts one for this schedule.
    ///
    /// # Errors
    /// When the system gives no thread.
    pub(crate) fn start(mut schedule: Schedule) -> io::Result<Pacer> {
        let (stop, stopped) = channel::<()>();
        let ticks = Arc::new(Notify::new());
        let told = Arc::clone(&ticks);
        let thread = thread::Builder::new().name("pacer".to_owned()).spawn(move || {
            let mut last = Instant::now();
            while let Some(due) = schedule.next_due() {
                let wait = due.max(last + TOGETHER).saturating_duration_since(Instant::now());
                match stopped.recv_timeout(wait) {
                    Err(RecvTimeoutError::Timeout) => {}
                    Ok(()) | Err(RecvTimeoutError::Disconnected) => return,
                }
                last = Instant::now();
                while schedule.take(last).is_some() {}
                told.notify_one();
            }
        })?;
        Ok(Pacer { ticks, stop: Some(stop), thread: Some(thread) })
    }

    /// Notified when something is due.
    pub(crate) fn ticks(&self) -> Arc<Notify> {
        Arc::clone(&self.ticks)
    }
}

impl Drop for Pacer {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            // It cannot panic.
            let _ = thread.join();
        }
    }
}

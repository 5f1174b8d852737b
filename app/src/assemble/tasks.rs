//! Tasks that stop together, and a word to whoever watches when one of them dies.

use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

/// Tasks that stop together. One that ends before it is told to has died.
pub(super) struct Tasks {
    /// Tells them to stop.
    pub stop: CancellationToken,
    tracker: TaskTracker,
    died: mpsc::Sender<&'static str>,
}

impl Tasks {
    /// No task yet; `died` hears of those that die.
    pub(super) fn new(died: mpsc::Sender<&'static str>) -> Tasks {
        Tasks { stop: CancellationToken::new(), tracker: TaskTracker::new(), died }
    }

    /// Starts one.
    pub(super) fn spawn(&self, name: &'static str, task: impl Future<Output = ()> + Send + 'static) {
        let (stop, died) = (self.stop.clone(), self.died.clone());
        let task = tokio::spawn(task);
        self.tracker.spawn(async move {
            let ended = task.await;
            if ended.is_err() || !stop.is_cancelled() {
                // Full or closed: somebody has been told already.
                let _ = died.try_send(name);
            }
        });
    }

    /// Tells them to stop and waits until all have.
    pub(super) async fn stop(&self) {
        self.stop.cancel();
        self.tracker.close();
        self.tracker.wait().await;
    }
}

//! Keeps what the bus needs on the servers: what was deleted, or lost with a server, is made again.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use futures_util::future::join_all;
use tokio::time::{Instant, sleep};

use super::Shared;
use super::queue::To;
use super::topology::{self, Existing, Trouble};

/// How soon it is tried again when something could not be made, or found.
const AGAIN: Duration = Duration::from_millis(200);

/// Looks now and then, at once when somebody is in doubt or a connection was made, and soon again after trouble.
pub(super) async fn run(shared: Arc<Shared>) {
    let mut connections = shared.link.connections();
    let mut pause = shared.settings.check_interval;
    while !shared.is_closed.load(Ordering::Relaxed) {
        tokio::select! {
            () = sleep(pause) => {}
            () = shared.in_doubt.notified() => {}
            _ = connections.changed() => {}
        }
        if !shared.link.is_up() {
            continue;
        }
        let looking = shared.streams().into_iter().map(|stream| shared.ensure_as(stream, Existing::Leave));
        let found = join_all(looking).await;
        let troubles: Vec<_> =
            found.into_iter().filter_map(Result::err).map(|trouble| trouble.to_string()).collect();
        pause = match troubles.first() {
            None => shared.settings.check_interval,
            Some(first) => {
                tracing::warn!(
                    streams = troubles.len(),
                    first,
                    "streams are not there, or not as they should be"
                );
                AGAIN
            }
        };
    }
}

impl Shared {
    /// Makes a stream, and the consumer of a queue, if they are not there. Who asks while another does takes the other's answer, if it
    /// began to look after the question.
    pub(super) async fn ensure_as(&self, stream: To<'_>, existing: Existing) -> Result<(), Trouble> {
        let jetstream = &self.link.jetstream;
        let queue = match stream {
            To::Queue(queue) => queue,
            To::Letters(plan) => return topology::ensure_stream(jetstream, plan, existing).await.map(drop),
        };
        let asked = Instant::now();
        let mut checked = queue.checked.lock().await;
        if checked.is_some_and(|began| began >= asked) {
            return Ok(());
        }
        let began = Instant::now();
        let is_there = match queue.consumer() {
            Some(consumer) => topology::has_consumer(jetstream, &queue.plan, &consumer).await?,
            None => false,
        };
        if !is_there {
            let made = topology::ensure_stream(jetstream, &queue.plan, existing).await?;
            let consumer = topology::ensure_consumer(jetstream, &queue.plan, made, &self.settings).await?;
            queue.has_consumer(&consumer);
        }
        *checked = Some(began);
        Ok(())
    }

    /// All streams of the bus.
    pub(super) fn streams(&self) -> Vec<To<'_>> {
        let queues = self.queues.values().map(|queue| To::Queue(queue));
        queues.chain(self.letters.iter().map(To::Letters)).collect()
    }
}

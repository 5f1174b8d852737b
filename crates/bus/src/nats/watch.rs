//! Keeps what the bus needs on the servers: what was deleted, or lost with a server, is made again.
//!
//! A stream that is kept on one server only is away when that server is, and may never come back. It can be given up without asking
//! whether it would: what was in it is published again by those who keep it in their databases, and its server, should it return, is
//! told by the others that the stream is theirs now. It takes the majority of the servers to agree, so whoever is cut off from
//! it gives up nothing.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use futures_util::future::join_all;
use tokio::time::{Instant, sleep, timeout};

use super::Shared;
use super::queue::To;
use super::topology::{self, Existing, Trouble};

/// How soon it is tried again when something could not be made, or found.
const AGAIN: Duration = Duration::from_millis(200);

/// How long one look at a stream may take. A cluster that has no leader yet answers nothing, and who asked it then would wait in vain
/// for longer than it takes to elect one. What one look has begun the next one finds.
const LOOK_FOR: Duration = Duration::from_secs(2);

/// Looks now and then, at once when somebody is in doubt or a connection was made, and soon again after trouble.
pub(super) async fn run(shared: Arc<Shared>) {
    let mut connections = shared.link.connections();
    let mut pause = shared.settings.check_interval;
    let mut silent_since: HashMap<String, Instant> = HashMap::new();
    while !shared.is_closed.load(Ordering::Relaxed) {
        tokio::select! {
            () = sleep(pause) => {}
            () = shared.in_doubt.notified() => {}
            _ = connections.changed() => {}
        }
        if !shared.link.is_up() {
            continue;
        }
        let began = Instant::now();
        let streams = shared.streams();
        let found = join_all(streams.iter().map(|stream| shared.look_at(*stream, Existing::Leave))).await;
        if shared.is_closed.load(Ordering::Relaxed) {
            return;
        }
        for (stream, found) in streams.iter().zip(&found) {
            let name = stream.plan().name();
            if !matches!(found, Err(Trouble::Unanswered(_))) {
                silent_since.remove(name);
                continue;
            }
            let since = *silent_since.entry(name.to_owned()).or_insert(began);
            if shared.may_abandon(*stream, since) {
                shared.abandon(*stream).await;
                silent_since.remove(name);
            }
        }
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

    /// [`Shared::ensure_as`], but not for long.
    pub(super) async fn look_at(&self, stream: To<'_>, existing: Existing) -> Result<(), Trouble> {
        let looked = timeout(LOOK_FOR, self.ensure_as(stream, existing)).await;
        looked.unwrap_or_else(|_| Err(Trouble::Unanswered(format!("no answer within {LOOK_FOR:?}"))))
    }

    /// Whether a stream that has not answered since then may be made anew elsewhere.
    pub(super) fn may_abandon(&self, stream: To<'_>, silent_since: Instant) -> bool {
        let is_queue = matches!(stream, To::Queue(_));
        let kept_once = stream.plan().stream.num_replicas == 1 && self.settings.servers.len() > 1;
        is_queue && kept_once && silent_since.elapsed() >= self.settings.abandon_after
    }

    /// Has the servers forget a stream, so that the next look makes it anew. The server that would confirm it may be the one that is away,
    /// so no answer is expected.
    pub(super) async fn abandon(&self, stream: To<'_>) {
        let name = stream.plan().name();
        let answer = topology::delete_stream(&self.link.jetstream, stream.plan()).await;
        tracing::warn!(stream = name, ?answer, "a stream did not answer and was given up");
    }

    /// All streams of the bus.
    pub(super) fn streams(&self) -> Vec<To<'_>> {
        let queues = self.queues.values().map(|queue| To::Queue(queue));
        queues.chain(self.letters.iter().map(To::Letters)).collect()
    }
}

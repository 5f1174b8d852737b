//! How news travel from replica to replica: whatever waits leaves as one message, and each replica reads the messages of all.
//!
//! The feed may lose, delay, repeat and reorder messages, and may be away for long: ends are in the database, and the live
//! view finds out what it has missed. So nothing here waits for room, and nothing is tried twice.

use std::collections::VecDeque;

use bytes::Bytes;
use cache::Redis;
use cache::redis::{Begin, Follower};
use telemetry::spans::{self, Current, within};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use crate::live::Live;
use crate::metrics::FeedMetrics;
use crate::news::{self, ReplicaId};

/// Sections that wait to be sent at most: a second of a busy replica. What goes beyond is dropped.
const QUEUE_SECTIONS: usize = 1_024;
/// Sections that leave as one message at most.
const MESSAGE_SECTIONS: usize = 64;
/// A message is closed when it has grown to so many bytes.
const MESSAGE_BYTES: usize = 64 * 1024;

/// The stream in Redis.
const STREAM: &str = "purchase:news";
/// Messages that the stream keeps, about: some seconds of several busy replicas. Who is further behind has a hole, and finds out.
const KEEP_MESSAGES: u32 = 1_000;

/// The way between the replicas of the service. The set is closed.
pub enum Feed {
    /// There is none. Replicas that share a database then hear of each other's ends from it, a little later, and of
    /// nothing else.
    None,
    /// A stream in Redis. While Redis is away, it is as if there were none.
    Redis(Redis),
    /// Through the caller's hands, who may do to the messages what a network does.
    Channel {
        /// Takes what this replica tells.
        told: mpsc::Sender<Bytes>,
        /// Brings what the others tell, and may bring its own.
        heard: mpsc::Receiver<Bytes>,
    },
}

/// Where what this replica has to tell is put.
#[derive(Clone)]
pub(crate) struct Outgoing(Option<(mpsc::Sender<Waiting>, FeedMetrics)>);

/// A section that waits to be sent, and for which recorded purchases it was told.
type Waiting = (Bytes, Option<Current>);

impl std::fmt::Debug for Outgoing {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(if self.0.is_some() { "Outgoing" } else { "Outgoing(nobody)" })
    }
}

impl Outgoing {
    /// Nobody is told, and nothing is written for it.
    pub(crate) fn nobody() -> Outgoing {
        Outgoing(None)
    }

    /// Tells the other replicas, unless more waits than may.
    pub(crate) fn tell(&self, section: impl FnOnce() -> Bytes) {
        let Some((queue, metrics)) = &self.0 else { return };
        if queue.try_send((section(), spans::current())).is_err() {
            metrics.dropped();
        }
    }
}

/// A replica's end of a feed.
pub(crate) struct Ends {
    pub(crate) outgoing: Outgoing,
    /// Sends what is told. It ends when the last handle to [`Outgoing`] is dropped.
    pub(crate) sending: Sending,
    pub(crate) hearing: Hearing,
}

/// What sends.
pub(crate) struct Sending {
    queue: mpsc::Receiver<Waiting>,
    to: Sink,
    own: ReplicaId,
    metrics: FeedMetrics,
}

/// What hears.
pub(crate) struct Hearing {
    from: Source,
    own: ReplicaId,
    metrics: FeedMetrics,
}

enum Sink {
    Redis(Redis),
    Channel(mpsc::Sender<Bytes>),
}

enum Source {
    /// What follows the stream, and what it has read and was not heard yet.
    Redis(Follower, VecDeque<Bytes>),
    Channel(mpsc::Receiver<Bytes>),
}

impl Feed {
    /// This replica's end, if there is a feed. Must be called on a tokio runtime.
    pub(crate) fn open(self, own: ReplicaId, metrics: &FeedMetrics) -> Option<Ends> {
        let (to, from) = match self {
            Feed::None => return None,
            Feed::Redis(redis) => {
                let follower = redis.follow(STREAM, Begin::Now);
                (Sink::Redis(redis), Source::Redis(follower, VecDeque::new()))
            }
            Feed::Channel { told, heard } => (Sink::Channel(told), Source::Channel(heard)),
        };
        let (sender, queue) = mpsc::channel(QUEUE_SECTIONS);
        Some(Ends {
            outgoing: Outgoing(Some((sender, metrics.clone()))),
            sending: Sending { queue, to, own, metrics: metrics.clone() },
            hearing: Hearing { from, own, metrics: metrics.clone() },
        })
    }
}

impl Sending {
    pub(crate) async fn run(mut self) {
        let mut waiting: Vec<Waiting> = Vec::with_capacity(MESSAGE_SECTIONS);
        while self.queue.recv_many(&mut waiting, MESSAGE_SECTIONS).await > 0 {
            let traced = Current::join(waiting.iter_mut().filter_map(|(_, of)| of.take()));
            let sections: Vec<Bytes> = waiting.drain(..).map(|(section, _)| section).collect();
            for message in messages(self.own, &sections) {
                if within(traced.clone(), self.to.send(message)).await {
                    self.metrics.sent();
                } else {
                    self.metrics.dropped();
                }
            }
        }
    }
}

/// As few messages as their bound allows.
fn messages(own: ReplicaId, sections: &[Bytes]) -> Vec<Bytes> {
    let (mut messages, mut begin, mut bytes) = (Vec::new(), 0, 0);
    for (place, section) in sections.iter().enumerate() {
        bytes += section.len();
        if bytes >= MESSAGE_BYTES || place + 1 == sections.len() {
            messages.push(news::message(own, &sections[begin..=place]));
            (begin, bytes) = (place + 1, 0);
        }
    }
    messages
}

impl Sink {
    /// Whether it was sent. A Redis that is away refuses at once.
    async fn send(&mut self, message: Bytes) -> bool {
        match self {
            Sink::Redis(redis) => {
                let appended = redis.append(STREAM, &message, KEEP_MESSAGES).await;
                appended.inspect_err(|unanswered| tracing::debug!(%unanswered, "news are lost")).is_ok()
            }
            Sink::Channel(told) => told.try_send(message).is_ok(),
        }
    }
}

impl Hearing {
    /// Runs until `stop`.
    pub(crate) async fn run(mut self, live: Live, stop: CancellationToken) {
        let _ = stop.clone().run_until_cancelled(self.hear_all(live)).await;
        // A feed that has ended has nothing more to say; the service goes on.
        stop.cancelled().await;
    }

    async fn hear_all(&mut self, live: Live) {
        while let Some(message) = self.from.next().await {
            match news::read(message, self.own) {
                Ok(None) => {}
                Ok(Some(sections)) => {
                    self.metrics.heard();
                    if live.heard(sections).await.is_err() {
                        return;
                    }
                }
                Err(no_news) => {
                    tracing::debug!(%no_news, "news were not understood");
                    self.metrics.dropped();
                }
            }
        }
    }
}

impl Source {
    /// The next message; none when there will be no more.
    async fn next(&mut self) -> Option<Bytes> {
        match self {
            Source::Redis(follower, read) => loop {
                if let Some(message) = read.pop_front() {
                    return Some(message);
                }
                match follower.next().await {
                    Ok(entries) => read.extend(entries.into_iter().map(|entry| entry.bytes)),
                    Err(unanswered) => tracing::debug!(%unanswered, "news are missed"),
                }
            },
            Source::Channel(heard) => heard.recv().await,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_waits_leaves_as_few_messages() {
        let (small, large) = (Bytes::from(vec![0; 10]), Bytes::from(vec![0; MESSAGE_BYTES]));
        let lengths = |sections: &[&Bytes]| {
            let sections: Vec<Bytes> = sections.iter().map(|section| (*section).clone()).collect();
            messages(ReplicaId(1), &sections).iter().map(|message| message.len() - 9).collect::<Vec<_>>()
        };
        assert_eq!(lengths(&[]), [0; 0]);
        assert_eq!(lengths(&[&small, &small, &small]), [30]);
        assert_eq!(
            lengths(&[&small, &large, &large, &small]),
            [10 + MESSAGE_BYTES, MESSAGE_BYTES, 10],
            "a section is not cut"
        );
    }
}

//! Publishing: one message, its acknowledgement, and what may come in between.

use std::time::Duration;

use async_nats::jetstream::context::PublishErrorKind;
use async_nats::jetstream::message::PublishMessage;
use async_nats::jetstream::publish::PublishAck;
use async_nats::jetstream::{self, ErrorCode};
use bytes::Bytes;
use tokio::time::{Instant, sleep_until, timeout_at};

use super::Shared;
use super::queue::To;
use super::topology::Existing;
use crate::{PublishError, Subject};

/// The pause before a message is sent again whose stream is not there or has no leader.
const PAUSE: Duration = Duration::from_millis(50);

/// Why a message was not taken.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum NotSent {
    /// There is no room.
    Full,
    /// It certainly was not taken.
    Unavailable,
    /// It may have been taken.
    Unconfirmed,
}

impl NotSent {
    pub(super) fn on(self, subject: Subject, capacity_envelopes: usize) -> PublishError {
        match self {
            NotSent::Full => PublishError::Full { subject, capacity_envelopes },
            NotSent::Unavailable => PublishError::Unavailable { subject },
            NotSent::Unconfirmed => PublishError::Unconfirmed { subject },
        }
    }

    /// What became of a frame of which one part met this and another that.
    pub(super) fn and(one: Result<(), NotSent>, other: Result<(), NotSent>) -> Result<(), NotSent> {
        if one == other { one } else { Err(NotSent::Unconfirmed) }
    }
}

/// What the servers said to one attempt.
enum Answer {
    Taken(PublishAck),
    /// Nobody is there to take it, at the moment.
    Nobody,
    Full,
    /// It was not taken, for a reason that is not known here.
    Refused(String),
    /// There is no answer.
    Silence,
}

impl Shared {
    /// Sends a message to a stream and waits for the acknowledgement, for a bounded time.
    ///
    /// All attempts have one message id, so the servers take it once, also when an attempt was taken and its answer lost. Another call with
    /// the same content has another id: it is sent because somebody wants it to be delivered again.
    pub(super) async fn send(&self, to: To<'_>, payload: Bytes) -> Result<PublishAck, NotSent> {
        let deadline = Instant::now() + self.settings.publish_timeout;
        let id = self.link.message_id();
        let mut connections = self.link.connections();
        let mut not_sent = NotSent::Unavailable;
        loop {
            if !self.link.is_up() && not_sent == NotSent::Unavailable {
                return Err(not_sent);
            }
            connections.mark_unchanged();
            let message = PublishMessage::build().payload(payload.clone()).message_id(&id);
            let sending = self.link.jetstream.send_publish(to.plan().address.clone(), message);
            let Ok(Ok(acknowledgement)) = timeout_at(deadline, sending).await else {
                return Err(not_sent);
            };
            let answer = tokio::select! {
                answer = acknowledgement.into_future() => answer.map_or_else(|error| meaning(&error), Answer::Taken),
                // The answer would have come on the connection that is gone.
                _ = connections.changed() => {
                    not_sent = NotSent::Unconfirmed;
                    continue;
                }
                () = sleep_until(deadline) => Answer::Silence,
            };
            match answer {
                Answer::Taken(ack) => return Ok(ack),
                Answer::Full => return Err(NotSent::Full),
                Answer::Silence => return Err(NotSent::Unconfirmed),
                Answer::Refused(why) => {
                    tracing::warn!(address = to.plan().address, why, "a message was refused");
                    return Err(not_sent);
                }
                Answer::Nobody => {
                    let ensured = timeout_at(deadline, self.ensure_as(to, Existing::Leave)).await;
                    if !matches!(ensured, Ok(Ok(()))) {
                        let again = Instant::now() + PAUSE;
                        if again >= deadline {
                            return Err(not_sent);
                        }
                        sleep_until(again).await;
                    }
                }
            }
        }
    }
}

fn meaning(error: &jetstream::context::PublishError) -> Answer {
    let said = std::error::Error::source(error).and_then(|source| source.downcast_ref::<jetstream::Error>());
    match (error.kind(), said) {
        (PublishErrorKind::StreamNotFound, _) => Answer::Nobody,
        (PublishErrorKind::TimedOut, _) => Answer::Silence,
        (PublishErrorKind::Other, Some(said)) => match said.error_code() {
            ErrorCode::STREAM_STORE_FAILED
            | ErrorCode::INSUFFICIENT_RESOURCES
            | ErrorCode::STORAGE_RESOURCES_EXCEEDED
            | ErrorCode::MEMORY_RESOURCES_EXCEEDED
            | ErrorCode::ACCOUNT_RESOURCES_EXCEEDED => Answer::Full,
            _ if matches!(said.code(), 429 | 503) => Answer::Nobody,
            _ => Answer::Refused(said.to_string()),
        },
        _ => Answer::Refused(error.to_string()),
    }
}

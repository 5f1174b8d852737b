//! One subject of the bus: its stream, and what this process holds of it.

use std::sync::atomic::{AtomicBool, AtomicU64};
use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::watch;
use tokio::time::Instant;

use super::held::Held;
use super::topology::Plan;
use crate::Subject;

#[derive(Debug)]
pub(super) struct Queue {
    pub(super) subject: Subject,
    pub(super) plan: Plan,
    pub(super) held: Held,
    /// The stream's consumer, as far as is known. Another stream of the same name has another.
    consumer: Mutex<Option<Arc<str>>>,
    /// When the last comparison with the servers began that found all in order. One at a time.
    pub(super) checked: tokio::sync::Mutex<Option<Instant>>,
    /// Somebody brings frames.
    pub(super) is_pulled: AtomicBool,
    /// Nothing is asked of the servers any more, and nothing that was asked for can still come.
    pub(super) drained: watch::Sender<bool>,
    /// Envelopes that the servers took.
    pub(super) published: AtomicU64,
    /// Envelopes in frames that were not taken.
    pub(super) refused: AtomicU64,
}

/// One of a bus's streams.
#[derive(Clone, Copy, Debug)]
pub(super) enum To<'a> {
    Queue(&'a Queue),
    /// That of the dead letters.
    Letters(&'a Plan),
}

impl<'a> To<'a> {
    pub(super) fn plan(self) -> &'a Plan {
        match self {
            To::Queue(queue) => &queue.plan,
            To::Letters(plan) => plan,
        }
    }
}

impl Queue {
    pub(super) fn new(subject: Subject, plan: Plan) -> Queue {
        Queue {
            subject,
            plan,
            held: Held::new(),
            consumer: Mutex::new(None),
            checked: tokio::sync::Mutex::new(None),
            is_pulled: AtomicBool::new(false),
            drained: watch::Sender::new(false),
            published: AtomicU64::new(0),
            refused: AtomicU64::new(0),
        }
    }

    /// The name of the stream's consumer.
    pub(super) fn consumer(&self) -> Option<Arc<str>> {
        self.consumer.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Takes note of the consumer. With another one, all that was held is forgotten.
    pub(super) fn has_consumer(&self, name: &str) {
        let mut known = self.consumer.lock().unwrap_or_else(PoisonError::into_inner);
        if known.as_deref() == Some(name) {
            return;
        }
        let earlier = known.replace(name.into());
        drop(known);
        if earlier.is_some() {
            tracing::warn!(subject = %self.subject, "the servers have lost a stream, and what was in it");
            self.held.forget();
        }
    }
}

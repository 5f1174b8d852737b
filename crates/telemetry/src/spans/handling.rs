//! A batch of messages that are handled together: for each sampled one among them, what was done for it.
//!
//! A message's span has an id that follows from the message's own and from the `traceparent` that it carries, so whoever handles
//! it knows the span above without being told: spans nest from hop to hop, and what travels stays what it is. A saga that is
//! started again carries another one ([`Handling::carry`]). A message that is published twice, because nobody knows whether it
//! was taken, is the same message, and so is its span.

use std::time::SystemTime;

use super::{Current, Detail, ERROR_TYPE, Interval, Kind, Spans};
use crate::TraceContext;

/// What the handling of something is below of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cause {
    /// The span that the `traceparent` names.
    Span,
    /// The publication of this message.
    Message(u128),
}

/// What is handled together, as far as it is recorded; empty where nothing is, at the cost of a look at an `Option` for each.
#[derive(Debug)]
pub struct Handling {
    spans: Spans,
    began: Option<SystemTime>,
    messages: usize,
    /// In the order of their places.
    each: Vec<Handled>,
    outgoing: Vec<Outgoing>,
}

#[derive(Debug)]
struct Handled {
    place: usize,
    /// What its messages have in their `traceparent`.
    carried: TraceContext,
    context: TraceContext,
    parent: u64,
    details: Vec<(&'static str, Detail)>,
}

/// A message that one of them calls for and that was not published yet.
#[derive(Debug)]
struct Outgoing {
    carried: TraceContext,
    cause: u64,
    to: &'static str,
    id: u128,
}

impl Spans {
    /// A batch of so many messages, taken now.
    pub fn handle(&self, messages: usize) -> Handling {
        let (began, each, outgoing) = (self.clock(), Vec::new(), Vec::new());
        Handling { spans: self.clone(), began, messages, each, outgoing }
    }
}

impl Handling {
    /// Remembers the one at this place, if its trace is recorded. Places are added in their order.
    pub fn add(&mut self, place: usize, traceparent: &[u8], cause: Cause) {
        let Some(saga) = self.spans.sampled(traceparent) else { return };
        let parent = match cause {
            Cause::Span => saga.span_id(),
            Cause::Message(id) => span_of_message(&saga, id).span_id(),
        };
        let mut details = Vec::new();
        if let Cause::Message(id) = cause {
            details.push(("messaging.message.id", message_id(id)));
        }
        let (carried, context) = (saga, saga.child(fastrand::fill));
        self.each.push(Handled { place, carried, context, parent, details });
    }

    /// The `traceparent` that the messages of the one at this place carry from now on, because they are to be told from earlier ones;
    /// none if it is not recorded: then theirs stands.
    pub fn carry(&mut self, place: usize) -> Option<String> {
        let index = self.find(place)?;
        let handled = &mut self.each[index];
        handled.carried = handled.context;
        Some(handled.carried.to_string())
    }

    /// Says more about the one at this place.
    pub fn detail(&mut self, place: usize, key: &'static str, detail: impl FnOnce() -> Detail) {
        if let Some(index) = self.find(place) {
            self.each[index].details.push((key, detail()));
        }
    }

    /// Remembers that the one at this place calls for this message.
    pub fn calls_for(&mut self, place: usize, to: &'static str, id: u128) {
        if let Some(index) = self.find(place) {
            let Handled { carried, context, .. } = &self.each[index];
            let (carried, cause) = (*carried, context.span_id());
            self.outgoing.push(Outgoing { carried, cause, to, id });
        }
    }

    /// Whether the one at this place is recorded.
    pub fn records(&self, place: usize) -> bool {
        self.find(place).is_some()
    }

    fn find(&self, place: usize) -> Option<usize> {
        // Nearly always empty, and otherwise nearly always the last.
        match self.each.last()?.place == place {
            true => Some(self.each.len() - 1),
            false => self.each.binary_search_by_key(&place, |handled| handled.place).ok(),
        }
    }

    /// Those that are recorded, for what is done for all of them; none if none is.
    pub fn current(&self) -> Option<Current> {
        if self.each.is_empty() {
            return None;
        }
        Current::new(&self.spans, self.each.iter().map(|handled| handled.context).collect())
    }

    /// Now, if anything is waiting to be published.
    pub fn publishing(&self) -> Option<SystemTime> {
        if self.outgoing.is_empty() { None } else { self.spans.clock() }
    }

    /// Records that what they call for there was published since `began`, in one frame of so many messages. What was refused comes
    /// again with its cause, and is forgotten.
    pub fn published(&mut self, to: &'static str, began: Option<SystemTime>, messages: usize, taken: bool) {
        let Some(began) = began else { return };
        let interval = Interval::since(began);
        self.outgoing.retain(|outgoing| {
            if outgoing.to == to && taken {
                let context = span_of_message(&outgoing.carried, outgoing.id);
                let details = [
                    ("messaging.destination.name", Detail::Name(to)),
                    ("messaging.operation.name", Detail::Name("publish")),
                    ("messaging.operation.type", Detail::Name("send")),
                    ("messaging.message.id", message_id(outgoing.id)),
                    ("messaging.batch.message_count", Detail::Count(messages as u64)),
                ];
                let (parent, name) = (Some(outgoing.cause), format!("publish {to}"));
                self.spans.record(&context, parent, Kind::Producer, name, interval, &details);
            }
            outgoing.to != to
        });
    }

    /// Records them as messages of this queue that have been handled.
    pub fn end_of(self, queue: &'static str) {
        if self.each.is_empty() {
            return;
        }
        let common = [
            ("messaging.destination.name", Detail::Name(queue)),
            ("messaging.operation.name", Detail::Name("process")),
            ("messaging.operation.type", Detail::Name("process")),
        ];
        self.end(Kind::Consumer, &format!("process {queue}"), &common);
    }

    /// Records them as something that was done for each of them.
    pub fn end(self, kind: Kind, name: &str, common: &[(&'static str, Detail)]) {
        let Handling { spans, began: Some(began), messages, each, .. } = self else { return };
        let interval = Interval::since(began);
        for Handled { context, parent, mut details, .. } in each {
            details.extend_from_slice(common);
            details.push(("messaging.batch.message_count", Detail::Count(messages as u64)));
            spans.record(&context, Some(parent), kind, name.to_owned(), interval, &details);
        }
    }

    /// What was to be done for all of them failed.
    pub fn failed(&mut self, why: &'static str) {
        for handled in &mut self.each {
            handled.details.push((ERROR_TYPE, Detail::Name(why)));
        }
    }
}

/// As the log writes it: the saga, and which of its messages.
fn message_id(id: u128) -> Detail {
    Detail::Text(format!("{}.{:x}", (id >> 64) as u64, id as u64))
}

/// Where the publication of a message is in the trace that it carries: a function of both, so that all agree.
fn span_of_message(carried: &TraceContext, id: u128) -> TraceContext {
    let (trace, span) = (carried.trace_id(), carried.span_id());
    let parts = [(trace >> 64) as u64, trace as u64, span, (id >> 64) as u64, id as u64];
    let mixed = parts.into_iter().fold(0, |mixed, part| mix(mixed ^ part));
    carried.child(|bytes| bytes.copy_from_slice(&mixed.to_be_bytes()))
}

/// The finisher of SplitMix64 (Steele, Lea and Flood, 2014): every bit of the result depends on every bit of the number.
fn mix(number: u64) -> u64 {
    let mut z = number.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_of_one_trace_have_spans_of_their_own_wherever_they_are_seen() {
        let trace = |span| TraceContext::new(7, span, true).unwrap();
        let ids: std::collections::HashSet<u64> = (0..1_000_u128)
            .flat_map(|saga| (0..10_u128).map(move |tag| saga << 64 | tag << 40))
            .map(|id| span_of_message(&trace(1), id).span_id())
            .collect();
        assert_eq!(ids.len(), 10_000);
        let own = span_of_message(&trace(1), 5);
        assert_eq!(own, span_of_message(&trace(1), 5), "whoever asks");
        for other in [TraceContext::new(8, 1, true).unwrap(), trace(2)] {
            assert_ne!(own.span_id(), span_of_message(&other, 5).span_id());
        }
    }

    #[test]
    fn where_nothing_is_recorded_nothing_is_remembered() {
        let mut handling = Spans::off().handle(3);
        handling.add(0, b"00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01", Cause::Message(1));
        handling.calls_for(0, "queue", 2);
        assert!(handling.current().is_none() && handling.publishing().is_none());
        assert!(handling.began.is_none() && handling.each.capacity() + handling.outgoing.capacity() == 0);
    }
}

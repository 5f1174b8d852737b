//! A request that is answered: the root of a trace, or below the caller's span.

use std::borrow::Cow;
use std::time::SystemTime;

use super::{Current, Detail, ERROR_TYPE, Interval, Kind, Spans};
use crate::TraceContext;

/// The header of W3C Trace Context.
pub const TRACEPARENT: &str = "traceparent";

/// A request that is answered here, from its beginning. If it is dropped before its end, its client has gone.
#[derive(Debug)]
pub struct Serving {
    spans: Spans,
    context: TraceContext,
    parent: Option<u64>,
    name: Cow<'static, str>,
    details: Vec<(&'static str, Detail)>,
    began: SystemTime,
    ended: bool,
}

impl Spans {
    /// A request that came with this `traceparent`, or without one. The caller's decision stands, whether to record the trace;
    /// without a caller that has decided, the trace begins here, and its id decides.
    ///
    /// None where there is nothing to record and nothing to tell to others: nothing is recorded at all, or the caller does not record,
    /// and its `traceparent` says so to whom it is passed on.
    pub fn serve<N: Into<Cow<'static, str>>>(
        &self,
        traceparent: Option<&[u8]>,
        name: impl FnOnce() -> N,
    ) -> Option<Serving> {
        let sink = self.0.as_ref()?;
        let caller = traceparent.and_then(|text| str::from_utf8(text).ok()?.parse::<TraceContext>().ok());
        let (context, parent) = match caller {
            Some(caller) if !caller.sampled() => return None,
            Some(caller) => (caller.child(fastrand::fill), Some(caller.span_id())),
            None => {
                let new = TraceContext::generate(fastrand::fill, false);
                (new.with_sampled(sink.sampler.picks(new.trace_id())), None)
            }
        };
        // Nobody wants to know more of one that is not recorded.
        let (name, began) = match context.sampled() {
            true => (name().into(), self.clock()?),
            false => (Cow::Borrowed(""), SystemTime::UNIX_EPOCH),
        };
        Some(Serving { spans: self.clone(), context, parent, name, details: Vec::new(), began, ended: false })
    }
}

impl Serving {
    /// Its position in its trace, recorded or not: what is asked of others for it has this in its `traceparent`, or what is below it.
    pub fn context(&self) -> &TraceContext {
        &self.context
    }

    /// The request, for what is done for it; none if it is not recorded.
    pub fn current(&self) -> Option<Current> {
        let sampled = self.context.sampled();
        sampled.then(|| Current::new(&self.spans, vec![self.context])).flatten()
    }

    /// Says more about it.
    pub fn say(&mut self, details: impl IntoIterator<Item = (&'static str, Detail)>) {
        self.details.extend(details);
    }

    /// Records it.
    pub fn end(mut self) {
        self.record();
    }

    fn record(&mut self) {
        self.ended = true;
        if self.context.sampled() {
            let (interval, name) = (Interval::since(self.began), std::mem::take(&mut self.name));
            self.spans.record(&self.context, self.parent, Kind::Server, name, interval, &self.details);
        }
    }
}

impl Drop for Serving {
    /// What is below it was recorded, so it must be there.
    fn drop(&mut self) {
        if !self.ended && self.context.sampled() {
            self.say([(ERROR_TYPE, Detail::Name("cancelled"))]);
            self.record();
        }
    }
}

//! On whose behalf the code works that runs now: one request, or the sampled sagas of a batch.
//!
//! Whoever asks a server something ([`step`]) need not know. Where nothing is recorded nobody is set, so a step that is not
//! recorded costs one look at a variable of the task: no clock is read, nothing is allocated.

use std::borrow::Cow;
use std::collections::HashSet;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::SystemTime;

use pin_project_lite::pin_project;

use super::{Detail, ERROR_TYPE, Interval, Kind, Spans};
use crate::TraceContext;

tokio::task_local! {
    static CURRENT: Current;
}

/// The positions, at least one, that the running code works for. Cloning is cheap.
#[derive(Clone, Debug)]
pub struct Current(Arc<Positions>);

#[derive(Debug)]
struct Positions {
    spans: Spans,
    all: Vec<TraceContext>,
}

/// For whom the running code works; none where nothing is recorded.
pub fn current() -> Option<Current> {
    CURRENT.try_with(Clone::clone).ok()
}

impl Current {
    /// These positions; none if there are none. They are sampled.
    pub fn new(spans: &Spans, positions: Vec<TraceContext>) -> Option<Current> {
        (!positions.is_empty()).then(|| Current(Arc::new(Positions { spans: spans.clone(), all: positions })))
    }

    /// The first position: of a request, the only one.
    pub fn first(&self) -> TraceContext {
        self.0.all[0]
    }

    /// All of several, for what is done for all of them at once. What they do not share, the place of recording, is the first's.
    pub fn join(several: impl IntoIterator<Item = Current>) -> Option<Current> {
        let mut several = several.into_iter();
        let first = several.next()?;
        let Some(second) = several.next() else { return Some(first) };
        let (mut all, mut known) = (Vec::new(), HashSet::new());
        for one in [&first, &second].into_iter().chain(&several.collect::<Vec<_>>()) {
            all.extend(one.0.all.iter().filter(|position| known.insert(position.span_id())));
        }
        Current::new(&first.0.spans, all)
    }

    /// Runs this on their behalf, on this thread.
    pub fn run<R>(&self, work: impl FnOnce() -> R) -> R {
        CURRENT.sync_scope(self.clone(), work)
    }

    fn begin(self, kind: Kind, name: Cow<'static, str>) -> Option<Step> {
        let began = self.0.spans.clock()?;
        let below: Vec<TraceContext> = self.0.all.iter().map(|one| one.child(fastrand::fill)).collect();
        let own = Current::new(&self.0.spans, below)?;
        Some(Step { above: self, own, kind, name, began, ended: false })
    }
}

/// Something that is done for whom the running code works, from its beginning. If it is dropped before its end, it was given up.
#[derive(Debug)]
pub struct Step {
    above: Current,
    own: Current,
    kind: Kind,
    name: Cow<'static, str>,
    began: SystemTime,
    ended: bool,
}

/// Begins a step; none where nothing is recorded, and then it needs no name.
pub fn step<N: Into<Cow<'static, str>>>(kind: Kind, name: impl FnOnce() -> N) -> Option<Step> {
    current()?.begin(kind, name().into())
}

impl Step {
    /// The step itself, for what is done below it.
    pub fn current(&self) -> Current {
        self.own.clone()
    }

    /// Records it: one span below each position, all of the same time.
    pub fn end(mut self, details: &[(&'static str, Detail)]) {
        self.record(details);
    }

    fn record(&mut self, details: &[(&'static str, Detail)]) {
        self.ended = true;
        let interval = Interval::since(self.began);
        for (above, own) in self.above.0.all.iter().zip(&self.own.0.all) {
            let (parent, name) = (Some(above.span_id()), self.name.clone());
            self.own.0.spans.record(own, parent, self.kind, name, interval, details);
        }
    }
}

impl Drop for Step {
    /// What is below it was recorded, so it must be there.
    fn drop(&mut self) {
        if !self.ended {
            self.record(&[(ERROR_TYPE, Detail::Name("cancelled"))]);
        }
    }
}

pin_project! {
    /// A future on behalf of somebody, see [`within`].
    #[derive(Debug)]
    pub struct Within<F> {
        of: Option<Current>,
        #[pin]
        work: F,
    }
}

/// Runs this on their behalf; as it is where nothing is recorded.
pub fn within<F>(of: Option<Current>, work: F) -> Within<F> {
    Within { of, work }
}

impl<F: Future> Future for Within<F> {
    type Output = F::Output;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<F::Output> {
        let this = self.project();
        match this.of {
            None => this.work.poll(cx),
            Some(of) => CURRENT.sync_scope(of.clone(), || this.work.poll(cx)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn nobody_is_set_unless_somebody_sets_it() {
        assert!(current().is_none());
        assert!(step(Kind::Client, || -> &str { panic!("nobody needs a name") }).is_none());
        within(None, async { assert!(current().is_none()) }).await;
    }

    #[tokio::test]
    async fn whoever_is_set_is_so_within_and_not_beside() {
        let one = TraceContext::new(1, 1, true).unwrap();
        let current_one = Current::new(&Spans::off(), vec![one]);
        let work = async {
            assert_eq!(current().unwrap().first(), one);
            tokio::task::yield_now().await;
            assert_eq!(current().unwrap().first(), one);
        };
        let (within, beside) = (within(current_one, work), async { assert!(current().is_none()) });
        tokio::join!(within, beside);
        assert!(current().is_none());
    }

    #[test]
    fn joined_are_all_of_several_each_once() {
        let of = |ids: &[u64]| {
            let all = ids.iter().map(|id| TraceContext::new(1, *id, true).unwrap()).collect();
            Current::new(&Spans::off(), all).unwrap()
        };
        assert!(Current::join([]).is_none());
        let joined = Current::join([of(&[1, 2]), of(&[2, 3]), of(&[4])]).unwrap();
        assert_eq!(joined.0.all.iter().map(TraceContext::span_id).collect::<Vec<_>>(), [1, 2, 3, 4]);
    }
}

//! The spans of one trace, as the tree that they must be.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use testkit::{Span, SpanKind};

/// One trace, its spans in the order of their beginnings.
#[derive(Debug)]
pub(crate) struct Tree(Vec<Span>);

impl Tree {
    /// The trace in which this purchase was accepted.
    pub(crate) fn of_purchase(spans: &[Span], purchase: &str) -> Result<Tree, String> {
        let accepted = spans.iter().find(|span| span.detail("saga.id") == purchase);
        let accepted = accepted.ok_or_else(|| format!("no trace of purchase {purchase}"))?;
        let mut own: Vec<Span> = spans.iter().filter(|span| span.trace == accepted.trace).cloned().collect();
        own.sort_by_key(|span| span.times);
        Ok(Tree(own))
    }

    /// Whether it is a tree: one root, whatever is above that; every other span below one that is there and that began before; no span
    /// twice; each of the kind that its name says.
    pub(crate) fn check(&self) -> Result<(), String> {
        let by_id: BTreeMap<&str, &Span> = self.0.iter().map(|span| (span.id.as_str(), span)).collect();
        let wrong = |what: &str| Err(format!("{what}:\n{self}"));
        if by_id.len() != self.0.len() {
            return wrong("a span is there twice");
        }
        let above = |span: &Span| by_id.get(span.parent.as_deref()?).copied();
        if self.0.iter().filter(|span| above(span).is_none()).count() != 1 {
            return wrong("not one root");
        }
        for span in &self.0 {
            if span.times.1 < span.times.0 || above(span).is_some_and(|above| above.times.0 > span.times.0) {
                return wrong(&format!(
                    "{} begins before what is above it, or ends before it begins",
                    span.id
                ));
            }
            if span.kind != kind(span, above(span)) {
                return wrong(&format!("{} is of the wrong kind", span.id));
            }
        }
        Ok(())
    }

    /// Whether these spans, each as `service/name`, are there one below the other, the first one at the root.
    pub(crate) fn has(&self, path: &[&str]) -> Result<(), String> {
        let mut level: BTreeSet<&str> = BTreeSet::new();
        for (depth, label) in path.iter().enumerate() {
            let below = |span: &&Span| {
                let placed = match depth {
                    0 => span.id == self.root().id,
                    _ => span.parent.as_deref().is_some_and(|parent| level.contains(parent)),
                };
                placed && self::label(span) == *label
            };
            level = self.0.iter().filter(below).map(|span| span.id.as_str()).collect();
            if level.is_empty() {
                return Err(format!("no {label} at the end of {:?}:\n{self}", &path[..depth]));
            }
        }
        Ok(())
    }

    /// The span with nothing of this trace above it.
    pub(crate) fn root(&self) -> &Span {
        let ids = self.ids();
        let top = |span: &&Span| span.parent.as_deref().is_none_or(|id| !ids.contains(id));
        self.0.iter().find(top).unwrap_or(&self.0[0])
    }

    fn ids(&self) -> BTreeSet<&str> {
        self.0.iter().map(|span| span.id.as_str()).collect()
    }

    pub(crate) fn trace(&self) -> &str {
        &self.0[0].trace
    }

    pub(crate) fn spans(&self, service: &str, name: &str) -> Vec<&Span> {
        self.0.iter().filter(|span| span.service == service && span.name == name).collect()
    }

    /// The spans that say that something failed.
    pub(crate) fn failed(&self) -> Vec<&Span> {
        self.0.iter().filter(|span| span.failed).collect()
    }

    fn print(&self, f: &mut fmt::Formatter<'_>, parent: &Span, depth: usize) -> fmt::Result {
        let Span { kind, times, details, .. } = parent;
        let micros = (times.1.saturating_sub(times.0)) / 1_000;
        writeln!(f, "{}{} {kind:?} {micros} us {details:?}", "  ".repeat(depth), label(parent))?;
        let below = self.0.iter().filter(|span| span.parent.as_deref() == Some(&parent.id));
        below.into_iter().try_for_each(|span| self.print(f, span, depth + 1))
    }
}

fn label(span: &Span) -> String {
    format!("{}/{}", span.service, span.name)
}

fn kind(span: &Span, above: Option<&Span>) -> SpanKind {
    match span.name.split(' ').next().unwrap_or_default() {
        "publish" => SpanKind::Producer,
        "process" => SpanKind::Consumer,
        "accept" => SpanKind::Internal,
        "POST" if span.name.contains('/') => SpanKind::Server,
        // A call has the same name on both sides.
        call if call.contains('/') && above.is_some_and(|above| above.service != span.service) => {
            SpanKind::Server
        }
        _ => SpanKind::Client,
    }
}

impl fmt::Display for Tree {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ids = self.ids();
        let tops = self.0.iter().filter(|span| span.parent.as_deref().is_none_or(|id| !ids.contains(id)));
        tops.into_iter().try_for_each(|top| self.print(f, top, 0))
    }
}

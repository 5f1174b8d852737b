//! Spans of a request that passes: one for the gateway's client, and below it one for each replica that is tried.

use axum::extract::Request;
use http::StatusCode;
use http::header::{HeaderMap, HeaderName, HeaderValue};
use serve::edge::{of_answer, of_request};
use telemetry::TraceContext;
use telemetry::spans::{Current, Detail, ERROR_TYPE, Kind, Serving, Spans, Step, TRACEPARENT, step};

static NAME: HeaderName = HeaderName::from_static(TRACEPARENT);

/// A request of the client's. Whoever is asked for it learns of the decision whether it is recorded, if that was made here.
pub(crate) struct Traced(Option<Box<Serving>>);

impl Traced {
    /// Nothing but a look at an `Option` where nothing is recorded.
    pub(crate) fn begin(spans: &Spans, request: &mut Request, route: &str) -> Traced {
        if spans.is_off() {
            return Traced(None);
        }
        let method = request.method().clone();
        let given = request.headers().get(&NAME).map(HeaderValue::as_bytes);
        let serving = spans.serve(given, || format!("{method} {route}"));
        let Some(mut serving) = serving else { return Traced(None) };
        if !serving.context().sampled() {
            put(request.headers_mut(), serving.context());
            return Traced(None);
        }
        serving.say(of_request(method.as_str(), route));
        Traced(Some(Box::new(serving)))
    }

    /// The request, for what is done for it.
    pub(crate) fn current(&self) -> Option<Current> {
        self.0.as_ref()?.current()
    }

    /// The answer is on its way.
    pub(crate) fn end(self, status: StatusCode) {
        let Some(mut serving) = self.0 else { return };
        serving.say(of_answer(status));
        serving.end();
    }
}

/// One try of a request that is recorded; whoever answers it is below.
pub(crate) struct Try(Option<Step>);

impl Try {
    pub(crate) fn begin<B>(request: &mut http::Request<B>) -> Try {
        let step = step(Kind::Client, || request.method().to_string());
        if let Some(step) = &step {
            put(request.headers_mut(), &step.current().first());
        }
        Try(step)
    }

    /// It was answered with this status, or not at all.
    pub(crate) fn end(self, service: &'static str, status: Option<StatusCode>) {
        let Some(step) = self.0 else { return };
        let mut details = vec![("peer.service", Detail::Name(service))];
        match status {
            Some(status) => details.extend(of_answer(status)),
            None => details.push((ERROR_TYPE, Detail::Name("no answer"))),
        }
        step.end(&details);
    }
}

fn put(headers: &mut HeaderMap, context: &TraceContext) {
    if let Ok(value) = HeaderValue::try_from(context.to_string()) {
        headers.insert(NAME.clone(), value);
    }
}

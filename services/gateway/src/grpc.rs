//! A gRPC call on its way to a replica: HTTP/2 on both sides, and errors in gRPC's own form.

use std::pin::Pin;
use std::task::{Context, Poll};

use axum::body::{Body, Bytes, HttpBody};
use axum::extract::Request;
use axum::response::Response;
use http::header::{CONTENT_TYPE, TE};
use http::request::Parts;
use http::{HeaderName, HeaderValue, StatusCode, Version};
use hyper::body::{Frame, Incoming, SizeHint};
use serve::deadline;
use serve::extract::read_body;
use telemetry::spans::within;
use tokio::time::{Instant, timeout_at};

use crate::forward::{MAX_TRIES, Unanswered, client, customer, give_up, pick};
use crate::pool::{Failure, Place};
use crate::route::{self, GrpcRoute};
use crate::traced::{Traced, Try};
use crate::{Inner, headers};

const GRPC_STATUS: HeaderName = HeaderName::from_static("grpc-status");
const GRPC_MESSAGE: HeaderName = HeaderName::from_static("grpc-message");

/// Status codes of gRPC.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Status {
    DeadlineExceeded = 4,
    ResourceExhausted = 8,
    Unimplemented = 12,
    Unavailable = 14,
}

/// What a caller is told instead of an answer.
type Refused = (Status, &'static str);

/// Whether a request is a gRPC call.
pub(crate) fn is_call(request: &Request) -> bool {
    request.version() == Version::HTTP_2
        && request
            .headers()
            .get(CONTENT_TYPE)
            .is_some_and(|kind| kind.as_bytes().starts_with(b"application/grpc"))
}

impl Inner {
    pub(crate) async fn call(&self, mut request: Request) -> Response {
        let Some(route) = route::grpc(request.uri().path()) else {
            return refusal(Status::Unimplemented, "no such service");
        };
        let counted = self.requests.begin(route.label, request.method().as_str());
        let traced = Traced::begin(&self.spans, &mut request, route.label);
        let passed = within(traced.current(), self.pass_on_in_time(route, request)).await;
        let response = passed.unwrap_or_else(|(status, why)| refusal(status, why));
        traced.end(response.status());
        counted.finish(response.status().as_u16(), response.body().size_hint().exact());
        response
    }

    async fn pass_on_in_time(&self, route: GrpcRoute, request: Request) -> Result<Response, Refused> {
        // A time that is none is refused by the service.
        let Ok(Some(deadline)) = deadline::of(request.headers()) else {
            return self.pass_call_on(route, request, None).await;
        };
        if deadline <= Instant::now() {
            return Err((Status::DeadlineExceeded, deadline::EXCEEDED));
        }
        match timeout_at(deadline, self.pass_call_on(route, request, Some(deadline))).await {
            Ok(passed) => passed.map(|answer| answer.map(|body| deadline::bounded(body, deadline))),
            // That a caller has little time says nothing about the replica: it is not given up.
            Err(_) => {
                self.outcomes.0.count(Unanswered::Late.outcome());
                Err((Status::DeadlineExceeded, deadline::EXCEEDED))
            }
        }
    }

    async fn pass_call_on(
        &self,
        route: GrpcRoute,
        request: Request,
        deadline: Option<Instant>,
    ) -> Result<Response, Refused> {
        let (mut parts, body) = request.into_parts();
        let choice = customer(&parts);
        let (body, copy) = if route.reads {
            let bytes = read_body(&parts, body).await;
            let bytes =
                bytes.map_err(|_| (Status::ResourceExhausted, "the message could not be taken in"))?;
            (Body::from(bytes.clone()), Some(bytes))
        } else {
            (body, None)
        };
        prepare(&mut parts);
        let head = copy.is_some().then(|| parts.clone());
        let again = || Some(Request::from_parts(head.clone()?, Body::from(copy.clone()?)));
        let mut next = Some(Request::from_parts(parts, body));
        let (peers, mut tried) = (self.peers(route.service), Vec::new());
        let mut unanswered = Unanswered::Unavailable;
        for _ in 0..MAX_TRIES {
            let Some(replica) = pick(peers, choice, &tried) else { break };
            let Some(mut request) = next.take().or_else(again) else { break };
            tried.push(replica.address());
            if let Some(deadline) = deadline {
                deadline::put(request.headers_mut(), deadline);
            }
            let span = Try::begin(&mut request);
            let called = replica.link().send(request).await;
            span.end(route.service.name(), called.as_ref().ok().map(|(head, _)| head.status()));
            match called {
                Ok((response, place)) => {
                    replica.reached();
                    let (mut head, body) = response.into_parts();
                    headers::drop_hop_by_hop(&mut head.headers);
                    return Ok(Response::from_parts(head, Body::new(Kept { body, _place: place })));
                }
                Err(Failure::NotSent(unsent)) => {
                    give_up(&replica);
                    next = Some(*unsent);
                }
                Err(Failure::Lost) => unanswered = Unanswered::Lost,
                Err(Failure::Late) => {
                    give_up(&replica);
                    unanswered = Unanswered::Late;
                    break;
                }
            }
            self.outcomes.0.count("tried_again");
        }
        self.outcomes.0.count(unanswered.outcome());
        Err(match unanswered {
            Unanswered::Late => (Status::DeadlineExceeded, "the service did not answer in time"),
            Unanswered::Lost | Unanswered::Unavailable => {
                (Status::Unavailable, "the service is not available")
            }
        })
    }
}

/// An answer's messages and trailers, and its place on the connection that they come by.
struct Kept {
    body: Incoming,
    _place: Place,
}

impl HttpBody for Kept {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        Pin::new(&mut self.body).poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

fn prepare(parts: &mut Parts) {
    let client = client(parts);
    headers::request(parts, client);
    // gRPC asks for it; it says that trailers are understood.
    parts.headers.insert(TE, HeaderValue::from_static("trailers"));
}

/// An answer without a message: its status is in the head.
fn refusal(status: Status, why: &'static str) -> Response {
    let mut response = Response::new(Body::empty());
    *response.status_mut() = StatusCode::OK;
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
    headers.insert(GRPC_STATUS, HeaderValue::from(status as u16));
    headers.insert(GRPC_MESSAGE, HeaderValue::from_static(why));
    response
}

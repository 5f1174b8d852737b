//! A request of the HTTP API on its way to a replica, and the answer on its way back.

use std::net::{IpAddr, SocketAddr};

use axum::body::{Body, Bytes, HttpBody};
use axum::extract::{ConnectInfo, Request};
use axum::response::{IntoResponse, Response};
use http::header::{AUTHORIZATION, CONTENT_TYPE, HeaderMap, HeaderName};
use http::request::Parts;
use http::{Method, StatusCode};
use hyper::body::Incoming;
use peers::{Choice, Peers, Picked};
use serve::ApiError;
use serve::error::RETRY_AFTER_SECONDS;
use serve::extract::read_body;
use telemetry::spans::within;

use crate::answer::Answer;
use crate::pool::{Failure, Place, Pool};
use crate::route::{self, Service};
use crate::traced::{Traced, Try};
use crate::{Inner, headers};

/// How often a request is tried in all.
pub(crate) const MAX_TRIES: usize = 4;

const IDEMPOTENCY_KEY: HeaderName = HeaderName::from_static("idempotency-key");

/// Why a request got no answer from a replica.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Unanswered {
    /// It was not handled, or may be sent again.
    Unavailable,
    /// It may have been handled.
    Lost,
    /// It was sent, and no answer came in time.
    Late,
}

impl Unanswered {
    fn to_error(self, service: Service) -> ApiError {
        let name = service.name();
        match self {
            Unanswered::Unavailable => ApiError::unavailable(
                format!("the {name} service is not available, try again"),
                RETRY_AFTER_SECONDS,
            ),
            Unanswered::Lost => ApiError::new(
                StatusCode::BAD_GATEWAY,
                format!("the {name} service broke off; whether the request was handled is not known"),
            ),
            Unanswered::Late => ApiError::new(
                StatusCode::GATEWAY_TIMEOUT,
                format!(
                    "the {name} service did not answer in time; whether the request was handled is not known"
                ),
            ),
        }
    }

    pub(crate) fn outcome(self) -> &'static str {
        match self {
            Unanswered::Unavailable => "unavailable",
            Unanswered::Lost => "lost",
            Unanswered::Late => "late",
        }
    }
}

impl Inner {
    pub(crate) async fn forward(&self, mut request: Request) -> Response {
        let Some(route) = route::http(request.uri().path()) else {
            return ApiError::not_found("no such path").into_response();
        };
        let counted = self.requests.begin(route.label, request.method().as_str());
        let traced = Traced::begin(&self.spans, &mut request, route.label);
        let response = match within(traced.current(), self.pass_on(route.service, request)).await {
            Ok(response) => response,
            Err(error) => error.into_response(),
        };
        traced.end(response.status());
        counted.finish(response.status().as_u16(), response.body().size_hint().exact());
        response
    }

    async fn pass_on(&self, service: Service, request: Request) -> Result<Response, ApiError> {
        let (mut parts, body) = request.into_parts();
        let body = if body.is_end_stream() { Bytes::new() } else { read_body(&parts, body).await? };
        let choice = customer(&parts);
        let repeatable = is_repeatable(&parts);
        let client = client(&parts);
        headers::request(&mut parts, client);
        let outgoing = Request::from_parts(parts, body);
        match self.try_replicas(service, choice, outgoing, repeatable).await {
            Ok(sent) => Ok(self.answer(sent)),
            Err(unanswered) => {
                self.outcomes.0.count(unanswered.outcome());
                Err(unanswered.to_error(service))
            }
        }
    }

    async fn try_replicas(
        &self,
        service: Service,
        choice: Choice,
        outgoing: http::Request<Bytes>,
        repeatable: bool,
    ) -> Result<Sent, Unanswered> {
        let peers = self.peers(service);
        let copy = repeatable.then(|| outgoing.clone());
        let again = || Some(copy.clone()?.map(Body::from));
        let mut next = Some(outgoing.map(Body::from));
        let (mut tried, mut busy) = (Vec::new(), None);
        for _ in 0..MAX_TRIES {
            let Some(replica) = pick(peers, choice, &tried) else { break };
            let Some(mut outgoing) = next.take().or_else(again) else { break };
            let address = replica.address();
            let span = Try::begin(&mut outgoing);
            let sent = replica.link().send(outgoing).await;
            span.end(service.name(), sent.as_ref().ok().map(|(head, _)| head.status()));
            match sent {
                Ok((head, place)) => {
                    replica.reached();
                    let refused = head.status() == StatusCode::SERVICE_UNAVAILABLE;
                    let sent = Sent { head, place, replica };
                    if !refused || !repeatable || busy.is_some() {
                        return Ok(sent);
                    }
                    tried.push(address);
                    if peers.pick(choice, &tried).is_none() {
                        return Ok(sent);
                    }
                    busy = Some(sent);
                }
                Err(Failure::NotSent(outgoing)) => {
                    give_up(&replica);
                    tried.push(address);
                    next = Some(*outgoing);
                }
                Err(Failure::Lost) if !repeatable => return Err(Unanswered::Lost),
                Err(Failure::Lost) => {
                    tried.push(address);
                    if pick(peers, choice, &tried).is_none() {
                        tried.clear();
                    }
                }
                Err(Failure::Late) => {
                    give_up(&replica);
                    return Err(Unanswered::Late);
                }
            }
            self.outcomes.0.count("tried_again");
        }
        busy.ok_or(Unanswered::Unavailable)
    }

    fn answer(&self, sent: Sent) -> Response {
        let (mut head, body) = sent.head.into_parts();
        headers::drop_hop_by_hop(&mut head.headers);
        let stop = is_event_stream(&head.headers).then_some(&self.stop_streams);
        Response::from_parts(head, Answer::new(body, sent.place, sent.replica, stop).into_body())
    }
}

/// An answer's head, and where its body comes from.
struct Sent {
    head: http::Response<Incoming>,
    place: Place,
    replica: Picked<Pool>,
}

/// The replica to try next: one that can be reached, or else one that may be back.
pub(crate) fn pick(peers: &Peers<Pool>, choice: Choice, tried: &[SocketAddr]) -> Option<Picked<Pool>> {
    peers.pick(choice, tried).or_else(|| peers.pick_lost(choice, tried))
}

/// Leaves a replica out until it answers again.
pub(crate) fn give_up(replica: &Picked<Pool>) {
    replica.unreachable();
    replica.link().clear();
}

pub(crate) fn client(parts: &Parts) -> Option<IpAddr> {
    parts.extensions.get().map(|ConnectInfo(peer): &ConnectInfo<SocketAddr>| peer.ip())
}

/// What a request is assigned to a replica by: who asks, or where from.
pub(crate) fn customer(parts: &Parts) -> Choice {
    match parts.headers.get(AUTHORIZATION) {
        Some(value) => Choice::same_for(value.as_bytes()),
        None => Choice::same_for(client(parts)),
    }
}

/// Whether handling it twice is as good as once.
fn is_repeatable(parts: &Parts) -> bool {
    match parts.method {
        Method::GET | Method::HEAD => true,
        Method::POST => parts.uri.path() == "/api/purchase" && parts.headers.contains_key(IDEMPOTENCY_KEY),
        _ => false,
    }
}

fn is_event_stream(headers: &HeaderMap) -> bool {
    headers.get(CONTENT_TYPE).is_some_and(|kind| kind.as_bytes().starts_with(b"text/event-stream"))
}

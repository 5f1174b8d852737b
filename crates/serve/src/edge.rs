//! What stands around a router: limits, CORS, metrics, and errors in the API's own form.
//!
//! [`measured`] goes around each service's own routes, [`protected`] once around them all. What never
//! happens: a handler runs with a body above the limit or while too many others run; a request is refused
//! in any other form than `{"msg": ...}`; a raw path becomes a metric's label; a request that went well
//! writes a log line.

use std::any::Any;
use std::convert::Infallible;
use std::fmt;
use std::future::{Future, ready};
use std::panic::AssertUnwindSafe;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use axum::Router;
use axum::body::{Body, HttpBody};
use axum::extract::{MatchedPath, Request};
use axum::response::{IntoResponse, Response};
use futures_util::FutureExt;
use futures_util::future::CatchUnwind;
use http::header::{
    AUTHORIZATION, CONTENT_TYPE, EXPECT, HeaderMap, HeaderName, HeaderValue, REFERRER_POLICY, RETRY_AFTER,
    X_CONTENT_TYPE_OPTIONS, X_FRAME_OPTIONS,
};
use http::{Method, StatusCode};
use http_body_util::{BodyExt, Limited};
use pin_project_lite::pin_project;
use serde::{Deserialize, Serialize};
use telemetry::Spans;
use telemetry::metrics::{HttpMetrics, InFlight};
use telemetry::spans::{Detail, ERROR_TYPE, Serving, TRACEPARENT, Within, within};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tower::{Layer, Service};
use tower_http::cors::{AllowOrigin, Cors, CorsLayer};

use crate::error::{ApiError, RETRY_AFTER_SECONDS};

/// A refused body that is larger is not taken in, in bytes.
const MAX_DISCARDED_BYTES: u64 = 1024 * 1024;

/// How long a client that sends a refused body is listened to.
const DISCARD_FOR: Duration = Duration::from_secs(1);

/// How long a browser may remember the answer to a preflight.
const PREFLIGHT_MAX_AGE: Duration = Duration::from_secs(600);

/// The limits around a router.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct EdgeConfig {
    /// The largest request body, in bytes.
    pub body_limit_bytes: usize,
    /// How many requests are handled at once; further ones are answered 503 at once. A request counts
    /// until its answer's head is there, so that an open event stream does not count.
    pub max_in_flight_requests: usize,
    /// The origins (scheme, host, port) whose pages may call the API. None: no CORS headers at all.
    pub cors_allowed_origins: Vec<String>,
}

impl Default for EdgeConfig {
    fn default() -> EdgeConfig {
        EdgeConfig {
            body_limit_bytes: BodyLimit::default().bytes(),
            max_in_flight_requests: 4096,
            cors_allowed_origins: Vec::new(),
        }
    }
}

/// An entry of `cors_allowed_origins` that is no origin.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "cors_allowed_origins: {0:?} is not an origin; write scheme://host or scheme://host:port, without a path"
)]
pub struct InvalidOrigin(pub String);

/// The largest body, in bytes, for extractors that have to name it. A request that carries none has the default.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BodyLimit(usize);

impl BodyLimit {
    /// The limit in bytes.
    pub fn bytes(self) -> usize {
        self.0
    }
}

impl Default for BodyLimit {
    fn default() -> BodyLimit {
        BodyLimit(64 * 1024)
    }
}

/// Counts the router's requests by matched route, method and status, and records spans of those that are sampled.
pub fn measured(router: Router, metrics: HttpMetrics, spans: Spans) -> Router {
    router.layer(MeasureLayer { metrics: Some(metrics), spans })
}

/// Records spans of the router's gRPC calls that are sampled. Where none is, it is the router as it was.
pub fn traced_calls(router: Router, spans: Spans) -> Router {
    if spans.is_off() { router } else { router.layer(MeasureLayer { metrics: None, spans }) }
}

/// Not axum's `from_fn`: that costs every request two allocations more.
#[derive(Clone)]
struct MeasureLayer {
    /// None for gRPC, which is not counted here.
    metrics: Option<HttpMetrics>,
    spans: Spans,
}

impl<S> Layer<S> for MeasureLayer {
    type Service = Measure<S>;

    fn layer(&self, inner: S) -> Measure<S> {
        Measure { inner, metrics: self.metrics.clone(), spans: self.spans.clone() }
    }
}

#[derive(Clone)]
struct Measure<S> {
    inner: S,
    metrics: Option<HttpMetrics>,
    spans: Spans,
}

impl<S: Service<Request, Response = Response>> Service<Request> for Measure<S> {
    type Response = Response;
    type Error = S::Error;
    type Future = Measured<S::Future>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, request: Request) -> Measured<S::Future> {
        let matched = request.extensions().get::<MatchedPath>();
        let route = matched.map_or(telemetry::metrics::OTHER, MatchedPath::as_str);
        let method = request.method().as_str();
        let (counted, serving) = match &self.metrics {
            Some(metrics) => {
                let name = || format!("{method} {route}");
                (Some(metrics.begin(route, method)), serve(&self.spans, request.headers(), name))
            }
            None => {
                let name = || request.uri().path().trim_start_matches('/').to_owned();
                (None, serve(&self.spans, request.headers(), name))
            }
        };
        let serving = serving.map(|mut serving| {
            serving.say(match self.metrics {
                Some(_) => of_request(method, route),
                None => of_call(request.uri().path()),
            });
            Box::new(serving)
        });
        let current = serving.as_ref().and_then(|serving| serving.current());
        Measured { answer: within(current, self.inner.call(request)), counted, serving }
    }
}

/// The span of a request that is to be recorded.
fn serve(spans: &Spans, headers: &HeaderMap, name: impl FnOnce() -> String) -> Option<Serving> {
    if spans.is_off() {
        return None;
    }
    let traceparent = headers.get(TRACEPARENT).map(HeaderValue::as_bytes);
    spans.serve(traceparent, name).filter(|serving| serving.context().sampled())
}

/// What a request says about itself.
pub fn of_request(method: &str, route: &str) -> [(&'static str, Detail); 2] {
    let text = |text: &str| Detail::Text(text.to_owned());
    [("http.request.method", text(method)), ("http.route", text(route))]
}

fn of_call(path: &str) -> [(&'static str, Detail); 2] {
    let method = path.trim_start_matches('/').to_owned();
    [("rpc.system", Detail::Name("grpc")), ("rpc.method", Detail::Text(method))]
}

/// What an answer's status says about its request: the status, and whether the server failed.
pub fn of_answer(status: StatusCode) -> impl Iterator<Item = (&'static str, Detail)> {
    let code = ("http.response.status_code", Detail::Count(status.as_u16().into()));
    let failed = status.is_server_error().then(|| (ERROR_TYPE, Detail::Text(status.as_u16().to_string())));
    std::iter::once(code).chain(failed)
}

pin_project! {
    struct Measured<F> {
        #[pin]
        answer: Within<F>,
        counted: Option<InFlight>,
        serving: Option<Box<Serving>>,
    }
}

impl<F: Future<Output = Result<Response, E>>, E> Future for Measured<F> {
    type Output = F::Output;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<F::Output> {
        let this = self.project();
        let answer = ready!(this.answer.poll(cx));
        if let (Ok(response), Some(counted)) = (&answer, this.counted.take()) {
            counted.finish(response.status().as_u16(), response.body().size_hint().exact());
        }
        if let (Ok(response), Some(mut serving)) = (&answer, this.serving.take()) {
            serving.say(of_answer(response.status()));
            serving.end();
        }
        Poll::Ready(answer)
    }
}

/// Puts the limits around a router, which then has no fallback of its own: unknown paths are 404, known
/// paths with another method 405.
///
/// # Errors
/// [`InvalidOrigin`] for a CORS origin that is none.
pub fn protected(router: Router, config: &EdgeConfig) -> Result<Protected, InvalidOrigin> {
    let router =
        router.fallback(|| async { ApiError::not_found("no such path") }).method_not_allowed_fallback(
            || async { ApiError::new(StatusCode::METHOD_NOT_ALLOWED, "method not allowed on this path") },
        );
    guarded(Inner::Router(router), config)
}

/// Puts the limits around anything else that answers, such as a gateway.
///
/// # Errors
/// [`InvalidOrigin`] for a CORS origin that is none.
pub fn protected_handler<F>(
    handler: impl Fn(Request) -> F + Send + Sync + 'static,
    config: &EdgeConfig,
) -> Result<Protected, InvalidOrigin>
where
    F: Future<Output = Response> + Send + 'static,
{
    guarded(Inner::Handler(Arc::new(move |request| Box::pin(handler(request).map(Ok)))), config)
}

fn guarded(inner: Inner, config: &EdgeConfig) -> Result<Protected, InvalidOrigin> {
    let guarded = Guarded {
        inner,
        body_limit: BodyLimit(config.body_limit_bytes),
        in_flight: Arc::new(Semaphore::new(config.max_in_flight_requests.min(Semaphore::MAX_PERMITS))),
    };
    Ok(Protected(if config.cors_allowed_origins.is_empty() {
        Doors::Own(guarded)
    } else {
        Doors::Shared(Box::new(cors(&config.cors_allowed_origins)?.layer(guarded)))
    }))
}

/// A router with its limits. They stand around it, not in it: each layer inside an axum router costs every request
/// several allocations.
#[derive(Clone)]
pub struct Protected(Doors);

#[derive(Clone)]
enum Doors {
    /// No other site's pages may call.
    Own(Guarded),
    /// Some may.
    Shared(Box<Cors<Guarded>>),
}

impl fmt::Debug for Protected {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Protected")
    }
}

/// An answer on its way. There always is one.
pub type Answering = Pin<Box<dyn Future<Output = Result<Response, Infallible>> + Send>>;

impl Service<Request> for Protected {
    type Response = Response;
    type Error = Infallible;
    type Future = Answering;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request) -> Answering {
        self.answer(request)
    }
}

impl Protected {
    /// Answers a request.
    pub fn answer(&self, request: Request) -> Answering {
        match &self.0 {
            Doors::Own(guarded) => guarded.answer(request),
            Doors::Shared(cors) => Box::pin(cors.clone().call(request)),
        }
    }
}

fn cors(origins: &[String]) -> Result<CorsLayer, InvalidOrigin> {
    let origins: Vec<HeaderValue> =
        origins.iter().map(|text| parse_origin(text)).collect::<Result<_, _>>()?;
    Ok(CorsLayer::new()
        .allow_origin(AllowOrigin::list(origins))
        .allow_methods([Method::GET, Method::POST, Method::PUT])
        .allow_headers([
            AUTHORIZATION,
            CONTENT_TYPE,
            HeaderName::from_static("idempotency-key"),
            HeaderName::from_static("last-event-id"),
        ])
        .expose_headers([RETRY_AFTER])
        .max_age(PREFLIGHT_MAX_AGE))
}

/// An origin is compared with the header byte by byte, so it must be written as browsers write it.
fn parse_origin(text: &str) -> Result<HeaderValue, InvalidOrigin> {
    let invalid = || InvalidOrigin(text.to_owned());
    let uri: http::Uri = text.parse().map_err(|_| invalid())?;
    let (Some(scheme), Some(authority)) = (uri.scheme_str(), uri.authority()) else { return Err(invalid()) };
    let canonical = format!("{scheme}://{authority}").to_ascii_lowercase();
    if canonical != text || authority.as_str().contains('@') {
        return Err(invalid());
    }
    HeaderValue::from_str(text).map_err(|_| invalid())
}

pin_project! {
    /// An answer that is worked on, and counted until its head is there. Written by hand: an `async` block would hold the request, and what becomes
    /// of it, several times, and each request that waits holds one of these.
    struct Answer<F> {
        #[pin]
        answer: CatchUnwind<AssertUnwindSafe<F>>,
        counted: Option<OwnedSemaphorePermit>,
    }
}

impl<F: Future> Answer<F> {
    /// A panic costs one request only. The handler's state is shared through locks that poison and channels that close, never
    /// half-written.
    fn new(answer: F, counted: OwnedSemaphorePermit) -> Answer<F> {
        Answer { answer: AssertUnwindSafe(answer).catch_unwind(), counted: Some(counted) }
    }
}

impl<F: Future<Output = Result<Response, Infallible>>> Future for Answer<F> {
    type Output = Result<Response, Infallible>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let this = self.project();
        let response = match ready!(this.answer.poll(cx)) {
            Ok(Ok(response)) => response,
            Err(panic) => ApiError::internal(format_args!("a handler panicked: {}", panic_text(&*panic)))
                .into_response(),
        };
        *this.counted = None;
        Poll::Ready(Ok(hardened(response)))
    }
}

/// Who answers within the limits.
#[derive(Clone)]
enum Inner {
    Router(Router),
    Handler(Arc<Handler>),
}

type Handler = dyn Fn(Request) -> Answering + Send + Sync;

#[derive(Clone)]
struct Guarded {
    inner: Inner,
    body_limit: BodyLimit,
    in_flight: Arc<Semaphore>,
}

impl Service<Request> for Guarded {
    type Response = Response;
    type Error = Infallible;
    type Future = Answering;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request) -> Answering {
        self.answer(request)
    }
}

impl Guarded {
    fn answer(&self, request: Request) -> Answering {
        let Ok(counted) = Arc::clone(&self.in_flight).try_acquire_owned() else {
            let refusal =
                ApiError::unavailable("too many requests in flight, try again", RETRY_AFTER_SECONDS);
            return Box::pin(ready(Ok(hardened(refusal.into_response()))));
        };
        match self.limit_body(request) {
            Ok(request) => match &self.inner {
                Inner::Router(router) => Box::pin(Answer::new(router.clone().call(request), counted)),
                Inner::Handler(handler) => Box::pin(Answer::new(handler(request), counted)),
            },
            Err(too_large) => {
                let limit = self.body_limit.bytes();
                Box::pin(async move {
                    discard(too_large).await;
                    drop(counted);
                    Ok(hardened(ApiError::too_large(limit).into_response()))
                })
            }
        }
    }

    /// Gives back a request whose body says that it is too large; bounds one that does not say how large it is.
    #[allow(
        clippy::result_large_err,
        reason = "it is the request, which is not copied on the good path either"
    )]
    fn limit_body(&self, mut request: Request) -> Result<Request, Request> {
        let limit = self.body_limit.bytes();
        let size = request.body().size_hint();
        if size.lower() > limit as u64 {
            return Err(request);
        }
        if self.body_limit != BodyLimit::default() {
            request.extensions_mut().insert(self.body_limit);
        }
        if size.exact().is_some() {
            return Ok(request);
        }
        Ok(request.map(|body| Body::new(Limited::new(body, limit))))
    }
}

/// Takes in a body that was refused, if it is not far too large: a connection that is closed while its client still
/// sends is reset, and the client loses the answer that tells it why (RFC 9112, section 9.6).
async fn discard(request: Request) {
    // A client that asks before it sends is told at once.
    if request.headers().contains_key(EXPECT) || request.body().size_hint().lower() > MAX_DISCARDED_BYTES {
        return;
    }
    let mut body = request.into_body();
    let all = async { while let Some(Ok(_)) = body.frame().await {} };
    // Late or not: the answer is the same.
    let _ = tokio::time::timeout(DISCARD_FOR, all).await;
}

fn panic_text(panic: &(dyn Any + Send)) -> &str {
    let text = panic.downcast_ref::<&str>().copied();
    text.or_else(|| panic.downcast_ref::<String>().map(String::as_str)).unwrap_or("no message")
}

/// Headers that cost an API nothing and keep a browser from reading more into an answer than there is. A
/// handler's own value stands.
fn hardened(mut response: Response) -> Response {
    let headers = response.headers_mut();
    headers.entry(X_CONTENT_TYPE_OPTIONS).or_insert(HeaderValue::from_static("nosniff"));
    headers.entry(X_FRAME_OPTIONS).or_insert(HeaderValue::from_static("DENY"));
    headers.entry(REFERRER_POLICY).or_insert(HeaderValue::from_static("no-referrer"));
    response
}

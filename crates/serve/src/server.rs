//! Serves an API on a listener until it is told to stop.
//!
//! A client gets a bounded time for each thing it owes: a request's head, its body, and taking what it
//! asked for. What never happens: more connections than the bound (further ones wait in the kernel's
//! backlog); a connection kept open by a client that does nothing; a request cut off by a shutdown before
//! the deadline; a shutdown that waits beyond it.
//!
//! hyper starts the clock of a request's head when it begins to wait for it. So `head_timeout_ms` is also
//! how long a kept-alive connection may be idle.
//!
//! A client that has just sent something on a kept-alive connection which the server closes cannot know whether it was handled. So at a
//! shutdown HTTP/1.1 connections are not closed at once: for a moment each further request is answered with `Connection: close`, and
//! only who sends none is closed. HTTP/2 has a frame for it.
//!
//! One port takes HTTP/1.1 and HTTP/2 without TLS ("prior knowledge"), as gRPC clients speak it: a connection's first
//! bytes tell which. HTTP/1.1 pays one more read for each connection, and nothing for a request. An HTTP/2 connection without a
//! request is told to go after one to two times `head_timeout_ms`; one whose peer no longer answers pings is closed.

use std::convert::Infallible;
use std::fmt;
use std::future::Future;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::ops::Range;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use axum::body::{Body, Bytes, HttpBody};
use axum::extract::ConnectInfo;
use futures_util::stream::FuturesUnordered;
use futures_util::{FutureExt, StreamExt};
use http::Request;
use http::header::{CONNECTION, HeaderMap, HeaderName, HeaderValue};
use hyper::body::{Frame, Incoming, SizeHint};
use hyper::server::conn::{http1, http2};
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::time::{Instant, Sleep, interval_at, sleep, timeout};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::edge::{Answering, Protected};

/// How long a shutdown waits for a further request on an HTTP/1.1 connection, to answer it and say that it is the last.
const LINGER: Duration = Duration::from_millis(250);

/// Connections that are taken at most after a shutdown has begun: those that were made before it.
const LAST_CONNECTIONS: u32 = 1024;

/// How long the server pauses after a failed `accept`, such as one for want of file descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// The size of a connection's read buffer, and so of the largest request head, in bytes.
const MAX_HEAD_BYTES: usize = 32 * 1024;

/// Whom a request was forwarded for: each proxy adds the address it has it from.
pub const X_FORWARDED_FOR: HeaderName = HeaderName::from_static("x-forwarded-for");

/// What an HTTP/2 connection begins with (RFC 9113, section 3.4). No HTTP/1 request does.
const HTTP2_PREFACE: &[u8; 24] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// Requests under way on one HTTP/2 connection.
pub const MAX_STREAMS_PER_CONNECTION: u32 = 256;

/// Bytes of an answer that wait in an HTTP/2 stream for the client to take them.
const MAX_STREAM_SEND_BYTES: usize = 64 * 1024;

/// How often the peer of an HTTP/2 connection is asked whether it is there, and how long it may take to say so.
const PING_INTERVAL: Duration = Duration::from_secs(20);
const PING_TIMEOUT: Duration = Duration::from_secs(10);

/// What a server allows its clients.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Limits {
    /// Connections open at once.
    pub max_connections: usize,
    /// Time from the connection's (or the previous answer's) end of work to the next request's full head.
    pub head_timeout_ms: u64,
    /// Time for a request's whole body, from the moment that it is waited for.
    pub body_timeout_ms: u64,
    /// Time for which a client may take nothing of what is being sent.
    pub write_stall_timeout_ms: u64,
    /// Time that requests in flight get to finish at a shutdown.
    pub drain_timeout_ms: u64,
    /// How many proxies stand before this server, each of which adds its client's address to `X-Forwarded-For`. The client
    /// is then the address that the outermost of them added; with 0 it is the connection's peer, and the header is not believed.
    pub trusted_proxies: usize,
}

impl Default for Limits {
    fn default() -> Limits {
        Limits {
            max_connections: 8192,
            head_timeout_ms: 10_000,
            body_timeout_ms: 10_000,
            write_stall_timeout_ms: 30_000,
            drain_timeout_ms: 8_000,
            trusted_proxies: 0,
        }
    }
}

/// How a server ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[must_use]
pub struct Drained {
    /// Connections that were still busy at the deadline and were cut.
    pub cut_off: usize,
}

/// Serves HTTP/1.1 and HTTP/2 until `shutdown`, then stops accepting, sends clients away, lets requests in flight
/// finish until the deadline, and returns. An event stream has to end itself on the same token.
///
/// Handlers find the client's address as `ConnectInfo<SocketAddr>`.
pub async fn serve(
    listener: TcpListener,
    api: Protected,
    limits: &Limits,
    shutdown: CancellationToken,
) -> Drained {
    let server = Arc::new(Server {
        api,
        head_timeout: Duration::from_millis(limits.head_timeout_ms),
        body_timeout: Duration::from_millis(limits.body_timeout_ms),
        write_stall_timeout: Duration::from_millis(limits.write_stall_timeout_ms),
        trusted_proxies: limits.trusted_proxies,
        http1: http1(limits),
        http2: http2(),
        shutdown,
        cut: CancellationToken::new(),
    });
    let connections = TaskTracker::new();
    server.accept(listener, limits.max_connections, &connections).await;
    connections.close();
    let deadline = Duration::from_millis(limits.drain_timeout_ms);
    let cut_off = match timeout(deadline, connections.wait()).await {
        Ok(()) => 0,
        Err(_) => connections.len(),
    };
    server.cut.cancel();
    connections.wait().await;
    Drained { cut_off }
}

fn http1(limits: &Limits) -> http1::Builder {
    let mut http = http1::Builder::new();
    http.timer(TokioTimer::new())
        .header_read_timeout(Duration::from_millis(limits.head_timeout_ms))
        .max_buf_size(MAX_HEAD_BYTES);
    http
}

fn http2() -> http2::Builder<TokioExecutor> {
    let mut http = http2::Builder::new(TokioExecutor::new());
    http.timer(TokioTimer::new())
        .max_concurrent_streams(MAX_STREAMS_PER_CONNECTION)
        // A proxy's clients may all go at once, and requests of theirs may not have been looked at yet (h2 closes the connection
        // at 20 such, because of CVE-2023-44487; the bound of those under way is one, too).
        .max_pending_accept_reset_streams(MAX_STREAMS_PER_CONNECTION as usize)
        .max_header_list_size(MAX_HEAD_BYTES as u32)
        .max_send_buf_size(MAX_STREAM_SEND_BYTES)
        .keep_alive_interval(PING_INTERVAL)
        .keep_alive_timeout(PING_TIMEOUT);
    http
}

struct Server {
    api: Protected,
    head_timeout: Duration,
    body_timeout: Duration,
    write_stall_timeout: Duration,
    trusted_proxies: usize,
    http1: http1::Builder,
    http2: http2::Builder<TokioExecutor>,
    /// Finish what is in flight.
    shutdown: CancellationToken,
    /// Finish nothing more.
    cut: CancellationToken,
}

/// What connections are told at a shutdown.
enum Signal {
    /// Finish what is under way.
    GoAway,
    /// Finish nothing more.
    Cut,
}

/// The requests of one HTTP/2 connection. Everything that belongs to an unfinished one holds a clone of `open`.
#[derive(Default)]
struct Streams {
    begun: AtomicU64,
    open: Arc<()>,
}

impl Streams {
    fn begin(&self) -> Arc<()> {
        self.begun.fetch_add(1, Ordering::Relaxed);
        Arc::clone(&self.open)
    }

    /// How many have begun ever, if none is under way.
    fn quiet(&self) -> Option<u64> {
        (Arc::strong_count(&self.open) == 1).then(|| self.begun.load(Ordering::Relaxed))
    }
}

impl Server {
    async fn accept(self: &Arc<Server>, listener: TcpListener, max: usize, connections: &TaskTracker) {
        let room = Arc::new(Semaphore::new(max.clamp(1, Semaphore::MAX_PERMITS)));
        let next = async || {
            let place = room.clone().acquire_owned().await.expect("this semaphore is never closed");
            (place, listener.accept().await)
        };
        let mut left = None;
        loop {
            let accepted = tokio::select! {
                biased;
                // Who has connected by now may have sent something already.
                () = self.shutdown.cancelled(), if left.is_none() => {
                    left = Some(LAST_CONNECTIONS);
                    continue;
                }
                accepted = next(), if left != Some(0) => accepted,
                () = std::future::ready(()), if left.is_some() => return,
            };
            left = left.map(|left| left - 1);
            match accepted {
                (place, Ok((stream, peer))) => {
                    let server = self.clone();
                    connections.spawn(async move {
                        server.converse(stream, peer).await;
                        drop(place);
                    });
                }
                (_, Err(error)) => {
                    tracing::warn!(%error, "a connection could not be accepted");
                    tokio::select! {
                        () = self.shutdown.cancelled() => return,
                        () = sleep(ACCEPT_PAUSE) => {}
                    }
                }
            }
        }
    }

    /// One connection, to its end. How a client ends it is its own affair: errors are not logged above debug.
    async fn converse(&self, stream: TcpStream, peer: SocketAddr) {
        if let Err(error) = stream.set_nodelay(true) {
            tracing::debug!(%error, %peer, "TCP_NODELAY");
        }
        let mut io = Impatient::new(stream, self.write_stall_timeout);
        let version = tokio::select! {
            // First: a request that has arrived is answered, shutdown or not.
            biased;
            version = timeout(self.head_timeout, io.look_ahead()) => version,
            () = self.lingered() => return,
        };
        match version {
            Ok(Ok(Version::Http1)) => {
                let answer = service_fn(|request| {
                    let answering = self.answer(request, peer);
                    async {
                        let mut answer = answering.await?;
                        if self.shutdown.is_cancelled() {
                            answer.headers_mut().insert(CONNECTION, HeaderValue::from_static("close"));
                        }
                        Ok::<_, Infallible>(answer)
                    }
                });
                let connection = self.http1.serve_connection(TokioIo::new(io), answer);
                self.drive(pin!(connection), http1::Connection::graceful_shutdown, None, peer).await;
            }
            Ok(Ok(Version::Http2)) => {
                let streams = Streams::default();
                let answer = service_fn(|request| {
                    let (open, answer) = (streams.begin(), self.answer(request, peer));
                    async move {
                        answer.await.map(|answer| answer.map(|body| Body::new(Held { body, _open: open })))
                    }
                });
                let connection = self.http2.serve_connection(TokioIo::new(io), answer);
                self.drive(pin!(connection), http2::Connection::graceful_shutdown, Some(&streams), peer)
                    .await;
            }
            Ok(Err(error)) => tracing::debug!(%error, %peer, "a connection ended before its first request"),
            Err(_) => tracing::debug!(%peer, "a connection without a request"),
        }
    }

    /// Drives a connection to its end; `go` tells its client to send nothing more.
    async fn drive<C: Future<Output = hyper::Result<()>>>(
        &self,
        mut connection: Pin<&mut C>,
        go: fn(Pin<&mut C>),
        streams: Option<&Streams>,
        peer: SocketAddr,
    ) {
        let mut looks = interval_at(Instant::now() + self.head_timeout, self.head_timeout);
        let (mut idle, mut quiet) = (false, None);
        let go_away = async {
            match streams {
                None => self.lingered().await,
                Some(_) => self.shutdown.cancelled().await,
            }
            Signal::GoAway
        };
        let cut = self.cut.cancelled().map(|()| Signal::Cut);
        // A connection is polled for each request, and each look at a token would lock what all connections share. Here a token is looked at
        // again when it has something to tell.
        let mut signals: FuturesUnordered<_> = [go_away.boxed(), cut.boxed()].into_iter().collect();
        loop {
            tokio::select! {
                biased;
                ended = connection.as_mut() => {
                    if let Err(error) = ended {
                        tracing::debug!(%error, %peer, "a connection ended early");
                    }
                    return;
                }
                Some(signal) = signals.next() => match signal {
                    Signal::GoAway => go(connection.as_mut()),
                    Signal::Cut => return,
                },
                _ = looks.tick(), if streams.is_some() => {
                    let before = std::mem::replace(&mut quiet, streams.and_then(Streams::quiet));
                    if quiet.is_some() && quiet == before {
                        if idle {
                            return;
                        }
                        idle = true;
                        go(connection.as_mut());
                    }
                }
            }
        }
    }

    /// Ends a moment after the shutdown began.
    async fn lingered(&self) {
        self.shutdown.cancelled().await;
        sleep(LINGER).await;
    }

    fn answer(&self, request: Request<Incoming>, peer: SocketAddr) -> Answering {
        let limit = self.body_timeout;
        let mut request = request.map(|body| {
            if body.is_end_stream() {
                Body::empty()
            } else {
                Body::new(TimedBody { body, limit, timer: None })
            }
        });
        let client = client(request.headers(), self.trusted_proxies, peer);
        request.extensions_mut().insert(ConnectInfo(client));
        self.api.answer(request)
    }
}

/// Who asks: the peer, or who the outermost of so many trusted proxies says it was. Its port is not known then.
fn client(headers: &HeaderMap, trusted_proxies: usize, peer: SocketAddr) -> SocketAddr {
    let Some(place) = trusted_proxies.checked_sub(1) else { return peer };
    let values = headers.get_all(X_FORWARDED_FOR).iter().rev().filter_map(|value| value.to_str().ok());
    let named = values.flat_map(|value| value.rsplit(',')).nth(place);
    named.and_then(|text| text.trim().parse().ok()).map_or(peer, |ip: IpAddr| SocketAddr::new(ip, 0))
}

/// An answer's body, which counts as a request under way until it is sent.
struct Held {
    body: Body,
    _open: Arc<()>,
}

impl HttpBody for Held {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        Pin::new(&mut self.body).poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// A request's body did not arrive in time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BodyTimeout;

impl fmt::Display for BodyTimeout {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the request's body did not arrive in time")
    }
}

impl std::error::Error for BodyTimeout {}

/// A body with a deadline for all of it. The clock starts at the first wait: a body that came with its head
/// costs no timer.
struct TimedBody {
    body: Incoming,
    limit: Duration,
    timer: Option<Pin<Box<Sleep>>>,
}

impl HttpBody for TimedBody {
    type Data = Bytes;
    type Error = Box<dyn std::error::Error + Send + Sync>;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Self::Error>>> {
        if let Poll::Ready(frame) = Pin::new(&mut self.body).poll_frame(cx) {
            return Poll::Ready(frame.map(|frame| frame.map_err(Into::into)));
        }
        let limit = self.limit;
        let timer = self.timer.get_or_insert_with(|| Box::pin(sleep(limit)));
        ready!(timer.as_mut().poll(cx));
        Poll::Ready(Some(Err(BodyTimeout.into())))
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// What a client speaks.
enum Version {
    Http1,
    Http2,
}

/// A stream that gives up on a peer which takes nothing for too long. It can be looked into before it is read.
struct Impatient {
    stream: TcpStream,
    patience: Duration,
    stalled: Option<Pin<Box<Sleep>>>,
    /// Bytes that were looked at, and which of them were not read yet.
    ahead: [u8; HTTP2_PREFACE.len()],
    unread: Range<usize>,
}

impl Impatient {
    fn new(stream: TcpStream, patience: Duration) -> Impatient {
        Impatient { stream, patience, stalled: None, ahead: [0; HTTP2_PREFACE.len()], unread: 0..0 }
    }

    /// Tells by the first bytes what the client speaks. They are still there to be read.
    async fn look_ahead(&mut self) -> io::Result<Version> {
        let mut seen = 0;
        while seen < HTTP2_PREFACE.len() {
            match self.stream.read(&mut self.ahead[seen..]).await? {
                0 => break,
                n => seen += n,
            }
            if self.ahead[..seen] != HTTP2_PREFACE[..seen] {
                break;
            }
        }
        self.unread = 0..seen;
        Ok(if self.ahead[..seen] == HTTP2_PREFACE[..] { Version::Http2 } else { Version::Http1 })
    }

    fn judge(&mut self, cx: &mut Context<'_>, written: Poll<io::Result<usize>>) -> Poll<io::Result<usize>> {
        if written.is_ready() {
            self.stalled = None;
            return written;
        }
        let patience = self.patience;
        let stalled = self.stalled.get_or_insert_with(|| Box::pin(sleep(patience)));
        ready!(stalled.as_mut().poll(cx));
        Poll::Ready(Err(io::Error::new(io::ErrorKind::TimedOut, "the client takes nothing")))
    }
}

impl AsyncRead for Impatient {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if !self.unread.is_empty() {
            let some = self.unread.len().min(buffer.remaining());
            let start = self.unread.start;
            buffer.put_slice(&self.ahead[start..start + some]);
            self.unread.start += some;
            return Poll::Ready(Ok(()));
        }
        Pin::new(&mut self.stream).poll_read(cx, buffer)
    }
}

impl AsyncWrite for Impatient {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write(cx, bytes);
        self.judge(cx, written)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write_vectored(cx, slices);
        self.judge(cx, written)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

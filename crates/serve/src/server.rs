//! Serves an API on a listener until it is told to stop.
//!
//! A client gets a bounded time for each thing it owes: a request's head, its body, and taking what it
//! asked for. What never happens: more connections than the bound (further ones wait in the kernel's
//! backlog); a connection kept open by a client that does nothing; a request cut off by a shutdown before
//! the deadline; a shutdown that waits beyond it.
//!
//! hyper starts the clock of a request's head when it begins to wait for it. So `head_timeout_ms` is also
//! how long a kept-alive connection may be idle.

use std::fmt;
use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use axum::body::{Body, Bytes, HttpBody};
use axum::extract::ConnectInfo;
use http::Request;
use hyper::body::{Frame, Incoming, SizeHint};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::time::{Sleep, sleep, timeout};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tower::Service;

use crate::edge::{Answering, Protected};

/// How long the server pauses after a failed `accept`, such as one for want of file descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// The size of a connection's read buffer, and so of the largest request head, in bytes.
const MAX_HEAD_BYTES: usize = 32 * 1024;

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
}

impl Default for Limits {
    fn default() -> Limits {
        Limits {
            max_connections: 8192,
            head_timeout_ms: 10_000,
            body_timeout_ms: 10_000,
            write_stall_timeout_ms: 30_000,
            drain_timeout_ms: 8_000,
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

/// Serves HTTP/1.1 until `shutdown`, then stops accepting, closes idle connections, lets requests in flight
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
        body_timeout: Duration::from_millis(limits.body_timeout_ms),
        write_stall_timeout: Duration::from_millis(limits.write_stall_timeout_ms),
        http: http(limits),
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

fn http(limits: &Limits) -> http1::Builder {
    let mut http = http1::Builder::new();
    http.timer(TokioTimer::new())
        .header_read_timeout(Duration::from_millis(limits.head_timeout_ms))
        .max_buf_size(MAX_HEAD_BYTES);
    http
}

struct Server {
    api: Protected,
    body_timeout: Duration,
    write_stall_timeout: Duration,
    http: http1::Builder,
    /// Finish what is in flight.
    shutdown: CancellationToken,
    /// Finish nothing more.
    cut: CancellationToken,
}

impl Server {
    async fn accept(self: &Arc<Server>, listener: TcpListener, max: usize, connections: &TaskTracker) {
        let room = Arc::new(Semaphore::new(max.clamp(1, Semaphore::MAX_PERMITS)));
        let next = async || {
            let place = room.clone().acquire_owned().await.expect("this semaphore is never closed");
            (place, listener.accept().await)
        };
        loop {
            let accepted = tokio::select! {
                biased;
                () = self.shutdown.cancelled() => return,
                accepted = next() => accepted,
            };
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
        let io = TokioIo::new(Impatient { stream, patience: self.write_stall_timeout, stalled: None });
        let answer = service_fn(|request| self.answer(request, peer));
        let mut connection = std::pin::pin!(self.http.serve_connection(io, answer));
        let mut draining = false;
        loop {
            tokio::select! {
                biased;
                ended = connection.as_mut() => {
                    if let Err(error) = ended {
                        tracing::debug!(%error, %peer, "a connection ended early");
                    }
                    return;
                }
                () = self.shutdown.cancelled(), if !draining => {
                    draining = true;
                    connection.as_mut().graceful_shutdown();
                }
                () = self.cut.cancelled(), if draining => return,
            }
        }
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
        request.extensions_mut().insert(ConnectInfo(peer));
        self.api.clone().call(request)
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

/// A stream that gives up on a peer which takes nothing for too long.
struct Impatient {
    stream: TcpStream,
    patience: Duration,
    stalled: Option<Pin<Box<Sleep>>>,
}

impl Impatient {
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

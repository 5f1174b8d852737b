//! One connection, one request at a time: hyper's client, driven by whoever waits for the answer.
//!
//! A connection that is driven by a task of its own costs two more wake-ups for each request, which is what a load generator has
//! least to spare.

use std::future::poll_fn;
use std::pin::{Pin, pin};
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use http::header::RETRY_AFTER;
use http::{Request, Response, StatusCode};
use http_body_util::Full;
use hyper::body::{Body, Incoming};
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;
use tokio::time::Instant;

use crate::record::Failure;
use crate::target::Target;

/// The largest answer that is read, in bytes: a page of 500 products is a fifth of it.
const MAX_ANSWER_BYTES: usize = 1024 * 1024;
/// The longest `Retry-After` that is honoured.
const MAX_RETRY_AFTER: Duration = Duration::from_secs(10);

/// A request as it is sent.
pub(crate) type Outgoing = Request<Full<Bytes>>;

type Driver = http1::Connection<TokioIo<TcpStream>, Full<Bytes>>;

/// An answer, read to its end.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) status: StatusCode,
    pub(crate) retry_after: Option<Duration>,
    pub(crate) body: Bytes,
}

/// A kept-alive connection.
pub(crate) struct Connection {
    sender: http1::SendRequest<Full<Bytes>>,
    driver: Pin<Box<Driver>>,
    open: bool,
}

impl Connection {
    /// Opens one.
    ///
    /// # Errors
    /// [`Failure::NoConnection`], also when it takes longer than `limit`.
    pub(crate) async fn open(target: &Target, limit: Duration) -> Result<Connection, Failure> {
        let connect = async {
            let stream = TcpStream::connect(target.address()).await.ok()?;
            stream.set_nodelay(true).ok()?;
            http1::handshake(TokioIo::new(stream)).await.ok()
        };
        let connected = tokio::time::timeout(limit, connect).await.ok().flatten();
        let (sender, driver) = connected.ok_or(Failure::NoConnection)?;
        Ok(Connection { sender, driver: Box::pin(driver), open: true })
    }

    /// Whether a request can be sent: the other side has not closed it, as far as is known here.
    pub(crate) async fn is_open(&mut self) -> bool {
        poll_fn(|cx| {
            self.drive(cx);
            Poll::Ready(self.open && self.sender.is_ready())
        })
        .await
    }

    /// Sends a request and reads the whole answer.
    ///
    /// # Errors
    /// When there is none within `limit`. The connection is of no use then, and whether the request had an effect is not known.
    pub(crate) async fn call(&mut self, request: Outgoing, limit: Duration) -> Result<Answer, Failure> {
        let deadline = Instant::now() + limit;
        let answer = tokio::time::timeout_at(deadline, self.exchange(request)).await;
        if !matches!(answer, Ok(Ok(_))) {
            self.open = false;
        }
        answer.unwrap_or(Err(Failure::Timeout))
    }

    /// Sends a request and reads the head of its answer. The body is read from what is returned, or, if the answer is no success,
    /// is there already.
    ///
    /// # Errors
    /// As [`Connection::call`].
    pub(crate) async fn stream(
        mut self,
        request: Outgoing,
        limit: Duration,
    ) -> Result<Result<Stream, Answer>, Failure> {
        let begin = async {
            let response = self.head(request).await?;
            if response.status().is_success() {
                Ok(Ok(response))
            } else {
                Ok(Err(self.read(response).await?))
            }
        };
        match tokio::time::timeout(limit, begin).await {
            Ok(Ok(Ok(response))) => Ok(Ok(Stream { connection: self, body: response.into_body() })),
            Ok(Ok(Err(answer))) => Ok(Err(answer)),
            Ok(Err(failure)) => Err(failure),
            Err(_) => Err(Failure::Timeout),
        }
    }

    async fn exchange(&mut self, request: Outgoing) -> Result<Answer, Failure> {
        let response = self.head(request).await?;
        self.read(response).await
    }

    async fn head(&mut self, request: Outgoing) -> Result<Response<Incoming>, Failure> {
        let mut response = pin!(self.sender.send_request(request));
        poll_fn(|cx| {
            if self.open && self.driver.as_mut().poll(cx).is_ready() {
                self.open = false;
            }
            response.as_mut().poll(cx).map_err(|_| Failure::ConnectionLost)
        })
        .await
    }

    async fn read(&mut self, response: Response<Incoming>) -> Result<Answer, Failure> {
        let (head, mut body) = response.into_parts();
        let retry_after = head.headers.get(RETRY_AFTER).and_then(|value| value.to_str().ok()?.parse().ok());
        let retry_after = retry_after.map(|seconds| Duration::from_secs(seconds).min(MAX_RETRY_AFTER));
        let answer = |body| Answer { status: head.status, retry_after, body };
        let first = match self.chunk(&mut body).await? {
            None => return Ok(answer(Bytes::new())),
            // Nearly all answers are one chunk, which is not copied then.
            Some(first) if body.is_end_stream() => return Ok(answer(first)),
            Some(first) => first,
        };
        let mut whole = BytesMut::from(first);
        while let Some(chunk) = self.chunk(&mut body).await? {
            if whole.len() + chunk.len() > MAX_ANSWER_BYTES {
                return Err(Failure::Unreadable);
            }
            whole.extend_from_slice(&chunk);
        }
        Ok(answer(whole.freeze()))
    }

    /// The next part of a body. None behind the last one.
    async fn chunk(&mut self, body: &mut Incoming) -> Result<Option<Bytes>, Failure> {
        loop {
            let frame = poll_fn(|cx| {
                self.drive(cx);
                Pin::new(&mut *body).poll_frame(cx)
            });
            match frame.await {
                None => return Ok(None),
                Some(Ok(frame)) => {
                    if let Ok(data) = frame.into_data() {
                        return Ok(Some(data));
                    }
                }
                Some(Err(_)) => return Err(Failure::ConnectionLost),
            }
        }
    }

    fn drive(&mut self, cx: &mut Context<'_>) {
        if self.open && self.driver.as_mut().poll(cx).is_ready() {
            self.open = false;
        }
    }
}

/// An answer without an end.
pub(crate) struct Stream {
    connection: Connection,
    body: Incoming,
}

impl Stream {
    /// The next part. None when it has ended, or when the connection is gone.
    pub(crate) async fn chunk(&mut self) -> Option<Bytes> {
        self.connection.chunk(&mut self.body).await.ok().flatten()
    }
}

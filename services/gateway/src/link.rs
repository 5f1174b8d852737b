//! One HTTP/1.1 connection to a replica, driven by whoever uses it.
//!
//! hyper expects a task for each connection. Here the request's own task polls the connection, so that a request needs
//! no wake-up of another task and none back, which cost as much as the rest of the passing on. While a connection
//! waits in the pool nobody polls it; what its peer did meanwhile is seen when it is taken out.
//!
//! The futures on the requesting side are polled with a waker that does nothing: only the connection can make them
//! ready, and it is polled just before.

use std::future::poll_fn;
use std::io;
use std::net::SocketAddr;
use std::pin::{Pin, pin};
use std::task::{Context, Poll, Waker};

use axum::body::Bytes;
use http::{Request, Response};
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::client::conn::TrySendError;
use hyper::client::conn::http1::{self, Connection, SendRequest};
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;
use tokio::sync::OwnedSemaphorePermit;

/// A request on its way to a replica: it is in memory as a whole, so that it can be sent again.
pub(crate) type Outgoing = Request<Full<Bytes>>;

/// The largest head of an answer, in bytes.
const MAX_HEAD_BYTES: usize = 32 * 1024;

/// A connection.
pub(crate) struct Link {
    sender: SendRequest<Full<Bytes>>,
    /// None once it is closed.
    connection: Option<Connection<TokioIo<TcpStream>, Full<Bytes>>>,
    /// Its place among the replica's connections.
    _place: OwnedSemaphorePermit,
}

impl Link {
    pub(crate) async fn open(address: SocketAddr, place: OwnedSemaphorePermit) -> io::Result<Link> {
        let stream = TcpStream::connect(address).await?;
        stream.set_nodelay(true)?;
        let handshake = http1::Builder::new().max_buf_size(MAX_HEAD_BYTES).handshake(TokioIo::new(stream));
        let (sender, connection) = handshake.await.map_err(io::Error::other)?;
        Ok(Link { sender, connection: Some(connection), _place: place })
    }

    /// Whether it can take a request, by all that is known here: the peer may have closed it in this instant.
    pub(crate) fn is_usable(&mut self) -> bool {
        self.drive(&mut Context::from_waker(Waker::noop()));
        self.connection.is_some() && self.sender.is_ready()
    }

    /// Lets the connection read and write.
    pub(crate) fn drive(&mut self, cx: &mut Context<'_>) {
        let ended = self.connection.as_mut().is_some_and(|c| Pin::new(c).poll(cx).is_ready());
        if ended {
            // Dropping it tells whoever waits for something of it.
            self.connection = None;
        }
    }

    /// Sends a request and waits for the answer's head. An error with a message means that nothing was sent.
    pub(crate) async fn send(
        &mut self,
        request: Outgoing,
    ) -> Result<Response<Incoming>, TrySendError<Outgoing>> {
        let mut answer = pin!(self.sender.try_send_request(request));
        poll_fn(|cx| {
            let ended = self.connection.as_mut().is_some_and(|c| Pin::new(c).poll(cx).is_ready());
            if ended {
                self.connection = None;
            }
            let answer: Poll<_> = answer.as_mut().poll(&mut Context::from_waker(Waker::noop()));
            answer
        })
        .await
    }
}

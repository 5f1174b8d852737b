//! The connections to one replica.
//!
//! What never happens: a request is sent a second time by this module; more connections than the bound; a connection
//! used that has been idle for longer than the replica keeps it open.

use std::collections::VecDeque;
use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use axum::body::Body;
use http::{Request, Response};
use hyper::body::Incoming;
use hyper::client::conn::http2;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use peers::CONNECT_TIMEOUT;
use tokio::net::TcpStream;
use tokio::sync::Semaphore;
use tokio::time::{Instant, timeout};

use crate::link::{Link, Outgoing};

/// HTTP/1.1 connections to one replica, event streams among them.
const MAX_CONNECTIONS: usize = 8192;

/// Connections to one replica that wait for a request.
const MAX_IDLE_CONNECTIONS: usize = 512;

/// Requests that wait for the head of an answer of one replica. One that hangs must not hold all requests that the gateway may have in
/// hand; so many of them are a sign of that.
const MAX_WAITING: usize = 1024;

/// A connection that has waited for longer is not used any more: the services close theirs after 10 s
/// (`http.head_timeout_ms`), and a request must not cross with that.
pub(crate) const IDLE_FOR: Duration = Duration::from_secs(4);

/// How often an HTTP/2 connection with calls on it is asked whether anybody is there, and how long that may take.
const PING_INTERVAL: Duration = Duration::from_secs(5);
const PING_TIMEOUT: Duration = Duration::from_secs(3);

/// Why there is no answer.
#[derive(Debug)]
pub(crate) enum Failure<R> {
    /// Nothing was sent; here it is back.
    NotSent(Box<R>),
    /// It was sent, at least in part, and the connection broke.
    Lost,
    /// It was sent, and no answer came in time.
    Late,
}

/// The connections to one replica.
pub(crate) struct Pool {
    address: SocketAddr,
    head_timeout: Duration,
    places: Arc<Semaphore>,
    waiting: Semaphore,
    /// The one that was used last is the last.
    idle: Mutex<VecDeque<Idle>>,
    /// The one connection that gRPC calls share.
    http2: tokio::sync::Mutex<Option<http2::SendRequest<Body>>>,
}

struct Idle {
    since: Instant,
    link: Box<Link>,
}

impl Pool {
    pub(crate) fn new(address: SocketAddr, head_timeout: Duration) -> Pool {
        Pool {
            address,
            head_timeout,
            places: Arc::new(Semaphore::new(MAX_CONNECTIONS)),
            waiting: Semaphore::new(MAX_WAITING),
            idle: Mutex::default(),
            http2: tokio::sync::Mutex::default(),
        }
    }

    /// Sends a request and waits for the head of its answer.
    pub(crate) async fn send(
        &self,
        mut request: Outgoing,
    ) -> Result<(Response<Incoming>, Box<Link>), Failure<Outgoing>> {
        let Ok(_waiting) = self.waiting.try_acquire() else {
            return Err(Failure::NotSent(Box::new(request)));
        };
        loop {
            let pooled = self.check_out();
            let fresh = pooled.is_none();
            let mut link = match pooled {
                Some(link) => link,
                None => match self.connect().await {
                    Ok(link) => link,
                    Err(error) => {
                        tracing::debug!(replica = %self.address, %error, "no connection");
                        return Err(Failure::NotSent(Box::new(request)));
                    }
                },
            };
            match timeout(self.head_timeout, link.send(request)).await {
                Ok(Ok(response)) => return Ok((response, link)),
                Ok(Err(mut failed)) => match failed.take_message() {
                    // It was closed while it waited: the next one.
                    Some(unsent) if !fresh => request = unsent,
                    Some(unsent) => return Err(Failure::NotSent(Box::new(unsent))),
                    None => {
                        tracing::debug!(replica = %self.address, error = %failed.error(), "no answer");
                        return Err(Failure::Lost);
                    }
                },
                Err(_) => return Err(Failure::Late),
            }
        }
    }

    async fn connect(&self) -> io::Result<Box<Link>> {
        let place = self.places.clone().try_acquire_owned();
        let place = place.map_err(|_| io::Error::other("there are too many"))?;
        let link = timeout(CONNECT_TIMEOUT, Link::open(self.address, place)).await;
        link.map_err(io::Error::from).flatten().map(Box::new)
    }

    /// Takes a connection that waits.
    fn check_out(&self) -> Option<Box<Link>> {
        loop {
            let mut idle = self.idle().pop_back()?;
            if idle.since.elapsed() < IDLE_FOR && idle.link.is_usable() {
                return Some(idle.link);
            }
        }
    }

    /// Gives a connection back whose answer was read to its end.
    pub(crate) fn check_in(&self, link: Box<Link>) {
        let mut idle = self.idle();
        if idle.len() < MAX_IDLE_CONNECTIONS {
            idle.push_back(Idle { since: Instant::now(), link });
        }
    }

    /// Closes the connections that have waited for too long.
    pub(crate) fn drop_old(&self) {
        self.idle().retain(|idle| idle.since.elapsed() < IDLE_FOR);
    }

    /// Closes all connections that wait.
    pub(crate) fn clear(&self) {
        self.idle().clear();
    }

    fn idle(&self) -> MutexGuard<'_, VecDeque<Idle>> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sends a gRPC request and waits for the head of its answer.
    pub(crate) async fn call(
        &self,
        request: Request<Body>,
    ) -> Result<Response<Incoming>, Failure<Request<Body>>> {
        let Ok(_waiting) = self.waiting.try_acquire() else {
            return Err(Failure::NotSent(Box::new(request)));
        };
        let mut sender = match self.http2().await {
            Ok(sender) => sender,
            Err(error) => {
                tracing::debug!(replica = %self.address, %error, "no connection for calls");
                return Err(Failure::NotSent(Box::new(request)));
            }
        };
        match timeout(self.head_timeout, sender.try_send_request(request)).await {
            Ok(Ok(response)) => Ok(response),
            Ok(Err(mut failed)) => {
                tracing::debug!(replica = %self.address, error = %failed.error(), "no answer to a call");
                Err(failed.take_message().map_or(Failure::Lost, |unsent| Failure::NotSent(Box::new(unsent))))
            }
            Err(_) => Err(Failure::Late),
        }
    }

    async fn http2(&self) -> io::Result<http2::SendRequest<Body>> {
        let mut shared = self.http2.lock().await;
        if let Some(sender) = shared.as_ref().filter(|sender| !sender.is_closed()) {
            return Ok(sender.clone());
        }
        let connect = async {
            let stream = TcpStream::connect(self.address).await?;
            stream.set_nodelay(true)?;
            let mut http = http2::Builder::new(TokioExecutor::new());
            http.timer(TokioTimer::new()).keep_alive_interval(PING_INTERVAL).keep_alive_timeout(PING_TIMEOUT);
            http.handshake(TokioIo::new(stream)).await.map_err(io::Error::other)
        };
        let connected = timeout(CONNECT_TIMEOUT, connect).await;
        let (sender, connection) = connected.map_err(io::Error::from).flatten()?;
        // It ends when the last sender goes and the last call has ended.
        tokio::spawn(connection);
        *shared = Some(sender.clone());
        Ok(sender)
    }
}

impl fmt::Debug for Pool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Pool({}, {} idle)", self.address, self.idle().len())
    }
}

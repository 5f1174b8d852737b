//! The connections to one replica: HTTP/2, each shared by many requests and event streams.
//!
//! What happens in one instant to many customers, such as the ends of a batch of purchases, is so one write of the replica's and one
//! read of the gateway's, where each would otherwise have a connection of its own.
//!
//! What never happens: a request is sent a second time by this module; more under way at one replica than the bound; a client that takes
//! nothing holds up what is for others on the same connection, for the connection's window has room for all that its streams may leave.

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
use serve::server::MAX_STREAMS_PER_CONNECTION;
use tokio::net::TcpStream;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::timeout;

/// Connections to one replica. With [`MAX_STREAMS_PER_CONNECTION`] this bounds the requests under way at it, event streams among them.
const MAX_CONNECTIONS: usize = 32;

/// Requests that wait for the head of an answer of one replica. One that hangs must not hold all requests that the gateway may have in
/// hand; so many of them are a sign of that.
const MAX_WAITING: usize = 1024;

/// The largest head of an answer, in bytes.
const MAX_HEAD_BYTES: u32 = 32 * 1024;

/// Bytes of one answer that its client has not taken yet; the replica sends no more.
const STREAM_WINDOW_BYTES: u32 = 64 * 1024;

/// The same for all answers of a connection, twice what they may leave together. It also bounds what many small pieces cost (`h2` allows them
/// half of it).
const CONNECTION_WINDOW_BYTES: u32 = 2 * MAX_STREAMS_PER_CONNECTION * STREAM_WINDOW_BYTES;

/// How often a connection with requests on it is asked whether anybody is there, and how long that may take.
const PING_INTERVAL: Duration = Duration::from_secs(5);
const PING_TIMEOUT: Duration = Duration::from_secs(5);

/// Why there is no answer.
#[derive(Debug)]
pub(crate) enum Failure {
    /// Nothing was sent; here it is back.
    NotSent(Box<Request<Body>>),
    /// It was sent, at least in part, and the connection broke.
    Lost,
    /// It was sent, and no answer came in time.
    Late,
}

/// A request's place on a connection, to be kept until its answer has ended.
pub(crate) type Place = OwnedSemaphorePermit;

/// The connections to one replica.
pub(crate) struct Pool {
    address: SocketAddr,
    head_timeout: Duration,
    waiting: Semaphore,
    /// The first that has a place is used, so that as few as possible share what there is to send.
    connections: Mutex<Vec<Connection>>,
    /// Held by who makes one, so that not everybody does who finds none.
    connecting: tokio::sync::Mutex<()>,
}

struct Connection {
    sender: http2::SendRequest<Body>,
    places: Arc<Semaphore>,
}

impl Pool {
    pub(crate) fn new(address: SocketAddr, head_timeout: Duration) -> Pool {
        Pool {
            address,
            head_timeout,
            waiting: Semaphore::new(MAX_WAITING),
            connections: Mutex::default(),
            connecting: tokio::sync::Mutex::default(),
        }
    }

    /// Sends a request and waits for the head of its answer.
    pub(crate) async fn send(
        &self,
        mut request: Request<Body>,
    ) -> Result<(Response<Incoming>, Place), Failure> {
        let Ok(_waiting) = self.waiting.try_acquire() else {
            return Err(Failure::NotSent(Box::new(request)));
        };
        loop {
            let (mut sender, place, fresh) = match self.place().await {
                Ok(place) => place,
                Err(error) => {
                    tracing::debug!(replica = %self.address, %error, "no connection");
                    return Err(Failure::NotSent(Box::new(request)));
                }
            };
            match timeout(self.head_timeout, sender.try_send_request(request)).await {
                Ok(Ok(response)) => return Ok((response, place)),
                Ok(Err(mut failed)) => match failed.take_message() {
                    // It was closed before it could take this: the next one.
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

    /// A place on a connection, and whether the connection is a new one.
    async fn place(&self) -> io::Result<(http2::SendRequest<Body>, Place, bool)> {
        if let Some((sender, place)) = self.free_place() {
            return Ok((sender, place, false));
        }
        let _connecting = self.connecting.lock().await;
        if let Some((sender, place)) = self.free_place() {
            return Ok((sender, place, false));
        }
        if self.connections().len() >= MAX_CONNECTIONS {
            return Err(io::Error::other("all places at this replica are taken"));
        }
        let sender =
            timeout(CONNECT_TIMEOUT, connect(self.address)).await.map_err(io::Error::from).flatten()?;
        let places = Arc::new(Semaphore::new(MAX_STREAMS_PER_CONNECTION as usize));
        let place = places.clone().try_acquire_owned().map_err(io::Error::other)?;
        self.connections().push(Connection { sender: sender.clone(), places });
        Ok((sender, place, true))
    }

    /// A place on a connection that there is. Forgets those that are closed.
    fn free_place(&self) -> Option<(http2::SendRequest<Body>, Place)> {
        let mut connections = self.connections();
        connections.retain(|connection| !connection.sender.is_closed());
        connections.iter().find_map(|connection| {
            let place = connection.places.clone().try_acquire_owned().ok()?;
            Some((connection.sender.clone(), place))
        })
    }

    /// Sends nothing more on the connections that there are. They close when what is under way on them has ended.
    pub(crate) fn clear(&self) {
        self.connections().clear();
    }

    fn connections(&self) -> MutexGuard<'_, Vec<Connection>> {
        self.connections.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

async fn connect(address: SocketAddr) -> io::Result<http2::SendRequest<Body>> {
    let stream = TcpStream::connect(address).await?;
    stream.set_nodelay(true)?;
    let mut http = http2::Builder::new(TokioExecutor::new());
    http.timer(TokioTimer::new())
        .initial_stream_window_size(STREAM_WINDOW_BYTES)
        .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
        .max_header_list_size(MAX_HEAD_BYTES)
        .keep_alive_interval(PING_INTERVAL)
        .keep_alive_timeout(PING_TIMEOUT)
        // All clients may go at once, while there is something for each of them on its way. A replica is believed that this is no attack.
        .max_concurrent_reset_streams(MAX_STREAMS_PER_CONNECTION as usize)
        .max_local_error_reset_streams(None);
    let (sender, connection) = http.handshake(TokioIo::new(stream)).await.map_err(io::Error::other)?;
    // It ends when the last sender goes and the last request has ended.
    tokio::spawn(connection);
    Ok(sender)
}

impl fmt::Debug for Pool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Pool({}, {} connections)", self.address, self.connections().len())
    }
}

//! The connection to the servers. It is made once, at the start; from then on it is made again whenever it breaks, without end.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use async_nats::connection::State;
use async_nats::jetstream::context::ContextBuilder;
use async_nats::jetstream::{self, AckKind};
use async_nats::{Client, ConnectOptions, Event, ReconnectToServer, ServerAddr, Subject as Address};
use tokio::sync::watch;
use tokio::time::{Instant, sleep, timeout, timeout_at};

use super::{Login, Settings, StartError, Tls};

/// Bytes that the headers of a frame may take of the servers' limit of a message.
const HEADER_BYTES: usize = 512;
/// How long it may take to move to another server.
const MOVE_FOR: Duration = Duration::from_secs(5);

#[derive(Debug)]
pub(super) struct Link {
    pub(super) client: Client,
    pub(super) jetstream: jetstream::Context,
    /// How often a connection was made: what was asked on an earlier one gets no answer any more.
    connections: watch::Receiver<u64>,
    moving: Moving,
    /// Of the ids of our messages: the first part is this link's, the second counts.
    message_ids: (String, AtomicU64),
}

impl Link {
    /// Connects, trying again and again until the start's time is over.
    pub(super) async fn connect(settings: &Settings, deadline: Instant) -> Result<Link, StartError> {
        let (made, connections) = watch::channel(0);
        let servers = settings.servers.iter().map(|server| {
            server
                .parse::<ServerAddr>()
                .map_err(|error| StartError::BadServer { server: server.clone(), why: error.to_string() })
        });
        let servers = servers.collect::<Result<Vec<_>, StartError>>()?;
        let moving = Moving::default();
        let client = loop {
            let options = lasting(options(settings).await?, settings, &made, &moving);
            let why = match timeout_at(deadline, options.connect(servers.clone())).await {
                Ok(Ok(client)) => break client,
                Ok(Err(error)) => with_cause(&error),
                Err(_) => "it took too long".to_owned(),
            };
            if Instant::now() + settings.reconnect_delay_max >= deadline {
                let (servers, waited) = (settings.servers.clone(), settings.start_timeout);
                return Err(StartError::Unreachable { servers, waited, why });
            }
            tracing::info!(why, "the NATS servers are not reached yet");
            sleep(settings.reconnect_delay_max).await;
        };
        let jetstream = ContextBuilder::new()
            .timeout(settings.request_timeout)
            .ack_timeout(settings.publish_timeout)
            .max_ack_inflight(settings.publishes_in_flight)
            .backpressure_on_inflight(true)
            .build(client.clone());
        let message_ids =
            (client.new_inbox().rsplit('.').next().unwrap_or_default().to_owned(), AtomicU64::new(0));
        Ok(Link { client, jetstream, connections, moving, message_ids })
    }

    /// Moves the connection to the server of this name, if it is one of ours and can be reached: what is kept there need not travel from
    /// server to server.
    pub(super) async fn be_near(&self, server_name: &str, settings: &Settings) {
        if settings.servers.len() < 2 || self.client.server_info().server_name == server_name {
            return;
        }
        let Some(server) = find_server(server_name, settings).await else { return };
        let mut connections = self.connections();
        connections.mark_unchanged();
        self.moving.begin(server);
        let moved = timeout(MOVE_FOR, async {
            // An error means that the connection is closed for good, as what follows will find.
            let _ = self.client.force_reconnect().await;
            connections.changed().await
        });
        if moved.await.is_err() {
            tracing::warn!(server_name, "the connection did not move to another NATS server in time");
        }
        self.moving.end();
    }

    /// Whether the connection is there, as far as is known.
    pub(super) fn is_up(&self) -> bool {
        self.client.connection_state() == State::Connected
    }

    /// Changes when a connection was made.
    pub(super) fn connections(&self) -> watch::Receiver<u64> {
        self.connections.clone()
    }

    /// Bytes that a message may have.
    pub(super) fn message_bytes(&self) -> usize {
        self.client.max_payload().saturating_sub(HEADER_BYTES)
    }

    /// An id that no other message has.
    pub(super) fn message_id(&self) -> String {
        let (ours, next) = &self.message_ids;
        format!("{ours}.{}", next.fetch_add(1, Ordering::Relaxed))
    }

    /// Tells the servers what becomes of a message that they delivered. Nobody answers; what does not arrive is as if it had not
    /// been said, and the message comes again.
    pub(super) async fn tell(&self, message: Address, what: AckKind) {
        if let Err(error) = self.client.publish(message, what.into()).await {
            tracing::debug!(%error, "a message's fate was not told");
        }
    }

    /// Waits until what was told is with the servers.
    pub(super) async fn flush(&self, limit: Duration) {
        if self.is_up() {
            let _ = tokio::time::timeout(limit, self.client.flush()).await;
        }
    }
}

/// The address of the server of this name, learnt on connections of their own.
async fn find_server(server_name: &str, settings: &Settings) -> Option<ServerAddr> {
    for server in &settings.servers {
        let (server, options) = (server.parse::<ServerAddr>().ok()?, options(settings).await.ok()?);
        // One that is not reached is not where this process should be.
        if let Ok(Ok(client)) = timeout(settings.connect_timeout, options.connect(server.clone())).await
            && client.server_info().server_name == server_name
        {
            return Some(server);
        }
    }
    None
}

/// A connection that moves to a server on purpose.
#[derive(Clone, Debug, Default)]
struct Moving(Arc<Move>);

#[derive(Debug, Default)]
struct Move {
    is_under_way: AtomicBool,
    /// Where to, until it is tried.
    to: Mutex<Option<ServerAddr>>,
}

impl Moving {
    fn begin(&self, server: ServerAddr) {
        self.0.is_under_way.store(true, Ordering::Relaxed);
        *self.0.to.lock().unwrap_or_else(PoisonError::into_inner) = Some(server);
    }

    fn end(&self) {
        self.take();
        self.0.is_under_way.store(false, Ordering::Relaxed);
    }

    fn is_under_way(&self) -> bool {
        self.0.is_under_way.load(Ordering::Relaxed)
    }

    /// Where to, once; from then on chance decides, as ever.
    fn take(&self) -> Option<ServerAddr> {
        self.0.to.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

/// What every connection to the servers has.
pub(super) async fn options(settings: &Settings) -> Result<ConnectOptions, StartError> {
    let options = ConnectOptions::new()
        .name(&settings.name)
        .connection_timeout(settings.connect_timeout)
        .request_timeout(Some(settings.request_timeout))
        .ping_interval(settings.ping_interval)
        // Ours may be behind a proxy or a name; what the servers call themselves may lead nowhere from here.
        .ignore_discovered_servers();
    let options = match &settings.login {
        Login::Open => options,
        Login::Password { user, password } => options.user_and_password(user.clone(), password.clone()),
        Login::Token(token) => options.token(token.clone()),
        Login::Nkey(seed) => options.nkey(seed.clone()),
        Login::Credentials(path) => {
            options.credentials_file(path).await.map_err(|error| StartError::BadSetting {
                setting: "login",
                value: path.display().to_string(),
                why: format!("the credentials were not read: {error}"),
            })?
        }
    };
    Ok(match &settings.tls {
        None => options,
        Some(tls) => {
            tls.check().await?;
            let Tls { authorities, identity } = tls;
            // An error means that the program has chosen its provider already.
            let _ = async_nats::rustls::crypto::aws_lc_rs::default_provider().install_default();
            let options = options.require_tls(true);
            let options = match authorities {
                Some(path) => options.add_root_certificates(path.clone()),
                None => options,
            };
            match identity {
                Some(identity) => {
                    options.add_client_certificate(identity.certificate.clone(), identity.key.clone())
                }
                None => options,
            }
        }
    })
}

/// And what that of a bus has, which lasts.
fn lasting(
    options: ConnectOptions,
    settings: &Settings,
    made: &watch::Sender<u64>,
    moving: &Moving,
) -> ConnectOptions {
    let (min, max) = (settings.reconnect_delay_min, settings.reconnect_delay_max);
    let (made, moving, next) = (made.clone(), moving.clone(), moving.clone());
    options
        .reconnect_delay_callback(move |attempts| {
            delay(attempts, min, max).mul_f64(0.5 + fastrand::f64() / 2.0)
        })
        .reconnect_to_server_callback(move |_, _| {
            let server = next.take();
            async move { server.map(|addr| ReconnectToServer { addr, delay: Some(Duration::ZERO) }) }
        })
        .event_callback(move |event| {
            let (made, moving) = (made.clone(), moving.clone());
            async move {
                match event {
                    Event::Connected => made.send_modify(|connections| *connections += 1),
                    Event::Disconnected if moving.is_under_way() => {
                        tracing::debug!("the connection to the NATS servers moves to another one");
                    }
                    Event::Disconnected => tracing::warn!("the connection to the NATS servers is lost"),
                    event => tracing::debug!(%event, "on the connection to the NATS servers"),
                }
            }
        })
}

/// The pause before an attempt to connect. The first follows at once.
fn delay(attempts: usize, min: Duration, max: Duration) -> Duration {
    match attempts.checked_sub(2) {
        None => Duration::ZERO,
        Some(doublings) => min.saturating_mul(1 << doublings.min(16)).min(max),
    }
}

/// An error with what brought it about; the library's own text leaves that out.
pub(super) fn with_cause(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let more = error.to_string();
        if !text.contains(&more) {
            text = format!("{text}: {more}");
        }
        cause = error.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_pause_doubles_up_to_its_bound() {
        let (min, max) = (Duration::from_millis(20), Duration::from_secs(1));
        let pauses: Vec<_> = (1..10).map(|attempts| delay(attempts, min, max).as_millis()).collect();
        assert_eq!(pauses, [0, 20, 40, 80, 160, 320, 640, 1_000, 1_000]);
        assert_eq!(delay(usize::MAX, min, max), max);
    }
}

//! The two listeners of a process: the API's and the operator's.
//!
//! The operator's answers from the first moment, so that a process that waits for its database can say so. The API's
//! address is taken at once, too, but nobody is listened to there before there is somebody to answer: who connects is
//! refused at once, and goes to another replica.

use std::io;
use std::net::SocketAddr;

use axum::Router;
use serve::edge::{self, Protected};
use serve::server::Limits;
use tokio::net::{TcpListener, TcpSocket};
use tokio_util::sync::CancellationToken;

use super::{Error, Tasks};
use crate::config::Config;

/// Connections that wait in the kernel to be accepted.
const BACKLOG_CONNECTIONS: u32 = 1024;

/// How long a probe may take that is being answered at the moment when the process has started.
const HANDOVER_DRAIN_MS: u64 = 100;

/// Two addresses that are this process's.
pub(super) struct Doors {
    api: TcpSocket,
    /// Where the API listens, or will.
    pub api_address: SocketAddr,
    admin: std::net::TcpListener,
    /// Where the operator's door listens.
    pub admin_address: SocketAddr,
}

/// Whether another process holds the addresses, too, so that nobody else gets them while this one is not there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Hold {
    /// They are this process's alone.
    Alone,
    /// A supervisor holds them and listens to nobody.
    WithSupervisor,
}

impl Doors {
    /// Takes both addresses; only the operator's is listened to.
    ///
    /// # Errors
    /// [`Error::Listen`] when one is taken, or not this machine's.
    pub(super) fn open(config: &Config, hold: Hold) -> Result<Doors, Error> {
        let (api, api_address) = take("listen", config.listen, hold)?;
        let (admin, admin_address) = take("admin_listen", config.admin_listen, hold)?;
        let admin = listen("admin_listen", admin, admin_address)?;
        let admin = admin.into_std().map_err(failed("admin_listen", admin_address))?;
        Ok(Doors { api, api_address, admin, admin_address })
    }

    /// Answers the operator while the process starts: until the token is cancelled, or the tasks are told to stop.
    ///
    /// # Errors
    /// [`Error::Listen`] when the system has no file descriptor left, [`Error::Cors`] for an origin that is none.
    pub(super) fn answer_operator(
        &self,
        router: Router,
        config: &Config,
        tasks: &Tasks,
    ) -> Result<CancellationToken, Error> {
        let failed = failed("admin_listen", self.admin_address);
        // The same socket twice: who connects in between waits in the kernel for the next one.
        let listener = self.admin.try_clone().and_then(TcpListener::from_std).map_err(failed)?;
        let router = edge::protected(router, &config.http.edge())?;
        let limits = Limits { drain_timeout_ms: HANDOVER_DRAIN_MS, ..config.http.limits() };
        let started = tasks.stop.child_token();
        let until = started.clone();
        tokio::spawn(async move {
            let drained = serve::serve(listener, router, &limits, until).await;
            tracing::debug!(cut_off = drained.cut_off, "the process has started, or stops");
        });
        Ok(started)
    }

    /// Answers at both doors until the tasks are told to stop.
    ///
    /// # Errors
    /// [`Error::Listen`] when somebody else listens to the API's address by now, [`Error::Cors`] for an origin that
    /// is none.
    pub(super) fn answer(
        self,
        api: Protected,
        admin: Router,
        config: &Config,
        tasks: &Tasks,
    ) -> Result<(), Error> {
        let admin = edge::protected(admin, &config.http.edge())?;
        let listener = listen("listen", self.api, self.api_address)?;
        let operator =
            TcpListener::from_std(self.admin).map_err(failed("admin_listen", self.admin_address))?;
        for (name, listener, router) in [("api listener", listener, api), ("admin listener", operator, admin)]
        {
            let (limits, stop) = (config.http.limits(), tasks.stop.clone());
            tasks.spawn(name, async move {
                let drained = serve::serve(listener, router, &limits, stop).await;
                tracing::debug!(listener = name, cut_off = drained.cut_off, "a listener is closed");
            });
        }
        Ok(())
    }
}

/// Takes an address without listening to it.
pub(crate) fn take(
    setting: &'static str,
    address: SocketAddr,
    hold: Hold,
) -> Result<(TcpSocket, SocketAddr), Error> {
    let take = || {
        let socket = if address.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() }?;
        socket.set_reuseaddr(true)?;
        if hold == Hold::WithSupervisor {
            socket.set_reuseport(true)?;
        }
        socket.bind(address)?;
        let bound = socket.local_addr()?;
        Ok((socket, bound))
    };
    take().map_err(failed(setting, address))
}

/// Begins to listen to an address that was taken.
pub(crate) fn listen(
    setting: &'static str,
    socket: TcpSocket,
    address: SocketAddr,
) -> Result<TcpListener, Error> {
    socket.listen(BACKLOG_CONNECTIONS).map_err(failed(setting, address))
}

fn failed(setting: &'static str, address: SocketAddr) -> impl FnOnce(io::Error) -> Error {
    move |cause| Error::Listen { setting, address, cause }
}

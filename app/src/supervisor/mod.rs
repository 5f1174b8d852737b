//! `saga up --processes N`: a distributed shop on one machine. Starts every service as processes of this binary, keeps them
//! alive, and stops them in order.
//!
//! It holds the children's addresses itself, without listening to them: a child that is started again finds its address
//! free, and the others find the child where it was. Secrets travel in the children's environment, never in their arguments.
//!
//! What never happens: a child outlives the supervisor; the gateway's address is given up before the stop; a child that dies
//! stays dead, unless its settings are wrong.

mod log;
mod plan;
mod probe;
mod replica;
mod status;

use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::process::ExitStatus;
use std::time::Duration;

use serve::admin::{self, Readiness};
use telemetry::Registry;
use telemetry::logs::Format;
use tokio::net::{TcpListener, TcpSocket};
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::assemble::{self, Hold, doors};
use crate::config::layers::Loaded;
use crate::config::role::Role;
use crate::config::servers::Service;
use crate::lock::DataDir;
use plan::{Common, Place};
pub(crate) use probe::Probe;
use replica::{Launcher, Replica};

/// How often it is looked whether all are ready.
const LOOK_EVERY: Duration = Duration::from_millis(20);
/// How often the log says for whom the start waits.
const SAY_EVERY: Duration = Duration::from_secs(10);

/// Why the supervisor did not start, or could not go on.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    /// An address cannot be had, or the admin listener not be made.
    #[error(transparent)]
    Door(#[from] assemble::Error),
    /// The system does not tell where this program is.
    #[error("cannot find this program to start it again: {0}")]
    Program(#[source] io::Error),
    /// A child says that its settings are wrong.
    #[error("{name} ended with {status}: its settings are wrong; the reason is in its log", name = .0.name, status = .0.status)]
    Settings(FatalExit),
    /// The operator's door is closed.
    #[error("the admin listener has died")]
    AdminDied,
}

/// The end of a child that it is of no use to start again.
#[derive(Debug)]
pub(crate) struct FatalExit {
    name: String,
    status: ExitStatus,
}

/// A distributed shop whose processes are being kept alive.
pub(crate) struct Supervisor {
    /// Where the gateway listens.
    pub http_addr: SocketAddr,
    /// Where this process's operator's door listens.
    pub admin_addr: SocketAddr,
    replicas: Vec<Replica>,
    stages: Vec<(CancellationToken, JoinSet<bool>)>,
    admin: (CancellationToken, tokio::task::JoinHandle<()>),
    fatal: mpsc::Receiver<FatalExit>,
    /// The children's addresses.
    _held: Vec<TcpSocket>,
}

impl Supervisor {
    /// Starts everything; nothing is ready yet. Must be called on a tokio runtime.
    ///
    /// # Errors
    /// What kept it from starting.
    pub(crate) fn start(loaded: &Loaded, data_dir: &DataDir, format: Format) -> Result<Supervisor, Error> {
        let config = &loaded.config;
        let program = std::env::current_exe().map_err(Error::Program)?;
        let (admin, admin_addr) = doors::take("admin_listen", config.admin_listen, Hold::Alone)?;
        let admin = doors::listen("admin_listen", admin, admin_addr)?;
        let (places, held) = take_places(config.listen, config.processes)?;
        let http_addr = places.iter().find(|place| place.service == Service::Gateway).map(|place| place.api);

        let common = Common {
            settings: loaded.variables(),
            data_dir: data_dir.path().display().to_string(),
            key_dir: std::path::absolute(config.key_dir()).map_err(Error::Program)?.display().to_string(),
            catalog_open: config.catalog_open(Role::Shop),
            demo_data: config.demo_data,
            log_format: match format {
                Format::Human => "human",
                Format::Json => "json",
            },
            drain_timeout_ms: config.http.drain_timeout_ms,
            trusted_proxies: config.http.trusted_proxies,
        };
        let (told_fatal, fatal) = mpsc::channel(1);
        let launcher = Launcher { program, format, probe: Probe::new(), fatal: told_fatal };
        let replicas: Vec<Replica> = places.iter().cloned().map(Replica::new).collect();
        let mut stages = Vec::new();
        for services in plan::STOP_ORDER {
            let (stop, mut tasks) = (CancellationToken::new(), JoinSet::new());
            for replica in replicas.iter().filter(|replica| services.contains(&replica.place.service)) {
                let variables = plan::variables(&common, &replica.place, &places);
                tasks.spawn(replica.clone().keep(launcher.clone(), variables, stop.clone()));
            }
            stages.push((stop, tasks));
        }
        let admin = open_admin(admin, &replicas, config)?;
        let http_addr = http_addr.unwrap_or(config.listen);
        Ok(Supervisor { http_addr, admin_addr, replicas, stages, admin, fatal, _held: held })
    }

    /// Waits until all processes are ready.
    ///
    /// # Errors
    /// As [`Supervisor::failed`].
    pub(crate) async fn ready(&mut self) -> Result<(), Error> {
        let mut say = tokio::time::interval_at(Instant::now() + SAY_EVERY, SAY_EVERY);
        let mut look = tokio::time::interval(LOOK_EVERY);
        loop {
            tokio::select! {
                Some(exit) = self.fatal.recv() => return Err(Error::Settings(exit)),
                _ = say.tick() => {
                    let waits_for = status::missing(&self.replicas);
                    tracing::info!(waits_for, "not all processes are ready yet");
                }
                _ = look.tick() => {
                    if self.replicas.iter().all(|replica| replica.status().ready) {
                        return Ok(());
                    }
                }
            }
        }
    }

    /// Ends when it is of no use to go on, and tells why. Until then it waits, and it may be dropped.
    pub(crate) async fn failed(&mut self) -> Error {
        tokio::select! {
            Some(exit) = self.fatal.recv() => Error::Settings(exit),
            _ = &mut self.admin.1 => Error::AdminDied,
        }
    }

    /// Stops all processes, those at the door first. Tells whether all stopped in time.
    pub(crate) async fn stop(self) -> bool {
        let mut in_time = true;
        for (stop, mut tasks) in self.stages {
            stop.cancel();
            while let Some(stopped) = tasks.join_next().await {
                in_time &= stopped.unwrap_or(false);
            }
        }
        self.admin.0.cancel();
        // However it ended: there is nothing left to say.
        let _ = self.admin.1.await;
        in_time
    }
}

/// An address for each process, and what holds them.
fn take_places(listen: SocketAddr, replicas: usize) -> Result<(Vec<Place>, Vec<TcpSocket>), Error> {
    // Somebody else's may be shared by mistake, if he shares it, too. He is found out where he listens.
    let (tried, listen) = doors::take("listen", listen, Hold::Alone)?;
    drop(doors::listen("listen", tried, listen)?);
    let mut held = Vec::new();
    let mut take = |setting, address| {
        let (socket, address) = doors::take(setting, address, Hold::WithSupervisor)?;
        held.push(socket);
        Ok::<SocketAddr, Error>(address)
    };
    let free = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
    let mut places = Vec::new();
    for (service, number) in plan::processes(replicas) {
        let api = if service == Service::Gateway { take("listen", listen)? } else { take("listen", free)? };
        let admin = take("admin_listen", free)?;
        places.push(Place { service, name: plan::name(service, number), api, admin });
    }
    Ok((places, held))
}

fn open_admin(
    listener: TcpListener,
    replicas: &[Replica],
    config: &crate::config::Config,
) -> Result<(CancellationToken, tokio::task::JoinHandle<()>), Error> {
    let registry = Registry::new();
    status::register(&registry, replicas.to_vec());
    let watched = replicas.to_vec();
    let readiness = Readiness::new().check("processes", move || match status::missing(&watched) {
        missing if missing.is_empty() => Ok(()),
        missing => Err(missing),
    });
    let router = admin::router(registry, readiness).merge(status::router(replicas.to_vec()));
    let router = serve::edge::protected(router, &config.http.edge()).map_err(assemble::Error::from)?;
    let (stop, limits) = (CancellationToken::new(), config.http.limits());
    let until = stop.clone();
    let task = tokio::spawn(async move {
        let drained = serve::serve(listener, router, &limits, until).await;
        tracing::debug!(cut_off = drained.cut_off, "the admin listener is closed");
    });
    Ok((stop, task))
}

//! The replicas that are known, and their health.

use std::collections::BTreeSet;
use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpStream, lookup_host};
use tokio::sync::Notify;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep_until, timeout};
use tokio_util::sync::CancellationToken;

use crate::address::{Addresses, Entry};
use crate::choice::{Choice, Standing, choose, hash};

/// How long a connection to a replica may take.
pub const CONNECT_TIMEOUT: Duration = Duration::from_secs(1);

/// How long a replica may take to answer, when it is asked whether it is there.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(3);

/// How often a replica that can be reached is asked whether it is there: a process that was stopped takes connections, and
/// answers nothing.
pub const CHECK_INTERVAL: Duration = Duration::from_secs(5);

/// How often names are resolved.
pub const RESOLVE_INTERVAL: Duration = Duration::from_secs(5);

/// How soon a name is resolved again that has no address yet.
const RESOLVE_AGAIN: Duration = Duration::from_millis(500);

/// How long resolving a name may take.
const RESOLVE_TIMEOUT: Duration = Duration::from_secs(3);

/// The most replicas of one service; further addresses of a name are left out.
const MAX_REPLICAS: usize = 256;

/// The pause before the first and between the later tries to reach a replica again.
const BACKOFF_FIRST: Duration = Duration::from_millis(100);
const BACKOFF_MAX: Duration = Duration::from_secs(5);

/// The replicas of one service. To each belongs an `L`, the caller's link to it: a channel, a pool of connections. Clones
/// share everything.
pub struct Peers<L>(Arc<Shared<L>>);

impl<L> Clone for Peers<L> {
    fn clone(&self) -> Self {
        Peers(Arc::clone(&self.0))
    }
}

struct Shared<L> {
    service: &'static str,
    addresses: Addresses,
    link: Box<dyn Fn(SocketAddr) -> L + Send + Sync>,
    replicas: RwLock<Arc<[Arc<Replica<L>>]>>,
    /// Somebody could not reach a replica.
    lost: Notify,
}

struct Replica<L> {
    address: SocketAddr,
    identity: u64,
    busy: AtomicUsize,
    up: AtomicBool,
    /// It has answered at least once.
    seen: AtomicBool,
    asking: Mutex<Asking>,
    link: L,
}

/// When a replica is asked whether it is there, and how often that has been in vain.
#[derive(Clone, Copy)]
struct Asking {
    in_vain: u32,
    next: Instant,
}

/// A replica that was picked, as long as something is asked of it.
pub struct Picked<L> {
    replica: Arc<Replica<L>>,
    peers: Peers<L>,
}

impl<L> Picked<L> {
    /// Where it is.
    pub fn address(&self) -> SocketAddr {
        self.replica.address
    }

    /// The link to it.
    pub fn link(&self) -> &L {
        &self.replica.link
    }

    /// It took no connection, or did not answer in time: it is left out until it answers again.
    pub fn unreachable(&self) {
        if self.replica.lose(self.peers.0.service) {
            *self.replica.asking() = Asking { in_vain: 0, next: Instant::now() + backoff(0) };
            self.peers.0.lost.notify_one();
        }
    }

    /// It has answered. Only one that was picked by [`Peers::pick_lost`] needs to be told so.
    pub fn reached(&self) {
        self.replica.find(self.peers.0.service);
    }
}

impl<L> Drop for Picked<L> {
    fn drop(&mut self) {
        self.replica.busy.fetch_sub(1, Ordering::Relaxed);
    }
}

impl<L> fmt::Debug for Picked<L> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Picked({})", self.replica.address)
    }
}

impl<L> Replica<L> {
    fn asking(&self) -> std::sync::MutexGuard<'_, Asking> {
        self.asking.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether that is news.
    fn lose(&self, service: &'static str) -> bool {
        let lost = self.up.swap(false, Ordering::Relaxed);
        if lost {
            tracing::warn!(service, replica = %self.address, "a replica cannot be reached");
        }
        lost
    }

    fn find(&self, service: &'static str) {
        // A look first: a write would take the cache line from the other cores, request by request.
        if !self.seen.load(Ordering::Relaxed) {
            self.seen.store(true, Ordering::Relaxed);
        }
        if !self.is_up() && !self.up.swap(true, Ordering::Relaxed) {
            tracing::info!(service, replica = %self.address, "a replica can be reached again");
        }
    }

    fn is_up(&self) -> bool {
        self.up.load(Ordering::Relaxed)
    }

    fn standing(&self) -> Standing {
        Standing { busy: self.busy.load(Ordering::Relaxed), identity: self.identity }
    }
}

impl<L: Send + Sync + 'static> Peers<L> {
    /// The replicas of `service` (its name, for messages). Addresses are known at once and count as reachable; names are
    /// resolved by [`Peers::run`]. `link` makes the link to a new one.
    pub fn new(
        service: &'static str,
        addresses: Addresses,
        link: impl Fn(SocketAddr) -> L + Send + Sync + 'static,
    ) -> Peers<L> {
        let known: BTreeSet<SocketAddr> = addresses.known().collect();
        let peers = Peers(Arc::new(Shared {
            service,
            addresses,
            link: Box::new(link),
            replicas: RwLock::new(Arc::from([])),
            lost: Notify::new(),
        }));
        peers.learn(known);
        peers
    }

    /// The service's name.
    pub fn service(&self) -> &'static str {
        self.0.service
    }

    /// Chooses among the replicas that can be reached and were not `tried`. None when there is none.
    pub fn pick(&self, choice: Choice, tried: &[SocketAddr]) -> Option<Picked<L>> {
        self.pick_among(true, choice, tried)
    }

    /// Chooses among those that could not be reached when that was last tried, and were not `tried`. For a request that found
    /// nobody else: one of them may be back.
    pub fn pick_lost(&self, choice: Choice, tried: &[SocketAddr]) -> Option<Picked<L>> {
        self.pick_among(false, choice, tried)
    }

    fn pick_among(&self, up: bool, choice: Choice, tried: &[SocketAddr]) -> Option<Picked<L>> {
        let replicas = self.replicas();
        let candidates =
            replicas.iter().filter(|replica| replica.is_up() == up && !tried.contains(&replica.address));
        let standing = |replica: &Arc<Replica<L>>| replica.standing();
        let chosen = Arc::clone(choose(choice, candidates, standing, |n| fastrand::usize(..n))?);
        chosen.busy.fetch_add(1, Ordering::Relaxed);
        Some(Picked { replica: chosen, peers: self.clone() })
    }

    /// Whether there is one that can be reached, as far as is known.
    pub fn any_up(&self) -> bool {
        self.replicas().iter().any(|replica| replica.is_up())
    }

    /// Whether there is one that has answered, and can be reached as far as is known.
    pub fn any_seen(&self) -> bool {
        self.replicas().iter().any(|replica| replica.is_up() && replica.seen.load(Ordering::Relaxed))
    }

    /// All replicas that are known, whether they can be reached or not.
    pub fn addresses(&self) -> Vec<SocketAddr> {
        self.replicas().iter().map(|replica| replica.address).collect()
    }

    fn replicas(&self) -> Arc<[Arc<Replica<L>>]> {
        Arc::clone(&self.0.replicas.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// Resolves names, and asks the replicas whether they are there, until `stop`.
    pub async fn run(self, stop: CancellationToken) {
        let mut resolve_at = Instant::now();
        let (mut resolving, mut probing) = (JoinSet::new(), JoinSet::new());
        let mut probed: BTreeSet<SocketAddr> = BTreeSet::new();
        loop {
            let replicas = self.replicas();
            let due = replicas
                .iter()
                .filter(|replica| !probed.contains(&replica.address))
                .map(|replica| replica.asking().next)
                .min();
            tokio::select! {
                biased;
                () = stop.cancelled() => return,
                Some(found) = resolving.join_next(), if !resolving.is_empty() => {
                    let found: Option<BTreeSet<SocketAddr>> = found.ok().flatten();
                    resolve_at = Instant::now() + if found.is_some() { RESOLVE_INTERVAL } else { RESOLVE_AGAIN };
                    if let Some(found) = found {
                        self.learn(found);
                    }
                }
                Some(ended) = probing.join_next(), if !probing.is_empty() => {
                    if let Ok((address, reached)) = ended {
                        probed.remove(&address);
                        self.probed(address, reached);
                    }
                }
                () = self.0.lost.notified() => {}
                () = sleep_until(resolve_at), if self.0.addresses.has_names() && resolving.is_empty() => {
                    resolving.spawn(resolve(self.0.service, self.0.addresses.clone()));
                }
                () = wait_for(due), if due.is_some() => {
                    let now = Instant::now();
                    for replica in replicas.iter() {
                        let address = replica.address;
                        if replica.asking().next <= now && probed.insert(address) {
                            probing.spawn(async move { (address, answers(address).await) });
                        }
                    }
                }
            }
        }
    }

    fn probed(&self, address: SocketAddr, reached: bool) {
        let replicas = self.replicas();
        let Some(replica) = replicas.iter().find(|replica| replica.address == address) else { return };
        let mut asking = replica.asking();
        if reached {
            replica.find(self.0.service);
            *asking = Asking { in_vain: 0, next: Instant::now() + CHECK_INTERVAL };
        } else {
            replica.lose(self.0.service);
            *asking = Asking {
                in_vain: asking.in_vain.saturating_add(1),
                next: Instant::now() + backoff(asking.in_vain),
            };
        }
    }

    /// These are the replicas from now on; those that were known stay as they are.
    fn learn(&self, addresses: BTreeSet<SocketAddr>) {
        let before = self.replicas();
        if before.iter().map(|replica| replica.address).eq(addresses.iter().copied()) {
            return;
        }
        let replica = |address: SocketAddr| match before.iter().find(|known| known.address == address) {
            Some(known) => Arc::clone(known),
            None => Arc::new(Replica {
                address,
                identity: hash(address),
                busy: AtomicUsize::new(0),
                up: AtomicBool::new(true),
                seen: AtomicBool::new(false),
                asking: Mutex::new(Asking { in_vain: 0, next: Instant::now() }),
                link: (self.0.link)(address),
            }),
        };
        let replicas: Arc<[_]> = addresses.into_iter().take(MAX_REPLICAS).map(replica).collect();
        tracing::debug!(service = self.0.service, replicas = replicas.len(), "replicas");
        *self.0.replicas.write().unwrap_or_else(PoisonError::into_inner) = replicas;
    }
}

impl<L> fmt::Debug for Peers<L> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Peers").field(&self.0.service).field(&self.0.addresses).finish()
    }
}

async fn wait_for(due: Option<Instant>) {
    if let Some(due) = due {
        sleep_until(due).await;
    }
}

/// It doubles with each try, up to its bound.
fn backoff(tries: u32) -> Duration {
    BACKOFF_FIRST.saturating_mul(1 << tries.min(16)).min(BACKOFF_MAX)
}

/// A replica is back when it answers HTTP, with whatever: a process that hangs takes connections all the same.
async fn answers(address: SocketAddr) -> bool {
    let ask = async {
        let mut stream = TcpStream::connect(address).await?;
        let question = format!("OPTIONS * HTTP/1.1\r\nhost: {address}\r\nconnection: close\r\n\r\n");
        stream.write_all(question.as_bytes()).await?;
        let mut start = [0; 5];
        stream.read_exact(&mut start).await?;
        Ok::<_, io::Error>(&start == b"HTTP/")
    };
    matches!(timeout(ANSWER_TIMEOUT, ask).await, Ok(Ok(true)))
}

/// All addresses of all entries. None when a name could not be resolved: what is known then stays.
async fn resolve(service: &'static str, addresses: Addresses) -> Option<BTreeSet<SocketAddr>> {
    let mut found: BTreeSet<SocketAddr> = addresses.known().collect();
    for entry in addresses.entries() {
        let Entry::Name(name) = entry else { continue };
        match timeout(RESOLVE_TIMEOUT, lookup_host(name.as_str())).await {
            Ok(Ok(of_name)) => found.extend(of_name),
            Ok(Err(error)) => {
                tracing::warn!(service, name, %error, "a name cannot be resolved");
                return None;
            }
            Err(_) => {
                tracing::warn!(service, name, "resolving a name takes too long");
                return None;
            }
        }
    }
    Some(found)
}

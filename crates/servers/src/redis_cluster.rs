//! A Redis Cluster of three primaries, each with a replica.

use std::path::Path;
use std::time::Duration;

use crate::port::{self, Port};
use crate::{Error, Redis, Reply, program};

/// How many hold slots at first; as many again replicate them.
const PRIMARIES: usize = 3;
/// How many slots there are.
const SLOTS: usize = 16_384;
/// How long the members may take to agree, failover included.
const AGREE_LIMIT: Duration = Duration::from_secs(60);

/// After two seconds without an answer a node counts as failed: a test need not wait long for a failover, and a machine that
/// is busy with a build does not cause one.
const SETTINGS: &[&str] = &[
    "--cluster-enabled",
    "yes",
    "--cluster-node-timeout",
    "2000",
    // However long a replica has not heard of its primary, it may succeed it.
    "--cluster-replica-validity-factor",
    "0",
];

/// Six of them on free ports of 127.0.0.1. They keep nothing but the cluster's shape on disk, and are killed when this is dropped.
#[derive(Debug)]
pub struct RedisCluster {
    nodes: Vec<Redis>,
    /// The ports of the cluster's bus.
    _bus: Vec<Port>,
}

impl RedisCluster {
    /// Starts six, and waits until all agree that all slots are served, and every primary has its replica.
    ///
    /// # Errors
    /// [`Error::Missing`], [`Error::TooOld`]; others when they do not start.
    pub fn start() -> Result<RedisCluster, Error> {
        let program = program::redis()?;
        port::without_clash(|| RedisCluster::form(&program))
    }

    fn form(program: &Path) -> Result<RedisCluster, Error> {
        let bus = Port::take_many(2 * PRIMARIES)?;
        let start = |(number, bus): (usize, &Port)| {
            let bus = bus.number().to_string();
            let settings = [SETTINGS, &["--cluster-port", &bus]].concat();
            Redis::start_on(Port::take()?, &format!("Redis {number}"), program, &settings)
        };
        let nodes = bus.iter().enumerate().map(start).collect::<Result<Vec<_>, _>>()?;
        let cluster = RedisCluster { nodes, _bus: bus };
        cluster.share_slots()?;
        cluster.introduce()?;
        cluster.replicate()?;
        cluster.wait_until_ready()?;
        Ok(cluster)
    }

    fn share_slots(&self) -> Result<(), Error> {
        for (number, node) in self.nodes[..PRIMARIES].iter().enumerate() {
            let first = SLOTS * number / PRIMARIES;
            let last = SLOTS * (number + 1) / PRIMARIES - 1;
            node.call(&["CLUSTER", "ADDSLOTSRANGE", &first.to_string(), &last.to_string()])?;
            // Each its own, or they would have to fight for one.
            node.call(&["CLUSTER", "SET-CONFIG-EPOCH", &(number + 1).to_string()])?;
        }
        Ok(())
    }

    fn introduce(&self) -> Result<(), Error> {
        for (node, bus) in self.nodes.iter().zip(&self._bus).skip(1) {
            let port = node.socket_addr().port().to_string();
            self.nodes[0].call(&["CLUSTER", "MEET", "127.0.0.1", &port, &bus.number().to_string()])?;
        }
        let all = format!("cluster_known_nodes:{}", self.nodes.len());
        self.nodes.iter().try_for_each(|node| {
            let knows_all =
                || node.ask(&["CLUSTER", "INFO"]).is_ok_and(|info| info.lines().any(|line| line == all));
            node.wait_until("it knows all others", AGREE_LIMIT, knows_all)
        })
    }

    fn replicate(&self) -> Result<(), Error> {
        let (primaries, replicas) = self.nodes.split_at(PRIMARIES);
        for (primary, replica) in primaries.iter().zip(replicas) {
            let id = primary.ask(&["CLUSTER", "MYID"])?;
            replica.call(&["CLUSTER", "REPLICATE", &id])?;
        }
        replicas.iter().try_for_each(|replica| {
            replica.wait_until("it follows its primary", AGREE_LIMIT, || follows(replica))
        })
    }

    /// Its servers, in an order that never changes; who of them is a primary does.
    pub fn nodes(&self) -> &[Redis] {
        &self.nodes
    }

    /// `redis://127.0.0.1:PORT` of each.
    pub fn urls(&self) -> Vec<String> {
        self.nodes.iter().map(Redis::url).collect()
    }

    /// Waits until all servers that run agree that all slots are served, and those that replicate do so.
    ///
    /// # Errors
    /// When none runs, or it takes too long.
    pub fn wait_until_ready(&self) -> Result<(), Error> {
        let mut running = self.nodes.iter().filter(|node| node.is_running()).peekable();
        if running.peek().is_none() {
            return Err(Error::NotRunning { server: "the Redis Cluster".to_owned() });
        }
        running.try_for_each(|node| {
            node.wait_until("it sees the whole cluster served", AGREE_LIMIT, || {
                self.is_whole_for(node) && follows(node)
            })
        })
    }

    /// Those that hold slots, as the first server that answers sees it. Who does not run is no primary.
    ///
    /// # Errors
    /// When none answers.
    pub fn primaries(&self) -> Result<Vec<&Redis>, Error> {
        let owners: Vec<Owner> = self.owners()?;
        let holds = |node: &&Redis| owners.iter().any(|owner| owner.port == node.socket_addr().port());
        Ok(self.nodes.iter().filter(|node| node.is_running()).filter(holds).collect())
    }

    /// Who holds this key's slot, as the first server that answers sees it.
    ///
    /// # Errors
    /// When none answers, or nobody holds it.
    pub fn primary_of(&self, key: &str) -> Result<&Redis, Error> {
        let request = format!("CLUSTER KEYSLOT {key}");
        let slot = match self.first_answer(&["CLUSTER", "KEYSLOT", key])? {
            Reply::Number(slot) => slot,
            other => return Err(Error::Refused { request, answer: format!("{other:?}") }),
        };
        let owners = self.owners()?;
        let owner = owners.iter().find(|owner| (owner.first..=owner.last).contains(&slot));
        let node =
            owner.and_then(|owner| self.nodes.iter().find(|node| node.socket_addr().port() == owner.port));
        node.ok_or_else(|| Error::Refused { request, answer: format!("nobody holds slot {slot}") })
    }

    /// Deletes everything in it.
    ///
    /// # Errors
    /// When a primary refuses.
    pub fn flush_all(&self) -> Result<(), Error> {
        self.primaries()?.into_iter().try_for_each(Redis::flush_all)
    }

    /// Kills all: everything in it is lost.
    ///
    /// # Errors
    /// As [`Redis::kill`].
    pub fn kill(&self) -> Result<(), Error> {
        self.nodes.iter().try_for_each(Redis::kill)
    }

    /// Starts those that do not run, and waits until the cluster is whole.
    ///
    /// # Errors
    /// When one does not start.
    pub fn restart(&self) -> Result<(), Error> {
        self.nodes.iter().filter(|node| !node.is_running()).try_for_each(Redis::restart)?;
        self.wait_until_ready()
    }

    fn first_answer(&self, words: &[&str]) -> Result<Reply, Error> {
        let mut running = self.nodes.iter().filter(|node| node.is_running());
        let none = || Error::NotRunning { server: "the Redis Cluster".to_owned() };
        let mut last = running.next().ok_or_else(none)?.call(words);
        for node in running {
            if last.is_ok() {
                break;
            }
            last = node.call(words);
        }
        last
    }

    fn owners(&self) -> Result<Vec<Owner>, Error> {
        Owner::read_all(&self.first_answer(&["CLUSTER", "SLOTS"])?)
    }

    /// Whether this server sees all slots served, by servers that run: for a while it may not have noticed a death.
    fn is_whole_for(&self, node: &Redis) -> bool {
        let Ok(info) = node.ask(&["CLUSTER", "INFO"]) else { return false };
        let all = format!("cluster_slots_ok:{SLOTS}");
        if !(info.lines().any(|line| line == "cluster_state:ok") && info.lines().any(|line| line == all)) {
            return false;
        }
        let runs = |owner: &Owner| {
            self.nodes.iter().any(|node| node.socket_addr().port() == owner.port && node.is_running())
        };
        let owners = node.call(&["CLUSTER", "SLOTS"]).and_then(|reply| Owner::read_all(&reply));
        owners.is_ok_and(|owners| owners.iter().all(runs))
    }
}

/// Who serves a range of slots.
#[derive(Debug, PartialEq, Eq)]
struct Owner {
    first: i64,
    last: i64,
    port: u16,
}

impl Owner {
    fn read_all(slots: &Reply) -> Result<Vec<Owner>, Error> {
        let owners = match slots {
            Reply::List(ranges) => ranges.iter().map(Owner::read).collect(),
            _ => None,
        };
        let refused = || Error::Refused { request: "CLUSTER SLOTS".to_owned(), answer: format!("{slots:?}") };
        owners.ok_or_else(refused)
    }

    /// An entry of CLUSTER SLOTS: first, last, the primary, replicas; a server is its host, its port, its id, and more.
    fn read(range: &Reply) -> Option<Owner> {
        let Reply::List(range) = range else { return None };
        let [Reply::Number(first), Reply::Number(last), Reply::List(primary), ..] = &**range else {
            return None;
        };
        let [_, Reply::Number(port), ..] = &**primary else { return None };
        Some(Owner { first: *first, last: *last, port: u16::try_from(*port).ok()? })
    }
}

/// Whether it is a primary, or in touch with its primary.
fn follows(node: &Redis) -> bool {
    let Ok(info) = node.ask(&["INFO", "replication"]) else { return false };
    info.lines().any(|line| line == "role:master" || line == "master_link_status:up")
}

#[cfg(test)]
mod tests {
    use super::Owner;
    use crate::Reply;

    #[test]
    fn the_owner_of_a_range_is_the_first_server_named() {
        let server = |port| {
            Reply::List(vec![Reply::Text("127.0.0.1".into()), Reply::Number(port), Reply::Text("id".into())])
        };
        let range = Reply::List(vec![Reply::Number(5461), Reply::Number(10922), server(7001), server(7004)]);
        assert_eq!(Owner::read(&range), Some(Owner { first: 5461, last: 10922, port: 7001 }));
        assert_eq!(Owner::read(&Reply::List(vec![Reply::Number(1)])), None);
    }
}

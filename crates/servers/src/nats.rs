//! NATS servers with JetStream.

use std::collections::BTreeSet;
use std::fs;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::port::{self, Port};
use crate::process::Process;
use crate::{Error, http, program};

/// How long a cluster may take to have a leader: an election or two, on a busy machine.
const READY_LIMIT: Duration = Duration::from_secs(60);

/// One server, or a cluster of several, on free ports of 127.0.0.1. They are killed when this is dropped.
#[derive(Debug)]
pub struct Nats {
    nodes: Vec<NatsNode>,
}

/// One server of a cluster.
#[derive(Debug)]
pub struct NatsNode {
    process: Process,
    client: Port,
    monitor: Port,
    /// Held while the cluster is; its number is in the configuration of all.
    _cluster: Port,
}

impl Nats {
    /// Starts so many (1, 3 or 5) and waits until they are connected and have elected a leader.
    ///
    /// # Errors
    /// [`Error::Missing`], [`Error::TooOld`]; others when they do not start.
    pub fn start(nodes: usize) -> Result<Nats, Error> {
        Nats::start_with(nodes, "")
    }

    /// Starts so many with further lines in the configuration of each, such as `max_payload: 8MB`.
    ///
    /// # Errors
    /// As [`Nats::start`].
    pub fn start_with(nodes: usize, configuration: &str) -> Result<Nats, Error> {
        let program = program::nats()?;
        port::without_clash(|| {
            let nats = Nats::configure(&program, nodes, configuration)?;
            nats.restart()?;
            Ok(nats)
        })
    }

    fn configure(program: &Path, count: usize, further: &str) -> Result<Nats, Error> {
        let ports = (0..count).map(|_| Ok([Port::take()?, Port::take()?, Port::take()?]));
        let ports = ports.collect::<Result<Vec<_>, Error>>()?;
        let cluster: Vec<u16> = ports.iter().map(|[.., cluster]| cluster.number()).collect();
        let node = |(number, ports): (usize, [Port; 3])| {
            let name = format!("n{number}");
            let mut process = Process::new(format!("NATS {name}"), program)?;
            let path = process.dir().join("nats.conf");
            let text = configuration(&name, &ports, &cluster, &store(process.dir()), further);
            fs::write(&path, text).map_err(Error::io(format!("write {}", path.display())))?;
            process.set_args(["--config".into(), path.into_os_string()]);
            // Several share the machine with all else: a runtime that looks for work on every processor takes it from others.
            process.set_variables([("GOMAXPROCS", "1")]);
            let [client, monitor, cluster] = ports;
            Ok(NatsNode { process, client, monitor, _cluster: cluster })
        };
        Ok(Nats { nodes: ports.into_iter().enumerate().map(node).collect::<Result<_, Error>>()? })
    }

    /// Its servers.
    pub fn nodes(&self) -> &[NatsNode] {
        &self.nodes
    }

    /// `nats://127.0.0.1:PORT` of each.
    pub fn urls(&self) -> Vec<String> {
        self.nodes.iter().map(NatsNode::url).collect()
    }

    /// Kills all.
    ///
    /// # Errors
    /// As [`NatsNode::kill`].
    pub fn kill(&self) -> Result<(), Error> {
        self.nodes.iter().try_for_each(NatsNode::kill)
    }

    /// Deletes the stores of all, which must not run.
    ///
    /// # Errors
    /// As [`NatsNode::wipe`].
    pub fn wipe(&self) -> Result<(), Error> {
        self.nodes.iter().try_for_each(NatsNode::wipe)
    }

    /// Starts those that do not run, and waits until all are ready.
    ///
    /// # Errors
    /// When one does not start.
    pub fn restart(&self) -> Result<(), Error> {
        for node in self.nodes.iter().filter(|node| !node.is_running()) {
            node.process.spawn()?;
        }
        self.wait_until_ready()
    }

    /// Waits until all servers know each other, JetStream has a leader, and each says that it is healthy.
    ///
    /// # Errors
    /// When one does not run, or it takes too long.
    pub fn wait_until_ready(&self) -> Result<(), Error> {
        let peers = self.nodes.len() - 1;
        self.nodes.iter().try_for_each(|node| {
            node.process
                .wait_until("it is a healthy member of the cluster", READY_LIMIT, || node.is_ready(peers))
        })
    }

    /// The server that leads JetStream at the moment, if one does. (A single one leads nothing.)
    pub fn leader(&self) -> Option<&NatsNode> {
        let name = self.nodes.iter().filter(|node| node.is_running()).find_map(NatsNode::leader)?;
        self.nodes.iter().find(|node| node.process.name().ends_with(&format!(" {name}")))
    }
}

impl NatsNode {
    /// `nats://127.0.0.1:PORT`.
    pub fn url(&self) -> String {
        format!("nats://{}", self.socket_addr())
    }

    /// Where it listens for clients: what a [`Proxy`](crate::Proxy) wants to know.
    pub fn socket_addr(&self) -> SocketAddr {
        address(&self.client)
    }

    /// Where it answers /jsz, /varz and the like.
    pub fn monitor_addr(&self) -> SocketAddr {
        address(&self.monitor)
    }

    /// Its process id, while it runs.
    pub fn pid(&self) -> Option<u32> {
        self.process.pid()
    }

    /// Whether its process is there.
    pub fn is_running(&self) -> bool {
        self.process.is_running()
    }

    /// The end of its log.
    pub fn log(&self) -> String {
        self.process.log_end()
    }

    /// SIGKILL. Returns when it is gone.
    ///
    /// # Errors
    /// When the system does not let it.
    pub fn kill(&self) -> Result<(), Error> {
        self.process.kill()
    }

    /// SIGTERM. Returns when it is gone.
    ///
    /// # Errors
    /// When it does not end.
    pub fn stop(&self) -> Result<(), Error> {
        self.process.stop()
    }

    /// Starts it again, on the same ports and the same store, and waits until it answers; whether the cluster is whole then is
    /// for [`Nats::wait_until_ready`] to tell.
    ///
    /// # Errors
    /// [`Error::Running`] if it runs; others when it does not start.
    pub fn restart(&self) -> Result<(), Error> {
        self.process.start(READY_LIMIT, || {
            http::get(self.monitor_addr(), "/varz").is_ok_and(|(status, _)| status == 200)
        })
    }

    /// SIGSTOP: connections stay open, and nobody answers.
    ///
    /// # Errors
    /// [`Error::NotRunning`] if it does not run.
    pub fn pause(&self) -> Result<(), Error> {
        self.process.pause()
    }

    /// SIGCONT.
    ///
    /// # Errors
    /// [`Error::NotRunning`] if it does not run.
    pub fn resume(&self) -> Result<(), Error> {
        self.process.resume()
    }

    /// Deletes its store: streams, consumers, and what it knows of the cluster.
    ///
    /// # Errors
    /// [`Error::Running`] if it runs.
    pub fn wipe(&self) -> Result<(), Error> {
        if self.is_running() {
            return Err(Error::Running { server: self.process.name().to_owned() });
        }
        let store = store(self.process.dir());
        match fs::remove_dir_all(&store) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                Err(Error::io(format!("remove {}", store.display()))(error))
            }
            _ => Ok(()),
        }
    }

    /// What the clients call themselves that are connected to it; none if it does not say.
    pub fn clients(&self) -> Vec<String> {
        let Ok((200, json)) = http::get(self.monitor_addr(), "/connz") else { return Vec::new() };
        values(&json, "name").map(str::to_owned).collect()
    }

    /// Whether it keeps a stream of this name.
    pub fn keeps(&self, stream: &str) -> bool {
        let Ok((200, json)) = http::get(self.monitor_addr(), "/jsz?streams=true") else {
            return false;
        };
        values(&json, "name").any(|name| name == stream)
    }

    fn is_ready(&self, peers: usize) -> bool {
        let healthy = http::get(self.monitor_addr(), "/healthz").is_ok_and(|(status, _)| status == 200);
        healthy && (peers == 0 || self.routes() == peers && self.leader().is_some())
    }

    /// To how many other servers it is connected. (To each by several connections.)
    fn routes(&self) -> usize {
        let Ok((200, json)) = http::get(self.monitor_addr(), "/routez") else { return 0 };
        values(&json, "remote_name").collect::<BTreeSet<_>>().len()
    }

    /// The name of the server that leads JetStream, as far as this one knows.
    fn leader(&self) -> Option<String> {
        let (_, json) = http::get(self.monitor_addr(), "/jsz").ok().filter(|(status, _)| *status == 200)?;
        let (_, cluster) = json.split_once("\"meta_cluster\"")?;
        values(cluster, "leader").next().filter(|name| !name.is_empty()).map(str::to_owned)
    }
}

fn address(port: &Port) -> SocketAddr {
    (Ipv4Addr::LOCALHOST, port.number()).into()
}

fn store(dir: &Path) -> PathBuf {
    dir.join("store")
}

/// The values that are strings of all fields of this name, wherever they are; names and ids hold nothing that is escaped.
fn values<'a>(json: &'a str, field: &str) -> impl Iterator<Item = &'a str> {
    let name = format!("\"{field}\":");
    let found: Vec<&str> = json.split(&*name).skip(1).collect();
    found.into_iter().filter_map(|rest| rest.trim_start().strip_prefix('"')?.split('"').next())
}

/// JetStream's limits are for a test's disk and memory; how often it syncs is left as it comes.
fn configuration(
    name: &str,
    [client, monitor, own]: &[Port; 3],
    cluster: &[u16],
    store: &Path,
    further: &str,
) -> String {
    let (client, monitor, own) = (client.number(), monitor.number(), own.number());
    let routes: Vec<String> = cluster.iter().map(|port| format!("\"nats://127.0.0.1:{port}\"")).collect();
    let cluster = if cluster.len() > 1 {
        format!(
            "cluster {{ name: sagaline, listen: \"127.0.0.1:{own}\", routes: [{}] }}\n",
            routes.join(", ")
        )
    } else {
        String::new()
    };
    format!(
        "server_name: \"{name}\"\n\
         listen: \"127.0.0.1:{client}\"\n\
         http: \"127.0.0.1:{monitor}\"\n\
         jetstream {{ store_dir: \"{}\", max_memory_store: 1GB, max_file_store: 16GB }}\n\
         {cluster}{further}\n",
        store.display()
    )
}

#[cfg(test)]
mod tests {
    use super::values;

    #[test]
    fn fields_are_found_however_they_are_spaced() {
        let json = r#"{"a": {"leader": "n1", "x": 1}, "b": [{"leader":"n2"}, {"leader": 3}]}"#;
        assert_eq!(values(json, "leader").collect::<Vec<_>>(), ["n1", "n2"]);
        assert_eq!(values(json, "ader").count(), 0);
    }
}

//! Connections: one to a plain Redis, or one to each primary of a cluster.
//!
//! The cluster client of the `redis` crate is not used: while it looks for a node that does not answer it holds back commands to
//! those that do, and when none answers it tries again without a pause. As all keys live in a few hash tags, what is
//! needed of one is little: which node has which tag.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::join_all;
use redis::aio::{ConnectionLike, MultiplexedConnection};
use redis::{
    AsyncConnectionConfig, Client, Cmd, ConnectionAddr, ConnectionInfo, ErrorKind, Pipeline, RedisError,
};
use redis::{RedisResult, Value};

use super::key::{BUCKETS, slot_of_bucket};
use super::settings::Settings;

/// A host and a port.
type Address = (String, u16);

/// A connection to one server process. It never connects again by itself, so what is asked on it is answered by that process, or not
/// at all: whoever takes its place, after a failover or a restart, is another [`Node`].
#[derive(Clone)]
pub(super) struct Node {
    pub(super) connection: MultiplexedConnection,
    /// The process: a server has another one after each start.
    pub(super) run_id: Arc<str>,
}

/// Connections whose users share them; clones are the same connections.
#[derive(Clone)]
pub(super) enum Connection {
    Plain(Node),
    Cluster {
        /// By the address of the primary.
        nodes: HashMap<Address, Node>,
        /// Which primary has each bucket, if one has.
        owners: Vec<Option<Address>>,
    },
}

impl Connection {
    /// Connects to the first node that answers and, if it is one of a cluster, to its primaries. Those that do not answer are left
    /// out. A command on a connection ends after `response_timeout`. Of an earlier one, what still answers is used again.
    pub(super) async fn open(
        settings: &Settings,
        response_timeout: Duration,
        earlier: Option<&Connection>,
    ) -> RedisResult<Connection> {
        let mut last: Option<RedisError> = None;
        for node in settings.nodes() {
            let mut first = match connect(settings, node.clone(), response_timeout).await {
                Ok(connection) => connection,
                Err(error) => {
                    last = Some(error);
                    continue;
                }
            };
            match ask(&mut first.connection, redis::cmd("CLUSTER").arg("SLOTS")).await {
                Ok(slots) => match owners(&slots, node.addr()) {
                    Some(owners) => {
                        return Ok(
                            Connection::to_owners(settings, node, response_timeout, earlier, owners).await
                        );
                    }
                    None => {
                        last =
                            Some((ErrorKind::Parse, "the answer to CLUSTER SLOTS is not understood").into())
                    }
                },
                Err(error) if says_nothing_about_the_command(&error) => last = Some(error),
                // "This instance has cluster support disabled", or a user that may not ask.
                Err(_) => return Ok(Connection::Plain(first)),
            }
        }
        Err(last.unwrap_or_else(|| (ErrorKind::InvalidClientConfig, "no nodes").into()))
    }

    async fn to_owners(
        settings: &Settings,
        like: &ConnectionInfo,
        response_timeout: Duration,
        earlier: Option<&Connection>,
        owners: Vec<Option<Address>>,
    ) -> Connection {
        let mut addresses: Vec<Address> = owners.iter().flatten().cloned().collect();
        addresses.sort();
        addresses.dedup();
        let connections = addresses.into_iter().map(|address| async move {
            let known = match earlier {
                Some(Connection::Cluster { nodes, .. }) => nodes.get(&address).cloned(),
                _ => None,
            };
            if let Some(mut known) = known
                && ask(&mut known.connection, &redis::cmd("PING")).await.is_ok()
            {
                return Some((address, known));
            }
            let (host, port) = address.clone();
            let node = like.clone().set_addr(with_host_of(like.addr(), host, port));
            let opened = connect(settings, node, response_timeout).await;
            opened.ok().map(|connection| (address, connection))
        });
        Connection::Cluster { nodes: join_all(connections).await.into_iter().flatten().collect(), owners }
    }

    pub(super) fn is_cluster(&self) -> bool {
        matches!(self, Connection::Cluster { .. })
    }

    /// The connection to the node that has this bucket.
    pub(super) fn to(&self, bucket: usize) -> Option<Node> {
        match self {
            Connection::Plain(node) => Some(node.clone()),
            Connection::Cluster { nodes, owners } => nodes.get(owners.get(bucket)?.as_ref()?).cloned(),
        }
    }

    /// Buckets, grouped by the node that has them; those that no node has are left out.
    pub(super) fn by_node(&self, buckets: impl Iterator<Item = usize>) -> Vec<Vec<usize>> {
        match self {
            Connection::Plain(_) => vec![buckets.collect()],
            Connection::Cluster { owners, .. } => {
                let mut groups: HashMap<&Address, Vec<usize>> = HashMap::new();
                for bucket in buckets {
                    if let Some(owner) = owners.get(bucket).and_then(Option::as_ref) {
                        groups.entry(owner).or_default().push(bucket);
                    }
                }
                groups.into_values().collect()
            }
        }
    }
}

async fn connect(settings: &Settings, node: ConnectionInfo, response_timeout: Duration) -> RedisResult<Node> {
    let config = AsyncConnectionConfig::new()
        .set_connection_timeout(Some(settings.connect_timeout))
        .set_response_timeout(Some(response_timeout));
    // The library's time-out does not cover the handshake with a server that accepts and says nothing.
    let connecting = async {
        let mut connection =
            Client::open(node)?.get_multiplexed_async_connection_with_config(&config).await?;
        let info = ask(&mut connection, redis::cmd("INFO").arg("server")).await?;
        let run_id = run_id(&info).ok_or((ErrorKind::Parse, "INFO server shows no run_id"))?;
        Ok(Node { connection, run_id })
    };
    let connected = tokio::time::timeout(settings.connect_timeout, connecting).await;
    connected.unwrap_or_else(|_| Err((ErrorKind::Io, "no connection in time").into()))
}

fn run_id(info: &Value) -> Option<Arc<str>> {
    let text = match info {
        Value::BulkString(text) => std::str::from_utf8(text).ok()?,
        Value::SimpleString(text) | Value::VerbatimString { text, .. } => text,
        _ => return None,
    };
    text.lines().find_map(|line| line.strip_prefix("run_id:")).map(Arc::from)
}

/// Sends one command.
pub(super) async fn ask(connection: &mut MultiplexedConnection, command: &Cmd) -> RedisResult<Value> {
    connection.req_packed_command(command).await.and_then(Value::extract_error)
}

/// Sends several commands; each has an answer or an error of its own.
pub(super) async fn ask_all(
    connection: &mut MultiplexedConnection,
    commands: &Pipeline,
) -> RedisResult<Vec<RedisResult<Value>>> {
    let answers = connection.req_packed_commands(commands, 0, commands.len()).await?;
    Ok(answers.into_iter().map(Value::extract_error).collect())
}

/// Reads which primary has each bucket. A node that knows its own address only as nothing or `?` means the one that was asked.
fn owners(slots: &Value, asked: &ConnectionAddr) -> Option<Vec<Option<Address>>> {
    let Value::Array(ranges) = slots else { return None };
    let mut owners = vec![None; BUCKETS];
    for range in ranges {
        let Value::Array(range) = range else { return None };
        let [Value::Int(first), Value::Int(last), Value::Array(primary), ..] = &range[..] else {
            return None;
        };
        let [host, Value::Int(port), ..] = &primary[..] else { return None };
        let host = match host {
            Value::BulkString(host) => String::from_utf8(host.clone()).ok()?,
            Value::SimpleString(host) => host.clone(),
            _ => String::new(),
        };
        let host = match (host.as_str(), asked) {
            ("" | "?", ConnectionAddr::Tcp(host, _) | ConnectionAddr::TcpTls { host, .. }) => host.clone(),
            _ => host,
        };
        let port = u16::try_from(*port).ok()?;
        for (bucket, owner) in owners.iter_mut().enumerate() {
            if (*first..=*last).contains(&i64::from(slot_of_bucket(bucket))) {
                *owner = Some((host.clone(), port));
            }
        }
    }
    Some(owners)
}

/// The kind of address that `like` is, with another host and port.
pub(super) fn with_host_of(like: &ConnectionAddr, host: String, port: u16) -> ConnectionAddr {
    match like {
        ConnectionAddr::TcpTls { insecure, tls_params, .. } => {
            ConnectionAddr::TcpTls { host, port, insecure: *insecure, tls_params: tls_params.clone() }
        }
        _ => ConnectionAddr::Tcp(host, port),
    }
}

/// Whether an error is about the way to the node, or its state, and so none that another command would not get.
pub(super) fn says_nothing_about_the_command(error: &RedisError) -> bool {
    use redis::ServerErrorKind::{Ask, BusyLoading, ClusterDown, MasterDown, Moved, ReadOnly, TryAgain};
    match error.kind() {
        ErrorKind::Server(kind) => {
            matches!(kind, Ask | BusyLoading | ClusterDown | MasterDown | Moved | ReadOnly | TryAgain)
        }
        ErrorKind::Io | ErrorKind::Parse | ErrorKind::AuthenticationFailed => true,
        _ => error.is_timeout() || error.is_connection_dropped(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_bucket_belongs_to_the_primary_of_its_slot() {
        let text = |text: &str| Value::BulkString(text.as_bytes().to_vec());
        let range = |first, last, host, port| {
            let replica = Value::Array(vec![text("replica"), Value::Int(9), text("id")]);
            let primary = Value::Array(vec![text(host), Value::Int(port), text("id")]);
            Value::Array(vec![Value::Int(first), Value::Int(last), primary, replica])
        };
        let asked = ConnectionAddr::Tcp("asked".to_owned(), 1);
        let slots = Value::Array(vec![range(0, 8000, "one", 7001), range(8001, 16_000, "", 7002)]);
        let found = owners(&slots, &asked).expect("understood");
        for (bucket, owner) in found.iter().enumerate() {
            let expected = match slot_of_bucket(bucket) {
                0..=8000 => Some(("one".to_owned(), 7001)),
                8001..=16_000 => Some(("asked".to_owned(), 7002)),
                _ => None,
            };
            assert_eq!(*owner, expected, "bucket {bucket}");
        }
        assert!(owners(&Value::Array(vec![Value::Nil]), &asked).is_none());
    }
}

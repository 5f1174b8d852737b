//! Looking at the servers without changing anything: for an operator who wants to know what a start would find.

use std::time::Duration;

use async_nats::jetstream;
use futures_util::TryStreamExt;

use super::{Settings, StartError, link};

/// How long all that one server is asked may take.
const ANSWER_WITHIN: Duration = Duration::from_secs(5);

/// What one server says.
#[derive(Debug, Clone)]
pub struct Inspection {
    /// Its address, as in the settings.
    pub server: String,
    /// What it says, or why it says nothing.
    pub found: Result<Found, String>,
}

/// What a server says of itself and of the bus's streams.
#[derive(Debug, Clone)]
pub struct Found {
    /// Its version.
    pub version: String,
    /// The cluster's name; None for a server alone.
    pub cluster: Option<String>,
    /// Whether JetStream is there for this user, or why not.
    pub jetstream: Result<JetStream, String>,
}

/// JetStream, for this user.
#[derive(Debug, Clone)]
pub struct JetStream {
    /// Bytes that streams in files may take; none or negative is no limit.
    pub max_storage_bytes: i64,
    /// The streams of this bus that are there.
    pub streams: Vec<Stream>,
}

/// A stream of the bus.
#[derive(Debug, Clone)]
pub struct Stream {
    /// Its name.
    pub name: String,
    /// On how many servers it is to be kept.
    pub replicas: usize,
    /// On how many it is up to date, the leader included; 0 when there is no leader.
    pub current: usize,
    /// Whether it is kept in files.
    pub in_files: bool,
    /// Messages in it.
    pub messages: u64,
}

/// Asks each server of the settings. Changes nothing.
///
/// # Errors
/// [`StartError`] when the settings make no sense; a server that does not answer is told in its [`Inspection`].
pub async fn inspect(settings: &Settings) -> Result<Vec<Inspection>, StartError> {
    let mut inspections = Vec::new();
    for server in &settings.servers {
        let options = link::options(settings).await?;
        let asked = tokio::time::timeout(ANSWER_WITHIN, ask(options, server, &settings.prefix)).await;
        let found = asked.unwrap_or_else(|_| Err(format!("no answer within {ANSWER_WITHIN:?}")));
        inspections.push(Inspection { server: server.clone(), found });
    }
    Ok(inspections)
}

async fn ask(options: async_nats::ConnectOptions, server: &str, prefix: &str) -> Result<Found, String> {
    let client = options.connect(server).await.map_err(|error| link::with_cause(&error))?;
    let info = client.server_info();
    let jetstream = look_at_jetstream(&jetstream::new(client), prefix).await;
    Ok(Found { version: info.version, cluster: info.cluster.filter(|name| !name.is_empty()), jetstream })
}

async fn look_at_jetstream(context: &jetstream::Context, prefix: &str) -> Result<JetStream, String> {
    let account = context.query_account().await.map_err(|error| link::with_cause(&error))?;
    let all: Vec<_> = context.streams().try_collect().await.map_err(|error| link::with_cause(&error))?;
    let ours = all.into_iter().filter(|stream| stream.config.name.starts_with(&format!("{prefix}_")));
    let streams = ours.map(|stream| {
        let current = match &stream.cluster {
            None => 1,
            Some(cluster) if cluster.leader.is_none() => 0,
            Some(cluster) => 1 + cluster.replicas.iter().filter(|peer| peer.current && !peer.offline).count(),
        };
        Stream {
            replicas: stream.config.num_replicas,
            current,
            in_files: stream.config.storage == jetstream::stream::StorageType::File,
            messages: stream.state.messages,
            name: stream.config.name,
        }
    });
    Ok(JetStream { max_storage_bytes: account.limits.max_storage.unwrap_or(-1), streams: streams.collect() })
}

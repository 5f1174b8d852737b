//! Looking at the servers without changing anything: for an operator who wants to know what a start would find.

use std::time::Duration;

use async_nats::jetstream::{self, stream};
use futures_util::TryStreamExt;

use super::{Settings, StartError, Storage, link, topology};
use crate::{Limits, Subject};

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
    /// Bytes that all streams of this account together may take where the bus keeps its own, in files or in memory. None if nothing but
    /// the servers' own limits says it.
    pub limit_bytes: Option<u64>,
    /// Bytes that streams which are not this bus's may take of it.
    pub others_bytes: u64,
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

/// Bytes that the streams of such a bus may take, on all servers together. The servers set them aside when they make a stream.
///
/// # Errors
/// [`StartError`] when the settings or the subjects make no sense.
pub fn streams_bytes(settings: &Settings, limits: &Limits, subjects: &[Subject]) -> Result<u64, StartError> {
    settings.check()?;
    let planned = topology::plan(settings, limits, subjects)?;
    let queues = planned.queues.iter().map(|(_, plan)| plan);
    Ok(queues.chain(&planned.letters).map(|plan| reserved_bytes(&plan.stream)).sum())
}

/// On all servers that keep the stream.
fn reserved_bytes(stream: &stream::Config) -> u64 {
    u64::try_from(stream.max_bytes).unwrap_or(0).saturating_mul(stream.num_replicas as u64)
}

/// Asks each server of the settings. Changes nothing.
///
/// # Errors
/// [`StartError`] when the settings make no sense; a server that does not answer is told in its [`Inspection`].
pub async fn inspect(settings: &Settings) -> Result<Vec<Inspection>, StartError> {
    settings.check()?;
    let mut inspections = Vec::new();
    for server in &settings.servers {
        let options = link::options(settings).await?;
        let asked = tokio::time::timeout(ANSWER_WITHIN, ask(options, server, settings)).await;
        let found = asked.unwrap_or_else(|_| Err(format!("no answer within {ANSWER_WITHIN:?}")));
        inspections.push(Inspection { server: server.clone(), found });
    }
    Ok(inspections)
}

async fn ask(
    options: async_nats::ConnectOptions,
    server: &str,
    settings: &Settings,
) -> Result<Found, String> {
    let client = options.connect(server).await.map_err(|error| link::with_cause(&error))?;
    let info = client.server_info();
    let jetstream = look_at_jetstream(&jetstream::new(client), settings).await;
    Ok(Found { version: info.version, cluster: info.cluster.filter(|name| !name.is_empty()), jetstream })
}

async fn look_at_jetstream(context: &jetstream::Context, settings: &Settings) -> Result<JetStream, String> {
    let account = context.query_account().await.map_err(|error| link::with_cause(&error))?;
    let all: Vec<_> = context.streams().try_collect().await.map_err(|error| link::with_cause(&error))?;
    let (storage, limit) = match settings.storage {
        Storage::File => (stream::StorageType::File, account.limits.max_storage),
        Storage::Memory => (stream::StorageType::Memory, account.limits.max_memory),
    };
    // Where there is a limit for each number of replicas, there is none for the sum.
    let limit = limit.filter(|_| account.tiers.is_empty());
    let prefix = format!("{}_", settings.prefix);
    let (ours, others): (Vec<_>, Vec<_>) =
        all.into_iter().partition(|stream| stream.config.name.starts_with(&prefix));
    let beside = others.iter().map(|stream| &stream.config).filter(|config| config.storage == storage);
    let others_bytes = beside.map(reserved_bytes).sum();
    let streams = ours.into_iter().map(|stream| {
        let current = match &stream.cluster {
            None => 1,
            Some(cluster) if cluster.leader.is_none() => 0,
            Some(cluster) => 1 + cluster.replicas.iter().filter(|peer| peer.current && !peer.offline).count(),
        };
        Stream {
            replicas: stream.config.num_replicas,
            current,
            in_files: stream.config.storage == stream::StorageType::File,
            messages: stream.state.messages,
            name: stream.config.name,
        }
    });
    let limit_bytes = limit.and_then(|bytes| u64::try_from(bytes).ok());
    Ok(JetStream { limit_bytes, others_bytes, streams: streams.collect() })
}

//! Looking at the nodes without changing anything: for an operator who wants to know what a start would find.

use std::collections::HashMap;
use std::time::Duration;

use redis::aio::MultiplexedConnection;
use redis::{Client, FromRedisValue, InfoDict, RedisResult, cmd};

use super::settings::Settings;

/// How long all that one node is asked may take.
const ANSWER_WITHIN: Duration = Duration::from_secs(5);

/// What one node says.
#[derive(Debug, Clone)]
pub struct Inspection {
    /// Its address.
    pub node: String,
    /// What it says, or why it says nothing.
    pub found: Result<Found, String>,
}

/// What a node says of itself. What it may not be asked is None.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Found {
    /// Its version.
    pub version: String,
    /// `ok` or another state of the cluster; None for a Redis alone.
    pub cluster_state: Option<String>,
    /// `maxmemory`, in bytes; 0 is no limit.
    pub maxmemory: Option<u64>,
    /// `maxmemory-policy`.
    pub maxmemory_policy: Option<String>,
    /// Whether it knows BF.ADD.
    pub bloom: bool,
    /// Whether it knows CF.ADD.
    pub cuckoo: bool,
    /// Its clock, in Unix milliseconds.
    pub now_millis: i64,
}

/// Asks each node of the settings. Changes nothing.
pub async fn inspect(settings: &Settings) -> Vec<Inspection> {
    let mut inspections = Vec::new();
    for node in settings.nodes() {
        let asked = tokio::time::timeout(ANSWER_WITHIN, async {
            let mut connection = Client::open(node.clone())?.get_multiplexed_async_connection().await?;
            ask(&mut connection).await
        });
        let found = match asked.await {
            Ok(found) => found.map_err(|error| error.to_string()),
            Err(_) => Err(format!("no answer within {ANSWER_WITHIN:?}")),
        };
        inspections.push(Inspection { node: node.addr().to_string(), found });
    }
    inspections
}

async fn ask(connection: &mut MultiplexedConnection) -> RedisResult<Found> {
    let info: InfoDict = cmd("INFO").query_async(connection).await?;
    let clustered = info.get::<u8>("cluster_enabled") == Some(1);
    let cluster_state = match clustered {
        true => {
            let state: InfoDict = cmd("CLUSTER").arg("INFO").query_async(connection).await?;
            Some(state.get("cluster_state").unwrap_or_else(|| "unknown".to_owned()))
        }
        false => None,
    };
    let (seconds, micros): (i64, i64) = cmd("TIME").query_async(connection).await?;
    Ok(Found {
        version: info.get("redis_version").unwrap_or_else(|| "unknown".to_owned()),
        cluster_state,
        maxmemory: setting(connection, "maxmemory").await,
        maxmemory_policy: setting(connection, "maxmemory-policy").await,
        bloom: knows(connection, "BF.ADD").await,
        cuckoo: knows(connection, "CF.ADD").await,
        now_millis: seconds * 1000 + micros / 1000,
    })
}

/// Hosted servers do not let everybody ask.
async fn setting<T: FromRedisValue>(connection: &mut MultiplexedConnection, name: &str) -> Option<T> {
    let asked = cmd("CONFIG").arg("GET").arg(name).query_async::<HashMap<String, T>>(connection).await;
    asked.ok()?.remove(name)
}

async fn knows(connection: &mut MultiplexedConnection, command: &str) -> bool {
    let info = cmd("COMMAND").arg("INFO").arg(command).query_async::<redis::Value>(connection).await;
    matches!(info, Ok(redis::Value::Array(commands)) if matches!(commands[..], [redis::Value::Array(_)]))
}

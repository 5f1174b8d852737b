//! One process of a distributed shop, as its supervisor tells of it.

use std::path::Path;

use serde::Deserialize;
use tokio::process::Command;

use crate::client::Client;

/// One process.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct Replica {
    /// The service and a number: `order-2`; `gateway`.
    pub name: String,
    /// The service.
    pub service: String,
    /// The address of its API.
    pub api: String,
    /// The address of its operator's door.
    pub admin: String,
    /// Its process id; None while there is no process.
    pub pid: Option<u32>,
    /// Whether it is ready.
    pub ready: bool,
    /// How often it was started again.
    pub restarts: u64,
}

impl Replica {
    pub(crate) fn all(json: &serde_json::Value) -> Vec<Replica> {
        match Vec::deserialize(json) {
            Ok(replicas) => replicas,
            Err(error) => panic!("/replicas: {error}: {json}"),
        }
    }

    /// A client of its API, past the gateway.
    pub fn client(&self) -> Client {
        Client::new(format!("http://{}", self.api))
    }

    /// A client of its operator's door.
    pub fn admin(&self) -> Client {
        Client::new(format!("http://{}", self.admin))
    }

    /// Sends it a signal, by its name without `SIG`.
    ///
    /// # Panics
    /// When there is no process, or it cannot be sent.
    pub async fn signal(&self, name: &str) {
        let Some(pid) = self.pid else { panic!("{} has no process", self.name) };
        let line = format!("kill -{name} {pid}");
        let sent = Command::new("sh").args(["-c", &line]).status().await;
        assert!(sent.as_ref().is_ok_and(std::process::ExitStatus::success), "{line}: {sent:?}");
    }

    /// What its arguments are, as everybody on the machine can see them.
    pub fn arguments(&self) -> String {
        let pid = self.pid.unwrap_or_default();
        let arguments = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        String::from_utf8_lossy(&arguments).replace('\0', " ")
    }
}

/// Whether there is a process with this id that has not ended.
pub fn is_alive(pid: u32) -> bool {
    let status = std::fs::read_to_string(Path::new("/proc").join(pid.to_string()).join("stat"));
    // "PID (NAME) STATE ...": a zombie has ended.
    status.is_ok_and(|stat| !stat.rsplit(") ").next().unwrap_or_default().starts_with('Z'))
}

//! The two servers as processes: the shop on a new data directory, and the bare one.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use testkit::Client;
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::{Child, Command};

use crate::Error;
use crate::process::{self, Memory};

/// How long a server may take until it says where it listens: one that recovers a large WAL takes its time.
const START_LIMIT: Duration = Duration::from_secs(120);
/// How long a killed process may take to be gone.
const GONE_LIMIT: Duration = Duration::from_secs(60);
/// How long the purchases under way may take to end: some may have been lost and are driven again.
const QUIET_LIMIT: Duration = Duration::from_secs(120);
/// The pause between two looks.
const LOOK: Duration = Duration::from_millis(20);

/// Settings of the measured shop that differ from the defaults, each with its reason.
pub(crate) const SHOP_SETTINGS: [(&str, &str, &str); 8] = [
    ("SAGA_LOG__FILTER", "warn", "as in production: no line for each start"),
    ("SAGA_ACCOUNT__ACCESS_TOKEN_SECONDS", "86400", "a token outlives the longest run"),
    ("SAGA_ACCOUNT__LOGINS__BURST_PER_CLIENT", "1000000", "all customers come from one address"),
    ("SAGA_ACCOUNT__LOGINS__BURST_TOTAL", "1000000", "all customers sign up within seconds"),
    ("SAGA_ACCOUNT__PASSWORDS__MAX_WAITING_HASHES", "65536", "all customers sign up within seconds"),
    (
        "SAGA_PURCHASE__MAX_OPEN_PER_CUSTOMER",
        "1000000",
        "a few customers stand for many; the bound of all stays",
    ),
    ("SAGA_HTTP__MAX_CONNECTIONS", "40000", "10,000 event streams; a half of it may be streams"),
    ("SAGA_HTTP__MAX_IN_FLIGHT_REQUESTS", "40000", "event streams are requests, too"),
];

/// A server under load. It is killed when this is dropped.
pub(crate) struct Server {
    child: Child,
    pid: u32,
    /// Where its API is, such as `http://127.0.0.1:12345`.
    pub(crate) base: String,
    /// Where the operator's door is; the bare server has none.
    admin: Option<String>,
}

impl Server {
    async fn start(mut command: Command, lines: &[&str]) -> Result<(Child, Vec<String>), Error> {
        for (name, _) in std::env::vars_os() {
            if name.to_string_lossy().starts_with("SAGA_") {
                command.env_remove(name);
            }
        }
        command.stdin(Stdio::null()).stdout(Stdio::piped()).kill_on_drop(true);
        let mut child = command.spawn()?;
        let stdout = child.stdout.take().ok_or("a child without its output")?;
        let mut said = BufReader::new(stdout).lines();
        let addresses = async {
            let mut found = Vec::new();
            while found.len() < lines.len() {
                let line =
                    said.next_line().await?.ok_or("the server ended before it said where it listens")?;
                if line.trim_start().starts_with(lines[found.len()]) {
                    found.push(base(&line)?);
                }
            }
            Ok::<_, Error>(found)
        };
        let found = tokio::time::timeout(START_LIMIT, addresses).await??;
        // What else it says is read and forgotten, so that it never waits for a reader.
        tokio::spawn(async move { while matches!(said.next_line().await, Ok(Some(_))) {} });
        Ok((child, found))
    }

    /// The bare server.
    ///
    /// # Errors
    /// When it does not start.
    pub(crate) async fn bare(binary: &Path) -> Result<Server, Error> {
        let mut command = with_files(binary);
        command.args(["--listen", "127.0.0.1:0"]);
        let (child, mut found) = Server::start(command, &["listening on"]).await?;
        let pid = child.id().ok_or("the bare server has ended")?;
        Ok(Server { child, pid, base: found.remove(0), admin: None })
    }

    /// The shop on this data directory, on free ports or on those that are given.
    ///
    /// # Errors
    /// When it does not start.
    async fn shop(binary: &Path, data: &Path, addresses: Option<(&str, &str)>) -> Result<Server, Error> {
        let (api, admin) = addresses.unwrap_or(("127.0.0.1:0", "127.0.0.1:0"));
        let mut command = with_files(binary);
        command.args(["--no-demo-data", "--listen", api, "--admin-listen", admin, "--data-dir"]).arg(data);
        command.envs(SHOP_SETTINGS.map(|(name, value, _)| (name, value)));
        let (child, mut found) = Server::start(command, &["shop API", "ready"]).await?;
        let pid = child.id().ok_or("the shop has ended")?;
        let admin = found.pop();
        Ok(Server { child, pid, base: found.remove(0), admin })
    }

    pub(crate) fn client(&self) -> Client {
        Client::new(self.base.clone())
    }

    /// Processor time used so far.
    ///
    /// # Errors
    /// When the process is gone.
    pub(crate) fn cpu_time(&self) -> Result<Duration, Error> {
        Ok(process::cpu_time(self.pid)?)
    }

    /// Memory used now and at most.
    ///
    /// # Errors
    /// When the process is gone.
    pub(crate) fn memory(&self) -> Result<Memory, Error> {
        Ok(process::memory(self.pid)?)
    }

    async fn kill(&mut self) -> Result<(), Error> {
        tokio::time::timeout(GONE_LIMIT, self.child.kill()).await??;
        Ok(())
    }
}

/// A shop with a data directory of its own, which is removed when this is dropped.
pub(crate) struct Shop {
    // First: it is killed before its folder is removed.
    pub(crate) server: Server,
    binary: PathBuf,
    data: PathBuf,
}

impl Shop {
    /// Starts a shop on an empty data directory.
    ///
    /// # Errors
    /// When it does not start.
    pub(crate) async fn open(binary: &Path, data: PathBuf) -> Result<Shop, Error> {
        if data.exists() {
            std::fs::remove_dir_all(&data)?;
        }
        std::fs::create_dir_all(&data)?;
        let server = Server::shop(binary, &data, None).await?;
        Ok(Shop { server, binary: binary.to_owned(), data })
    }

    /// Kills it as a power failure would end its process, and starts it again on the same data and addresses.
    ///
    /// # Errors
    /// When it does not start again.
    pub(crate) async fn kill_and_restart(&mut self) -> Result<(), Error> {
        self.server.kill().await?;
        let host = |base: &str| base.trim_start_matches("http://").to_owned();
        let admin = self.server.admin.as_deref().map(host).unwrap_or_default();
        let api = host(&self.server.base);
        self.server = Server::shop(&self.binary, &self.data, Some((&api, &admin))).await?;
        Ok(())
    }

    /// The gauges of `/metrics` whose names begin with one of these, in the order of the names asked.
    ///
    /// # Errors
    /// When it does not answer.
    pub(crate) async fn gauges(&self, names: &[&str]) -> Result<Vec<f64>, Error> {
        let admin = self.server.admin.clone().ok_or("no operator's door")?;
        let text = Client::new(admin).get("/metrics", None).await?.body;
        Ok(names.iter().map(|name| gauge(&text, name)).collect())
    }

    /// Waits until no purchase is under way.
    ///
    /// # Errors
    /// When some still are after a long time.
    pub(crate) async fn quiet(&self) -> Result<(), Error> {
        let quiet = async {
            while self.gauges(&["saga_in_flight"]).await? != [0.0] {
                tokio::time::sleep(LOOK).await;
            }
            Ok(())
        };
        tokio::time::timeout(QUIET_LIMIT, quiet).await?
    }

    /// The bytes of all write-ahead logs.
    ///
    /// # Errors
    /// When the data directory cannot be read.
    pub(crate) fn wal_bytes(&self) -> Result<u64, Error> {
        let mut bytes = 0;
        for entry in std::fs::read_dir(&self.data)? {
            let entry = entry?;
            if entry.file_name().to_string_lossy().ends_with("-wal") {
                bytes += entry.metadata()?.len();
            }
        }
        Ok(bytes)
    }
}

impl Drop for Shop {
    fn drop(&mut self) {
        let _ = self.server.child.start_kill();
        // What is left in the target directory does no harm: the next shop there begins by removing it.
        let _ = std::fs::remove_dir_all(&self.data);
    }
}

/// A command that may open as many files as the system allows at all: each connection is one.
fn with_files(binary: &Path) -> Command {
    let mut command = Command::new("sh");
    command.args(["-c", r#"ulimit -n "$(ulimit -Hn)"; exec "$0" "$@""#]).arg(binary);
    command
}

/// `http://ADDRESS` in a line of a banner.
fn base(line: &str) -> Result<String, Error> {
    let host = line.split("http://").nth(1).and_then(|text| text.split('/').next());
    let address: Option<SocketAddr> = host.and_then(|host| host.trim().parse().ok());
    Ok(address.map(|address| format!("http://{address}")).ok_or_else(|| format!("no address in {line:?}"))?)
}

/// The sum of a family's series without its labels; 0 where there is none.
fn gauge(text: &str, name: &str) -> f64 {
    let value = |line: &str| {
        let rest = line.strip_prefix(name)?;
        if !rest.starts_with([' ', '{']) {
            return None;
        }
        rest.rsplit_once(' ')?.1.parse::<f64>().ok()
    };
    text.lines().filter_map(value).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_found_in_a_banner() {
        assert_eq!(base("  shop API   http://127.0.0.1:80/api").ok().as_deref(), Some("http://127.0.0.1:80"));
        assert_eq!(base("listening on http://127.0.0.1:80").ok().as_deref(), Some("http://127.0.0.1:80"));
        assert!(base("  shop API   here").is_err());
    }

    #[test]
    fn a_gauge_is_the_sum_of_its_series() {
        let text =
            "# HELP bus_depth x\nbus_depth{q=\"a b\"} 2\nbus_depth{q=\"c\"} 3.5\nbus_depth_max 9\nother 1\n";
        assert_eq!(gauge(text, "bus_depth"), 5.5);
        assert_eq!(gauge(text, "other"), 1.0);
        assert_eq!(gauge(text, "nothing"), 0.0);
    }
}

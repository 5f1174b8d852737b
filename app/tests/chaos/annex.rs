//! Processes beside those that the supervisor keeps, on the same servers: with a failpoint, a clock or a setting of their own.

use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use std::process::Stdio;
use std::time::Duration;

use testkit::{Client, Engines, Shop, TempDir};
use tokio::io::{AsyncBufReadExt, BufReader, Lines};
use tokio::process::{Child, ChildStderr};

use super::{SOON, saga};

/// A process has started within this time: several start at a time, on a machine that may be busy.
const START_WITHIN: Duration = Duration::from_secs(120);

const SIGABRT: i32 = 6;

/// What all of them are told.
pub(crate) struct Annex {
    data: PathBuf,
    variables: Vec<(String, String)>,
}

/// One of them. It is killed when this is dropped.
pub(crate) struct Extra {
    process: Child,
    client: Client,
    admin: Client,
}

impl Annex {
    /// Beside this shop. Its processes know nothing of what is started here: the gateway sends nothing there.
    pub(crate) async fn of(shop: &Shop, dir: &TempDir, engines: &Engines) -> Annex {
        let mut variables = engines.variables();
        let replicas = shop.replicas().await;
        for service in ["account", "product"] {
            let of_service = replicas.iter().filter(|replica| replica.service == service);
            let list = of_service.map(|replica| replica.api.as_str()).collect::<Vec<_>>().join(",");
            variables.push((format!("SAGA_PEERS__{}", service.to_uppercase()), list));
        }
        let settings = [("SAGA_CATALOG__WRITE", "open"), ("SAGA_DEMO_DATA", "false")];
        variables.extend(settings.map(|(name, value)| (name.to_owned(), value.to_owned())));
        Annex { data: dir.path().join("data"), variables }
    }

    /// Starts one, and waits until it is ready.
    pub(crate) async fn start(&self, service: &str, further: &[(&str, &str)]) -> Extra {
        let (process, mut lines) = self.spawn(service, further);
        let ready = async {
            let mut last = String::new();
            while let Some(line) = lines.next_line().await.unwrap() {
                if let Ok(line) = serde_json::from_str::<serde_json::Value>(&line)
                    && line["message"] == "ready"
                {
                    return ["http", "admin"].map(|door| format!("http://{}", line[door].as_str().unwrap()));
                }
                last = line;
            }
            panic!("{service} ended before it was ready: {last}");
        };
        let [client, admin] = tokio::time::timeout(START_WITHIN, ready).await.unwrap().map(Client::new);
        read_on(lines);
        Extra { process, client, admin }
    }

    /// Starts one that dies when it passes this point for the `hit`th time, be that before it is ready, and waits until it has.
    pub(crate) async fn dies_at(&self, service: &str, point: &str, hit: u64) {
        let (process, lines) = self.spawn(service, &[(failpoint::VARIABLE, &armed(point, hit))]);
        read_on(lines);
        // It has to start first.
        has_died(process, point, START_WITHIN + SOON).await;
    }

    fn spawn(&self, service: &str, further: &[(&str, &str)]) -> (Child, Lines<BufReader<ChildStderr>>) {
        let mut command = saga();
        command.args(["run", service, "--listen", "127.0.0.1:0", "--admin-listen", "127.0.0.1:0"]);
        command.arg("--data-dir").arg(&self.data).env("SAGA_LOG__FORMAT", "json");
        command.envs(self.variables.iter().map(|(name, value)| (name, value))).envs(further.iter().copied());
        command.stdout(Stdio::null()).stderr(Stdio::piped());
        let mut process = command.spawn().unwrap();
        let lines = BufReader::new(process.stderr.take().unwrap()).lines();
        (process, lines)
    }
}

impl Extra {
    /// A client of its API.
    pub(crate) fn client(&self) -> &Client {
        &self.client
    }

    /// A client of its operator's door.
    pub(crate) fn admin(&self) -> &Client {
        &self.admin
    }

    /// Its process id.
    pub(crate) fn pid(&self) -> u32 {
        self.process.id().unwrap()
    }

    /// Waits until it has died at this point, for which it was armed.
    pub(crate) async fn dies(self, point: &str) {
        has_died(self.process, point, SOON).await;
    }

    /// SIGKILL. Returns when it is gone.
    pub(crate) async fn kill(&mut self) {
        self.process.kill().await.unwrap();
    }
}

/// What the failpoint's variable says.
pub(crate) fn armed(point: &str, hit: u64) -> String {
    const { assert!(failpoint::ENABLED, "the binary was built without its failpoints") };
    format!("{point}={hit}")
}

/// Messages that a process of this service has taken and then acknowledged (`acked`) or given back (`nacked`).
pub(crate) async fn received(admin: &Client, service: &str, how: &str) -> u64 {
    let metrics = admin.get("/metrics", None).await.unwrap().body;
    let name = format!("{service}_pubsub_subscriber_messages_received_total{{acked=\"{how}\"");
    let lines = metrics.lines().filter(|line| line.starts_with(&name));
    lines.map(|line| line.rsplit(' ').next().unwrap().parse::<u64>().unwrap()).sum()
}

async fn has_died(mut process: Child, point: &str, within: Duration) {
    let status = tokio::time::timeout(within, process.wait()).await;
    let status = status.unwrap_or_else(|_| panic!("{point} was not passed within {within:?}")).unwrap();
    assert_eq!(status.signal(), Some(SIGABRT), "{point}: {status}");
}

/// What else it says is not for us, but has to go somewhere.
fn read_on(mut lines: Lines<BufReader<ChildStderr>>) {
    tokio::spawn(async move { while let Ok(Some(_)) = lines.next_line().await {} });
}

/// Processes that stand still, with all that they have in hand, until this is dropped.
pub(crate) struct Standstill(Vec<u32>);

impl Standstill {
    /// SIGSTOP.
    pub(crate) fn of(pids: impl IntoIterator<Item = u32>) -> Standstill {
        let stopped = Standstill(pids.into_iter().collect());
        assert!(stopped.send("STOP"), "nobody could stop {:?}", stopped.0);
        stopped
    }

    fn send(&self, signal: &str) -> bool {
        let pids = self.0.iter().map(u32::to_string).collect::<Vec<_>>().join(" ");
        let sent = std::process::Command::new("sh").args(["-c", &format!("kill -{signal} {pids}")]).status();
        sent.is_ok_and(|status| status.success())
    }
}

impl Drop for Standstill {
    fn drop(&mut self) {
        // Where a test has failed they may be gone.
        self.send("CONT");
    }
}

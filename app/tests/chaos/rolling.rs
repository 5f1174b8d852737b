//! Every process is restarted, one after the other, while customers buy: row 23 of the list of faults. Meanwhile the program was
//! replaced, as for another version: those that were restarted run from the new file beside those that were not. What is in the two
//! files is the same; messages of another version are for `e2e/tests/faults.rs`.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use testkit::{Client, Engines, Options, Ordeal, Replica, Shop, TempDir, until};

use super::{CROWD, SOON, all_are_ready, much_is_bought, options, turn};

/// Purchases between two restarts.
const SOME: usize = 20;

/// Somebody who reads the catalogue all the while, and is never told anything but the catalogue, or to come again.
struct Reader {
    stop: Arc<AtomicBool>,
    read: Arc<AtomicUsize>,
    task: tokio::task::JoinHandle<()>,
}

impl Reader {
    fn begin(client: Client, product: u64) -> Reader {
        let (stop, read) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)));
        let (stopped, count) = (Arc::clone(&stop), Arc::clone(&read));
        let task = tokio::spawn(async move {
            let path = format!("/api/product/{product}");
            while !stopped.load(Ordering::Relaxed) {
                let answer = client.get(&path, None).await.unwrap();
                assert!(matches!(answer.status, 200 | 503), "{} {}", answer.status, answer.body);
                count.fetch_add(1, Ordering::Relaxed);
            }
        });
        Reader { stop, read, task }
    }

    async fn end(self) -> usize {
        self.stop.store(true, Ordering::Relaxed);
        self.task.await.unwrap();
        self.read.load(Ordering::Relaxed)
    }
}

/// The program, in a file of its own.
fn install(program: &Path) {
    let new = program.with_extension("new");
    std::fs::copy(env!("CARGO_BIN_EXE_saga"), &new).unwrap();
    std::fs::rename(new, program).unwrap();
}

/// Whether a process runs from this file, and not from one that was there before.
fn runs_from(program: &Path, pid: u32) -> bool {
    let file = std::fs::metadata(program).unwrap();
    std::fs::metadata(format!("/proc/{pid}/exe")).is_ok_and(|own| own.ino() == file.ino())
}

/// As an operator restarts a process: SIGTERM. How long it was away.
async fn restart(shop: &Shop, replica: &Replica, program: &Path) -> Duration {
    assert!(!runs_from(program, replica.pid.unwrap()), "{}", replica.name);
    let begun = Instant::now();
    replica.signal("TERM").await;
    until(&format!("{} is back", replica.name), SOON, async || {
        let now = shop.replicas().await;
        let again = now.iter().find(|now| now.name == replica.name).unwrap();
        let runs = again.pid.is_some_and(|pid| runs_from(program, pid));
        again.ready && again.restarts == replica.restarts + 1 && runs
    })
    .await;
    begun.elapsed()
}

#[tokio::test(flavor = "multi_thread")]
async fn every_process_is_restarted_and_no_customer_notices() {
    let _turn = turn().await;
    let (dir, engines) = (TempDir::new(), Engines::shared());
    let program: PathBuf = dir.path().join("saga");
    install(&program);
    // A machine that stands still for seconds closes no connection that somebody is about to use.
    let options = options(&dir, &engines).env("SAGA_HTTP__HEAD_TIMEOUT_MS", "60000");
    let options = Options { binary: program.clone(), ..options };
    let mut ordeal = Ordeal::begin("rolling restart", options, CROWD).await;
    let shop = ordeal.open().await;
    install(&program);
    much_is_bought(&ordeal, SOME).await;
    let reader = Reader::begin(shop.client(), ordeal.catalogue().plenty[0].id);

    let (gateway, replicas): (Vec<_>, Vec<_>) =
        shop.replicas().await.into_iter().partition(|replica| replica.service == "gateway");
    let mut away = Vec::new();
    for replica in &replicas {
        away.push(restart(&shop, replica, &program).await);
        much_is_bought(&ordeal, SOME).await;
    }
    let read = reader.end().await;
    let report = ordeal.reckon(&shop, "row 23: all replicas restarted").await;
    let figures = ordeal.ledger().figures();
    assert_eq!(figures.unanswered_with_key, 0, "requests were lost: {figures:?}");
    // What was acknowledged is there, and nothing else: what was refused had no effect. A request without a key that reached a replica at
    // its very end may be answered 502, that nobody knows; on a machine that keeps up none is.
    let unknown = report.accepted - figures.acknowledged;
    assert!(unknown <= figures.unanswered, "{unknown} beyond what was acknowledged: {figures:?}");
    away.sort_unstable();
    println!(
        "{} replicas, each away for {:.1?} (median), {:.1?} (longest); the catalogue was read {read} times",
        away.len(),
        away[away.len() / 2],
        away[away.len() - 1]
    );

    // The one gateway's address takes nobody for a moment: its clients come again.
    let took = restart(&shop, &gateway[0], &program).await;
    much_is_bought(&ordeal, SOME).await;
    let unanswered = ordeal.ledger().figures().unanswered;
    println!("the gateway was away for {took:.1?}; {unanswered} requests had no answer");
    all_are_ready(&shop).await;
    let log = shop.stderr();
    assert!(!log.contains("a process has died"), "somebody died:\n{}", testkit::tail(&log));
    ordeal.end_in(shop).await;
}

//! A disk that fails: fsync reports an error, space runs out and comes back, the last write is torn.
//!
//! The faults are real: system calls are failed by `strace`, space by a small file system of its own. What that needs (Linux, the
//! package strace and the right to trace; the right to mount) must be there: a test that cannot inject its fault fails and says
//! what is missing.

#![allow(clippy::unwrap_used, reason = "what fails here fails the test")]

use std::collections::BTreeSet;
use std::fs::{self, File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use testkit::checks::{self, Violation};
use testkit::traffic::{self, Cart, Customer, Habits, Product};
use testkit::{Client, Options, Ordeal, Shop, TempDir, tail, until};

const SIGABRT: i32 = 6;
/// What is expected to happen, happens within this time.
const SOON: Duration = Duration::from_secs(60);

fn options(data_dir: PathBuf) -> Options {
    Options::new(env!("CARGO_BIN_EXE_saga"), data_dir)
        .arg("--no-demo-data")
        .env("SAGA_PURCHASE__RETRY_FIRST_SECONDS", "1")
        .env("SAGA_PURCHASE__RETRY_MAX_SECONDS", "2")
}

/// Ends the test unless strace is there and may trace.
fn need_strace() {
    let tried = Command::new("strace").args(["-f", "-o", "/dev/null", "true"]).output();
    let problem = match tried {
        Ok(output) if output.status.success() => return,
        Ok(output) => String::from_utf8_lossy(&output.stderr).into_owned(),
        Err(error) => error.to_string(),
    };
    panic!(
        "row 14 needs strace and the right to trace a child: {problem}\n\
         install it (apt-get install strace); in a container, allow it (--cap-add=SYS_PTRACE)"
    );
}

/// Fails fsync with EIO from within the kernel's boundary: the `nth` call of each thread, and those after it if `lasting`.
fn with_failing_fsync(options: &Options, nth: u64, lasting: bool) -> Options {
    let when = if lasting { format!("{nth}+") } else { nth.to_string() };
    let inject = format!("inject=fsync,fdatasync:error=EIO:when={when}");
    // -D: the tracer is the grandchild, so that the process itself is what is waited for.
    let wrapper =
        ["strace", "-D", "-f", "-qq", "-o", "/dev/null", "-e", "trace=fsync,fdatasync", "-e", &inject];
    Options { wrapper: wrapper.map(str::to_owned).into(), ..options.clone() }
}

#[tokio::test(flavor = "multi_thread")]
async fn row_14_after_a_failed_fsync_the_process_stops_and_nothing_answered_is_lost() {
    need_strace();
    let dir = TempDir::new();
    let mut ordeal = Ordeal::begin("row 14", options(dir.path().join("data")), Habits::default()).await;
    let chosen = ordeal.dice().below(60);
    // The first is at the start; a single failure is the worst case: the next fsync would report success.
    for (nth, lasting) in [(1, true), (3, false), (8, false), (20, true), (30 + chosen, false)] {
        let failing = with_failing_fsync(ordeal.options(), nth, lasting);
        let (status, log) = ordeal.dies_by_itself(&format!("fsync {nth}, lasting: {lasting}"), failing).await;
        if nth == 1 {
            assert!(!status.success(), "{status}:\n{}", tail(&log));
            continue;
        }
        assert_eq!(status.signal(), Some(SIGABRT), "{status}:\n{}", tail(&log));
        assert!(log.contains("stopping without answering"), "it does not say why:\n{}", tail(&log));
    }
    ordeal.end().await;
}

/// Several times what the databases need: their WALs may grow to 8 MiB each before they are written back, and the shop itself must
/// not be what fills it.
const DISK_SIZE: &str = "160m";

/// A file system of its own, in memory, of a fixed size. Unmounted when this is dropped.
struct SmallDisk(PathBuf);

impl SmallDisk {
    fn mount(path: &Path, size: &str) -> SmallDisk {
        fs::create_dir_all(path).unwrap();
        let options = format!("size={size}");
        let mounted = Command::new("mount").args(["-t", "tmpfs", "-o", &options, "tmpfs"]).arg(path).output();
        let problem = match mounted {
            Ok(output) if output.status.success() => return SmallDisk(path.to_owned()),
            Ok(output) => String::from_utf8_lossy(&output.stderr).into_owned(),
            Err(error) => error.to_string(),
        };
        panic!(
            "row 15 needs the right to mount a small tmpfs at {}: {problem}\n\
             run it as root; in a container, allow it (--cap-add=SYS_ADMIN)",
            path.display()
        );
    }

    fn ballast(&self) -> PathBuf {
        self.0.join("ballast")
    }

    /// Takes all the space that is left.
    fn fill(&self) -> u64 {
        let mut file = OpenOptions::new().create(true).append(true).open(self.ballast()).unwrap();
        // Ever smaller pieces, until not one byte fits.
        for size in [65_536, 4_096, 512, 1] {
            while file.write_all(&vec![7; size]).is_ok() {}
        }
        file.metadata().unwrap().len()
    }

    fn free(&self) {
        fs::remove_file(self.ballast()).unwrap();
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        // Lazily: a process that was just killed may still hold a file.
        let _ = Command::new("umount").arg("-l").arg(&self.0).status();
    }
}

/// Somebody who asks directly, beside the customers, what the disk lets them have.
struct Prober {
    client: Client,
    customer: Customer,
    cart: Cart,
    bought: BTreeSet<u64>,
    refused: usize,
}

impl Prober {
    async fn new(client: Client, ordeal: &mut Ordeal) -> Prober {
        let product = Product::create(&client, "probe", 1, 1_000_000).await;
        ordeal.also_has(product);
        let customer = Customer::sign_up(&client, 99).await;
        let cart = Cart { lines: vec![(product.id, 1)] };
        Prober { client, customer, cart, bought: BTreeSet::new(), refused: 0 }
    }

    /// Tries to buy: 201, or 503 with Retry-After, and nothing else.
    async fn buy(&mut self) {
        let answer = self.customer.buy(&self.client, &self.cart, None).await.unwrap();
        match answer.status {
            201 => assert!(self.bought.insert(answer.json()["purchase_id"].as_u64().unwrap())),
            503 => {
                let retry_after = &answer.headers["retry-after"];
                assert!(retry_after.to_str().unwrap().parse::<u32>().unwrap() > 0, "{retry_after:?}");
                self.refused += 1;
            }
            other => panic!("answered {other} {}", answer.body),
        }
    }

    async fn until_refused(&mut self, times: usize) {
        let target = self.refused + times;
        until("purchases are refused", SOON, async || {
            self.buy().await;
            self.refused >= target
        })
        .await;
    }

    async fn until_bought(&mut self, times: usize) {
        let target = self.bought.len() + times;
        until("purchases succeed", SOON, async || {
            self.buy().await;
            self.bought.len() >= target
        })
        .await;
    }

    async fn get(&self, path: &str) {
        let answer = self.client.get(path, Some(&self.customer.token)).await.unwrap();
        assert_eq!(answer.status, 200, "GET {path}: {}", answer.body);
    }

    /// Everything that was answered 201 is there and ends, and nothing else is there.
    async fn until_all_ended(&self) {
        until("what the prober has bought has ended", SOON, async || {
            let ended = traffic::all_ended(&self.client, std::slice::from_ref(&self.customer)).await;
            ended.is_some_and(|ids| ids == self.bought)
        })
        .await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn row_15_on_a_full_disk_purchases_are_refused_and_reads_go_on_until_there_is_space() {
    const TIMES: usize = 30;
    let dir = TempDir::new();
    let disk = SmallDisk::mount(&dir.path().join("disk"), DISK_SIZE);
    let habits = Habits { refusals_are_fine: true, ..Habits::default() };
    let mut ordeal = Ordeal::begin("row 15", options(disk.0.join("data")), habits).await;
    let mut shop = ordeal.open().await;
    let mut prober = Prober::new(shop.client(), &mut ordeal).await;
    let begun = Instant::now();
    for time in 1..=3 {
        prober.until_bought(TIMES).await;
        let taken = disk.fill();
        prober.until_refused(TIMES).await;
        // What the shop freed by itself is taken, too.
        disk.fill();
        prober.until_refused(TIMES).await;
        let earlier = *prober.bought.first().unwrap();
        for path in ["/api/products?size=10", "/api/purchases?size=10"] {
            prober.get(path).await;
        }
        prober.get(&format!("/api/purchase/{earlier}")).await;
        prober.get(&format!("/api/product/{}", prober.cart.lines[0].0)).await;
        assert_eq!(shop.admin().get("/healthz", None).await.unwrap().status, 200);
        assert!(shop.is_running(), "{}", tail(&shop.stderr()));
        ordeal.ledger().assert_no_faults();
        let (refused, customers) = (prober.refused, ordeal.ledger().figures());
        println!(
            "row 15, time {time}: {taken} bytes taken; {refused} refused so far; reads go on; {customers:?}"
        );
        disk.free();
    }
    prober.until_bought(TIMES).await;
    println!("row 15, {:.1?}: purchases succeed again", begun.elapsed());
    prober.until_all_ended().await;
    assert!(shop.is_running(), "{}", tail(&shop.stderr()));
    ordeal.end_in(shop).await;
}

/// A copy of a running shop's data directory, as a power failure at this instant would leave it.
async fn copy_at_an_instant(shop: &Shop, from: &Path, to: &Path) {
    shop.signal("STOP").await;
    fs::create_dir_all(to).unwrap();
    copy(from, to);
    shop.signal("CONT").await;
}

fn copy(from: &Path, to: &Path) {
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let target = to.join(entry.file_name());
        if entry.file_type().unwrap().is_dir() {
            fs::create_dir_all(&target).unwrap();
            copy(&entry.path(), &target);
        } else if !entry.file_name().to_string_lossy().ends_with("-shm") {
            // Shared memory does not survive a power failure.
            fs::copy(entry.path(), &target).unwrap();
        }
    }
}

/// Cuts a WAL within its last frame, and returns how many whole frames are left. The format is that of
/// <https://sqlite.org/fileformat2.html#walformat>: frames of an older generation, behind the last one, have another salt.
fn tear_last_frame(wal: &Path) -> u64 {
    const HEADER_BYTES: u64 = 32;
    const FRAME_HEADER_BYTES: u64 = 24;
    let read = |file: &mut File, at: u64, bytes: &mut [u8]| {
        file.seek(SeekFrom::Start(at)).unwrap();
        file.read_exact(bytes).is_ok()
    };
    let mut file = OpenOptions::new().read(true).write(true).open(wal).unwrap();
    let mut header = [0; HEADER_BYTES as usize];
    assert!(read(&mut file, 0, &mut header), "the WAL {} is empty", wal.display());
    let page_bytes = u64::from(u32::from_be_bytes(header[8..12].try_into().unwrap()));
    let frame_bytes = FRAME_HEADER_BYTES + page_bytes;
    let mut frame = [0; FRAME_HEADER_BYTES as usize];
    let mut count = 0;
    while read(&mut file, HEADER_BYTES + count * frame_bytes, &mut frame) && frame[8..16] == header[16..24] {
        count += 1;
    }
    assert!(count > 0, "the WAL {} has no frames", wal.display());
    file.set_len(HEADER_BYTES + count * frame_bytes - page_bytes / 2).unwrap();
    count - 1
}

/// Lets a copy whose last write to its purchases was torn run until all has ended, and checks it.
async fn heal(ordeal: &Ordeal, copied: PathBuf) -> (u64, checks::Report) {
    let frames = tear_last_frame(&copied.join("purchase.db-wal"));
    let options = Options { data_dir: copied, ..ordeal.options().clone() };
    let mut shop = Shop::start(options.clone()).await.unwrap();
    let client = shop.client();
    until("everything that it knows of has ended", SOON, async || {
        traffic::all_ended(&client, ordeal.customers()).await.is_some()
    })
    .await;
    assert!(shop.terminate().await.success());
    // What was torn off may have been acknowledged: this fault is worse than a power failure, which keeps what was synced.
    let expected = checks::Expected { acknowledged: [].into(), keys: [].into(), ..ordeal.expected() };
    let report = checks::check(&options.data_dir, &expected).unwrap();
    (frames, report)
}

#[tokio::test(flavor = "multi_thread")]
async fn row_16_a_wal_torn_in_its_last_frame_loses_no_more_than_that() {
    let dir = TempDir::new();
    let data = dir.path().join("data");
    let mut ordeal = Ordeal::begin("row 16", options(data.clone()), Habits::default()).await;
    let shop = ordeal.open().await;
    for copy in 1..=4 {
        let before = ordeal.ledger().figures().acknowledged;
        until("the shop is busy", SOON, async || ordeal.ledger().figures().acknowledged > before + 40).await;
        let copied = dir.path().join(format!("copy-{copy}"));
        copy_at_an_instant(&shop, &data, &copied).await;
        let (frames, report) = heal(&ordeal, copied).await;
        println!("row 16: {frames} whole frames left; {report}");
        assert!(report.accepted > 0 && report.open == 0 && report.parked == 0, "{report}");
        let is_of_the_torn = |violation: &Violation| match violation {
            // A purchase whose acceptance was torn off may have got as far as its effects, and those are counted.
            Violation::UnknownSaga { .. }
            | Violation::EffectOfNobody { .. }
            | Violation::Stock { .. }
            | Violation::SumOfPayments { .. } => true,
            _ => false,
        };
        let torn = report.violations.iter().any(|it| matches!(it, Violation::UnknownSaga { .. }));
        let excused = |violation: &Violation| torn && is_of_the_torn(violation);
        assert!(report.violations.iter().all(excused), "{report}");
    }
    ordeal.end_in(shop).await;
}

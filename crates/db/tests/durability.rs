//! SQLite's files: what is on the disk when the power fails or the disk is full, and how the WAL is kept short.
#![allow(clippy::unwrap_used, reason = "also in the functions that tests share")]

mod support;

use std::path::{Path, PathBuf};
use std::process::Command;

use db::{Db, Error, Settings, Tx};
use support::{Folder, Hold, ITEMS, ids, insert, integrity, queued};

const WAL_HEADER_BYTES: usize = 32;
const FRAME_HEADER_BYTES: usize = 24;

/// The frames of a WAL, see sqlite.org/fileformat2.html, section 4: where each ends, and whether it commits.
fn frames(wal: &[u8]) -> Vec<(usize, bool)> {
    let big_endian = |at: usize| u32::from_be_bytes(wal[at..at + 4].try_into().unwrap());
    let frame_bytes = FRAME_HEADER_BYTES + big_endian(8) as usize;
    let salt = &wal[16..24];
    (WAL_HEADER_BYTES..=wal.len() - frame_bytes)
        .step_by(frame_bytes)
        .take_while(|start| &wal[start + 8..start + 16] == salt)
        .map(|start| (start + frame_bytes, big_endian(start + 4) != 0))
        .collect()
}

/// Opens a copy of the database with this WAL, as a restart would.
async fn reopened(folder: &Folder, database: &[u8], wal: &[u8]) -> Vec<u64> {
    let copy = folder.path().join("copy");
    let _ = std::fs::remove_dir_all(&copy);
    std::fs::create_dir(&copy).unwrap();
    std::fs::write(copy.join("test.db"), database).unwrap();
    std::fs::write(copy.join("test.db-wal"), wal).unwrap();
    let db = Db::open(Settings::new(copy.join("test.db"), "copy"), ITEMS).unwrap();
    assert_eq!(integrity(&db).await, ["ok"]);
    let found = ids(&db).await;
    insert(&db, 1_000_000).await.unwrap();
    db.close().await;
    found
}

#[tokio::test]
async fn a_wal_cut_anywhere_in_its_last_frames_keeps_the_acknowledged_prefix() {
    let folder = Folder::new("wal-cut");
    let db = Db::open(Settings { checkpoint_pages: 12, ..folder.settings() }, ITEMS).unwrap();
    // Enough to have begun the WAL anew: behind the newest frames lie whole ones of an earlier round.
    for id in 1..=45 {
        insert(&db, id).await.unwrap();
    }
    let database = std::fs::read(folder.path().join("test.db")).unwrap();
    let wal = std::fs::read(folder.path().join("test.db-wal")).unwrap();
    let frames = frames(&wal);
    let frame_bytes = frames[0].0 - WAL_HEADER_BYTES;
    let commits: Vec<_> = frames.iter().filter(|frame| frame.1).map(|frame| frame.0).collect();
    assert!(commits.len() >= 3 && frames[frames.len() - 1].0 < wal.len(), "the test needs an old rest");

    let in_database = 45 - commits.len();
    let expected = |cut: usize| {
        let kept = in_database + commits.iter().filter(|end| **end <= cut).count();
        (1..=kept as u64).collect::<Vec<_>>()
    };
    for (end, _) in &frames[frames.len() - 5..] {
        let start = end - frame_bytes;
        for into in [0, 1, 4, 8, 16, 23, 24, 25, 1000, frame_bytes / 2, frame_bytes - 1, frame_bytes] {
            let cut = start + into;
            assert_eq!(reopened(&folder, &database, &wal[..cut]).await, expected(cut), "cut at {cut}");

            // The power failed while the frame was being written over an older one: a torn frame.
            let mut torn = wal.clone();
            torn[cut..].fill(0xA5);
            assert_eq!(reopened(&folder, &database, &torn).await, expected(cut), "torn at {cut}");
        }
    }
    assert_eq!(reopened(&folder, &database, &wal).await, expected(wal.len()));
}

fn insert_blob(tx: &mut Tx<'_>, id: u64, bytes: usize) -> Result<(), Error> {
    let data = vec![7; bytes];
    tx.execute("INSERT INTO item (id, data) VALUES (?, ?)", &[id.into(), (&data).into()]).map(drop)
}

async fn insert_large(db: &Db, id: u64, bytes: usize) -> Result<(), Error> {
    db.write(move |tx| insert_blob(tx, id, bytes)).await
}

/// Sets the database's page limit, 0 to read it.
async fn limit_pages(db: &Db, more: Option<u64>) {
    db.write(move |tx| {
        let pages = tx.query_opt("PRAGMA page_count", &[], |row| row.get::<u64>(0))?.unwrap();
        let limit = more.map_or(1 << 30, |more| pages + more);
        // PRAGMA takes no parameters; a test may leak a text.
        let sql: &'static str = format!("PRAGMA max_page_count = {limit}").leak();
        tx.query(sql, &[], |row| row.get::<i64>(0)).map(drop)
    })
    .await
    .map_err(|error: Error| error)
    .unwrap();
}

#[tokio::test]
async fn a_closure_that_finds_no_space_fails_with_full_and_the_database_goes_on() {
    const REFUSING: u64 = 50;
    let folder = Folder::new("page-limit");
    let db = folder.open();
    insert(&db, 1).await.unwrap();
    limit_pages(&db, Some(10)).await;

    let hold = Hold::writer(&db).await;
    let mut group = Vec::new();
    for (id, bytes) in [(2_u64, 10), (REFUSING, 10), (3, 1_000_000), (4, 10)] {
        let caller = db.clone();
        group.push(tokio::spawn(async move {
            caller
                .write(move |tx| {
                    let inserted = insert_blob(tx, id, bytes);
                    if id == REFUSING {
                        return Err(Error::Panicked);
                    }
                    if inserted.is_err() {
                        // Whoever ignores the error must not write outside of a transaction.
                        assert_eq!(insert_blob(tx, 100 + id, 1), Err(Error::Full));
                        return Ok(());
                    }
                    inserted
                })
                .await
        }));
        queued(&db, group.len()).await;
    }
    hold.release().await;
    let mut committed = vec![1];
    // The one that refused had seen what was then lost: it too is told that there is no space.
    for (id, caller) in [2, REFUSING, 3, 4].into_iter().zip(group) {
        match caller.await.unwrap() {
            Ok(()) => committed.push(id),
            Err(error) => assert_eq!(error, Error::Full),
        }
    }
    assert!(!committed.contains(&3) && committed.contains(&4), "{committed:?}");
    assert_eq!(ids(&db).await, committed);

    limit_pages(&db, None).await;
    insert_large(&db, 3, 1_000_000).await.unwrap();
    assert!(ids(&db).await.contains(&3));
    assert_eq!(integrity(&db).await, ["ok"]);
}

/// A file system of its own with little space. Needs root, as in CI.
struct SmallDisk(PathBuf);

impl SmallDisk {
    fn mount(folder: &Folder, bytes: usize) -> SmallDisk {
        let path = folder.path().join("disk");
        std::fs::create_dir(&path).unwrap();
        let size = format!("size={bytes}");
        let mounted = Command::new("mount").args(["-t", "tmpfs", "-o", &size, "tmpfs"]).arg(&path).output();
        let failed = match mounted {
            Ok(output) if output.status.success() => return SmallDisk(path),
            Ok(output) => String::from_utf8_lossy(&output.stderr).into_owned(),
            Err(error) => error.to_string(),
        };
        panic!("this test mounts a tmpfs and needs root with CAP_SYS_ADMIN: mount said: {failed}");
    }

    fn path(&self) -> &Path {
        &self.0
    }

    /// Takes all space but so much.
    fn leave(&self, bytes: usize, disk_bytes: usize) -> Filler {
        let filler = self.0.join("filler");
        let used: u64 = std::fs::read_dir(&self.0)
            .unwrap()
            .map(|entry| std::os::unix::fs::MetadataExt::blocks(&entry.unwrap().metadata().unwrap()) * 512)
            .sum();
        let free = disk_bytes.saturating_sub(used as usize);
        std::fs::write(&filler, vec![1; free.saturating_sub(bytes)]).unwrap();
        Filler(filler)
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.0).status();
    }
}

struct Filler(PathBuf);

impl Drop for Filler {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

#[tokio::test]
async fn a_full_disk_refuses_writes_until_there_is_space_again() {
    const DISK_BYTES: usize = 8 << 20;
    let folder = Folder::new("disk-full");
    let disk = SmallDisk::mount(&folder, DISK_BYTES);
    let settings = Settings::new(disk.path().join("test.db"), "full");
    let db = Db::open(Settings { checkpoint_pages: 300, ..settings.clone() }, ITEMS).unwrap();
    let mut acknowledged = Vec::new();
    let mut id = 0;
    // The space ends at a different place of a transaction in each round.
    for round in 0..12 {
        let filler = disk.leave(40_000 + round * 1_777, DISK_BYTES);
        let mut refused = 0;
        while refused < 20 {
            assert!(acknowledged.len() * 9_000 < DISK_BYTES, "more was acknowledged than fits");
            id += 1;
            match insert_large(&db, id, 9_000).await {
                Ok(()) => acknowledged.push(id),
                Err(error) => {
                    assert_eq!(error, Error::Full);
                    refused += 1;
                }
            }
        }
        assert_eq!(ids(&db).await, acknowledged, "reads go on, and see what was acknowledged");
        drop(filler);
        id += 1;
        insert_large(&db, id, 9_000).await.unwrap();
        acknowledged.push(id);
        // Make room again, for the next round.
        let emptied = "DELETE FROM item WHERE id % 7 <> 0";
        db.write(move |tx| tx.execute(emptied, &[])).await.map_err(|error: Error| error).unwrap();
        acknowledged.retain(|id| id % 7 == 0);
    }
    // A crash instead of a close: what the WAL has must be enough.
    let crashed = folder.path().join("crashed");
    std::fs::create_dir(&crashed).unwrap();
    for file in ["test.db", "test.db-wal"] {
        std::fs::copy(disk.path().join(file), crashed.join(file)).unwrap();
    }
    db.close().await;
    for path in [settings.path, crashed.join("test.db")] {
        let db = Db::open(Settings::new(path, "again"), ITEMS).unwrap();
        assert_eq!(ids(&db).await, acknowledged);
        assert_eq!(integrity(&db).await, ["ok"]);
        db.close().await;
    }
}

#[tokio::test]
async fn the_wal_is_written_back_again_and_again() {
    let folder = Folder::new("checkpoints");
    let db = Db::open(Settings { checkpoint_pages: 20, ..folder.settings() }, ITEMS).unwrap();
    let mut largest = 0;
    for id in 0..300 {
        insert(&db, id).await.unwrap();
        largest = largest.max(db.stats().wal_pages);
    }
    assert!((20..=40).contains(&largest), "the WAL grew to {largest} pages");
    assert!(db.stats().checkpoints >= 10);
    assert_eq!(ids(&db).await.len(), 300);
}

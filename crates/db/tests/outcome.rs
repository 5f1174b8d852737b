//! A connection that is lost while its transaction is being committed (row 18 of the fault list), and a server that is killed under
//! load (row 17): whoever is told that it is written finds it, whoever is told that it is not does not.
#![allow(clippy::unwrap_used, reason = "also in the functions that tests share")]

mod support;

use std::sync::Arc;
use std::time::Duration;

use db::mysql::Settings;
use db::{Db, Error};
use servers::{Database, MariaDb, Proxy};
use support::{ITEMS, ids, insert};

fn settings(proxy: &Proxy, database: &Database) -> Settings {
    let (account, _) = database.url().rsplit_once('@').unwrap();
    let url = format!("{account}@{}/{}", proxy.socket_addr(), database.name());
    Settings { writers: 1, readers: 1, ..Settings::new(url, "test") }
}

/// As it is sent; the session's settings have the word, too.
const COMMIT: &[u8] = b"\x03COMMIT";

fn shared() -> (Database, Proxy) {
    let database = servers::shared::mariadb().database().unwrap();
    let host = database.url().rsplit_once('@').unwrap().1.split('/').next().unwrap().parse().unwrap();
    (database, Proxy::start(host).unwrap())
}

#[tokio::test]
async fn a_commit_whose_answer_is_lost_is_looked_up() {
    let (database, proxy) = shared();
    let db = Db::connect(settings(&proxy, &database), ITEMS).unwrap();
    for id in 1..=10 {
        proxy.cut_after(COMMIT);
        assert_eq!(insert(&db, id).await, Ok(()));
        assert_eq!((proxy.trapped(), db.stats().lookups), (id, id));
    }
    // The server had committed each: nothing was run again, and each is there once.
    assert_eq!(db.stats().reruns, 0);
    assert_eq!(ids(&db).await, (1..=10).collect::<Vec<_>>());
}

#[tokio::test]
async fn who_wrote_nothing_does_not_care() {
    let (database, proxy) = shared();
    let db = Db::connect(settings(&proxy, &database), ITEMS).unwrap();
    proxy.cut_after(COMMIT);
    let looked = db.write(|tx| tx.query("SELECT id FROM item {for update}", &[], |_| Ok(()))).await;
    assert_eq!(looked, Ok::<_, Error>(vec![]));
    assert_eq!((proxy.trapped(), db.stats().lookups), (1, 0));
    insert(&db, 1).await.unwrap();
}

/// While a backup holds all commits back, the lost transaction is neither committed nor rolled back.
struct HeldBack(std::thread::JoinHandle<()>);

impl HeldBack {
    fn for_seconds(server: &Arc<MariaDb>, seconds: u32) -> HeldBack {
        let holder = server.clone();
        let script =
            format!("BACKUP STAGE START; BACKUP STAGE BLOCK_COMMIT; DO SLEEP({seconds}); BACKUP STAGE END");
        let thread = std::thread::spawn(move || drop(holder.address().run(&script).unwrap()));
        let sleeping = "SELECT COUNT(*) FROM information_schema.processlist WHERE state = 'User sleep'";
        while server.address().run(sleeping).unwrap() != "1\n" {
            std::thread::yield_now();
        }
        HeldBack(thread)
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_commit_that_is_still_under_way_is_waited_for() {
    let server = Arc::new(MariaDb::start().unwrap());
    let database = server.database().unwrap();
    let proxy = Proxy::start(server.socket_addr()).unwrap();
    let second = Duration::from_secs(1);
    let db = Db::connect(Settings { lock_timeout: second, ..settings(&proxy, &database) }, ITEMS).unwrap();
    insert(&db, 1).await.unwrap();

    proxy.cut_after(COMMIT);
    let held = HeldBack::for_seconds(&server, 3);
    assert_eq!(insert(&db, 2).await, Ok(()));
    held.0.join().unwrap();
    assert_eq!((proxy.trapped(), db.stats().lookups), (1, 1));
    assert_eq!(ids(&db).await, [1, 2]);
}

#[tokio::test]
async fn what_cannot_be_found_out_is_said_to_be_unknown_and_nothing_else() {
    let (database, proxy) = shared();
    Db::connect(settings(&proxy, &database), ITEMS).unwrap().close().await;
    // Somebody who may leave word, and may not look for it.
    let (name, unique) = (database.name(), servers::unique_name());
    // A letter first: 8e2c22f8 begins with a number.
    let user = format!("u{}", &unique[unique.len() - 8..]);
    let run = |statements: String| database.address().run(&statements).unwrap();
    run(format!(
        "CREATE USER {user}@'%'; GRANT INSERT, UPDATE, DELETE ON {name}.* TO {user}@'%';
         GRANT SELECT (no, at) ON {name}.tx_outcome TO {user}@'%';
         GRANT SELECT ON {name}.item TO {user}@'%'; GRANT SELECT ON {name}.schema_migrations TO {user}@'%'"
    ));
    let url = format!("mysql://{user}@{}/{name}", proxy.socket_addr());
    let patience = Duration::from_secs(1);
    let hasty = Settings { outcome_patience: patience, ..settings(&proxy, &database) };
    let db = Db::connect(Settings { url, ..hasty }, ITEMS).unwrap();
    insert(&db, 1).await.unwrap();
    proxy.cut_after(COMMIT);
    let told = insert(&db, 2).await.unwrap_err();
    assert_eq!(told, Error::OutcomeUnknown { patience_seconds: 1 });
    assert!(told.is_unknown() && told.is_transient());
    insert(&db, 3).await.unwrap();
    assert_eq!(ids(&db).await, [1, 2, 3], "it was written");
    run(format!("DROP USER {user}@'%'"));
}

/// Inserts one after the other until the load ends, and sorts them by what it was told.
async fn load(db: Db, client: u64, stop: Arc<std::sync::atomic::AtomicBool>) -> (Vec<u64>, Vec<u64>) {
    let (mut written, mut refused) = (Vec::new(), Vec::new());
    for number in 0.. {
        if stop.load(std::sync::atomic::Ordering::SeqCst) {
            break;
        }
        let id = client * 1_000_000 + number;
        match insert(&db, id).await {
            Ok(()) => written.push(id),
            Err(error) => {
                assert!(error.is_transient() && !error.is_unknown(), "{error:?}");
                refused.push(id);
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        }
    }
    (written, refused)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_server_that_is_killed_and_paused_under_load_loses_nothing_and_doubles_nothing() {
    const CLIENTS: u64 = 8;
    const KILLS: usize = 4;
    let server = MariaDb::start().unwrap();
    let database = server.database().unwrap();
    let settings = Settings {
        writers: 4,
        io_timeout: Duration::from_secs(2),
        lock_timeout: Duration::from_secs(1),
        ..Settings::new(database.url(), "test")
    };
    let db = Db::connect(settings, ITEMS).unwrap();
    let stop = Arc::new(std::sync::atomic::AtomicBool::new(false));
    let clients: Vec<_> =
        (1..=CLIENTS).map(|client| tokio::spawn(load(db.clone(), client, stop.clone()))).collect();
    let more = async |than: u64| {
        while db.stats().jobs < than + 200 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    };
    for _ in 0..KILLS {
        more(db.stats().jobs).await;
        server.kill().unwrap();
        server.restart().unwrap();
        // It stops in the middle of whatever it does, for longer than its clients wait.
        more(db.stats().jobs).await;
        server.pause().unwrap();
        tokio::time::sleep(Duration::from_secs(3)).await;
        server.resume().unwrap();
    }
    more(db.stats().jobs).await;
    stop.store(true, std::sync::atomic::Ordering::SeqCst);
    let (mut written, mut refused) = (Vec::new(), Vec::new());
    for client in clients {
        let (more_written, more_refused) = client.await.unwrap();
        written.extend(more_written);
        refused.extend(more_refused);
    }
    written.sort_unstable();
    assert_eq!(ids(&db).await, written, "{} were refused", refused.len());
    assert!(db.stats().lookups > 0, "no commit was interrupted");
}

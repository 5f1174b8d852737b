//! A server's time is followed, whatever the machine's own clock says; on SQLite, which has the machine's, and on MariaDB.
#![allow(clippy::unwrap_used, reason = "what fails here fails the test")]

use db::ServerClock;
use testdb::TestDb;
use wire::time::{Clock, UnixMillis};

testdb::on_both! {
    #[tokio::test]
    the_time_is_the_servers_whatever_the_own_clock_says;
}

/// Servers under test run on this machine: their clock is this one.
fn servers_time() -> UnixMillis {
    Clock::system().now()
}

async fn the_time_is_the_servers_whatever_the_own_clock_says(at: &TestDb) {
    let db = at.open(&[]);
    for own in [0, servers_time(), servers_time() + 86_400_000] {
        let before = servers_time();
        let server = ServerClock::read(db.clone(), &Clock::from_fn(move || own)).await.unwrap();
        let took = servers_time() - before;
        let clock = server.clock();
        let keeping = tokio::spawn(server.keep());
        for _ in 0..50 {
            let (least, told, most) = (servers_time(), clock.now(), servers_time());
            // Half of what the question took, and what is cut off.
            let doubt = took / 2 + 2;
            assert!((least - doubt..=most + doubt).contains(&told), "{told} at {least} to {most}, {doubt}");
            tokio::task::yield_now().await;
        }
        keeping.abort();
    }
}

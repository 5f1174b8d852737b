//! A MariaDB starts, answers, is killed, paused and stopped, and comes back with its data.

#![allow(clippy::unwrap_used, reason = "what fails here fails the test")]

use servers::{Error, MariaDb, shared};

#[test]
fn what_was_committed_survives_a_kill_and_a_stop() {
    let server = MariaDb::start().unwrap();
    let database = server.database().unwrap();
    let name = database.name();
    let count = || server.address().run(&format!("SELECT COUNT(*) FROM {name}.t")).unwrap();
    server
        .address()
        .run(&format!("CREATE TABLE {name}.t (id INT PRIMARY KEY); INSERT INTO {name}.t VALUES (1)"))
        .unwrap();
    server.kill().unwrap();
    assert!(server.pid().is_none());
    assert!(matches!(server.address().run("SELECT 1"), Err(Error::Command { .. })));

    server.restart().unwrap();
    assert_eq!(count(), "1\n");
    assert!(matches!(server.restart(), Err(Error::Running { .. })));

    server.address().run(&format!("INSERT INTO {name}.t VALUES (2)")).unwrap();
    server.stop().unwrap();
    server.restart().unwrap();
    assert_eq!(count(), "2\n");
}

#[test]
fn a_paused_one_does_not_answer_and_goes_on_afterwards() {
    let server = MariaDb::start().unwrap();
    server.pause().unwrap();
    std::thread::scope(|scope| {
        let answer = scope.spawn(|| server.address().run("SELECT 7"));
        // Its state is read from the system, so nothing that it was asked since can have been answered.
        let state = std::fs::read_to_string(format!("/proc/{}/stat", server.pid().unwrap())).unwrap();
        assert!(state.contains(") T "), "{state}");
        assert!(!answer.is_finished());
        server.resume().unwrap();
        assert_eq!(answer.join().unwrap().unwrap(), "7\n");
    });
}

#[test]
fn it_commits_to_disk_each_time_and_lets_nobody_else_in() {
    let server = MariaDb::start_with(&["--max-connections=77"]).unwrap();
    let asked = "SELECT @@innodb_flush_log_at_trx_commit, @@max_connections, @@bind_address";
    assert_eq!(server.address().run(asked).unwrap(), "1\t77\t127.0.0.1\n");
    let port = server.socket_addr().port();
    let stranger = servers::MySqlAddress::parse(&format!("mysql://root:guessed@127.0.0.1:{port}")).unwrap();
    assert!(matches!(stranger.run("SELECT 1"), Err(Error::Command { .. })));
}

#[test]
fn who_shares_one_has_a_database_of_their_own() {
    let server = shared::mariadb();
    let (one, other) = (server.database().unwrap(), server.database().unwrap());
    assert_ne!(one.name(), other.name());
    assert!(one.url().ends_with(&format!("/{}", one.name())));
    let there = |name: &str| !server.run(&format!("SHOW DATABASES LIKE '{name}'")).unwrap().is_empty();
    let name = one.name().to_owned();
    assert!(there(&name));
    drop(one);
    assert!(!there(&name));
    assert!(there(other.name()));
}

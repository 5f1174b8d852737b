//! What a proxy does to connections, and that it does so only when told.

#![allow(clippy::unwrap_used, reason = "what fails here fails the test")]

use std::io::{BufRead, BufReader, ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::mpsc::{Receiver, channel};
use std::thread;
use std::time::Duration;

use servers::{Error, MariaDb, MySqlAddress, Proxy};

/// How long anything may take that must happen.
const LIMIT: Duration = Duration::from_secs(10);

/// A server that answers every line with itself, and tells which lines it got.
fn echo() -> (SocketAddr, Receiver<String>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let (tell, told) = channel();
    thread::spawn(move || {
        for client in listener.incoming() {
            let (mut client, tell) = (client.unwrap(), tell.clone());
            thread::spawn(move || {
                let lines = BufReader::new(client.try_clone().unwrap()).lines();
                for line in lines.map_while(Result::ok) {
                    let _ = tell.send(line.clone());
                    let _ = writeln!(client, "{line}");
                }
            });
        }
    });
    (address, told)
}

struct Client(BufReader<TcpStream>);

impl Client {
    fn of(proxy: &Proxy) -> Client {
        let stream = TcpStream::connect(proxy.socket_addr()).unwrap();
        stream.set_read_timeout(Some(LIMIT)).unwrap();
        Client(BufReader::new(stream))
    }

    fn send(&mut self, text: &str) {
        writeln!(self.0.get_mut(), "{text}").unwrap();
    }

    /// The next line; empty when the connection is closed or broken.
    fn hear(&mut self) -> String {
        let mut line = String::new();
        if let Err(error) = self.0.read_line(&mut line) {
            assert_ne!(error.kind(), ErrorKind::WouldBlock, "nothing within {LIMIT:?}");
        }
        line.trim_end().to_owned()
    }

    fn is_left_alone(&mut self) -> bool {
        self.0.get_ref().set_nonblocking(true).unwrap();
        let read = self.0.read(&mut [0]);
        self.0.get_ref().set_nonblocking(false).unwrap();
        read.is_err_and(|error| error.kind() == ErrorKind::WouldBlock)
    }
}

#[test]
fn it_passes_both_ways_and_closes_when_both_have_closed() {
    let (server, _told) = echo();
    let proxy = Proxy::start(server).unwrap();
    let mut client = Client::of(&proxy);
    client.send("one");
    assert_eq!(client.hear(), "one");
    assert_eq!(proxy.connections(), 1);
    // Half-closed: what is on its way still arrives.
    client.send("two");
    client.0.get_ref().shutdown(Shutdown::Write).unwrap();
    assert_eq!(client.hear(), "two");
    assert_eq!(client.hear(), "");
}

#[test]
fn a_cut_closes_and_refuses_until_it_is_healed() {
    let (server, _told) = echo();
    let proxy = Proxy::start(server).unwrap();
    let mut client = Client::of(&proxy);
    client.send("one");
    client.hear();
    proxy.cut();
    assert_eq!(client.hear(), "");
    let refused = TcpStream::connect(proxy.socket_addr()).unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::ConnectionRefused);
    assert_eq!(proxy.connections(), 0);
    proxy.heal().unwrap();
    let mut client = Client::of(&proxy);
    client.send("two");
    assert_eq!(client.hear(), "two");
    proxy.drop_connections();
    assert_eq!(client.hear(), "");
    let mut client = Client::of(&proxy);
    client.send("three");
    assert_eq!(client.hear(), "three");
}

#[test]
fn a_stall_takes_connections_and_passes_nothing_until_it_is_healed() {
    let (server, told) = echo();
    let proxy = Proxy::start(server).unwrap();
    let mut old = Client::of(&proxy);
    old.send("before");
    assert_eq!((old.hear(), told.recv().unwrap()), ("before".to_owned(), "before".to_owned()));
    proxy.stall().unwrap();
    let mut new = Client::of(&proxy);
    old.send("old");
    new.send("new");
    // Time for something that must not happen: whoever would pass it on wrongly is likely to be caught.
    assert!(told.recv_timeout(Duration::from_millis(200)).is_err());
    assert!(old.is_left_alone() && new.is_left_alone());
    proxy.heal().unwrap();
    assert_eq!((old.hear(), new.hear()), ("old".to_owned(), "new".to_owned()));

    proxy.stall().unwrap();
    let mut new = Client::of(&proxy);
    proxy.cut();
    assert_eq!((old.hear(), new.hear()), (String::new(), String::new()));
    // From cut to stalled: it listens again.
    proxy.stall().unwrap();
    assert!(Client::of(&proxy).is_left_alone());
}

#[test]
fn a_trap_lets_the_request_through_and_not_the_answer() {
    let (server, told) = echo();
    let proxy = Proxy::start(server).unwrap();
    let (mut one, mut other) = (Client::of(&proxy), Client::of(&proxy));
    // In two pieces, and a trap does not hear what came before it.
    one.send("COMMIT");
    assert_eq!((one.hear(), told.recv().unwrap()), ("COMMIT".to_owned(), "COMMIT".to_owned()));
    proxy.cut_after(b"COMMIT\n");
    write!(one.0.get_mut(), "now COM").unwrap();
    other.send("COMMIX");
    assert_eq!((other.hear(), told.recv().unwrap()), ("COMMIX".to_owned(), "COMMIX".to_owned()));
    assert_eq!(proxy.trapped(), 0);
    one.send("MIT");
    assert_eq!(one.hear(), "");
    assert_eq!(told.recv().unwrap(), "now COMMIT");
    assert_eq!(proxy.trapped(), 1);
    // Once.
    other.send("COMMIT");
    assert_eq!(other.hear(), "COMMIT");
}

#[test]
fn a_trap_closes_the_client_even_if_the_server_closes_nothing() {
    let server = TcpListener::bind("127.0.0.1:0").unwrap();
    let proxy = Proxy::start(server.local_addr().unwrap()).unwrap();
    proxy.cut_after(b"x");
    let mut client = Client::of(&proxy);
    client.send("x");
    let (mut taken, _) = server.accept().unwrap();
    assert_eq!(client.hear(), "");
    let mut got = String::new();
    taken.read_to_string(&mut got).unwrap();
    assert_eq!(got, "x\n");
}

#[test]
fn a_commit_behind_which_the_connection_is_cut_has_happened() {
    let mariadb = MariaDb::start().unwrap();
    let database = mariadb.database().unwrap();
    let proxy = Proxy::start(mariadb.socket_addr()).unwrap();
    let through = mariadb.url().replace(&mariadb.socket_addr().to_string(), &proxy.socket_addr().to_string());
    let through = MySqlAddress::parse(&through).unwrap();
    let table = format!("{}.t", database.name());
    mariadb.address().run(&format!("CREATE TABLE {table} (id INT PRIMARY KEY)")).unwrap();
    proxy.cut_after(b"COMMIT");
    let statements = format!("START TRANSACTION; INSERT INTO {table} VALUES (1); COMMIT");
    let failed = through.run(&statements).unwrap_err();
    assert!(matches!(&failed, Error::Command { stderr, .. } if stderr.contains("2013")), "{failed}");
    assert_eq!(proxy.trapped(), 1);
    // The server may be at it still; a lock on the row waits for the end of whoever has it.
    let mut rows = String::new();
    for _ in 0..1000 {
        rows = mariadb.address().run(&format!("SELECT id FROM {table}")).unwrap();
        if !rows.is_empty() {
            break;
        }
    }
    assert_eq!(rows, "1\n");
}

//! A TCP proxy that breaks connections as networks do.

use std::collections::HashMap;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use crate::Error;
use crate::port::{self, Port};

/// How long the upstream may take to take a connection.
const CONNECT_LIMIT: Duration = Duration::from_secs(5);
/// How much is passed on at a time, in bytes.
const CHUNK_BYTES: usize = 64 * 1024;

/// A proxy on a port of 127.0.0.1 in front of one server. Two threads for each connection; all are closed when this is dropped.
#[derive(Debug)]
pub struct Proxy {
    port: Port,
    network: Arc<Network>,
    acceptor: Mutex<Option<JoinHandle<()>>>,
}

impl Proxy {
    /// Starts one that passes everything on to `upstream`, which need not listen yet.
    ///
    /// # Errors
    /// When there is no free port.
    pub fn start(upstream: SocketAddr) -> Result<Proxy, Error> {
        port::without_clash(|| {
            let network = Network { upstream, state: Mutex::default(), changed: Condvar::new() };
            let proxy = Proxy { port: Port::take()?, network: Arc::new(network), acceptor: Mutex::new(None) };
            proxy.pass(Mode::Open)?;
            Ok(proxy)
        })
    }

    /// Where it listens.
    pub fn socket_addr(&self) -> SocketAddr {
        (Ipv4Addr::LOCALHOST, self.port.number()).into()
    }

    /// How many connections are open, or stalled.
    pub fn connections(&self) -> usize {
        self.network.lock().links.len()
    }

    /// Closes all connections and refuses new ones, as if the server's process had died.
    pub fn cut(&self) {
        let mut acceptor = self.acceptor();
        {
            let mut state = self.network.lock();
            state.mode = Mode::Cut;
            state.close_all();
            self.network.changed.notify_all();
        }
        if let Some(acceptor) = acceptor.take() {
            // It looks at the mode when somebody comes.
            let _ = TcpStream::connect(self.socket_addr());
            let _ = acceptor.join();
        }
    }

    /// Passes nothing on any more, in neither direction, and closes nothing; takes new connections, and leaves them without an
    /// answer: as if the server's machine had lost its power. What is sent meanwhile arrives after [`Proxy::heal`].
    ///
    /// # Errors
    /// When its port is taken by somebody else, after a cut.
    pub fn stall(&self) -> Result<(), Error> {
        self.pass(Mode::Stalled)
    }

    /// Passes everything on again.
    ///
    /// # Errors
    /// When its port is taken by somebody else, after a cut.
    pub fn heal(&self) -> Result<(), Error> {
        self.pass(Mode::Open)
    }

    /// Closes all connections; new ones are welcome.
    pub fn drop_connections(&self) {
        self.network.lock().close_all();
    }

    /// Closes the next connection whose client sends these bytes, so that the server gets them and the client no answer: it
    /// cannot know whether its request had an effect. What was sent with them in one piece goes through, too. This happens once;
    /// a second call replaces a first that still waits.
    pub fn cut_after(&self, bytes: &[u8]) {
        assert!(!bytes.is_empty(), "nothing to look for");
        self.network.lock().trap = Some(bytes.to_vec());
    }

    /// How often [`Proxy::cut_after`] has come true.
    pub fn trapped(&self) -> u64 {
        self.network.lock().trapped
    }

    fn pass(&self, mode: Mode) -> Result<(), Error> {
        let mut acceptor = self.acceptor();
        if acceptor.is_none() {
            let listen = Error::io(format!("listen on {}", self.socket_addr()));
            let listener = TcpListener::bind(self.socket_addr()).map_err(listen)?;
            self.network.lock().mode = mode;
            let network = Arc::clone(&self.network);
            *acceptor = Some(thread::spawn(move || network.accept(&listener)));
        }
        self.network.lock().mode = mode;
        self.network.changed.notify_all();
        Ok(())
    }

    fn acceptor(&self) -> MutexGuard<'_, Option<JoinHandle<()>>> {
        self.acceptor.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.cut();
    }
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Mode {
    #[default]
    Open,
    Stalled,
    Cut,
}

/// What the threads share.
#[derive(Debug)]
struct Network {
    upstream: SocketAddr,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    mode: Mode,
    links: HashMap<u64, Link>,
    last_link: u64,
    trap: Option<Vec<u8>>,
    trapped: u64,
}

/// Both ends of a connection; the second as soon as there is one.
#[derive(Debug)]
struct Link {
    client: TcpStream,
    server: Option<TcpStream>,
}

impl State {
    fn close_all(&mut self) {
        for (_, link) in self.links.drain() {
            close(&link.client, Shutdown::Both);
            link.server.iter().for_each(|server| close(server, Shutdown::Both));
        }
    }
}

/// One that is closed already needs no closing.
fn close(stream: &TcpStream, how: Shutdown) {
    let _ = stream.shutdown(how);
}

impl Network {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn accept(self: Arc<Self>, listener: &TcpListener) {
        for client in listener.incoming() {
            let mut state = self.lock();
            if state.mode == Mode::Cut {
                return;
            }
            let Ok(client) = client else { continue };
            let Ok(copy) = client.try_clone() else { continue };
            state.last_link += 1;
            let id = state.last_link;
            state.links.insert(id, Link { client: copy, server: None });
            let network = Arc::clone(&self);
            thread::spawn(move || network.serve(id, client));
        }
    }

    /// From the first byte of a connection to its last.
    fn serve(self: Arc<Self>, id: u64, client: TcpStream) {
        if let Some(server) = self.connect(id)
            && let (Ok(from), Ok(to)) = (server.try_clone(), client.try_clone())
        {
            let network = Arc::clone(&self);
            let answers = thread::spawn(move || network.pass_answers(id, from, to));
            self.pass_requests(id, &client, &server);
            let _ = answers.join();
        }
        close(&client, Shutdown::Both);
        self.lock().links.remove(&id);
    }

    /// Waits until the network lets it through. None if it was closed before, or nobody listens.
    fn connect(&self, id: u64) -> Option<TcpStream> {
        self.passage(id).then_some(())?;
        let server = TcpStream::connect_timeout(&self.upstream, CONNECT_LIMIT).ok()?;
        let copy = server.try_clone().ok()?;
        // If it was closed meanwhile, nobody would close this end.
        self.lock().links.get_mut(&id)?.server = Some(copy);
        Some(server)
    }

    /// Waits while nothing passes; false when the connection was closed.
    fn passage(&self, id: u64) -> bool {
        let stalled = |state: &mut State| state.mode == Mode::Stalled && state.links.contains_key(&id);
        let state = self.changed.wait_while(self.lock(), stalled).unwrap_or_else(PoisonError::into_inner);
        state.links.contains_key(&id)
    }

    fn pass_requests(&self, id: u64, mut client: &TcpStream, mut server: &TcpStream) {
        let mut seen = Vec::new();
        let mut chunk = vec![0; CHUNK_BYTES];
        loop {
            let count = client.read(&mut chunk).unwrap_or(0);
            if !self.passage(id) {
                break;
            }
            let trapped = self.springs(id, &mut seen, &chunk[..count]);
            let sent = server.write_all(&chunk[..count]);
            if count == 0 || trapped || sent.is_err() {
                break;
            }
        }
        // The server reads what was sent before it reads that there is no more.
        close(server, Shutdown::Write);
    }

    /// Whether these bytes, behind those seen before, complete what [`Proxy::cut_after`] waits for. Then the client is closed.
    fn springs(&self, id: u64, seen: &mut Vec<u8>, chunk: &[u8]) -> bool {
        let mut state = self.lock();
        let Some(trap) = &state.trap else {
            // What came before the trap was set does not count.
            seen.clear();
            return false;
        };
        seen.extend_from_slice(chunk);
        if seen.windows(trap.len()).any(|window| window == trap) {
            state.trap = None;
            state.trapped += 1;
            if let Some(link) = state.links.remove(&id) {
                close(&link.client, Shutdown::Both);
            }
            return true;
        }
        let kept = seen.len().min(trap.len() - 1);
        seen.drain(..seen.len() - kept);
        false
    }

    /// What nobody wants to hear any more is read all the same: otherwise the server would be told so, and drop what it was asked.
    fn pass_answers(&self, id: u64, mut server: TcpStream, mut client: TcpStream) {
        let mut chunk = vec![0; CHUNK_BYTES];
        while let Ok(count) = server.read(&mut chunk)
            && count > 0
        {
            if self.passage(id) {
                let _ = client.write_all(&chunk[..count]);
            }
        }
        if self.passage(id) {
            close(&client, Shutdown::Write);
        }
    }
}

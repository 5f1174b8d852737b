//! Where the servers are, how they let us in, and every bound of the traffic with them.

use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

use super::StartError;
use crate::{Gathering, Subject};

/// What [`crate::Bus::nats`] is told. [`Settings::new`] fills in everything but the servers.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Settings {
    /// The servers, `host:port` each. Any of them leads to the whole cluster; servers that they tell of are not used.
    pub servers: Vec<String>,
    /// How the servers know us.
    pub login: Login,
    /// How the connection is protected; none sends everything in the clear.
    pub tls: Option<Tls>,
    /// What this connection is called in the servers' own reports.
    pub name: String,
    /// The subject that this process takes from, if it is one: at the start, the connection moves to the server that keeps its queue.
    /// So what is taken, and most of what is settled, does not travel from server to server.
    pub near: Option<Subject>,
    /// What the names of all streams and subjects begin with. Buses with different prefixes share servers and know
    /// nothing of each other. Letters, digits, `-` and `_`.
    pub prefix: String,
    /// On how many servers the stream of each subject is kept: 1, 3 or 5. One is the cheapest and the quickest, and enough: what is lost
    /// with its server is published again from a database, as after any loss.
    pub replicas: usize,
    /// On how many servers the dead letters are kept: 1, 3 or 5. They are few, and nobody has them a second time.
    pub letter_replicas: usize,
    /// Where a stream is kept on one server of several and nobody has answered for it for so long, it is given up, with what is in
    /// it, and made anew on another server.
    pub abandon_after: Duration,
    /// Where the servers keep the streams.
    pub storage: Storage,
    /// When this bus's consumers let envelopes gather.
    pub gathering: Gathering,
    /// Bytes that one subject's stream holds at most. The other bound of a stream is [`crate::Limits::queue_envelopes`], in
    /// frames.
    pub queue_bytes: u64,
    /// For how long the servers recognise a frame that is sent twice because its acknowledgement did not come. Only attempts of
    /// one [`crate::Bus::publish`] share a message id, so it has to be longer than `publish_timeout`, and no longer.
    pub duplicate_window: Duration,
    /// A frame that its holder does not speak of for so long is delivered again: to another process, if it died. A living one
    /// speaks of its frames every third of it.
    pub ack_wait: Duration,
    /// Frames of one subject that may be delivered or delayed at a time, over all processes. When so many are delayed, what
    /// comes behind them waits.
    pub max_ack_pending: usize,
    /// Publishes of this process that wait for their acknowledgement at a time. A further one waits for its turn, which counts
    /// towards its time-out.
    pub publishes_in_flight: usize,
    /// How long one [`crate::Bus::publish`] takes at most, repeated attempts included.
    pub publish_timeout: Duration,
    /// How long one question to the servers takes at most: on streams, consumers, dead letters.
    pub request_timeout: Duration,
    /// How long one attempt to connect to one server takes at most.
    pub connect_timeout: Duration,
    /// How long [`crate::Bus::nats`] tries to reach the servers before it fails.
    pub start_timeout: Duration,
    /// How long it then waits until all streams are there. Longer than `abandon_after`, or it would fail again and again for a stream that
    /// only it could make anew.
    pub set_up_timeout: Duration,
    /// The shortest pause between two attempts to connect. It doubles up to `reconnect_delay_max`, without end.
    pub reconnect_delay_min: Duration,
    /// The longest pause between two attempts to connect.
    pub reconnect_delay_max: Duration,
    /// How often a quiet connection is probed. One that leaves two probes unanswered is dead.
    pub ping_interval: Duration,
    /// How often the streams and their consumers are compared with what they should be; in doubt that happens at once.
    pub check_interval: Duration,
    /// Frames of one subject that this process asks the servers for at a time.
    pub pull_frames: usize,
    /// Envelopes of one subject that wait in this process for a consumer; no more are asked for beyond it. The frames asked for
    /// already may still come.
    pub waiting_envelopes: usize,
}

/// How the servers know us.
#[derive(Clone, PartialEq, Eq, Default)]
pub enum Login {
    /// They let everybody in.
    #[default]
    Open,
    /// By name.
    Password {
        /// The user.
        user: String,
        /// Its password.
        password: String,
    },
    /// By a shared secret.
    Token(String),
    /// By a JWT and the seed of a key, in a file as `nsc` writes it.
    Credentials(PathBuf),
    /// By the seed of a key.
    Nkey(String),
}

impl fmt::Debug for Login {
    /// Never shows a secret.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Login::Open => f.write_str("Open"),
            Login::Password { user, .. } => {
                f.debug_struct("Password").field("user", user).finish_non_exhaustive()
            }
            Login::Token(_) => f.write_str("Token(..)"),
            Login::Credentials(path) => f.debug_tuple("Credentials").field(path).finish(),
            Login::Nkey(_) => f.write_str("Nkey(..)"),
        }
    }
}

/// How a connection is protected.
#[derive(Clone, PartialEq, Eq, Default, Debug)]
pub struct Tls {
    /// Certificates, in PEM, of the authorities that vouch for the servers; none takes those that the operating system trusts.
    pub authorities: Option<PathBuf>,
    /// Our own certificate, for servers that ask for one.
    pub identity: Option<Identity>,
}

/// A client certificate.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Identity {
    /// The certificate chain, in PEM.
    pub certificate: PathBuf,
    /// Its private key, in PEM.
    pub key: PathBuf,
}

/// Where the servers keep streams.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub enum Storage {
    /// In files, with the servers' own idea of when to sync them: the bus may forget.
    #[default]
    File,
    /// In memory.
    Memory,
}

impl Settings {
    /// Settings for these servers: open, in the clear, prefix "saga", one replica in files of 256 MiB, given up after 10 s; 10 s duplicate window, 10 s
    /// acknowledgement wait, 65,536 frames delivered; 256 publishes in flight of 2 s at most; 5 s a request, 2 s an attempt to
    /// connect, 30 s to start; reconnecting after 20 ms to 1 s; probed every 5 s, checked every 5 s; 16 frames asked for, 1,024
    /// envelopes waiting; gathering as [`Gathering::ON_SERVERS`].
    pub fn new(servers: Vec<String>) -> Settings {
        Settings {
            servers,
            login: Login::Open,
            tls: None,
            name: "saga".to_owned(),
            near: None,
            prefix: "saga".to_owned(),
            replicas: 1,
            letter_replicas: 1,
            abandon_after: Duration::from_secs(10),
            storage: Storage::File,
            gathering: Gathering::ON_SERVERS,
            queue_bytes: 256 * 1024 * 1024,
            duplicate_window: Duration::from_secs(10),
            ack_wait: Duration::from_secs(10),
            max_ack_pending: 65_536,
            publishes_in_flight: 256,
            publish_timeout: Duration::from_secs(2),
            request_timeout: Duration::from_secs(5),
            connect_timeout: Duration::from_secs(2),
            start_timeout: Duration::from_secs(30),
            set_up_timeout: Duration::from_secs(30),
            reconnect_delay_min: Duration::from_millis(20),
            reconnect_delay_max: Duration::from_secs(1),
            ping_interval: Duration::from_secs(5),
            check_interval: Duration::from_secs(5),
            pull_frames: 16,
            waiting_envelopes: 1_024,
        }
    }

    /// [`Settings::new`] from a comma-separated list of `host:port`, `nats://host:port` or `tls://host:port`, each with
    /// `user:password@` or `token@` before the host where the servers ask for it: that becomes the [`Login`], and has to be the same
    /// wherever it is given. With one `tls://` all connections are protected.
    ///
    /// # Errors
    /// [`StartError::NoServers`]; [`StartError::BadServer`] names the part that is not understood, without its password.
    pub fn from_urls(urls: &str) -> Result<Settings, StartError> {
        let mut settings = Settings::new(Vec::new());
        for url in urls.split(',').map(str::trim).filter(|url| !url.is_empty()) {
            let (scheme, rest) = url.split_once("://").unwrap_or(("nats", url));
            let (login, server) = match rest.rsplit_once('@') {
                Some((login, server)) => (Some(login), server),
                None => (None, rest),
            };
            let server = server.trim_end_matches('/');
            let bad = |why: &str| StartError::BadServer { server: server.to_owned(), why: why.to_owned() };
            match scheme {
                "nats" => {}
                "tls" => settings.tls = Some(Tls::default()),
                _ => return Err(bad(&format!("it begins with {scheme}://, not with nats:// or tls://"))),
            }
            let login = match login.map(|login| login.split_once(':').unwrap_or((login, ""))) {
                None => Login::Open,
                Some(("", _)) => return Err(bad("there is no name before the @")),
                Some((token, "")) => {
                    Login::Token(decoded(token).ok_or_else(|| bad("its token is not percent-encoded"))?)
                }
                Some((user, password)) => match (decoded(user), decoded(password)) {
                    (Some(user), Some(password)) => Login::Password { user, password },
                    _ => return Err(bad("its user or password is not percent-encoded")),
                },
            };
            if login != Login::Open {
                if settings.login != Login::Open && settings.login != login {
                    return Err(bad("it has another login than a server before it"));
                }
                settings.login = login;
            }
            check_server(server).map_err(bad)?;
            settings.servers.push(server.to_owned());
        }
        if settings.servers.is_empty() { Err(StartError::NoServers) } else { Ok(settings) }
    }

    /// Refuses what cannot work, before anybody is asked.
    pub(super) fn check(&self) -> Result<(), StartError> {
        if self.servers.is_empty() {
            return Err(StartError::NoServers);
        }
        for server in &self.servers {
            check_server(server)
                .map_err(|why| StartError::BadServer { server: server.clone(), why: why.to_owned() })?;
        }
        let legal = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_');
        let seconds = |duration: Duration| format!("{duration:?}");
        let bounds = [
            (
                "prefix",
                self.prefix.clone(),
                !self.prefix.is_empty() && self.prefix.chars().all(legal),
                "it is made of letters, digits, '-' and '_'",
            ),
            ("replicas", self.replicas.to_string(), matches!(self.replicas, 1 | 3 | 5), "it is 1, 3 or 5"),
            (
                "letter_replicas",
                self.letter_replicas.to_string(),
                matches!(self.letter_replicas, 1 | 3 | 5),
                "it is 1, 3 or 5",
            ),
            ("abandon_after", seconds(self.abandon_after), !self.abandon_after.is_zero(), "it is above 0"),
            (
                "set_up_timeout",
                seconds(self.set_up_timeout),
                self.set_up_timeout > self.abandon_after,
                "it is longer than abandon_after",
            ),
            ("queue_bytes", self.queue_bytes.to_string(), self.queue_bytes > 0, "it is above 0"),
            ("max_ack_pending", self.max_ack_pending.to_string(), self.max_ack_pending > 0, "it is above 0"),
            (
                "publishes_in_flight",
                self.publishes_in_flight.to_string(),
                self.publishes_in_flight > 0,
                "it is above 0",
            ),
            ("pull_frames", self.pull_frames.to_string(), self.pull_frames > 0, "it is above 0"),
            (
                "waiting_envelopes",
                self.waiting_envelopes.to_string(),
                self.waiting_envelopes > 0,
                "it is above 0",
            ),
            (
                "publish_timeout",
                seconds(self.publish_timeout),
                !self.publish_timeout.is_zero(),
                "it is above 0",
            ),
            (
                "request_timeout",
                seconds(self.request_timeout),
                !self.request_timeout.is_zero(),
                "it is above 0",
            ),
            (
                "connect_timeout",
                seconds(self.connect_timeout),
                !self.connect_timeout.is_zero(),
                "it is above 0",
            ),
            ("ping_interval", seconds(self.ping_interval), !self.ping_interval.is_zero(), "it is above 0"),
            ("check_interval", seconds(self.check_interval), !self.check_interval.is_zero(), "it is above 0"),
            ("ack_wait", seconds(self.ack_wait), self.ack_wait >= ACK_WAIT_MIN, "it is at least 1 s"),
            (
                "gathering.at_most",
                seconds(self.gathering.at_most),
                self.gathering.at_most <= self.ack_wait / 4,
                "it is a quarter of ack_wait at most, or what gathers is given back",
            ),
            (
                "duplicate_window",
                seconds(self.duplicate_window),
                self.duplicate_window > self.publish_timeout,
                "it is longer than publish_timeout",
            ),
        ];
        match bounds.into_iter().find(|(_, _, works, _)| !works) {
            Some((setting, value, _, rule)) => {
                Err(StartError::BadSetting { setting, value, why: rule.to_owned() })
            }
            None => Ok(()),
        }
    }
}

/// Less, and a living holder could not speak of its frames often enough.
const ACK_WAIT_MIN: Duration = Duration::from_secs(1);

fn check_server(server: &str) -> Result<(), &'static str> {
    if server.contains(['@', '/', ',', ' ']) {
        return Err("it is not of the form host:port");
    }
    match server.rsplit_once(':') {
        // [::1]:4222, or an address that ends in a bracket.
        _ if server.ends_with(']') => Err("it has no port"),
        None => Err("it has no port"),
        Some(("", _)) => Err("it has no host"),
        Some((host, _)) if host.contains(':') && !(host.starts_with('[') && host.ends_with(']')) => {
            Err("an IPv6 address goes in brackets")
        }
        Some((_, port)) => match port.parse::<u16>() {
            Ok(1..) => Ok(()),
            _ => Err("its port is not a number from 1 to 65535"),
        },
    }
}

/// Percent-decoded; none when it is not encoded properly.
fn decoded(text: &str) -> Option<String> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.bytes();
    while let Some(byte) = rest.next() {
        bytes.push(match byte {
            b'%' => {
                let digit = |byte: Option<u8>| char::from(byte?).to_digit(16);
                let (high, low) = (digit(rest.next())?, digit(rest.next())?);
                (high * 16 + low) as u8
            }
            byte => byte,
        });
    }
    String::from_utf8(bytes).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(urls: &str) -> String {
        Settings::from_urls(urls).expect_err("it is not an address").to_string()
    }

    #[test]
    fn servers_are_read_with_their_login_and_tls() {
        let settings = Settings::from_urls("nats://a:1, b:2,tls://[::1]:3").expect("three addresses");
        assert_eq!(settings.servers, ["a:1", "b:2", "[::1]:3"]);
        assert_eq!((settings.login, settings.tls), (Login::Open, Some(Tls::default())));
        let settings = Settings::from_urls("nats://u:p%40ss@a:1,nats://u:p%40ss@b:2").expect("two addresses");
        let login = Login::Password { user: "u".to_owned(), password: "p@ss".to_owned() };
        assert_eq!((settings.login, settings.tls), (login, None));
        let settings = Settings::from_urls("nats://s3cr3t@a:1/").expect("an address");
        assert_eq!(settings.login, Login::Token("s3cr3t".to_owned()));
    }

    #[test]
    fn what_is_no_address_is_named_without_its_password() {
        for (urls, named) in [
            ("http://u:secret@a:1", "\"a:1\""),
            ("nats://u:secret@a", "no port"),
            ("nats://u:secret@:1", "no host"),
            ("nats://u:secret@a:0", "65535"),
            ("nats://::1:4222", "brackets"),
            ("nats://u:%zz@a:1", "percent"),
            ("nats://u:secret@a:1,nats://v:secret@b:1", "another login"),
        ] {
            let refused = refused(urls);
            assert!(refused.contains(named), "{refused}");
            assert!(!refused.contains("secret"), "{refused}");
        }
        assert_eq!(Settings::from_urls(" , "), Err(StartError::NoServers));
    }

    #[test]
    fn a_setting_that_cannot_work_is_named_with_its_value() {
        let settings = || Settings::new(vec!["a:1".to_owned()]);
        assert_eq!(settings().check(), Ok(()));
        let refused = |settings: Settings| settings.check().expect_err("it cannot work").to_string();
        assert!(refused(Settings { prefix: "a.b".to_owned(), ..settings() }).contains("prefix = a.b"));
        assert!(refused(Settings { replicas: 2, ..settings() }).contains("replicas = 2"));
        assert!(refused(Settings { ack_wait: Duration::ZERO, ..settings() }).contains("ack_wait = 0ns"));
        let at_most = Duration::from_secs(3);
        let long = Settings { gathering: Gathering { at_most, ..Gathering::ON_SERVERS }, ..settings() };
        assert!(refused(long).contains("gathering.at_most = 3s"));
        let short = Settings { duplicate_window: Duration::from_secs(2), ..settings() };
        assert!(refused(short).contains("duplicate_window = 2s"));
    }

    #[test]
    fn no_secret_is_shown() {
        let mut settings = Settings::from_urls("nats://u:hunter2@a:1").expect("an address");
        for login in
            [settings.login.clone(), Login::Token("hunter2".to_owned()), Login::Nkey("hunter2".to_owned())]
        {
            settings.login = login;
            assert!(!format!("{settings:?}").contains("hunter2"));
        }
    }
}

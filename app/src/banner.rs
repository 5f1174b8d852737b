//! What a person sees once the shop is ready: where everything is, and how to stop it.
//!
//! It goes to standard output, the log to standard error. A line with `is ready` is there only once every
//! address in the banner answers.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::Path;
use std::time::Duration;

use crate::config::Config;

/// What there is to tell.
#[derive(Debug)]
pub(crate) struct Banner<'a> {
    /// Where the shop's API listens.
    pub http: SocketAddr,
    /// Where the operator's door listens.
    pub admin: SocketAddr,
    /// What runs where.
    pub layout: Layout,
    /// The data directory, absolute.
    pub data_dir: &'a Path,
    /// Whether everybody may create products.
    pub catalog_open: bool,
    /// What became of the demonstration's products.
    pub demo: Demo,
    /// How long the start took.
    pub took: Duration,
}

/// What runs where.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Layout {
    /// All is in this process, the data in files.
    Embedded,
    /// The data is on servers.
    Servers {
        /// Them, without passwords.
        servers: String,
        /// Replicas of each service, as processes; 0: the services are in this process.
        processes: usize,
    },
}

impl Layout {
    /// As the settings say.
    pub(crate) fn of(config: &Config) -> Layout {
        let Some(nats) = &config.nats.url else { return Layout::Embedded };
        let mysql = match &config.mysql.url {
            Some(url) => url.to_string(),
            None => "a MySQL for each service".to_owned(),
        };
        let redis = config.redis.url.as_ref().map_or("no Redis".to_owned(), ToString::to_string);
        Layout::Servers { servers: format!("{mysql}, {nats}, {redis}"), processes: config.processes }
    }
}

/// What became of the demonstration's products.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Demo {
    /// They were added now.
    Added,
    /// The shop had products already.
    NotNeeded,
    /// Another process adds them if there are none.
    Wanted,
    /// They are switched off.
    Off,
}

impl fmt::Display for Demo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Demo::Added => "added, because the shop had no products",
            Demo::NotNeeded => "not added, the shop has products",
            Demo::Wanted => "added if the shop had no products",
            Demo::Off => "switched off",
        })
    }
}

impl fmt::Display for Banner<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (api, admin) = (url(self.http), url(self.admin));
        let catalog = if self.catalog_open {
            "open: everybody who reaches the API may create products"
        } else {
            "closed: creating products needs the admin token (catalog.admin_token)"
        };
        let version = env!("CARGO_PKG_VERSION");
        writeln!(f, "Sagaline {version} is ready after {:.2} s", self.took.as_secs_f64())?;
        writeln!(f)?;
        writeln!(f, "  shop API   {api}/api{}", reach(self.http))?;
        writeln!(f, "  try        curl '{api}/api/products?size=10'")?;
        writeln!(f, "  catalog    {catalog}")?;
        writeln!(f, "  demo data  {}", self.demo)?;
        writeln!(f, "  metrics    {admin}/metrics{}", reach(self.admin))?;
        writeln!(f, "  alive      {admin}/healthz")?;
        writeln!(f, "  ready      {admin}/readyz")?;
        match &self.layout {
            Layout::Embedded => writeln!(f, "  data       {}", self.data_dir.display())?,
            Layout::Servers { servers, processes } => {
                writeln!(f, "  data       {servers}")?;
                writeln!(f, "  keys       {}", self.data_dir.display())?;
                if *processes > 0 {
                    writeln!(f, "  processes  {processes} of each service: {admin}/replicas")?;
                }
            }
        }
        writeln!(f, "  stop       Ctrl-C, or kill {}", std::process::id())
    }
}

/// A URL that works on this machine: "all addresses" is none to connect to.
fn url(address: SocketAddr) -> String {
    let ip = match address.ip() {
        IpAddr::V4(ip) if ip.is_unspecified() => Ipv4Addr::LOCALHOST.into(),
        IpAddr::V6(ip) if ip.is_unspecified() => Ipv6Addr::LOCALHOST.into(),
        ip => ip,
    };
    format!("http://{}", SocketAddr::new(ip, address.port()))
}

fn reach(address: SocketAddr) -> &'static str {
    if address.ip().is_unspecified() { " (and on every address of this machine)" } else { "" }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn servers_are_shown_without_their_passwords() {
        use crate::config::secret::ServerUrl;
        let mut config = Config { processes: 2, ..Config::default() };
        assert_eq!(Layout::of(&config), Layout::Embedded);
        config.mysql.url = Some(ServerUrl::new("mysql://root:hush@db:1"));
        config.nats.url = Some(ServerUrl::new("nats://bus:2"));
        let servers = "mysql://********@db:1, nats://bus:2, no Redis".to_owned();
        assert_eq!(Layout::of(&config), Layout::Servers { servers, processes: 2 });
    }

    #[test]
    fn every_url_can_be_opened_on_this_machine() {
        let banner = Banner {
            http: "0.0.0.0:8080".parse().unwrap(),
            admin: "[::]:8081".parse().unwrap(),
            layout: Layout::Embedded,
            data_dir: Path::new("/var/lib/saga"),
            catalog_open: false,
            demo: Demo::Off,
            took: Duration::from_millis(120),
        }
        .to_string();
        for expected in [
            "is ready after 0.12 s\n",
            "http://127.0.0.1:8080/api (and on every address of this machine)\n",
            "curl 'http://127.0.0.1:8080/api/products?size=10'\n",
            "http://[::1]:8081/metrics",
            "http://[::1]:8081/healthz\n",
            "http://[::1]:8081/readyz\n",
            "data       /var/lib/saga\n",
            "closed: ",
            "switched off",
        ] {
            assert!(banner.contains(expected), "{expected:?} is not in\n{banner}");
        }
    }
}

//! Where Redis is, and the bounds of the link to it.

use std::fmt;
use std::time::Duration;

use redis::{ConnectionAddr, ConnectionInfo, IntoConnectionInfo};

use super::connection::with_host_of;

/// Where Redis is, and the bounds of the link to it. Passwords appear in no output of it.
#[derive(Clone)]
pub struct Settings {
    /// Some nodes of a Redis Cluster, or one plain Redis.
    nodes: Vec<ConnectionInfo>,
    /// The beginning of all keys. Shops with different databases that share a Redis need different ones.
    pub prefix: String,
    /// How long a connection may take, with its handshake.
    pub connect_timeout: Duration,
    /// How long a command may take. Whoever waits for one waits this long at most, and only the first do: see [`super::Redis`].
    pub command_timeout: Duration,
    /// Commands that may be on their way at once; beyond it a command fails at once.
    pub commands_in_flight: usize,
    /// The pause after the first attempt to reach Redis again has failed; it doubles.
    pub retry_min: Duration,
    /// The longest such pause.
    pub retry_max: Duration,
}

/// Why an address of Redis cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SettingsError {
    /// No address at all.
    #[error("redis.url is empty; redis://host:port[,redis://host:port ...] expected")]
    Empty,
    /// Not an address. It is named by its place, because it may hold a password.
    #[error(
        "address {place} of redis.url is not redis://[user:password@]host:port[/database], nor rediss://..: {why}"
    )]
    Address {
        /// Which one, from 1.
        place: usize,
        /// What is wrong with it.
        why: String,
    },
}

impl Settings {
    /// Settings for a comma-separated list of addresses: `redis://` or, with TLS, `rediss://`. An address without a scheme takes
    /// scheme, user and password of the first.
    ///
    /// # Errors
    /// [`SettingsError`], which never shows a password.
    pub fn parse(urls: &str) -> Result<Settings, SettingsError> {
        let addresses = urls.split(',').map(str::trim).filter(|address| !address.is_empty());
        let mut nodes: Vec<ConnectionInfo> = Vec::new();
        for (index, address) in addresses.enumerate() {
            let problem = |why: String| SettingsError::Address { place: index + 1, why };
            let bare = !address.contains("://");
            let url = if bare { format!("redis://{address}") } else { address.to_owned() };
            let mut node =
                url.into_connection_info().map_err(|error| problem(error.category().to_owned()))?;
            if !matches!(node.addr(), ConnectionAddr::Tcp(..) | ConnectionAddr::TcpTls { .. }) {
                return Err(problem("not a TCP address".to_owned()));
            }
            if bare && let Some(first) = nodes.first() {
                let ConnectionAddr::Tcp(host, port) = node.addr().clone() else { continue };
                let addr = with_host_of(first.addr(), host, port);
                node = node.set_addr(addr).set_redis_settings(first.redis_settings().clone());
            }
            nodes.push(node);
        }
        if nodes.is_empty() {
            return Err(SettingsError::Empty);
        }
        Ok(Settings {
            nodes,
            prefix: "saga".to_owned(),
            connect_timeout: Duration::from_secs(1),
            command_timeout: Duration::from_millis(250),
            commands_in_flight: 4096,
            retry_min: Duration::from_millis(50),
            retry_max: Duration::from_secs(2),
        })
    }

    pub(super) fn nodes(&self) -> &[ConnectionInfo] {
        &self.nodes
    }
}

impl fmt::Display for Settings {
    /// The hosts and ports, without users and passwords.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, node) in self.nodes.iter().enumerate() {
            let comma = if index == 0 { "" } else { "," };
            write!(f, "{comma}{}", node.addr())?;
        }
        Ok(())
    }
}

impl fmt::Debug for Settings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Settings({self})")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_share_what_the_first_one_says() {
        let settings =
            Settings::parse("rediss://app:secret@one:7000, two:7001,redis://three:7002").expect("three");
        let shown = format!("{settings} {settings:?}");
        assert!(!shown.contains("secret"), "{shown}");
        assert_eq!(settings.to_string(), "one:7000,two:7001,three:7002");
        let [_, two, three] = settings.nodes() else { panic!("three nodes") };
        assert!(matches!(two.addr(), ConnectionAddr::TcpTls { .. }));
        assert_eq!(two.redis_settings().password(), Some("secret"));
        assert_eq!(three.redis_settings().password(), None);
    }

    #[test]
    fn what_is_no_address_is_named_by_its_place() {
        assert_eq!(Settings::parse(" , ").unwrap_err(), SettingsError::Empty);
        let error = Settings::parse("redis://one:1,http://user:secret@two:2").unwrap_err().to_string();
        assert!(error.contains("address 2") && !error.contains("secret"), "{error}");
        let error = Settings::parse("redis://:secret@one:notaport").unwrap_err().to_string();
        assert!(error.contains("address 1") && !error.contains("secret"), "{error}");
    }
}

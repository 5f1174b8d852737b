//! Where replicas are, as it is configured.

use std::fmt;
use std::net::SocketAddr;
use std::str::FromStr;

use serde::de::{self, Deserialize, Deserializer};
use serde::ser::{Serialize, Serializer};

/// The most entries in one list.
const MAX_ENTRIES: usize = 64;

/// `host:port`, separated by commas: addresses (`10.0.0.7:8080`, `[::1]:8080`) or names (`account:8080`). Never empty.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Addresses(Vec<Entry>);

/// One entry of the list.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Entry {
    /// An address: one replica.
    Address(SocketAddr),
    /// A name with its port: as many replicas as it has addresses.
    Name(String),
}

impl Addresses {
    pub(crate) fn entries(&self) -> &[Entry] {
        &self.0
    }

    /// The entries that are addresses.
    pub(crate) fn known(&self) -> impl Iterator<Item = SocketAddr> {
        self.0.iter().filter_map(|entry| match entry {
            Entry::Address(address) => Some(*address),
            Entry::Name(_) => None,
        })
    }

    /// Whether there is a name among the entries.
    pub(crate) fn has_names(&self) -> bool {
        self.0.iter().any(|entry| matches!(entry, Entry::Name(_)))
    }
}

/// Why a text is no list of addresses.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AddressError {
    /// An entry, or the whole list, is empty.
    #[error("{list:?}: an address is missing; expected HOST:PORT, or several of them separated by commas")]
    Missing {
        /// The list.
        list: String,
    },
    /// An entry is no host and port.
    #[error("{entry:?} is not an address; expected HOST:PORT, such as 10.0.0.7:8080 or account:8080")]
    Entry {
        /// The entry.
        entry: String,
    },
    /// There are too many entries.
    #[error("{entries} addresses; at most {MAX_ENTRIES} are allowed, and a name may stand for several")]
    TooMany {
        /// How many there are.
        entries: usize,
    },
}

impl FromStr for Addresses {
    type Err = AddressError;

    fn from_str(list: &str) -> Result<Addresses, AddressError> {
        let entries = list.split(',').map(|entry| match entry.trim() {
            "" => Err(AddressError::Missing { list: list.to_owned() }),
            entry => parse(entry).ok_or_else(|| AddressError::Entry { entry: entry.to_owned() }),
        });
        let entries: Vec<Entry> = entries.collect::<Result<_, _>>()?;
        if entries.len() > MAX_ENTRIES {
            return Err(AddressError::TooMany { entries: entries.len() });
        }
        Ok(Addresses(entries))
    }
}

fn parse(entry: &str) -> Option<Entry> {
    if let Ok(address) = entry.parse::<SocketAddr>() {
        return (address.port() != 0).then_some(Entry::Address(address));
    }
    let (host, port) = entry.rsplit_once(':')?;
    let port: u16 = port.parse().ok()?;
    let in_names = |byte: u8| byte.is_ascii_alphanumeric() || b"-._".contains(&byte);
    let named =
        !host.is_empty() && host.bytes().all(in_names) && host.bytes().any(|b| b.is_ascii_alphabetic());
    (named && port != 0).then(|| Entry::Name(format!("{host}:{port}")))
}

impl From<Vec<SocketAddr>> for Addresses {
    fn from(addresses: Vec<SocketAddr>) -> Addresses {
        Addresses(addresses.into_iter().map(Entry::Address).collect())
    }
}

impl fmt::Display for Addresses {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (place, entry) in self.0.iter().enumerate() {
            if place > 0 {
                f.write_str(",")?;
            }
            match entry {
                Entry::Address(address) => write!(f, "{address}")?,
                Entry::Name(name) => f.write_str(name)?,
            }
        }
        Ok(())
    }
}

impl Serialize for Addresses {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Addresses {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Addresses, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_list_goes_through_its_text() {
        let list: Addresses = " 10.0.0.7:80, account:8080,[::1]:90 ,a-b.c_d:1".parse().unwrap();
        assert_eq!(list.to_string(), "10.0.0.7:80,account:8080,[::1]:90,a-b.c_d:1");
        assert_eq!(list.known().count(), 2);
        assert!(list.has_names());
    }

    #[test]
    fn what_is_no_address_is_refused_by_its_name() {
        for list in ["", "a:1,", ",a:1", "a:1,,b:2"] {
            assert_eq!(list.parse::<Addresses>(), Err(AddressError::Missing { list: list.to_owned() }));
        }
        for entry in [
            "account",
            "account:",
            ":80",
            "account:0",
            "1.2.3.4:0",
            "account:65536",
            "::1:80",
            "http://a:1",
            "1.2.3:80",
            "a b:1",
            "user@host:1",
        ] {
            let refused = entry.parse::<Addresses>();
            assert_eq!(refused, Err(AddressError::Entry { entry: entry.to_owned() }));
        }
        let many = vec!["a:1"; MAX_ENTRIES + 1].join(",");
        assert_eq!(many.parse::<Addresses>(), Err(AddressError::TooMany { entries: MAX_ENTRIES + 1 }));
    }
}

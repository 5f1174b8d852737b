//! Values that are never shown whole: a token, or an address with a password in it.

use std::fmt;

use serde::{Deserialize, Serialize, Serializer};

/// What stands where a secret would.
pub(crate) const MASK: &str = "********";

/// A value that is never shown.
#[derive(Clone, PartialEq, Eq, Deserialize)]
#[serde(transparent)]
pub(crate) struct Secret(String);

impl Secret {
    /// The value, for the one place that compares it.
    pub(crate) fn expose(&self) -> &str {
        &self.0
    }

    #[cfg(test)]
    pub(crate) fn new(text: &str) -> Secret {
        Secret(text.to_owned())
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(MASK)
    }
}

impl Serialize for Secret {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(MASK)
    }
}

/// Where a server is, with the password that it asks for: a URL, or several separated by commas. It is shown without
/// what stands before the last `@`.
#[derive(Clone, PartialEq, Eq, Deserialize)]
#[serde(transparent)]
pub(crate) struct ServerUrl(String);

impl ServerUrl {
    /// All of it, for who connects.
    pub(crate) fn expose(&self) -> &str {
        &self.0
    }

    #[cfg(test)]
    pub(crate) fn new(text: &str) -> ServerUrl {
        ServerUrl(text.to_owned())
    }
}

/// A password may hold anything, commas and slashes too: nothing before the last `@` is shown but the scheme.
impl fmt::Display for ServerUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Some((hidden, shown)) = self.0.rsplit_once('@') else { return f.write_str(&self.0) };
        match hidden.split_once("://") {
            Some((scheme, _)) => write!(f, "{scheme}://{MASK}@{shown}"),
            None => write!(f, "{MASK}@{shown}"),
        }
    }
}

impl fmt::Debug for ServerUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl Serialize for ServerUrl {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_url_is_shown_without_its_password() {
        for (url, shown) in [
            ("mysql://root:hush@db:3306", "mysql://********@db:3306"),
            ("mysql://db:3306/shop", "mysql://db:3306/shop"),
            ("nats://u:hush@a:1,nats://u:hush@b:2", "nats://********@b:2"),
            ("redis://:hu,s@h://@h:1", "redis://********@h:1"),
            ("root:hush@db", "********@db"),
        ] {
            assert_eq!(
                format!("{} {:?}", ServerUrl::new(url), ServerUrl::new(url)),
                format!("{shown} {shown}")
            );
        }
    }
}

//! Where the shop is.

use std::fmt;
use std::str::FromStr;

use http::HeaderValue;
use http::uri::{Scheme, Uri};

/// The address of a shop: `http://HOST[:PORT]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Target {
    host: String,
    port: u16,
    authority: HeaderValue,
}

/// An address that is none.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{url:?} is no address of a shop: {problem}; http://HOST:PORT expected")]
pub struct NoTarget {
    url: String,
    problem: &'static str,
}

impl Target {
    /// What a connection is opened to. The brackets of an IPv6 address are gone.
    pub(crate) fn address(&self) -> (&str, u16) {
        (&self.host, self.port)
    }

    /// The value of the header `Host`.
    pub(crate) fn authority(&self) -> &HeaderValue {
        &self.authority
    }
}

impl FromStr for Target {
    type Err = NoTarget;

    fn from_str(url: &str) -> Result<Target, NoTarget> {
        let no = |problem| NoTarget { url: url.to_owned(), problem };
        let uri: Uri = url.parse().map_err(|_| no("it cannot be read"))?;
        if uri.scheme() != Some(&Scheme::HTTP) {
            return Err(no("only http:// is spoken"));
        }
        if !matches!(uri.path(), "" | "/") || uri.query().is_some() {
            return Err(no("it has a path"));
        }
        let authority = uri.authority().filter(|authority| !authority.host().is_empty());
        let authority = authority.ok_or_else(|| no("it has no host"))?;
        if authority.as_str().contains('@') {
            return Err(no("it has a user"));
        }
        let host = authority.host();
        let bare = host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host);
        // A port that does not fit is None, too.
        if authority.port_u16().is_none() && authority.as_str().len() > host.len() {
            return Err(no("its port is not a number from 1 to 65535"));
        }
        let header = HeaderValue::from_str(authority.as_str()).map_err(|_| no("it cannot be read"))?;
        Ok(Target { host: bare.to_owned(), port: authority.port_u16().unwrap_or(80), authority: header })
    }
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "http://{}", self.authority.to_str().unwrap_or_default())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_read() {
        for (url, host, port) in [
            ("http://127.0.0.1:8080", "127.0.0.1", 8080),
            ("http://shop.example/", "shop.example", 80),
            ("http://[::1]:9", "::1", 9),
        ] {
            let target: Target = url.parse().expect(url);
            assert_eq!(target.address(), (host, port));
            assert_eq!(target.to_string(), url.trim_end_matches('/'));
        }
    }

    #[test]
    fn anything_else_is_refused_by_name() {
        for url in [
            "",
            "127.0.0.1:8080",
            "https://shop.example",
            "http://",
            "http://:80",
            "http://a:b",
            "http://a:70000",
            "http://a:80/api",
            "http://me@shop.example",
            "ftp://a",
        ] {
            let error = url.parse::<Target>().expect_err(url).to_string();
            assert!(error.contains(&format!("{url:?}")), "{error}");
        }
    }
}

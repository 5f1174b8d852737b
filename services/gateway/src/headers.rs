//! What changes in a request's and an answer's head on the way through.

use std::mem;
use std::net::IpAddr;

use http::header::{
    CONNECTION, CONTENT_LENGTH, EXPECT, HOST, HeaderMap, HeaderName, HeaderValue, TE, TRAILER,
    TRANSFER_ENCODING, UPGRADE,
};
use http::request::Parts;
use http::uri::{Authority, PathAndQuery, Scheme};
use http::{Extensions, HeaderName as Name, Uri, Version};

const KEEP_ALIVE: HeaderName = HeaderName::from_static("keep-alive");
const PROXY_CONNECTION: HeaderName = HeaderName::from_static("proxy-connection");

/// Who asked, hop by hop; the last is whom the gateway saw.
pub(crate) const X_FORWARDED_FOR: HeaderName = HeaderName::from_static("x-forwarded-for");

/// Makes a request's head one for a replica, which is asked by HTTP/2.
pub(crate) fn request(parts: &mut Parts, client: Option<IpAddr>) {
    drop_hop_by_hop(&mut parts.headers);
    // The body has been waited for here.
    parts.headers.remove(EXPECT);
    if let Some(client) = client {
        forwarded(&mut parts.headers, client);
    }
    name_host(parts);
    parts.version = Version::HTTP_2;
    parts.extensions = Extensions::new();
}

/// An HTTP/1.1 request names its host in a header, an HTTP/2 request in its address (RFC 9113, section 8.3.1).
fn name_host(parts: &mut Parts) {
    let host = parts.headers.remove(HOST).and_then(|host| Authority::try_from(host.as_bytes()).ok());
    let mut uri = mem::take(&mut parts.uri).into_parts();
    uri.scheme = Some(Scheme::HTTP);
    uri.authority = uri.authority.or(host).or(Some(Authority::from_static("gateway")));
    uri.path_and_query.get_or_insert(PathAndQuery::from_static("/"));
    parts.uri = Uri::from_parts(uri).unwrap_or_default();
}

/// Takes away what concerns one connection only (RFC 9110, section 7.6.1).
pub(crate) fn drop_hop_by_hop(headers: &mut HeaderMap) {
    if !headers.keys().any(is_hop_by_hop) {
        return;
    }
    let named: Vec<Name> = headers
        .get_all(CONNECTION)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .filter_map(|name| name.trim().parse().ok())
        // A client must not take away what the request is framed or forwarded by.
        .filter(|name: &Name| *name != CONTENT_LENGTH && *name != HOST && *name != X_FORWARDED_FOR)
        .collect();
    for name in [CONNECTION, KEEP_ALIVE, PROXY_CONNECTION, TE, TRAILER, TRANSFER_ENCODING, UPGRADE]
        .iter()
        .chain(&named)
    {
        headers.remove(name);
    }
}

fn is_hop_by_hop(name: &HeaderName) -> bool {
    *name == CONNECTION
        || *name == TRANSFER_ENCODING
        || *name == TE
        || *name == TRAILER
        || *name == UPGRADE
        || *name == KEEP_ALIVE
        || *name == PROXY_CONNECTION
}

fn forwarded(headers: &mut HeaderMap, client: IpAddr) {
    let client = client.to_canonical().to_string();
    let value = match headers.get(X_FORWARDED_FOR).map(HeaderValue::as_bytes) {
        None => HeaderValue::try_from(client),
        // Several lines are one list.
        Some(_) => {
            let mut list: Vec<u8> = Vec::with_capacity(64);
            for line in headers.get_all(X_FORWARDED_FOR) {
                list.extend_from_slice(line.as_bytes());
                list.extend_from_slice(b", ");
            }
            list.extend_from_slice(client.as_bytes());
            HeaderValue::try_from(list)
        }
    };
    if let Ok(value) = value {
        headers.insert(X_FORWARDED_FOR, value);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn map(lines: &[(&'static str, &'static str)]) -> HeaderMap {
        lines.iter().map(|(n, v)| (HeaderName::from_static(n), HeaderValue::from_static(v))).collect()
    }

    #[test]
    fn what_concerns_one_connection_stays_there() {
        let mut headers = map(&[
            ("connection", "close, x-secret , content-length"),
            ("x-secret", "1"),
            ("content-length", "3"),
            ("keep-alive", "5"),
            ("te", "trailers"),
            ("traceparent", "t"),
            ("authorization", "bearer x"),
        ]);
        drop_hop_by_hop(&mut headers);
        assert_eq!(
            headers,
            map(&[("content-length", "3"), ("traceparent", "t"), ("authorization", "bearer x")])
        );
    }

    #[test]
    fn the_client_is_the_last_of_those_who_forwarded() {
        let client: IpAddr = [10, 0, 0, 7].into();
        let mut headers = HeaderMap::new();
        forwarded(&mut headers, client);
        assert_eq!(headers, map(&[("x-forwarded-for", "10.0.0.7")]));
        let mut headers = HeaderMap::new();
        headers.append(X_FORWARDED_FOR, HeaderValue::from_static("1.1.1.1"));
        headers.append(X_FORWARDED_FOR, HeaderValue::from_static("2.2.2.2"));
        forwarded(&mut headers, client);
        assert_eq!(headers, map(&[("x-forwarded-for", "1.1.1.1, 2.2.2.2, 10.0.0.7")]));
    }

    #[test]
    fn a_replica_is_asked_by_the_name_that_the_client_used() {
        let asked = |uri: &str, host: Option<&'static str>| {
            let mut given = http::Request::get(uri);
            if let Some(host) = host {
                given = given.header(HOST, host);
            }
            let (mut parts, ()) = given.body(()).expect("a request").into_parts();
            request(&mut parts, None);
            assert!(!parts.headers.contains_key(HOST));
            parts.uri.to_string()
        };
        assert_eq!(asked("/api/x?y=1", Some("shop.example:81")), "http://shop.example:81/api/x?y=1");
        assert_eq!(asked("/api/x", Some("no host")), "http://gateway/api/x");
        assert_eq!(asked("/api/x", None), "http://gateway/api/x");
        // The address has the last word (RFC 9112, section 3.2.2).
        assert_eq!(asked("https://a.example/api/x", Some("b.example")), "http://a.example/api/x");
        assert_eq!(asked("http://a.example", None), "http://a.example/");
    }
}

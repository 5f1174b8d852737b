//! What changes in a request's and an answer's head on the way through.

use std::net::IpAddr;

use http::header::{
    CONNECTION, CONTENT_LENGTH, EXPECT, Entry, HOST, HeaderMap, HeaderName, HeaderValue, TE, TRAILER,
    TRANSFER_ENCODING, UPGRADE,
};
use http::{HeaderName as Name, Uri};

const KEEP_ALIVE: HeaderName = HeaderName::from_static("keep-alive");
const PROXY_CONNECTION: HeaderName = HeaderName::from_static("proxy-connection");

/// Who asked, hop by hop; the last is whom the gateway saw.
pub(crate) const X_FORWARDED_FOR: HeaderName = HeaderName::from_static("x-forwarded-for");

/// Makes a request's head one for a replica.
pub(crate) fn request(headers: &mut HeaderMap, client: Option<IpAddr>) {
    drop_hop_by_hop(headers);
    // The body has been waited for here.
    headers.remove(EXPECT);
    if let Some(client) = client {
        forwarded(headers, client);
    }
}

/// An HTTP/2 request names its host in its address, an HTTP/1.1 request in a header.
pub(crate) fn name_host(headers: &mut HeaderMap, uri: &Uri) {
    if let (Some(authority), Entry::Vacant(host)) = (uri.authority(), headers.entry(HOST))
        && let Ok(value) = HeaderValue::from_str(authority.as_str())
    {
        host.insert(value);
    }
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
        request(&mut headers, Some(client));
        assert_eq!(headers, map(&[("x-forwarded-for", "10.0.0.7")]));
        let mut headers = HeaderMap::new();
        headers.append(X_FORWARDED_FOR, HeaderValue::from_static("1.1.1.1"));
        headers.append(X_FORWARDED_FOR, HeaderValue::from_static("2.2.2.2"));
        request(&mut headers, Some(client));
        assert_eq!(headers, map(&[("x-forwarded-for", "1.1.1.1, 2.2.2.2, 10.0.0.7")]));
    }
}

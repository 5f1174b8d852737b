//! Asks a process on this machine whether it is ready.

use std::net::SocketAddr;
use std::time::Duration;

use axum::body::Bytes;
use http_body_util::{BodyExt, Empty, Limited};
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;

/// How long an answer may take.
const ANSWER_WITHIN: Duration = Duration::from_secs(2);

/// The longest reason that is read, in bytes.
const MAX_REASON_BYTES: usize = 4 * 1024;

/// Asks for `/readyz`. Clones share connections.
#[derive(Clone)]
pub(crate) struct Probe(Client<HttpConnector, Empty<Bytes>>);

impl Probe {
    /// Without a connection yet.
    pub(crate) fn new() -> Probe {
        Probe(Client::builder(TokioExecutor::new()).build_http())
    }

    /// Ok when the process behind this door is ready, or else why not.
    ///
    /// # Errors
    /// What it says is missing, or that it says nothing.
    pub(crate) async fn ask(&self, admin: SocketAddr) -> Result<(), String> {
        let asked = tokio::time::timeout(ANSWER_WITHIN, self.answer(admin)).await;
        asked.unwrap_or_else(|_| Err(format!("no answer within {ANSWER_WITHIN:?}")))
    }

    async fn answer(&self, admin: SocketAddr) -> Result<(), String> {
        let uri = format!("http://{admin}/readyz").parse().map_err(|_| "no such address".to_owned())?;
        let answer = self.0.get(uri).await.map_err(|_| "it does not answer yet".to_owned())?;
        if answer.status().is_success() {
            return Ok(());
        }
        let body = Limited::new(answer.into_body(), MAX_REASON_BYTES).collect().await;
        let body = body.map(|body| body.to_bytes()).unwrap_or_default();
        Err(reason(&body))
    }
}

/// The `msg` of an answer, or the answer itself.
fn reason(body: &[u8]) -> String {
    let json: Option<serde_json::Value> = serde_json::from_slice(body).ok();
    let msg = json.as_ref().and_then(|json| json["msg"].as_str());
    msg.map_or_else(|| String::from_utf8_lossy(body).into_owned(), str::to_owned)
}

#[cfg(test)]
mod tests {
    use super::reason;

    #[test]
    fn the_reason_is_what_the_answer_says() {
        assert_eq!(reason(br#"{"msg":"not ready: start"}"#), "not ready: start");
        assert_eq!(reason(b"plain"), "plain");
    }
}

//! The public keys of the account service, fetched by services elsewhere.
//!
//! Every replica of the account service is asked, at start, every [`REFRESH`], and when a token names a key that is not known. What any
//! of them publishes counts: while keys are being changed one replica may know a key that another one has not read yet. If none
//! answers, the keys that are known stay.

use std::net::SocketAddr;
use std::time::Duration;

use axum::body::Bytes;
use http::{Request, StatusCode};
use http_body_util::{BodyExt, Empty, Limited};
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use peers::Peers;
use tokio::net::TcpStream;
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;

use crate::auth::{KeySet, Verifier};

/// Where the account service publishes its keys, as a JWK set.
pub const JWKS_PATH: &str = "/.well-known/jwks.json";

/// How often the keys are fetched.
pub const REFRESH: Duration = Duration::from_secs(60);

/// How soon they are fetched again when no replica answered.
const RETRY: Duration = Duration::from_millis(500);

/// How long one replica may take. Shorter than requests wait for a key, so that one that hangs does not spoil it.
const FETCH_TIMEOUT: Duration = Duration::from_secs(1);

/// The largest JWK set that is read, in bytes.
const MAX_SET_BYTES: usize = 64 * 1024;

/// Keeps the verifier's keys those that the account service's replicas publish, until `stop`.
pub async fn follow(verifier: Verifier, account: Peers<()>, stop: CancellationToken) {
    let keeper = verifier.keeper();
    loop {
        let found = fetch(&account.addresses()).await;
        match &found {
            Some(keys) => keeper.replace(keys),
            None => keeper.retain(),
        }
        tokio::select! {
            biased;
            () = stop.cancelled() => return,
            () = keeper.wanted() => {}
            () = sleep(if found.is_some() { REFRESH } else { RETRY }) => {}
        }
    }
}

/// The keys that any of them publishes. None when none of them answers with any.
async fn fetch(replicas: &[SocketAddr]) -> Option<KeySet> {
    let mut asked: JoinSet<_> = replicas.iter().map(|replica| fetch_one(*replica)).collect();
    let mut found = KeySet::default();
    while let Some(answer) = asked.join_next().await {
        match answer {
            Ok(Ok(keys)) => found = found.union(&keys),
            Ok(Err(error)) => tracing::debug!(%error, "the account service's keys"),
            Err(error) => tracing::error!(%error, "the account service's keys"),
        }
    }
    (!found.keys().is_empty()).then_some(found)
}

/// Why a replica's keys are not known.
#[derive(Debug, thiserror::Error)]
enum FetchError {
    #[error("{replica}: {source}")]
    Connect { replica: SocketAddr, source: std::io::Error },
    #[error("{replica}: {source}")]
    Ask { replica: SocketAddr, source: hyper::Error },
    #[error("{replica} answers {status}")]
    Status { replica: SocketAddr, status: StatusCode },
    #[error("{replica}: the keys could not be read: {why}")]
    Read { replica: SocketAddr, why: String },
    #[error("{replica} does not answer")]
    Late { replica: SocketAddr },
}

async fn fetch_one(replica: SocketAddr) -> Result<KeySet, FetchError> {
    timeout(FETCH_TIMEOUT, ask(replica)).await.unwrap_or(Err(FetchError::Late { replica }))
}

async fn ask(replica: SocketAddr) -> Result<KeySet, FetchError> {
    let failed = |source| FetchError::Ask { replica, source };
    let unread = |why: &dyn ToString| FetchError::Read { replica, why: why.to_string() };
    let stream = TcpStream::connect(replica).await;
    let stream = stream.map_err(|source| FetchError::Connect { replica, source })?;
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await.map_err(failed)?;
    let request = Request::get(JWKS_PATH)
        .header("host", replica.to_string())
        .header("connection", "close")
        .body(Empty::<Bytes>::new())
        .map_err(|error| unread(&error))?;
    let exchange = async {
        let response = sender.send_request(request).await.map_err(failed)?;
        if response.status() != StatusCode::OK {
            return Err(FetchError::Status { replica, status: response.status() });
        }
        let body = Limited::new(response.into_body(), MAX_SET_BYTES).collect().await;
        let set = serde_json::from_slice(&body.map_err(|error| unread(&error))?.to_bytes());
        Ok(KeySet::from_jwks(&set.map_err(|error| unread(&error))?))
    };
    // The answer ends when the connection has brought it all; how the connection ends does not matter.
    let (answer, _) = tokio::join!(exchange, connection);
    answer
}

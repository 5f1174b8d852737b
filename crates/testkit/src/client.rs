//! An HTTP client for tests: one shop, kept-alive connections, every request with an end.

use std::time::Duration;

use bytes::Bytes;
use http::{HeaderMap, Request, Response};
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Incoming;
use hyper_util::client::legacy;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::{TokioExecutor, TokioTimer};

use crate::events::Events;

/// How long a request may take, unless a client was told otherwise.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(30);
/// How long a connection may take: all are to this machine.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// The largest body that is read.
const MAX_BODY_BYTES: usize = 64 * 1024 * 1024;

/// A client of one address. Clones share its connections.
#[derive(Clone, Debug)]
pub struct Client {
    base: String,
    timeout: Duration,
    pool: legacy::Client<HttpConnector, Full<Bytes>>,
}

/// An answer, read to its end.
#[derive(Clone, Debug)]
pub struct Answer {
    /// The status code.
    pub status: u16,
    /// The headers.
    pub headers: HeaderMap,
    /// The body.
    pub body: String,
}

impl Answer {
    /// The body as JSON.
    ///
    /// # Panics
    /// When it is something else.
    pub fn json(&self) -> serde_json::Value {
        match serde_json::from_str(&self.body) {
            Ok(json) => json,
            Err(error) => panic!("{error} in an answer {}: {:?}", self.status, self.body),
        }
    }
}

/// There is no whole answer. Whether the request had an effect is not known.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// It took too long.
    #[error("no answer within {0:?}")]
    Timeout(Duration),
    /// There is no connection, or it broke before the head of the answer was in.
    #[error("no answer: {0:?}")]
    NoAnswer(#[from] legacy::Error),
    /// The connection broke within the body.
    #[error("half an answer: {0}")]
    Broken(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// The request makes no sense: a bad path or header.
    #[error("no request: {0}")]
    Request(#[from] http::Error),
    /// A stream was asked for, and refused.
    #[error("the stream was refused: {} {}", .0.status, .0.body)]
    Refused(Box<Answer>),
}

impl Client {
    /// A client of the server at `base`, such as `http://127.0.0.1:8080`.
    pub fn new(base: impl Into<String>) -> Client {
        let mut connector = HttpConnector::new();
        connector.set_connect_timeout(Some(CONNECT_TIMEOUT));
        connector.set_nodelay(true);
        let pool =
            legacy::Client::builder(TokioExecutor::new()).pool_timer(TokioTimer::new()).build(connector);
        Client { base: base.into(), timeout: REQUEST_TIMEOUT, pool }
    }

    /// The same with another limit for each request.
    pub fn with_timeout(&self, timeout: Duration) -> Client {
        Client { timeout, ..self.clone() }
    }

    /// Where it sends its requests: scheme, host and port.
    pub fn base(&self) -> &str {
        &self.base
    }

    /// Sends a request and reads the whole answer, whatever its status. `path` begins with `/`.
    ///
    /// # Errors
    /// [`ClientError`] when there is no whole answer.
    pub async fn request(
        &self,
        method: &str,
        path: &str,
        headers: &[(&str, &str)],
        body: Option<Vec<u8>>,
    ) -> Result<Answer, ClientError> {
        let request = self.build(method, path, headers, body)?;
        let whole = async { read(self.pool.request(request).await?).await };
        tokio::time::timeout(self.timeout, whole).await.map_err(|_| ClientError::Timeout(self.timeout))?
    }

    /// GET, with an access token if there is one.
    ///
    /// # Errors
    /// As [`Client::request`].
    pub async fn get(&self, path: &str, token: Option<&str>) -> Result<Answer, ClientError> {
        let bearer = bearer(token);
        self.request("GET", path, &authorization(&bearer), None).await
    }

    /// POST of JSON, with an access token if there is one.
    ///
    /// # Errors
    /// As [`Client::request`].
    pub async fn post(
        &self,
        path: &str,
        token: Option<&str>,
        body: &serde_json::Value,
    ) -> Result<Answer, ClientError> {
        let bearer = bearer(token);
        self.request("POST", path, &authorization(&bearer), Some(body.to_string().into_bytes())).await
    }

    /// PUT of JSON, with an access token if there is one.
    ///
    /// # Errors
    /// As [`Client::request`].
    pub async fn put(
        &self,
        path: &str,
        token: Option<&str>,
        body: &serde_json::Value,
    ) -> Result<Answer, ClientError> {
        let bearer = bearer(token);
        self.request("PUT", path, &authorization(&bearer), Some(body.to_string().into_bytes())).await
    }

    /// Opens the stream of a customer's purchases, behind the event with this id if there is one.
    ///
    /// # Errors
    /// [`ClientError::Refused`] when the answer is no stream, others when there is no answer.
    pub async fn events(&self, token: &str, last_event_id: Option<&str>) -> Result<Events, ClientError> {
        let bearer = bearer(Some(token));
        let mut headers = authorization(&bearer);
        headers.push(("accept", "text/event-stream"));
        headers.extend(last_event_id.map(|id| ("last-event-id", id)));
        let request = self.build("GET", "/api/purchase/result", &headers, None)?;
        let head = async {
            let response = self.pool.request(request).await?;
            let content_type = response.headers().get("content-type");
            if response.status() == 200 && content_type.is_some_and(|it| it == "text/event-stream") {
                return Ok(Events::new(response.into_body()));
            }
            Err(ClientError::Refused(Box::new(read(response).await?)))
        };
        tokio::time::timeout(self.timeout, head).await.map_err(|_| ClientError::Timeout(self.timeout))?
    }

    fn build(
        &self,
        method: &str,
        path: &str,
        headers: &[(&str, &str)],
        body: Option<Vec<u8>>,
    ) -> Result<Request<Full<Bytes>>, ClientError> {
        let mut request = Request::builder().method(method).uri(format!("{}{path}", self.base));
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        Ok(request.body(Full::new(body.unwrap_or_default().into()))?)
    }
}

fn bearer(token: Option<&str>) -> Option<String> {
    token.map(|token| format!("bearer {token}"))
}

fn authorization(bearer: &Option<String>) -> Vec<(&str, &str)> {
    bearer.iter().map(|value| ("authorization", value.as_str())).collect()
}

async fn read(response: Response<Incoming>) -> Result<Answer, ClientError> {
    let (head, body) = response.into_parts();
    let body = Limited::new(body, MAX_BODY_BYTES).collect().await.map_err(ClientError::Broken)?.to_bytes();
    let body = String::from_utf8_lossy(&body).into_owned();
    Ok(Answer { status: head.status.as_u16(), headers: head.headers, body })
}

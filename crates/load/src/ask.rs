//! Requests, and asking where an answer is needed rather than measured: setting up, polling, verifying.

use std::time::{Duration, Instant};

use bytes::Bytes;
use http::header::{AUTHORIZATION, CONTENT_TYPE, HOST};
use http::{HeaderValue, Method, Request, StatusCode, Uri};
use http_body_util::Full;

use crate::backoff::Backoff;
use crate::http1::{Answer, Connection, Outgoing};
use crate::record::Failure;
use crate::target::Target;

/// A request to this shop.
pub(crate) fn request(
    target: &Target,
    method: Method,
    path: Uri,
    bearer: Option<&HeaderValue>,
    body: Bytes,
) -> Outgoing {
    const JSON: HeaderValue = HeaderValue::from_static("application/json");
    let has_body = method == Method::POST;
    let mut request = Request::new(Full::new(body));
    *request.method_mut() = method;
    *request.uri_mut() = path;
    let headers = request.headers_mut();
    headers.insert(HOST, target.authority().clone());
    if has_body {
        headers.insert(CONTENT_TYPE, JSON);
    }
    if let Some(bearer) = bearer {
        headers.insert(AUTHORIZATION, bearer.clone());
    }
    request
}

/// The path of one thing, such as `/api/order/7`.
pub(crate) fn path_of(kind: &str, id: u64) -> Uri {
    let path = format!("/api/{kind}/{id}");
    path.parse().expect("a number and a name without special characters are a path")
}

/// Somebody who asks one question after the other, on one connection.
pub(crate) struct Asker {
    target: Target,
    limit: Duration,
    connection: Option<Connection>,
}

impl Asker {
    /// Each answer may take so long.
    pub(crate) fn new(target: &Target, limit: Duration) -> Asker {
        Asker { target: target.clone(), limit, connection: None }
    }

    /// The shop.
    pub(crate) fn target(&self) -> &Target {
        &self.target
    }

    /// Asks once.
    ///
    /// # Errors
    /// When there is no answer.
    pub(crate) async fn ask(
        &mut self,
        method: Method,
        path: Uri,
        bearer: Option<&HeaderValue>,
        body: Bytes,
    ) -> Result<Answer, Failure> {
        let request = request(&self.target, method, path, bearer, body);
        self.send(request).await
    }

    /// Sends a request.
    ///
    /// # Errors
    /// When there is no answer.
    pub(crate) async fn send(&mut self, request: Outgoing) -> Result<Answer, Failure> {
        let mut connection = match self.connection.take() {
            Some(kept) => kept,
            None => Connection::open(&self.target, self.limit).await?,
        };
        // The shop closes what was idle for a while.
        if !connection.is_open().await {
            connection = Connection::open(&self.target, self.limit).await?;
        }
        let answer = connection.call(request, self.limit).await?;
        self.connection = Some(connection);
        Ok(answer)
    }

    /// GET, asked again while the shop is busy (429, 503) or does not answer, for so long.
    ///
    /// # Errors
    /// The last failure.
    pub(crate) async fn get_patiently(
        &mut self,
        path: &Uri,
        bearer: Option<&HeaderValue>,
        patience: Duration,
    ) -> Result<Answer, Failure> {
        let (begun, mut backoff) = (Instant::now(), Backoff::default());
        loop {
            let answer = self.ask(Method::GET, path.clone(), bearer, Bytes::new()).await;
            let pause = match &answer {
                Ok(answer) if is_busy(answer.status) => backoff.next(answer.retry_after),
                Ok(_) => return answer,
                Err(_) => backoff.next(None),
            };
            if begun.elapsed() + pause > patience {
                return answer;
            }
            tokio::time::sleep(pause).await;
        }
    }
}

/// Whether an answer says: not now.
pub(crate) fn is_busy(status: StatusCode) -> bool {
    matches!(status, StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE)
}

//! The one error that an HTTP handler answers with: a status, a message, and what the caller may do next.
//!
//! What never happens: a message that shows a database's, a library's or a file's words to a client. Those
//! go to the log, through [`ApiError::internal`].

use std::borrow::Cow;
use std::fmt;

use axum::response::{IntoResponse, Response};
use http::StatusCode;
use http::header::{HeaderValue, RETRY_AFTER, WWW_AUTHENTICATE};
use serde::Serialize;

use crate::extract::Json;

/// When a caller should come back after a passing failure of ours, in seconds.
pub const RETRY_AFTER_SECONDS: u32 = 1;

/// An answer that is not a success: `{"msg": "..."}` with its status.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ApiError {
    status: StatusCode,
    msg: Cow<'static, str>,
    retry_after_seconds: Option<u32>,
    challenge: Option<&'static str>,
}

impl ApiError {
    /// Any status, without further headers.
    pub fn new(status: StatusCode, msg: impl Into<Cow<'static, str>>) -> ApiError {
        ApiError { status, msg: msg.into(), retry_after_seconds: None, challenge: None }
    }

    /// 400: the request is not what the API asks for; `msg` names what is wrong with it.
    pub fn bad_request(msg: impl Into<Cow<'static, str>>) -> ApiError {
        ApiError::new(StatusCode::BAD_REQUEST, msg)
    }

    /// 400 for one parameter: `invalid parameter: NAME: PROBLEM`.
    pub fn invalid_parameter(name: impl fmt::Display, problem: impl fmt::Display) -> ApiError {
        ApiError::bad_request(format!("invalid parameter: {name}: {problem}"))
    }

    /// 401 with the challenge that RFC 9110, section 11.6.1, requires.
    pub fn unauthorized(msg: impl Into<Cow<'static, str>>) -> ApiError {
        ApiError::unauthorized_with(msg, "Bearer")
    }

    /// 401 with a challenge that says more, such as `Bearer error="invalid_token"` (RFC 6750, section 3).
    pub fn unauthorized_with(msg: impl Into<Cow<'static, str>>, challenge: &'static str) -> ApiError {
        ApiError { challenge: Some(challenge), ..ApiError::new(StatusCode::UNAUTHORIZED, msg) }
    }

    /// 403: who asks is known and may not.
    pub fn forbidden(msg: impl Into<Cow<'static, str>>) -> ApiError {
        ApiError::new(StatusCode::FORBIDDEN, msg)
    }

    /// 404: there is no such thing, or none that the caller may know of.
    pub fn not_found(msg: impl Into<Cow<'static, str>>) -> ApiError {
        ApiError::new(StatusCode::NOT_FOUND, msg)
    }

    /// 413: the body is above the limit.
    pub fn too_large(limit_bytes: usize) -> ApiError {
        let msg = format!("the request's body is larger than {limit_bytes} bytes");
        ApiError::new(StatusCode::PAYLOAD_TOO_LARGE, msg)
    }

    /// 422: well-formed, and impossible all the same.
    pub fn unprocessable(msg: impl Into<Cow<'static, str>>) -> ApiError {
        ApiError::new(StatusCode::UNPROCESSABLE_ENTITY, msg)
    }

    /// 429: too often; come back after `retry_after_seconds`.
    pub fn too_many_requests(retry_after_seconds: u32) -> ApiError {
        let retry_after_seconds = Some(retry_after_seconds);
        ApiError {
            retry_after_seconds,
            ..ApiError::new(StatusCode::TOO_MANY_REQUESTS, "too many requests, try again later")
        }
    }

    /// 503: nothing was done; come back after `retry_after_seconds`.
    pub fn unavailable(msg: impl Into<Cow<'static, str>>, retry_after_seconds: u32) -> ApiError {
        let retry_after_seconds = Some(retry_after_seconds);
        ApiError { retry_after_seconds, ..ApiError::new(StatusCode::SERVICE_UNAVAILABLE, msg) }
    }

    /// 500: `detail` goes to the log and nowhere else.
    pub fn internal(detail: impl fmt::Display) -> ApiError {
        tracing::error!(%detail, "a request failed");
        ApiError::new(StatusCode::INTERNAL_SERVER_ERROR, "internal error")
    }

    /// The answer's status.
    pub fn status(&self) -> StatusCode {
        self.status
    }

    /// The answer's message.
    pub fn msg(&self) -> &str {
        &self.msg
    }

    /// The answer's `Retry-After`, in seconds.
    pub fn retry_after_seconds(&self) -> Option<u32> {
        self.retry_after_seconds
    }
}

impl fmt::Display for ApiError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.status.as_u16(), self.msg)
    }
}

impl std::error::Error for ApiError {}

/// The body `{"msg": ...}`, of errors and of successes that have nothing else to tell.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Msg {
    /// The message.
    pub msg: Cow<'static, str>,
}

impl Msg {
    /// `{"msg":"ok"}`.
    pub const fn ok() -> Json<Msg> {
        Json(Msg { msg: Cow::Borrowed("ok") })
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut response = (self.status, Json(Msg { msg: self.msg })).into_response();
        let headers = response.headers_mut();
        if let Some(seconds) = self.retry_after_seconds {
            headers.insert(RETRY_AFTER, HeaderValue::from(seconds));
        }
        if let Some(challenge) = self.challenge {
            headers.insert(WWW_AUTHENTICATE, HeaderValue::from_static(challenge));
        }
        response
    }
}

impl From<db::ids::IdsError> for ApiError {
    fn from(error: db::ids::IdsError) -> ApiError {
        match error {
            db::ids::IdsError::Db(error) => error.into(),
            other => ApiError::internal(other),
        }
    }
}

/// A passing failure of the database is 503, because nothing was done; any other is a fault of ours. Where it is not known
/// whether something was done, nobody is told to try again.
impl From<db::Error> for ApiError {
    fn from(error: db::Error) -> ApiError {
        if error.is_unknown() {
            tracing::error!(%error, "a request was answered without knowing what became of it");
            let msg = "it is not known whether this was done: look before you try again";
            ApiError::new(StatusCode::INTERNAL_SERVER_ERROR, msg)
        } else if error.is_transient() {
            tracing::warn!(%error, "the database is unavailable");
            ApiError::unavailable("temporarily unavailable, try again", RETRY_AFTER_SECONDS)
        } else {
            ApiError::internal(error)
        }
    }
}

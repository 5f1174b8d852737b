//! What a handler takes from a request, and how it answers in JSON.
//!
//! A request's body is JSON whatever its content type says, because the original's clients send forms' type.
//! What never happens: a refusal that does not name the parameter; a refusal that repeats a value out of a
//! body, where it may be a password; a field that the API does not know binding to anything.

use std::error::Error;

use axum::body::{Body, Bytes};
use axum::extract::{FromRequest, FromRequestParts, RawPathParams, Request};
use axum::response::{IntoResponse, Response};
use http::header::{CONTENT_TYPE, HeaderValue};
use http::request::Parts;
use http_body_util::{BodyExt, LengthLimitError};
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::edge::BodyLimit;
use crate::error::ApiError;
use crate::server::BodyTimeout;

/// The largest id: ids must survive a JavaScript number (2^53 - 1).
pub const MAX_ID: u64 = (1 << 53) - 1;

/// The most rows that one page may ask for.
pub const MAX_PAGE_SIZE: u64 = 500;

/// How much of a wrong query parameter a refusal repeats, in characters.
const ECHO_CHARS: usize = 32;

/// A JSON body, taken or given.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Json<T>(pub T);

impl<S: Send + Sync, T: DeserializeOwned> FromRequest<S> for Json<T> {
    type Rejection = ApiError;

    async fn from_request(request: Request, _: &S) -> Result<Json<T>, ApiError> {
        let (parts, body) = request.into_parts();
        parse(&read_body(&parts, body).await?).map(Json)
    }
}

/// A request's whole body.
///
/// # Errors
/// 413 for one above the limit, 408 for one that did not arrive in time, 400 for one that was cut off.
pub async fn read_body(parts: &Parts, body: Body) -> Result<Bytes, ApiError> {
    let limit = parts.extensions.get::<BodyLimit>().copied().unwrap_or_default();
    Ok(body.collect().await.map_err(|e| unread_body(&e, limit))?.to_bytes())
}

/// Why a body could not be read to its end, as the layers below left it in the chain of causes.
fn unread_body(error: &(dyn Error + 'static), limit: BodyLimit) -> ApiError {
    let mut cause = Some(error);
    while let Some(error) = cause {
        if error.is::<LengthLimitError>() {
            return ApiError::too_large(limit.bytes());
        }
        if error.is::<BodyTimeout>() {
            return ApiError::new(
                http::StatusCode::REQUEST_TIMEOUT,
                "the request's body did not arrive in time",
            );
        }
        cause = error.source();
    }
    ApiError::bad_request("the request's body could not be read")
}

/// Parses a JSON text. The good case pays for nothing but parsing; a refusal parses again, to name the place.
fn parse<T: DeserializeOwned>(body: &[u8]) -> Result<T, ApiError> {
    // serde would take an array for an object, its items for the fields in the order of their declaration.
    if body.trim_ascii_start().first() == Some(&b'[') {
        return Err(ApiError::bad_request("the request's body is an array, a JSON object is expected"));
    }
    serde_json::from_slice(body).map_err(|error| {
        if body.trim_ascii().is_empty() {
            return ApiError::bad_request("the request's body is empty, a JSON object is expected");
        }
        if !error.is_data() {
            return ApiError::bad_request(format!("the request's body is not JSON: {error}"));
        }
        let mut again = serde_json::Deserializer::from_slice(body);
        match serde_path_to_error::deserialize::<_, T>(&mut again) {
            Err(located) => misfit(&located.path().to_string(), located.inner()),
            Ok(_) => misfit(".", &error),
        }
    })
}

/// A value that does not fit: where it stands and what was expected there. serde's own words would repeat
/// the value itself, up to the last `, expected`.
fn misfit(path: &str, error: &serde_json::Error) -> ApiError {
    let text = error.to_string();
    let problem = text.rfind(" at line ").map_or(text.as_str(), |end| &text[..end]);
    let problem = problem.rfind("expected ").map_or(problem, |start| &problem[start..]);
    // The name of a type of ours tells a client nothing.
    let problem = if problem.starts_with("expected struct ") { "expected an object" } else { problem };
    let path = if path == "." { "body" } else { path };
    ApiError::invalid_parameter(
        path,
        format_args!("{problem} (line {}, column {})", error.line(), error.column()),
    )
}

impl<T: Serialize> IntoResponse for Json<T> {
    fn into_response(self) -> Response {
        match serde_json::to_vec(&self.0) {
            Ok(text) => {
                let mut response = Response::new(Body::from(text));
                response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
                response
            }
            Err(error) => ApiError::internal(format_args!("an answer could not be written as JSON: {error}"))
                .into_response(),
        }
    }
}

/// Which rows of a list: query parameters `offset` (0 when absent) and `size` (required).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Page {
    /// Rows to skip, at most [`MAX_ID`].
    pub offset: u64,
    /// Rows wanted, 1 to [`MAX_PAGE_SIZE`].
    pub size: u64,
}

impl Page {
    /// Parses a query string; of a repeated parameter the first counts.
    ///
    /// # Errors
    /// 400, naming the parameter and its value.
    pub fn parse(query: &str) -> Result<Page, ApiError> {
        let value = |name| {
            query.split('&').find_map(|pair| pair.split_once('=').filter(|(n, _)| *n == name)).map(|(_, v)| v)
        };
        let size = value("size").ok_or_else(|| {
            ApiError::invalid_parameter("size", format_args!("missing, {}", range(1, MAX_PAGE_SIZE)))
        })?;
        Ok(Page {
            offset: value("offset").map_or(Ok(0), |text| integer("offset", text, 0, MAX_ID))?,
            size: integer("size", size, 1, MAX_PAGE_SIZE)?,
        })
    }
}

fn range(min: u64, max: u64) -> String {
    format!("expected an integer from {min} to {max}")
}

/// A decimal number of plain digits in `min..=max`, or 400 with its name and the value as given.
fn integer(name: &str, text: &str, min: u64, max: u64) -> Result<u64, ApiError> {
    let digits = text.bytes().all(|b| b.is_ascii_digit());
    let value = text.parse().ok().filter(|n| digits && (min..=max).contains(n));
    value.ok_or_else(|| {
        let echo: String = text.chars().take(ECHO_CHARS).collect();
        ApiError::invalid_parameter(name, format_args!("{echo:?}, {}", range(min, max)))
    })
}

impl<S: Send + Sync> FromRequestParts<S> for Page {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Page, ApiError> {
        Page::parse(parts.uri.query().unwrap_or_default())
    }
}

/// The path parameter `{id}`: 0 to [`MAX_ID`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Id(pub u64);

impl<S: Send + Sync> FromRequestParts<S> for Id {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Id, ApiError> {
        let params = RawPathParams::from_request_parts(parts, state)
            .await
            .map_err(|_| ApiError::invalid_parameter("id", range(0, MAX_ID)))?;
        let text = params.iter().find(|(name, _)| *name == "id").map_or("", |(_, value)| value);
        integer("id", text, 0, MAX_ID).map(Id)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, serde::Deserialize)]
    struct Cart {
        #[allow(dead_code, reason = "read by the assertions through Debug")]
        items: Vec<Item>,
    }

    #[derive(Debug, serde::Deserialize)]
    struct Item {
        #[allow(dead_code, reason = "read by the assertions through Debug")]
        amount: u32,
    }

    #[test]
    fn an_array_is_no_object() {
        assert_eq!(refusal(" [[1]]"), "the request's body is an array, a JSON object is expected");
    }

    fn refusal(text: &str) -> String {
        let error = parse::<Cart>(text.as_bytes()).unwrap_err();
        assert_eq!(error.status(), 400);
        error.msg().to_owned()
    }

    #[test]
    fn a_refusal_names_the_place_and_never_repeats_the_value() {
        assert_eq!(refusal(""), "the request's body is empty, a JSON object is expected");
        assert_eq!(refusal("{}"), "invalid parameter: body: missing field `items` (line 1, column 2)");
        assert_eq!(
            refusal(r#"{"items":[{"amount":1},{"amount":"s3cret, expected nothing"}]}"#),
            "invalid parameter: items[1].amount: expected u32 (line 1, column 59)"
        );
        assert_eq!(
            refusal(r#"{"items":[{"amount":-1}]}"#),
            "invalid parameter: items[0].amount: expected u32 (line 1, column 22)"
        );
        assert!(refusal("{\"items\":").starts_with("the request's body is not JSON: EOF"));
        assert!(refusal(r#"{"items":[]} {}"#).starts_with("the request's body is not JSON: trailing"));
    }

    #[test]
    fn fields_that_are_not_known_bind_to_nothing() {
        assert!(parse::<Cart>(br#"{"items":[],"role":"admin"}"#).is_ok());
    }

    #[test]
    fn a_page_is_checked_and_the_value_named() {
        assert_eq!(Page::parse("size=500"), Ok(Page { offset: 0, size: 500 }));
        assert_eq!(Page::parse("offset=7&size=1&x=y"), Ok(Page { offset: 7, size: 1 }));
        for (query, problem) in [
            ("", "size: missing, expected an integer from 1 to 500"),
            ("size=0", "size: \"0\", expected an integer from 1 to 500"),
            ("size=501", "size: \"501\", expected an integer from 1 to 500"),
            ("size=+5", "size: \"+5\", expected an integer from 1 to 500"),
            ("size=", "size: \"\", expected an integer from 1 to 500"),
            ("size=1&offset=-1", "offset: \"-1\", expected an integer from 0 to 9007199254740991"),
            (
                "size=1&offset=99999999999999999999",
                "offset: \"99999999999999999999\", expected an integer from 0 to 9007199254740991",
            ),
        ] {
            assert_eq!(Page::parse(query).unwrap_err().msg(), format!("invalid parameter: {problem}"));
        }
    }
}

//! A customer of one thread: the token, and a new one when it has expired.

use std::cell::RefCell;

use bytes::Bytes;
use http::{HeaderValue, Method, StatusCode, Uri};
use serde::Serialize;
use tokio::sync::Mutex;

use crate::ask::Asker;
use crate::setup::Tokens;

#[derive(Serialize)]
struct Refresh<'a> {
    refresh_token: &'a str,
}

/// See the module.
#[derive(Debug)]
pub(crate) struct Customer {
    bearer: RefCell<HeaderValue>,
    /// Good for one refresh; held while one is under way.
    refresh_token: Mutex<String>,
}

impl Customer {
    pub(crate) fn new(tokens: Tokens) -> Customer {
        Customer {
            bearer: RefCell::new(bearer(&tokens.access_token)),
            refresh_token: Mutex::new(tokens.refresh_token),
        }
    }

    /// The value of the header `Authorization`.
    pub(crate) fn bearer(&self) -> HeaderValue {
        self.bearer.borrow().clone()
    }

    /// Gets a new token in place of one that was refused. Whether there is one.
    pub(crate) async fn renew(&self, refused: &HeaderValue, asker: &mut Asker) -> bool {
        let mut refresh_token = self.refresh_token.lock().await;
        if self.bearer.borrow().as_bytes() != refused.as_bytes() {
            return true;
        }
        let body = serde_json::to_vec(&Refresh { refresh_token: &refresh_token });
        let body = Bytes::from(body.unwrap_or_default());
        let path = Uri::from_static("/api/account/auth/refresh");
        let Ok(answer) = asker.ask(Method::POST, path, None, body).await else { return false };
        if !matches!(answer.status, StatusCode::OK | StatusCode::CREATED) {
            return false;
        }
        let Ok(tokens) = serde_json::from_slice::<Tokens>(&answer.body) else { return false };
        self.bearer.replace(bearer(&tokens.access_token));
        *refresh_token = tokens.refresh_token;
        true
    }
}

fn bearer(token: &str) -> HeaderValue {
    // A token that is no header value is refused by the shop, which is then told as such.
    HeaderValue::try_from(format!("bearer {token}")).unwrap_or(HeaderValue::from_static("bearer"))
}

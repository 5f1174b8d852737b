//! Who asks: access tokens are verified here, with public keys only, by every service for itself.
//!
//! A token is a JWT in the profile of RFC 9068 (`typ: at+jwt`), signed with EdDSA (Ed25519, RFC 8037). What
//! never happens: the algorithm is chosen by the token; a token without `exp`, `iss`, `aud` or `sub` counts;
//! a failed verification is remembered; a remembered success outlives the token's expiry.
//!
//! An Ed25519 verification takes tens of microseconds, more than the rest of most requests. So verified
//! tokens are remembered (`remembered.rs`).
//!
//! The keys may be replaced at any time ([`Keeper`]). Whoever presents a token that names an unknown key waits a moment
//! while the keeper looks for it; a token whose key was withdrawn no longer counts, remembered or not. A remembered
//! token is checked without a look at the keys.

use std::collections::HashMap;
use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::{Duration, Instant};

use aws_lc_rs::digest;
use axum::extract::{FromRef, FromRequestParts};
use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use http::header::{AUTHORIZATION, HeaderMap};
use http::request::Parts;
use jsonwebtoken::{Algorithm, DecodingKey, Validation};
use serde::Deserialize;
use tokio::sync::{Notify, watch};
use wire::time::Clock;

use crate::error::ApiError;
use crate::extract::MAX_ID;
use crate::remembered::{Known, Remembered};

/// The `typ` header of an access token (RFC 9068, section 2.1).
pub const TOKEN_TYPE: &str = "at+jwt";

/// How many verified tokens are remembered (about 400 bytes each).
pub const MAX_REMEMBERED_TOKENS: usize = 100_000;

/// How long a verified token is remembered at most; after it, the token is verified again.
pub const REMEMBERED_FOR: Duration = Duration::from_secs(3600);

/// A longer token is not looked at, in bytes.
pub const MAX_TOKEN_BYTES: usize = 4096;

/// How long a request waits at most while somebody looks for the key that its token names.
pub const KEY_PATIENCE: Duration = Duration::from_secs(2);

/// The least time from one such look to the next: a token that nobody signed costs no more than this.
pub const LOOK_PAUSE: Duration = Duration::from_secs(2);

/// The length of an Ed25519 public key, in bytes.
pub const PUBLIC_KEY_BYTES: usize = 32;

/// A key that signatures are checked with.
#[derive(Clone, PartialEq, Eq)]
pub struct PublicKey {
    kid: String,
    bytes: [u8; PUBLIC_KEY_BYTES],
}

impl PublicKey {
    /// An Ed25519 public key. Its id is its thumbprint (RFC 7638, RFC 8037 appendix A.3), so that one key
    /// has one id wherever it is published.
    pub fn new(bytes: [u8; PUBLIC_KEY_BYTES]) -> PublicKey {
        let x = URL_SAFE_NO_PAD.encode(bytes);
        let members = format!(r#"{{"crv":"Ed25519","kty":"OKP","x":"{x}"}}"#);
        let kid = URL_SAFE_NO_PAD.encode(digest::digest(&digest::SHA256, members.as_bytes()));
        PublicKey { kid, bytes }
    }

    /// The key's id, as tokens name it in their header.
    pub fn kid(&self) -> &str {
        &self.kid
    }

    /// The key itself.
    pub fn bytes(&self) -> &[u8; PUBLIC_KEY_BYTES] {
        &self.bytes
    }
}

impl fmt::Debug for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PublicKey({})", self.kid)
    }
}

/// The keys whose signatures count, the current one and those that unexpired tokens may still be signed with.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct KeySet(Vec<PublicKey>);

impl KeySet {
    /// A set of keys.
    pub fn new(keys: impl IntoIterator<Item = PublicKey>) -> KeySet {
        KeySet(keys.into_iter().collect())
    }

    /// The keys.
    pub fn keys(&self) -> &[PublicKey] {
        &self.0
    }

    /// The keys of both.
    #[must_use]
    pub fn union(mut self, other: &KeySet) -> KeySet {
        for key in &other.0 {
            if !self.0.contains(key) {
                self.0.push(key.clone());
            }
        }
        self
    }

    /// The set as a JWK set (RFC 7517, section 5).
    pub fn to_jwks(&self) -> serde_json::Value {
        let keys: Vec<_> = self
            .0
            .iter()
            .map(|key| {
                serde_json::json!({
                    "kty": "OKP", "crv": "Ed25519", "use": "sig", "alg": "EdDSA",
                    "kid": key.kid, "x": URL_SAFE_NO_PAD.encode(key.bytes),
                })
            })
            .collect();
        serde_json::json!({ "keys": keys })
    }

    /// Reads a JWK set; keys of other kinds or uses are left out, as RFC 7517 asks. A key's own `kid` is
    /// ignored: it follows from the key.
    pub fn from_jwks(set: &serde_json::Value) -> KeySet {
        let keys = set["keys"].as_array().map(Vec::as_slice).unwrap_or_default();
        KeySet::new(keys.iter().filter(|key| key["crv"] == "Ed25519" && key["kty"] == "OKP").filter_map(
            |key| {
                let x = URL_SAFE_NO_PAD.decode(key["x"].as_str()?).ok()?;
                Some(PublicKey::new(x.try_into().ok()?))
            },
        ))
    }
}

/// Who a token was issued by and for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Realm {
    /// The required `iss`.
    pub issuer: String,
    /// The required `aud`.
    pub audience: String,
}

impl Default for Realm {
    fn default() -> Realm {
        Realm { issuer: "sagaline/account".to_owned(), audience: "sagaline".to_owned() }
    }
}

/// What a verified token says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Claims {
    /// Who the caller is.
    pub customer_id: u64,
    /// Unix seconds from which on the token no longer counts.
    pub expires_at: u64,
}

/// Why a token does not count.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum AuthError {
    /// There is none.
    #[error("missing access token")]
    Missing,
    /// Malformed, of another issuer, audience, type or algorithm, or not signed by a known key.
    #[error("invalid token")]
    Invalid,
    /// It names a key that is not known, or not yet. To a caller it is invalid.
    #[error("invalid token")]
    UnknownKey,
    /// Good once.
    #[error("token expired")]
    Expired,
}

impl From<AuthError> for ApiError {
    fn from(error: AuthError) -> ApiError {
        match error {
            AuthError::Missing => ApiError::unauthorized("missing access token"),
            AuthError::Invalid | AuthError::UnknownKey => {
                ApiError::unauthorized_with("invalid token", r#"Bearer error="invalid_token""#)
            }
            AuthError::Expired => ApiError::unauthorized_with(
                "token expired",
                r#"Bearer error="invalid_token", error_description="token expired""#,
            ),
        }
    }
}

/// The claims as they stand in a token; `iss` and `aud` are checked by the library.
#[derive(Deserialize)]
struct WireClaims {
    sub: String,
    exp: u64,
}

/// Verifies access tokens. Cloning is cheap; clones share the keys and what is remembered.
#[derive(Clone)]
pub struct Verifier(Arc<Inner>);

struct Inner {
    keys: RwLock<Arc<Keys>>,
    /// Tokens remembered under older keys no longer count: a key was withdrawn since.
    valid_from: AtomicU64,
    validation: Validation,
    clock: Clock,
    verified: Remembered,
    looks: Looks,
}

/// The keys at one time.
struct Keys {
    /// How often they were replaced before.
    generation: u64,
    by_kid: HashMap<String, DecodingKey>,
}

impl Keys {
    fn new(generation: u64, keys: &KeySet) -> Keys {
        let decoding = |key: &PublicKey| (key.kid.clone(), DecodingKey::from_ed_der(&key.bytes));
        Keys { generation, by_kid: keys.0.iter().map(decoding).collect() }
    }
}

/// Searches for keys that are not known.
struct Looks {
    /// Somebody asks for one.
    wanted: Notify,
    /// How many have ended.
    ended: watch::Sender<u64>,
    state: Mutex<LookState>,
}

#[derive(Default)]
struct LookState {
    kept: bool,
    under_way: bool,
    last_ended: Option<Instant>,
}

impl Looks {
    fn state(&self) -> std::sync::MutexGuard<'_, LookState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Asks for a look, or joins the one under way. None when there was one a moment ago, or nobody to do it.
    fn join(&self) -> Option<watch::Receiver<u64>> {
        let mut state = self.state();
        if !state.kept {
            return None;
        }
        let ended = self.ended.subscribe();
        if !state.under_way {
            if state.last_ended.is_some_and(|at| at.elapsed() < LOOK_PAUSE) {
                return None;
            }
            state.under_way = true;
            self.wanted.notify_one();
        }
        Some(ended)
    }

    fn end(&self) {
        let mut state = self.state();
        state.under_way = false;
        state.last_ended = Some(Instant::now());
        self.ended.send_modify(|ended| *ended += 1);
    }
}

/// Keeps a [`Verifier`]'s keys up to date. There is one at a time.
pub struct Keeper(Verifier);

impl Keeper {
    /// Waits until a token names a key that is not known. Whoever hears of it looks for keys, and says what came of it
    /// by [`Keeper::replace`] or [`Keeper::retain`]: requests wait for that.
    pub async fn wanted(&self) {
        self.0.0.looks.wanted.notified().await;
    }

    /// These keys count from now on. What was remembered under a key that is not among them is forgotten.
    pub fn replace(&self, keys: &KeySet) {
        let inner = &self.0.0;
        {
            let mut current = inner.keys.write().unwrap_or_else(PoisonError::into_inner);
            let next = Keys::new(current.generation + 1, keys);
            let withdrawn = current.by_kid.keys().any(|kid| !next.by_kid.contains_key(kid));
            let added = next.by_kid.keys().any(|kid| !current.by_kid.contains_key(kid));
            if withdrawn {
                inner.valid_from.store(next.generation, Ordering::Release);
            }
            if withdrawn || added {
                tracing::info!(
                    keys = next.by_kid.len(),
                    "the keys that access tokens are verified with have changed"
                );
                *current = Arc::new(next);
            }
        }
        inner.looks.end();
    }

    /// There is nothing new: the keys that are known stay.
    pub fn retain(&self) {
        self.0.0.looks.end();
    }
}

impl Drop for Keeper {
    fn drop(&mut self) {
        self.0.0.looks.state().kept = false;
        self.0.0.looks.end();
    }
}

impl fmt::Debug for Keeper {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Keeper({:?})", self.0)
    }
}

impl Verifier {
    /// A verifier for tokens of `realm`, signed by one of `keys`.
    pub fn new(keys: &KeySet, realm: &Realm, clock: Clock) -> Verifier {
        let mut validation = Validation::new(Algorithm::EdDSA);
        validation.set_required_spec_claims(&["exp", "iss", "aud", "sub"]);
        validation.set_issuer(&[&realm.issuer]);
        validation.set_audience(&[&realm.audience]);
        // The library would ask the machine's clock; `verify` asks ours.
        validation.validate_exp = false;
        Verifier(Arc::new(Inner {
            keys: RwLock::new(Arc::new(Keys::new(0, keys))),
            valid_from: AtomicU64::new(0),
            validation,
            clock,
            verified: Remembered::new(MAX_REMEMBERED_TOKENS),
            looks: Looks { wanted: Notify::new(), ended: watch::Sender::new(0), state: Mutex::default() },
        }))
    }

    /// Whether there is any key to verify with: without one every token would be invalid.
    pub fn has_keys(&self) -> bool {
        !self.0.keys.read().unwrap_or_else(PoisonError::into_inner).by_kid.is_empty()
    }

    /// Who holds this keeps the keys up to date. From now on a request whose token names an unknown key waits for it.
    pub fn keeper(&self) -> Keeper {
        self.0.looks.state().kept = true;
        Keeper(self.clone())
    }

    /// Ok once there are keys to verify with.
    ///
    /// # Errors
    /// That there are none, so that every token is refused.
    pub fn ready(&self) -> Result<(), String> {
        let keys = self.0.keys.read().unwrap_or_else(PoisonError::into_inner);
        if keys.by_kid.is_empty() {
            Err("no keys to verify access tokens with yet".to_owned())
        } else {
            Ok(())
        }
    }

    /// Checks a token with the keys that are known.
    ///
    /// # Errors
    /// [`AuthError::Invalid`], [`AuthError::UnknownKey`] or [`AuthError::Expired`].
    pub fn verify(&self, token: &str) -> Result<Claims, AuthError> {
        if token.len() > MAX_TOKEN_BYTES {
            return Err(AuthError::Invalid);
        }
        let now = self.0.clock.now();
        if let Some(Known { claims, generation, .. }) = self.0.verified.get(token, now)
            && generation >= self.0.valid_from.load(Ordering::Acquire)
        {
            return self.unexpired(claims).inspect_err(|_| self.0.verified.forget(token));
        }
        let keys = Arc::clone(&self.0.keys.read().unwrap_or_else(PoisonError::into_inner));
        let claims = self.unexpired(self.decode(token, &keys)?)?;
        let until = now + REMEMBERED_FOR.as_millis() as u64;
        self.0.verified.insert(token, Known { claims, generation: keys.generation, until });
        Ok(claims)
    }

    /// Checks a token; if it names a key that is not known, the keeper is given a moment to find it.
    ///
    /// # Errors
    /// As [`Verifier::verify`].
    pub async fn authenticate(&self, token: &str) -> Result<Claims, AuthError> {
        match self.verify(token) {
            Err(AuthError::UnknownKey) if self.look().await => self.verify(token),
            checked => checked,
        }
    }

    /// Whether somebody has looked for keys now.
    async fn look(&self) -> bool {
        let Some(mut ended) = self.0.looks.join() else { return false };
        tokio::time::timeout(KEY_PATIENCE, ended.changed()).await.is_ok_and(|changed| changed.is_ok())
    }

    /// Checks the token in `Authorization: bearer <token>`, the scheme in any case, like [`Verifier::authenticate`].
    ///
    /// # Errors
    /// [`AuthError::Missing`] without such a header, otherwise as [`Verifier::verify`].
    pub async fn authenticate_headers(&self, headers: &HeaderMap) -> Result<Claims, AuthError> {
        self.authenticate(bearer_token(headers)?).await
    }

    fn unexpired(&self, claims: Claims) -> Result<Claims, AuthError> {
        if self.0.clock.now_seconds() < claims.expires_at { Ok(claims) } else { Err(AuthError::Expired) }
    }

    fn decode(&self, token: &str, keys: &Keys) -> Result<Claims, AuthError> {
        let invalid = |_| AuthError::Invalid;
        let header = jsonwebtoken::decode_header(token).map_err(invalid)?;
        let typed = header.typ.as_deref().is_some_and(|typ| typ.eq_ignore_ascii_case(TOKEN_TYPE));
        // `crit` lists extensions that a recipient must understand (RFC 7515, 4.1.11); we know none.
        if !typed || header.crit.is_some() || header.alg != Algorithm::EdDSA {
            return Err(AuthError::Invalid);
        }
        let kid = header.kid.ok_or(AuthError::Invalid)?;
        let key = keys.by_kid.get(&kid).ok_or(AuthError::UnknownKey)?;
        let claims =
            jsonwebtoken::decode::<WireClaims>(token, key, &self.0.validation).map_err(invalid)?.claims;
        let customer_id = claims.sub.parse().ok().filter(|id| *id <= MAX_ID).ok_or(AuthError::Invalid)?;
        Ok(Claims { customer_id, expires_at: claims.exp })
    }
}

/// The token in `Authorization: bearer <token>`.
fn bearer_token(headers: &HeaderMap) -> Result<&str, AuthError> {
    let mut values = headers.get_all(AUTHORIZATION).iter();
    let value = values.next().ok_or(AuthError::Missing)?;
    if values.next().is_some() {
        return Err(AuthError::Invalid);
    }
    let (scheme, token) = value.to_str().ok().and_then(|v| v.split_once(' ')).ok_or(AuthError::Invalid)?;
    if !scheme.eq_ignore_ascii_case("bearer") {
        return Err(AuthError::Missing);
    }
    Ok(token.trim())
}

impl fmt::Debug for Verifier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let keys = self.0.keys.read().unwrap_or_else(PoisonError::into_inner);
        f.debug_list().entries(keys.by_kid.keys()).finish()
    }
}

/// The caller's customer id, from a verified access token; without one the answer is 401.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Customer(pub u64);

impl<S> FromRequestParts<S> for Customer
where
    S: Send + Sync,
    Verifier: FromRef<S>,
{
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Customer, ApiError> {
        let claims = Verifier::from_ref(state).authenticate_headers(&parts.headers).await?;
        Ok(Customer(claims.customer_id))
    }
}

//! Who asks: access tokens are verified here, with public keys only, by every service for itself.
//!
//! A token is a JWT in the profile of RFC 9068 (`typ: at+jwt`), signed with EdDSA (Ed25519, RFC 8037). What
//! never happens: the algorithm is chosen by the token; a token without `exp`, `iss`, `aud` or `sub` counts;
//! a failed verification is remembered; a remembered success outlives the token's expiry.
//!
//! An Ed25519 verification takes tens of microseconds, more than the rest of most requests. So verified
//! tokens are remembered by their SHA-256, in a bounded cache: a forger would need a collision with a token
//! that was verified.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use aws_lc_rs::digest;
use axum::extract::{FromRef, FromRequestParts};
use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use http::header::{AUTHORIZATION, HeaderMap};
use http::request::Parts;
use jsonwebtoken::{Algorithm, DecodingKey, Validation};
use serde::Deserialize;
use wire::time::Clock;

use crate::error::ApiError;
use crate::extract::MAX_ID;

/// The `typ` header of an access token (RFC 9068, section 2.1).
pub const TOKEN_TYPE: &str = "at+jwt";

/// How many verified tokens are remembered (about 200 bytes each).
pub const MAX_REMEMBERED_TOKENS: u64 = 100_000;

/// How long a verified token is remembered at most; after it, the token is verified again.
pub const REMEMBERED_FOR: Duration = Duration::from_secs(3600);

/// A longer token is not looked at, in bytes.
pub const MAX_TOKEN_BYTES: usize = 4096;

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
    /// Good once.
    #[error("token expired")]
    Expired,
}

impl From<AuthError> for ApiError {
    fn from(error: AuthError) -> ApiError {
        match error {
            AuthError::Missing => ApiError::unauthorized("missing access token"),
            AuthError::Invalid => {
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

/// Verifies access tokens. Cloning is cheap; clones share what is remembered.
#[derive(Clone)]
pub struct Verifier(Arc<Inner>);

struct Inner {
    keys: Vec<(String, DecodingKey)>,
    validation: Validation,
    clock: Clock,
    verified: moka::sync::Cache<[u8; digest::SHA256_OUTPUT_LEN], Claims>,
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
        let keys = keys.0.iter().map(|key| (key.kid.clone(), DecodingKey::from_ed_der(&key.bytes))).collect();
        let verified = moka::sync::Cache::builder()
            .max_capacity(MAX_REMEMBERED_TOKENS)
            .time_to_live(REMEMBERED_FOR)
            .build();
        Verifier(Arc::new(Inner { keys, validation, clock, verified }))
    }

    /// Checks a token.
    ///
    /// # Errors
    /// [`AuthError::Invalid`] or [`AuthError::Expired`].
    pub fn verify(&self, token: &str) -> Result<Claims, AuthError> {
        if token.len() > MAX_TOKEN_BYTES {
            return Err(AuthError::Invalid);
        }
        let mut hash = [0; digest::SHA256_OUTPUT_LEN];
        hash.copy_from_slice(digest::digest(&digest::SHA256, token.as_bytes()).as_ref());
        if let Some(claims) = self.0.verified.get(&hash) {
            return self.unexpired(claims).inspect_err(|_| self.0.verified.invalidate(&hash));
        }
        let claims = self.unexpired(self.decode(token).ok_or(AuthError::Invalid)?)?;
        self.0.verified.insert(hash, claims);
        Ok(claims)
    }

    /// Checks the token in `Authorization: bearer <token>`, the scheme in any case.
    ///
    /// # Errors
    /// [`AuthError::Missing`] without such a header, otherwise as [`Verifier::verify`].
    pub fn verify_headers(&self, headers: &HeaderMap) -> Result<Claims, AuthError> {
        let mut values = headers.get_all(AUTHORIZATION).iter();
        let value = values.next().ok_or(AuthError::Missing)?;
        if values.next().is_some() {
            return Err(AuthError::Invalid);
        }
        let (scheme, token) =
            value.to_str().ok().and_then(|v| v.split_once(' ')).ok_or(AuthError::Invalid)?;
        if !scheme.eq_ignore_ascii_case("bearer") {
            return Err(AuthError::Missing);
        }
        self.verify(token.trim())
    }

    fn unexpired(&self, claims: Claims) -> Result<Claims, AuthError> {
        if self.0.clock.now_seconds() < claims.expires_at { Ok(claims) } else { Err(AuthError::Expired) }
    }

    fn decode(&self, token: &str) -> Option<Claims> {
        let header = jsonwebtoken::decode_header(token).ok()?;
        let typed = header.typ.as_deref().is_some_and(|typ| typ.eq_ignore_ascii_case(TOKEN_TYPE));
        // `crit` lists extensions that a recipient must understand (RFC 7515, 4.1.11); we know none.
        if !typed || header.crit.is_some() {
            return None;
        }
        let kid = header.kid?;
        let (_, key) = self.0.keys.iter().find(|(known, _)| *known == kid)?;
        let claims = jsonwebtoken::decode::<WireClaims>(token, key, &self.0.validation).ok()?.claims;
        let customer_id = claims.sub.parse().ok().filter(|id| *id <= MAX_ID)?;
        Some(Claims { customer_id, expires_at: claims.exp })
    }
}

impl fmt::Debug for Verifier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.0.keys.iter().map(|(kid, _)| kid)).finish()
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
        let claims = Verifier::from_ref(state).verify_headers(&parts.headers)?;
        Ok(Customer(claims.customer_id))
    }
}

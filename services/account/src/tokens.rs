//! The two tokens of a login. The access token is a signed statement that everybody can check and nobody
//! can take back, so it is short-lived. The refresh token is a random value that only the database knows, by
//! its hash, and that is spent at its use.
//!
//! Refresh tokens form families (RFC 9700, section 4.14.2): a login begins one, each refresh spends its token
//! and adds the next. A spent token that comes again means that two parties hold the family, one of them a
//! thief, so the whole family is revoked. That holds for two parallel refreshes of one token as well: one
//! gets a pair, the other revokes the family, and that pair's refresh token is dead. A client must not send
//! a refresh twice.

use std::fmt;
use std::sync::{Arc, PoisonError, RwLock};

use aws_lc_rs::digest;
use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use jsonwebtoken::{Algorithm, EncodingKey, Header};
use serde::Serialize;
use serve::auth::{KeySet, Realm, TOKEN_TYPE};
use serve::random::Random;
use wire::time::{Clock, UnixMillis};

use crate::Config;
use crate::keys::{SigningKey, SigningKeys, signs};

/// 256 bits: not to be guessed.
const REFRESH_TOKEN_BYTES: usize = 32;

/// What is stored of a refresh token. A plain SHA-256 suffices for a value of 256 random bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct TokenHash(pub(crate) [u8; digest::SHA256_OUTPUT_LEN]);

/// A refresh token, as its owner has it.
pub(crate) struct RefreshToken([u8; REFRESH_TOKEN_BYTES]);

impl RefreshToken {
    /// None for a text that cannot be one.
    pub(crate) fn parse(text: &str) -> Option<RefreshToken> {
        // The length first: a text of any size need not be decoded to be refused.
        if text.len() != URL_SAFE_NO_PAD.encode([0; REFRESH_TOKEN_BYTES]).len() {
            return None;
        }
        URL_SAFE_NO_PAD.decode(text).ok()?.try_into().ok().map(RefreshToken)
    }

    pub(crate) fn to_text(&self) -> String {
        URL_SAFE_NO_PAD.encode(self.0)
    }

    pub(crate) fn hash(&self) -> TokenHash {
        let mut hash = [0; digest::SHA256_OUTPUT_LEN];
        hash.copy_from_slice(digest::digest(&digest::SHA256, &self.0).as_ref());
        TokenHash(hash)
    }
}

impl fmt::Debug for RefreshToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("RefreshToken(..)")
    }
}

/// What is stored of a refresh token's successor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct NewToken {
    pub(crate) hash: TokenHash,
    /// Unix seconds.
    pub(crate) expires_at: u64,
}

/// What the database knows of a refresh token.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Known {
    pub(crate) family_id: u64,
    pub(crate) customer_id: u64,
    /// Unix seconds.
    pub(crate) expires_at: u64,
    pub(crate) spent: bool,
    pub(crate) revoked: bool,
}

/// What is to be done with a refresh token that was presented.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// Spend it and give out its successor.
    Rotate { family_id: u64, customer_id: u64 },
    /// It was spent before: revoke the family and refuse.
    Reuse { family_id: u64 },
    /// Refuse: its time is over.
    Expired,
    /// Refuse: it is not known, or its family is revoked.
    Invalid,
}

/// The rule. Reuse goes before expiry: a thief's late try still ends the family.
pub(crate) fn judge(known: Option<Known>, now_seconds: u64) -> Verdict {
    match known {
        None => Verdict::Invalid,
        Some(token) if token.revoked => Verdict::Invalid,
        Some(token) if token.spent => Verdict::Reuse { family_id: token.family_id },
        Some(token) if now_seconds >= token.expires_at => Verdict::Expired,
        Some(token) => Verdict::Rotate { family_id: token.family_id, customer_id: token.customer_id },
    }
}

/// Makes tokens.
pub(crate) struct Issuer {
    signers: RwLock<Arc<Signers>>,
    realm: Realm,
    clock: Clock,
    random: Random,
    access_token_seconds: u64,
    refresh_token_seconds: u64,
}

/// The keys, made ready to sign.
struct Signers {
    all: Vec<Signer>,
    public: KeySet,
}

struct Signer {
    made_at: UnixMillis,
    key: EncodingKey,
    header: Header,
}

impl Signers {
    fn new(keys: &SigningKeys) -> Signers {
        let signer = |key: &SigningKey| {
            let mut header = Header::new(Algorithm::EdDSA);
            header.typ = Some(TOKEN_TYPE.to_owned());
            header.kid = Some(key.public().kid().to_owned());
            Signer { made_at: key.made_at(), key: EncodingKey::from_ed_der(key.pkcs8()), header }
        };
        Signers { all: keys.keys().iter().map(signer).collect(), public: keys.public_keys() }
    }

    fn at(&self, now: UnixMillis) -> &Signer {
        &self.all[signs(self.all.iter().map(|signer| signer.made_at), now)]
    }
}

#[derive(Serialize)]
struct AccessClaims<'a> {
    iss: &'a str,
    aud: &'a str,
    sub: String,
    iat: u64,
    exp: u64,
    /// Makes each token its own, even of one customer in one second.
    jti: String,
}

impl Issuer {
    pub(crate) fn new(
        keys: SigningKeys,
        realm: Realm,
        clock: Clock,
        random: Random,
        config: &Config,
    ) -> Issuer {
        Issuer {
            signers: RwLock::new(Arc::new(Signers::new(&keys))),
            realm,
            clock,
            random,
            access_token_seconds: config.access_token_seconds,
            refresh_token_seconds: config.refresh_token_seconds,
        }
    }

    /// Signs with one of these keys from now on.
    pub(crate) fn replace_keys(&self, keys: &SigningKeys) {
        *self.signers.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(Signers::new(keys));
    }

    /// The public halves of its keys.
    pub(crate) fn public_keys(&self) -> KeySet {
        self.signers().public.clone()
    }

    fn signers(&self) -> Arc<Signers> {
        Arc::clone(&self.signers.read().unwrap_or_else(PoisonError::into_inner))
    }

    pub(crate) fn now_seconds(&self) -> u64 {
        self.clock.now_seconds()
    }

    /// A signed access token.
    pub(crate) fn access_token(&self, customer_id: u64) -> Result<String, jsonwebtoken::errors::Error> {
        let (millis, signers) = (self.clock.now(), self.signers());
        let (now, signer) = (millis / 1000, signers.at(millis));
        let claims = AccessClaims {
            iss: &self.realm.issuer,
            aud: &self.realm.audience,
            sub: customer_id.to_string(),
            iat: now,
            exp: now.saturating_add(self.access_token_seconds),
            jti: URL_SAFE_NO_PAD.encode(self.random.bytes::<16>()),
        };
        jsonwebtoken::encode(&signer.header, &claims, &signer.key)
    }

    /// A new refresh token, and what to store of it.
    pub(crate) fn refresh_token(&self) -> (RefreshToken, NewToken) {
        let token = RefreshToken(self.random.bytes());
        let expires_at = self.now_seconds().saturating_add(self.refresh_token_seconds);
        let stored = NewToken { hash: token.hash(), expires_at };
        (token, stored)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rule_in_full() {
        let token =
            |spent, revoked| Some(Known { family_id: 3, customer_id: 7, expires_at: 100, spent, revoked });
        assert_eq!(judge(None, 0), Verdict::Invalid);
        assert_eq!(judge(token(false, false), 99), Verdict::Rotate { family_id: 3, customer_id: 7 });
        assert_eq!(judge(token(false, false), 100), Verdict::Expired);
        assert_eq!(judge(token(true, false), 99), Verdict::Reuse { family_id: 3 });
        assert_eq!(judge(token(true, false), 100), Verdict::Reuse { family_id: 3 });
        assert_eq!(judge(token(false, true), 99), Verdict::Invalid);
        assert_eq!(judge(token(true, true), 99), Verdict::Invalid);
    }

    #[test]
    fn a_refresh_token_goes_through_its_text() {
        let token = RefreshToken([0xfb; 32]);
        assert_eq!(RefreshToken::parse(&token.to_text()).unwrap().hash(), token.hash());
        for wrong in ["", "x", &"*".repeat(43), &"A".repeat(44), &"A".repeat(100_000)] {
            assert!(RefreshToken::parse(wrong).is_none());
        }
    }
}

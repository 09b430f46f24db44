//! DPoP proofs (RFC 9449, 4.3): the client signs each request with the key that its token is bound to.
//!
//! Enters: the header's values, what was requested, the time. Leaves: the key's thumbprint. Never: whether the token is
//! bound to that key ([`super::binding`]), or whether the proof was seen before ([`replay::Replays`]), which the caller
//! asks last, so that only who holds a token can fill that memory.

pub mod nonce;
pub mod replay;
mod target;

use std::time::Duration;

use jiff::Timestamp;

pub use self::target::Target;
use self::{
    nonce::{NonceError, Nonces},
    replay::ReplayError,
};
use super::{
    base64url,
    claims::after,
    json::{self, JsonError, Map, Value, numeric_date},
    jwk::{JwkError, PublicKey, sha256},
    jws::{self, Algorithm, JwsError, KeyInHeader},
};

const MAX_JTI_BYTES: usize = 256;
const MAX_TARGET_BYTES: usize = 8 << 10;

/// What is asked of proofs.
#[derive(Clone, Debug)]
pub struct ProofPolicy {
    pub algorithms: Vec<Algorithm>,
    /// How old a proof may be.
    pub max_age: Duration,
    /// How far ahead the client's clock may be.
    pub max_ahead: Duration,
}

impl Default for ProofPolicy {
    fn default() -> Self {
        // A proof is made for one request: a minute is for slow networks and clocks, not for reuse.
        let (max_age, max_ahead) = (Duration::from_secs(60), Duration::from_secs(5));
        Self { algorithms: Algorithm::ALL.to_vec(), max_age, max_ahead }
    }
}

/// What the proof has to be about.
#[derive(Clone, Copy)]
pub struct Request<'a> {
    pub method: &'a str,
    pub target: &'a Target,
    /// Of the `Authorization` header, where there is one.
    pub access_token: Option<&'a str>,
    /// Where proofs have to carry a nonce of this server.
    pub nonces: Option<&'a Nonces>,
}

/// A proof that passed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Proof {
    /// Of the key that signed it.
    pub jkt: [u8; 32],
    /// SHA-256 of its `jti`.
    pub jti_hash: [u8; 32],
    /// From when on it is refused as too old, so that nobody has to remember it longer.
    pub not_after: Timestamp,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum DpopError {
    // The header.
    #[error("there is no DPoP header")]
    Missing,
    #[error("there is more than one DPoP header")]
    Repeated,
    #[error("the DPoP proof: {0}")]
    Jws(JwsError),
    #[error("the DPoP proof's type is not dpop+jwt")]
    Type,
    #[error("the DPoP proof's key: {0}")]
    Key(JwkError),
    #[error("the DPoP proof is not signed by the key that it carries")]
    Signature,
    // The claims.
    #[error("the DPoP proof's claims: {0}")]
    Json(JsonError),
    #[error("the DPoP proof's claim `{0}` is missing or malformed")]
    Claim(&'static str),
    #[error("the DPoP proof is for another method")]
    Method,
    #[error("the DPoP proof is for another URI")]
    Target,
    #[error("the DPoP proof is too old")]
    Old,
    #[error("the DPoP proof was made in the future")]
    Future,
    #[error("the DPoP proof is for another access token")]
    TokenHash,
    // Use.
    #[error(transparent)]
    Nonce(#[from] NonceError),
    #[error(transparent)]
    Replay(#[from] ReplayError),
}

impl DpopError {
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Missing => "dpop_missing",
            Self::Repeated => "dpop_repeated",
            Self::Jws(error) => error.reason(),
            Self::Type => "dpop_type",
            Self::Key(error) => error.reason(),
            Self::Signature => "dpop_signature_invalid",
            Self::Json(error) => error.reason(),
            Self::Claim(_) => "dpop_claim_malformed",
            Self::Method => "dpop_method_mismatch",
            Self::Target => "dpop_uri_mismatch",
            Self::Old => "dpop_too_old",
            Self::Future => "dpop_in_future",
            Self::TokenHash => "dpop_token_mismatch",
            Self::Nonce(error) => error.reason(),
            Self::Replay(error) => error.reason(),
        }
    }

    /// RFC 9449, 7.1 and 9. `use_dpop_nonce` goes with a `DPoP-Nonce` header.
    pub fn oauth_error(&self) -> &'static str {
        match self {
            Self::Nonce(_) => "use_dpop_nonce",
            _ => "invalid_dpop_proof",
        }
    }
}

/// The one value of the `DPoP` header.
pub fn single<'a>(values: &[&'a [u8]]) -> Result<&'a str, DpopError> {
    match values {
        [] => Err(DpopError::Missing),
        [value] => std::str::from_utf8(value).map_err(|_| DpopError::Jws(JwsError::Encoding)),
        _ => Err(DpopError::Repeated),
    }
}

/// All of RFC 9449, 4.3, but the comparison with the token's binding and the memory of what was used.
pub fn verify(proof: &str, request: &Request<'_>, policy: &ProofPolicy, now: Timestamp) -> Result<Proof, DpopError> {
    let compact = jws::parse(proof, &policy.algorithms, KeyInHeader::Required).map_err(DpopError::Jws)?;
    if !compact.header.has_type("dpop+jwt") {
        return Err(DpopError::Type);
    }
    let jwk = compact.header.jwk.as_ref().ok_or(DpopError::Jws(JwsError::NoKey))?;
    let key = PublicKey::parse(jwk).map_err(DpopError::Key)?;
    if !key.verifies(compact.header.algorithm, compact.signed.as_bytes(), &compact.signature) {
        return Err(DpopError::Signature);
    }
    let claims = json::object(&compact.payload, json::CLAIMS).map_err(DpopError::Json)?;
    let jti = text(&claims, "jti", MAX_JTI_BYTES)?;
    if text(&claims, "htm", MAX_JTI_BYTES)? != request.method {
        return Err(DpopError::Method);
    }
    let target = Target::parse(text(&claims, "htu", MAX_TARGET_BYTES)?).map_err(|_| DpopError::Claim("htu"))?;
    if target != *request.target {
        return Err(DpopError::Target);
    }
    let issued_at = claims.get("iat").and_then(numeric_date).ok_or(DpopError::Claim("iat"))?;
    let not_after = after(issued_at, policy.max_age);
    if now >= not_after {
        return Err(DpopError::Old);
    }
    if issued_at > after(now, policy.max_ahead) {
        return Err(DpopError::Future);
    }
    if let Some(token) = request.access_token {
        let ath = base64url::decode_array(text(&claims, "ath", 43)?).map_err(|_| DpopError::Claim("ath"))?;
        if sha256(token.as_bytes()) != ath {
            return Err(DpopError::TokenHash);
        }
    }
    if let Some(nonces) = request.nonces {
        let nonce = match claims.get("nonce") {
            None => return Err(NonceError::Missing.into()),
            Some(nonce) => nonce.as_str().ok_or(DpopError::Claim("nonce"))?,
        };
        nonces.check(nonce, now)?;
    }
    Ok(Proof { jkt: key.thumbprint, jti_hash: sha256(jti.as_bytes()), not_after })
}

fn text<'a>(claims: &'a Map<String, Value>, name: &'static str, longest: usize) -> Result<&'a str, DpopError> {
    match claims.get(name) {
        Some(Value::String(text)) if !text.is_empty() && text.len() <= longest => Ok(text),
        _ => Err(DpopError::Claim(name)),
    }
}

#[cfg(test)]
mod tests;

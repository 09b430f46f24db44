//! JWT access tokens (RFC 7519, RFC 8725, RFC 9068).
//!
//! Enters: a token, the issuer's keys and policy, what the rule expects, the time. Leaves: a [`VerifiedToken`]. Never: who
//! presents it; a bound token in the wrong hands passes here and fails in [`super::binding`].

use jiff::Timestamp;

pub use super::claims::{Confirmation, Expected, IssuerPolicy, Leeway, VerifiedToken};
use super::{
    claims::{ClaimError, Claims},
    json::{self, JsonError},
    jwk::{KeySet, SelectError, sha256},
    jws::{self, JwsError, KeyInHeader},
};

#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum TokenError {
    #[error(transparent)]
    Jws(#[from] JwsError),
    #[error(transparent)]
    Key(#[from] SelectError),
    #[error("the signature is not of the issuer's key")]
    Signature,
    #[error("the token is a JWT for another purpose")]
    Type,
    #[error("the claims: {0}")]
    Json(JsonError),
    #[error(transparent)]
    Claim(#[from] ClaimError),
}

impl TokenError {
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Jws(error) => error.reason(),
            Self::Key(error) => error.reason(),
            Self::Signature => "signature_invalid",
            Self::Type => "token_type_mismatch",
            Self::Json(error) => error.reason(),
            Self::Claim(error) => error.reason(),
        }
    }

    /// What RFC 6750, 3.1 calls it.
    pub fn oauth_error(&self) -> &'static str {
        match self {
            Self::Claim(ClaimError::Scope) => "insufficient_scope",
            _ => "invalid_token",
        }
    }
}

/// Checks everything that the token itself can show.
pub fn verify(
    token: &str,
    keys: &KeySet,
    policy: &IssuerPolicy,
    expected: &Expected<'_>,
    now: Timestamp,
) -> Result<VerifiedToken, TokenError> {
    let compact = jws::parse(token, &policy.algorithms, KeyInHeader::Refused)?;
    let key = keys.select(&compact.header)?;
    if !key.verifies(compact.header.algorithm, compact.signed.as_bytes(), &compact.signature) {
        return Err(TokenError::Signature);
    }
    // RFC 8725, 3.11: a signed thing of another kind (a logout token, a DPoP proof) is no access token.
    let is_access_token = compact.header.has_type("at+jwt");
    let is_untyped = compact.header.typ.is_none() || compact.header.has_type("JWT");
    if !is_access_token && (policy.require_at_jwt || !is_untyped) {
        return Err(TokenError::Type);
    }
    let claims = json::object(&compact.payload, json::CLAIMS).map_err(TokenError::Json)?;
    let claims = Claims::parse(claims)?;
    present(&claims, policy)?;
    claims.check(policy, expected, now)?;
    let not_after = claims.not_after(policy.leeway, now)?.ok_or(ClaimError::Missing("exp"))?;
    Ok(claims.into_token(policy, key.kid.clone(), sha256(compact.signed.as_bytes()), not_after))
}

/// The issuer that an unverified token names: to find the policy by, not to believe.
pub fn claimed_issuer(token: &str) -> Option<String> {
    let (_, claims) = jws::inspect(token).ok()?;
    claims.get("iss")?.as_str().map(str::to_owned)
}

/// What has to be there: `iss` and `exp` always, all of RFC 9068, 2.2 where that is asked for.
fn present(claims: &Claims, policy: &IssuerPolicy) -> Result<(), ClaimError> {
    let required = [("iss", claims.issuer.is_some()), ("exp", claims.expires.is_some())];
    let access_token = [
        ("aud", !claims.audience.is_empty()),
        ("sub", claims.subject.is_some()),
        ("client_id", claims.client_id.is_some()),
        ("iat", claims.issued_at.is_some()),
        ("jti", claims.jti.is_some()),
    ];
    let access_token = access_token.into_iter().filter(|_| policy.require_at_jwt);
    match required.into_iter().chain(access_token).find(|(_, there)| !there) {
        Some((name, _)) => Err(ClaimError::Missing(name)),
        None => Ok(()),
    }
}

//! What a token says, and whether it is enough: claims of a JWT (RFC 7519, RFC 9068) and members of an introspection
//! answer (RFC 7662), which mean the same.
//!
//! Enters: an object whose origin was verified. Leaves: a [`VerifiedToken`]. Never: a signature check, and never a claim
//! of the wrong type taken for an absent one.

use std::time::Duration;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::{
    base64url,
    json::{Map, Value, numeric_date},
    jws::Algorithm,
};

/// Clocks that are kept by NTP agree to far less. More would be a longer life for every token.
pub const MAX_LEEWAY: Duration = Duration::from_secs(60);
/// The claim of nodes' tokens that names the tenant of whoever acts. Others call other things so, and those are not looked at.
pub const TENANT: &str = "urn:authd:tenant";
/// The claim of nodes' tokens that names the issuer (`iss`) of the first token that was exchanged: who calls the subject so.
pub const SUBJECT_ISSUER: &str = "urn:authd:subject_issuer";
const MAX_TEXT_BYTES: usize = 1024;
const MAX_AUDIENCES: usize = 64;
const MAX_SCOPES: usize = 256;

/// How much clocks may disagree.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Leeway(Duration);

impl Leeway {
    /// What exceeds the maximum is cut.
    pub fn new(leeway: Duration) -> Self {
        Self(leeway.min(MAX_LEEWAY))
    }

    pub fn get(self) -> Duration {
        self.0
    }
}

impl Default for Leeway {
    fn default() -> Self {
        Self(Duration::from_secs(30))
    }
}

/// What is asked of every token of an issuer.
#[derive(Clone, Debug)]
pub struct IssuerPolicy {
    /// Its name in the policy.
    pub name: String,
    /// The `iss` claim, to the letter.
    pub issuer: String,
    pub algorithms: Vec<Algorithm>,
    /// Longest time between `iat` and `exp`; with it, `iat` is required.
    pub max_ttl: Option<Duration>,
    pub leeway: Leeway,
    /// RFC 9068: type `at+jwt`, and all claims that it requires. Keeps ID tokens and other JWTs of the issuer out.
    pub require_at_jwt: bool,
}

/// What is asked of this token.
#[derive(Clone, Copy, Default, Debug)]
pub struct Expected<'a> {
    pub audience: Option<&'a str>,
    /// All of them.
    pub scopes: &'a [String],
    /// One of them, unless there are none.
    pub subjects: &'a [String],
}

/// Keys that the presenter has to have (RFC 7800).
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Confirmation {
    /// SHA-256 of the client certificate (RFC 8705, 3.1).
    pub x5t_s256: Option<[u8; 32]>,
    /// Thumbprint of the DPoP key (RFC 9449, 6.1).
    pub jkt: Option<[u8; 32]>,
}

impl Confirmation {
    pub fn is_none(&self) -> bool {
        self.x5t_s256.is_none() && self.jkt.is_none()
    }
}

/// A token that passed every check but those of who presents it ([`super::binding`]) and of revocation.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VerifiedToken {
    /// The issuer's name in the policy.
    pub issuer_name: String,
    pub issuer: String,
    pub subject: Option<String>,
    pub client_id: Option<String>,
    pub audience: Vec<String>,
    pub scopes: Vec<String>,
    pub jti: Option<String>,
    pub key_id: Option<String>,
    /// Names it in records and revocations: SHA-256 of a JWT's signing input (RFC 7515, 5.1), because whoever has one
    /// signature can make others of it that verify too (ECDSA); of an opaque token's text.
    pub token_hash: [u8; 32],
    pub issued_at: Option<Timestamp>,
    /// `exp`; only an introspected token may have none.
    pub expires: Option<Timestamp>,
    /// From when on it would be refused: `exp` with the leeway that was given. Nothing that is granted for it may live
    /// longer.
    pub not_after: Timestamp,
    pub confirmation: Confirmation,
    /// Who acts for the subject (RFC 8693, 4.1), and who may (4.4).
    pub act: Option<Map<String, Value>>,
    pub may_act: Option<Map<String, Value>>,
    /// Of whoever acts; only tokens of nodes say so.
    pub tenant: Option<String>,
    /// Whose subject it is, if not the issuer's own; only tokens of nodes say so.
    pub subject_issuer: Option<String>,
    /// How, and when, the subject showed the issuer who it is (OpenID Connect Core 1.0, 2; RFC 9470, 6).
    pub acr: Option<String>,
    pub auth_time: Option<Timestamp>,
}

impl VerifiedToken {
    /// Who it is about: the subject, else the client.
    pub fn principal(&self) -> &str {
        self.subject.as_deref().or(self.client_id.as_deref()).unwrap_or_default()
    }
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum ClaimError {
    // What the issuer made wrong.
    #[error("the claim `{0}` is of the wrong type, too long, or has characters that do not belong there")]
    Malformed(&'static str),
    #[error("the claim `{0}` is missing")]
    Missing(&'static str),
    #[error("the token is bound in a way that authd cannot check")]
    ConfirmationUnsupported,
    #[error("the token lives longer than the policy lets tokens of this issuer live")]
    LongLived,
    // What the presenter chose wrong.
    #[error("the token is of another issuer")]
    Issuer,
    #[error("the token is for another audience")]
    Audience,
    #[error("the token has not all scopes that the rule asks for")]
    Scope,
    #[error("the token is about a subject that the rule does not name")]
    Subject,
    // Time.
    #[error("the token has expired")]
    Expired,
    #[error("the token is not valid yet")]
    NotYetValid,
    #[error("the token was issued in the future")]
    IssuedInFuture,
}

impl ClaimError {
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Malformed(_) => "claim_malformed",
            Self::Missing(_) => "claim_missing",
            Self::ConfirmationUnsupported => "confirmation_unsupported",
            Self::LongLived => "token_long_lived",
            Self::Issuer => "issuer_mismatch",
            Self::Audience => "audience_mismatch",
            Self::Scope => "scope_insufficient",
            Self::Subject => "subject_not_allowed",
            Self::Expired => "token_expired",
            Self::NotYetValid => "token_not_yet_valid",
            Self::IssuedInFuture => "token_issued_in_future",
        }
    }
}

/// Claims of the right types.
#[derive(Clone, Debug)]
pub struct Claims {
    pub issuer: Option<String>,
    pub subject: Option<String>,
    pub client_id: Option<String>,
    pub audience: Vec<String>,
    pub scopes: Vec<String>,
    pub jti: Option<String>,
    pub expires: Option<Timestamp>,
    pub not_before: Option<Timestamp>,
    pub issued_at: Option<Timestamp>,
    pub confirmation: Confirmation,
    pub act: Option<Map<String, Value>>,
    pub may_act: Option<Map<String, Value>>,
    pub tenant: Option<String>,
    pub subject_issuer: Option<String>,
    pub acr: Option<String>,
    pub auth_time: Option<Timestamp>,
}

impl Claims {
    pub fn parse(mut claims: Map<String, Value>) -> Result<Self, ClaimError> {
        let claims = &mut claims;
        Ok(Self {
            issuer: text(claims, "iss")?,
            subject: text(claims, "sub")?,
            client_id: text(claims, "client_id")?,
            audience: audience(claims)?,
            scopes: scopes(claims)?,
            jti: text(claims, "jti")?,
            expires: date(claims, "exp")?,
            not_before: date(claims, "nbf")?,
            issued_at: date(claims, "iat")?,
            confirmation: confirmation(claims)?,
            act: object(claims, "act")?,
            may_act: object(claims, "may_act")?,
            tenant: text(claims, TENANT)?,
            subject_issuer: text(claims, SUBJECT_ISSUER)?,
            acr: text(claims, "acr")?,
            auth_time: date(claims, "auth_time")?,
        })
    }

    /// Everything but the expiry, which JWTs must have and introspection answers may.
    pub fn check(&self, policy: &IssuerPolicy, expected: &Expected<'_>, now: Timestamp) -> Result<(), ClaimError> {
        if self.issuer.as_ref().is_some_and(|issuer| *issuer != policy.issuer) {
            return Err(ClaimError::Issuer);
        }
        if self.subject.is_none() && self.client_id.is_none() {
            return Err(ClaimError::Missing("sub"));
        }
        let latest = after(now, policy.leeway.get());
        if self.not_before.is_some_and(|not_before| not_before > latest) {
            return Err(ClaimError::NotYetValid);
        }
        if self.issued_at.is_some_and(|issued_at| issued_at > latest) {
            return Err(ClaimError::IssuedInFuture);
        }
        if let Some(max_ttl) = policy.max_ttl {
            let expires = self.expires.ok_or(ClaimError::Missing("exp"))?;
            let issued_at = self.issued_at.ok_or(ClaimError::Missing("iat"))?;
            if expires > after(issued_at, max_ttl) {
                return Err(ClaimError::LongLived);
            }
        }
        if expected.audience.is_some_and(|audience| !self.audience.iter().any(|a| a == audience)) {
            return Err(ClaimError::Audience);
        }
        if !expected.scopes.iter().all(|scope| self.scopes.contains(scope)) {
            return Err(ClaimError::Scope);
        }
        let named = |subject: &String| expected.subjects.contains(subject);
        if !expected.subjects.is_empty() && !self.subject.as_ref().is_some_and(named) {
            return Err(ClaimError::Subject);
        }
        Ok(())
    }

    /// Until when they hold; refused from then on.
    pub fn not_after(&self, leeway: Leeway, now: Timestamp) -> Result<Option<Timestamp>, ClaimError> {
        let not_after = self.expires.map(|expires| after(expires, leeway.get()));
        if not_after.is_some_and(|not_after| now >= not_after) { Err(ClaimError::Expired) } else { Ok(not_after) }
    }

    pub fn into_token(
        self,
        policy: &IssuerPolicy,
        key_id: Option<String>,
        token_hash: [u8; 32],
        not_after: Timestamp,
    ) -> VerifiedToken {
        VerifiedToken {
            issuer_name: policy.name.clone(),
            issuer: policy.issuer.clone(),
            subject: self.subject,
            client_id: self.client_id,
            audience: self.audience,
            scopes: self.scopes,
            jti: self.jti,
            key_id,
            token_hash,
            issued_at: self.issued_at,
            expires: self.expires,
            not_after,
            confirmation: self.confirmation,
            act: self.act,
            may_act: self.may_act,
            tenant: self.tenant,
            subject_issuer: self.subject_issuer,
            acr: self.acr,
            auth_time: self.auth_time,
        }
    }
}

/// A later time, or the end of time.
pub(super) fn after(time: Timestamp, duration: Duration) -> Timestamp {
    time.checked_add(duration).unwrap_or(Timestamp::MAX)
}

fn text(claims: &mut Map<String, Value>, name: &'static str) -> Result<Option<String>, ClaimError> {
    match claims.remove(name) {
        None => Ok(None),
        Some(Value::String(text)) if is_text(&text) => Ok(Some(text)),
        Some(_) => Err(ClaimError::Malformed(name)),
    }
}

/// Names that can stand in a record and be compared: not empty, not long, nothing that a terminal would act on.
fn is_text(text: &str) -> bool {
    !text.is_empty() && text.len() <= MAX_TEXT_BYTES && !text.chars().any(char::is_control)
}

fn date(claims: &Map<String, Value>, name: &'static str) -> Result<Option<Timestamp>, ClaimError> {
    claims.get(name).map(|value| numeric_date(value).ok_or(ClaimError::Malformed(name))).transpose()
}

fn object(claims: &mut Map<String, Value>, name: &'static str) -> Result<Option<Map<String, Value>>, ClaimError> {
    match claims.remove(name) {
        None => Ok(None),
        Some(Value::Object(object)) => Ok(Some(object)),
        Some(_) => Err(ClaimError::Malformed(name)),
    }
}

/// One text, or a list of them (RFC 7519, 4.1.3).
fn audience(claims: &mut Map<String, Value>) -> Result<Vec<String>, ClaimError> {
    let malformed = ClaimError::Malformed("aud");
    match claims.remove("aud") {
        None => Ok(Vec::new()),
        Some(Value::String(audience)) if is_text(&audience) => Ok(vec![audience]),
        Some(Value::Array(audiences)) if !audiences.is_empty() && audiences.len() <= MAX_AUDIENCES => audiences
            .into_iter()
            .map(|audience| match audience {
                Value::String(audience) if is_text(&audience) => Ok(audience),
                _ => Err(malformed),
            })
            .collect(),
        Some(_) => Err(malformed),
    }
}

/// Scopes with one space between them (RFC 6749, 3.3; RFC 8693, 4.2). A list is not what these RFCs say.
fn scopes(claims: &mut Map<String, Value>) -> Result<Vec<String>, ClaimError> {
    let malformed = ClaimError::Malformed("scope");
    let text = match claims.remove("scope") {
        None => return Ok(Vec::new()),
        // Issuers write it for a token without scopes, though the grammar has none.
        Some(Value::String(text)) if text.is_empty() => return Ok(Vec::new()),
        Some(Value::String(text)) => text,
        Some(_) => return Err(malformed),
    };
    let allowed = |byte: u8| matches!(byte, 0x21 | 0x23..=0x5b | 0x5d..=0x7e);
    let mut scopes = Vec::new();
    for scope in text.split(' ') {
        if scope.is_empty() || scope.len() > MAX_TEXT_BYTES || !scope.bytes().all(allowed) || scopes.len() == MAX_SCOPES
        {
            return Err(malformed);
        }
        scopes.push(scope.to_owned());
    }
    Ok(scopes)
}

/// A member that is not understood could be the only thing that keeps a thief from using the token.
fn confirmation(claims: &mut Map<String, Value>) -> Result<Confirmation, ClaimError> {
    let Some(members) = object(claims, "cnf")? else { return Ok(Confirmation::default()) };
    let mut confirmation = Confirmation::default();
    for (name, value) in &members {
        let slot = match name.as_str() {
            "x5t#S256" => &mut confirmation.x5t_s256,
            "jkt" => &mut confirmation.jkt,
            _ => return Err(ClaimError::ConfirmationUnsupported),
        };
        let hash = value.as_str().and_then(|text| base64url::decode_array(text).ok());
        *slot = Some(hash.ok_or(ClaimError::Malformed("cnf"))?);
    }
    if confirmation.is_none() { Err(ClaimError::ConfirmationUnsupported) } else { Ok(confirmation) }
}

//! Token introspection (RFC 7662): what is sent, and what the answer says.
//!
//! Enters: a token; the body of an answer. Leaves: a form; a [`VerifiedToken`], with the time until when the answer may be
//! used again. Never: a connection, and never a token that the answer does not call active.

use std::{fmt, time::Duration};

use base64::{Engine, engine::general_purpose::STANDARD};
use jiff::Timestamp;

use super::{
    claims::{ClaimError, Claims, Expected, IssuerPolicy, VerifiedToken, after},
    json::{self, JsonError, Value},
    jwk::sha256,
    jws::MAX_BYTES,
    scheme::is_token68,
};

/// How authd shows the issuer who asks.
#[derive(Clone)]
pub enum ClientAuth {
    /// `client_secret_basic` (RFC 6749, 2.3.1).
    Basic { id: String, secret: String },
    /// The certificate of the TLS connection (RFC 8705, 2); the form names the client.
    Tls { id: String },
}

impl fmt::Debug for ClientAuth {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (name, id) = match self {
            Self::Basic { id, .. } => ("Basic", id),
            Self::Tls { id } => ("Tls", id),
        };
        f.debug_struct(name).field("id", id).finish_non_exhaustive()
    }
}

/// What to POST. Holds the token and the secret: not for logs.
pub struct Request {
    /// Value of `Authorization`, where the client authenticates with it.
    pub authorization: Option<String>,
    pub body: String,
}

pub const CONTENT_TYPE: &str = "application/x-www-form-urlencoded";

impl fmt::Debug for Request {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Request").finish_non_exhaustive()
    }
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum IntrospectionError {
    // The caller.
    #[error("the token has characters that no token has")]
    Token,
    #[error("the token is too long")]
    Oversize,
    #[error("the issuer does not call the token active")]
    Inactive,
    // The issuer.
    #[error("the issuer's answer: {0}")]
    Json(JsonError),
    #[error("the issuer's answer does not say whether the token is active")]
    Shape,
    #[error(transparent)]
    Claim(#[from] ClaimError),
}

impl IntrospectionError {
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Token => "token_malformed",
            Self::Oversize => "token_oversize",
            Self::Inactive => "token_inactive",
            Self::Json(_) => "introspection_malformed",
            Self::Shape => "introspection_malformed",
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

/// The form that asks about a token (RFC 7662, 2.1).
pub fn request(token: &str, client: &ClientAuth) -> Result<Request, IntrospectionError> {
    if token.len() > MAX_BYTES {
        return Err(IntrospectionError::Oversize);
    }
    if !is_token68(token) {
        return Err(IntrospectionError::Token);
    }
    let mut body = format!("token={}&token_type_hint=access_token", encoded(token));
    let authorization = match client {
        ClientAuth::Basic { id, secret } => {
            let pair = format!("{}:{}", encoded(id), encoded(secret));
            Some(format!("Basic {}", STANDARD.encode(pair)))
        }
        ClientAuth::Tls { id } => {
            body.push_str("&client_id=");
            body.push_str(&encoded(id));
            None
        }
    };
    Ok(Request { authorization, body })
}

/// What the answer says of the token, if it is enough.
///
/// `iss` and `exp` may be missing (RFC 7662, 2.2): the answer comes from the issuer itself, and holds until it has to be
/// asked again, after `max_cache`. What the rule or the policy asks for may not.
pub fn verify(
    token: &str,
    answer: &[u8],
    policy: &IssuerPolicy,
    expected: &Expected<'_>,
    max_cache: Duration,
    now: Timestamp,
) -> Result<VerifiedToken, IntrospectionError> {
    let answer = json::object(answer, json::CLAIMS).map_err(IntrospectionError::Json)?;
    match answer.get("active") {
        Some(Value::Bool(true)) => {}
        Some(Value::Bool(false)) => return Err(IntrospectionError::Inactive),
        _ => return Err(IntrospectionError::Shape),
    }
    let claims = Claims::parse(answer)?;
    claims.check(policy, expected, now)?;
    let not_after = claims.not_after(policy.leeway, now)?.unwrap_or_else(|| after(now, max_cache));
    Ok(claims.into_token(policy, None, sha256(token.as_bytes()), not_after))
}

/// Until when an answer may be used again. A refusal is never kept: a token may become active, and a flood of unknown
/// ones must not push out what is known. The leeway is for clocks, not for answers: `exp` ends them.
pub fn reuse_until(token: &VerifiedToken, max_cache: Duration, now: Timestamp) -> Timestamp {
    let latest = after(now, max_cache);
    token.expires.map_or(latest, |expires| expires.min(latest))
}

/// As forms have it (RFC 6749, appendix B).
fn encoded(text: &str) -> String {
    form_urlencoded::byte_serialize(text.as_bytes()).collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::proofs::{
        base64url,
        testing::{NOW, at, claims, now},
    };

    const CACHE: Duration = Duration::from_secs(30);
    const TOKEN: &str = "2YotnFZFEjr1zCsicMWpAA";

    fn policy() -> IssuerPolicy {
        IssuerPolicy {
            name: "corp".into(),
            issuer: "https://idp.example.org".into(),
            algorithms: Vec::new(),
            max_ttl: None,
            leeway: Default::default(),
            require_at_jwt: false,
        }
    }

    fn active() -> Value {
        let mut answer = claims();
        answer["active"] = json!(true);
        answer
    }

    fn check(answer: &Value, expected: &Expected<'_>) -> Result<VerifiedToken, &'static str> {
        let answer = answer.to_string();
        verify(TOKEN, answer.as_bytes(), &policy(), expected, CACHE, now()).map_err(|error| error.reason())
    }

    fn changed(name: &str, value: Value) -> Value {
        let mut answer = active();
        match value {
            Value::Null => drop(answer.as_object_mut().unwrap().remove(name)),
            value => answer[name] = value,
        }
        answer
    }

    #[test]
    fn an_active_token_says_the_same_as_a_jwt() {
        let scopes = ["ledger:write".to_owned()];
        let expected = Expected { audience: Some("ledger"), scopes: &scopes, subjects: &[] };
        let token = check(&active(), &expected).unwrap();
        assert_eq!((token.principal(), token.not_after, token.key_id.as_deref()), ("payments-api", at(570), None));
        assert_eq!(token.token_hash, sha256(TOKEN.as_bytes()));
    }

    #[test]
    fn only_active_true_is_active() {
        for (value, expected) in [
            (json!(false), "token_inactive"),
            (json!("true"), "introspection_malformed"),
            (json!(1), "introspection_malformed"),
            (json!([true]), "introspection_malformed"),
            (Value::Null, "introspection_malformed"),
        ] {
            assert_eq!(check(&changed("active", value.clone()), &Expected::default()), Err(expected), "{value}");
        }
        let reason = |body: &[u8]| {
            verify(TOKEN, body, &policy(), &Expected::default(), CACHE, now()).map_err(|error| error.reason())
        };
        for body in [&b""[..], b"<html>", b"true", b"[{\"active\":true}]", b"{\"active\":false,\"active\":true}"] {
            assert_eq!(reason(body), Err("introspection_malformed"));
        }
        let huge = format!("{{\"active\":true,\"x\":\"{}\"}}", "x".repeat(json::CLAIMS.bytes));
        assert_eq!(reason(huge.as_bytes()), Err("introspection_malformed"));
    }

    #[test]
    fn claims_are_checked_as_those_of_a_jwt() {
        let scopes = ["ledger:write".to_owned()];
        let expected = Expected { audience: Some("ledger"), scopes: &scopes, subjects: &[] };
        for (name, value, reason) in [
            ("iss", json!("https://idp.example.com"), "issuer_mismatch"),
            ("aud", json!("other"), "audience_mismatch"),
            ("aud", Value::Null, "audience_mismatch"),
            ("scope", json!("ledger:read"), "scope_insufficient"),
            ("scope", Value::Null, "scope_insufficient"),
            ("exp", json!(NOW - 30), "token_expired"),
            ("exp", json!("never"), "claim_malformed"),
            ("nbf", json!(NOW + 31), "token_not_yet_valid"),
            ("iat", json!(NOW + 31), "token_issued_in_future"),
            ("cnf", json!({ "kid": "k" }), "confirmation_unsupported"),
        ] {
            assert_eq!(check(&changed(name, value), &expected), Err(reason), "{name}");
        }
        let bound = changed("cnf", json!({ "jkt": base64url::encode([5; 32]) }));
        assert_eq!(check(&bound, &expected).unwrap().confirmation.jkt, Some([5; 32]));
        assert!(check(&changed("iss", Value::Null), &expected).is_ok());
    }

    #[test]
    fn an_answer_is_used_again_for_the_cache_time_and_never_past_the_expiry() {
        let until = |exp: Value| {
            let token = check(&changed("exp", exp), &Expected::default()).unwrap();
            reuse_until(&token, CACHE, now())
        };
        assert_eq!(until(json!(NOW + 540)), at(30));
        assert_eq!(until(json!(NOW + 29)), at(29));
        assert_eq!(until(json!(NOW - 10)), at(-10));
        assert_eq!(until(Value::Null), at(30));
    }

    #[test]
    fn without_an_expiry_the_answer_holds_for_the_cache_time_unless_a_lifetime_is_asked_for() {
        let answer = changed("exp", Value::Null);
        assert_eq!(check(&answer, &Expected::default()).unwrap().not_after, at(30));
        let limited = IssuerPolicy { max_ttl: Some(Duration::from_secs(900)), ..policy() };
        let refused =
            verify(TOKEN, answer.to_string().as_bytes(), &limited, &Expected::default(), CACHE, now()).unwrap_err();
        assert_eq!(refused, IntrospectionError::Claim(ClaimError::Missing("exp")));
    }

    #[test]
    fn requests_are_forms_with_the_client_encoded_as_rfc_6749_says() {
        let client = ClientAuth::Basic { id: "au:thd".into(), secret: "p w%+\u{e9}".into() };
        let asked = request("a+b/c~", &client).unwrap();
        assert_eq!(asked.body, "token=a%2Bb%2Fc%7E&token_type_hint=access_token");
        let authorization = asked.authorization.as_deref().unwrap().strip_prefix("Basic ").unwrap();
        assert_eq!(STANDARD.decode(authorization).unwrap(), b"au%3Athd:p+w%25%2B%C3%A9");
        let asked = request(TOKEN, &ClientAuth::Tls { id: "a&b".into() }).unwrap();
        assert_eq!((asked.authorization, asked.body.ends_with("&client_id=a%26b")), (None, true));
        assert!(!format!("{client:?}").contains("p w"));
        for token in ["", "a b", "a&b", "\u{e9}"] {
            assert_eq!(request(token, &client).unwrap_err().reason(), "token_malformed");
        }
        assert_eq!(request(&"a".repeat(MAX_BYTES + 1), &client).unwrap_err().reason(), "token_oversize");
    }
}

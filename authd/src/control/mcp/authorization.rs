//! The gateway as a resource server (RFC 6750, RFC 9728): what callers are told who have to show a token.
//!
//! Enters: what a resource wants. Leaves: challenges, and the metadata that they lead to. Never: a verdict; who asks for a
//! token, and whether one is good, is decided elsewhere.

use http::{HeaderValue, StatusCode, header};
use serde::Serialize;

use super::{
    events::Refusal,
    message::{NOT_ALLOWED, RpcError},
};
use crate::control::problem::Problem;

/// RFC 9728, 3.1: before the resource's own path.
pub const WELL_KNOWN: &str = "/.well-known/oauth-protected-resource";

/// What a challenge says besides its error.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Challenge {
    /// Where the metadata lies.
    pub metadata: String,
    /// What a token is asked for, at least.
    pub scopes: Vec<String>,
}

impl Challenge {
    /// For a resource such as `https://node.example.org:7443/v1/mcp/files`. `None` for what is no URL.
    pub fn of(resource: &str, scopes: &[String]) -> Option<Self> {
        let (scheme, rest) = resource.split_once("://")?;
        let (authority, path) = rest.split_once('/').map_or((rest, String::new()), |(a, path)| (a, format!("/{path}")));
        let is_plain = |c: char| c.is_ascii_graphic() && !"\"\\?#".contains(c);
        if !rest.chars().all(is_plain) || authority.is_empty() {
            return None;
        }
        Some(Self { metadata: format!("{scheme}://{authority}{WELL_KNOWN}{path}"), scopes: scopes.to_vec() })
    }

    /// `WWW-Authenticate`. Without an error if no token was shown (RFC 6750, 3.1).
    fn header(&self, error: Option<&str>, scopes: &[String]) -> String {
        let mut text = format!("Bearer resource_metadata=\"{}\"", self.metadata);
        if let Some(error) = error {
            text.push_str(&format!(", error=\"{error}\""));
        }
        // RFC 6749, 3.3: a scope has neither quotes nor backslashes.
        let is_scope = |scope: &&String| scope.bytes().all(|b| (0x21..=0x7e).contains(&b) && b != b'"' && b != b'\\');
        let scopes: Vec<&str> = scopes.iter().filter(is_scope).map(String::as_str).collect();
        if !scopes.is_empty() {
            text.push_str(&format!(", scope=\"{}\"", scopes.join(" ")));
        }
        text
    }

    /// 401: no token, or one that is not good (`error` is `invalid_token` then).
    pub fn unauthorized(&self, error: Option<&str>, reason: &str, detail: &str) -> Problem {
        Problem::unauthorized(reason, detail).with(header::WWW_AUTHENTICATE, &self.header(error, &self.scopes))
    }

    /// 403: a good token, which does not say enough.
    pub fn insufficient_scope(&self, scopes: &[String], detail: &str) -> Problem {
        let header = self.header(Some("insufficient_scope"), scopes);
        Problem::forbidden("insufficient_scope", detail).with(header::WWW_AUTHENTICATE, &header)
    }

    /// The same as the answer to a message.
    pub fn step_up(&self, scopes: &[String], detail: &str) -> Refusal {
        let mut refusal = Refusal::new(StatusCode::FORBIDDEN, RpcError::new(NOT_ALLOWED, "insufficient_scope", detail));
        if let Ok(value) = HeaderValue::from_str(&self.header(Some("insufficient_scope"), scopes)) {
            refusal.headers.insert(header::WWW_AUTHENTICATE, value);
        }
        refusal
    }
}

/// Metadata of a protected resource (RFC 9728, 2).
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct Metadata {
    pub resource: String,
    pub authorization_servers: Vec<String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub scopes_supported: Vec<String>,
    pub bearer_methods_supported: [&'static str; 1],
    #[serde(skip_serializing_if = "Option::is_none")]
    pub resource_name: Option<String>,
    pub tls_client_certificate_bound_access_tokens: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dpop_signing_alg_values_supported: Option<Vec<String>>,
}

impl Metadata {
    pub fn new(resource: &str, authorization_servers: Vec<String>, scopes_supported: Vec<String>) -> Self {
        Self {
            resource: resource.to_owned(),
            authorization_servers,
            scopes_supported,
            bearer_methods_supported: ["header"],
            resource_name: None,
            tls_client_certificate_bound_access_tokens: false,
            dpop_signing_alg_values_supported: None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn challenge() -> Challenge {
        Challenge::of("https://node.example.org:7443/v1/mcp/files", &["files:read".to_owned()]).unwrap()
    }

    #[test]
    fn a_challenge_says_where_to_ask_and_for_what() {
        let problem = challenge().unauthorized(None, "token_missing", "show a token");
        assert_eq!(problem.status, 401);
        assert_eq!(
            problem.headers["www-authenticate"],
            "Bearer resource_metadata=\"https://node.example.org:7443/.well-known/oauth-protected-resource/v1/mcp/files\", \
             scope=\"files:read\""
        );
        let problem = challenge().unauthorized(Some("invalid_token"), "token_expired", "");
        assert!(problem.headers["www-authenticate"].to_str().unwrap().contains("error=\"invalid_token\""));
        let scopes = ["files:write".to_owned(), "a\"b".to_owned()];
        let problem = challenge().insufficient_scope(&scopes, "");
        assert_eq!(problem.status, 403);
        let header = problem.headers["www-authenticate"].to_str().unwrap();
        assert!(header.ends_with(", error=\"insufficient_scope\", scope=\"files:write\""), "{header}");
        assert_eq!(challenge().step_up(&scopes, "").headers["www-authenticate"], header);
    }

    #[test]
    fn a_resource_without_path_has_its_metadata_at_the_root() {
        let challenge = Challenge::of("https://node.example.org", &[]).unwrap();
        assert_eq!(challenge.metadata, "https://node.example.org/.well-known/oauth-protected-resource");
        assert!(Challenge::of("node.example.org", &[]).is_none());
        assert!(Challenge::of("https://a\"b/", &[]).is_none());
    }
}

//! What a caller is told when it is refused: RFC 9457, with a stable reason and nothing secret.

use axum::{
    http::{HeaderMap, HeaderValue, StatusCode, header},
    response::{IntoResponse, Response},
};
use serde::Serialize;
use utoipa::ToSchema;

use crate::ipc::Refusal;

/// The body of every answer that is no success.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, ToSchema)]
pub struct Problem {
    /// `urn:authd:reason:` and the reason.
    #[serde(rename = "type")]
    pub kind: String,
    pub title: String,
    pub status: u16,
    /// A sentence for people.
    pub detail: String,
    /// Stable name; docs/REASONS.md lists them.
    pub reason: String,
    #[serde(skip)]
    #[schema(ignore)]
    pub headers: HeaderMap,
}

impl Problem {
    pub fn new(status: StatusCode, reason: &str, detail: impl Into<String>) -> Self {
        Self {
            kind: format!("urn:authd:reason:{reason}"),
            title: status.canonical_reason().unwrap_or("Error").to_owned(),
            status: status.as_u16(),
            detail: detail.into(),
            reason: reason.to_owned(),
            headers: HeaderMap::new(),
        }
    }

    /// The caller did not prove who it is (RFC 9110, 15.5.2).
    pub fn unauthorized(reason: &str, detail: impl Into<String>) -> Self {
        Self::new(StatusCode::UNAUTHORIZED, reason, detail)
    }

    /// It is known, and may not.
    pub fn forbidden(reason: &str, detail: impl Into<String>) -> Self {
        Self::new(StatusCode::FORBIDDEN, reason, detail)
    }

    pub fn bad_request(reason: &str, detail: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, reason, detail)
    }

    /// With a header, such as a challenge. A value that cannot be one is left out.
    pub fn with(mut self, name: header::HeaderName, value: &str) -> Self {
        if let Ok(value) = HeaderValue::from_str(value) {
            self.headers.append(name, value);
        }
        self
    }

    /// What dataplane refused.
    pub fn of(refusal: Refusal) -> Self {
        let status = match refusal.reason.as_str() {
            "rule_unknown" | "grant_unknown" => StatusCode::NOT_FOUND,
            "grants_full" | "too_many_grants" | "unavailable" => StatusCode::SERVICE_UNAVAILABLE,
            "api_key_rate_limited" => StatusCode::TOO_MANY_REQUESTS,
            "api_key_malformed" | "api_key_unknown" | "api_key_expired" | "api_key_revoked" => StatusCode::UNAUTHORIZED,
            _ => StatusCode::FORBIDDEN,
        };
        Self::new(status, &refusal.reason, refusal.message)
    }
}

impl IntoResponse for Problem {
    fn into_response(self) -> Response {
        let status = StatusCode::from_u16(self.status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        let headers = self.headers.clone();
        let body = serde_json::to_vec(&self).unwrap_or_default();
        let kind = [(header::CONTENT_TYPE, HeaderValue::from_static("application/problem+json"))];
        (status, headers, kind, body).into_response()
    }
}

//! SPIFFE IDs and trust domains (SPIFFE-ID 2), in the one form in which they may be compared.
//!
//! Enters: text. Leaves: an ID that can be compared byte by byte, or what is wrong with it. Never: repair; an ID in upper
//! case or with an escaped character is refused and not normalised, so that no two texts mean one caller.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};

/// SPIFFE-ID 2.3.
const MAX_ID: usize = 2048;
const MAX_TRUST_DOMAIN: usize = 255;
const SCHEME: &str = "spiffe://";

/// `example.org`
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize)]
#[serde(transparent)]
pub struct TrustDomain(String);

/// `spiffe://example.org/payments/api`: of a workload, so with a path.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct SpiffeId(String);

impl TryFrom<String> for SpiffeId {
    type Error = SpiffeIdError;

    fn try_from(text: String) -> Result<Self, SpiffeIdError> {
        text.parse()
    }
}

impl From<SpiffeId> for String {
    fn from(id: SpiffeId) -> Self {
        id.0
    }
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum SpiffeIdError {
    #[error("does not begin with `spiffe://`")]
    Scheme,
    #[error("is longer than {MAX_ID} bytes")]
    TooLong,
    #[error("has a trust domain of other characters than lower case letters, digits, `.`, `-` and `_`, or of none")]
    TrustDomain,
    #[error("has no path: it names a trust domain and no caller in it")]
    NoPath,
    #[error("has a path of other characters than letters, digits, `.`, `-`, `_`, or an empty or dotted part")]
    Path,
}

impl TrustDomain {
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl SpiffeId {
    pub fn as_str(&self) -> &str {
        &self.0
    }

    pub fn trust_domain(&self) -> &str {
        self.parts().0
    }

    /// From the first slash on.
    pub fn path(&self) -> &str {
        self.parts().1
    }

    fn parts(&self) -> (&str, &str) {
        let rest = self.0.strip_prefix(SCHEME).unwrap_or_default();
        rest.split_at(rest.find('/').unwrap_or(rest.len()))
    }
}

/// Whether a URI means to be a SPIFFE ID, however badly: schemes are compared without case (RFC 3986, 3.1).
pub fn is_spiffe(uri: &str) -> bool {
    uri.get(..SCHEME.len() - 2).is_some_and(|scheme| scheme.eq_ignore_ascii_case("spiffe:"))
}

impl FromStr for TrustDomain {
    type Err = SpiffeIdError;

    fn from_str(text: &str) -> Result<Self, SpiffeIdError> {
        let allowed = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b".-_".contains(&b);
        if text.is_empty() || text.len() > MAX_TRUST_DOMAIN || !text.bytes().all(allowed) {
            return Err(SpiffeIdError::TrustDomain);
        }
        Ok(Self(text.to_owned()))
    }
}

impl FromStr for SpiffeId {
    type Err = SpiffeIdError;

    fn from_str(text: &str) -> Result<Self, SpiffeIdError> {
        let rest = text.strip_prefix(SCHEME).ok_or(SpiffeIdError::Scheme)?;
        if text.len() > MAX_ID {
            return Err(SpiffeIdError::TooLong);
        }
        let (domain, path) = rest.split_once('/').map_or((rest, None), |(domain, path)| (domain, Some(path)));
        domain.parse::<TrustDomain>()?;
        // X509-SVID 3.1: a leaf's ID has a path other than the root.
        let path = path.filter(|path| !path.is_empty()).ok_or(SpiffeIdError::NoPath)?;
        let allowed = |b: u8| b.is_ascii_alphanumeric() || b".-_".contains(&b);
        let segment = |s: &str| !s.is_empty() && s != "." && s != ".." && s.bytes().all(allowed);
        if !path.split('/').all(segment) {
            return Err(SpiffeIdError::Path);
        }
        Ok(Self(text.to_owned()))
    }
}

impl fmt::Display for TrustDomain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Display for SpiffeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_has_a_trust_domain_and_a_path() {
        let id: SpiffeId = "spiffe://example.org/payments/api-1_x.Y".parse().unwrap();
        assert_eq!((id.trust_domain(), id.path()), ("example.org", "/payments/api-1_x.Y"));
    }

    #[test]
    fn what_could_be_written_in_two_ways_is_refused() {
        use SpiffeIdError::*;
        for (text, error) in [
            ("", Scheme),
            ("https://example.org/a", Scheme),
            ("SPIFFE://example.org/a", Scheme),
            ("spiffe:/example.org/a", Scheme),
            (" spiffe://example.org/a", Scheme),
            ("spiffe://", TrustDomain),
            ("spiffe:///a", TrustDomain),
            ("spiffe://Example.org/a", TrustDomain),
            ("spiffe://user@example.org/a", TrustDomain),
            ("spiffe://example.org:443/a", TrustDomain),
            ("spiffe://ex%61mple.org/a", TrustDomain),
            ("spiffe://ex\u{e4}mple.org/a", TrustDomain),
            ("spiffe://example.org", NoPath),
            ("spiffe://example.org/", NoPath),
            ("spiffe://example.org?a", TrustDomain),
            ("spiffe://example.org/a/", Path),
            ("spiffe://example.org//a", Path),
            ("spiffe://example.org/./a", Path),
            ("spiffe://example.org/a/..", Path),
            ("spiffe://example.org/a%2fb", Path),
            ("spiffe://example.org/a?b=c", Path),
            ("spiffe://example.org/a#b", Path),
            ("spiffe://example.org/a\0", Path),
            ("spiffe://example.org/\u{e4}", Path),
        ] {
            assert_eq!(text.parse::<SpiffeId>(), Err(error), "{text:?}");
        }
        assert_eq!(format!("spiffe://{}/a", "x".repeat(256)).parse::<SpiffeId>(), Err(TrustDomain));
        assert!(format!("spiffe://{}/a", "x".repeat(255)).parse::<SpiffeId>().is_ok());
        assert_eq!(format!("spiffe://e/{}", "x".repeat(2048 - 10)).parse::<SpiffeId>(), Err(TooLong));
        assert!(format!("spiffe://e/{}", "x".repeat(2048 - 11)).parse::<SpiffeId>().is_ok());
    }

    #[test]
    fn a_bad_spiffe_uri_is_still_one() {
        assert!(["spiffe://x/y", "SPIFFE://x/y", "Spiffe:x"].into_iter().all(is_spiffe));
        assert!(!["https://x/spiffe://y", "spiff", "", "spiffex://a"].into_iter().any(is_spiffe));
    }
}

//! Whom a verified chain names, and whether that is somebody whom a policy means.

use std::{fmt, str::FromStr};

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::{
    crl::CertificateIdentity,
    leaf::{Certificate, is_dns_name},
    spiffe::SpiffeId,
};

/// What a caller showed, once its chain is verified. Made by [`Authority::verify`](super::bundle::Authority::verify) only.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[non_exhaustive]
pub struct VerifiedCertificate {
    /// Name of the authority whose anchor vouches for it.
    pub authority: String,
    pub spiffe_id: Option<SpiffeId>,
    /// In lower case.
    pub dns_names: Vec<String>,
    /// RFC 4514; empty if there is none.
    pub subject: String,
    /// Lower-case hexadecimal.
    pub serial: String,
    /// RFC 4514.
    pub issuer: String,
    /// SHA-256 of the issuer's name in DER.
    #[serde(with = "hex32")]
    pub issuer_hash: [u8; 32],
    /// SHA-256 of the leaf: what a token is bound to (RFC 8705, 3.1).
    #[serde(with = "hex32")]
    pub fingerprint: [u8; 32],
    /// SHA-256 of the leaf's public key info.
    #[serde(with = "hex32")]
    pub key_hash: [u8; 32],
    pub not_after: Timestamp,
    /// When the first certificate of the chain ends, the anchor's included: nothing granted for it may live longer.
    pub valid_until: Timestamp,
    /// The CAs of the chain, the leaf's issuer first and the anchor last: who revokes one of them revokes this one.
    pub issuers: Vec<IssuerIdentity>,
}

/// What a CA of the chain is revoked by.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct IssuerIdentity {
    pub serial: String,
    pub issuer: String,
    #[serde(with = "hex32")]
    pub issuer_hash: [u8; 32],
    #[serde(with = "hex32")]
    pub fingerprint: [u8; 32],
    #[serde(with = "hex32")]
    pub key_hash: [u8; 32],
}

/// A host, or all hosts one label below a domain: `api.example.org`, `*.example.org`.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct DnsPattern {
    /// In lower case.
    name: String,
    wildcard: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("is no DNS name, and no `*.` before one with a dot")]
pub struct DnsPatternError;

impl VerifiedCertificate {
    /// What it is revoked by.
    pub fn identity(&self) -> CertificateIdentity<'_> {
        CertificateIdentity {
            serial: &self.serial,
            issuer: &self.issuer,
            key_hash: self.key_hash,
            fingerprint: self.fingerprint,
            spiffe_id: self.spiffe_id.as_ref(),
        }
    }

    /// The same of every certificate of the chain, leaf first and anchor last.
    pub fn identities(&self) -> impl Iterator<Item = CertificateIdentity<'_>> {
        std::iter::once(self.identity()).chain(self.issuers.iter().map(IssuerIdentity::identity))
    }

    pub fn has_spiffe_id(&self, id: &SpiffeId) -> bool {
        self.spiffe_id.as_ref() == Some(id)
    }

    pub fn has_dns_name(&self, pattern: &DnsPattern) -> bool {
        self.dns_names.iter().any(|name| pattern.matches(name))
    }

    /// Whether the subject is this one, as RFC 4514 text, byte by byte.
    pub fn has_subject(&self, subject: &str) -> bool {
        !self.subject.is_empty() && self.subject == subject
    }
}

impl IssuerIdentity {
    pub fn identity(&self) -> CertificateIdentity<'_> {
        CertificateIdentity {
            serial: &self.serial,
            issuer: &self.issuer,
            key_hash: self.key_hash,
            fingerprint: self.fingerprint,
            // SPIFFE IDs name leafs.
            spiffe_id: None,
        }
    }
}

impl From<Certificate> for IssuerIdentity {
    fn from(certificate: Certificate) -> Self {
        let Certificate { serial, issuer, issuer_hash, fingerprint, key_hash, .. } = certificate;
        Self { serial, issuer, issuer_hash, fingerprint, key_hash }
    }
}

impl DnsPattern {
    /// `name` is in lower case.
    fn matches(&self, name: &str) -> bool {
        if self.wildcard {
            name.split_once('.').is_some_and(|(_, domain)| domain == self.name)
        } else {
            name == self.name
        }
    }
}

impl FromStr for DnsPattern {
    type Err = DnsPatternError;

    fn from_str(text: &str) -> Result<Self, DnsPatternError> {
        let (name, wildcard) = text.strip_prefix("*.").map_or((text, false), |name| (name, true));
        // `*.org` would be half the world, and is never meant.
        if !is_dns_name(name) || (wildcard && !name.contains('.')) {
            return Err(DnsPatternError);
        }
        Ok(Self { name: name.to_ascii_lowercase(), wildcard })
    }
}

impl fmt::Display for DnsPattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}{}", if self.wildcard { "*." } else { "" }, self.name)
    }
}

/// SHA-256 values, as hexadecimal digits.
mod hex32 {
    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    use crate::digest::Digest;

    pub fn serialize<S: Serializer>(bytes: &[u8; 32], serializer: S) -> Result<S::Ok, S::Error> {
        Digest::from_bytes(*bytes).serialize(serializer)
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<[u8; 32], D::Error> {
        Digest::deserialize(deserializer).map(|digest| *digest.as_bytes())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wildcard_of_a_policy_stands_for_one_label() {
        let pattern: DnsPattern = "*.Example.org".parse().unwrap();
        assert_eq!(pattern.to_string(), "*.example.org");
        assert!(pattern.matches("api.example.org"));
        for other in ["example.org", "a.b.example.org", "api.example.com", "apiexample.org", ".example.org.x"] {
            assert!(!pattern.matches(other), "{other}");
        }
        let exact: DnsPattern = "api.example.org".parse().unwrap();
        assert!(exact.matches("api.example.org") && !exact.matches("b.api.example.org"));
    }

    #[test]
    fn patterns_that_are_no_names_are_refused() {
        for text in
            ["", "*", "*.", "*.org", "*.*.org", "a.*.org", "a*.example.org", "a b", "b\u{e4}r.org", "a.", "https://a"]
        {
            assert!(text.parse::<DnsPattern>().is_err(), "{text:?}");
        }
    }
}

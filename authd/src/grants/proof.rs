//! What was proven of a caller, as it goes into grants, records and the store.
//!
//! Enters: verified proofs. Leaves: their names. Never: a secret; of a token there is a hash, of a key its public part.

use std::fmt;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::policy::file::Proof;

/// A SHA-256 digest, written in lower-case hexadecimal.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Digest(pub [u8; 32]);

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("a SHA-256 digest has 64 hexadecimal digits")]
pub struct DigestError;

impl std::str::FromStr for Digest {
    type Err = DigestError;

    fn from_str(text: &str) -> Result<Self, DigestError> {
        let digits = text.as_bytes();
        if digits.len() != 64 {
            return Err(DigestError);
        }
        let mut bytes = [0; 32];
        for (byte, pair) in bytes.iter_mut().zip(digits.chunks_exact(2)) {
            let digit = |at: usize| pair.get(at).and_then(|d| char::from(*d).to_digit(16)).ok_or(DigestError);
            *byte = u8::try_from(digit(0)? << 4 | digit(1)?).map_err(|_| DigestError)?;
        }
        Ok(Self(bytes))
    }
}

impl Serialize for Digest {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Digest {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = <std::borrow::Cow<'de, str>>::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

/// One verified fact about a caller.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(tag = "proof", rename_all = "kebab-case", deny_unknown_fields)]
pub enum Shown {
    /// Possession of a certificate's key.
    Mtls(Certificate),
    Token(Token),
    ApiKey(ApiKey),
}

#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Certificate {
    /// The policy's name of the authority that vouches for it.
    pub authority: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub spiffe_id: Option<String>,
    pub subject: String,
    pub issuer: String,
    /// Hexadecimal, as certificates are listed by it.
    pub serial: String,
    /// SHA-256 of the certificate.
    pub fingerprint: Digest,
    /// SHA-256 of its public key (SubjectPublicKeyInfo).
    pub key: Digest,
    pub not_after: Timestamp,
}

#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Token {
    /// The policy's name of the issuer.
    pub issuer: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub subject: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub client_id: Option<String>,
    /// SHA-256 of the `jti` claim.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub jti: Option<Digest>,
    /// SHA-256 of the whole token.
    pub hash: Digest,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub key_id: Option<String>,
    /// What it was bound to, and shown with: `certificate`, `dpop`, `certificate and dpop`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bound_to: Option<String>,
    pub issued_at: Timestamp,
    pub not_after: Timestamp,
}

#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ApiKey {
    pub id: String,
    pub name: String,
    pub not_after: Timestamp,
}

impl Shown {
    /// What a rule calls it.
    pub fn kind(&self) -> Proof {
        match self {
            Self::Mtls(_) => Proof::Mtls,
            Self::Token(_) => Proof::Token,
            Self::ApiKey(_) => Proof::ApiKey,
        }
    }

    /// When it ends by itself.
    pub fn not_after(&self) -> Timestamp {
        match self {
            Self::Mtls(proof) => proof.not_after,
            Self::Token(proof) => proof.not_after,
            Self::ApiKey(proof) => proof.not_after,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn digests_are_read_as_they_are_written() {
        let digest = Digest(std::array::from_fn(|at| at as u8 * 7));
        assert_eq!(digest.to_string().parse(), Ok(digest));
        for text in ["", "00", &"0g".repeat(32), &"+1".repeat(32), &"0".repeat(65)] {
            assert_eq!(text.parse::<Digest>(), Err(DigestError), "{text}");
        }
    }
}

//! Revocation: lists that an issuer signed, and what was revoked here.
//!
//! Enters: DER or PEM. Leaves: lists, newest first, for webpki to ask. Never: the fetching of lists, and their signatures,
//! which can be checked only when the issuer's key is known (`chain`).

use jiff::Timestamp;
use rustls::pki_types::{CertificateRevocationListDer, pem::PemObject};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use webpki::{CertRevocationList, OwnedCertRevocationList};
use x509_parser::{prelude::FromDer, revocation_list::CertificateRevocationList};

use super::{leaf::timestamp, name::rfc4514, spiffe::SpiffeId};

/// A list of half a million certificates fits.
pub const MAX_BYTES: usize = 16 << 20;
pub const MAX_LISTS: usize = 64;

/// What a missing list means. A list that is there is believed only until its next update is due (RFC 5280, 5.1.2.5), and
/// refuses after that: whoever can keep the next one away must not be able to undo a revocation.
#[derive(Deserialize, Serialize, JsonSchema, Clone, Copy, PartialEq, Eq, Debug, Default)]
#[serde(rename_all = "kebab-case")]
pub enum CrlPolicy {
    /// Each certificate below the anchor needs a list of its issuer.
    Required,
    /// A certificate whose issuer has no list is not revoked.
    #[default]
    IfPresent,
}

/// One list, not yet known to be its issuer's.
#[derive(Debug)]
pub struct Crl {
    pub issuer: String,
    pub this_update: Timestamp,
    pub next_update: Timestamp,
    pub(super) list: CertRevocationList<'static>,
}

/// What names a certificate when somebody revokes it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct CertificateIdentity<'a> {
    /// Lower-case hexadecimal; unique within an issuer only.
    pub serial: &'a str,
    /// RFC 4514.
    pub issuer: &'a str,
    /// SHA-256 of the subject's public key info.
    pub key_hash: [u8; 32],
    /// SHA-256 of the certificate.
    pub fingerprint: [u8; 32],
    pub spiffe_id: Option<&'a SpiffeId>,
}

/// What was revoked on this node, at once and whatever the issuer says. Asked about every certificate of a chain, the
/// anchor included.
pub trait Revoked {
    fn is_revoked(&self, what: &CertificateIdentity<'_>) -> bool;
}

/// For callers without a list of their own.
#[derive(Clone, Copy, Debug)]
pub struct NothingRevoked;

impl Revoked for NothingRevoked {
    fn is_revoked(&self, _: &CertificateIdentity<'_>) -> bool {
        false
    }
}

#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum CrlError {
    // Whoever made the list.
    #[error("it is no revocation list in DER or PEM")]
    Malformed,
    #[error("it is of version 1, a delta, indirect, or for some reasons only: {0:?}")]
    Unsupported(webpki::Error),
    // Whoever configured it.
    #[error("it holds no revocation list")]
    Empty,
    #[error("it is longer than {MAX_BYTES} bytes, or holds more than {MAX_LISTS} lists")]
    TooLarge,
}

impl CrlError {
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Malformed => "malformed_crl",
            Self::Unsupported(_) => "unsupported_crl",
            Self::Empty => "no_crl",
            Self::TooLarge => "crl_too_large",
        }
    }
}

/// All lists of a file: one in DER, or one or more in PEM.
pub fn read(bytes: &[u8]) -> Result<Vec<Crl>, CrlError> {
    if bytes.len() > MAX_BYTES {
        return Err(CrlError::TooLarge);
    }
    if bytes.first() == Some(&0x30) {
        return Ok(vec![Crl::read(bytes)?]);
    }
    let mut lists = Vec::new();
    for der in CertificateRevocationListDer::pem_slice_iter(bytes) {
        if lists.len() == MAX_LISTS {
            return Err(CrlError::TooLarge);
        }
        lists.push(Crl::read(&der.map_err(|_| CrlError::Malformed)?)?);
    }
    if lists.is_empty() { Err(CrlError::Empty) } else { Ok(lists) }
}

impl Crl {
    fn read(der: &[u8]) -> Result<Self, CrlError> {
        let list = OwnedCertRevocationList::from_der(der).map_err(|error| match error {
            webpki::Error::UnsupportedCrlVersion
            | webpki::Error::UnsupportedDeltaCrl
            | webpki::Error::UnsupportedIndirectCrl
            | webpki::Error::UnsupportedCriticalExtension
            | webpki::Error::UnsupportedRevocationReasonsPartitioning
            | webpki::Error::UnsupportedCrlIssuingDistributionPoint => CrlError::Unsupported(error),
            _ => CrlError::Malformed,
        })?;
        let (rest, parsed) = CertificateRevocationList::from_der(der).map_err(|_| CrlError::Malformed)?;
        let next_update = parsed.next_update().ok_or(CrlError::Malformed)?;
        if !rest.is_empty() {
            return Err(CrlError::Malformed);
        }
        Ok(Self {
            issuer: rfc4514(parsed.issuer()).ok_or(CrlError::Malformed)?,
            this_update: timestamp(parsed.last_update()).map_err(|_| CrlError::Malformed)?,
            next_update: timestamp(next_update).map_err(|_| CrlError::Malformed)?,
            list: list.into(),
        })
    }
}

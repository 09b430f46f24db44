//! Trust anchors, and the authority that they speak for.
//!
//! Enters: PEM that an operator configured. Leaves: anchors that are CAs with sound keys. Never: the system's trust store.

use std::collections::HashSet;

use jiff::Timestamp;
use rustls::pki_types::{
    CertificateDer, TrustAnchor,
    pem::{PemObject, SectionKind},
};

use super::{
    crl::{Crl, CrlPolicy},
    leaf::{Certificate, KeyError, LeafError},
    spiffe::TrustDomain,
};

pub const MAX_BYTES: usize = 1 << 20;
pub const MAX_ANCHORS: usize = 256;

/// Whose word counts about callers: a bundle of anchors with what limits it.
#[derive(Debug)]
pub struct Authority {
    pub name: String,
    /// The SPIFFE trust domain that the bundle may speak for; without one, it may give nobody a SPIFFE ID.
    pub trust_domain: Option<TrustDomain>,
    pub crl_policy: CrlPolicy,
    pub(super) anchors: Vec<Anchor>,
    /// As webpki wants them; in step with `anchors`.
    pub(super) trust: Vec<TrustAnchor<'static>>,
    /// Newest first: the first that speaks of a certificate decides.
    pub(super) crls: Vec<Crl>,
}

/// A CA that is believed without anybody vouching for it.
#[derive(Clone, Debug)]
pub struct Anchor {
    pub certificate: Certificate,
    trust: TrustAnchor<'static>,
}

#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum BundleError {
    // Whoever configured it.
    #[error("it is longer than {MAX_BYTES} bytes, or holds more than {MAX_ANCHORS} certificates")]
    TooLarge,
    #[error("it holds no certificate in PEM")]
    Empty,
    #[error("it is no PEM")]
    Pem,
    #[error(
        "it holds a private key, which belongs into no bundle: remove it, and replace the key if others could read it"
    )]
    PrivateKey,
    // Whoever made certificate number N of it.
    #[error("certificate {0} of it: {1}")]
    Malformed(usize, LeafError),
    #[error("certificate {0} of it, `{1}`, is no CA's: it could vouch for nobody")]
    NotCa(usize, String),
    #[error("certificate {0} of it, `{1}`: {2}")]
    Key(usize, String, KeyError),
}

impl BundleError {
    pub fn reason(&self) -> &'static str {
        match self {
            Self::TooLarge => "bundle_too_large",
            Self::Empty => "no_anchor",
            Self::Pem => "malformed_bundle",
            Self::PrivateKey => "private_key_in_bundle",
            Self::Malformed(_, error) => error.reason(),
            Self::NotCa(..) => "anchor_not_ca",
            Self::Key(_, _, error) => error.reason(),
        }
    }
}

/// The anchors of a PEM bundle, each once.
pub fn read(pem: &[u8]) -> Result<Vec<Anchor>, BundleError> {
    if pem.len() > MAX_BYTES {
        return Err(BundleError::TooLarge);
    }
    let mut anchors: Vec<Anchor> = Vec::new();
    let mut seen = HashSet::new();
    let mut number = 0;
    for section in <(SectionKind, Vec<u8>)>::pem_slice_iter(pem) {
        match section.map_err(|_| BundleError::Pem)? {
            (SectionKind::Certificate, der) => {
                number += 1;
                let anchor = Anchor::read(number, &CertificateDer::from(der))?;
                if seen.insert(anchor.certificate.fingerprint) {
                    anchors.push(anchor);
                }
                if anchors.len() > MAX_ANCHORS {
                    return Err(BundleError::TooLarge);
                }
            }
            (SectionKind::PrivateKey | SectionKind::RsaPrivateKey | SectionKind::EcPrivateKey, _) => {
                return Err(BundleError::PrivateKey);
            }
            _ => {}
        }
    }
    if anchors.is_empty() { Err(BundleError::Empty) } else { Ok(anchors) }
}

impl Authority {
    pub fn new(
        name: impl Into<String>,
        anchors: Vec<Anchor>,
        trust_domain: Option<TrustDomain>,
        mut crls: Vec<Crl>,
        crl_policy: CrlPolicy,
    ) -> Self {
        crls.sort_by_key(|crl| std::cmp::Reverse(crl.this_update));
        let trust = anchors.iter().map(|anchor| anchor.trust.clone()).collect();
        Self { name: name.into(), trust_domain, crl_policy, anchors, trust, crls }
    }

    pub fn anchors(&self) -> &[Anchor] {
        &self.anchors
    }

    pub fn crls(&self) -> &[Crl] {
        &self.crls
    }

    /// When the first of its lists is due for an update.
    pub fn crls_due(&self) -> Option<Timestamp> {
        self.crls.iter().map(|crl| crl.next_update).min()
    }
}

impl Anchor {
    fn read(number: usize, der: &CertificateDer<'_>) -> Result<Self, BundleError> {
        // Version 1 certificates have no extensions, so that nothing says that they are a CA's; webpki would take them.
        let trust = webpki::anchor_from_trusted_cert(der)
            .map_err(|_| BundleError::Malformed(number, LeafError::Malformed))?
            .to_owned();
        let certificate = Certificate::read(der).map_err(|error| BundleError::Malformed(number, error))?;
        // RFC 5280, 4.2.1.3: a CA's key usage, if it is there, says that it signs certificates.
        let signs = certificate.key_usage.is_none_or(|usage| usage.certificate_sign);
        if !certificate.is_ca || !signs {
            return Err(BundleError::NotCa(number, certificate.subject));
        }
        certificate.key().map_err(|error| BundleError::Key(number, certificate.subject.clone(), error))?;
        Ok(Self { certificate, trust })
    }
}

//! The verdict about a chain.
//!
//! Enters: certificates as a caller showed them, leaf first, an authority, the purpose, the time, what was revoked here.
//! Leaves: whom the chain names, or the one reason that says most about why not. Never: possession of the leaf's key.
//!
//! webpki builds the path and judges signatures, times, name constraints, extended key usage and revocation lists. What it
//! leaves to others is done here: key usage of CAs and leaf, path length and times of the anchor, strength of the leaf's
//! key, local revocation, the rules of SPIFFE.
//!
//! Two choices that RFC 5280 leaves open:
//! * A leaf cannot be an anchor. A bundle takes CAs only, and a CA is no leaf (`ca_as_leaf`); a certificate that signs
//!   itself and is no CA has no issuer that anybody believes (`unknown_issuer`). Pin a SPIFFE ID or a name instead.
//! * Constraints on URIs and directory names are not computed: a CA that has one vouches for no certificate with such a
//!   name (`name_constraint`).

use std::{cell::RefCell, ptr, sync::LazyLock, time::Duration};

use jiff::Timestamp;
use rustls::{
    crypto::{WebPkiSupportedAlgorithms, aws_lc_rs},
    pki_types::{
        CertificateDer, UnixTime,
        pem::{PemObject, SectionKind},
    },
};
use webpki::{
    EndEntityCert, ExpirationPolicy, KeyUsage, RevocationCheckDepth, RevocationOptionsBuilder, UnknownStatusPolicy,
    VerifiedPath,
};

use super::{
    bundle::Authority,
    crl::{CertificateIdentity, CrlPolicy, Revoked},
    identity::{IssuerIdentity, VerifiedCertificate},
    leaf::{Certificate, KeyError, Leaf, LeafError},
    spiffe::SpiffeId,
};

/// Leaf included. Public hierarchies need four.
pub const MAX_CERTIFICATES: usize = 8;
/// Of all certificates together, in DER. RSA-8192 chains need a quarter of it.
pub const MAX_BYTES: usize = 64 << 10;
/// The same in PEM, with the comments that people put between.
pub const MAX_PEM_BYTES: usize = 256 << 10;

/// What chains and handshakes are signed with: RSA with SHA-2, ECDSA, Ed25519, ML-DSA.
pub(super) static ALGORITHMS: LazyLock<WebPkiSupportedAlgorithms> =
    LazyLock::new(|| aws_lc_rs::default_provider().signature_verification_algorithms);

/// What the leaf is shown for (RFC 5280, 4.2.1.12).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Usage {
    Client,
    Server,
}

#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum ChainError {
    // Whoever showed the chain.
    #[error("no certificate was shown")]
    Empty,
    #[error("more than {MAX_CERTIFICATES} certificates were shown")]
    TooMany,
    #[error("the certificates have more than {MAX_BYTES} bytes together")]
    TooLarge,
    #[error("this is no chain of certificates in PEM")]
    Pem,
    #[error("a certificate of the chain is malformed: {0:?}")]
    Malformed(webpki::Error),
    #[error("the leaf cannot be read: {0}")]
    Leaf(#[from] LeafError),
    #[error("the leaf is a CA's certificate, which names no caller")]
    CaAsLeaf,
    #[error("no anchor of the authority vouches for the chain")]
    UnknownIssuer,
    #[error("the search for a path took too many steps")]
    TooComplex,

    // Whoever made the certificates.
    #[error("a signature of the chain is not its issuer's")]
    BadSignature,
    #[error("a certificate of the chain ended at {0}")]
    Expired(Timestamp),
    #[error("a certificate of the chain begins at {0}")]
    NotYetValid(Timestamp),
    #[error("a CA of the chain may not vouch for a name of the leaf")]
    NameConstraint,
    #[error("a CA of the chain has more CAs below it than it may have")]
    PathTooLong,
    #[error("a certificate that is no CA's, or may not sign certificates, stands where a CA has to")]
    IssuerNotCa,
    #[error("a certificate of the chain may not be used for this: {0}")]
    WrongKeyUsage(&'static str),
    #[error("a key of the chain is too weak, or a signature is made with SHA-1 or MD5")]
    Weak,
    #[error("the leaf's key: {0}")]
    Key(KeyError),
    #[error("a signature of the chain is of a kind that is not accepted")]
    UnsupportedAlgorithm,
    #[error("a certificate of the chain has a critical extension that authd does not know (RFC 5280, 4.2)")]
    UnsupportedExtension,
    #[error("webpki refuses the chain: {0:?}")]
    Unsupported(webpki::Error),
    #[error("the SPIFFE ID `{0}` is of a trust domain that the authority does not speak for")]
    WrongTrustDomain(SpiffeId),

    // Revocation.
    #[error("a certificate of the chain is revoked by its issuer")]
    RevokedByIssuer,
    #[error("a certificate of the chain is revoked on this node")]
    RevokedHere,

    // Whoever configured the authority, or runs its CA.
    #[error("the anchor that vouches for the chain ended at {0}")]
    AnchorExpired(Timestamp),
    #[error("the anchor that vouches for the chain begins at {0}")]
    AnchorNotYetValid(Timestamp),
    #[error("a revocation list was due for an update at {0}")]
    CrlExpired(Timestamp),
    #[error("there is no revocation list for a certificate of the chain, and the authority requires one")]
    CrlMissing,
    #[error("a revocation list is not signed by the issuer that it names, or that one may not sign lists: {0:?}")]
    BadCrl(webpki::Error),
}

impl ChainError {
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Empty => "no_certificate",
            Self::TooMany => "chain_too_long",
            Self::TooLarge => "chain_too_large",
            Self::Pem | Self::Malformed(_) => "malformed_certificate",
            Self::Leaf(error) => error.reason(),
            Self::CaAsLeaf => "ca_as_leaf",
            Self::UnknownIssuer => "unknown_issuer",
            Self::TooComplex => "chain_too_complex",
            Self::BadSignature => "bad_signature",
            Self::Expired(_) => "certificate_expired",
            Self::NotYetValid(_) => "certificate_not_yet_valid",
            Self::NameConstraint => "name_constraint",
            Self::PathTooLong => "path_too_long",
            Self::IssuerNotCa => "issuer_not_ca",
            Self::WrongKeyUsage(_) => "wrong_key_usage",
            Self::Weak => "weak_key",
            Self::Key(error) => error.reason(),
            Self::UnsupportedAlgorithm => "unsupported_algorithm",
            Self::UnsupportedExtension => "unsupported_extension",
            Self::Unsupported(_) => "unsupported_certificate",
            Self::WrongTrustDomain(_) => "wrong_trust_domain",
            Self::RevokedByIssuer | Self::RevokedHere => "certificate_revoked",
            Self::AnchorExpired(_) => "anchor_expired",
            Self::AnchorNotYetValid(_) => "anchor_not_yet_valid",
            Self::CrlExpired(_) => "crl_expired",
            Self::CrlMissing => "crl_missing",
            Self::BadCrl(_) => "bad_crl",
        }
    }
}

/// The certificates of a PEM file, or the one of a DER file. Other sections, such as a key beside them, are passed over.
pub fn read(bytes: &[u8]) -> Result<Vec<CertificateDer<'static>>, ChainError> {
    if bytes.len() > MAX_PEM_BYTES {
        return Err(ChainError::TooLarge);
    }
    if bytes.first() == Some(&0x30) {
        return Ok(vec![CertificateDer::from(bytes.to_vec())]);
    }
    let mut chain = Vec::new();
    for section in <(SectionKind, Vec<u8>)>::pem_slice_iter(bytes) {
        if let (SectionKind::Certificate, der) = section.map_err(|_| ChainError::Pem)? {
            chain.push(CertificateDer::from(der));
        }
    }
    within_limits(&chain)?;
    Ok(chain)
}

/// What is checked before anything is parsed.
pub fn within_limits(chain: &[CertificateDer<'_>]) -> Result<(), ChainError> {
    match chain.iter().map(|der| der.len()).sum::<usize>() {
        _ if chain.is_empty() => Err(ChainError::Empty),
        _ if chain.len() > MAX_CERTIFICATES => Err(ChainError::TooMany),
        bytes if bytes > MAX_BYTES => Err(ChainError::TooLarge),
        _ => Ok(()),
    }
}

/// Asks the authorities in turn. If none accepts the chain, the error is of the one that knows most about it.
pub fn verify_by_any<'a>(
    authorities: impl IntoIterator<Item = &'a Authority>,
    chain: &[CertificateDer<'_>],
    usage: Usage,
    now: Timestamp,
    revoked: &dyn Revoked,
) -> Result<VerifiedCertificate, ChainError> {
    let mut refusal = ChainError::UnknownIssuer;
    for authority in authorities {
        match authority.verify(chain, usage, now, revoked) {
            Ok(verified) => return Ok(verified),
            Err(error) if refusal == ChainError::UnknownIssuer => refusal = error,
            Err(_) => {}
        }
    }
    Err(refusal)
}

impl Authority {
    /// Whether the chain, leaf first, is acceptable now, and whom it names. The order of the certificates after the leaf
    /// does not matter, and what is not needed is passed over.
    pub fn verify(
        &self,
        chain: &[CertificateDer<'_>],
        usage: Usage,
        now: Timestamp,
        revoked: &dyn Revoked,
    ) -> Result<VerifiedCertificate, ChainError> {
        within_limits(chain)?;
        let (first, issuers) = chain.split_first().ok_or(ChainError::Empty)?;
        let end_entity = EndEntityCert::try_from(first).map_err(refusal)?;
        let leaf = Leaf::read(first)?;
        let spiffe_id = leaf.spiffe_id();
        let judge = Judge {
            authority: self,
            now,
            revoked,
            leaf: CertificateIdentity {
                serial: &leaf.certificate.serial,
                issuer: &leaf.certificate.issuer,
                key_hash: leaf.certificate.key_hash,
                fingerprint: leaf.certificate.fingerprint,
                spiffe_id: spiffe_id.as_ref().ok().and_then(Option::as_ref),
            },
            refused: RefCell::new(None),
            accepted: RefCell::new(None),
        };
        let lists: Vec<_> = self.crls.iter().map(|crl| &crl.list).collect();
        let revocation = RevocationOptionsBuilder::new(&lists).ok().map(|builder| {
            let unknown = match self.crl_policy {
                CrlPolicy::Required => UnknownStatusPolicy::Deny,
                CrlPolicy::IfPresent => UnknownStatusPolicy::Allow,
            };
            builder
                .with_depth(RevocationCheckDepth::Chain)
                .with_status_policy(unknown)
                .with_expiration_policy(ExpirationPolicy::Enforce)
                .build()
        });
        let seconds = Duration::from_secs(now.as_second().try_into().unwrap_or(0));
        let verified = end_entity.verify_for_usage(
            ALGORITHMS.all,
            &self.trust,
            issuers,
            UnixTime::since_unix_epoch(seconds),
            match usage {
                Usage::Client => KeyUsage::client_auth(),
                Usage::Server => KeyUsage::server_auth(),
            },
            revocation,
            Some(&|path| judge.path(path)),
        );
        if let Err(error) = verified {
            // A path that only we refused says more than those that led nowhere.
            return Err(judge.refused.into_inner().unwrap_or_else(|| match error {
                webpki::Error::InvalidSignatureForPublicKey if self.has_weak_issuer(issuers) => ChainError::Weak,
                error => refusal(error),
            }));
        }
        let accepted = judge.accepted.take().ok_or(ChainError::UnknownIssuer)?;
        if self.crl_policy == CrlPolicy::Required && self.crls.is_empty() {
            return Err(ChainError::CrlMissing);
        }
        self.check_leaf(&leaf, spiffe_id.clone()?.as_ref())?;
        let certificate = leaf.certificate;
        Ok(VerifiedCertificate {
            authority: self.name.clone(),
            spiffe_id: spiffe_id?,
            dns_names: leaf.dns_names,
            valid_until: accepted.valid_until.min(certificate.not_after),
            subject: certificate.subject,
            serial: certificate.serial,
            issuer: certificate.issuer,
            issuer_hash: certificate.issuer_hash,
            fingerprint: certificate.fingerprint,
            key_hash: certificate.key_hash,
            not_after: certificate.not_after,
            issuers: accepted.issuers,
        })
    }

    /// What webpki does not ask of a leaf.
    fn check_leaf(&self, leaf: &Leaf, spiffe_id: Option<&SpiffeId>) -> Result<(), ChainError> {
        let certificate = &leaf.certificate;
        certificate.key().map_err(ChainError::Key)?;
        if let Some(usage) = certificate.key_usage {
            // RFC 8446, 4.4.2.2 and 4.4.2.3: the key signs the handshake.
            if !usage.digital_signature {
                return Err(ChainError::WrongKeyUsage("the leaf's key usage is without digitalSignature"));
            }
            // X509-SVID 4.3.
            if spiffe_id.is_some() && (usage.certificate_sign || usage.crl_sign) {
                return Err(ChainError::WrongKeyUsage("a leaf with a SPIFFE ID may sign certificates or lists"));
            }
        }
        match spiffe_id {
            Some(id) if self.trust_domain.as_ref().map(|domain| domain.as_str()) != Some(id.trust_domain()) => {
                Err(ChainError::WrongTrustDomain(id.clone()))
            }
            _ => Ok(()),
        }
    }

    /// webpki says of a signature by a short key only that it is not valid.
    fn has_weak_issuer(&self, issuers: &[CertificateDer<'_>]) -> bool {
        let weak = |der: &CertificateDer<'_>| {
            Certificate::read(der).is_ok_and(|issuer| matches!(issuer.key(), Err(KeyError::RsaBits(_))))
        };
        issuers.iter().any(weak)
    }
}

/// Judges paths that webpki would take.
struct Judge<'a> {
    authority: &'a Authority,
    now: Timestamp,
    revoked: &'a dyn Revoked,
    leaf: CertificateIdentity<'a>,
    refused: RefCell<Option<ChainError>>,
    accepted: RefCell<Option<Accepted>>,
}

struct Accepted {
    valid_until: Timestamp,
    issuers: Vec<IssuerIdentity>,
}

impl Judge<'_> {
    fn path(&self, path: &VerifiedPath<'_>) -> Result<(), webpki::Error> {
        match self.accept(path) {
            Ok(accepted) => {
                *self.accepted.borrow_mut() = Some(accepted);
                Ok(())
            }
            Err(error) => {
                self.refused.borrow_mut().get_or_insert(error);
                Err(webpki::Error::UnknownIssuer)
            }
        }
    }

    fn accept(&self, path: &VerifiedPath<'_>) -> Result<Accepted, ChainError> {
        let at = self.authority.trust.iter().position(|trust| ptr::eq(trust, path.anchor()));
        let anchor = at.and_then(|at| self.authority.anchors.get(at)).ok_or(ChainError::UnknownIssuer)?;
        let (begin, end) = (anchor.certificate.not_before, anchor.certificate.not_after);
        if self.now < begin {
            return Err(ChainError::AnchorNotYetValid(begin));
        }
        // As webpki counts, the last second is part of it (RFC 5280, 4.1.2.5).
        if self.now.as_second() > end.as_second() {
            return Err(ChainError::AnchorExpired(end));
        }
        let mut accepted = Accepted { valid_until: end, issuers: Vec::new() };
        for issuer in path.intermediate_certificates() {
            let certificate = Certificate::read(&issuer.der())?;
            // RFC 5280, 6.1.4 (n).
            if certificate.key_usage.is_some_and(|usage| !usage.certificate_sign) {
                return Err(ChainError::IssuerNotCa);
            }
            accepted.valid_until = accepted.valid_until.min(certificate.not_after);
            accepted.issuers.push(IssuerIdentity::from(certificate));
        }
        if anchor.certificate.path_length.is_some_and(|most| accepted.issuers.len() > most as usize) {
            return Err(ChainError::PathTooLong);
        }
        accepted.issuers.push(IssuerIdentity::from(anchor.certificate.clone()));
        let is_revoked = |issuer: &IssuerIdentity| self.revoked.is_revoked(&issuer.identity());
        if self.revoked.is_revoked(&self.leaf) || accepted.issuers.iter().any(is_revoked) {
            return Err(ChainError::RevokedHere);
        }
        Ok(accepted)
    }
}

/// Each error of webpki, as one of ours.
fn refusal(error: webpki::Error) -> ChainError {
    use webpki::Error;
    let time = |time: UnixTime| {
        Timestamp::from_second(time.as_secs().try_into().unwrap_or(i64::MAX)).unwrap_or(Timestamp::MAX)
    };
    match error {
        Error::CertExpired { not_after, .. } => ChainError::Expired(time(not_after)),
        Error::CertNotValidYet { not_before, .. } => ChainError::NotYetValid(time(not_before)),
        Error::CertRevoked => ChainError::RevokedByIssuer,
        Error::CrlExpired { next_update, .. } => ChainError::CrlExpired(time(next_update)),
        Error::UnknownRevocationStatus => ChainError::CrlMissing,
        Error::InvalidCrlSignatureForPublicKey
        | Error::IssuerNotCrlSigner
        | Error::UnsupportedCrlSignatureAlgorithmContext(_)
        | Error::UnsupportedCrlSignatureAlgorithmForPublicKeyContext(_) => ChainError::BadCrl(error),
        Error::UnknownIssuer => ChainError::UnknownIssuer,
        // The issuer's key is of another kind than the signature: it did not make it.
        Error::InvalidSignatureForPublicKey | Error::UnsupportedSignatureAlgorithmForPublicKeyContext(_) => {
            ChainError::BadSignature
        }
        Error::UnsupportedSignatureAlgorithmContext(context) => match is_broken(&context.signature_algorithm_id) {
            true => ChainError::Weak,
            false => ChainError::UnsupportedAlgorithm,
        },
        Error::NameConstraintViolation | Error::MalformedNameConstraint | Error::InvalidNetworkMaskConstraint => {
            ChainError::NameConstraint
        }
        Error::CaUsedAsEndEntity => ChainError::CaAsLeaf,
        Error::EndEntityUsedAsCa => ChainError::IssuerNotCa,
        Error::RequiredEkuNotFoundContext(_) => ChainError::WrongKeyUsage("extended key usage names other purposes"),
        Error::PathLenConstraintViolated | Error::MaximumPathDepthExceeded => ChainError::PathTooLong,
        Error::MaximumSignatureChecksExceeded
        | Error::MaximumPathBuildCallsExceeded
        | Error::MaximumNameConstraintComparisonsExceeded => ChainError::TooComplex,
        Error::UnsupportedCriticalExtension => ChainError::UnsupportedExtension,
        Error::BadDer
        | Error::BadDerTime
        | Error::EmptyEkuExtension
        | Error::ExtensionValueInvalid
        | Error::InvalidCertValidity
        | Error::InvalidSerialNumber
        | Error::MalformedDnsIdentifier
        | Error::MalformedExtensions
        | Error::SignatureAlgorithmMismatch
        | Error::TrailingData(_)
        | Error::UnsupportedCertVersion => ChainError::Malformed(error),
        error => ChainError::Unsupported(error),
    }
}

/// Whether an algorithm identifier (the content, without its outer tag) names a signature over SHA-1 or MD5.
fn is_broken(algorithm: &[u8]) -> bool {
    const BROKEN: [&[u8]; 5] = [
        // md5WithRSAEncryption, sha1WithRSAEncryption (RFC 3279, 2.2.1).
        b"\x06\x09\x2a\x86\x48\x86\xf7\x0d\x01\x01\x04",
        b"\x06\x09\x2a\x86\x48\x86\xf7\x0d\x01\x01\x05",
        // id-dsa-with-sha1 (RFC 3279, 2.2.2).
        b"\x06\x07\x2a\x86\x48\xce\x38\x04\x03",
        // ecdsa-with-SHA1 (RFC 3279, 2.2.3).
        b"\x06\x07\x2a\x86\x48\xce\x3d\x04\x01",
        // md2WithRSAEncryption.
        b"\x06\x09\x2a\x86\x48\x86\xf7\x0d\x01\x01\x02",
    ];
    BROKEN.iter().any(|oid| algorithm.starts_with(oid))
}

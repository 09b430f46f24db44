//! What a certificate says of itself.
//!
//! Enters: the DER of one certificate, as webpki already took it. Leaves: its facts, with every name in a form that can be
//! compared. Never: trust; nothing here is true before the chain is verified.

use aws_lc_rs::digest;
use jiff::Timestamp;
use rustls::pki_types::CertificateDer;
use x509_parser::{
    certificate::X509Certificate, extensions::GeneralName, prelude::FromDer, public_key::PublicKey, time::ASN1Time,
    x509::SubjectPublicKeyInfo,
};

use super::{
    name::rfc4514,
    spiffe::{self, SpiffeId, SpiffeIdError},
};

/// RSA keys below this are broken or soon will be (NIST SP 800-131A); webpki draws the same line for issuers.
pub const MIN_RSA_BITS: usize = 2048;
/// And above this, checking signatures is slow enough to be an attack.
pub const MAX_RSA_BITS: usize = 8192;
/// RFC 5280, 4.1.2.2.
const MAX_SERIAL_BYTES: usize = 20;

/// Facts of any certificate, leaf or issuer.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Certificate {
    /// Lower-case hexadecimal without leading zeros, as in `openssl x509 -serial` but for the case.
    pub serial: String,
    /// RFC 4514.
    pub issuer: String,
    /// SHA-256 of the issuer's name in DER: what a serial number is unique within.
    pub issuer_hash: [u8; 32],
    /// RFC 4514; empty if the certificate has none.
    pub subject: String,
    /// SHA-256 of the certificate: RFC 8705's `x5t#S256`, as bytes.
    pub fingerprint: [u8; 32],
    /// SHA-256 of the subject's public key info: the same for every certificate of one key.
    pub key_hash: [u8; 32],
    pub not_before: Timestamp,
    pub not_after: Timestamp,
    pub is_ca: bool,
    /// How many CAs may follow (RFC 5280, 4.2.1.9).
    pub path_length: Option<u32>,
    pub key_usage: Option<KeyUsage>,
    key: Result<(), KeyError>,
}

/// The bits of RFC 5280, 4.2.1.3, that decide something here.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct KeyUsage {
    pub digital_signature: bool,
    pub certificate_sign: bool,
    pub crl_sign: bool,
}

/// A certificate and the names that it gives its holder.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Leaf {
    pub certificate: Certificate,
    /// In lower case. Without wildcards: those name no caller.
    pub dns_names: Vec<String>,
    pub uris: Vec<String>,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum KeyError {
    #[error("its RSA key has {0} bits; {MIN_RSA_BITS} to {MAX_RSA_BITS} are accepted")]
    RsaBits(usize),
    #[error("its key is none of RSA, P-256, P-384, P-521, Ed25519, ML-DSA")]
    Unsupported,
    #[error("its key cannot be read")]
    Malformed,
}

#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum LeafError {
    // Whoever made the certificate.
    #[error("it is no X.509 certificate in DER")]
    Malformed,
    #[error("its serial number is negative, zero or longer than {MAX_SERIAL_BYTES} bytes (RFC 5280, 4.1.2.2)")]
    Serial,
    #[error("its subject alternative names cannot be read")]
    Names,
    #[error("{0:?} in it is no DNS name")]
    DnsName(String),
    #[error("{0:?} in it is no URI")]
    Uri(String),
    #[error("it has a SPIFFE ID and {0} more URIs (X509-SVID 2)")]
    ManyUris(usize),
    #[error("{0:?} in it {1}")]
    SpiffeId(String, SpiffeIdError),
}

impl LeafError {
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Malformed | Self::Serial => "malformed_certificate",
            Self::Names | Self::DnsName(_) | Self::Uri(_) => "malformed_name",
            Self::ManyUris(_) => "many_uris",
            Self::SpiffeId(..) => "bad_spiffe_id",
        }
    }
}

impl KeyError {
    pub fn reason(&self) -> &'static str {
        match self {
            Self::RsaBits(bits) if *bits < MIN_RSA_BITS => "weak_key",
            Self::RsaBits(_) | Self::Unsupported => "unsupported_key",
            Self::Malformed => "malformed_certificate",
        }
    }
}

impl Certificate {
    pub fn read(der: &CertificateDer<'_>) -> Result<Self, LeafError> {
        Self::of(der, &parse(der)?)
    }

    /// Whether its key may be used at all.
    pub fn key(&self) -> Result<(), KeyError> {
        self.key
    }

    fn of(der: &CertificateDer<'_>, parsed: &X509Certificate<'_>) -> Result<Self, LeafError> {
        let constraints = parsed.basic_constraints().map_err(|_| LeafError::Malformed)?.map(|found| found.value);
        let key_usage = parsed.key_usage().map_err(|_| LeafError::Malformed)?.map(|found| KeyUsage {
            digital_signature: found.value.digital_signature(),
            certificate_sign: found.value.key_cert_sign(),
            crl_sign: found.value.crl_sign(),
        });
        Ok(Self {
            serial: serial(parsed.raw_serial())?,
            issuer: rfc4514(parsed.issuer()).ok_or(LeafError::Malformed)?,
            issuer_hash: sha256(parsed.issuer().as_raw()),
            subject: rfc4514(parsed.subject()).ok_or(LeafError::Malformed)?,
            fingerprint: sha256(der),
            key_hash: sha256(parsed.public_key().raw),
            not_before: timestamp(parsed.validity().not_before)?,
            not_after: timestamp(parsed.validity().not_after)?,
            is_ca: constraints.is_some_and(|constraints| constraints.ca),
            path_length: constraints.and_then(|constraints| constraints.path_len_constraint),
            key_usage,
            key: key(parsed.public_key()),
        })
    }
}

impl Leaf {
    pub fn read(der: &CertificateDer<'_>) -> Result<Self, LeafError> {
        let parsed = parse(der)?;
        let certificate = Certificate::of(der, &parsed)?;
        let mut leaf = Self { certificate, dns_names: Vec::new(), uris: Vec::new() };
        let names = parsed.subject_alternative_name().map_err(|_| LeafError::Names)?;
        for name in names.iter().flat_map(|names| &names.value.general_names) {
            match name {
                GeneralName::DNSName(name) => leaf.dns_names.extend(dns_name(name)?),
                GeneralName::URI(uri) => leaf.uris.push(self::uri(uri)?),
                GeneralName::Invalid(..) => return Err(LeafError::Names),
                // Names of other kinds (addresses, mailboxes) name nobody whom a policy could name.
                _ => {}
            }
        }
        Ok(leaf)
    }

    /// The SPIFFE ID, if it has one that follows the rules (X509-SVID 2).
    pub fn spiffe_id(&self) -> Result<Option<SpiffeId>, LeafError> {
        let Some(uri) = self.uris.iter().find(|uri| spiffe::is_spiffe(uri)) else { return Ok(None) };
        if self.uris.len() > 1 {
            return Err(LeafError::ManyUris(self.uris.len() - 1));
        }
        uri.parse().map(Some).map_err(|error| LeafError::SpiffeId(uri.clone(), error))
    }
}

/// What is signed has one reading: nothing may follow it.
fn parse<'a>(der: &'a CertificateDer<'_>) -> Result<X509Certificate<'a>, LeafError> {
    match X509Certificate::from_der(der) {
        Ok(([], parsed)) => Ok(parsed),
        _ => Err(LeafError::Malformed),
    }
}

/// A negative number would look like a positive one of the same bytes.
fn serial(bytes: &[u8]) -> Result<String, LeafError> {
    let magnitude = match bytes {
        [0, rest @ ..] => rest,
        [first, ..] if *first < 0x80 => bytes,
        _ => return Err(LeafError::Serial),
    };
    if magnitude.is_empty() || magnitude.len() > MAX_SERIAL_BYTES {
        return Err(LeafError::Serial);
    }
    Ok(hex(magnitude))
}

/// RFC 5280, 4.2.1.6, and RFC 1034, 3.5, with underscores as they are in use. A wildcard is a name, but of nobody.
fn dns_name(name: &str) -> Result<Option<String>, LeafError> {
    let plain = name.strip_prefix("*.").unwrap_or(name);
    if !is_dns_name(plain) {
        return Err(LeafError::DnsName(shown(name)));
    }
    Ok((plain == name).then(|| name.to_ascii_lowercase()))
}

/// Labels of letters, digits, dashes and underscores; no dot at the end.
pub(super) fn is_dns_name(name: &str) -> bool {
    let allowed = |b: u8| b.is_ascii_alphanumeric() || b"-_".contains(&b);
    let label = |label: &str| {
        (1..=63).contains(&label.len())
            && label.bytes().all(allowed)
            && !label.starts_with('-')
            && !label.ends_with('-')
    };
    name.len() <= 253 && name.split('.').all(label)
}

/// RFC 3986, 2: visible ASCII. Control characters and spaces would make two readers see two URIs.
fn uri(uri: &str) -> Result<String, LeafError> {
    if uri.is_empty() || !uri.bytes().all(|b| b.is_ascii_graphic()) {
        return Err(LeafError::Uri(shown(uri)));
    }
    Ok(uri.to_owned())
}

/// As much of a name as an error may carry.
fn shown(name: &str) -> String {
    name.chars().take(100).collect()
}

fn key(info: &SubjectPublicKeyInfo<'_>) -> Result<(), KeyError> {
    // P-256, P-384, P-521 (RFC 5480, 2.1.1.1).
    const CURVES: [&str; 3] = ["1.2.840.10045.3.1.7", "1.3.132.0.34", "1.3.132.0.35"];
    match info.algorithm.algorithm.to_id_string().as_str() {
        // rsaEncryption (RFC 3279, 2.3.1).
        "1.2.840.113549.1.1.1" => match info.parsed() {
            Ok(PublicKey::RSA(rsa)) => {
                let significant = rsa.modulus.iter().position(|byte| *byte != 0).unwrap_or(rsa.modulus.len());
                let first = rsa.modulus.get(significant).copied().unwrap_or_default();
                let bits = (rsa.modulus.len() - significant) * 8 - first.leading_zeros() as usize % 8;
                let sound = (MIN_RSA_BITS..=MAX_RSA_BITS).contains(&bits);
                sound.then_some(()).ok_or(KeyError::RsaBits(bits))
            }
            _ => Err(KeyError::Malformed),
        },
        // id-ecPublicKey (RFC 5480, 2.1.1).
        "1.2.840.10045.2.1" => {
            let curve = info.algorithm.parameters.as_ref().and_then(|parameters| parameters.as_oid().ok());
            let known = curve.is_some_and(|curve| CURVES.contains(&curve.to_id_string().as_str()));
            known.then_some(()).ok_or(KeyError::Unsupported)
        }
        // Ed25519 (RFC 8410, 3); ML-DSA-44, -65 and -87 (RFC 9881, 2).
        "1.3.101.112" | "2.16.840.1.101.3.4.3.17" | "2.16.840.1.101.3.4.3.18" | "2.16.840.1.101.3.4.3.19" => Ok(()),
        _ => Err(KeyError::Unsupported),
    }
}

pub(super) fn timestamp(time: ASN1Time) -> Result<Timestamp, LeafError> {
    Timestamp::from_second(time.timestamp()).map_err(|_| LeafError::Malformed)
}

/// Lower case.
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn sha256(bytes: &[u8]) -> [u8; 32] {
    let mut out = [0; 32];
    out.copy_from_slice(digest::digest(&digest::SHA256, bytes).as_ref());
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn serials_are_written_in_one_way() {
        assert_eq!(serial(&[0x01, 0x0a]).unwrap(), "010a");
        assert_eq!(serial(&[0x00, 0x80]).unwrap(), "80");
        for bad in [&[][..], &[0x80], &[0x00], &[0x01; 21]] {
            assert_eq!(serial(bad), Err(LeafError::Serial), "{bad:?}");
        }
        assert!(serial(&[0x7f; 20]).is_ok());
    }

    #[test]
    fn dns_names_are_compared_without_case_and_wildcards_name_nobody() {
        assert_eq!(dns_name("API.Example.org").unwrap().as_deref(), Some("api.example.org"));
        assert_eq!(dns_name("*.example.org").unwrap(), None);
        let long = format!("{}.org", "x".repeat(64));
        let bad = [
            "", ".", "a.", ".a", "a..b", "*", "*.*.a", "a.*.b", "x*.a", "a b", "a\0.b", "a\0", "b\u{e4}r", "-a",
            "a-.b", "a/b", &long,
        ];
        for name in bad {
            assert!(dns_name(name).is_err(), "{name:?}");
        }
    }

    #[test]
    fn uris_are_visible_ascii() {
        assert!(uri("spiffe://example.org/a").is_ok());
        for bad in ["", "a b", "spiffe://a/b\0", "spiffe://\u{e4}/b", "a\nb", "\u{7f}"] {
            assert!(uri(bad).is_err(), "{bad:?}");
        }
    }
}

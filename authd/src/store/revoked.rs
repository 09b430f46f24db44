//! What can be revoked, and how it is written: a kind, a space, and a value.
//!
//! Enters: what operators type. Leaves: values with one spelling each. Never: a token, a key or any other secret; tokens are
//! named by what identifies them, or by their hash.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};

use crate::{
    digest::{Digest, read_hex, write_hex},
    grants::Id as GrantId,
    policy::model::is_name,
    proofs::api_key::text::KeyId,
};

/// Bytes of a value at most. A token with a longer id is revoked by its hash.
const MAX_VALUE: usize = 2048;

/// Something that counts for nothing any more.
///
/// Fields are public so that whoever checks a credential can ask about it. What cannot be written down in one line is found
/// by no look-up, and the store refuses to keep it.
#[derive(Clone, PartialEq, Eq, Hash, Debug, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum Revoked {
    /// One token, by the claims `iss` and `jti` (RFC 7519 sections 4.1.1 and 4.1.7): ids are unique within an issuer only.
    Token {
        issuer: String,
        jti: String,
    },
    /// One token without an id, opaque or not, by the hash of its text.
    TokenHash(Digest),
    /// An API key.
    Key(KeyId),
    /// A certificate, by the hash of its DER.
    Certificate(Digest),
    /// A certificate, by the hash of its issuer's DER-encoded name (RFC 5280 section 4.1.2.4) and its serial number.
    Serial {
        issuer: Digest,
        serial: Serial,
    },
    /// Every certificate of a key, by the hash of its DER-encoded SubjectPublicKeyInfo (RFC 5280 section 4.1.2.7).
    Spki(Digest),
    SpiffeId(String),
    /// A workload of the policy, with all its instances.
    Workload(String),
    /// One instance, by its cgroup below the enforced root.
    Instance(String),
    Peer(String),
    /// A workload of the kind `agent`, wherever it appears in a chain of delegation.
    Agent(String),
    /// Everything that an issuer says, by its claim `iss`.
    Issuer(String),
    /// Every token that a key of an issuer signed, by its name there (RFC 7517, 4.5).
    IssuerKey {
        issuer: String,
        kid: String,
    },
    /// One grant.
    Grant(GrantId),
}

/// A certificate's serial number: up to 20 octets (RFC 5280 section 4.1.2.2), positive, without leading zeros.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct Serial(Vec<u8>);

#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum RevokedError {
    #[error(
        "`{0}` is nothing that can be revoked: use token, token-hash, key, certificate, serial, spki, spiffe-id, workload, instance, peer, agent, issuer, issuer-key or grant"
    )]
    Kind(String),
    #[error("`{value}` is no {kind}: {expected}")]
    Value { kind: &'static str, value: String, expected: &'static str },
}

impl RevokedError {
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Kind(_) => "revocation_unknown_kind",
            Self::Value { .. } => "revocation_bad_value",
        }
    }
}

impl Revoked {
    /// Whether certificates are revoked by it.
    pub fn is_of_certificates(&self) -> bool {
        matches!(self, Self::Certificate(_) | Self::Serial { .. } | Self::Spki(_) | Self::SpiffeId(_))
    }

    pub fn kind(&self) -> &'static str {
        match self {
            Self::Token { .. } => "token",
            Self::TokenHash(_) => "token-hash",
            Self::Key(_) => "key",
            Self::Certificate(_) => "certificate",
            Self::Serial { .. } => "serial",
            Self::Spki(_) => "spki",
            Self::SpiffeId(_) => "spiffe-id",
            Self::Workload(_) => "workload",
            Self::Instance(_) => "instance",
            Self::Peer(_) => "peer",
            Self::Agent(_) => "agent",
            Self::Issuer(_) => "issuer",
            Self::IssuerKey { .. } => "issuer-key",
            Self::Grant(_) => "grant",
        }
    }

    /// Whether it stands for whatever it gives out, now and later, and not for one credential. Only such a revocation can be
    /// narrowed to what was issued before a time.
    pub fn is_source(&self) -> bool {
        match self {
            Self::Spki(_) | Self::SpiffeId(_) | Self::Workload(_) | Self::Instance(_) => true,
            Self::Peer(_) | Self::Agent(_) | Self::Issuer(_) | Self::IssuerKey { .. } => true,
            Self::Token { .. } | Self::TokenHash(_) | Self::Key(_) => false,
            Self::Certificate(_) | Self::Serial { .. } | Self::Grant(_) => false,
        }
    }

    /// A key of an issuer; `None` if its name is no line.
    pub fn issuer_key(issuer: &str, kid: &str) -> Option<Self> {
        (is_word(issuer) && is_line(kid)).then(|| Self::IssuerKey { issuer: issuer.to_owned(), kid: kid.to_owned() })
    }

    /// A value of a kind. Two values are separated by one space: `ISSUER JTI`, `HASH SERIAL`.
    pub fn parse(kind: &str, value: &str) -> Result<Self, RevokedError> {
        let hash = "give a SHA-256 value, 64 hexadecimal digits";
        let name = "give the name that the policy uses";
        let wrong = |kind, expected| RevokedError::Value { kind, value: value.to_owned(), expected };
        let digest = |kind| value.parse::<Digest>().map_err(|_| wrong(kind, hash));
        let named = |kind| Some(value.to_owned()).filter(|v| is_name(v)).ok_or_else(|| wrong(kind, name));
        let some = |parsed: Option<Self>, kind, expected| parsed.ok_or_else(|| wrong(kind, expected));
        match kind {
            "token" => {
                let parts = value.split_once(' ').filter(|(issuer, jti)| is_word(issuer) && is_line(jti));
                let token = parts.map(|(i, j)| Self::Token { issuer: i.to_owned(), jti: j.to_owned() });
                some(
                    token,
                    "token",
                    "give its `iss`, a space and its `jti`; a token with an odd id is revoked by its hash",
                )
            }
            "token-hash" => digest("token-hash").map(Self::TokenHash),
            "key" => some(
                value.parse().ok().map(Self::Key),
                "key",
                "give its id, 10 characters, as `authd key list` shows it",
            ),
            "certificate" | "cert" => digest("certificate").map(Self::Certificate),
            "serial" => {
                let parse = |(issuer, serial): (&str, &str)| {
                    Some(Self::Serial { issuer: issuer.parse().ok()?, serial: Serial::parse(serial)? })
                };
                let expected =
                    "give the SHA-256 of the issuer's DER name, a space and the serial number in hexadecimal";
                some(value.split_once(' ').and_then(parse), "serial", expected)
            }
            "spki" => digest("spki").map(Self::Spki),
            "spiffe-id" => {
                let id = Some(value).filter(|id| is_spiffe_id(id)).map(|id| Self::SpiffeId(id.to_owned()));
                some(id, "spiffe-id", "give spiffe://TRUST-DOMAIN/PATH")
            }
            "workload" => named("workload").map(Self::Workload),
            "instance" => {
                let path = Some(value).filter(|path| is_cgroup(path)).map(|path| Self::Instance(path.to_owned()));
                some(path, "instance", "give its cgroup below the enforced root, such as /agents.slice/support-7.scope")
            }
            "peer" => named("peer").map(Self::Peer),
            "agent" => named("agent").map(Self::Agent),
            "issuer" => {
                let issuer = Some(value).filter(|issuer| is_word(issuer)).map(|i| Self::Issuer(i.to_owned()));
                some(issuer, "issuer", "give its `iss`, exactly as its tokens have it")
            }
            "issuer-key" => {
                let key = value.split_once(' ').and_then(|(issuer, kid)| Self::issuer_key(issuer, kid));
                some(key, "issuer-key", "give its `iss`, a space and the `kid` of the key")
            }
            "grant" => some(value.parse().ok().map(Self::Grant), "grant", "give its id, 32 hexadecimal digits"),
            _ => Err(RevokedError::Kind(kind.to_owned())),
        }
    }
}

impl fmt::Display for Revoked {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ", self.kind())?;
        match self {
            Self::Token { issuer, jti } => write!(f, "{issuer} {jti}"),
            Self::IssuerKey { issuer, kid } => write!(f, "{issuer} {kid}"),
            Self::TokenHash(hash) | Self::Certificate(hash) | Self::Spki(hash) => hash.fmt(f),
            Self::Key(id) => id.fmt(f),
            Self::Serial { issuer, serial } => write!(f, "{issuer} {serial}"),
            Self::SpiffeId(text) | Self::Workload(text) | Self::Instance(text) => f.write_str(text),
            Self::Peer(text) | Self::Agent(text) | Self::Issuer(text) => f.write_str(text),
            Self::Grant(id) => id.fmt(f),
        }
    }
}

impl FromStr for Revoked {
    type Err = RevokedError;

    fn from_str(text: &str) -> Result<Self, RevokedError> {
        let (kind, value) = text.split_once(' ').ok_or_else(|| RevokedError::Kind(text.to_owned()))?;
        Self::parse(kind, value)
    }
}

impl TryFrom<String> for Revoked {
    type Error = RevokedError;

    fn try_from(text: String) -> Result<Self, RevokedError> {
        text.parse()
    }
}

impl From<Revoked> for String {
    fn from(revoked: Revoked) -> Self {
        revoked.to_string()
    }
}

impl Serial {
    const MAX: usize = 20;

    /// From the octets of the DER integer. `None` for what RFC 5280 does not allow: 0, a negative number, or a longer one.
    pub fn from_der(octets: &[u8]) -> Option<Self> {
        let negative = octets.first().is_some_and(|first| first & 0x80 != 0);
        if negative { None } else { Self::from_number(octets) }
    }

    /// In hexadecimal, with or without colons, and leading zeros: as OpenSSL and others print it.
    pub fn parse(text: &str) -> Option<Self> {
        Self::from_number(&read_hex(text)?)
    }

    fn from_number(octets: &[u8]) -> Option<Self> {
        let zeros = octets.iter().take_while(|octet| **octet == 0).count();
        let number = octets.get(zeros..)?;
        (1..=Self::MAX).contains(&number.len()).then(|| Self(number.to_owned()))
    }
}

impl fmt::Display for Serial {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write_hex(f, &self.0)
    }
}

/// Anything that is one line, and has an end.
fn is_line(text: &str) -> bool {
    (1..=MAX_VALUE).contains(&text.len()) && !text.contains(char::is_control)
}

fn is_word(text: &str) -> bool {
    is_line(text) && !text.contains(char::is_whitespace)
}

fn is_cgroup(path: &str) -> bool {
    let mut segments = path.split('/');
    is_line(path) && segments.next() == Some("") && segments.all(|segment| !matches!(segment, "" | "." | ".."))
}

/// The SPIFFE ID standard, section 2: a lower-case trust domain, and path segments of letters, digits and `.-_`.
fn is_spiffe_id(text: &str) -> bool {
    let Some(rest) = text.strip_prefix("spiffe://") else { return false };
    let (domain, path) = rest.split_once('/').map_or((rest, None), |(domain, path)| (domain, Some(path)));
    let in_domain = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || ".-_".contains(c);
    let in_path = |c: char| c.is_ascii_alphanumeric() || ".-_".contains(c);
    let is_segment = |s: &str| !matches!(s, "" | "." | "..") && s.chars().all(in_path);
    text.len() <= MAX_VALUE
        && !domain.is_empty()
        && domain.len() <= 255
        && domain.chars().all(in_domain)
        && path.is_none_or(|path| path.split('/').all(is_segment))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const HASH: &str = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";

    /// One of each kind, in its one spelling.
    pub fn examples() -> Vec<String> {
        vec![
            "token https://idp.example.org a b c".to_owned(),
            format!("token-hash {HASH}"),
            "key 05afmv0nt4".to_owned(),
            format!("certificate {HASH}"),
            format!("serial {HASH} 0a1b"),
            format!("spki {HASH}"),
            "spiffe-id spiffe://example.org/agent/a1".to_owned(),
            "workload payments-api".to_owned(),
            "instance /agents.slice/support-7.scope".to_owned(),
            "peer billing-partner".to_owned(),
            "agent support-agent".to_owned(),
            "issuer https://idp.example.org".to_owned(),
            "issuer-key https://idp.example.org k 1".to_owned(),
            format!("grant {}", &HASH[..32]),
        ]
    }

    #[test]
    fn every_kind_is_read_as_it_is_written() {
        for text in examples() {
            let revoked: Revoked = text.parse().unwrap_or_else(|error| panic!("{error}"));
            assert_eq!(revoked.to_string(), text);
            let json = serde_json::to_string(&revoked).unwrap();
            assert_eq!(serde_json::from_str::<Revoked>(&json).unwrap(), revoked);
        }
    }

    #[test]
    fn what_people_paste_is_the_same_as_what_is_kept() {
        let colons: Vec<&str> = HASH.as_bytes().chunks(2).map(|pair| std::str::from_utf8(pair).unwrap()).collect();
        let pasted = Revoked::parse("certificate", &colons.join(":").to_uppercase());
        assert_eq!(pasted, Revoked::parse("certificate", HASH));
        assert_eq!(Serial::parse("00:0A:1B"), Serial::from_der(&[0, 0x0a, 0x1b]));
        assert_eq!(Serial::parse("00ff"), Serial::from_der(&[0, 0xff]));
        assert_eq!(Serial::from_der(&[0xff]), None, "negative");
        assert_eq!(Serial::from_der(&[0; 4]), None);
        assert_eq!(Serial::from_der(&[1; 21]), None);
        assert!(Serial::from_der(&[]).is_none() && Serial::parse("").is_none());
    }

    #[test]
    fn what_is_not_exact_is_refused() {
        for (kind, values) in [
            ("token", &["https://idp.example.org", "a ", " b", "a b\nc", "", "a\tb c"][..]),
            ("token-hash", &["", "00", "zz"]),
            ("key", &["05AFMV0NT4", "05afmv0nt", "authd_05afmv0nt4"]),
            ("serial", &[HASH, "0a 0b"]),
            ("spiffe-id", &["spiffe://", "spiffe://A.org/x", "spiffe://a.org/", "spiffe://a.org//x", "http://a.org/x"]),
            ("spiffe-id", &["spiffe://a.org/x?y", "spiffe://a.org/../x", "spiffe://a.org/x%20", "SPIFFE://a.org/x"]),
            ("workload", &["", "a b", "-a", "a/b"]),
            ("instance", &["", "a", "/", "/a/", "/a//b", "/a/../b", "/a\n"]),
            ("issuer", &["", "a b", "a\0"]),
            ("grant", &["", HASH, "0"]),
        ] {
            for value in values {
                let result = Revoked::parse(kind, value);
                assert!(matches!(result, Err(RevokedError::Value { .. })), "{kind} {value:?}: {result:?}");
            }
        }
        for text in ["everything x", "token", "", " ", "Token a b"] {
            assert!(matches!(text.parse::<Revoked>(), Err(RevokedError::Kind(_))), "{text}");
        }
    }

    proptest! {
        #[test]
        fn whatever_is_taken_has_one_spelling(kind in 0usize..14, value in "[ -~é\n]{0,40}") {
            let example = &examples()[kind];
            let kind = example.split(' ').next().unwrap();
            if let Ok(revoked) = Revoked::parse(kind, &value) {
                prop_assert_eq!(revoked.to_string().parse::<Revoked>().unwrap(), revoked);
            }
        }
    }
}

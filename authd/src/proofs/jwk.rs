//! Public keys as JSON (RFC 7517, RFC 7518 section 6, RFC 8037), and sets of them.
//!
//! Enters: JSON of an issuer, or of a DPoP proof's header. Leaves: keys that verify signatures of the algorithms that
//! they are for. Never: private or symmetric keys, weak ones, or a key chosen by trying one after the other.
//!
//! Signatures are checked by aws-lc-rs itself, not by a JWT crate around it: keys are parsed once and not per token, the
//! key's type fixes the algorithm before a signature is looked at, and there is one reader of JSON, the strict one. The
//! fixed-length ECDSA form of JWS (RFC 7518, 3.4) is what its `_FIXED` algorithms take: DER, other lengths and zeros fail.

use std::fmt;

use aws_lc_rs::{
    digest::{SHA256, digest},
    signature::{
        ECDSA_P256_SHA256_FIXED, ECDSA_P384_SHA384_FIXED, ED25519, ParsedPublicKey, RSA_PKCS1_2048_8192_SHA256,
        RSA_PKCS1_2048_8192_SHA384, RSA_PKCS1_2048_8192_SHA512, RSA_PSS_2048_8192_SHA256, RSA_PSS_2048_8192_SHA384,
        RSA_PSS_2048_8192_SHA512, RsaParameters, RsaPublicKeyComponents, VerificationAlgorithm,
    },
};

use super::{
    base64url,
    json::{self, JsonError, Limits, Map, Value},
    jws::{Algorithm, Header, is_key_id},
};

/// Issuers publish a handful; one that publishes more than this makes a mistake.
pub const MAX_KEYS: usize = 100;
/// With certificate chains in `x5c`, a hundred keys are not longer.
const SET: Limits = Limits { bytes: 512 << 10, depth: 8, members: 8192 };
const RSA_BITS: std::ops::RangeInclusive<usize> = 2048..=8192;
/// Members that only private keys (RFC 7518, 6.2.2 and 6.3.2) and symmetric keys (6.4.1) have.
const PRIVATE: [&str; 8] = ["d", "p", "q", "dp", "dq", "qi", "oth", "k"];

#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum JwkError {
    // What must not be published at all.
    #[error("the key is private, and now known to others")]
    Private,
    #[error("the key is a shared secret")]
    Symmetric,
    // What authd does not use.
    #[error("the key's type or curve is not supported")]
    Unsupported,
    #[error("the key is not for signatures")]
    Usage,
    // What is wrong with it.
    #[error("the key lacks a member, or one is malformed")]
    Malformed,
    #[error("the RSA key is shorter than 2048 or longer than 8192 bits, or its exponent is unusual")]
    WeakRsa,
    #[error("the key is no point on its curve")]
    Point,
}

impl JwkError {
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Private => "jwk_private",
            Self::Symmetric => "jwk_symmetric",
            Self::Unsupported => "jwk_unsupported",
            Self::Usage => "jwk_usage",
            Self::Malformed => "jwk_malformed",
            Self::WeakRsa => "jwk_weak_rsa",
            Self::Point => "jwk_point",
        }
    }
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum JwksError {
    #[error("the key set: {0}")]
    Json(JsonError),
    #[error("the key set has no array `keys`")]
    Shape,
    #[error("the key set has more than {MAX_KEYS} keys")]
    TooManyKeys,
    #[error("the key set has private or symmetric keys: whoever reads it can sign")]
    PrivateMaterial,
    #[error("the key set has no key that verifies signatures")]
    NoUsableKey,
}

impl JwksError {
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Json(error) => error.reason(),
            Self::Shape => "jwks_shape",
            Self::TooManyKeys => "jwks_too_many_keys",
            Self::PrivateMaterial => "jwks_private_material",
            Self::NoUsableKey => "jwks_no_usable_key",
        }
    }
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum SelectError {
    /// The issuer may have rotated its keys: worth another look at them.
    #[error("the issuer has no key with this id")]
    UnknownKid,
    #[error("the issuer's key with this id is not for this algorithm")]
    Mismatch,
    #[error("the issuer has several different keys with this id")]
    Ambiguous,
    #[error("the token does not say which of the issuer's keys it is signed with")]
    KidMissing,
}

impl SelectError {
    pub fn reason(&self) -> &'static str {
        match self {
            Self::UnknownKid => "kid_unknown",
            Self::Mismatch => "key_algorithm_mismatch",
            Self::Ambiguous => "kid_ambiguous",
            Self::KidMissing => "kid_missing",
        }
    }
}

/// A public key.
#[derive(Clone)]
pub struct PublicKey {
    pub kid: Option<String>,
    /// RFC 7638, with SHA-256.
    pub thumbprint: [u8; 32],
    verifiers: Vec<(Algorithm, ParsedPublicKey)>,
}

impl fmt::Debug for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let thumbprint = base64url::encode(self.thumbprint);
        f.debug_struct("PublicKey").field("kid", &self.kid).field("thumbprint", &thumbprint).finish_non_exhaustive()
    }
}

impl PublicKey {
    pub fn parse(jwk: &Map<String, Value>) -> Result<Self, JwkError> {
        let kty = text(jwk, "kty")?.ok_or(JwkError::Malformed)?;
        if kty == "oct" {
            return Err(JwkError::Symmetric);
        }
        if PRIVATE.iter().any(|name| jwk.contains_key(*name)) {
            return Err(JwkError::Private);
        }
        usage(jwk)?;
        let (canonical, verifiers) = match kty {
            "EC" => elliptic(jwk)?,
            "OKP" => edwards(jwk)?,
            "RSA" => rsa(jwk)?,
            _ => return Err(JwkError::Unsupported),
        };
        let verifiers = match text(jwk, "alg")? {
            None => verifiers,
            Some(alg) => {
                let alg = Algorithm::from_name(alg).ok_or(JwkError::Unsupported)?;
                verifiers.into_iter().filter(|(algorithm, _)| *algorithm == alg).collect()
            }
        };
        if verifiers.is_empty() {
            return Err(JwkError::Malformed);
        }
        let kid = text(jwk, "kid")?.map(str::to_owned);
        if kid.as_deref().is_some_and(|kid| !is_key_id(kid)) {
            return Err(JwkError::Malformed);
        }
        let thumbprint = sha256(canonical.as_bytes());
        Ok(Self { kid, thumbprint, verifiers })
    }

    /// Whether the signature is this key's. An algorithm that the key is not for verifies nothing.
    pub fn verifies(&self, algorithm: Algorithm, message: &[u8], signature: &[u8]) -> bool {
        self.verifier(algorithm).is_some_and(|key| key.verify_sig(message, signature).is_ok())
    }

    pub fn is_for(&self, algorithm: Algorithm) -> bool {
        self.verifier(algorithm).is_some()
    }

    fn verifier(&self, algorithm: Algorithm) -> Option<&ParsedPublicKey> {
        self.verifiers.iter().find(|(own, _)| *own == algorithm).map(|(_, key)| key)
    }
}

/// The keys of one issuer.
#[derive(Clone, Debug)]
pub struct KeySet {
    keys: Vec<PublicKey>,
    /// Keys that were left out: of unknown types, malformed, weak, or not for signatures (RFC 7517, 5).
    pub skipped: usize,
}

impl KeySet {
    pub fn parse(bytes: &[u8]) -> Result<Self, JwksError> {
        let mut set = json::object(bytes, SET).map_err(JwksError::Json)?;
        let Some(Value::Array(members)) = set.remove("keys") else { return Err(JwksError::Shape) };
        if members.len() > MAX_KEYS {
            return Err(JwksError::TooManyKeys);
        }
        let mut keys: Vec<PublicKey> = Vec::new();
        let mut skipped = 0;
        for member in members {
            let Value::Object(jwk) = member else { return Err(JwksError::Shape) };
            match PublicKey::parse(&jwk) {
                Ok(key) if keys.iter().any(|k| k.kid == key.kid && k.thumbprint == key.thumbprint) => skipped += 1,
                Ok(key) => keys.push(key),
                Err(JwkError::Private | JwkError::Symmetric) => return Err(JwksError::PrivateMaterial),
                Err(_) => skipped += 1,
            }
        }
        if keys.is_empty() { Err(JwksError::NoUsableKey) } else { Ok(Self { keys, skipped }) }
    }

    pub fn len(&self) -> usize {
        self.keys.len()
    }

    pub fn is_empty(&self) -> bool {
        self.keys.is_empty()
    }

    /// The one key that a header can mean.
    pub fn select(&self, header: &Header) -> Result<&PublicKey, SelectError> {
        let named = |key: &&PublicKey| header.kid.is_none() || key.kid == header.kid;
        let mut fitting = self.keys.iter().filter(named).filter(|key| key.is_for(header.algorithm));
        match (fitting.next(), fitting.next(), &header.kid) {
            (Some(key), None, _) => Ok(key),
            (Some(_), Some(_), Some(_)) => Err(SelectError::Ambiguous),
            (_, _, None) => Err(SelectError::KidMissing),
            (None, _, Some(_)) if self.keys.iter().any(|key| named(&key)) => Err(SelectError::Mismatch),
            (None, _, Some(_)) => Err(SelectError::UnknownKid),
        }
    }
}

pub fn sha256(bytes: &[u8]) -> [u8; 32] {
    let mut hash = [0; 32];
    hash.copy_from_slice(digest(&SHA256, bytes).as_ref());
    hash
}

/// The text that a thumbprint is made of (RFC 7638, 3), and what the key verifies.
type Parsed = (String, Vec<(Algorithm, ParsedPublicKey)>);

fn elliptic(jwk: &Map<String, Value>) -> Result<Parsed, JwkError> {
    let crv = text(jwk, "crv")?.ok_or(JwkError::Malformed)?;
    let (algorithm, verification, length): (_, &'static dyn VerificationAlgorithm, _) = match crv {
        "P-256" => (Algorithm::Es256, &ECDSA_P256_SHA256_FIXED, 32),
        "P-384" => (Algorithm::Es384, &ECDSA_P384_SHA384_FIXED, 48),
        _ => return Err(JwkError::Unsupported),
    };
    let (x, y) = (required(jwk, "x")?, required(jwk, "y")?);
    // SEC 1, 2.3.3: an uncompressed point. Both coordinates have the full length (RFC 7518, 6.2.1.2).
    let mut point = vec![4];
    for coordinate in [x, y] {
        let bytes = base64url::decode(coordinate).map_err(|_| JwkError::Malformed)?;
        if bytes.len() != length {
            return Err(JwkError::Malformed);
        }
        point.extend(bytes);
    }
    let key = ParsedPublicKey::new(verification, point).map_err(|_| JwkError::Point)?;
    Ok((format!(r#"{{"crv":"{crv}","kty":"EC","x":"{x}","y":"{y}"}}"#), vec![(algorithm, key)]))
}

fn edwards(jwk: &Map<String, Value>) -> Result<Parsed, JwkError> {
    if text(jwk, "crv")? != Some("Ed25519") {
        return Err(JwkError::Unsupported);
    }
    let x = required(jwk, "x")?;
    let bytes: [u8; 32] = base64url::decode_array(x).map_err(|_| JwkError::Malformed)?;
    let key = ParsedPublicKey::new(&ED25519, bytes).map_err(|_| JwkError::Point)?;
    let verifiers = vec![(Algorithm::EdDsa, key.clone()), (Algorithm::Ed25519, key)];
    Ok((format!(r#"{{"crv":"Ed25519","kty":"OKP","x":"{x}"}}"#), verifiers))
}

fn rsa(jwk: &Map<String, Value>) -> Result<Parsed, JwkError> {
    let (n, e) = (required(jwk, "n")?, required(jwk, "e")?);
    let number = |text: &str| match base64url::decode(text) {
        // RFC 7518, 6.3.1.1: no leading zeros. Two spellings of one number would be two thumbprints of one key.
        Ok(bytes) if bytes.first().is_some_and(|first| *first != 0) => Ok(bytes),
        _ => Err(JwkError::Malformed),
    };
    let (modulus, exponent) = (number(n)?, number(e)?);
    let bits = modulus.len() * 8 - modulus.first().map_or(0, |first| first.leading_zeros() as usize);
    let odd = |number: &[u8]| number.last().is_some_and(|last| last % 2 == 1);
    // FIPS 186-5, A.1.1: odd, from 65537. Longer than 32 bits only serves to make verifying slow.
    let fold = |value: u64, byte: &u8| (value << 8) | u64::from(*byte);
    let usual = exponent.len() <= 4 && exponent.iter().fold(0, fold) >= 65537 && odd(&exponent);
    if !RSA_BITS.contains(&bits) || !odd(&modulus) || !usual {
        return Err(JwkError::WeakRsa);
    }
    let components = RsaPublicKeyComponents { n: modulus, e: exponent };
    let algorithms: [(Algorithm, &'static RsaParameters); 6] = [
        (Algorithm::Rs256, &RSA_PKCS1_2048_8192_SHA256),
        (Algorithm::Rs384, &RSA_PKCS1_2048_8192_SHA384),
        (Algorithm::Rs512, &RSA_PKCS1_2048_8192_SHA512),
        (Algorithm::Ps256, &RSA_PSS_2048_8192_SHA256),
        (Algorithm::Ps384, &RSA_PSS_2048_8192_SHA384),
        (Algorithm::Ps512, &RSA_PSS_2048_8192_SHA512),
    ];
    let mut verifiers = Vec::new();
    for (algorithm, parameters) in algorithms {
        let key = components.to_parsed_public_key(parameters).map_err(|_| JwkError::WeakRsa)?;
        verifiers.push((algorithm, key));
    }
    Ok((format!(r#"{{"e":"{e}","kty":"RSA","n":"{n}"}}"#), verifiers))
}

/// RFC 7517, 4.2 and 4.3.
fn usage(jwk: &Map<String, Value>) -> Result<(), JwkError> {
    if text(jwk, "use")?.is_some_and(|usage| usage != "sig") {
        return Err(JwkError::Usage);
    }
    match jwk.get("key_ops") {
        None => Ok(()),
        Some(Value::Array(operations)) if operations.iter().any(|operation| operation == "verify") => Ok(()),
        Some(Value::Array(_)) => Err(JwkError::Usage),
        Some(_) => Err(JwkError::Malformed),
    }
}

fn text<'a>(jwk: &'a Map<String, Value>, name: &str) -> Result<Option<&'a str>, JwkError> {
    jwk.get(name).map(|value| value.as_str().ok_or(JwkError::Malformed)).transpose()
}

fn required<'a>(jwk: &'a Map<String, Value>, name: &str) -> Result<&'a str, JwkError> {
    text(jwk, name)?.ok_or(JwkError::Malformed)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::proofs::testing::{Signer, ec_jwk, edwards_jwk, rfc7515, rfc7638_jwk};

    fn key(jwk: &Value) -> Result<PublicKey, JwkError> {
        PublicKey::parse(jwk.as_object().unwrap())
    }

    fn with(mut jwk: Value, name: &str, value: Value) -> Value {
        jwk[name] = value;
        jwk
    }

    fn set(keys: &[Value]) -> Result<KeySet, JwksError> {
        KeySet::parse(json!({ "keys": keys }).to_string().as_bytes())
    }

    fn header(kid: Option<&str>, algorithm: Algorithm) -> Header {
        Header { algorithm, kid: kid.map(str::to_owned), typ: None, jwk: None }
    }

    #[test]
    fn thumbprints_are_those_of_rfc_7638_and_rfc_8037() {
        let thumbprint = |jwk: &Value| base64url::encode(key(jwk).unwrap().thumbprint);
        assert_eq!(thumbprint(&rfc7638_jwk()), "NzbLsXh8uDCcd-6MNwXF4W_7noWXFZAfHkxZsRGC9Xs");
        assert_eq!(thumbprint(&edwards_jwk()), "kPrK_qmxVWaYVA9wwBF6Iuo3vVzz7TxHCTwXBygrS4k");
    }

    #[test]
    fn signatures_of_rfc_7515_and_rfc_8037_verify_and_changed_ones_do_not() {
        for (algorithm, jwk, signed, signature) in rfc7515() {
            let key = key(&jwk).unwrap();
            let signature = base64url::decode(signature).unwrap();
            assert!(key.verifies(algorithm, signed.as_bytes(), &signature), "{algorithm:?}");
            for index in 0..signature.len() {
                let mut changed = signature.clone();
                changed[index] ^= 1;
                assert!(!key.verifies(algorithm, signed.as_bytes(), &changed), "{algorithm:?}, byte {index}");
            }
            for other in Algorithm::ALL.into_iter().filter(|other| *other != algorithm) {
                let same = (algorithm, other) == (Algorithm::EdDsa, Algorithm::Ed25519);
                assert_eq!(key.verifies(other, signed.as_bytes(), &signature), same, "{algorithm:?} as {other:?}");
            }
        }
    }

    #[test]
    fn bad_keys_are_refused_for_their_own_reason() {
        let (ec, ed, rsa) = (ec_jwk(), edwards_jwk(), rfc7638_jwk());
        let zero32 = base64url::encode([0; 32]);
        let modulus = |bytes: usize| base64url::encode(vec![0xff; bytes]);
        for (jwk, expected) in [
            (json!({}), "jwk_malformed"),
            (json!({ "kty": "oct", "k": "AAAA" }), "jwk_symmetric"),
            (json!({ "kty": "oct" }), "jwk_symmetric"),
            (with(ec.clone(), "d", json!("AA")), "jwk_private"),
            (with(rsa.clone(), "p", json!("AA")), "jwk_private"),
            (with(ec.clone(), "k", json!("AA")), "jwk_private"),
            (with(ec.clone(), "kty", json!("XX")), "jwk_unsupported"),
            (with(ec.clone(), "crv", json!("P-521")), "jwk_unsupported"),
            (with(ec.clone(), "crv", json!("secp256k1")), "jwk_unsupported"),
            (with(ed.clone(), "crv", json!("X25519")), "jwk_unsupported"),
            (with(ec.clone(), "alg", json!("HS256")), "jwk_unsupported"),
            (with(ec.clone(), "alg", json!("RS256")), "jwk_malformed"),
            (with(ec.clone(), "use", json!("enc")), "jwk_usage"),
            (with(ec.clone(), "key_ops", json!(["sign"])), "jwk_usage"),
            (with(ec.clone(), "key_ops", json!("verify")), "jwk_malformed"),
            (with(ec.clone(), "kid", json!(7)), "jwk_malformed"),
            (with(ec.clone(), "x", json!("AAAA")), "jwk_malformed"),
            (with(ec.clone(), "x", json!(format!("{}=", ec["x"].as_str().unwrap()))), "jwk_malformed"),
            (with(ec.clone(), "y", json!(zero32)), "jwk_point"),
            (with(with(ec.clone(), "x", json!(zero32)), "y", json!(zero32)), "jwk_point"),
            (with(ed.clone(), "x", json!("AAAA")), "jwk_malformed"),
            (with(rsa.clone(), "n", json!(modulus(255))), "jwk_weak_rsa"),
            (with(rsa.clone(), "n", json!(modulus(1025))), "jwk_weak_rsa"),
            (with(rsa.clone(), "n", json!(format!("AAAA{}", modulus(255)))), "jwk_malformed"),
            (with(rsa.clone(), "n", json!(base64url::encode([0xfe; 256]))), "jwk_weak_rsa"),
            (with(rsa.clone(), "e", json!("Aw")), "jwk_weak_rsa"),
            (with(rsa.clone(), "e", json!("AQ")), "jwk_weak_rsa"),
            (with(rsa.clone(), "e", json!("AQAA")), "jwk_weak_rsa"),
            (with(rsa.clone(), "e", json!(modulus(256))), "jwk_weak_rsa"),
            (with(rsa, "e", json!("")), "jwk_malformed"),
        ] {
            assert_eq!(key(&jwk).err().map(|error| error.reason()), Some(expected), "{jwk}");
        }
    }

    #[test]
    fn a_set_leaves_out_what_it_cannot_use_and_refuses_what_nobody_may_publish() {
        let (ec, ed) = (with(ec_jwk(), "kid", json!("a")), with(edwards_jwk(), "kid", json!("b")));
        let mixed = [ec.clone(), json!({ "kty": "new" }), with(ed.clone(), "use", json!("enc")), ec.clone(), ed];
        let mixed = set(&mixed).unwrap();
        assert_eq!((mixed.len(), mixed.skipped), (2, 3));
        let refused = |keys: &[Value]| set(keys).unwrap_err().reason();
        assert_eq!(refused(&[ec.clone(), with(ec.clone(), "d", json!("AA"))]), "jwks_private_material");
        assert_eq!(refused(&[ec.clone(), json!({ "kty": "oct", "k": "AA" })]), "jwks_private_material");
        assert_eq!(refused(&[]), "jwks_no_usable_key");
        assert_eq!(refused(&vec![ec; MAX_KEYS + 1]), "jwks_too_many_keys");
        for (bytes, expected) in [
            (&b"<html>"[..], "json_syntax"),
            (b"{}", "jwks_shape"),
            (b"{\"keys\":{}}", "jwks_shape"),
            (b"{\"keys\":[1]}", "jwks_shape"),
            (b"{\"keys\":[],\"keys\":[]}", "json_duplicate_member"),
        ] {
            assert_eq!(KeySet::parse(bytes).unwrap_err().reason(), expected);
        }
        assert_eq!(KeySet::parse(&vec![b' '; SET.bytes + 1]).unwrap_err().reason(), "json_oversize");
    }

    #[test]
    fn a_header_means_one_key_or_none() {
        let (first, second) = (Signer::es256("a"), Signer::es256("b"));
        let ed = with(edwards_jwk(), "kid", json!("a"));
        let both = set(&[first.jwk(), second.jwk(), ed]).unwrap();
        let selected = |kid, algorithm| both.select(&header(kid, algorithm)).map(|key| key.thumbprint);
        assert_eq!(selected(Some("b"), Algorithm::Es256), Ok(key(&second.jwk()).unwrap().thumbprint));
        assert_eq!(selected(Some("a"), Algorithm::EdDsa), Ok(key(&edwards_jwk()).unwrap().thumbprint));
        assert_eq!(selected(None, Algorithm::EdDsa), Ok(key(&edwards_jwk()).unwrap().thumbprint));
        assert_eq!(selected(None, Algorithm::Es256), Err(SelectError::KidMissing));
        assert_eq!(selected(None, Algorithm::Rs256), Err(SelectError::KidMissing));
        assert_eq!(selected(Some("b"), Algorithm::EdDsa), Err(SelectError::Mismatch));
        for kid in ["c", "A", "a ", "../a", "a' OR '1'='1", "/dev/null"] {
            assert_eq!(selected(Some(kid), Algorithm::Es256), Err(SelectError::UnknownKid), "{kid}");
        }
        let twice = set(&[first.jwk(), with(second.jwk(), "kid", json!("a"))]).unwrap();
        assert_eq!(twice.select(&header(Some("a"), Algorithm::Es256)).unwrap_err(), SelectError::Ambiguous);
    }
}

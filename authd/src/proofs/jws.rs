//! JWS in its compact form (RFC 7515, 3.1): three parts and a header that may not surprise anybody.
//!
//! Enters: text. Leaves: the parts, with an algorithm that the caller allows. Never: trust; nothing is verified here, and
//! nothing that a header says about where keys are is followed.

use std::fmt;

use super::{
    base64url,
    json::{self, JsonError, Limits, Map, Value},
};

/// Longer than every token that fits a usual header field.
pub const MAX_BYTES: usize = 16 << 10;
/// An opaque name; every issuer's is shorter.
pub const MAX_KID_BYTES: usize = 256;

const HEADER: Limits = Limits { bytes: 4 << 10, depth: 4, members: 32 };

/// Signature algorithms that exist here at all (RFC 7518, 3.1; RFC 8037; RFC 9864). `none` and shared secrets do not.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Algorithm {
    Rs256,
    Rs384,
    Rs512,
    Ps256,
    Ps384,
    Ps512,
    Es256,
    Es384,
    /// With Ed25519 keys only.
    EdDsa,
    Ed25519,
}

impl Algorithm {
    pub const ALL: [Self; 10] = [
        Self::Rs256,
        Self::Rs384,
        Self::Rs512,
        Self::Ps256,
        Self::Ps384,
        Self::Ps512,
        Self::Es256,
        Self::Es384,
        Self::EdDsa,
        Self::Ed25519,
    ];

    pub fn name(self) -> &'static str {
        match self {
            Self::Rs256 => "RS256",
            Self::Rs384 => "RS384",
            Self::Rs512 => "RS512",
            Self::Ps256 => "PS256",
            Self::Ps384 => "PS384",
            Self::Ps512 => "PS512",
            Self::Es256 => "ES256",
            Self::Es384 => "ES384",
            Self::EdDsa => "EdDSA",
            Self::Ed25519 => "Ed25519",
        }
    }

    /// By its exact name: `nOnE` and `es256` are not algorithms.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|algorithm| algorithm.name() == name)
    }
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum JwsError {
    // What the sender made wrong.
    #[error("the token is too long")]
    Oversize,
    #[error("the token is not three parts with dots between them")]
    Parts,
    #[error("a part of the token is no canonical base64url")]
    Encoding,
    #[error("the header: {0}")]
    Header(JsonError),
    #[error("a member of the header has the wrong type")]
    HeaderType,
    #[error("the header's key id is too long or has characters that no key id has")]
    KeyId,
    // What is refused whoever sent it.
    #[error("the token is not signed")]
    Unsigned,
    #[error("the token is signed with a shared secret")]
    Symmetric,
    #[error("the algorithm is not allowed here")]
    Algorithm,
    #[error("the header has critical extensions, and none is understood")]
    Critical,
    #[error("the payload is not encoded (RFC 7797)")]
    UnencodedPayload,
    #[error("the header says where its key is, which is never followed")]
    KeyReference,
    #[error("the header brings its own key, which is never believed")]
    EmbeddedKey,
    #[error("the header has no key, and has to")]
    NoKey,
}

impl JwsError {
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Oversize => "token_oversize",
            Self::Parts => "token_malformed",
            Self::Encoding => "token_encoding",
            Self::Header(error) => error.reason(),
            Self::HeaderType => "header_malformed",
            Self::KeyId => "kid_malformed",
            Self::Unsigned => "alg_none",
            Self::Symmetric => "alg_symmetric",
            Self::Algorithm => "alg_not_allowed",
            Self::Critical => "crit_unsupported",
            Self::UnencodedPayload => "payload_unencoded",
            Self::KeyReference => "header_key_reference",
            Self::EmbeddedKey => "header_embedded_key",
            Self::NoKey => "header_key_missing",
        }
    }
}

/// Whether the key comes with the header. Only a DPoP proof brings its own (RFC 9449, 4.2).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum KeyInHeader {
    Refused,
    Required,
}

#[derive(Clone, Debug)]
pub struct Header {
    pub algorithm: Algorithm,
    pub kid: Option<String>,
    pub typ: Option<String>,
    /// There exactly if the caller requires it.
    pub jwk: Option<Map<String, Value>>,
}

impl Header {
    /// Whether `typ` is this media type, with or without `application/` (RFC 7515, 4.1.9).
    pub fn has_type(&self, expected: &str) -> bool {
        self.typ.as_deref().is_some_and(|typ| {
            let short = match typ.split_at_checked("application/".len()) {
                Some((prefix, rest)) if prefix.eq_ignore_ascii_case("application/") => rest,
                _ => typ,
            };
            short.eq_ignore_ascii_case(expected)
        })
    }
}

/// A token in its parts. Not verified.
pub struct Compact<'a> {
    pub header: Header,
    pub payload: Vec<u8>,
    pub signature: Vec<u8>,
    /// What was signed.
    pub signed: &'a str,
}

/// The payload may be anybody's, and the signature makes it one's own.
impl fmt::Debug for Compact<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Compact").field("header", &self.header).finish_non_exhaustive()
    }
}

/// Takes a token apart.
pub fn parse<'a>(token: &'a str, allowed: &[Algorithm], key: KeyInHeader) -> Result<Compact<'a>, JwsError> {
    let (header, signed, payload, signature) = split(token)?;
    let header = json::object(&decode(header)?, HEADER).map_err(JwsError::Header)?;
    let header = check(header, allowed, key)?;
    Ok(Compact { header, payload: decode(payload)?, signature: decode(signature)?, signed })
}

/// A JSON object.
pub type Object = Map<String, Value>;

/// Header and payload as they are, for people. Nothing of it is true because it stands there.
pub fn inspect(token: &str) -> Result<(Object, Object), JwsError> {
    let (header, _, payload, _) = split(token)?;
    let read = |part| json::object(&decode(part)?, json::CLAIMS).map_err(JwsError::Header);
    Ok((read(header)?, read(payload)?))
}

/// What was signed (RFC 7515, 5.1): the token without its signature.
pub fn signing_input(token: &str) -> Result<&str, JwsError> {
    split(token).map(|(_, signed, _, _)| signed)
}

/// Header, what was signed, payload, signature.
fn split(token: &str) -> Result<(&str, &str, &str, &str), JwsError> {
    if token.len() > MAX_BYTES {
        return Err(JwsError::Oversize);
    }
    let (signed, signature) = token.rsplit_once('.').ok_or(JwsError::Parts)?;
    let (header, payload) = signed.split_once('.').ok_or(JwsError::Parts)?;
    // An empty signature is what an unsigned token has; its header says so with a reason of its own.
    if header.is_empty() || payload.contains('.') {
        return Err(JwsError::Parts);
    }
    Ok((header, signed, payload, signature))
}

fn decode(part: &str) -> Result<Vec<u8>, JwsError> {
    base64url::decode(part).map_err(|_| JwsError::Encoding)
}

fn check(mut header: Map<String, Value>, allowed: &[Algorithm], key: KeyInHeader) -> Result<Header, JwsError> {
    let algorithm = match header.get("alg") {
        Some(Value::String(name)) => algorithm(name, allowed)?,
        _ => return Err(JwsError::HeaderType),
    };
    if header.get("b64").is_some_and(|b64| *b64 != Value::Bool(true)) {
        return Err(JwsError::UnencodedPayload);
    }
    if header.contains_key("crit") {
        return Err(JwsError::Critical);
    }
    if header.contains_key("jku") || header.contains_key("x5u") {
        return Err(JwsError::KeyReference);
    }
    if header.contains_key("x5c") {
        return Err(JwsError::EmbeddedKey);
    }
    let jwk = match (header.remove("jwk"), key) {
        (Some(Value::Object(jwk)), KeyInHeader::Required) => Some(jwk),
        (Some(_), KeyInHeader::Required) => return Err(JwsError::HeaderType),
        (None, KeyInHeader::Required) => return Err(JwsError::NoKey),
        (Some(_), KeyInHeader::Refused) => return Err(JwsError::EmbeddedKey),
        (None, KeyInHeader::Refused) => None,
    };
    let mut text = |name: &str| match header.remove(name) {
        None => Ok(None),
        Some(Value::String(text)) => Ok(Some(text)),
        Some(_) => Err(JwsError::HeaderType),
    };
    let (kid, typ) = (text("kid")?, text("typ")?);
    if kid.as_deref().is_some_and(|kid| !is_key_id(kid)) {
        return Err(JwsError::KeyId);
    }
    Ok(Header { algorithm, kid, typ, jwk })
}

/// A key id is compared and recorded, nothing else; it may not be long, or have what a terminal would act on.
pub fn is_key_id(kid: &str) -> bool {
    !kid.is_empty() && kid.len() <= MAX_KID_BYTES && !kid.chars().any(char::is_control)
}

fn algorithm(name: &str, allowed: &[Algorithm]) -> Result<Algorithm, JwsError> {
    match Algorithm::from_name(name) {
        Some(algorithm) if allowed.contains(&algorithm) => Ok(algorithm),
        _ if name.eq_ignore_ascii_case("none") => Err(JwsError::Unsigned),
        _ if name.get(..2).is_some_and(|start| start.eq_ignore_ascii_case("HS")) => Err(JwsError::Symmetric),
        _ => Err(JwsError::Algorithm),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn reason(header: &str) -> &'static str {
        let token = format!("{}.e30.AA", base64url::encode(header));
        parse(&token, &[Algorithm::Es256], KeyInHeader::Refused).err().map_or("taken", |error| error.reason())
    }

    #[test]
    fn the_header_that_issuers_send_is_taken() {
        assert_eq!(reason(r#"{"alg":"ES256","kid":"2026-11","typ":"at+jwt","x5t":"AA","cty":"x"}"#), "taken");
        assert_eq!(reason(r#"{"alg":"ES256","b64":true}"#), "taken");
    }

    #[test]
    fn every_other_header_is_refused_for_its_own_reason() {
        for (header, expected) in [
            (r#"{"alg":"RS256"}"#, "alg_not_allowed"),
            (r#"{"alg":"es256"}"#, "alg_not_allowed"),
            (r#"{"alg":"ES256K"}"#, "alg_not_allowed"),
            (r#"{"alg":""}"#, "alg_not_allowed"),
            (r#"{"alg":"é"}"#, "alg_not_allowed"),
            (r#"{"alg":"HS256"}"#, "alg_symmetric"),
            (r#"{"alg":"hs512"}"#, "alg_symmetric"),
            (r#"{}"#, "header_malformed"),
            (r#"{"alg":["ES256"]}"#, "header_malformed"),
            (r#"{"alg":null}"#, "header_malformed"),
            (r#"{"alg":"ES256","kid":1}"#, "header_malformed"),
            (r#"{"alg":"ES256","typ":{}}"#, "header_malformed"),
            (r#"{"alg":"ES256","kid":""}"#, "kid_malformed"),
            (r#"{"alg":"ES256","kid":"a\u001b[2J"}"#, "kid_malformed"),
            (r#"{"alg":"ES256","crit":["exp"]}"#, "crit_unsupported"),
            (r#"{"alg":"ES256","crit":[]}"#, "crit_unsupported"),
            (r#"{"alg":"ES256","b64":false,"crit":["b64"]}"#, "payload_unencoded"),
            (r#"{"alg":"ES256","b64":0}"#, "payload_unencoded"),
            (r#"{"alg":"ES256","jku":"https://evil.example/k"}"#, "header_key_reference"),
            (r#"{"alg":"ES256","x5u":"https://evil.example/c"}"#, "header_key_reference"),
            (r#"{"alg":"ES256","x5c":["AA"]}"#, "header_embedded_key"),
            (r#"{"alg":"ES256","jwk":{"kty":"EC"}}"#, "header_embedded_key"),
            (r#"{"alg":"ES256","alg":"none"}"#, "json_duplicate_member"),
            (r#"{"alg":"ES256","x":[[[[1]]]]}"#, "json_depth"),
            (r#"{"alg":"ES256"} {}"#, "json_syntax"),
            (r#"["ES256"]"#, "json_not_object"),
        ] {
            assert_eq!(reason(header), expected, "{header}");
        }
        assert_eq!(reason(&format!(r#"{{"alg":"ES256","kid":"{}"}}"#, "k".repeat(257))), "kid_malformed");
        assert_eq!(reason(&format!(r#"{{"alg":"ES256","x":"{}"}}"#, "k".repeat(5000))), "json_oversize");
    }

    #[test]
    fn none_is_refused_however_it_is_written() {
        for bits in 0..16u8 {
            let letter = |(i, c): (usize, char)| if bits >> i & 1 == 1 { c.to_ascii_uppercase() } else { c };
            let none: String = "none".chars().enumerate().map(letter).collect();
            assert_eq!(reason(&format!(r#"{{"alg":"{none}"}}"#)), "alg_none");
        }
        assert_eq!(reason(r#"{"alg":"none "}"#), "alg_not_allowed");
    }

    #[test]
    fn a_token_is_three_parts_of_canonical_base64url() {
        let header = base64url::encode(r#"{"alg":"ES256"}"#);
        let reason = |token: String| parse(&token, &Algorithm::ALL, KeyInHeader::Refused).unwrap_err().reason();
        for token in ["", ".", "a", "..", "a.b"].map(String::from).into_iter().chain([
            format!("{header}.e30"),
            format!("{header}.e30.AA.AA"),
            format!("{header}.e30.AA.AA.AA"),
        ]) {
            assert_eq!(reason(token.clone()), "token_malformed", "{token}");
        }
        for token in [
            format!("{header}=.e30.AA"),
            format!("{header}.e30=.AA"),
            format!("{header}.e30.AA=="),
            format!("{header}.e30.AB"),
            format!("{header}.e30.A+"),
            format!("{header}.e30 .AA"),
            format!("{header}.e30.AA\n"),
        ] {
            assert_eq!(reason(token.clone()), "token_encoding", "{token:?}");
        }
        assert_eq!(reason(format!("{header}.{}.AA", "A".repeat(MAX_BYTES))), "token_oversize");
    }

    #[test]
    fn media_types_are_compared_as_such() {
        let header = |typ: &str| Header { algorithm: Algorithm::Es256, kid: None, typ: Some(typ.into()), jwk: None };
        for typ in ["at+jwt", "AT+JWT", "application/at+jwt", "Application/AT+jwt"] {
            assert!(header(typ).has_type("at+jwt"), "{typ}");
        }
        for typ in ["at+jwt2", "jwt", "", "application/", "text/at+jwt", "application/application/at+jwt"] {
            assert!(!header(typ).has_type("at+jwt"), "{typ}");
        }
    }

    proptest! {
        #[test]
        fn no_text_makes_it_panic(token in "\\PC{0,60}|[A-Za-z0-9_-]{0,40}(\\.[A-Za-z0-9_-]{0,40}){0,4}") {
            let _ = parse(&token, &Algorithm::ALL, KeyInHeader::Required);
            let _ = inspect(&token);
        }
    }
}

//! Tokens of the node's own: signed access tokens (RFC 9068), and the keys by which others verify them (RFC 7517).
//!
//! Enters: a private key, claims that were decided. Leaves: a JWT, a public key. Never: a decision, or the private key.

use aws_lc_rs::{
    error::{KeyRejected, Unspecified},
    rand::SystemRandom,
    signature::{ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair, KeyPair},
};
use serde_json::{Map, Value, json};

use super::{
    base64url,
    claims::{Confirmation, SUBJECT_ISSUER, TENANT},
    exchange::Exchanged,
    jwk::{PublicKey, sha256},
};

/// One key, under the name by which tokens say that it signed them.
pub struct SigningKey {
    pair: EcdsaKeyPair,
    /// RFC 7638: whoever has the public key can tell that it is this one.
    kid: String,
    public: Map<String, Value>,
}

/// A token, and the hash that names it: [`super::claims::VerifiedToken::token_hash`].
pub struct Signed {
    pub text: String,
    pub hash: [u8; 32],
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum KeyError {
    #[error("it is no P-256 key in PKCS#8")]
    Rejected,
    #[error("the system gives no random numbers")]
    NoRandomness,
}

impl From<KeyRejected> for KeyError {
    fn from(_: KeyRejected) -> Self {
        Self::Rejected
    }
}

impl From<Unspecified> for KeyError {
    fn from(_: Unspecified) -> Self {
        Self::NoRandomness
    }
}

impl SigningKey {
    /// A new key, as it is kept: PKCS#8 (RFC 5208).
    pub fn generate() -> Result<Vec<u8>, KeyError> {
        let document = EcdsaKeyPair::generate_pkcs8(&ECDSA_P256_SHA256_FIXED_SIGNING, &SystemRandom::new())?;
        Ok(document.as_ref().to_vec())
    }

    pub fn from_pkcs8(der: &[u8]) -> Result<Self, KeyError> {
        let pair = EcdsaKeyPair::from_pkcs8(&ECDSA_P256_SHA256_FIXED_SIGNING, der)?;
        // An uncompressed point: a byte 4, then both coordinates (SEC 1, 2.3.3).
        let point = pair.public_key().as_ref().get(1..).and_then(|both| both.split_at_checked(32));
        let (x, y) = point.ok_or(KeyError::Rejected)?;
        let mut public = Map::from_iter([
            ("kty".to_owned(), Value::from("EC")),
            ("crv".to_owned(), Value::from("P-256")),
            ("x".to_owned(), Value::from(base64url::encode(x))),
            ("y".to_owned(), Value::from(base64url::encode(y))),
            ("alg".to_owned(), Value::from("ES256")),
            ("use".to_owned(), Value::from("sig")),
        ]);
        let kid = base64url::encode(PublicKey::parse(&public).map_err(|_| KeyError::Rejected)?.thumbprint);
        public.insert("kid".to_owned(), Value::from(kid.as_str()));
        Ok(Self { pair, kid, public })
    }

    pub fn kid(&self) -> &str {
        &self.kid
    }

    /// As a key set lists it.
    pub fn public(&self) -> &Map<String, Value> {
        &self.public
    }

    /// An access token with these claims.
    pub fn sign(&self, claims: &Map<String, Value>) -> Result<Signed, KeyError> {
        let header = json!({ "typ": "at+jwt", "alg": "ES256", "kid": self.kid });
        let claims = Value::from(claims.clone());
        let signed = format!("{}.{}", base64url::encode(header.to_string()), base64url::encode(claims.to_string()));
        let signature = self.pair.sign(&SystemRandom::new(), signed.as_bytes())?;
        let hash = sha256(signed.as_bytes());
        Ok(Signed { text: format!("{signed}.{}", base64url::encode(signature.as_ref())), hash })
    }
}

/// What an exchanged token says (RFC 9068, 2.2). The client is who acts.
pub fn claims(issuer: &str, jti: &str, exchanged: &Exchanged) -> Map<String, Value> {
    let Exchanged { subject, audience, scopes, issued_at, expires, confirmation, act, may_act, tenant, subject_issuer } =
        exchanged;
    let mut claims = Map::from_iter([
        ("iss".to_owned(), Value::from(issuer)),
        ("sub".to_owned(), Value::from(subject.as_str())),
        ("aud".to_owned(), Value::from(audience.clone())),
        ("client_id".to_owned(), act.get("sub").cloned().unwrap_or_default()),
        ("scope".to_owned(), Value::from(scopes.join(" "))),
        ("iat".to_owned(), Value::from(issued_at.as_second())),
        ("exp".to_owned(), Value::from(expires.as_second())),
        ("jti".to_owned(), Value::from(jti)),
        ("act".to_owned(), Value::from(act.clone())),
    ]);
    if !confirmation.is_none() {
        claims.insert("cnf".to_owned(), Value::from(confirmed(confirmation)));
    }
    if let Some(may_act) = may_act {
        claims.insert("may_act".to_owned(), Value::from(may_act.clone()));
    }
    if subject_issuer != issuer {
        claims.insert(SUBJECT_ISSUER.to_owned(), Value::from(subject_issuer.as_str()));
    }
    if let Some(tenant) = tenant {
        claims.insert(TENANT.to_owned(), Value::from(tenant.as_str()));
    }
    claims
}

/// RFC 7800, 3.1.
fn confirmed(confirmation: &Confirmation) -> Map<String, Value> {
    let Confirmation { x5t_s256, jkt } = confirmation;
    let member =
        |name: &str, hash: &Option<[u8; 32]>| Some((name.to_owned(), Value::from(base64url::encode((*hash)?))));
    [member("x5t#S256", x5t_s256), member("jkt", jkt)].into_iter().flatten().collect()
}

#[cfg(test)]
mod tests {
    use jiff::SignedDuration;

    use super::*;
    use crate::proofs::{
        claims::{Expected, IssuerPolicy, Leeway},
        jwk::KeySet,
        jws::Algorithm,
        jwt,
        testing::now,
    };

    const OWN: &str = "https://node-1.example.org:7443";

    fn exchanged() -> Exchanged {
        Exchanged {
            subject: "alice".into(),
            audience: vec!["ledger".into(), "wiki".into()],
            scopes: vec!["read".into(), "write".into()],
            issued_at: now(),
            expires: now() + SignedDuration::from_mins(5),
            confirmation: Confirmation { x5t_s256: Some([7; 32]), jkt: Some([8; 32]) },
            act: Map::from_iter([("sub".to_owned(), Value::from("spiffe://example.org/agent"))]),
            may_act: None,
            tenant: Some("acme".into()),
            subject_issuer: "https://idp.example.org".into(),
        }
    }

    fn policy() -> IssuerPolicy {
        IssuerPolicy {
            name: "own".into(),
            issuer: OWN.into(),
            algorithms: vec![Algorithm::Es256],
            max_ttl: None,
            leeway: Leeway::default(),
            require_at_jwt: true,
        }
    }

    #[test]
    fn a_token_says_what_was_exchanged_and_verifies_with_the_public_key() {
        let key = SigningKey::from_pkcs8(&SigningKey::generate().unwrap()).unwrap();
        let other = SigningKey::from_pkcs8(&SigningKey::generate().unwrap()).unwrap();
        let token = key.sign(&claims(OWN, "j-1", &exchanged())).unwrap();
        let set = |keys: &[&SigningKey]| {
            let keys: Vec<_> = keys.iter().map(|key| key.public().clone()).collect();
            KeySet::parse(json!({ "keys": keys }).to_string().as_bytes()).unwrap()
        };
        let verify = |keys: &KeySet| jwt::verify(&token.text, keys, &policy(), &Expected::default(), now());
        let found = verify(&set(&[&other, &key])).unwrap();
        let meant = exchanged();
        assert_eq!((found.subject, found.audience, found.scopes), (Some(meant.subject), meant.audience, meant.scopes));
        assert_eq!((found.jti.as_deref(), found.key_id.as_deref()), (Some("j-1"), Some(key.kid())));
        assert_eq!((found.expires, found.issued_at), (Some(meant.expires), Some(meant.issued_at)));
        assert_eq!((found.confirmation, found.act, found.may_act), (meant.confirmation, Some(meant.act), None));
        assert_eq!((found.tenant, found.token_hash), (meant.tenant, token.hash));
        assert_eq!(found.subject_issuer, Some(meant.subject_issuer));
        assert!(verify(&set(&[&other])).is_err());
    }

    #[test]
    fn what_is_no_key_is_refused() {
        let good = SigningKey::generate().unwrap();
        for wrong in [&[][..], &good[..good.len() - 1], b"key"] {
            assert_eq!(SigningKey::from_pkcs8(wrong).err(), Some(KeyError::Rejected));
        }
    }
}

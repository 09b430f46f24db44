//! What a client of the command line shows with its requests: a token, and that it has the key which the token is bound to (RFC 9449).
//!
//! Enters: files, requests. Leaves: headers, with a proof for one request alone. Never: the key.

use std::{path::Path, time::SystemTime};

use anyhow::Context;
use aws_lc_rs::{
    rand::SystemRandom,
    signature::{ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair, KeyPair},
};
use hyper::{
    HeaderMap, StatusCode,
    header::{AUTHORIZATION, HeaderName},
};
use rustls::pki_types::{PrivatePkcs8KeyDer, pem::PemObject};
use serde_json::json;

use super::grant::{secret, text_of};
use crate::{client::Target, digest::Digest, proofs::base64url};

/// A token, a key, or both.
#[derive(Default)]
pub struct Shown {
    token: Option<String>,
    key: Option<DpopKey>,
    nonce: Option<String>,
}

impl Shown {
    pub fn read(token: Option<&Path>, key: Option<&Path>) -> anyhow::Result<Self> {
        let (token, key) = (token.map(text_of).transpose()?, key.map(DpopKey::read).transpose()?);
        Ok(Self { token, key, nonce: None })
    }

    /// For one POST.
    pub fn headers(&self, target: &Target, path: &str) -> anyhow::Result<HeaderMap> {
        let mut headers = HeaderMap::new();
        if let Some(token) = &self.token {
            let scheme = if self.key.is_some() { "DPoP" } else { "Bearer" };
            headers.insert(AUTHORIZATION, secret(&format!("{scheme} {token}"))?);
        }
        if let Some(key) = &self.key {
            let proof = key.proof(target, path, self.token.as_deref(), self.nonce.as_deref())?;
            headers.insert(HeaderName::from_static("dpop"), secret(&proof)?);
        }
        Ok(headers)
    }

    /// Whether to ask again: the server says which nonce it wants, once (RFC 9449, 8).
    pub fn again(&mut self, status: StatusCode, headers: &HeaderMap) -> bool {
        let wanted = headers.get("dpop-nonce").and_then(|value| value.to_str().ok());
        let again = status.is_client_error() && self.key.is_some() && self.nonce.is_none() && wanted.is_some();
        if again {
            self.nonce = wanted.map(str::to_owned);
        }
        again
    }
}

/// A key that tokens are bound to (RFC 9449).
struct DpopKey {
    pair: EcdsaKeyPair,
}

impl DpopKey {
    fn read(path: &Path) -> anyhow::Result<Self> {
        let wrong = || format!("{}: no P-256 key in PKCS#8 PEM", path.display());
        let der = PrivatePkcs8KeyDer::from_pem_file(path).with_context(wrong)?;
        let pair = EcdsaKeyPair::from_pkcs8(&ECDSA_P256_SHA256_FIXED_SIGNING, der.secret_pkcs8_der())
            .ok()
            .with_context(wrong)?;
        Ok(Self { pair })
    }

    /// A proof for one POST (RFC 9449, 4.2).
    fn proof(&self, target: &Target, path: &str, token: Option<&str>, nonce: Option<&str>) -> anyhow::Result<String> {
        let scheme = match target {
            Target::Socket(_) => "http",
            Target::Peer { .. } => "https",
        };
        let url = format!("{scheme}://{}{path}", target.authority());
        // An uncompressed point: a byte 4, then both coordinates (SEC 1, 2.3.3).
        let point: &[u8] = self.pair.public_key().as_ref();
        let (x, y) = point.get(1..).and_then(|both| both.split_at_checked(32)).context("a P-256 point")?;
        let jwk = json!({ "kty": "EC", "crv": "P-256", "x": base64url::encode(x), "y": base64url::encode(y) });
        let header = json!({ "typ": "dpop+jwt", "alg": "ES256", "jwk": jwk });
        let mut jti = [0; 16];
        aws_lc_rs::rand::fill(&mut jti)?;
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH)?.as_secs();
        let mut claims = json!({ "jti": base64url::encode(jti), "htm": "POST", "htu": url, "iat": now });
        if let Some(token) = token {
            claims["ath"] = base64url::encode(Digest::of(token.as_bytes()).as_bytes()).into();
        }
        if let Some(nonce) = nonce {
            claims["nonce"] = nonce.into();
        }
        let signed = format!("{}.{}", base64url::encode(header.to_string()), base64url::encode(claims.to_string()));
        let signature = self.pair.sign(&SystemRandom::new(), signed.as_bytes())?;
        Ok(format!("{signed}.{}", base64url::encode(signature.as_ref())))
    }
}

//! A token check as control does it, against the bare check of the same signature with the same library.

use std::{hint::black_box, sync::Arc};

use anyhow::{Context, Result, ensure};
use authd::{
    control::{prove, verifier::Verifier},
    ipc::Settings,
    proofs::base64url,
};
use aws_lc_rs::{
    rand::SystemRandom,
    rsa::KeySize,
    signature::{
        ECDSA_P256_SHA256_FIXED, ECDSA_P256_SHA256_FIXED_SIGNING, ED25519, EcdsaKeyPair, Ed25519KeyPair, KeyPair,
        ParsedPublicKey, RSA_PKCS1_2048_8192_SHA256, RSA_PKCS1_SHA256, RsaKeyPair,
    },
};
use base64::{Engine, engine::general_purpose::STANDARD};
use jiff::Timestamp;
use serde_json::{Value, json};

use super::{as_fast_as, compared};
use crate::compare::{Comparison, each};

const POLICY: &str = r#"
trust_domain = "example.org"
[[workload]]
name = "one"
kind = "service"
cgroup = "/one"
[[issuer]]
name = "corp"
kind = "jwt"
issuer = "https://idp.example.org"
jwks_file = "jwks.json"
algorithms = ["ES256", "RS256", "EdDSA"]
max_ttl = "1h"
[[service]]
name = "ledger"
addresses = ["192.0.2.1"]
ports = ["tcp/7101"]
[[rule]]
name = "token"
from = ["one"]
to = ["ledger"]
require = ["token"]
token = { issuer = "corp", audience = "ledger", scopes = ["ledger:write"] }
"#;

struct Effort {
    slices: usize,
    checks: u32,
}

const FULL: Effort = Effort { slices: 200, checks: 200 };
const QUICK: Effort = Effort { slices: 60, checks: 50 };

pub fn run(quick: bool) -> Result<Vec<Comparison>> {
    let effort = if quick { QUICK } else { FULL };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let mut results = Vec::new();
    for signer in [Signer::es256()?, Signer::rs256()?, Signer::ed25519()?] {
        let verifier = Verifier::new(signer.settings(), None, Arc::default());
        let token = signer.token()?;
        let (signed, signature) = token.rsplit_once('.').context("a token")?;
        let signature = base64url::decode(signature).ok().context("a signature")?;
        let rule = verifier.model.rules.iter().find(|rule| rule.name == "token").context("the rule")?;
        let requirement = rule.token.as_ref().context("its token")?;
        let issuer = verifier.issuers.get(requirement.issuer).context("its issuer")?;
        let check = || {
            let check = prove::verify(&verifier, issuer, requirement, &rule.name, black_box(&token), Timestamp::now());
            runtime.block_on(check).map_err(|problem| anyhow::anyhow!("{problem:?}"))
        };
        let bare = || {
            let checked = signer.public.verify_sig(black_box(signed.as_bytes()), &signature);
            checked.ok().context("the signature is good")
        };
        ensure!(check()?.subject.as_deref() == Some("one"), "another token");
        let (mut uncached, mut cached) = (Vec::new(), Vec::new());
        for _ in 0..effort.slices {
            let theirs = each(effort.checks, bare)?;
            let ours = each(effort.checks, || {
                verifier.forget();
                check().map(drop)
            })?;
            let remembered = each(effort.checks, || check().map(drop))?;
            uncached.push((ours, theirs));
            cached.push((remembered, theirs));
        }
        let of = |what: &str| format!("token check, {}, {what}, against bare signature check", signer.algorithm);
        results.push(compared(of("new"), &uncached, as_fast_as(0.9)));
        results.push(compared(of("remembered"), &cached, as_fast_as(20.0)));
    }
    Ok(results)
}

type Sign = Box<dyn Fn(&[u8]) -> Result<Vec<u8>>>;

/// An issuer with one key.
struct Signer {
    algorithm: &'static str,
    jwk: Value,
    public: ParsedPublicKey,
    sign: Sign,
}

impl Signer {
    fn es256() -> Result<Self> {
        let pair = EcdsaKeyPair::generate(&ECDSA_P256_SHA256_FIXED_SIGNING)?;
        let point = pair.public_key().as_ref().to_vec();
        let (x, y) = point.get(1..65).context("an uncompressed point")?.split_at(32);
        Ok(Self {
            algorithm: "ES256",
            jwk: json!({ "kty": "EC", "crv": "P-256", "x": base64url::encode(x), "y": base64url::encode(y) }),
            public: ParsedPublicKey::new(&ECDSA_P256_SHA256_FIXED, &point)?,
            sign: Box::new(move |bytes| Ok(pair.sign(&SystemRandom::new(), bytes)?.as_ref().to_vec())),
        })
    }

    fn rs256() -> Result<Self> {
        let pair = RsaKeyPair::generate(KeySize::Rsa2048)?;
        // RSAPublicKey (RFC 8017, A.1.1): a sequence of a modulus, of 256 bytes here behind its sign, and 65537.
        let public = pair.public_key().as_ref().to_vec();
        let n = public.get(9..265).context("a modulus")?;
        Ok(Self {
            algorithm: "RS256",
            jwk: json!({ "kty": "RSA", "n": base64url::encode(n), "e": "AQAB" }),
            public: ParsedPublicKey::new(&RSA_PKCS1_2048_8192_SHA256, &public)?,
            sign: Box::new(move |bytes| {
                let mut signature = vec![0; pair.public_modulus_len()];
                pair.sign(&RSA_PKCS1_SHA256, &SystemRandom::new(), bytes, &mut signature)?;
                Ok(signature)
            }),
        })
    }

    fn ed25519() -> Result<Self> {
        let pair = Ed25519KeyPair::generate()?;
        let x = pair.public_key().as_ref().to_vec();
        Ok(Self {
            algorithm: "EdDSA",
            jwk: json!({ "kty": "OKP", "crv": "Ed25519", "x": base64url::encode(&x) }),
            public: ParsedPublicKey::new(&ED25519, &x)?,
            sign: Box::new(move |bytes| Ok(pair.sign(bytes).as_ref().to_vec())),
        })
    }

    /// What the daemon hands to control.
    fn settings(&self) -> Settings {
        let mut jwk = self.jwk.clone();
        jwk["kid"] = json!("k1");
        let keys = json!({ "keys": [jwk] }).to_string();
        Settings {
            sources: vec![("bench.toml".to_owned(), POLICY.to_owned())],
            files: [("jwks.json".to_owned(), STANDARD.encode(keys))].into(),
            ..Settings::default()
        }
    }

    /// One as issuers make them (RFC 9068).
    fn token(&self) -> Result<String> {
        let now = Timestamp::now().as_second();
        let claims = json!({
            "iss": "https://idp.example.org", "sub": "one", "aud": "ledger", "client_id": "one",
            "scope": "ledger:read ledger:write", "iat": now, "exp": now + 3_000, "jti": "0b8a7c62-6f0e-4c5c-9b1e-6f3f1c0f5a77",
        });
        let header = json!({ "alg": self.algorithm, "typ": "at+jwt", "kid": "k1" });
        let signed = format!("{}.{}", base64url::encode(header.to_string()), base64url::encode(claims.to_string()));
        let signature = (self.sign)(signed.as_bytes())?;
        Ok(format!("{signed}.{}", base64url::encode(signature)))
    }
}

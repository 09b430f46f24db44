//! The last step for a verified token, however it was verified: whether this request may use it.
//!
//! Enters: the token, what came with it in the request. Leaves: which bindings were met, and a DPoP proof that has yet to
//! be remembered. Never: half of the checks; a listener that calls this cannot forget one.

use jiff::Timestamp;

use super::{
    binding::{self, BindingError, Met, Presented},
    claims::VerifiedToken,
    dpop::{self, DpopError, Proof, ProofPolicy, Request, Target, nonce::Nonces},
    scheme::{Credentials, Scheme},
};

/// What came with a token.
#[derive(Clone, Copy)]
pub struct Shown<'a> {
    pub credentials: Credentials<'a>,
    /// Hash of the client's certificate, if the TLS handshake showed that it has its key.
    pub certificate: Option<[u8; 32]>,
    /// All values of the `DPoP` header.
    pub proofs: &'a [&'a [u8]],
    pub method: &'a str,
    pub target: &'a Target,
    /// Where proofs have to carry a nonce.
    pub nonces: Option<&'a Nonces>,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum AccessError {
    #[error(transparent)]
    Dpop(#[from] DpopError),
    #[error(transparent)]
    Binding(#[from] BindingError),
}

impl AccessError {
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Dpop(error) => error.reason(),
            Self::Binding(error) => error.reason(),
        }
    }

    pub fn oauth_error(&self) -> &'static str {
        match self {
            Self::Dpop(error) => error.oauth_error(),
            Self::Binding(error) => error.oauth_error(),
        }
    }
}

/// A token in the right hands.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Access {
    pub met: Met,
    /// To be given to [`dpop::replay::Replays::admit`], which can still refuse it.
    pub proof: Option<Proof>,
}

/// `bound`: whether the rule takes bound tokens only.
pub fn check(
    token: &VerifiedToken,
    shown: &Shown<'_>,
    bound: bool,
    policy: &ProofPolicy,
    now: Timestamp,
) -> Result<Access, AccessError> {
    let Credentials { scheme, token: text } = shown.credentials;
    let proof = match scheme {
        // What the scheme does not ask for is not looked at (RFC 9449, 7.1 pairs the two).
        Scheme::Bearer => None,
        Scheme::Dpop => {
            let Shown { method, target, nonces, .. } = *shown;
            let request = Request { method, target, access_token: Some(text), nonces };
            Some(dpop::verify(dpop::single(shown.proofs)?, &request, policy, now)?)
        }
    };
    let dpop_key = proof.map(|proof| proof.jkt);
    let presented = Presented { scheme, certificate: shown.certificate, dpop_key };
    let met = binding::check(&token.confirmation, &presented, bound)?;
    Ok(Access { met, proof })
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use serde_json::{Value, json};

    use super::*;
    use crate::proofs::{
        base64url,
        dpop::replay::{ReplayError, Replays},
        jwk::{KeySet, PublicKey, sha256},
        jwt::{self, Expected, IssuerPolicy},
        testing::{NOW, Signer, at, claims, now},
    };

    struct Scene {
        token: String,
        verified: VerifiedToken,
        client: Signer,
        target: Target,
    }

    impl Scene {
        /// A token that is bound to the client's key, and perhaps to a certificate.
        fn new(certificate: Option<[u8; 32]>) -> Self {
            let (issuer, client) = (Signer::es256("i"), Signer::new("c", crate::proofs::jws::Algorithm::EdDsa));
            let jkt = PublicKey::parse(client.jwk().as_object().unwrap()).unwrap().thumbprint;
            let mut claims = claims();
            claims["cnf"] = json!({ "jkt": base64url::encode(jkt) });
            if let Some(hash) = certificate {
                claims["cnf"]["x5t#S256"] = json!(base64url::encode(hash));
            }
            let token = issuer.token(&claims);
            let policy = IssuerPolicy {
                name: "corp".into(),
                issuer: "https://idp.example.org".into(),
                algorithms: vec![issuer.algorithm],
                max_ttl: Some(Duration::from_secs(600)),
                leeway: Default::default(),
                require_at_jwt: true,
            };
            let keys = KeySet::parse(&issuer.jwks()).unwrap();
            let verified = jwt::verify(&token, &keys, &policy, &Expected::default(), now()).unwrap();
            Self { token, verified, client, target: Target::parse("https://node.example.org:7443/v1/grants").unwrap() }
        }

        fn proof(&self, signer: &Signer, token: &str) -> String {
            let header = json!({ "typ": "dpop+jwt", "alg": signer.algorithm.name(), "jwk": signer.jwk() });
            let claims: Value = json!({
                "jti": "1", "htm": "POST", "htu": "https://node.example.org:7443/v1/grants", "iat": NOW,
                "ath": base64url::encode(sha256(token.as_bytes())),
            });
            signer.sign(&header.to_string(), &claims.to_string())
        }

        fn check(
            &self,
            scheme: Scheme,
            proofs: &[&[u8]],
            certificate: Option<[u8; 32]>,
            offset: i64,
        ) -> Result<Access, &'static str> {
            let credentials = Credentials { scheme, token: &self.token };
            let target = &self.target;
            let shown = Shown { credentials, certificate, proofs, method: "POST", target, nonces: None };
            check(&self.verified, &shown, true, &ProofPolicy::default(), at(offset)).map_err(|error| error.reason())
        }
    }

    #[test]
    fn a_stolen_bound_token_is_of_no_use() {
        let scene = Scene::new(Some([4; 32]));
        let good = scene.proof(&scene.client, &scene.token);
        let thiefs = scene.proof(&Signer::es256("t"), &scene.token);
        let for_another = scene.proof(&scene.client, "another");
        let mine = Some([4; 32]);
        let access = scene.check(Scheme::Dpop, &[good.as_bytes()], mine, 0).unwrap();
        assert_eq!(access.met, Met { certificate: true, dpop: true });
        for (scheme, proofs, certificate, offset, reason) in [
            (Scheme::Bearer, &[][..], mine, 0, "dpop_bound_as_bearer"),
            (Scheme::Bearer, &[good.as_bytes()], mine, 0, "dpop_bound_as_bearer"),
            (Scheme::Dpop, &[], mine, 0, "dpop_missing"),
            (Scheme::Dpop, &[good.as_bytes(), good.as_bytes()], mine, 0, "dpop_repeated"),
            (Scheme::Dpop, &[thiefs.as_bytes()], mine, 0, "dpop_key_mismatch"),
            (Scheme::Dpop, &[for_another.as_bytes()], mine, 0, "dpop_token_mismatch"),
            (Scheme::Dpop, &[good.as_bytes()], None, 0, "bound_certificate_missing"),
            (Scheme::Dpop, &[good.as_bytes()], Some([5; 32]), 0, "bound_certificate_mismatch"),
            (Scheme::Dpop, &[good.as_bytes()], mine, 60, "dpop_too_old"),
        ] {
            assert_eq!(scene.check(scheme, proofs, certificate, offset), Err(reason));
        }
        let mut replays = Replays::new(8);
        let proof = access.proof.unwrap();
        assert_eq!(replays.admit(&proof, now()), Ok(()));
        assert_eq!(replays.admit(&proof, at(59)), Err(ReplayError::Replayed));
    }
}

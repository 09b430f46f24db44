//! Whether the one who presents a token is the one it was issued to (RFC 8705, 3; RFC 9449, 7.1).
//!
//! Enters: what the token is bound to, and what was shown with it. Leaves: what was met. Never: a bound token taken as a
//! bearer token because its proof is missing.

use super::{claims::Confirmation, jwk::sha256, scheme::Scheme};

/// What came with the token, each part verified already.
#[derive(Clone, Copy, Debug)]
pub struct Presented {
    pub scheme: Scheme,
    /// Hash of the certificate whose key the client showed to have in its TLS handshake ([`certificate_hash`]).
    pub certificate: Option<[u8; 32]>,
    /// Thumbprint of the key of a DPoP proof that covers this request and this token.
    pub dpop_key: Option<[u8; 32]>,
}

/// What the token is bound to, and the presenter has.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Met {
    pub certificate: bool,
    pub dpop: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum BindingError {
    #[error("the rule takes bound tokens only, and this one is not bound")]
    NotBound,
    #[error("the token is bound to a client certificate, and none was shown")]
    CertificateMissing,
    #[error("the token is bound to another client certificate")]
    CertificateMismatch,
    #[error("the token is bound to a DPoP key, and was presented as a bearer token")]
    PresentedAsBearer,
    #[error("the token is bound to a DPoP key, and no proof came with it")]
    ProofMissing,
    #[error("the token is bound to another DPoP key")]
    ProofMismatch,
    #[error("the token was presented with DPoP, and is not bound to a DPoP key")]
    NotDpopBound,
}

impl BindingError {
    pub fn reason(&self) -> &'static str {
        match self {
            Self::NotBound => "token_not_bound",
            Self::CertificateMissing => "bound_certificate_missing",
            Self::CertificateMismatch => "bound_certificate_mismatch",
            Self::PresentedAsBearer => "dpop_bound_as_bearer",
            Self::ProofMissing => "dpop_missing",
            Self::ProofMismatch => "dpop_key_mismatch",
            Self::NotDpopBound => "dpop_not_bound",
        }
    }

    /// RFC 8705, 3, and RFC 9449, 7.1.
    pub fn oauth_error(&self) -> &'static str {
        match self {
            Self::ProofMissing => "invalid_dpop_proof",
            _ => "invalid_token",
        }
    }
}

/// Every confirmation that the token has must be met, whether the rule asks for one (`bound`) or not.
pub fn check(confirmation: &Confirmation, presented: &Presented, bound: bool) -> Result<Met, BindingError> {
    if bound && confirmation.is_none() {
        return Err(BindingError::NotBound);
    }
    let mut met = Met::default();
    if let Some(expected) = confirmation.x5t_s256 {
        match presented.certificate {
            None => return Err(BindingError::CertificateMissing),
            Some(hash) if hash != expected => return Err(BindingError::CertificateMismatch),
            Some(_) => met.certificate = true,
        }
    }
    match (confirmation.jkt, presented.scheme, presented.dpop_key) {
        (None, Scheme::Bearer, _) => {}
        (None, Scheme::Dpop, _) => return Err(BindingError::NotDpopBound),
        (Some(_), Scheme::Bearer, _) => return Err(BindingError::PresentedAsBearer),
        (Some(_), Scheme::Dpop, None) => return Err(BindingError::ProofMissing),
        (Some(expected), Scheme::Dpop, Some(key)) if key != expected => return Err(BindingError::ProofMismatch),
        (Some(_), Scheme::Dpop, Some(_)) => met.dpop = true,
    }
    Ok(met)
}

/// `x5t#S256` of a certificate in DER (RFC 8705, 3.1).
pub fn certificate_hash(der: &[u8]) -> [u8; 32] {
    sha256(der)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MINE: [u8; 32] = [1; 32];
    const OTHER: [u8; 32] = [2; 32];

    #[test]
    fn every_combination_is_decided_as_the_rfcs_say() {
        use Scheme::{Bearer, Dpop};
        let cases = [
            // Token's certificate and key; scheme, certificate and key that were shown; bound; result.
            (None, None, Bearer, None, None, false, Ok((false, false))),
            (None, None, Bearer, Some(MINE), Some(MINE), false, Ok((false, false))),
            (None, None, Bearer, Some(MINE), Some(MINE), true, Err("token_not_bound")),
            (None, None, Dpop, None, Some(MINE), false, Err("dpop_not_bound")),
            (Some(MINE), None, Dpop, Some(MINE), Some(MINE), false, Err("dpop_not_bound")),
            (Some(MINE), None, Bearer, Some(MINE), None, true, Ok((true, false))),
            (Some(MINE), None, Bearer, Some(OTHER), None, false, Err("bound_certificate_mismatch")),
            (Some(MINE), None, Bearer, None, None, false, Err("bound_certificate_missing")),
            (None, Some(MINE), Dpop, None, Some(MINE), true, Ok((false, true))),
            (None, Some(MINE), Dpop, None, Some(OTHER), false, Err("dpop_key_mismatch")),
            (None, Some(MINE), Dpop, None, None, false, Err("dpop_missing")),
            (None, Some(MINE), Bearer, None, None, false, Err("dpop_bound_as_bearer")),
            (None, Some(MINE), Bearer, None, Some(MINE), false, Err("dpop_bound_as_bearer")),
            (Some(MINE), Some(OTHER), Dpop, Some(MINE), Some(OTHER), true, Ok((true, true))),
            (Some(MINE), Some(OTHER), Dpop, None, Some(OTHER), true, Err("bound_certificate_missing")),
            (Some(MINE), Some(OTHER), Dpop, Some(OTHER), Some(OTHER), true, Err("bound_certificate_mismatch")),
            (Some(MINE), Some(OTHER), Dpop, Some(MINE), Some(MINE), true, Err("dpop_key_mismatch")),
            (Some(MINE), Some(OTHER), Bearer, Some(MINE), None, true, Err("dpop_bound_as_bearer")),
        ];
        for case @ (x5t_s256, jkt, scheme, certificate, dpop_key, bound, expected) in cases {
            let presented = Presented { scheme, certificate, dpop_key };
            let checked = check(&Confirmation { x5t_s256, jkt }, &presented, bound);
            let checked = checked.map(|met| (met.certificate, met.dpop)).map_err(|error| error.reason());
            assert_eq!(checked, expected, "{case:?}");
        }
    }
}

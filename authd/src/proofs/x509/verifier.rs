//! What rustls asks about client certificates during the handshake.
//!
//! Enters: a chain, and a signature over the handshake. Leaves: whether the caller holds the leaf's key. Never: whether
//! anybody vouches for the chain.
//!
//! That is safe because nothing is granted for a handshake. A caller that completes it has shown a key, and is nobody; a
//! request on the connection is somebody's only after [`Authority::verify`](super::bundle::Authority::verify) took the
//! chain, with the authorities, lists and revocations of that moment. Asked at the handshake, a refusal would be a TLS
//! alert without a reason, and an acceptance would outlive what it was for on a long connection or a resumed session. What
//! a stranger gains is a connection, which it could have without a certificate too: limits on connections count it the same.
//!
//! Possession is what only the handshake can prove, and it is checked here without exception: a chain without a valid
//! signature ends the handshake. On resumption (RFC 8446, 4.2.11) the chain comes out of the ticket, and was proven then.

use rustls::{
    CertificateError, DigitallySignedStruct, DistinguishedName, Error, SignatureScheme,
    client::danger::HandshakeSignatureValid,
    crypto,
    pki_types::{CertificateDer, UnixTime},
    server::danger::{ClientCertVerified, ClientCertVerifier},
};
use webpki::EndEntityCert;

use super::chain::{ALGORITHMS, within_limits};

/// Accepts any chain that is within the limits and readable, from whoever holds the key of its leaf.
/// Which versions of TLS are spoken is for the server's configuration to say.
#[derive(Debug)]
pub struct Possession;

impl ClientCertVerifier for Possession {
    /// Asked for, so that who has a certificate shows it.
    fn offer_client_auth(&self) -> bool {
        true
    }

    /// Not demanded: others show tokens and keys.
    fn client_auth_mandatory(&self) -> bool {
        false
    }

    /// None: which authorities there are is not told to strangers, and depends on the rule.
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        let chain: Vec<CertificateDer<'_>> = std::iter::once(end_entity).chain(intermediates).cloned().collect();
        within_limits(&chain).map_err(|_| CertificateError::ApplicationVerificationFailure)?;
        for certificate in &chain {
            EndEntityCert::try_from(certificate).map_err(|_| CertificateError::BadEncoding)?;
        }
        Ok(ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        crypto::verify_tls12_signature(message, certificate, signature, &ALGORITHMS)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        crypto::verify_tls13_signature(message, certificate, signature, &ALGORITHMS)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        ALGORITHMS.supported_schemes()
    }
}

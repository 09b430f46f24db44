//! Certificates: whether a chain is acceptable, and whom it names.
//!
//! Enters: the chain that a caller showed in TLS, an authority (its anchors and revocation lists), the time, and what was
//! revoked here. Leaves: a [`VerifiedCertificate`](identity::VerifiedCertificate), or an error with a stable reason.
//! Never: possession of the key, which the handshake proves (`verifier`), and whether the caller may do anything.

pub mod bundle;
pub mod chain;
pub mod crl;
pub mod identity;
pub mod leaf;
mod name;
pub mod spiffe;
pub mod verifier;

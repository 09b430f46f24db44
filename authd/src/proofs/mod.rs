//! Evidence in, verified proofs out. Each module is sans-IO and has its own errors, each with a stable reason.

pub mod access;
pub mod api_key;
pub mod base64url;
pub mod binding;
pub mod claims;
pub mod dpop;
pub mod exchange;
pub mod introspection;
pub mod issuer;
pub mod json;
pub mod jwk;
pub mod jwks_cache;
pub mod jws;
pub mod jwt;
pub mod scheme;
pub mod x509;

#[cfg(test)]
mod attacks;
#[cfg(test)]
pub(crate) mod testing;

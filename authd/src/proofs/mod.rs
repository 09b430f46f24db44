//! Evidence in, proofs out: each kind by itself, without I/O and with time as an argument.

pub mod api_key;
pub mod x509;

//! Evidence in, verified proofs out. Nothing here reads a clock, a file or a socket.

pub mod x509;

//! Certificates that OpenSSL made, as `authd` judges them, in the library, in handshakes and on the command line.

mod cert;
mod chains;
mod handshake;
mod lists;
mod pki;

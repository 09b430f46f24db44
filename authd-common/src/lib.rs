//! Everything that authd's kernel programs and its daemon must agree on, written once.
//!
//! Enters: bytes of packets, identities of cgroups, read-only tables. Leaves: verdicts and the layout of records.
//! Never: allocation, system calls, clocks, unsafe code outside [`pod`].
#![no_std]
#![deny(unsafe_code)]

pub mod address;
pub mod bytes;
pub mod event;
pub mod identity;
pub mod names;
pub mod nic;
pub mod nodes;
pub mod parse;
#[cfg(feature = "user")]
pub mod pod;
pub mod reason;
pub mod siphash;
pub mod syn;
pub mod tables;
pub mod verdict;

/// Raised with every change to a shared layout, map name, map key or reason code. A daemon adopts pinned maps only if
/// this number agrees; `cargo xtask check` refuses a changed layout under an unchanged number.
pub const ABI_VERSION: u32 = 8;

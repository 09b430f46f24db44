//! The privileged side's hands: it loads programs, owns their maps and links, and reads what they tell.

pub mod attach;
pub mod attestation;
pub mod bpf;
pub mod cgroups;
pub mod drops;
pub mod interfaces;
pub mod introductions;
pub mod mapped;
pub mod nodes;
pub mod object;
pub mod ring;
pub mod sockets;
pub mod writer;

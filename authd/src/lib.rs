//! authd, the library behind the binary. Its modules are the two flows, in order.

pub mod cli;
pub mod client;
pub mod cmd;
pub mod config;

pub mod policy;

pub mod digest;
pub mod proofs;
pub mod store;

pub mod dataplane;

pub mod decisions;
pub mod grants;
pub mod ipc;

pub mod audit;
pub mod control;
pub mod daemon;

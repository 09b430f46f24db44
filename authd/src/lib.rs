//! authd, the library behind the binary. Its modules are the two flows, in order.

pub mod cli;
pub mod cmd;
pub mod config;

pub mod policy;

pub mod proofs;

pub mod dataplane;

pub mod audit;
pub mod daemon;

//! What the tests, the demo and the benchmark share: a cgroup, a network and a daemon of their own.

pub mod cgroup;
pub mod daemon;
pub mod frames;
pub mod mcp;
pub mod meaning;
pub mod netns;
pub mod others;
pub mod probe;
pub mod sandbox;
pub mod tls;
pub mod trust;
pub mod wire;

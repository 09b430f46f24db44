//! Agents: acting for somebody, and only as far as that one's token and the policy go.

pub mod actions;
pub mod exchange;
mod mcp;
mod scenarios;
mod servers;
mod told;

use libtest_mimic::Trial;

/// What starts processes, and what every release has to survive.
pub fn trials() -> Vec<Trial> {
    [servers::trials(), scenarios::trials()].into_iter().flatten().collect()
}

/// What they are told.
pub fn of_callers() -> Vec<Trial> {
    [exchange::trials(), mcp::trials(), told::trials()].into_iter().flatten().collect()
}

//! Agents: acting for somebody, and only as far as that one's token and the policy go.

mod actions;
mod exchange;
mod mcp;
mod scenarios;
mod servers;

use libtest_mimic::Trial;

pub fn trials() -> Vec<Trial> {
    [exchange::trials(), actions::trials(), mcp::trials(), servers::trials(), scenarios::trials()]
        .into_iter()
        .flatten()
        .collect()
}

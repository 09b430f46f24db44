//! Agents: acting for somebody, and only as far as that one's token and the policy go.

mod actions;
mod exchange;
mod mcp;

use libtest_mimic::Trial;

pub fn trials() -> Vec<Trial> {
    [exchange::trials(), actions::trials(), mcp::trials()].into_iter().flatten().collect()
}

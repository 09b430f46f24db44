//! Agents: acting for somebody, and only as far as that one's token and the policy go.

mod exchange;

use libtest_mimic::Trial;

pub fn trials() -> Vec<Trial> {
    exchange::trials()
}

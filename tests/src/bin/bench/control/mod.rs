//! The control path: handshakes, token checks and grants, each beside the part of it that nobody can do without.

pub mod grants;
pub mod handshakes;
pub mod http;
mod tokens;

use anyhow::Result;

use crate::compare::{Comparison, Pairs};

pub fn run(quick: bool) -> Result<Vec<Comparison>> {
    let mut results = tokens::run(quick)?;
    results.extend(handshakes::run(quick)?);
    results.extend(grants::run(quick)?);
    Ok(results)
}

fn compared(name: String, pairs: &Pairs, budget: Option<f64>) -> Comparison {
    Comparison::of_pairs("control", name, pairs, budget)
}

/// What is asked of a speed, as a ratio of times.
fn as_fast_as(speed: f64) -> Option<f64> {
    Some(1.0 / speed)
}

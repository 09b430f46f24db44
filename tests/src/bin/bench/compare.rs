//! Ratios of times, and how sure they are.

use std::time::Instant;

use anyhow::Result;
use rand::{RngExt, SeedableRng, rngs::SmallRng};
use serde::Serialize;

/// Ours and theirs, in ns, measured next to each other.
pub type Pairs = Vec<(f64, f64)>;

/// One comparison: a ratio of times, and the interval in which it lies (bootstrap, 95 %).
#[derive(Serialize)]
pub struct Comparison {
    part: &'static str,
    name: String,
    ratio: f64,
    low: f64,
    high: f64,
    /// What the design asks for, if it does.
    budget: Option<f64>,
    met: Option<bool>,
    /// ns; for orientation only.
    #[serde(skip)]
    ours: f64,
    #[serde(skip)]
    theirs: f64,
}

/// ns of each of so many.
pub fn each(times: u32, mut act: impl FnMut() -> Result<()>) -> Result<f64> {
    let started = Instant::now();
    for _ in 0..times {
        act()?;
    }
    Ok(started.elapsed().as_nanos() as f64 / f64::from(times))
}

/// Samples of which the interval is made.
const RESAMPLED: usize = 1000;

impl Comparison {
    /// The median of paired ratios.
    pub fn of_pairs(part: &'static str, name: String, pairs: &[(f64, f64)], budget: Option<f64>) -> Self {
        let ratios: Vec<f64> = pairs.iter().map(|(ours, theirs)| ours / theirs).collect();
        let mut random = SmallRng::seed_from_u64(1);
        let interval = interval(|| median(&resampled(&ratios, &mut random)));
        let of = |which: fn(&(f64, f64)) -> f64| median(&pairs.iter().map(which).collect::<Vec<_>>());
        Self::new(part, name, median(&ratios), interval, budget, (of(|pair| pair.0), of(|pair| pair.1)))
    }

    /// The ratio of two quantiles, of measurements that came in turns.
    pub fn of_quantiles(
        part: &'static str,
        name: String,
        (ours, ours_at): (&[f64], f64),
        (theirs, theirs_at): (&[f64], f64),
        budget: Option<f64>,
    ) -> Self {
        let mut random = SmallRng::seed_from_u64(1);
        let interval = interval(|| {
            let ours = quantile(&resampled(ours, &mut random), ours_at);
            ours / quantile(&resampled(theirs, &mut random), theirs_at)
        });
        let (ours, theirs) = (quantile(ours, ours_at), quantile(theirs, theirs_at));
        Self::new(part, name, ours / theirs, interval, budget, (ours, theirs))
    }

    fn new(
        part: &'static str,
        name: String,
        ratio: f64,
        (low, high): (f64, f64),
        budget: Option<f64>,
        (ours, theirs): (f64, f64),
    ) -> Self {
        Self { part, name, ratio, low, high, budget, met: budget.map(|budget| ratio <= budget), ours, theirs }
    }
}

fn resampled(values: &[f64], random: &mut SmallRng) -> Vec<f64> {
    values.iter().map(|_| values[random.random_range(0..values.len())]).collect()
}

fn interval(again: impl FnMut() -> f64) -> (f64, f64) {
    let mut values: Vec<f64> = std::iter::repeat_with(again).take(RESAMPLED).collect();
    values.sort_by(f64::total_cmp);
    (values[RESAMPLED / 40], values[RESAMPLED - 1 - RESAMPLED / 40])
}

fn median(values: &[f64]) -> f64 {
    quantile(values, 0.5)
}

/// Between the two nearest where none is exact.
fn quantile(values: &[f64], at: f64) -> f64 {
    let mut values = values.to_vec();
    values.sort_by(f64::total_cmp);
    let position = (values.len() - 1) as f64 * at;
    let (below, above) = (values[position.floor() as usize], values[position.ceil() as usize]);
    below + (above - below) * position.fract()
}

pub fn print(results: &[Comparison]) {
    println!("\n{:<56} {:>10} {:>10} {:>7}  {:<15} budget", "", "ns", "against", "ratio", "95 %");
    for result in results {
        let Comparison { name, ratio, low, high, budget, met, ours, theirs, .. } = result;
        let verdict = match (budget, met) {
            (Some(budget), Some(true)) => format!("<= {budget:.3}"),
            (Some(budget), _) => format!("<= {budget:.3}  MISSED"),
            (None, _) => String::new(),
        };
        println!(
            "{name:<56} {ours:>10.0} {theirs:>10.0} {ratio:>7.3}  {:<15} {verdict}",
            format!("{low:.3}..{high:.3}")
        );
    }
    let missed = results.iter().filter(|r| r.met == Some(false)).count();
    println!("\n{} comparisons, {missed} budgets missed", results.len());
}

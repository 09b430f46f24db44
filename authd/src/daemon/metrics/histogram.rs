//! How long something took, as Prometheus counts it.

use std::fmt::Write;

use serde::{Deserialize, Serialize};

/// Upper bounds in microseconds: 10 us to 1 s.
const BOUNDS: [u64; 16] =
    [10, 25, 50, 100, 250, 500, 1_000, 2_500, 5_000, 10_000, 25_000, 50_000, 100_000, 250_000, 500_000, 1_000_000];

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Histogram {
    /// How many took as long as each bound at most, and longer than the one before; the last one: longer than all.
    counts: [u64; BOUNDS.len() + 1],
    microseconds: u64,
}

impl Histogram {
    pub fn add(&mut self, microseconds: u64) {
        let at = BOUNDS.partition_point(|bound| *bound < microseconds);
        self.counts[at] = self.counts[at].saturating_add(1);
        self.microseconds = self.microseconds.saturating_add(microseconds);
    }

    pub fn count(&self) -> u64 {
        self.counts.iter().fold(0, |sum, count| sum.saturating_add(*count))
    }

    /// A family of Prometheus' text format, in seconds.
    pub fn write(&self, out: &mut String, name: &str, help: &str) {
        let _ = writeln!(out, "# HELP {name} {help}\n# TYPE {name} histogram");
        let mut below = 0_u64;
        for (bound, count) in BOUNDS.iter().zip(self.counts) {
            below = below.saturating_add(count);
            let _ = writeln!(out, "{name}_bucket{{le=\"{}\"}} {below}", seconds(*bound));
        }
        let count = self.count();
        let _ = writeln!(out, "{name}_bucket{{le=\"+Inf\"}} {count}");
        let _ = writeln!(out, "{name}_sum {}\n{name}_count {count}", seconds(self.microseconds));
    }
}

fn seconds(microseconds: u64) -> f64 {
    microseconds as f64 / 1e6
}

#[cfg(test)]
mod tests {
    use super::*;

    fn buckets(histogram: &Histogram) -> Vec<(String, u64)> {
        let mut text = String::new();
        histogram.write(&mut text, "x", "Help.");
        let line = |line: &str| {
            let (bound, count) = line.strip_prefix("x_bucket{le=\"")?.split_once("\"} ")?;
            Some((bound.to_owned(), count.parse().unwrap()))
        };
        text.lines().filter_map(line).collect()
    }

    #[test]
    fn a_bucket_has_everything_up_to_its_bound() {
        let mut histogram = Histogram::default();
        for microseconds in [0, 9, 10, 11, 25, 999_999, 1_000_000, 1_000_001] {
            histogram.add(microseconds);
        }
        let buckets = buckets(&histogram);
        let at = |bound: &str| buckets.iter().find(|(found, _)| found == bound).map(|(_, count)| *count);
        assert_eq!(buckets.len(), BOUNDS.len() + 1);
        assert_eq!((at("0.00001"), at("0.000025"), at("0.00005")), (Some(3), Some(5), Some(5)));
        assert_eq!((at("0.5"), at("1"), at("+Inf")), (Some(5), Some(7), Some(8)));
        assert!(buckets.is_sorted_by_key(|(_, count)| *count));
    }

    #[test]
    fn it_is_written_as_prometheus_reads_it() {
        let mut histogram = Histogram::default();
        histogram.add(40);
        histogram.add(2_000_000);
        let mut text = String::new();
        histogram.write(&mut text, "authd_x_seconds", "Help.");
        assert!(text.starts_with("# HELP authd_x_seconds Help.\n# TYPE authd_x_seconds histogram\n"), "{text}");
        let end = "authd_x_seconds_bucket{le=\"+Inf\"} 2\nauthd_x_seconds_sum 2.00004\nauthd_x_seconds_count 2\n";
        assert!(text.ends_with(end), "{text}");
        assert!(text.contains("\nauthd_x_seconds_bucket{le=\"0.00005\"} 1\n"), "{text}");
    }

    #[test]
    fn it_stays_at_its_end_instead_of_beginning_anew() {
        let mut histogram = Histogram { counts: [u64::MAX; BOUNDS.len() + 1], microseconds: u64::MAX };
        histogram.add(u64::MAX);
        histogram.add(0);
        assert_eq!(histogram.count(), u64::MAX);
        assert!(buckets(&histogram).iter().all(|(_, count)| *count == u64::MAX));
    }
}

//! Mean and percentiles.

use serde::Serialize;

/// A summary in the unit of its values; zero throughout where there are none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Summary {
    pub count: usize,
    pub mean: f64,
    pub p50: f64,
    pub p90: f64,
    pub p95: f64,
    pub p99: f64,
}

impl Summary {
    pub fn of(mut values: Vec<f64>) -> Self {
        if values.is_empty() {
            return Self::default();
        }
        values.sort_by(f64::total_cmp);
        Self {
            count: values.len(),
            mean: values.iter().sum::<f64>() / values.len() as f64,
            p50: percentile(&values, 50.0),
            p90: percentile(&values, 90.0),
            p95: percentile(&values, 95.0),
            p99: percentile(&values, 99.0),
        }
    }
}

/// Percentile of sorted values, linear between neighbours (Hyndman and Fan's type 7, numpy's
/// default); zero of none.
fn percentile(sorted: &[f64], percent: f64) -> f64 {
    let Some(last) = sorted.len().checked_sub(1) else { return 0.0 };
    let place = percent / 100.0 * last as f64;
    let below = place.floor() as usize;
    let above = (below + 1).min(last);
    sorted[below] + (sorted[above] - sorted[below]) * (place - below as f64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles() {
        let check = |values: &[f64], percent, want: f64| {
            let got = percentile(values, percent);
            assert!((got - want).abs() < 1e-12, "{values:?} at {percent}: {got}, not {want}");
        };
        check(&[], 50.0, 0.0);
        check(&[7.0], 0.0, 7.0);
        check(&[7.0], 99.0, 7.0);
        check(&[1.0, 2.0], 50.0, 1.5);
        check(&[1.0, 2.0, 3.0, 4.0], 0.0, 1.0);
        check(&[1.0, 2.0, 3.0, 4.0], 50.0, 2.5);
        check(&[1.0, 2.0, 3.0, 4.0], 90.0, 3.7);
        check(&[1.0, 2.0, 3.0, 4.0], 100.0, 4.0);
    }

    #[test]
    fn a_summary_sorts_first() {
        let summary = Summary::of(vec![4.0, 1.0, 3.0, 2.0]);
        assert_eq!((summary.count, summary.mean, summary.p50), (4, 2.5, 2.5));
        assert_eq!(Summary::of(Vec::new()), Summary::default());
    }
}

//! Non-negative least squares in four unknowns, from its normal equations.

use super::coefficients::TERMS;

/// A pivot this small, on a matrix scaled to a unit diagonal, means the columns say the same.
const PIVOT_MIN: f64 = 1e-11;

/// `minimise sum(weight * (x . theta - y)^2)`, kept as `Q = X'WX` and `r = X'Wy`.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct NormalEquations {
    q: [[f64; TERMS]; TERMS],
    r: [f64; TERMS],
}

impl NormalEquations {
    pub fn add(&mut self, x: [f64; TERMS], y: f64, weight: f64) {
        for i in 0..TERMS {
            for j in 0..TERMS {
                self.q[i][j] += weight * x[i] * x[j];
            }
            self.r[i] += weight * x[i] * y;
        }
    }

    /// Lets what is known so far count for `keep` of what it did.
    pub fn fade(&mut self, keep: f64) {
        self.q.iter_mut().flatten().chain(&mut self.r).for_each(|value| *value *= keep);
    }

    /// How much each unknown was seen: the diagonal of `Q`.
    pub fn information(&self) -> [f64; TERMS] {
        std::array::from_fn(|i| self.q[i][i])
    }

    /// Adds `sum(precision_j * (theta_j - centre_j)^2)`.
    pub fn with_ridge(mut self, centre: [f64; TERMS], precision: [f64; TERMS]) -> Self {
        for i in 0..TERMS {
            self.q[i][i] += precision[i];
            self.r[i] += precision[i] * centre[i];
        }
        self
    }

    /// The minimum over `theta >= 0`, exactly: the optimum is the free solution on its own support
    /// (the Karush-Kuhn-Tucker conditions), and there are only sixteen supports to try. Columns
    /// that say the same are told apart only by a ridge; without one a smaller support serves.
    pub fn solve_non_negative(&self) -> [f64; TERMS] {
        const EVERYTHING: u32 = (1 << TERMS) - 1;
        // Where the free minimum of everything is feasible there is none lower.
        if let Some(theta) = self.solve_on(EVERYTHING).filter(feasible) {
            return theta;
        }
        let feasible =
            (1..EVERYTHING).filter_map(|support| self.solve_on(support).filter(feasible));
        let lowest = feasible.min_by(|a, b| self.objective(a).total_cmp(&self.objective(b)));
        lowest.filter(|theta| self.objective(theta) < 0.0).unwrap_or_default()
    }

    /// `theta' Q theta / 2 - r' theta`: the squared error but for a constant.
    fn objective(&self, theta: &[f64; TERMS]) -> f64 {
        let row = |i: usize| -> f64 { (0..TERMS).map(|j| self.q[i][j] * theta[j]).sum() };
        (0..TERMS).map(|i| theta[i] * (row(i) / 2.0 - self.r[i])).sum()
    }

    /// The free minimum over the unknowns in `support`, the others zero; `None` if it is not
    /// unique. Cholesky on the matrix scaled to a unit diagonal, as nanoseconds per query-key pair
    /// and per step differ by ten orders of magnitude.
    fn solve_on(&self, support: u32) -> Option<[f64; TERMS]> {
        let chosen: Vec<usize> = (0..TERMS).filter(|i| support >> i & 1 == 1).collect();
        let scale = chosen.iter().map(|&i| self.q[i][i].sqrt().recip()).collect::<Vec<_>>();
        let size = chosen.len();
        let mut lower = [[0.0; TERMS]; TERMS];
        let mut z = [0.0; TERMS];
        for i in 0..size {
            for j in 0..=i {
                let known: f64 = (0..j).map(|k| lower[i][k] * lower[j][k]).sum();
                let value = self.q[chosen[i]][chosen[j]] * scale[i] * scale[j] - known;
                lower[i][j] = if i != j {
                    value / lower[j][j]
                } else if value > PIVOT_MIN {
                    value.sqrt()
                } else {
                    return None;
                };
            }
            let known: f64 = (0..i).map(|k| lower[i][k] * z[k]).sum();
            z[i] = (self.r[chosen[i]] * scale[i] - known) / lower[i][i];
        }
        let mut theta = [0.0; TERMS];
        for i in (0..size).rev() {
            let known: f64 = (i + 1..size).map(|k| lower[k][i] * z[k]).sum();
            z[i] = (z[i] - known) / lower[i][i];
            theta[chosen[i]] = z[i] * scale[i];
        }
        Some(theta)
    }
}

fn feasible(theta: &[f64; TERMS]) -> bool {
    theta.iter().all(|value| value.is_finite() && *value >= 0.0)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn check(rows: &[([f64; TERMS], f64)], expected: [f64; TERMS]) {
        let mut equations = NormalEquations::default();
        rows.iter().for_each(|(x, y)| equations.add(*x, *y, 1.0));
        let theta = equations.solve_non_negative();
        let close = |(a, b): (&f64, f64)| (a - b).abs() <= 1e-6 * b.abs().max(1.0);
        assert!(theta.iter().zip(expected).all(close), "{theta:?} is not {expected:?}");
    }

    #[test]
    fn small_systems() {
        let unit = |i: usize| std::array::from_fn(|j| f64::from(u8::from(i == j)));
        check(&[(unit(0), 3.0), (unit(1), 2.0), (unit(2), 5.0), (unit(3), 7.0)], [3., 2., 5., 7.]);
        check(
            &[(unit(0), 3.0), (unit(1), -2.0), (unit(2), 5.0), (unit(3), -7.0)],
            [3., 0., 5., 0.],
        );
        // Two columns that say the same: one of them takes it all.
        check(&[([1.0, 1.0, 0.0, 0.0], 4.0), ([2.0, 2.0, 0.0, 0.0], 8.0)], [4., 0., 0., 0.]);
        check(&[], [0.0; TERMS]);
        check(&[(unit(0), -1.0)], [0.0; TERMS]);
        check(&[(unit(0), f64::NAN)], [0.0; TERMS]);
    }

    proptest! {
        /// The conditions of Karush, Kuhn and Tucker, which only the minimum meets: the slope is
        /// nought where theta is positive, and upward where it is zero.
        #[test]
        fn it_is_the_minimum(
            rows in prop::collection::vec((prop::array::uniform4(0.1f64..10.0), -50.0f64..50.0), 6..20),
        ) {
            let mut equations = NormalEquations::default();
            rows.iter().for_each(|(x, y)| equations.add(*x, *y, 1.0));
            let theta = equations.solve_non_negative();
            for i in 0..TERMS {
                let slope: f64 = (0..TERMS).map(|j| equations.q[i][j] * theta[j]).sum::<f64>()
                    - equations.r[i];
                let size = equations.q[i][i] * theta.iter().sum::<f64>() + equations.r[i].abs() + 1.0;
                prop_assert!(theta[i] >= 0.0);
                prop_assert!(slope > -1e-6 * size, "term {i}: {slope} at {theta:?}");
                prop_assert!(theta[i] == 0.0 || slope < 1e-6 * size, "term {i}: {slope} at {theta:?}");
            }
        }
    }
}

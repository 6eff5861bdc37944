//! Coefficients from timed steps, at start-up.

use thiserror::Error;

use super::{
    Coefficients, Load,
    coefficients::{TERMS, terms},
    least_squares::NormalEquations,
};

/// Fewer steps than this say nothing about four coefficients and their spread.
pub const CALIBRATION_SAMPLES_MIN: usize = 8;

/// Rounds of reweighting; the fit of a few hundred samples is still by far.
const ROUNDS: usize = 10;
/// Huber's constant: 95 % as efficient as least squares where the noise is normal.
const HUBER: f64 = 1.345;
/// Median absolute deviation to standard deviation of a normal distribution.
const MAD_TO_SIGMA: f64 = 1.4826;
/// No clock and no device is steadier.
const SPREAD_MIN: f64 = 1e-3;
/// The pull towards the prior: far below the noise, but enough to decide what the samples do not,
/// such as the cost of prefill when none was timed.
const PRIOR_PULL: f64 = 1e-9;

/// One timed step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sample {
    pub load: Load,
    pub device_ns: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum CalibrateError {
    #[error("{0} timed steps are too few to calibrate: at least {CALIBRATION_SAMPLES_MIN}")]
    TooFew(usize),
    #[error("a timed step took no time: the device clock does not run")]
    NoTime,
}

/// What the samples say.
#[derive(Clone, Debug)]
pub(super) struct Calibration {
    pub coefficients: Coefficients,
    /// How much a step of relative error 1 says about each coefficient: mean of `(x_j / step_ns)^2`.
    pub information: [f64; TERMS],
}

/// Non-negative least squares on relative errors, reweighted after Huber so that a few wild steps
/// (a page fault, another process) do not move it. Relative, as a step of 1 ms and one of 1 s are
/// known equally well.
pub(super) fn calibrate(
    samples: &[Sample],
    prior: Coefficients,
) -> Result<Calibration, CalibrateError> {
    if samples.len() < CALIBRATION_SAMPLES_MIN {
        return Err(CalibrateError::TooFew(samples.len()));
    }
    if samples.iter().any(|sample| sample.device_ns == 0) {
        return Err(CalibrateError::NoTime);
    }
    let mut weights: Vec<f64> = samples.iter().map(|s| (s.device_ns as f64).powi(-2)).collect();
    let mut fitted = fit(samples, &weights, prior);
    for _ in 0..ROUNDS {
        let ratios = samples.iter().map(|sample| off_by(fitted.coefficients, sample));
        let ratios: Vec<f64> = ratios.collect();
        let spread = (MAD_TO_SIGMA * median(ratios.iter().map(|off| off.abs()))).max(SPREAD_MIN);
        for ((weight, sample), off) in weights.iter_mut().zip(samples).zip(&ratios) {
            let huber = (HUBER * spread / off.abs()).min(1.0);
            *weight = huber * predicted(fitted.coefficients, sample).powi(-2);
        }
        fitted = fit(samples, &weights, prior);
    }
    Ok(fitted)
}

fn fit(samples: &[Sample], weights: &[f64], prior: Coefficients) -> Calibration {
    let mut equations = NormalEquations::default();
    for (sample, weight) in samples.iter().zip(weights) {
        equations.add(terms(&sample.load), sample.device_ns as f64, *weight);
    }
    let information = equations.information();
    let centre = prior.terms_ns();
    let precision = std::array::from_fn(|i| match (information[i], centre[i]) {
        (0.0, 0.0) => 1.0,
        (seen, 0.0) => PRIOR_PULL * seen,
        (seen, centre) => PRIOR_PULL * (seen + centre.powi(-2)),
    });
    let solved = equations.with_ridge(centre, precision).solve_non_negative();
    Calibration {
        coefficients: Coefficients::clamped(solved),
        information: information.map(|seen| seen / samples.len() as f64),
    }
}

/// Never zero, so that it can divide.
fn predicted(coefficients: Coefficients, sample: &Sample) -> f64 {
    coefficients.step_ns(&sample.load).max(1.0)
}

/// Relative error of the prediction: `measured / predicted - 1`.
fn off_by(coefficients: Coefficients, sample: &Sample) -> f64 {
    sample.device_ns as f64 / predicted(coefficients, sample) - 1.0
}

fn median(values: impl Iterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.collect();
    let middle = values.len() / 2;
    *values.select_nth_unstable_by(middle, f64::total_cmp).1
}

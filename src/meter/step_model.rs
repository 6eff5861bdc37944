//! How long a step takes, learned from steps.

use super::{
    CalibrateError, Coefficients, Load, Sample, StepWork,
    calibration::{Calibration, calibrate},
    coefficients::{TERMS, terms},
    least_squares::NormalEquations,
    residuals::Residuals,
};

/// A step counts for half of a new one after this many steps, times ln 2.
const MEMORY_STEPS: f64 = 512.0;
/// How many steps the calibration is worth against the remembered ones.
const CALIBRATION_STEPS: f64 = 64.0;
/// The same of the fallback: a few steps outweigh it.
const FALLBACK_STEPS: f64 = 0.1;
/// A step pulls no harder than one that is off by this many spreads.
const CLIP_SPREADS: f64 = 4.0;
/// How fast the spread and the slowness follow, in steps.
const FOLLOW_STEPS: f64 = 64.0;
/// Relative error assumed before any is known, and the least ever assumed.
const SPREAD_START: f64 = 0.2;
const SPREAD_MIN: f64 = 0.002;

/// The model of one (model, device) pair: see the module's documentation for its formula.
#[derive(Clone, Debug)]
pub struct StepModel {
    coefficients: Coefficients,
    /// What the fit is pulled towards, and how much one step's worth of pull weighs.
    centre: Coefficients,
    precision: [f64; TERMS],
    /// How much longer steps take now than the centre says, over all: clocks go up and down, and
    /// every term with them.
    slowness: f64,
    /// Steps seen since the centre was set, fading.
    seen: NormalEquations,
    /// Mean of the (clipped) relative error.
    spread: f64,
    /// Of steps that only decode, and of steps with a prefill chunk: they err differently.
    residuals: [Residuals; 2],
    calibrated: bool,
}

/// [`StepModel::upper_bound_ns`] as it is now, as plain numbers.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct StepBound {
    coefficients: Coefficients,
    /// Of steps that only decode, and of steps with a prefill chunk.
    ratios: [f64; 2],
}

impl StepBound {
    pub fn step_ns(&self, step: &StepWork) -> u64 {
        let load = step.load();
        let expected = self.coefficients.step_ns(&load).max(1.0);
        (expected * self.ratios[kind(&load)]).ceil() as u64
    }
}

impl StepModel {
    /// A model that knows `fallback` alone: good for shares, poor for times.
    pub fn new(fallback: Coefficients) -> Self {
        let worth = |term: f64| if term > 0.0 { FALLBACK_STEPS / term.powi(2) } else { 0.0 };
        Self {
            coefficients: fallback,
            centre: fallback,
            precision: fallback.terms_ns().map(worth),
            slowness: 1.0,
            seen: NormalEquations::default(),
            spread: SPREAD_START,
            residuals: Default::default(),
            calibrated: false,
        }
    }

    /// Replaces all that is known by what `samples` say. On an error nothing changes.
    pub fn calibrate(&mut self, samples: &[Sample]) -> Result<(), CalibrateError> {
        let Calibration { coefficients, information } = calibrate(samples, self.centre)?;
        let fallback = self.precision;
        let worth = |i: usize| match information[i] {
            0.0 => fallback[i],
            seen => CALIBRATION_STEPS * seen,
        };
        self.precision = std::array::from_fn(worth);
        (self.coefficients, self.centre) = (coefficients, coefficients);
        self.slowness = 1.0;
        self.seen = NormalEquations::default();
        self.residuals = Default::default();
        for sample in samples {
            let ratio = sample.device_ns as f64 / self.expected(&sample.load);
            self.residuals[kind(&sample.load)].push(ratio);
        }
        let errors =
            samples.iter().map(|s| (s.device_ns as f64 / self.expected(&s.load) - 1.0).abs());
        let mean = errors.map(|error| error.min(1.0)).sum::<f64>() / samples.len() as f64;
        self.spread = mean.max(SPREAD_MIN);
        self.calibrated = true;
        Ok(())
    }

    /// Learns from a step that ran: recursive least squares on relative errors, pulled towards the
    /// calibration (a ridge) at the device's present speed, so that traffic which never tells two
    /// terms apart leaves their ratio where calibration put it. A wild step counts as one that is
    /// off by [`CLIP_SPREADS`] spreads; if the device did change, the spread grows and the model
    /// follows.
    pub fn observe(&mut self, step: &StepWork, device_ns: u64) {
        let load = step.load();
        let expected = self.expected(&load);
        let ratio = (device_ns as f64).max(1.0) / expected;
        self.residuals[kind(&load)].push(ratio);
        let limit = CLIP_SPREADS * self.spread;
        let error = (ratio - 1.0).clamp(-limit, limit);
        self.spread += (error.abs() - self.spread) / FOLLOW_STEPS;
        self.spread = self.spread.max(SPREAD_MIN);
        let measured = expected * (1.0 + error).max(0.0);
        let slowness = measured / self.centre.step_ns(&load).max(1.0);
        self.slowness += (slowness - self.slowness) / FOLLOW_STEPS;
        self.seen.fade(1.0 - 1.0 / MEMORY_STEPS);
        self.seen.add(terms(&load), measured, expected.powi(-2));
        let centre = self.centre.terms_ns().map(|term| self.slowness * term);
        let pulled = self.seen.with_ridge(centre, self.precision);
        self.coefficients = Coefficients::clamped(pulled.solve_non_negative());
    }

    /// The most likely device time of a step.
    pub fn predict_ns(&self, step: &StepWork) -> u64 {
        self.expected(&step.load()).round() as u64
    }

    /// A device time that at least [`super::BOUND_SHARE`] of steps stay under, once
    /// [`StepModel::bound_is_stated`]; before that a wide guess. What a step takes beyond it is the
    /// operator's loss.
    pub fn upper_bound_ns(&self, step: &StepWork) -> u64 {
        self.bound().step_ns(step)
    }

    /// The bound for all steps, as long as no more are seen.
    pub fn bound(&self) -> StepBound {
        let ratios = self.residuals.each_ref().map(Residuals::bound);
        StepBound { coefficients: self.coefficients, ratios }
    }

    /// Whether enough steps of this one's kind are known for the share to be a promise.
    pub fn bound_is_stated(&self, step: &StepWork) -> bool {
        self.residuals[kind(&step.load())].is_stated()
    }

    pub fn coefficients(&self) -> Coefficients {
        self.coefficients
    }

    pub fn is_calibrated(&self) -> bool {
        self.calibrated
    }

    /// At least a nanosecond, so that it can divide.
    fn expected(&self, load: &Load) -> f64 {
        self.coefficients.step_ns(load).max(1.0)
    }
}

/// Which residuals a step belongs to.
fn kind(load: &Load) -> usize {
    usize::from(load.prefill_qk_pairs > 0)
}

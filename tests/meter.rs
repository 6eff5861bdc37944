//! Device time and energy: the step model against devices that are known, and accounts that lose
//! nothing whatever they are told. `PROPTEST_CASES` makes it longer.

use candela::{
    meter::{
        BOUND_SHARE, CALIBRATION_SAMPLES_MIN, CalibrateError, Coefficients, Sample, SeqWork,
        StepModel, StepWork, split,
    },
    types::SeqId,
};
use proptest::prelude::*;
use rand::{RngExt, SeedableRng, rngs::StdRng};

/// A device that is what the model says it is, with noise, and now and then a wild step.
struct Device {
    terms_ns: [f64; 4],
    /// Steps vary by up to this much, relatively.
    noise: f64,
    /// One step in so many takes ten times as long; nought is never.
    wild_every: u32,
    rng: StdRng,
}

impl Device {
    fn new(terms_ns: [f64; 4], noise: f64, wild_every: u32, seed: u64) -> Self {
        Self { terms_ns, noise, wild_every, rng: StdRng::seed_from_u64(seed) }
    }

    fn exact_ns(&self, step: &StepWork) -> f64 {
        coefficients_ns(self.terms_ns, step)
    }

    fn run_ns(&mut self, step: &StepWork) -> u64 {
        let mut ns = self.exact_ns(step) * (1.0 + self.rng.random_range(-1.0..1.0) * self.noise);
        if self.wild_every > 0 && self.rng.random_ratio(1, self.wild_every) {
            ns *= 10.0;
        }
        ns.round() as u64
    }

    /// What a server's calibration would run: decodes at several lengths and batch sizes, and
    /// prefill chunks.
    fn calibration(&mut self) -> Vec<Sample> {
        let mut samples = Vec::new();
        for repeat in 0..4 {
            for batch in [1, 2, 4, 8, 16] {
                for kv in [16, 256, 2048] {
                    samples.push(decodes(batch, kv + repeat));
                }
                samples.push(chunk(repeat * 64, 32 * batch));
                samples.push(chunk(4000 + repeat, 32 * batch));
            }
        }
        samples.into_iter().map(|step| self.sample(&step)).collect()
    }

    fn sample(&mut self, step: &StepWork) -> Sample {
        Sample { load: step.load(), device_ns: self.run_ns(step) }
    }

    /// Traffic: decodes, with a prefill chunk in one step of four.
    fn traffic(&mut self) -> StepWork {
        let (batch, kv) = (self.rng.random_range(1..24), self.rng.random_range(8..3000));
        let mut step = decodes(batch, kv);
        if self.rng.random_ratio(1, 4) {
            let (first, rows) = (self.rng.random_range(0..1000), self.rng.random_range(2..512));
            step.seqs.push(SeqWork::new(SeqId(1000), first, rows, None));
        }
        step
    }
}

fn coefficients_ns([fixed, new, kv, qk]: [f64; 4], step: &StepWork) -> f64 {
    let load = step.load();
    fixed
        + new * load.new_tokens as f64
        + kv * load.decode_kv_tokens as f64
        + qk * load.prefill_qk_pairs as f64
}

fn decodes(batch: u32, kv: u32) -> StepWork {
    let seq = |id| SeqWork::new(SeqId(id), kv, 1, None);
    StepWork { seqs: (0..u64::from(batch)).map(seq).collect(), padding_tokens: 0 }
}

fn chunk(first: u32, rows: u32) -> StepWork {
    StepWork { seqs: vec![SeqWork::new(SeqId(0), first, rows, None)], padding_tokens: 0 }
}

/// 3 ms a step, 30 us a row, 20 ns a cached token, 1 ns a pair.
const TERMS_NS: [f64; 4] = [3e6, 3e4, 20.0, 1.0];

/// What is guessed of it.
const FALLBACK_NS: [f64; 4] = [1e6, 1e4, 50.0, 5.0];

fn model() -> StepModel {
    StepModel::new(Coefficients::new(FALLBACK_NS).expect("sane coefficients"))
}

fn calibrated(device: &mut Device) -> StepModel {
    let mut model = model();
    model.calibrate(&device.calibration()).expect("calibrated");
    model
}

/// How far a model's prediction is from the device, at worst over some traffic.
fn error(model: &StepModel, device: &mut Device) -> f64 {
    let steps: Vec<StepWork> = (0..200).map(|_| device.traffic()).collect();
    let off = |step| (model.predict_ns(step) as f64 / device.exact_ns(step) - 1.0).abs();
    steps.iter().map(off).fold(0.0, f64::max)
}

#[test]
fn calibration_without_noise_finds_the_coefficients() {
    for terms_ns in [TERMS_NS, [0.0, 1e5, 10.0, 0.5], [1e7, 0.0, 100.0, 2.0], [5e6, 2e4, 0.0, 0.0]]
    {
        let model = calibrated(&mut Device::new(terms_ns, 0.0, 0, 1));
        let scale = model.coefficients().terms_ns().into_iter().zip(FALLBACK_NS);
        for ((found, fallback), known) in scale.zip(terms_ns) {
            let close = (found - known).abs() <= 1e-3 * known + 1e-5 * fallback;
            assert!(close, "{:?} is not {terms_ns:?}", model.coefficients());
        }
        assert!(model.is_calibrated());
    }
}

#[test]
fn a_bad_calibration_changes_nothing() {
    let mut device = Device::new(TERMS_NS, 0.0, 0, 1);
    let samples = device.calibration();
    let check = |samples: &[Sample], expected: CalibrateError| {
        let mut model = model();
        let before = model.coefficients();
        assert_eq!(model.calibrate(samples), Err(expected));
        assert_eq!(model.coefficients(), before);
        assert!(!model.is_calibrated());
    };
    check(&[], CalibrateError::TooFew(0));
    let few = CALIBRATION_SAMPLES_MIN - 1;
    check(&samples[..few], CalibrateError::TooFew(few));
    let mut stopped = samples;
    stopped[3].device_ns = 0;
    check(&stopped, CalibrateError::NoTime);
}

#[test]
fn what_was_not_timed_stays_at_the_fallback() {
    let mut device = Device::new(TERMS_NS, 0.02, 0, 2);
    let timed = (1..40).map(|n| device.sample(&decodes(n % 9 + 1, 100 * n)));
    let mut model = model();
    model.calibrate(&timed.collect::<Vec<_>>()).expect("calibrated");
    let prefill_ns = model.coefficients().terms_ns()[3];
    assert!((prefill_ns - FALLBACK_NS[3]).abs() < 1e-6, "no prefill was timed: {prefill_ns}");
    let off =
        (model.predict_ns(&decodes(4, 900)) as f64 / device.exact_ns(&decodes(4, 900)) - 1.0).abs();
    assert!(off < 0.02, "{off}");
}

#[test]
fn without_calibration_the_model_learns_from_traffic() {
    let mut device = Device::new(TERMS_NS, 0.03, 50, 3);
    let mut model = model();
    assert!(error(&model, &mut device) > 0.5, "the fallback is far off");
    assert!(!model.bound_is_stated(&decodes(1, 1)));
    for _ in 0..1500 {
        let step = device.traffic();
        let ns = device.run_ns(&step);
        model.observe(&step, ns);
    }
    let error = error(&model, &mut device);
    assert!(error < 0.08, "{error}");
    assert!(model.bound_is_stated(&decodes(1, 1)));
}

#[test]
fn the_model_follows_a_device_that_slows_down() {
    let mut device = Device::new(TERMS_NS, 0.03, 0, 4);
    let mut model = calibrated(&mut device);
    device.terms_ns = TERMS_NS.map(|term| 2.0 * term);
    for _ in 0..3000 {
        let step = device.traffic();
        let ns = device.run_ns(&step);
        model.observe(&step, ns);
    }
    let error = error(&model, &mut device);
    assert!(error < 0.05, "{error}");
}

#[test]
fn a_wild_step_moves_little() {
    let mut device = Device::new(TERMS_NS, 0.03, 0, 5);
    let mut model = calibrated(&mut device);
    for wild_ns in [0, 1, 3_000_000_000, u64::MAX] {
        let before = model.predict_ns(&decodes(8, 500)) as f64;
        model.observe(&decodes(8, 500), wild_ns);
        let moved = (model.predict_ns(&decodes(8, 500)) as f64 / before - 1.0).abs();
        assert!(moved < 0.01, "{wild_ns} moved the prediction by {moved}");
    }
}

#[test]
fn traffic_that_tells_nothing_about_a_term_leaves_it() {
    let mut device = Device::new(TERMS_NS, 0.03, 0, 6);
    let mut model = calibrated(&mut device);
    let before = model.predict_ns(&chunk(0, 512)) as f64;
    for _ in 0..5000 {
        let step = decodes(4, 700);
        let ns = device.run_ns(&step);
        model.observe(&step, ns);
    }
    let moved = (model.predict_ns(&chunk(0, 512)) as f64 / before - 1.0).abs();
    assert!(moved < 0.03, "prefill moved by {moved} though there was none");
}

/// The share of steps that stay under the bound, after calibration and the given change.
fn covered(mut device: Device, slower: f64) -> f64 {
    let mut model = calibrated(&mut device);
    device.terms_ns = device.terms_ns.map(|term| term * slower);
    let steps = 6000;
    let mut under = 0;
    for _ in 0..steps {
        let step = device.traffic();
        let (bound_ns, ns) = (model.upper_bound_ns(&step), device.run_ns(&step));
        under += u32::from(ns <= bound_ns);
        model.observe(&step, ns);
    }
    f64::from(under) / f64::from(steps)
}

#[test]
fn the_bound_holds_for_the_stated_share() {
    let check = |name: &str, share: f64, least: f64| {
        assert!(share >= least, "{name}: {share} of steps are under the bound");
    };
    check("noise", covered(Device::new(TERMS_NS, 0.1, 0, 7), 1.0), BOUND_SHARE - 0.003);
    check("wild steps", covered(Device::new(TERMS_NS, 0.05, 40, 8), 1.0), BOUND_SHARE - 0.003);
    check("slower", covered(Device::new(TERMS_NS, 0.05, 0, 9), 1.7), BOUND_SHARE - 0.01);
}

#[test]
fn the_bound_is_not_idle_talk() {
    let mut device = Device::new(TERMS_NS, 0.05, 0, 10);
    let mut model = calibrated(&mut device);
    for _ in 0..500 {
        let step = device.traffic();
        let ns = device.run_ns(&step);
        model.observe(&step, ns);
    }
    let step = decodes(4, 500);
    let over = model.upper_bound_ns(&step) as f64 / device.exact_ns(&step);
    assert!((1.0..1.15).contains(&over), "a bound of {over} for noise of 0.05");
}

#[test]
fn a_split_follows_a_calibrated_model() {
    let model = calibrated(&mut Device::new(TERMS_NS, 0.03, 0, 11));
    let mut step = decodes(3, 1000);
    step.seqs.push(SeqWork::new(SeqId(9), 0, 256, None));
    let ns = model.predict_ns(&step);
    let split = split(&model.coefficients(), &step, ns);
    assert_eq!(split.total_ns(), ns);
    let expected = 3e6 / 4.0 + 3e4 * 256.0 + 256.0 * 257.0 / 2.0;
    let share = split.seqs[3].useful_ns as f64;
    assert!((share / expected - 1.0).abs() < 0.05, "{share} is not about {expected}");
}

proptest! {
    #[test]
    fn calibration_recovers_a_noisy_device(
        // Each term matters in some of the steps: what no step shows no fit can find.
        fixed in 1e6f64..1e7, new in 2e4f64..2e5, kv in 50.0f64..500.0, qk in 20.0f64..200.0,
        noise in 0.0f64..0.05,
        wild_every in prop_oneof![Just(0u32), 20u32..60],
        seed: u64,
    ) {
        let terms_ns = [fixed, new, kv, qk];
        let mut device = Device::new(terms_ns, noise, wild_every, seed);
        let model = calibrated(&mut device);
        let found = model.coefficients().terms_ns();
        for (found, known) in found.iter().zip(terms_ns) {
            let off = (found / known - 1.0).abs();
            prop_assert!(off < 0.02 + 8.0 * noise, "{:?} is not {:?}", model.coefficients(), terms_ns);
        }
        let error = error(&model, &mut device);
        prop_assert!(error < 0.01 + noise, "predictions are off by {}", error);
    }
}

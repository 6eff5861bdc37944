//! What each quantity of a step costs, in nanoseconds.

use thiserror::Error;

use super::Load;

/// Terms of the step model: fixed, new tokens, decode KV tokens, prefill query-key pairs.
pub(super) const TERMS: usize = 4;
/// Sixteen minutes for one token: nothing real comes near, and sums stay far inside an f64.
const COEFFICIENT_NS_MAX: f64 = 1e12;

/// `step_ns = fixed + a * new_tokens + b * decode_kv_tokens + c * prefill_qk_pairs`, none negative.
/// These are weights, hence floats; what is booked with their help is integer nanoseconds.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Coefficients([f64; TERMS]);

#[derive(Clone, Copy, Debug, PartialEq, Error)]
#[error("a step coefficient of {0} ns is not between 0 and {COEFFICIENT_NS_MAX}")]
pub struct BadCoefficient(f64);

/// What one token asks of a device, from the model's configuration.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ModelShape {
    pub weights: u64,
    pub weight_bytes: u64,
    /// K and V of one token, all layers.
    pub kv_bytes_per_token: u64,
    /// Arithmetic of one query row against one key row, all layers and heads: `4 * heads *
    /// head_dim * layers` (a product with K, one with V, two operations each).
    pub flop_per_qk_pair: u64,
}

/// What a device sustains. A guess will do until the model is calibrated.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct DeviceRates {
    pub bytes_per_s: f64,
    pub flop_per_s: f64,
}

impl Coefficients {
    /// Nanoseconds per step, new token, decode KV token and prefill query-key pair.
    pub fn new(terms_ns: [f64; TERMS]) -> Result<Self, BadCoefficient> {
        match terms_ns.iter().find(|term| !(0.0..=COEFFICIENT_NS_MAX).contains(*term)) {
            Some(bad) => Err(BadCoefficient(*bad)),
            None => Ok(Self(terms_ns)),
        }
    }

    /// The roofline of a model on a device (Williams, Waterman, Patterson 2009): weights are read
    /// once a step, KV once a decode, arithmetic is two operations a weight and token.
    pub fn roofline(shape: ModelShape, rates: DeviceRates) -> Result<Self, BadCoefficient> {
        let read_ns = |bytes: u64| bytes as f64 / rates.bytes_per_s * 1e9;
        let compute_ns = |flop: f64| flop / rates.flop_per_s * 1e9;
        Self::new([
            read_ns(shape.weight_bytes),
            compute_ns(2.0 * shape.weights as f64),
            read_ns(shape.kv_bytes_per_token),
            compute_ns(shape.flop_per_qk_pair as f64),
        ])
    }

    /// In the order of [`Coefficients::new`].
    pub fn terms_ns(&self) -> [f64; TERMS] {
        self.0
    }

    /// What a fit made of them: outliers of arithmetic are brought back into range.
    pub(super) fn clamped(terms_ns: [f64; TERMS]) -> Self {
        let clamp = |term: f64| if term > 0.0 { term.min(COEFFICIENT_NS_MAX) } else { 0.0 };
        Self(terms_ns.map(clamp))
    }

    pub(super) fn fixed_ns(&self) -> f64 {
        self.0[0]
    }

    /// The part that grows with the work.
    pub(super) fn load_ns(&self, load: &Load) -> f64 {
        terms(load).iter().zip(self.0).skip(1).map(|(term, coefficient)| term * coefficient).sum()
    }

    /// A whole step, before rounding.
    pub(super) fn step_ns(&self, load: &Load) -> f64 {
        self.fixed_ns() + self.load_ns(load)
    }
}

/// The quantities that the coefficients multiply.
pub(super) fn terms(load: &Load) -> [f64; TERMS] {
    [1.0, load.new_tokens as f64, load.decode_kv_tokens as f64, load.prefill_qk_pairs as f64]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_finite_non_negative_coefficients_pass() {
        assert!(Coefficients::new([0.0, 1.5, 0.0, 1e12]).is_ok());
        for bad in [-1e-9, f64::NAN, f64::INFINITY, f64::NEG_INFINITY, 1.1e12] {
            for term in 0..TERMS {
                let mut terms_ns = [1.0; TERMS];
                terms_ns[term] = bad;
                assert!(Coefficients::new(terms_ns).is_err(), "{bad} as term {term}");
                let clamped = Coefficients::clamped(terms_ns).terms_ns();
                assert!(Coefficients::new(clamped).is_ok(), "{bad} clamped");
            }
        }
    }

    #[test]
    fn the_roofline_of_an_8b_model() {
        let shape = ModelShape {
            weights: 8_000_000_000,
            weight_bytes: 16_000_000_000,
            kv_bytes_per_token: 131_072,
            flop_per_qk_pair: 4 * 32 * 128 * 32,
        };
        let rates = DeviceRates { bytes_per_s: 4e12, flop_per_s: 8e14 };
        let [fixed, new, kv, qk] = Coefficients::roofline(shape, rates).expect("sane").terms_ns();
        assert_eq!(fixed, 4e6, "16 GB at 4 TB/s is 4 ms");
        assert_eq!(new, 20_000.0);
        assert!((kv - 32.768).abs() < 1e-9 && (qk - 0.65536).abs() < 1e-9, "{kv} {qk}");
        let stopped = DeviceRates { bytes_per_s: 0.0, ..rates };
        assert!(Coefficients::roofline(shape, stopped).is_err(), "no rate is no roofline");
    }
}

//! Elements of both 16-bit types, random rows with outliers, and comparisons.

use half::{bf16, f16};

/// Outputs before a run; a NaN in both types.
pub const POISON: u16 = 0x7fee;

#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Type {
    Bf16,
    F16,
}

impl Type {
    pub const ALL: [Self; 2] = [Self::Bf16, Self::F16];

    pub fn name(self) -> &'static str {
        match self {
            Self::Bf16 => "bf16",
            Self::F16 => "f16",
        }
    }

    pub fn round(self, value: f64) -> u16 {
        match self {
            Self::Bf16 => bf16::from_f32(value as f32).to_bits(),
            Self::F16 => f16::from_f32(value.clamp(-65504.0, 65504.0) as f32).to_bits(),
        }
    }

    pub fn widen(self, bits: u16) -> f64 {
        match self {
            Self::Bf16 => bf16::from_bits(bits).to_f64(),
            Self::F16 => f16::from_bits(bits).to_f64(),
        }
    }

    /// Half a unit in the last place, relative.
    pub fn rounding(self) -> f64 {
        match self {
            Self::Bf16 => 1.0 / 256.0,
            Self::F16 => 1.0 / 2048.0,
        }
    }

    /// Each output is the exact one rounded, or next to it where f32 sums differ.
    pub fn assert_near(self, what: &str, ours: &[u16], exact: &[f64]) {
        assert_eq!(ours.len(), exact.len(), "{what}");
        for (index, (ours, exact)) in ours.iter().zip(exact).enumerate() {
            let ours = self.widen(*ours);
            let most = exact.abs() * (self.rounding() + 1e-5) + 1e-7;
            assert!((ours - exact).abs() <= most, "{what}, element {index}: {ours} for {exact}");
        }
    }
}

/// A generator that a test's name of numbers seeds.
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1)
    }

    pub fn word(&mut self) -> u32 {
        self.0 =
            self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) as u32
    }

    pub fn below(&mut self, end: u32) -> u32 {
        self.word() % end
    }

    /// Mostly within (-2, 2); one in 200 is 50 times that.
    pub fn elements(&mut self, of: Type, count: usize) -> Vec<u16> {
        let mut draw = || {
            let value = f64::from(self.word()) / f64::from(1u32 << 29) - 2.0;
            of.round(if self.below(200) == 0 { value * 50.0 } else { value })
        };
        (0..count).map(|_| draw()).collect()
    }
}

pub fn bytes_of<T: Copy, const N: usize>(values: &[T], bytes: fn(T) -> [u8; N]) -> Vec<u8> {
    values.iter().flat_map(|value| bytes(*value)).collect()
}

pub fn halves(values: &[u16]) -> Vec<u8> {
    bytes_of(values, u16::to_ne_bytes)
}

pub fn words(values: &[u32]) -> Vec<u8> {
    bytes_of(values, u32::to_ne_bytes)
}

pub fn read_halves(bytes: &[u8]) -> Vec<u16> {
    bytes.as_chunks::<2>().0.iter().map(|two| u16::from_ne_bytes(*two)).collect()
}

pub fn read_words(bytes: &[u8]) -> Vec<u32> {
    bytes.as_chunks::<4>().0.iter().map(|four| u32::from_ne_bytes(*four)).collect()
}

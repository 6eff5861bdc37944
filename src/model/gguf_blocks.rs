//! The quantised blocks of GGUF, as ggml defines them (ggml-common.h and ggml-quants.c of
//! ggml-org/llama.cpp), decoded into rows of our layouts. Nothing is lost but the rounding to f32
//! of a K type's scale, which is a product of two numbers.

use crate::ops::{Bits, QuantRow, QuantSpec};

use super::gguf::TensorKind;

/// Fills a row from its bytes, which are whole blocks.
pub type Decode = fn(&[u8], QuantRow<'_>);

/// The layout of a quantised type and its row decoder; none for dense types.
pub fn decoder(kind: TensorKind) -> Option<(QuantSpec, Decode)> {
    let spec = |bits, group, zero, has_min, half_scales| QuantSpec {
        bits,
        group,
        zero,
        has_min,
        half_scales,
    };
    Some(match kind {
        TensorKind::F32 | TensorKind::F16 | TensorKind::BF16 => return None,
        TensorKind::Q4_0 => {
            (spec(Bits::Four, 32, 8, false, true), |row, to| nibbles(row, to, false))
        }
        TensorKind::Q4_1 => (spec(Bits::Four, 32, 0, true, true), |row, to| nibbles(row, to, true)),
        TensorKind::Q5_0 => {
            (spec(Bits::Eight, 32, 16, false, true), |row, to| five(row, to, false))
        }
        TensorKind::Q5_1 => (spec(Bits::Eight, 32, 0, true, true), |row, to| five(row, to, true)),
        TensorKind::Q8_0 => (spec(Bits::Eight, 32, 128, false, true), |row, to| eight(row, to, 2)),
        TensorKind::Q8_1 => (spec(Bits::Eight, 32, 128, false, true), |row, to| eight(row, to, 4)),
        TensorKind::Q2_K => (spec(Bits::Four, 16, 0, true, false), q2_k),
        TensorKind::Q3_K => (spec(Bits::Four, 16, 4, false, false), q3_k),
        TensorKind::Q4_K => (spec(Bits::Four, 32, 0, true, false), |row, to| k45(row, to, false)),
        TensorKind::Q5_K => (spec(Bits::Eight, 32, 0, true, false), |row, to| k45(row, to, true)),
        TensorKind::Q6_K => (spec(Bits::Eight, 16, 32, false, false), q6_k),
        TensorKind::Q8_K => (spec(Bits::Eight, 32, 128, false, false), q8_k),
    })
}

fn f16(bytes: &[u8]) -> f32 {
    half::f16::from_le_bytes([bytes[0], bytes[1]]).to_f32()
}

fn nibbles(row: &[u8], to: QuantRow<'_>, has_min: bool) {
    let head = if has_min { 4 } else { 2 };
    for (group, block) in row.chunks_exact(head + 16).enumerate() {
        to.scale[group] = f16(block);
        if has_min {
            to.min[group] = f16(&block[2..]);
        }
        for (index, byte) in block[head..].iter().enumerate() {
            to.q[group * 32 + index] = byte & 15;
            to.q[group * 32 + 16 + index] = byte >> 4;
        }
    }
}

fn five(row: &[u8], to: QuantRow<'_>, has_min: bool) {
    let head = if has_min { 4 } else { 2 };
    for (group, block) in row.chunks_exact(head + 20).enumerate() {
        to.scale[group] = f16(block);
        if has_min {
            to.min[group] = f16(&block[2..]);
        }
        let high =
            u32::from_le_bytes([block[head], block[head + 1], block[head + 2], block[head + 3]]);
        for (index, byte) in block[head + 4..].iter().enumerate() {
            let bit = |at: usize| ((high >> at & 1) as u8) << 4;
            to.q[group * 32 + index] = byte & 15 | bit(index);
            to.q[group * 32 + 16 + index] = byte >> 4 | bit(index + 16);
        }
    }
}

/// Q8_0 and Q8_1, whose head also holds a sum of the block that only products of two quantised
/// rows use.
fn eight(row: &[u8], to: QuantRow<'_>, head: usize) {
    for (group, block) in row.chunks_exact(head + 32).enumerate() {
        to.scale[group] = f16(block);
        for (q, byte) in to.q[group * 32..].iter_mut().zip(&block[head..]) {
            *q = byte ^ 128;
        }
    }
}

/// Two bits of value `value` of a block of 256: each 32 bytes hold 128 values, in four planes.
fn two_bits(bytes: &[u8], value: usize) -> u8 {
    let (half, within) = (value / 128, value % 128);
    bytes[half * 32 + within % 32] >> (within / 32 * 2) & 3
}

/// 256 values of two bits; sixteen 4-bit scales with their 4-bit minimums.
fn q2_k(row: &[u8], to: QuantRow<'_>) {
    for (index, block) in row.chunks_exact(84).enumerate() {
        let (scales, low) = (&block[..16], &block[16..80]);
        let (d, d_min) = (f16(&block[80..]), f16(&block[82..]));
        for (group, packed) in scales.iter().enumerate() {
            to.scale[index * 16 + group] = d * f32::from(packed & 15);
            to.min[index * 16 + group] = -d_min * f32::from(packed >> 4);
        }
        for value in 0..256 {
            to.q[index * 256 + value] = two_bits(low, value);
        }
    }
}

/// 256 values of three bits, the highest kept apart; sixteen 6-bit scales, whose two high bits are
/// kept apart as well.
fn q3_k(row: &[u8], to: QuantRow<'_>) {
    for (index, block) in row.chunks_exact(110).enumerate() {
        let (high, low, packed) = (&block[..32], &block[32..96], &block[96..108]);
        let d = f16(&block[108..]);
        for group in 0..16 {
            let byte = packed[group % 8];
            let nibble = if group < 8 { byte & 15 } else { byte >> 4 };
            let top = packed[8 + group % 4] >> (group / 4 * 2) & 3;
            to.scale[index * 16 + group] = d * (f32::from(nibble | top << 4) - 32.0);
        }
        for value in 0..256 {
            let top = high[value % 32] >> (value / 32) & 1;
            to.q[index * 256 + value] = two_bits(low, value) | top << 2;
        }
    }
}

/// Q4_K and Q5_K: 256 values, eight 6-bit scales and minimums packed into 12 bytes.
fn k45(row: &[u8], to: QuantRow<'_>, five: bool) {
    for (index, block) in row.chunks_exact(if five { 176 } else { 144 }).enumerate() {
        let (d, d_min, packed) = (f16(block), f16(&block[2..]), &block[4..16]);
        let (high, low) =
            if five { (&block[16..48], &block[48..]) } else { (&[][..], &block[16..]) };
        for group in 0..8 {
            let (scale, min) = match group {
                0..4 => (packed[group] & 63, packed[group + 4] & 63),
                _ => (
                    packed[group + 4] & 15 | packed[group - 4] >> 6 << 4,
                    packed[group + 4] >> 4 | packed[group] >> 6 << 4,
                ),
            };
            to.scale[index * 8 + group] = d * f32::from(scale);
            to.min[index * 8 + group] = -d_min * f32::from(min);
            for value in 0..32 {
                let byte = low[group / 2 * 32 + value];
                let nibble = if group % 2 == 0 { byte & 15 } else { byte >> 4 };
                let top = high.get(value).map_or(0, |bits| (bits >> group & 1) << 4);
                to.q[index * 256 + group * 32 + value] = nibble | top;
            }
        }
    }
}

fn q6_k(row: &[u8], to: QuantRow<'_>) {
    for (index, block) in row.chunks_exact(210).enumerate() {
        let (low, high, scales, d) =
            (&block[..128], &block[128..192], &block[192..208], f16(&block[208..]));
        for (group, scale) in scales.iter().enumerate() {
            to.scale[index * 16 + group] = d * f32::from(*scale as i8);
        }
        for value in 0..256 {
            let (half, within) = (value / 128, value % 128);
            let byte = low[half * 64 + within % 64];
            let nibble = if within < 64 { byte & 15 } else { byte >> 4 };
            to.q[index * 256 + value] = nibble | two_bits(high, value) << 4;
        }
    }
}

/// 256 values of eight bits with one scale, which is an f32, and sums that only products of two
/// quantised rows use.
fn q8_k(row: &[u8], to: QuantRow<'_>) {
    for (index, block) in row.chunks_exact(292).enumerate() {
        let scale = f32::from_le_bytes([block[0], block[1], block[2], block[3]]);
        to.scale[index * 8..][..8].fill(scale);
        for (q, byte) in to.q[index * 256..].iter_mut().zip(&block[4..260]) {
            *q = byte ^ 128;
        }
    }
}

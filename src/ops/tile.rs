//! The inner loops of `linear`: activations as 16-bit integers, and one tile of outputs for a few
//! rows, written once for all instruction sets.

use half::{bf16, f16};

use super::{
    arena::lane_max,
    lanes::{Element, LANES, Lanes, for_isa},
    simd::Isa,
    weight::{Bits, DenseType, GROUP, QuantSpec, TILE},
};

/// Most rows of x computed together.
pub const ROWS_MAX: usize = 8;
/// The largest quantised activation: the products of a group with weights of 8 bits fit i32.
const X_MAX: f32 = 32767.0;
/// A group whose values are all this small counts as zero: the inverse of its step would overflow.
const X_TINY: f32 = 1e-30;

/// What goes with the 32 integers of a group of activations.
#[derive(Clone, Copy, Debug, Default)]
pub struct GroupX {
    scale: f32,
    /// Sums of the integers: of each half, and of all.
    sums: [i32; 3],
    /// `scale` times the sums.
    scaled: [f32; 3],
}

/// Quantised rows of x: `q [rows, k]`, each four of a row in the order 0, 2, 1, 3, and
/// `groups [rows, k / 32]`.
#[derive(Clone, Copy)]
pub struct QuantX<'a> {
    pub q: &'a [i16],
    pub groups: &'a [GroupX],
    pub k: usize,
}

type Sums = [[f32; TILE]; ROWS_MAX];
const _: () = assert!(TILE == LANES);

/// How many of the rows left are computed together.
pub fn row_block(isa: Isa, left: usize) -> usize {
    match left {
        0..=1 => 1,
        2..=3 => 2,
        // With 16 registers, the sums of more rows would not stay in them.
        4..=7 => 4,
        _ if isa == Isa::Avx512Vnni => ROWS_MAX,
        _ => 4,
    }
}

for_isa! {
    /// Quantises one row: `q` has the length of `x`, `groups` a 32nd of it.
    pub fn quantise_row[](x: &[f32], q: &mut [i16], groups: &mut [GroupX]) = quantise
}

#[allow(clippy::extra_unused_type_parameters, reason = "plain code, compiled for each set")]
#[inline(always)]
unsafe fn quantise<L: Lanes>(x: &[f32], q: &mut [i16], groups: &mut [GroupX]) {
    let (x, _) = x.as_chunks::<GROUP>();
    let (q, _) = q.as_chunks_mut::<GROUP>();
    for ((values, q), group) in x.iter().zip(q).zip(groups) {
        let mut tops = [0f32; LANES];
        for (index, value) in values.iter().enumerate() {
            let top = &mut tops[index % LANES];
            *top = if value.abs() > *top { value.abs() } else { *top };
        }
        let top = lane_max(tops);
        let inverse = if top > X_TINY { X_MAX / top } else { 0.0 };
        let mut whole = [0i32; GROUP];
        for (whole, value) in whole.iter_mut().zip(values) {
            *whole = (value * inverse).round_ties_even() as i32;
        }
        for (q, whole) in q.chunks_exact_mut(4).zip(whole.chunks_exact(4)) {
            q.copy_from_slice(&[whole[0], whole[2], whole[1], whole[3]].map(|one| one as i16));
        }
        let (low, high) = whole.split_at(GROUP / 2);
        let (low, high): (i32, i32) = (low.iter().sum(), high.iter().sum());
        let (scale, sums) = (top / X_MAX, [low, high, low + high]);
        *group = GroupX { scale, sums, scaled: sums.map(|sum| scale * sum as f32) };
    }
}

/// `out[row][lane]` for `count` rows (1, 2, 4 or 8) of one quantised tile.
pub fn quant_tile(isa: Isa, spec: QuantSpec, tile: &[u8], x: QuantX, count: usize, out: &mut Sums) {
    assert!(x.q.len() >= count * x.k && x.groups.len() >= count * (x.k / GROUP));
    assert!(tile.len() == x.k / GROUP * spec.group_bytes());
    quant_rows(isa, spec, tile, x, count, out);
}

for_isa! {
    fn quant_rows[](spec: QuantSpec, tile: &[u8], x: QuantX, count: usize, out: &mut Sums) = quant_any
}

/// Fixes the number of rows, bits and scales a group, so that the loops unroll.
///
/// # Safety
/// Lengths as asserted by `quant_tile`, here and below.
#[inline(always)]
unsafe fn quant_any<L: Lanes>(
    spec: QuantSpec,
    tile: &[u8],
    x: QuantX,
    count: usize,
    out: &mut Sums,
) {
    macro_rules! kernels {
        ($($count:literal),*) => {
            match (count, spec.bits, spec.parts()) {
                $(($count, Bits::Four, 1) => quant::<L, $count, 4, 1>(spec, tile, x, out),
                ($count, Bits::Four, _) => quant::<L, $count, 4, 2>(spec, tile, x, out),
                ($count, Bits::Eight, 1) => quant::<L, $count, 8, 1>(spec, tile, x, out),
                ($count, Bits::Eight, _) => quant::<L, $count, 8, 2>(spec, tile, x, out),)*
                _ => unreachable!("{count} rows"),
            }
        };
    }
    // SAFETY: as the caller promises.
    unsafe { kernels!(1, 2, 4, 8) }
}

#[inline(always)]
unsafe fn quant<L: Lanes, const ROWS: usize, const BITS: usize, const PARTS: usize>(
    spec: QuantSpec,
    tile: &[u8],
    x: QuantX,
    out: &mut Sums,
) {
    let groups = x.k / GROUP;
    // SAFETY: the caller checked the lengths: every group of the tile and of the rows is there.
    unsafe {
        let mut acc = [L::splat(0.0); ROWS];
        for group in 0..groups {
            let bytes = tile.as_ptr().add(group * spec.group_bytes());
            let tables = bytes.add(spec.quant_bytes());
            let q = x.q.as_ptr().add(group * GROUP);
            let about = x.groups.as_ptr().add(group);
            for part in 0..PARTS {
                let sum = if PARTS == 1 { 2 } else { part };
                let mut dots = [L::splat_i32(0); ROWS];
                if spec.zero != 0 {
                    for (row, dot) in dots.iter_mut().enumerate() {
                        let sum = (*about.add(row * groups)).sums[sum];
                        *dot = L::splat_i32(-i32::from(spec.zero) * sum);
                    }
                }
                integer_dots::<L, ROWS, BITS, PARTS>(bytes, q, x.k, part, &mut dots);
                let scale = load_scales::<L>(spec, tables, part);
                for row in 0..ROWS {
                    let x_scale = L::splat((*about.add(row * groups)).scale);
                    acc[row] = L::mul_add(L::to_f32(dots[row]), L::mul(scale, x_scale), acc[row]);
                }
                if spec.has_min {
                    let min = load_scales::<L>(spec, tables, PARTS + part);
                    for (row, acc) in acc.iter_mut().enumerate() {
                        let scaled = (*about.add(row * groups)).scaled[sum];
                        *acc = L::mul_add(min, L::splat(scaled), *acc);
                    }
                }
            }
        }
        for (out, acc) in out.iter_mut().zip(acc) {
            L::store(out.as_mut_ptr(), acc);
        }
    }
}

/// Adds the products of one part of a group to the sums of each row.
#[inline(always)]
unsafe fn integer_dots<L: Lanes, const ROWS: usize, const BITS: usize, const PARTS: usize>(
    bytes: *const u8,
    q: *const i16,
    k: usize,
    part: usize,
    dots: &mut [L::I32; ROWS],
) {
    // SAFETY: the contract of `quant_any`; a group has 8 vectors of 4 inputs.
    unsafe {
        if BITS == 8 {
            for vector in part * 8 / PARTS..(part + 1) * 8 / PARTS {
                let pairs = L::bytes(bytes.add(vector * 64));
                add_pairs::<L, ROWS>(pairs, q.add(vector * 4), k, dots);
            }
            return;
        }
        for vector in 0..4 {
            let [low0, low1, high0, high1] = L::nibbles(bytes.add(vector * 64));
            if part == 0 {
                add_pairs::<L, ROWS>([low0, low1], q.add(vector * 4), k, dots);
            }
            if part + 1 == PARTS {
                add_pairs::<L, ROWS>([high0, high1], q.add((vector + 4) * 4), k, dots);
            }
        }
    }
}

/// Adds the products of 4 inputs, `q` of the first row, to the sums of each row.
// No closures here: they are not always inlined, and code outside of the function that has the
// instructions calls each of them.
#[inline(always)]
unsafe fn add_pairs<L: Lanes, const ROWS: usize>(
    pairs: [L::I32; 2],
    q: *const i16,
    k: usize,
    dots: &mut [L::I32; ROWS],
) {
    for (index, w) in pairs.into_iter().enumerate() {
        for (row, dot) in dots.iter_mut().enumerate() {
            // SAFETY: as above; two values of the row.
            *dot = unsafe { L::dot(*dot, w, q.add(row * k + index * 2)) };
        }
    }
}

#[inline(always)]
unsafe fn load_scales<L: Lanes>(spec: QuantSpec, tables: *const u8, index: usize) -> L::F32 {
    // SAFETY: the caller passes tables of a whole group and an index inside.
    unsafe {
        let at = tables.add(index * TILE * spec.scale_bytes());
        if spec.half_scales { L::load_f16(at.cast()) } else { L::load(at.cast()) }
    }
}

/// `out[row][lane]` for `count` rows of one dense tile `[k][16]`.
pub fn dense_tile(
    isa: Isa,
    dtype: DenseType,
    tile: &[u8],
    k: usize,
    x: &[f32],
    count: usize,
    out: &mut Sums,
) {
    assert!(x.len() >= count * k && tile.len() == k * TILE * dtype.bytes());
    let tile = tile.as_ptr();
    match dtype {
        DenseType::F32 => dense_rows::<f32>(isa, tile.cast(), k, x, count, out),
        DenseType::F16 => dense_rows::<f16>(isa, tile.cast(), k, x, count, out),
        DenseType::Bf16 => dense_rows::<bf16>(isa, tile.cast(), k, x, count, out),
    }
}

for_isa! {
    fn dense_rows[E: Element](tile: *const E, k: usize, x: &[f32], count: usize, out: &mut Sums) = dense_any
}

/// # Safety
/// Lengths as asserted by `dense_tile`, here and below.
#[inline(always)]
unsafe fn dense_any<L: Lanes, E: Element>(
    tile: *const E,
    k: usize,
    x: &[f32],
    count: usize,
    out: &mut Sums,
) {
    // SAFETY: as the caller promises.
    unsafe {
        match count {
            1 => dense::<L, E, 1>(tile, k, x, out),
            2 => dense::<L, E, 2>(tile, k, x, out),
            4 => dense::<L, E, 4>(tile, k, x, out),
            8 => dense::<L, E, 8>(tile, k, x, out),
            _ => unreachable!("{count} rows"),
        }
    }
}

#[inline(always)]
unsafe fn dense<L: Lanes, E: Element, const ROWS: usize>(
    tile: *const E,
    k: usize,
    x: &[f32],
    out: &mut Sums,
) {
    // SAFETY: the caller checked the lengths.
    unsafe {
        let mut acc = [L::splat(0.0); ROWS];
        for index in 0..k {
            let w = E::load::<L>(tile.add(index * TILE));
            for (row, acc) in acc.iter_mut().enumerate() {
                *acc = L::mul_add(w, L::splat(*x.as_ptr().add(row * k + index)), *acc);
            }
        }
        for (out, acc) in out.iter_mut().zip(acc) {
            L::store(out.as_mut_ptr(), acc);
        }
    }
}

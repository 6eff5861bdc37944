//! The inner loops of `linear`, one per instruction set, chosen at run time. All give equal bits.

use std::sync::OnceLock;

use super::weight::{Bits, DenseType, GROUP, QuantSpec, TILE, read_dense, read_scale};

/// Rows of x computed together.
pub const ROWS_MAX: usize = 8;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Isa {
    Portable,
    Avx2,
    Avx512Vnni,
}

/// The best instruction set of this machine.
pub fn isa() -> Isa {
    static ISA: OnceLock<Isa> = OnceLock::new();
    *ISA.get_or_init(|| available().last().copied().unwrap_or(Isa::Portable))
}

/// All that this machine can run, the best last.
pub fn available() -> Vec<Isa> {
    let mut isas = vec![Isa::Portable];
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::is_x86_feature_detected as has;
        if has!("avx2") && has!("fma") && has!("f16c") {
            isas.push(Isa::Avx2);
            if has!("avx512f") && has!("avx512bw") && has!("avx512vl") && has!("avx512vnni") {
                isas.push(Isa::Avx512Vnni);
            }
        }
    }
    isas
}

/// One activation is `high * RADIX + low`, both within ±127: the pairs of 8-bit products that AVX2
/// adds then fit i16.
const RADIX: i32 = 255;
/// The largest quantised activation.
const X_MAX: f32 = (127 * RADIX + 127) as f32;
/// A group whose values are all this small counts as zero: the inverse of its step would overflow.
const X_TINY: f32 = 1e-30;

/// Quantised rows of x: `q [rows, k/4, 2, 4]` (four high parts, then their four low parts),
/// `scale [rows, k/32]`, `sums [rows, k/16]`.
#[derive(Clone, Copy)]
pub struct QuantX<'a> {
    pub q: &'a [i8],
    pub scale: &'a [f32],
    pub sums: &'a [i32],
    pub k: usize,
}

type Sums = [[f32; TILE]; ROWS_MAX];

/// How many of the rows left are computed together.
pub fn row_block(left: usize) -> usize {
    match left {
        0..=1 => 1,
        2..=3 => 2,
        4..=7 => 4,
        _ => ROWS_MAX,
    }
}

/// Quantises one row to 16 bits in two parts, a scale per 32 and a sum per 16.
pub fn quantise_row(isa: Isa, x: &[f32], q: &mut [i8], scale: &mut [f32], sums: &mut [i32]) {
    #[cfg(target_arch = "x86_64")]
    match isa {
        // SAFETY: `isa` says that the machine has these instructions.
        Isa::Avx512Vnni | Isa::Avx2 => return unsafe { x86::quantise_avx2(x, q, scale, sums) },
        Isa::Portable => {}
    }
    let _ = isa;
    quantise(x, q, scale, sums);
}

#[inline(always)]
fn quantise(x: &[f32], q: &mut [i8], scale: &mut [f32], sums: &mut [i32]) {
    for (group, values) in x.chunks_exact(GROUP).enumerate() {
        let mut top = 0f32;
        for value in values {
            top = top.max(value.abs());
        }
        let step = top / X_MAX;
        let inverse = if top > X_TINY { X_MAX / top } else { 0.0 };
        let mut whole = [0i32; GROUP];
        let mut high = [0i32; GROUP];
        for ((whole, high), value) in whole.iter_mut().zip(&mut high).zip(values) {
            let rounded = (value * inverse).round_ties_even();
            *whole = rounded as i32;
            // RADIX is odd, so no quotient lies near a tie.
            *high = (rounded * (1.0 / RADIX as f32)).round_ties_even() as i32;
        }
        for (index, q) in q[group * 2 * GROUP..][..2 * GROUP].chunks_exact_mut(8).enumerate() {
            for byte in 0..4 {
                let (whole, high) = (whole[index * 4 + byte], high[index * 4 + byte]);
                q[byte] = high as i8;
                q[4 + byte] = (whole - high * RADIX) as i8;
            }
        }
        scale[group] = step;
        sums[group * 2] = whole[..16].iter().sum();
        sums[group * 2 + 1] = whole[16..].iter().sum();
    }
}

/// `out[row][lane]` for `count` rows (1, 2, 4 or 8) of one quantised tile.
pub fn quant_tile(isa: Isa, spec: QuantSpec, tile: &[u8], x: QuantX, count: usize, out: &mut Sums) {
    assert!(x.q.len() == count * x.k * 2 && tile.len() == x.k / GROUP * spec.group_bytes());
    match isa {
        Isa::Portable => quant_portable(spec, tile, x, count, out),
        #[cfg(target_arch = "x86_64")]
        // SAFETY: `isa` says that the machine has these instructions; lengths are asserted above.
        Isa::Avx2 => unsafe { x86::quant_avx2(spec, tile, x, count, out) },
        #[cfg(target_arch = "x86_64")]
        // SAFETY: as above.
        Isa::Avx512Vnni => unsafe {
            match count {
                1 => x86::quant_avx512::<1>(spec, tile, x, out),
                2 => x86::quant_avx512::<2>(spec, tile, x, out),
                4 => x86::quant_avx512::<4>(spec, tile, x, out),
                _ => x86::quant_avx512::<8>(spec, tile, x, out),
            }
        },
        #[cfg(not(target_arch = "x86_64"))]
        _ => quant_portable(spec, tile, x, count, out),
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
    match isa {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: `isa` says that the machine has these instructions.
        Isa::Avx512Vnni => unsafe { x86::dense_avx512(dtype, tile, k, x, count, out) },
        #[cfg(target_arch = "x86_64")]
        // SAFETY: as above.
        Isa::Avx2 => unsafe { x86::dense_avx2(dtype, tile, k, x, count, out) },
        _ => dense(dtype, tile, k, x, count, out),
    }
}

#[inline(always)]
fn dense(dtype: DenseType, tile: &[u8], k: usize, x: &[f32], count: usize, out: &mut Sums) {
    for index in 0..k {
        let mut w = [0f32; TILE];
        for (lane, w) in w.iter_mut().enumerate() {
            *w = read_dense(tile, dtype, index * TILE + lane);
        }
        for (row, out) in out[..count].iter_mut().enumerate() {
            let x = x[row * k + index];
            for (out, w) in out.iter_mut().zip(&w) {
                *out = w.mul_add(x, *out);
            }
        }
    }
}

fn quant_portable(spec: QuantSpec, tile: &[u8], x: QuantX, count: usize, out: &mut Sums) {
    let groups = x.k / GROUP;
    for (group, bytes) in tile.chunks_exact(spec.group_bytes()).enumerate() {
        let tables = &bytes[spec.quant_bytes()..];
        for part in 0..spec.parts() {
            for (row, out) in out[..count].iter_mut().enumerate() {
                let q = &x.q[(row * x.k + group * GROUP) * 2..][..2 * GROUP];
                let sum = part_sum(spec, part, &x.sums[(row * groups + group) * 2..]);
                let x_scale = x.scale[row * groups + group];
                for (lane, out) in out.iter_mut().enumerate() {
                    let dot = dot_portable(spec, part, bytes, q, lane) - i32::from(spec.zero) * sum;
                    let scale = read_scale(tables, spec, part * TILE + lane) * x_scale;
                    *out = (dot as f32).mul_add(scale, *out);
                    if spec.has_min {
                        let min = read_scale(tables, spec, (spec.parts() + part) * TILE + lane);
                        *out = min.mul_add(x_scale * sum as f32, *out);
                    }
                }
            }
        }
    }
}

/// The sum of the activations that part `part` of a group covers.
#[inline(always)]
fn part_sum(spec: QuantSpec, part: usize, sums: &[i32]) -> i32 {
    if spec.parts() == 1 { sums[0] + sums[1] } else { sums[part] }
}

fn dot_portable(spec: QuantSpec, part: usize, bytes: &[u8], q: &[i8], lane: usize) -> i32 {
    let range = part * spec.group..(part + 1) * spec.group;
    range
        .map(|index| {
            let (vector, byte) = (index / 4, index % 4);
            let w = match spec.bits {
                Bits::Eight => bytes[vector * 64 + lane * 4 + byte],
                Bits::Four if vector < 4 => bytes[vector * 64 + lane * 4 + byte] & 15,
                Bits::Four => bytes[(vector - 4) * 64 + lane * 4 + byte] >> 4,
            };
            let (high, low) = (q[vector * 8 + byte], q[vector * 8 + 4 + byte]);
            i32::from(w) * (i32::from(high) * RADIX + i32::from(low))
        })
        .sum()
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    use super::*;

    #[target_feature(enable = "avx2,fma")]
    pub fn quantise_avx2(x: &[f32], q: &mut [i8], scale: &mut [f32], sums: &mut [i32]) {
        quantise(x, q, scale, sums);
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512vl,fma,f16c")]
    pub fn dense_avx512(d: DenseType, tile: &[u8], k: usize, x: &[f32], n: usize, out: &mut Sums) {
        dense_rows(d, tile, k, x, n, out);
    }

    #[target_feature(enable = "avx2,fma,f16c")]
    pub fn dense_avx2(d: DenseType, tile: &[u8], k: usize, x: &[f32], n: usize, out: &mut Sums) {
        dense_rows(d, tile, k, x, n, out);
    }

    /// Fixes dtype and count, so that the loops unroll.
    #[inline(always)]
    fn dense_rows(d: DenseType, tile: &[u8], k: usize, x: &[f32], n: usize, out: &mut Sums) {
        macro_rules! rows {
            ($($count:literal),*) => {
                match (d, n) {
                    $((DenseType::F32, $count) => dense(DenseType::F32, tile, k, x, $count, out),
                    (DenseType::F16, $count) => dense(DenseType::F16, tile, k, x, $count, out),
                    (DenseType::Bf16, $count) => dense(DenseType::Bf16, tile, k, x, $count, out),)*
                    _ => dense(d, tile, k, x, n, out),
                }
            };
        }
        rows!(1, 2, 4, 8);
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
    #[allow(clippy::needless_range_loop, reason = "several arrays run in step")]
    pub unsafe fn quant_avx512<const M: usize>(
        spec: QuantSpec,
        tile: &[u8],
        x: QuantX,
        out: &mut Sums,
    ) {
        let groups = x.k / GROUP;
        let parts = spec.parts();
        let per_part = 8 / parts;
        let nibble = _mm512_set1_epi8(15);
        let mut acc = [_mm512_setzero_ps(); M];
        for group in 0..groups {
            // SAFETY: the caller checked the length of `tile`: every group is there in full, and
            // every row of `x.q` holds `k` values, read four at a time.
            unsafe {
                let bytes = tile.as_ptr().add(group * spec.group_bytes());
                let tables = bytes.add(spec.quant_bytes());
                for part in 0..parts {
                    let mut high = [_mm512_setzero_si512(); M];
                    let mut low = [_mm512_setzero_si512(); M];
                    let mut sum = [0i32; M];
                    for row in 0..M {
                        sum[row] = part_sum(spec, part, &x.sums[(row * groups + group) * 2..]);
                        low[row] = _mm512_set1_epi32(-i32::from(spec.zero) * sum[row]);
                    }
                    for vector in part * per_part..(part + 1) * per_part {
                        let w = match spec.bits {
                            Bits::Eight => _mm512_loadu_si512(bytes.add(vector * 64).cast()),
                            Bits::Four => {
                                let packed = _mm512_loadu_si512(bytes.add(vector % 4 * 64).cast());
                                let packed = if vector < 4 {
                                    packed
                                } else {
                                    _mm512_srli_epi16::<4>(packed)
                                };
                                _mm512_and_si512(packed, nibble)
                            }
                        };
                        for row in 0..M {
                            let a = x.q.as_ptr().add((row * x.k + group * GROUP + vector * 4) * 2);
                            let a = a.cast::<i32>();
                            let a_high = _mm512_set1_epi32(a.read_unaligned());
                            let a_low = _mm512_set1_epi32(a.add(1).read_unaligned());
                            high[row] = _mm512_dpbusd_epi32(high[row], w, a_high);
                            low[row] = _mm512_dpbusd_epi32(low[row], w, a_low);
                        }
                    }
                    let scale = load_scales(spec, tables, part);
                    for row in 0..M {
                        let x_scale = _mm512_set1_ps(x.scale[row * groups + group]);
                        let both = _mm512_mul_ps(scale, x_scale);
                        let radix = _mm512_sub_epi32(_mm512_slli_epi32::<8>(high[row]), high[row]);
                        let dot = _mm512_cvtepi32_ps(_mm512_add_epi32(radix, low[row]));
                        acc[row] = _mm512_fmadd_ps(dot, both, acc[row]);
                    }
                    if spec.has_min {
                        let min = load_scales(spec, tables, parts + part);
                        for row in 0..M {
                            let sum = x.scale[row * groups + group] * sum[row] as f32;
                            acc[row] = _mm512_fmadd_ps(min, _mm512_set1_ps(sum), acc[row]);
                        }
                    }
                }
            }
        }
        for row in 0..M {
            // SAFETY: `out[row]` has 16 lanes.
            unsafe { _mm512_storeu_ps(out[row].as_mut_ptr(), acc[row]) };
        }
    }

    #[target_feature(enable = "avx512f")]
    unsafe fn load_scales(spec: QuantSpec, tables: *const u8, index: usize) -> __m512 {
        // SAFETY: the caller passes tables of a whole group and an index inside.
        unsafe {
            if spec.half_scales {
                _mm512_cvtph_ps(_mm256_loadu_si256(tables.add(index * TILE * 2).cast()))
            } else {
                _mm512_loadu_ps(tables.add(index * TILE * 4).cast())
            }
        }
    }

    #[target_feature(enable = "avx2,fma,f16c")]
    pub unsafe fn quant_avx2(
        spec: QuantSpec,
        tile: &[u8],
        x: QuantX,
        count: usize,
        out: &mut Sums,
    ) {
        let groups = x.k / GROUP;
        let parts = spec.parts();
        let per_part = 8 / parts;
        let ones = _mm256_set1_epi16(1);
        // Pairs of products of full u8 overflow i16, so 8-bit weights are taken as signed: w - 128.
        let shift = if spec.bits == Bits::Eight { 128 } else { 0 };
        for (group, bytes) in tile.chunks_exact(spec.group_bytes()).enumerate() {
            let tables = &bytes[spec.quant_bytes()..];
            for part in 0..parts {
                for (row, out) in out[..count].iter_mut().enumerate() {
                    let sum = part_sum(spec, part, &x.sums[(row * groups + group) * 2..]);
                    let start = _mm256_set1_epi32((shift - i32::from(spec.zero)) * sum);
                    let x_scale = x.scale[row * groups + group];
                    for half in 0..2 {
                        let mut dots = [start, _mm256_setzero_si256()];
                        for vector in part * per_part..(part + 1) * per_part {
                            // SAFETY: a group holds 8 (4-bit: 4) vectors of 64 bytes, and a row of
                            // `x.q` eight values for each.
                            let (w, a) = unsafe {
                                let at = match spec.bits {
                                    Bits::Eight => vector,
                                    Bits::Four => vector % 4,
                                };
                                let w = bytes.as_ptr().add(at * 64 + half * 32);
                                let a = (row * x.k + group * GROUP + vector * 4) * 2;
                                let a = x.q.as_ptr().add(a).cast::<i32>();
                                (
                                    _mm256_loadu_si256(w.cast()),
                                    [a.add(1).read_unaligned(), a.read_unaligned()],
                                )
                            };
                            for (dot, a) in dots.iter_mut().zip(a) {
                                let a = _mm256_set1_epi32(a);
                                let pairs = match spec.bits {
                                    Bits::Eight => {
                                        let w = _mm256_xor_si256(w, _mm256_set1_epi8(-128));
                                        let signed = _mm256_sign_epi8(a, w);
                                        _mm256_maddubs_epi16(_mm256_abs_epi8(w), signed)
                                    }
                                    Bits::Four => {
                                        let high = _mm256_srli_epi16::<4>(w);
                                        let w = if vector < 4 { w } else { high };
                                        let w = _mm256_and_si256(w, _mm256_set1_epi8(15));
                                        _mm256_maddubs_epi16(w, a)
                                    }
                                };
                                *dot = _mm256_add_epi32(*dot, _mm256_madd_epi16(pairs, ones));
                            }
                        }
                        let radix = _mm256_sub_epi32(_mm256_slli_epi32::<8>(dots[1]), dots[1]);
                        let dot = _mm256_add_epi32(radix, dots[0]);
                        let mut dots = [0i32; 8];
                        // SAFETY: `dots` has 8 lanes.
                        unsafe { _mm256_storeu_si256(dots.as_mut_ptr().cast(), dot) };
                        for (lane, dot) in dots.into_iter().enumerate() {
                            let lane = half * 8 + lane;
                            let scale = read_scale(tables, spec, part * TILE + lane) * x_scale;
                            out[lane] = (dot as f32).mul_add(scale, out[lane]);
                            if spec.has_min {
                                let min = read_scale(tables, spec, (parts + part) * TILE + lane);
                                out[lane] = min.mul_add(x_scale * sum as f32, out[lane]);
                            }
                        }
                    }
                }
            }
        }
    }
}

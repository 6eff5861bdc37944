//! y = x Wᵀ (+ bias), quantised or dense.
//!
//! Activations meet quantised weights as 16-bit integers with one f32 scale per 32 inputs; integer
//! dot products are exact, and the f32 sum of an output runs over the groups in order. So an output
//! element has the same bits whatever the number of rows, threads or the instruction set.

use std::sync::Mutex;

use candle_core::{CpuStorage, CudaStorage, InplaceOp1, Layout, Result, bail};

use super::{
    CpuPlace, Matrix, PackedWeight, Place, Vector, View,
    arena::Shared,
    gpu::{Args, Launch, Matmul, PACK, THREADS, kernel},
    region::{self, GpuOp1},
    simd::{self, Isa},
    tile::{self, GroupX, QuantX},
    weight::{GROUP, Segment, SegmentKind, TILE},
};

/// Rows from which quantising is spread over the threads.
const PARALLEL_ROWS_MIN: usize = 4;
/// Tiles that a thread takes at once for one row; with more rows it takes fewer.
const GRAIN_TILES: usize = 8;

/// Rows of weights that a block of the GPU's kernel takes.
const GEMV_ROWS: usize = 4;

/// Quantised activations, allocated once.
pub struct LinearScratch(Mutex<Quantised>);

struct Quantised {
    q: Vec<i16>,
    groups: Vec<GroupX>,
}

impl LinearScratch {
    /// Room for `rows_max` rows of `k_max` inputs.
    pub fn new(rows_max: usize, k_max: usize) -> Self {
        let groups = rows_max * k_max.div_ceil(GROUP);
        Self(Mutex::new(Quantised {
            q: vec![0; groups * GROUP],
            groups: vec![GroupX::default(); groups],
        }))
    }
}

/// `y[rows, n] = x[rows, k] Wᵀ + bias[n]` on the arena; `x` and `y` do not overlap.
pub struct Linear<'a> {
    pub weight: &'a Matrix,
    pub bias: Option<&'a Vector>,
    pub x: View,
    pub y: View,
    pub rows: usize,
    /// On a GPU y is f32, in twice the room: logits. On the CPU everything is f32.
    pub wide: bool,
    pub place: &'a Place,
}

/// What the CPU works with.
struct OnCpu<'a> {
    weight: &'a PackedWeight,
    bias: Option<&'a [f32]>,
    x: View,
    y: View,
    rows: usize,
    place: &'a CpuPlace,
}

impl InplaceOp1 for Linear<'_> {
    fn name(&self) -> &'static str {
        "linear"
    }

    fn cpu_fwd(&self, storage: &mut CpuStorage, layout: &Layout) -> Result<()> {
        let op = OnCpu {
            weight: self.weight.host()?,
            bias: self.bias.map(Vector::host).transpose()?,
            x: self.x,
            y: self.y,
            rows: self.rows,
            place: self.place.cpu()?,
        };
        op.forward(storage, layout, simd::isa())
    }

    fn cuda_fwd(&self, storage: &mut CudaStorage, layout: &Layout) -> Result<()> {
        self.gpu_fwd(region::address(storage, layout)?)
    }
}

impl GpuOp1 for Linear<'_> {
    fn gpu_fwd(&self, arena: u64) -> Result<()> {
        let (place, weight) = (self.place.gpu()?, self.weight.gpu()?);
        if self.x.cols != weight.k || self.y.cols < weight.n {
            bail!("linear {} x {}: x {:?}, y {:?}", weight.n, weight.k, self.x, self.y);
        }
        if self.rows == 0 {
            return Ok(());
        }
        let matmul = Matmul {
            x: self.x.address(arena),
            w: weight.memory.address,
            bias: self.bias.map(Vector::gpu).transpose()?,
            y: self.y.address(arena),
            m: self.rows,
            n: weight.n,
            k: weight.k,
            dtype: place.dtype,
            wide: self.wide,
            y_stride: self.y.cols,
        };
        match gemv(&matmul).filter(|_| self.rows <= place.gpu.gemv_rows_max()) {
            Some(launch) => place.gpu.launch(&launch),
            None => place.gpu.matmul(&matmul),
        }
    }
}

/// A product of few rows by our own kernel, at the speed of reading the weights.
fn gemv(op: &Matmul) -> Option<Launch> {
    let kernel = match op.m {
        1 => kernel!("gemv_1", op.dtype),
        2 => kernel!("gemv_2", op.dtype),
        3 => kernel!("gemv_3", op.dtype),
        4 => kernel!("gemv_4", op.dtype),
        5 => kernel!("gemv_5", op.dtype),
        6 => kernel!("gemv_6", op.dtype),
        7 => kernel!("gemv_7", op.dtype),
        8 => kernel!("gemv_8", op.dtype),
        _ => return None,
    };
    let (narrow, wide) = if op.wide { (0, op.y) } else { (op.y, 0) };
    Some(Launch {
        kernel,
        grid: [op.n.div_ceil(GEMV_ROWS) as u32, 1, 1],
        threads: ((op.k / PACK).next_multiple_of(32) as u32).clamp(32, THREADS),
        shared_bytes: 0,
        args: Args::default()
            .address(op.x)
            .address(op.w)
            .address(op.bias.unwrap_or(0))
            .address(narrow)
            .address(wide)
            .u32(op.n)
            .u32(op.k)
            .u32(op.y_stride),
        work: op.work(),
    })
}

impl OnCpu<'_> {
    fn forward(&self, storage: &mut CpuStorage, layout: &Layout, isa: Isa) -> Result<()> {
        let CpuStorage::F32(arena) = storage else { bail!("linear wants an f32 arena") };
        let (n, k) = (self.weight.n(), self.weight.k());
        let (x, y) = (self.x.range(self.rows), self.y.range(self.rows));
        let overlap = x.start < y.end && y.start < x.end;
        let inside = layout.is_contiguous() && x.end <= arena.len() && y.end <= arena.len();
        if self.x.cols != k || self.y.cols != n || overlap || !inside {
            bail!("linear {n} x {k}: x {:?}, y {:?}, {} rows", self.x, self.y, self.rows);
        }
        if self.rows == 0 {
            return Ok(());
        }
        let arena = Shared::new(arena);
        // SAFETY: nothing writes to `x` below.
        let x: &[f32] = unsafe { arena.part(x.start, x.len()) };
        let mut scratch =
            self.place.scratch.0.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        if self.weight.segments.iter().any(|one| matches!(one.kind, SegmentKind::Quant(_))) {
            self.quantise(isa, x, &mut scratch);
        }
        let quantised: &Quantised = &scratch;
        let tiles: usize = self.weight.segments.iter().map(|one| one.rows.div_ceil(TILE)).sum();
        let grain = (GRAIN_TILES / self.rows).max(1);
        self.place.pool.each(tiles, grain, &|tiles| {
            let mut first = 0;
            for segment in &self.weight.segments {
                let count = segment.rows.div_ceil(TILE);
                for tile in tiles.start.max(first)..tiles.end.min(first + count) {
                    self.tile(isa, segment, tile - first, x, quantised, &arena);
                }
                first += count;
            }
        });
        Ok(())
    }

    fn quantise(&self, isa: Isa, x: &[f32], scratch: &mut Quantised) {
        let k = self.weight.k();
        let groups = k / GROUP;
        let (q, about) = (Shared::new(&mut scratch.q), Shared::new(&mut scratch.groups));
        let grain = if self.rows < PARALLEL_ROWS_MIN { self.rows } else { 1 };
        self.place.pool.each(self.rows, grain, &|rows| {
            for row in rows {
                // SAFETY: rows are disjoint.
                let (q, about) = unsafe { (q.part(row * k, k), about.part(row * groups, groups)) };
                tile::quantise_row(isa, &x[row * k..(row + 1) * k], q, about);
            }
        });
    }

    /// One tile of outputs for all rows.
    fn tile(
        &self,
        isa: Isa,
        segment: &Segment,
        tile: usize,
        x: &[f32],
        quantised: &Quantised,
        arena: &Shared<f32>,
    ) {
        let k = self.weight.k();
        let data = &segment.data.bytes()[tile * segment.tile_bytes..][..segment.tile_bytes];
        let first = segment.first + tile * TILE;
        let lanes = TILE.min(segment.first + segment.rows - first);
        let mut row = 0;
        while row < self.rows {
            let mut sums = [[0f32; TILE]; tile::ROWS_MAX];
            let count = tile::row_block(isa, self.rows - row);
            match segment.kind {
                SegmentKind::Dense(dtype) => {
                    tile::dense_tile(isa, dtype, data, k, &x[row * k..], count, &mut sums);
                }
                SegmentKind::Quant(spec) => {
                    let x = QuantX {
                        q: &quantised.q[row * k..],
                        groups: &quantised.groups[row * (k / GROUP)..],
                        k,
                    };
                    tile::quant_tile(isa, spec, data, x, count, &mut sums);
                }
            }
            for (index, sum) in sums[..count].iter_mut().enumerate() {
                if let Some(bias) = self.bias {
                    for (value, bias) in sum.iter_mut().zip(&bias[first..first + lanes]) {
                        *value += bias;
                    }
                }
                // SAFETY: columns `first .. first + lanes` of this row belong to this tile alone.
                let y = unsafe {
                    arena.part(self.y.offset + (row + index) * self.y.cols + first, lanes)
                };
                y.copy_from_slice(&sum[..lanes]);
            }
            row += count;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use proptest::prelude::*;

    use super::*;
    use crate::ops::{Bits, CpuPool, DenseType, QuantSpec};

    const K: usize = 96;
    const N: usize = 40;
    const ROWS: usize = 15;

    /// Values in -1 .. 1 from a multiplicative congruence.
    fn values(count: usize, mut seed: u64) -> Vec<f32> {
        let mut next = || {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (seed >> 40) as f32 / (1u64 << 23) as f32 - 1.0
        };
        (0..count).map(|_| next()).collect()
    }

    fn quantised(spec: QuantSpec, seed: u64) -> PackedWeight {
        let mut builder = PackedWeight::builder(K);
        let levels = if spec.bits == Bits::Four { 16.0 } else { 256.0 };
        builder
            .push_quant(N, spec, &mut |row, out| {
                let drawn = values(K, seed + row as u64);
                for (q, value) in out.q.iter_mut().zip(drawn) {
                    *q = ((value + 1.0) / 2.0 * levels) as u8;
                }
                out.scale.copy_from_slice(&values(out.scale.len(), seed + 1000 + row as u64));
                out.min.copy_from_slice(&values(out.min.len(), seed + 2000 + row as u64));
            })
            .expect("packs");
        builder.build()
    }

    fn dense(dtype: DenseType, seed: u64) -> PackedWeight {
        let bytes: Vec<u8> = values(N * K, seed)
            .into_iter()
            .flat_map(|value| match dtype {
                DenseType::F32 => value.to_le_bytes().to_vec(),
                DenseType::F16 => half::f16::from_f32(value).to_le_bytes().to_vec(),
                DenseType::Bf16 => half::bf16::from_f32(value).to_le_bytes().to_vec(),
            })
            .collect();
        let mut builder = PackedWeight::builder(K);
        builder.push_dense(N, dtype, &bytes).expect("packs");
        builder.build()
    }

    fn all_weights(seed: u64) -> Vec<PackedWeight> {
        let mut weights = Vec::new();
        for (bits, zeros) in [(Bits::Four, [0, 8]), (Bits::Eight, [0, 128])] {
            for zero in zeros {
                for (group, has_min) in [(16, false), (16, true), (32, false), (32, true)] {
                    for half_scales in [false, true] {
                        let spec = QuantSpec { bits, group, zero, has_min, half_scales };
                        weights.push(quantised(spec, seed));
                    }
                }
            }
        }
        weights.extend([DenseType::F32, DenseType::F16, DenseType::Bf16].map(|d| dense(d, seed)));
        weights
    }

    fn run(weight: &PackedWeight, x: &[f32], rows: usize, isa: Isa, threads: usize) -> Vec<f32> {
        let mut arena = vec![f32::NAN; rows * (K + N)];
        arena[..rows * K].copy_from_slice(&x[..rows * K]);
        let mut storage = CpuStorage::F32(arena);
        let pool = CpuPool::new(threads).expect("threads");
        let op = OnCpu {
            weight,
            bias: None,
            x: View { offset: 0, cols: K },
            y: View { offset: rows * K, cols: N },
            rows,
            place: &CpuPlace { pool: Arc::new(pool), scratch: LinearScratch::new(rows, K) },
        };
        op.forward(&mut storage, &Layout::contiguous(rows * (K + N)), isa).expect("runs");
        let CpuStorage::F32(arena) = storage else { unreachable!() };
        arena[rows * K..].to_vec()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(16))]

        #[test]
        fn every_isa_batch_and_thread_count_gives_the_same_bits(seed in 0u64..1 << 40) {
            let x = values(ROWS * K, seed);
            for weight in all_weights(seed) {
                let expected = run(&weight, &x, ROWS, Isa::Portable, 1);
                prop_assert!(expected.iter().all(|y| y.is_finite()));
                for isa in simd::available() {
                    prop_assert_eq!(&run(&weight, &x, ROWS, isa, 2), &expected, "{:?}", isa);
                    for row in 0..ROWS {
                        let alone = run(&weight, &x[row * K..], 1, isa, 1);
                        prop_assert_eq!(&alone[..], &expected[row * N..][..N], "{:?} {}", isa, row);
                    }
                }
            }
        }

        /// Against a sum in f64: 16-bit activations leave 2^-16 of the largest term of a group.
        #[test]
        fn sums_are_near_those_in_f64(seed in 0u64..1 << 40) {
            let x = values(2 * K, seed);
            for weight in all_weights(seed) {
                let ours = run(&weight, &x, 2, simd::isa(), 1);
                let mut w = vec![0f32; K];
                for n in 0..N {
                    weight.dequant_row(n, &mut w);
                    for row in 0..2 {
                        let terms = || w.iter().zip(&x[row * K..]).map(|(w, x)| (f64::from(*w), f64::from(*x)));
                        let exact: f64 = terms().map(|(w, x)| w * x).sum();
                        // With a minimum, a weight is the small difference of larger products.
                        let size: f64 = terms().map(|(w, _)| w.abs()).sum::<f64>() + K as f64;
                        let error = (f64::from(ours[row * N + n]) - exact).abs();
                        prop_assert!(error <= size * 5e-5, "{n} {row}: {error} of {size}");
                    }
                }
            }
        }
    }

    #[test]
    fn zero_and_tiny_activations_stay_finite() {
        for weight in all_weights(7) {
            for value in [0.0, f32::MIN_POSITIVE, 1e-42] {
                let y = run(&weight, &[value; K], 1, simd::isa(), 1);
                assert!(y.iter().all(|y| y.is_finite() && y.abs() < 1e-30), "{value}: {y:?}");
            }
        }
    }
}

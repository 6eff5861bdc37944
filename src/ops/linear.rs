//! y = x Wᵀ (+ bias), quantised or dense.
//!
//! Activations meet quantised weights as 16-bit integers with one f32 scale per 32 inputs; integer
//! dot products are exact, and the f32 sum of an output runs over the groups in order. So an output
//! element has the same bits whatever the number of rows, threads or the instruction set.

use std::sync::Mutex;

use candle_core::{CpuStorage, InplaceOp1, Layout, Result, bail};

use super::{
    CpuPool, View,
    simd::{self, Isa, QuantX},
    weight::{GROUP, PackedWeight, Segment, SegmentKind, TILE},
};

/// Rows from which quantising is spread over the threads.
const PARALLEL_ROWS_MIN: usize = 4;

/// Quantised activations, allocated once.
pub struct LinearScratch(Mutex<Quantised>);

struct Quantised {
    q: Vec<i8>,
    scale: Vec<f32>,
    /// Sums of `q` over halves of a group.
    sums: Vec<i32>,
}

impl LinearScratch {
    /// Room for `rows_max` rows of `k_max` inputs.
    pub fn new(rows_max: usize, k_max: usize) -> Self {
        let groups = rows_max * k_max.div_ceil(GROUP);
        Self(Mutex::new(Quantised {
            q: vec![0; groups * GROUP * 2],
            scale: vec![0.0; groups],
            sums: vec![0; groups * 2],
        }))
    }
}

/// `y[rows, n] = x[rows, k] Wᵀ + bias[n]` on the f32 arena; `x` and `y` do not overlap.
pub struct Linear<'a> {
    pub weight: &'a PackedWeight,
    pub bias: Option<&'a [f32]>,
    pub x: View,
    pub y: View,
    pub rows: usize,
    pub scratch: &'a LinearScratch,
    pub pool: &'a CpuPool,
}

impl InplaceOp1 for Linear<'_> {
    fn name(&self) -> &'static str {
        "linear"
    }

    fn cpu_fwd(&self, storage: &mut CpuStorage, layout: &Layout) -> Result<()> {
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
        let arena = arena.as_mut_ptr();
        // SAFETY: `x` lies inside the arena and nothing writes to it below.
        let x = unsafe { std::slice::from_raw_parts(arena.wrapping_add(x.start), self.rows * k) };
        // The parts of `run` write disjoint columns of `y`.
        let y = Out { data: arena.wrapping_add(y.start), stride: n };
        let isa = simd::isa();
        let mut scratch = self.scratch.0.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        if self.weight.segments.iter().any(|one| matches!(one.kind, SegmentKind::Quant(_))) {
            self.quantise(isa, x, &mut scratch);
        }
        let quantised: &Quantised = &scratch;
        let tiles: usize = self.weight.segments.iter().map(|one| one.rows.div_ceil(TILE)).sum();
        let threads = self.pool.threads();
        self.pool.run(&|part| {
            let (from, to) = (tiles * part / threads, tiles * (part + 1) / threads);
            let mut first = 0;
            for segment in &self.weight.segments {
                let count = segment.rows.div_ceil(TILE);
                for tile in from.max(first)..to.min(first + count) {
                    self.tile(isa, segment, tile - first, x, quantised, &y);
                }
                first += count;
            }
        });
        Ok(())
    }
}

/// Where a part writes.
struct Out {
    data: *mut f32,
    stride: usize,
}

// SAFETY: every part writes its own columns only.
unsafe impl Sync for Out {}

impl Linear<'_> {
    fn quantise(&self, isa: Isa, x: &[f32], scratch: &mut Quantised) {
        let k = self.weight.k();
        let groups = k / GROUP;
        let (q, scale, sums) = (
            Slot(scratch.q.as_mut_ptr()),
            Slot(scratch.scale.as_mut_ptr()),
            Slot(scratch.sums.as_mut_ptr()),
        );
        assert!(scratch.q.len() >= self.rows * k * 2, "scratch for {} rows of {k}", self.rows);
        let rows = |from: usize, to: usize| {
            for row in from..to {
                // SAFETY: rows are disjoint and inside the buffers, as asserted above.
                let (q, scale, sums) = unsafe {
                    (
                        std::slice::from_raw_parts_mut(q.at(row * k * 2), k * 2),
                        std::slice::from_raw_parts_mut(scale.at(row * groups), groups),
                        std::slice::from_raw_parts_mut(sums.at(row * groups * 2), groups * 2),
                    )
                };
                simd::quantise_row(isa, &x[row * k..(row + 1) * k], q, scale, sums);
            }
        };
        if self.rows < PARALLEL_ROWS_MIN {
            return rows(0, self.rows);
        }
        let threads = self.pool.threads();
        self.pool.run(&|part| rows(self.rows * part / threads, self.rows * (part + 1) / threads));
    }

    /// One tile of outputs for all rows.
    fn tile(
        &self,
        isa: Isa,
        segment: &Segment,
        tile: usize,
        x: &[f32],
        quantised: &Quantised,
        y: &Out,
    ) {
        let k = self.weight.k();
        let data = &segment.data.bytes()[tile * segment.tile_bytes..][..segment.tile_bytes];
        let first = segment.first + tile * TILE;
        let lanes = TILE.min(segment.first + segment.rows - first);
        let mut row = 0;
        while row < self.rows {
            let mut sums = [[0f32; TILE]; simd::ROWS_MAX];
            let count = simd::row_block(self.rows - row);
            match segment.kind {
                SegmentKind::Dense(dtype) => {
                    simd::dense_tile(isa, dtype, data, k, &x[row * k..], count, &mut sums);
                }
                SegmentKind::Quant(spec) => {
                    let groups = k / GROUP;
                    let x = QuantX {
                        q: &quantised.q[row * k * 2..(row + count) * k * 2],
                        scale: &quantised.scale[row * groups..(row + count) * groups],
                        sums: &quantised.sums[row * groups * 2..(row + count) * groups * 2],
                        k,
                    };
                    simd::quant_tile(isa, spec, data, x, count, &mut sums);
                }
            }
            for (index, sum) in sums[..count].iter_mut().enumerate() {
                if let Some(bias) = self.bias {
                    for (value, bias) in sum.iter_mut().zip(&bias[first..first + lanes]) {
                        *value += bias;
                    }
                }
                // SAFETY: columns `first .. first + lanes` of this row belong to this tile alone.
                unsafe {
                    let place = y.data.add((row + index) * y.stride + first);
                    std::ptr::copy_nonoverlapping(sum.as_ptr(), place, lanes);
                }
            }
            row += count;
        }
    }
}

/// A pointer that parts of one region may share.
struct Slot<T>(*mut T);

// SAFETY: users write disjoint ranges.
unsafe impl<T> Sync for Slot<T> {}

impl<T> Slot<T> {
    fn at(&self, index: usize) -> *mut T {
        self.0.wrapping_add(index)
    }
}

//! Weight matrices as the kernels read them. Only this file and `linear` know the layout.
//!
//! Rows are tiled by [`TILE`]; a tile stores, group of 32 inputs after group, for each 4 inputs 64
//! bytes: 4 consecutive input values of each of the 16 rows. A 4-bit tile packs the vectors `j`
//! (low nibbles) and `j + 4` (high nibbles) into one. Scales and minimums follow their group.

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};

use candle_core::{Result, bail};

/// Output rows computed together: the lanes of one 512-bit register of f32.
pub const TILE: usize = 16;
/// Inputs that share one activation scale.
pub const GROUP: usize = 32;
const ALIGN: usize = 64;

/// Zeroed memory on cache-line boundaries.
pub struct AlignedBuf {
    data: *mut u8,
    len: usize,
}

// SAFETY: the buffer owns its memory and has no interior mutability.
unsafe impl Send for AlignedBuf {}
// SAFETY: shared access only reads.
unsafe impl Sync for AlignedBuf {}

impl AlignedBuf {
    pub fn zeroed(len: usize) -> Self {
        let layout = Self::layout(len);
        // SAFETY: the layout has a size above zero.
        let data = unsafe { alloc_zeroed(layout) };
        if data.is_null() {
            handle_alloc_error(layout);
        }
        Self { data, len }
    }

    fn layout(len: usize) -> Layout {
        Layout::from_size_align(len.max(1), ALIGN).expect("a buffer below isize::MAX")
    }

    pub fn bytes(&self) -> &[u8] {
        // SAFETY: `data` points to `len` initialised bytes that live as long as `self`.
        unsafe { std::slice::from_raw_parts(self.data, self.len) }
    }

    fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above, and the borrow is exclusive.
        unsafe { std::slice::from_raw_parts_mut(self.data, self.len) }
    }
}

impl Drop for AlignedBuf {
    fn drop(&mut self) {
        // SAFETY: allocated by `zeroed` with the same layout.
        unsafe { dealloc(self.data, Self::layout(self.len)) }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DenseType {
    F32,
    F16,
    Bf16,
}

impl DenseType {
    pub fn bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::Bf16 => 2,
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bits {
    Four,
    Eight,
}

/// How quantised rows come in: `w = scale[g] * (q - zero) + min[g]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct QuantSpec {
    pub bits: Bits,
    /// Inputs that share a scale: 16 or 32.
    pub group: usize,
    pub zero: u8,
    pub has_min: bool,
    /// Scales and minimums are exact in f16, and stored so.
    pub half_scales: bool,
}

/// One row to be filled by a loader: `q` one value a byte, `scale` and `min` one a group.
pub struct QuantRow<'a> {
    pub q: &'a mut [u8],
    pub scale: &'a mut [f32],
    pub min: &'a mut [f32],
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SegmentKind {
    Dense(DenseType),
    Quant(QuantSpec),
}

/// Rows of one layout.
pub struct Segment {
    pub kind: SegmentKind,
    /// First output of the segment.
    pub first: usize,
    pub rows: usize,
    pub tile_bytes: usize,
    pub data: AlignedBuf,
}

/// A matrix `[n, k]` of one or more segments.
pub struct PackedWeight {
    n: usize,
    k: usize,
    pub segments: Vec<Segment>,
}

impl QuantSpec {
    /// Scales of one group of 32: two where a scale covers 16 inputs.
    pub fn parts(&self) -> usize {
        GROUP / self.group
    }

    pub fn scale_bytes(&self) -> usize {
        if self.half_scales { 2 } else { 4 }
    }

    pub fn quant_bytes(&self) -> usize {
        match self.bits {
            Bits::Four => TILE * GROUP / 2,
            Bits::Eight => TILE * GROUP,
        }
    }

    /// Bytes of one tile for one group of 32 inputs.
    pub fn group_bytes(&self) -> usize {
        let tables = if self.has_min { 2 } else { 1 };
        self.quant_bytes() + tables * self.parts() * TILE * self.scale_bytes()
    }
}

impl PackedWeight {
    pub fn builder(k: usize) -> PackedWeightBuilder {
        PackedWeightBuilder { weight: PackedWeight { n: 0, k, segments: Vec::new() } }
    }

    pub fn n(&self) -> usize {
        self.n
    }

    pub fn k(&self) -> usize {
        self.k
    }

    pub fn bytes(&self) -> usize {
        self.segments.iter().map(|segment| segment.data.bytes().len()).sum()
    }

    /// One row as f32, for the embedding.
    pub fn dequant_row(&self, row: usize, out: &mut [f32]) {
        assert!(row < self.n && out.len() == self.k, "row {row} of {} into {}", self.n, out.len());
        for segment in &self.segments {
            if row >= segment.first && row < segment.first + segment.rows {
                return segment.dequant_row(row - segment.first, out);
            }
        }
    }
}

impl Segment {
    fn dequant_row(&self, row: usize, out: &mut [f32]) {
        let lane = row % TILE;
        let tile = &self.data.bytes()[row / TILE * self.tile_bytes..][..self.tile_bytes];
        match self.kind {
            SegmentKind::Dense(dtype) => {
                for (index, value) in out.iter_mut().enumerate() {
                    *value = read_dense(tile, dtype, index * TILE + lane);
                }
            }
            SegmentKind::Quant(spec) => {
                for (group, values) in out.chunks_exact_mut(GROUP).enumerate() {
                    dequant_group(&tile[group * spec.group_bytes()..], spec, lane, values);
                }
            }
        }
    }
}

fn dequant_group(group: &[u8], spec: QuantSpec, lane: usize, values: &mut [f32]) {
    let scales = &group[spec.quant_bytes()..];
    for (index, value) in values.iter_mut().enumerate() {
        let (vector, byte) = (index / 4, index % 4);
        let q = match spec.bits {
            Bits::Eight => group[vector * 64 + lane * 4 + byte],
            Bits::Four if vector < 4 => group[vector * 64 + lane * 4 + byte] & 15,
            Bits::Four => group[(vector - 4) * 64 + lane * 4 + byte] >> 4,
        };
        let part = index / spec.group;
        let scale = read_scale(scales, spec, part * TILE + lane);
        let min = match spec.has_min {
            true => read_scale(scales, spec, (spec.parts() + part) * TILE + lane),
            false => 0.0,
        };
        *value = scale * (f32::from(q) - f32::from(spec.zero)) + min;
    }
}

/// Value `index` of a table of scales.
pub fn read_scale(table: &[u8], spec: QuantSpec, index: usize) -> f32 {
    let dtype = if spec.half_scales { DenseType::F16 } else { DenseType::F32 };
    read_dense(table, dtype, index)
}

pub fn read_dense(table: &[u8], dtype: DenseType, index: usize) -> f32 {
    let at = index * dtype.bytes();
    match dtype {
        DenseType::F32 => {
            f32::from_le_bytes([table[at], table[at + 1], table[at + 2], table[at + 3]])
        }
        DenseType::F16 => half::f16::from_le_bytes([table[at], table[at + 1]]).to_f32(),
        DenseType::Bf16 => half::bf16::from_le_bytes([table[at], table[at + 1]]).to_f32(),
    }
}

/// Collects segments; rows of the result are theirs in the order of the calls.
pub struct PackedWeightBuilder {
    weight: PackedWeight,
}

impl PackedWeightBuilder {
    /// `bytes` is row-major `[n, k]`, little endian.
    pub fn push_dense(&mut self, n: usize, dtype: DenseType, bytes: &[u8]) -> Result<()> {
        let (k, size) = (self.weight.k, dtype.bytes());
        if bytes.len() != n * k * size {
            bail!("a dense weight of {n} x {k} has {} bytes, not {}", bytes.len(), n * k * size);
        }
        let tile_bytes = k * TILE * size;
        let mut data = AlignedBuf::zeroed(n.div_ceil(TILE) * tile_bytes);
        let out = data.bytes_mut();
        for row in 0..n {
            let tile = row / TILE * tile_bytes + row % TILE * size;
            for (index, value) in bytes[row * k * size..][..k * size].chunks_exact(size).enumerate()
            {
                out[tile + index * TILE * size..][..size].copy_from_slice(value);
            }
        }
        self.push(Segment {
            kind: SegmentKind::Dense(dtype),
            first: self.weight.n,
            rows: n,
            tile_bytes,
            data,
        });
        Ok(())
    }

    /// `fill` is called once a row, in order.
    pub fn push_quant(
        &mut self,
        n: usize,
        spec: QuantSpec,
        fill: &mut dyn FnMut(usize, QuantRow<'_>),
    ) -> Result<()> {
        let k = self.weight.k;
        if !k.is_multiple_of(GROUP) || !matches!(spec.group, 16 | 32) {
            bail!(
                "a quantised weight needs rows divisible by {GROUP}, got {k}, group {}",
                spec.group
            );
        }
        let tile_bytes = k / GROUP * spec.group_bytes();
        let mut data = AlignedBuf::zeroed(n.div_ceil(TILE) * tile_bytes);
        let out = data.bytes_mut();
        let mut q = vec![0u8; k];
        let mut scale = vec![0f32; k / spec.group];
        let mut min = vec![0f32; if spec.has_min { k / spec.group } else { 0 }];
        for row in 0..n {
            fill(row, QuantRow { q: &mut q, scale: &mut scale, min: &mut min });
            let tile = &mut out[row / TILE * tile_bytes..][..tile_bytes];
            for (group, values) in q.chunks_exact(GROUP).enumerate() {
                let parts = group * spec.parts()..(group + 1) * spec.parts();
                let mins = if spec.has_min { &min[parts.clone()] } else { &[] };
                let place = &mut tile[group * spec.group_bytes()..][..spec.group_bytes()];
                pack_group(place, spec, row % TILE, values, &scale[parts], mins);
            }
        }
        self.push(Segment {
            kind: SegmentKind::Quant(spec),
            first: self.weight.n,
            rows: n,
            tile_bytes,
            data,
        });
        Ok(())
    }

    pub fn build(self) -> PackedWeight {
        self.weight
    }

    fn push(&mut self, segment: Segment) {
        self.weight.n += segment.rows;
        self.weight.segments.push(segment);
    }
}

fn pack_group(
    place: &mut [u8],
    spec: QuantSpec,
    lane: usize,
    values: &[u8],
    scale: &[f32],
    min: &[f32],
) {
    for (index, &q) in values.iter().enumerate() {
        let (vector, byte) = (index / 4, index % 4);
        match spec.bits {
            Bits::Eight => place[vector * 64 + lane * 4 + byte] = q,
            Bits::Four if vector < 4 => place[vector * 64 + lane * 4 + byte] |= q & 15,
            Bits::Four => place[(vector - 4) * 64 + lane * 4 + byte] |= q << 4,
        }
    }
    let (table, size) = (spec.quant_bytes(), spec.scale_bytes());
    for (index, value) in scale.iter().chain(min).enumerate() {
        let at = table + (index * TILE + lane) * size;
        if spec.half_scales {
            place[at..at + 2].copy_from_slice(&half::f16::from_f32(*value).to_le_bytes());
        } else {
            place[at..at + 4].copy_from_slice(&value.to_le_bytes());
        }
    }
}

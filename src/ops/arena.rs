//! What the small ops share: access to the arena, rows over threads, versions per instruction set.

use candle_core::{CpuStorage, Layout, Result, bail};

use super::CpuPool;

/// Elements that a thread takes at once; fewer are not worth waking another.
const GRAIN_ELEMENTS: usize = 8 * 1024;

/// The f32 elements of a contiguous tensor.
pub fn f32_mut<'a>(
    op: &str,
    storage: &'a mut CpuStorage,
    layout: &Layout,
) -> Result<&'a mut [f32]> {
    match storage {
        CpuStorage::F32(data) if layout.is_contiguous() && layout.start_offset() == 0 => Ok(data),
        _ => bail!("{op} wants a contiguous f32 tensor"),
    }
}

/// The f32 elements of a contiguous tensor that is only read.
pub fn f32_ref<'a>(op: &str, storage: &'a CpuStorage, layout: &Layout) -> Result<&'a [f32]> {
    match storage {
        CpuStorage::F32(data) if layout.is_contiguous() && layout.start_offset() == 0 => Ok(data),
        _ => bail!("{op} wants a contiguous f32 tensor"),
    }
}

/// A slice whose disjoint parts are written by several threads.
pub struct Shared<T> {
    data: *mut T,
    len: usize,
}

// SAFETY: `part` is only called for disjoint ranges, as its contract says.
unsafe impl<T: Send> Sync for Shared<T> {}

impl<T> Shared<T> {
    pub fn new(data: &mut [T]) -> Self {
        Self { data: data.as_mut_ptr(), len: data.len() }
    }

    /// A part of the slice.
    ///
    /// # Safety
    /// The slice still lives, and no other live part may overlap this one unless both are only read.
    #[allow(clippy::mut_from_ref)]
    pub unsafe fn part(&self, offset: usize, len: usize) -> &mut [T] {
        assert!(offset + len <= self.len, "{offset} + {len} of {}", self.len);
        // SAFETY: inside the slice; not aliased, by the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.data.wrapping_add(offset), len) }
    }
}

/// Calls `row` for `0 .. rows`, over the threads when there is enough work.
pub fn for_rows(pool: &CpuPool, rows: usize, row_elements: usize, row: &(dyn Fn(usize) + Sync)) {
    let grain = (GRAIN_ELEMENTS / row_elements.max(1)).max(1);
    pool.each(rows, grain, &|rows| rows.for_each(row));
}

/// Compiles a body for each instruction set and picks one at run time. The body must be
/// `#[inline(always)]` and use `mul_add`, so that every version gives the same bits.
macro_rules! versions {
    ($(#[$meta:meta])* $vis:vis fn $name:ident($($arg:ident: $ty:ty),* $(,)?) = $body:path) => {
        $(#[$meta])*
        $vis fn $name($($arg: $ty),*) {
            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx512f,avx512bw,avx512vl,fma,f16c")]
                fn wide($($arg: $ty),*) { $body($($arg),*) }
                #[target_feature(enable = "avx2,fma,f16c")]
                fn middle($($arg: $ty),*) { $body($($arg),*) }
                match $crate::ops::simd::isa() {
                    // SAFETY: `isa` says that the machine has these instructions.
                    $crate::ops::simd::Isa::Avx512Vnni => return unsafe { wide($($arg),*) },
                    // SAFETY: as above.
                    $crate::ops::simd::Isa::Avx2 => return unsafe { middle($($arg),*) },
                    $crate::ops::simd::Isa::Portable => {}
                }
            }
            $body($($arg),*)
        }
    };
}
pub(crate) use versions;

/// e^x within 2 units in the last place for x <= 0, and 0 below -87: range reduction by ln 2 and
/// a polynomial (Cody and Waite, "Software Manual for the Elementary Functions", 1980).
#[inline(always)]
pub fn exp(x: f32) -> f32 {
    let clamped = if x > -87.0 { x } else { -87.0 };
    let clamped = if clamped < 88.0 { clamped } else { 88.0 };
    // Adding and subtracting 1.5 * 2^23 rounds to an integer.
    let magic = 12_582_912.0f32;
    let shifted = clamped.mul_add(std::f32::consts::LOG2_E, magic);
    let n = shifted - magic;
    let r = n.mul_add(-0.693_359_4, clamped);
    let r = n.mul_add(2.121_944_4e-4, r);
    let mut p = 1.987_569_1e-4f32;
    for c in [1.398_2e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_6e-1, 0.5] {
        p = p.mul_add(r, c);
    }
    let p = (p * r).mul_add(r, r) + 1.0;
    // The low bits of `shifted` are the integer; the others leave at the top.
    let scale = f32::from_bits(shifted.to_bits().wrapping_add(127) << 23);
    if x < -87.0 { 0.0 } else { p * scale }
}

/// The sum of 16 lanes, in pairs of halves.
#[inline(always)]
pub fn lane_sum(mut lanes: [f32; 16]) -> f32 {
    for half in [8, 4, 2, 1] {
        for lane in 0..half {
            lanes[lane] += lanes[lane + half];
        }
    }
    lanes[0]
}

/// The largest of 16 lanes that compare.
#[inline(always)]
pub fn lane_max(mut lanes: [f32; 16]) -> f32 {
    for half in [8, 4, 2, 1] {
        for lane in 0..half {
            let other = lanes[lane + half];
            lanes[lane] = if other > lanes[lane] { other } else { lanes[lane] };
        }
    }
    lanes[0]
}

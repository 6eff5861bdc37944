//! Sixteen lanes on each instruction set, so that a kernel is written once and gives equal bits on
//! all of them.

use half::{bf16, f16};

use super::simd::Isa;

#[cfg(target_arch = "x86_64")]
mod x86;

#[cfg(target_arch = "x86_64")]
pub use x86::{Avx2, Avx512};

/// Lanes of a vector.
pub const LANES: usize = 16;

/// The operations that the kernels are made of.
///
/// # Safety
/// Of every function: the machine has the instructions of [`Lanes::ISA`], and a pointer is valid for
/// all that is read or written there: 16 elements, 64 bytes or one pair. None needs alignment
/// beyond its element's.
#[allow(clippy::missing_safety_doc, reason = "one contract for all of them, above")]
pub trait Lanes: Copy {
    const ISA: Isa;
    /// Vectors of 16 lanes that fit the registers, with some left for operands.
    const ACCUMULATORS: usize;
    type F32: Copy;
    /// 16 sums of i32, or 32 values of i16 in pairs.
    type I32: Copy;

    unsafe fn load(at: *const f32) -> Self::F32;
    unsafe fn load_f16(at: *const f16) -> Self::F32;
    unsafe fn load_bf16(at: *const bf16) -> Self::F32;
    unsafe fn store(at: *mut f32, x: Self::F32);
    unsafe fn splat(x: f32) -> Self::F32;
    unsafe fn mul(a: Self::F32, b: Self::F32) -> Self::F32;
    /// `a * b + c`, rounded once.
    unsafe fn mul_add(a: Self::F32, b: Self::F32, c: Self::F32) -> Self::F32;

    unsafe fn splat_i32(x: i32) -> Self::I32;
    /// The 16 groups of 4 bytes `b0 .. b3` as pairs of i16: `(b0, b2)` and `(b1, b3)`.
    unsafe fn bytes(at: *const u8) -> [Self::I32; 2];
    /// As `bytes`, of the low halves of the bytes, then of the high ones.
    unsafe fn nibbles(at: *const u8) -> [Self::I32; 4];
    /// `sums + a0 * b0 + a1 * b1` of the pairs of i16 in `a` and the one pair at `b`; the caller
    /// sees to it that it fits.
    unsafe fn dot(sums: Self::I32, a: Self::I32, b: *const i16) -> Self::I32;
    unsafe fn to_f32(a: Self::I32) -> Self::F32;
}

/// What a kernel reads as f32.
pub trait Element: Copy + Send + Sync {
    /// # Safety
    /// As of [`Lanes`].
    unsafe fn load<L: Lanes>(at: *const Self) -> L::F32;
    /// One element; of f16, no infinity and no NaN.
    fn to_f32(self) -> f32;
}

impl Element for f32 {
    #[inline(always)]
    unsafe fn load<L: Lanes>(at: *const Self) -> L::F32 {
        // SAFETY: the trait's contract.
        unsafe { L::load(at) }
    }

    #[inline(always)]
    fn to_f32(self) -> f32 {
        self
    }
}

impl Element for f16 {
    #[inline(always)]
    unsafe fn load<L: Lanes>(at: *const Self) -> L::F32 {
        // SAFETY: the trait's contract.
        unsafe { L::load_f16(at) }
    }

    #[inline(always)]
    fn to_f32(self) -> f32 {
        widen(self.to_bits())
    }
}

impl Element for bf16 {
    #[inline(always)]
    unsafe fn load<L: Lanes>(at: *const Self) -> L::F32 {
        // SAFETY: the trait's contract.
        unsafe { L::load_bf16(at) }
    }

    #[inline(always)]
    fn to_f32(self) -> f32 {
        f32::from_bits(u32::from(self.to_bits()) << 16)
    }
}

/// Compiles a generic body for each instruction set; the first argument picks one at run time. The
/// body must be `#[inline(always)]`.
macro_rules! for_isa {
    ($(#[$meta:meta])* $vis:vis fn $name:ident[$($kind:ident: $bound:path)?]($($arg:ident: $ty:ty),* $(,)?) = $body:ident) => {
        $(#[$meta])*
        $vis fn $name$(<$kind: $bound>)?(isa: $crate::ops::simd::Isa, $($arg: $ty),*) {
            use $crate::ops::{lanes, simd::Isa};
            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma,f16c")]
                fn wide$(<$kind: $bound>)?($($arg: $ty),*) {
                    // SAFETY: this function has the instructions.
                    unsafe { $body::<lanes::Avx512 $(, $kind)?>($($arg),*) }
                }
                #[target_feature(enable = "avx2,fma,f16c")]
                fn middle$(<$kind: $bound>)?($($arg: $ty),*) {
                    // SAFETY: this function has the instructions.
                    unsafe { $body::<lanes::Avx2 $(, $kind)?>($($arg),*) }
                }
                match isa {
                    // SAFETY: an `Isa` is only made for a machine that has its instructions.
                    Isa::Avx512Vnni => return unsafe { wide($($arg),*) },
                    // SAFETY: as above.
                    Isa::Avx2 => return unsafe { middle($($arg),*) },
                    Isa::Portable => {}
                }
            }
            let _ = isa;
            // SAFETY: portable code runs everywhere.
            unsafe { $body::<lanes::Portable $(, $kind)?>($($arg),*) }
        }
    };
}
pub(crate) use for_isa;

/// Plain code.
#[derive(Clone, Copy)]
pub struct Portable;

impl Lanes for Portable {
    const ISA: Isa = Isa::Portable;
    const ACCUMULATORS: usize = 4;
    type F32 = [f32; LANES];
    type I32 = [i32; LANES];

    #[inline(always)]
    unsafe fn load(at: *const f32) -> Self::F32 {
        // SAFETY: the trait's contract.
        unsafe { at.cast::<Self::F32>().read_unaligned() }
    }

    #[inline(always)]
    unsafe fn load_f16(at: *const f16) -> Self::F32 {
        // SAFETY: the trait's contract.
        unsafe { at.cast::<[u16; LANES]>().read_unaligned() }.map(widen)
    }

    #[inline(always)]
    unsafe fn load_bf16(at: *const bf16) -> Self::F32 {
        // SAFETY: the trait's contract.
        let bits = unsafe { at.cast::<[u16; LANES]>().read_unaligned() };
        bits.map(|bits| f32::from_bits(u32::from(bits) << 16))
    }

    #[inline(always)]
    unsafe fn store(at: *mut f32, x: Self::F32) {
        // SAFETY: the trait's contract.
        unsafe { at.cast::<Self::F32>().write_unaligned(x) }
    }

    #[inline(always)]
    unsafe fn splat(x: f32) -> Self::F32 {
        [x; LANES]
    }

    #[inline(always)]
    unsafe fn mul(a: Self::F32, b: Self::F32) -> Self::F32 {
        std::array::from_fn(|lane| a[lane] * b[lane])
    }

    #[inline(always)]
    unsafe fn mul_add(a: Self::F32, b: Self::F32, c: Self::F32) -> Self::F32 {
        std::array::from_fn(|lane| a[lane].mul_add(b[lane], c[lane]))
    }

    #[inline(always)]
    unsafe fn splat_i32(x: i32) -> Self::I32 {
        [x; LANES]
    }

    #[inline(always)]
    unsafe fn bytes(at: *const u8) -> [Self::I32; 2] {
        // SAFETY: the trait's contract.
        let words = unsafe { at.cast::<Self::I32>().read_unaligned() }.map(i32::from_le);
        [0, 8].map(|shift| words.map(|word| word >> shift & 0x00ff_00ff))
    }

    #[inline(always)]
    unsafe fn nibbles(at: *const u8) -> [Self::I32; 4] {
        // SAFETY: the trait's contract.
        let words = unsafe { at.cast::<Self::I32>().read_unaligned() }.map(i32::from_le);
        [0, 8, 4, 12].map(|shift| words.map(|word| word >> shift & 0x000f_000f))
    }

    #[inline(always)]
    unsafe fn dot(sums: Self::I32, a: Self::I32, b: *const i16) -> Self::I32 {
        // SAFETY: the trait's contract.
        let [low, high] = unsafe { b.cast::<[i16; 2]>().read() }.map(i32::from);
        std::array::from_fn(|lane| {
            let a = a[lane];
            sums[lane] + i32::from(a as i16) * low + (a >> 16) * high
        })
    }

    #[inline(always)]
    unsafe fn to_f32(a: Self::I32) -> Self::F32 {
        a.map(|a| a as f32)
    }
}

/// An f16 that is no infinity and no NaN, as f32: exponent and fraction move into place, and a
/// product with a power of two corrects the exponent's bias, of subnormal values too.
#[inline(always)]
fn widen(bits: u16) -> f32 {
    let bits = u32::from(bits);
    let size = f32::from_bits((bits & 0x7fff) << 13) * f32::from_bits((127 + 112) << 23);
    f32::from_bits(size.to_bits() | (bits & 0x8000) << 16)
}

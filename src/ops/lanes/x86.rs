//! The lanes of x86-64.

use std::arch::{asm, x86_64::*};

use half::{bf16, f16};

use super::{Isa, Lanes};

/// Two registers of 8 lanes.
#[derive(Clone, Copy)]
pub struct Avx2;

impl Lanes for Avx2 {
    const ISA: Isa = Isa::Avx2;
    const ACCUMULATORS: usize = 4;
    type F32 = [__m256; 2];
    type I32 = [__m256i; 2];

    #[inline(always)]
    unsafe fn load(at: *const f32) -> Self::F32 {
        // SAFETY: the trait's contract.
        unsafe { [_mm256_loadu_ps(at), _mm256_loadu_ps(at.add(8))] }
    }

    #[inline(always)]
    unsafe fn load_f16(at: *const f16) -> Self::F32 {
        let at = at.cast::<__m128i>();
        // SAFETY: the trait's contract.
        unsafe {
            let (low, high) = (_mm_loadu_si128(at), _mm_loadu_si128(at.add(1)));
            [_mm256_cvtph_ps(low), _mm256_cvtph_ps(high)]
        }
    }

    #[inline(always)]
    unsafe fn load_bf16(at: *const bf16) -> Self::F32 {
        let at = at.cast::<__m128i>();
        // SAFETY: the trait's contract.
        unsafe {
            let low = _mm256_cvtepu16_epi32(_mm_loadu_si128(at));
            let high = _mm256_cvtepu16_epi32(_mm_loadu_si128(at.add(1)));
            let (low, high) = (_mm256_slli_epi32::<16>(low), _mm256_slli_epi32::<16>(high));
            [_mm256_castsi256_ps(low), _mm256_castsi256_ps(high)]
        }
    }

    #[inline(always)]
    unsafe fn store(at: *mut f32, x: Self::F32) {
        // SAFETY: the trait's contract.
        unsafe {
            _mm256_storeu_ps(at, x[0]);
            _mm256_storeu_ps(at.add(8), x[1]);
        }
    }

    #[inline(always)]
    unsafe fn splat(x: f32) -> Self::F32 {
        // SAFETY: the trait's contract.
        unsafe { [_mm256_set1_ps(x); 2] }
    }

    #[inline(always)]
    unsafe fn mul(a: Self::F32, b: Self::F32) -> Self::F32 {
        // SAFETY: the trait's contract.
        unsafe { [_mm256_mul_ps(a[0], b[0]), _mm256_mul_ps(a[1], b[1])] }
    }

    #[inline(always)]
    unsafe fn mul_add(a: Self::F32, b: Self::F32, c: Self::F32) -> Self::F32 {
        // SAFETY: the trait's contract.
        unsafe { [_mm256_fmadd_ps(a[0], b[0], c[0]), _mm256_fmadd_ps(a[1], b[1], c[1])] }
    }

    #[inline(always)]
    unsafe fn splat_i32(x: i32) -> Self::I32 {
        // SAFETY: the trait's contract.
        unsafe { [_mm256_set1_epi32(x); 2] }
    }

    #[inline(always)]
    unsafe fn bytes(at: *const u8) -> [Self::I32; 2] {
        // SAFETY: the trait's contract.
        unsafe {
            let mask = _mm256_set1_epi16(255);
            let [a, b] = load_words(at);
            [
                [_mm256_and_si256(a, mask), _mm256_and_si256(b, mask)],
                [_mm256_srli_epi16::<8>(a), _mm256_srli_epi16::<8>(b)],
            ]
        }
    }

    #[inline(always)]
    unsafe fn nibbles(at: *const u8) -> [Self::I32; 4] {
        // SAFETY: the trait's contract.
        unsafe {
            let mask = _mm256_set1_epi16(15);
            let [a, b] = load_words(at);
            let [a4, b4] = [_mm256_srli_epi16::<4>(a), _mm256_srli_epi16::<4>(b)];
            let [a8, b8] = [_mm256_srli_epi16::<8>(a), _mm256_srli_epi16::<8>(b)];
            [
                [_mm256_and_si256(a, mask), _mm256_and_si256(b, mask)],
                [_mm256_and_si256(a8, mask), _mm256_and_si256(b8, mask)],
                [_mm256_and_si256(a4, mask), _mm256_and_si256(b4, mask)],
                [_mm256_srli_epi16::<12>(a), _mm256_srli_epi16::<12>(b)],
            ]
        }
    }

    #[inline(always)]
    unsafe fn dot(sums: Self::I32, a: Self::I32, b: *const i16) -> Self::I32 {
        // SAFETY: the trait's contract.
        unsafe {
            let b = _mm256_set1_epi32(b.cast::<i32>().read_unaligned());
            [
                _mm256_add_epi32(sums[0], _mm256_madd_epi16(a[0], b)),
                _mm256_add_epi32(sums[1], _mm256_madd_epi16(a[1], b)),
            ]
        }
    }

    #[inline(always)]
    unsafe fn to_f32(a: Self::I32) -> Self::F32 {
        // SAFETY: the trait's contract.
        unsafe { [_mm256_cvtepi32_ps(a[0]), _mm256_cvtepi32_ps(a[1])] }
    }
}

#[inline(always)]
unsafe fn load_words(at: *const u8) -> [__m256i; 2] {
    let at = at.cast::<__m256i>();
    // SAFETY: the contract of the callers.
    unsafe { [_mm256_loadu_si256(at), _mm256_loadu_si256(at.add(1))] }
}

/// One register.
#[derive(Clone, Copy)]
pub struct Avx512;

impl Lanes for Avx512 {
    const ISA: Isa = Isa::Avx512Vnni;
    const ACCUMULATORS: usize = 16;
    type F32 = __m512;
    type I32 = __m512i;

    #[inline(always)]
    unsafe fn load(at: *const f32) -> Self::F32 {
        // SAFETY: the trait's contract.
        unsafe { _mm512_loadu_ps(at) }
    }

    #[inline(always)]
    unsafe fn load_f16(at: *const f16) -> Self::F32 {
        // SAFETY: the trait's contract.
        unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(at.cast())) }
    }

    #[inline(always)]
    unsafe fn load_bf16(at: *const bf16) -> Self::F32 {
        // SAFETY: the trait's contract.
        unsafe {
            let wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(at.cast()));
            _mm512_castsi512_ps(_mm512_slli_epi32::<16>(wide))
        }
    }

    #[inline(always)]
    unsafe fn store(at: *mut f32, x: Self::F32) {
        // SAFETY: the trait's contract.
        unsafe { _mm512_storeu_ps(at, x) }
    }

    #[inline(always)]
    unsafe fn splat(x: f32) -> Self::F32 {
        // SAFETY: the trait's contract.
        unsafe { _mm512_set1_ps(x) }
    }

    #[inline(always)]
    unsafe fn mul(a: Self::F32, b: Self::F32) -> Self::F32 {
        // SAFETY: the trait's contract.
        unsafe { _mm512_mul_ps(a, b) }
    }

    #[inline(always)]
    unsafe fn mul_add(a: Self::F32, b: Self::F32, c: Self::F32) -> Self::F32 {
        // SAFETY: the trait's contract.
        unsafe { _mm512_fmadd_ps(a, b, c) }
    }

    #[inline(always)]
    unsafe fn splat_i32(x: i32) -> Self::I32 {
        // SAFETY: the trait's contract.
        unsafe { _mm512_set1_epi32(x) }
    }

    #[inline(always)]
    unsafe fn bytes(at: *const u8) -> [Self::I32; 2] {
        // SAFETY: the trait's contract.
        unsafe {
            let words = _mm512_loadu_si512(at.cast());
            [_mm512_and_si512(words, _mm512_set1_epi16(255)), _mm512_srli_epi16::<8>(words)]
        }
    }

    #[inline(always)]
    unsafe fn nibbles(at: *const u8) -> [Self::I32; 4] {
        // SAFETY: the trait's contract.
        unsafe {
            let mask = _mm512_set1_epi16(15);
            let words = _mm512_loadu_si512(at.cast());
            [
                _mm512_and_si512(words, mask),
                _mm512_and_si512(_mm512_srli_epi16::<8>(words), mask),
                _mm512_and_si512(_mm512_srli_epi16::<4>(words), mask),
                _mm512_srli_epi16::<12>(words),
            ]
        }
    }

    #[inline(always)]
    unsafe fn dot(sums: Self::I32, a: Self::I32, b: *const i16) -> Self::I32 {
        // SAFETY: the trait's contract.
        unsafe { dot_avx512(sums, a, b) }
    }

    #[inline(always)]
    unsafe fn to_f32(a: Self::I32) -> Self::F32 {
        // SAFETY: the trait's contract.
        unsafe { _mm512_cvtepi32_ps(a) }
    }
}

/// Of the intrinsic, the compiler makes a product and a sum to shorten a chain of them; but there are
/// chains enough, and too few places to issue three instructions for one.
#[inline]
#[target_feature(enable = "avx512f,avx512vnni")]
unsafe fn dot_avx512(mut sums: __m512i, a: __m512i, b: *const i16) -> __m512i {
    // SAFETY: the instruction reads the four bytes that the caller promises, and sets no flags.
    unsafe {
        asm!(
            "vpdpwssd {sums}, {a}, dword ptr [{b}]{{1to16}}",
            sums = inout(zmm_reg) sums,
            a = in(zmm_reg) a,
            b = in(reg) b,
            options(pure, readonly, nostack, preserves_flags),
        );
    }
    sums
}

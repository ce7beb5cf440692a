//! AVX2 and FMA: 8 lanes, 16 registers, 6×2 register tiles.
#![expect(unsafe_code, reason = "vector intrinsics and the entry points that enable them")]

use super::dispatch::{Isa, TileKernels};
use super::kernels::{self, Accumulator, PackedQ, PackedQ8, QuantizedRows, Rows, Running, Scores};
use super::simd::Simd;
use std::arch::x86_64::*;
use std::ops::Range;

/// The proof that the processor has AVX2 and FMA: made only inside the entry points below, which
/// [`super::dispatch`] calls only where both were detected.
#[derive(Clone, Copy)]
struct Avx2(());

/// One intrinsic call per method, all on values except `load` and `store`.
macro_rules! ops {
    ($($name:ident($($arg:ident),*) -> $body:expr;)*) => {
        $(
            #[inline(always)]
            fn $name(self, $($arg: __m256),*) -> __m256 {
                // SAFETY: `self` proves AVX2 and FMA; the intrinsics touch no memory.
                unsafe { $body }
            }
        )*
    };
}

impl Simd for Avx2 {
    type Array = [f32; 8];
    type F = __m256;
    type Bytes = [u8; 32];
    type I = __m256i;
    const LANES: usize = 8;

    #[inline(always)]
    fn splat(self, x: f32) -> __m256 {
        // SAFETY: `self` proves AVX.
        unsafe { _mm256_set1_ps(x) }
    }
    #[inline(always)]
    fn load(self, from: &[f32; 8]) -> __m256 {
        // SAFETY: `self` proves AVX; the array is 32 readable bytes and the load is unaligned.
        unsafe { _mm256_loadu_ps(from.as_ptr()) }
    }
    #[inline(always)]
    fn store(self, x: __m256, to: &mut [f32; 8]) {
        // SAFETY: `self` proves AVX; the array is 32 writable bytes and the store is unaligned.
        unsafe { _mm256_storeu_ps(to.as_mut_ptr(), x) }
    }
    #[inline(always)]
    fn zero_i32(self) -> __m256i {
        // SAFETY: `self` proves the instruction set; no memory is touched.
        unsafe { _mm256_setzero_si256() }
    }
    #[inline(always)]
    fn load_bytes(self, from: &[u8; 32]) -> __m256i {
        // SAFETY: `self` proves AVX2; the array is 32 readable bytes and the load is unaligned.
        unsafe { _mm256_loadu_si256(from.as_ptr().cast()) }
    }
    #[inline(always)]
    fn splat_bytes(self, k: [i8; 4]) -> __m256i {
        // SAFETY: `self` proves AVX2; no memory is touched.
        unsafe { _mm256_set1_epi32(i32::from_le_bytes(k.map(|k| k as u8))) }
    }
    #[inline(always)]
    fn dot4(self, acc: __m256i, q: __m256i, k: __m256i) -> __m256i {
        // Bytes 0 and 2 of each group, then 1 and 3, as 16-bit products: exact, where the
        // shorter maddubs would saturate.
        // SAFETY: `self` proves AVX2; no memory is touched.
        unsafe {
            let q_even = _mm256_and_si256(q, _mm256_set1_epi16(0xff));
            let q_odd = _mm256_srli_epi16::<8>(q);
            let k_even = _mm256_srai_epi16::<8>(_mm256_slli_epi16::<8>(k));
            let k_odd = _mm256_srai_epi16::<8>(k);
            let sum = _mm256_add_epi32(acc, _mm256_madd_epi16(q_even, k_even));
            _mm256_add_epi32(sum, _mm256_madd_epi16(q_odd, k_odd))
        }
    }
    #[inline(always)]
    fn to_f32(self, x: __m256i, offset: i32) -> __m256 {
        // SAFETY: `self` proves the instruction set; no memory is touched.
        unsafe { _mm256_cvtepi32_ps(_mm256_sub_epi32(x, _mm256_set1_epi32(offset))) }
    }
    ops! {
        add(a, b) -> _mm256_add_ps(a, b);
        sub(a, b) -> _mm256_sub_ps(a, b);
        mul(a, b) -> _mm256_mul_ps(a, b);
        fma(a, b, c) -> _mm256_fmadd_ps(a, b, c);
        max(a, b) -> _mm256_max_ps(a, b);
        zero_if_neg_inf(x) -> _mm256_and_ps(
            x,
            _mm256_cmp_ps::<_CMP_NEQ_UQ>(x, _mm256_set1_ps(f32::NEG_INFINITY)),
        );
        round(x) -> _mm256_round_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(x);
        scale(x, n) -> _mm256_castsi256_ps(_mm256_add_epi32(
            _mm256_castps_si256(x),
            _mm256_slli_epi32::<23>(_mm256_cvtps_epi32(n)),
        ));
        zero_below(x, of, limit) -> _mm256_and_ps(x, _mm256_cmp_ps::<_CMP_NLT_UQ>(of, limit));
    }
}

#[target_feature(enable = "avx2,fma")]
fn qk(q: &PackedQ, k: &Rows<'_>, s: &mut Scores<'_>) {
    kernels::qk::<_, 2>(Avx2(()), q, k, s);
}

#[target_feature(enable = "avx2,fma")]
fn qk_i8(q: &PackedQ8, k: &QuantizedRows<'_>, shift: &[f32], s: &mut Scores<'_>) {
    kernels::qk_i8::<_, 2>(Avx2(()), q, k, shift, s);
}

#[target_feature(enable = "avx2,fma")]
fn softmax(s: &mut Scores<'_>, running: &mut Running) {
    kernels::softmax(Avx2(()), s, running);
}

#[target_feature(enable = "avx2,fma")]
fn pv(p: &Scores<'_>, alpha: &[f32], v: &Rows<'_>, rows: Range<usize>, o: &mut Accumulator<'_>) {
    kernels::pv::<_, 2>(Avx2(()), p, alpha, v, rows, o);
}

pub(super) static KERNELS: TileKernels = TileKernels {
    isa: Isa::Avx2,
    lanes: 8,
    panel: 16,
    // SAFETY: `dispatch` hands this table out only where AVX2 and FMA exist.
    qk: |q, k, s| unsafe { qk(q, k, s) },
    // SAFETY: as above.
    qk_i8: |q, k, shift, s| unsafe { qk_i8(q, k, shift, s) },
    // SAFETY: as above.
    softmax: |s, running| unsafe { softmax(s, running) },
    // SAFETY: as above.
    pv: |p, alpha, v, rows, o| unsafe { pv(p, alpha, v, rows, o) },
};

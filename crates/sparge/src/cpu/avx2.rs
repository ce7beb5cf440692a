//! AVX2 and FMA: 8 lanes, 16 registers, 6×2 register tiles.
#![expect(unsafe_code, reason = "vector intrinsics and the entry points that enable them")]

use super::dispatch::{Isa, TileKernels};
use super::kernels::{self, Accumulator, PackedQ, Rows, Running, Scores};
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
    // SAFETY (all three): this table is handed out by `dispatch` only where AVX2 and FMA exist.
    qk: |q, k, s| unsafe { qk(q, k, s) },
    softmax: |s, running| unsafe { softmax(s, running) },
    pv: |p, alpha, v, rows, o| unsafe { pv(p, alpha, v, rows, o) },
};

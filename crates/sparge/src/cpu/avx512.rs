//! AVX-512: 16 lanes, 32 registers, 6×4 register tiles.
#![expect(unsafe_code, reason = "vector intrinsics and the entry points that enable them")]

use super::dispatch::{Isa, TileKernels};
use super::kernels::{self, Accumulator, PackedQ, PackedQ8, QuantizedRows, Rows, Running, Scores};
use super::simd::Simd;
use std::arch::x86_64::*;
use std::ops::Range;

/// The proof that the processor has AVX-512: made only inside the entry points below, which
/// [`super::dispatch`] calls only where both were detected.
#[derive(Clone, Copy)]
struct Avx512(());

/// One intrinsic call per method, all on values except `load` and `store`.
macro_rules! ops {
    ($($name:ident($($arg:ident),*) -> $body:expr;)*) => {
        $(
            #[inline(always)]
            fn $name(self, $($arg: __m512),*) -> __m512 {
                // SAFETY: `self` proves AVX-512; the intrinsics touch no memory.
                unsafe { $body }
            }
        )*
    };
}

impl Simd for Avx512 {
    type Array = [f32; 16];
    type F = __m512;
    type Bytes = [u8; 64];
    type I = __m512i;
    const LANES: usize = 16;

    #[inline(always)]
    fn splat(self, x: f32) -> __m512 {
        // SAFETY: `self` proves AVX-512.
        unsafe { _mm512_set1_ps(x) }
    }
    #[inline(always)]
    fn load(self, from: &[f32; 16]) -> __m512 {
        // SAFETY: `self` proves AVX-512; the array is 64 readable bytes and the load is unaligned.
        unsafe { _mm512_loadu_ps(from.as_ptr()) }
    }
    #[inline(always)]
    fn store(self, x: __m512, to: &mut [f32; 16]) {
        // SAFETY: `self` proves AVX-512; the array is 64 writable bytes and the store is unaligned.
        unsafe { _mm512_storeu_ps(to.as_mut_ptr(), x) }
    }
    #[inline(always)]
    fn zero_i32(self) -> __m512i {
        // SAFETY: `self` proves the instruction set; no memory is touched.
        unsafe { _mm512_setzero_si512() }
    }
    #[inline(always)]
    fn load_bytes(self, from: &[u8; 64]) -> __m512i {
        // SAFETY: `self` proves AVX-512; the array is 64 readable bytes and the load is unaligned.
        unsafe { _mm512_loadu_si512(from.as_ptr().cast()) }
    }
    #[inline(always)]
    fn splat_bytes(self, k: [i8; 4]) -> __m512i {
        // SAFETY: `self` proves AVX-512; no memory is touched.
        unsafe { _mm512_set1_epi32(i32::from_le_bytes(k.map(|k| k as u8))) }
    }
    #[inline(always)]
    fn dot4(self, acc: __m512i, q: __m512i, k: __m512i) -> __m512i {
        // SAFETY: `self` proves AVX-512 VNNI; no memory is touched.
        unsafe { _mm512_dpbusd_epi32(acc, q, k) }
    }
    #[inline(always)]
    fn to_f32(self, x: __m512i, offset: i32) -> __m512 {
        // SAFETY: `self` proves the instruction set; no memory is touched.
        unsafe { _mm512_cvtepi32_ps(_mm512_sub_epi32(x, _mm512_set1_epi32(offset))) }
    }
    ops! {
        add(a, b) -> _mm512_add_ps(a, b);
        sub(a, b) -> _mm512_sub_ps(a, b);
        mul(a, b) -> _mm512_mul_ps(a, b);
        fma(a, b, c) -> _mm512_fmadd_ps(a, b, c);
        max(a, b) -> _mm512_max_ps(a, b);
        zero_if_neg_inf(x) -> _mm512_maskz_mov_ps(
            _mm512_cmp_ps_mask::<_CMP_NEQ_UQ>(x, _mm512_set1_ps(f32::NEG_INFINITY)),
            x,
        );
        round(x) -> _mm512_roundscale_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(x);
        scale(x, n) -> _mm512_castsi512_ps(_mm512_add_epi32(
            _mm512_castps_si512(x),
            _mm512_slli_epi32::<23>(_mm512_cvtps_epi32(n)),
        ));
        zero_below(x, of, limit) ->
            _mm512_maskz_mov_ps(_mm512_cmp_ps_mask::<_CMP_NLT_UQ>(of, limit), x);
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
fn qk(q: &PackedQ, k: &Rows<'_>, s: &mut Scores<'_>) {
    kernels::qk::<_, 4>(Avx512(()), q, k, s);
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
fn qk_i8(q: &PackedQ8, k: &QuantizedRows<'_>, shift: &[f32], s: &mut Scores<'_>) {
    kernels::qk_i8::<_, 4>(Avx512(()), q, k, shift, s);
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
fn softmax(s: &mut Scores<'_>, running: &mut Running) {
    kernels::softmax(Avx512(()), s, running);
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
fn pv(p: &Scores<'_>, alpha: &[f32], v: &Rows<'_>, rows: Range<usize>, o: &mut Accumulator<'_>) {
    kernels::pv::<_, 4>(Avx512(()), p, alpha, v, rows, o);
}

pub(super) static KERNELS: TileKernels = TileKernels {
    isa: Isa::Avx512,
    lanes: 16,
    panel: 64,
    // SAFETY: `dispatch` hands this table out only where AVX-512 exists.
    qk: |q, k, s| unsafe { qk(q, k, s) },
    // SAFETY: as above.
    qk_i8: |q, k, shift, s| unsafe { qk_i8(q, k, shift, s) },
    // SAFETY: as above.
    softmax: |s, running| unsafe { softmax(s, running) },
    // SAFETY: as above.
    pv: |p, alpha, v, rows, o| unsafe { pv(p, alpha, v, rows, o) },
};

//! The arithmetic that needs the CPU's wide instructions: dequantisation, dot products, matrix product.
//!
//! Each function is written once in plain Rust; for x86-64 it is compiled a second time with AVX2, FMA
//! and F16C enabled, and the choice is made at run time, so that one portable build is fast everywhere.
//! The matrix product is the `gemm` crate's, which does the same.
#![expect(
    unsafe_code,
    reason = "calls into run-time detected code and the gemm crate's raw pointers"
)]

use crate::quant::{self, Format};

/// `body` under AVX2 when the CPU has it (with `FMA = true`), else the portable compilation.
macro_rules! dispatch {
    ($(#[$doc:meta])* $name:ident ( $($arg:ident : $ty:ty),* ) $(-> $ret:ty)?, $body:ident) => {
        $(#[$doc])*
        pub(crate) fn $name($($arg: $ty),*) $(-> $ret)? {
            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx2,fma,f16c")]
                fn wide($($arg: $ty),*) $(-> $ret)? {
                    $body::<true>($($arg),*)
                }
                if has_avx2() {
                    // SAFETY: `wide` needs avx2, fma and f16c, which `has_avx2` has just found.
                    return unsafe { wide($($arg),*) };
                }
            }
            $body::<false>($($arg),*)
        }
    };
}

dispatch!(
    /// Dequantises whole rows; lengths must agree.
    dequantise(format: Format, src: &[u8], dst: &mut [f32]), dequantise_body);
dispatch!(
    /// Σ a·b over the shorter length.
    dot(a: &[f32], b: &[f32]) -> f32, dot_body);
dispatch!(
    /// y += s·x.
    axpy(s: f32, x: &[f32], y: &mut [f32]), axpy_body);
dispatch!(
    /// gate = silu(gate)·up.
    silu_mul(gate: &mut [f32], up: &[f32]), silu_mul_body);
dispatch!(
    /// Σ exp(x − max) with max the largest element, and max.
    sum_exp(x: &[f32]) -> (f32, f32), sum_exp_body);

#[cfg(target_arch = "x86_64")]
fn has_avx2() -> bool {
    // The macro caches its answer in an atomic: this costs a load.
    is_x86_feature_detected!("avx2")
        && is_x86_feature_detected!("fma")
        && is_x86_feature_detected!("f16c")
}

#[inline(always)]
fn dequantise_body<const FMA: bool>(format: Format, src: &[u8], dst: &mut [f32]) {
    quant::dequantise(format, src, dst);
}

/// a·b + c, fused only where the instruction exists (elsewhere `mul_add` is a slow library call).
#[inline(always)]
fn fma<const FMA: bool>(a: f32, b: f32, c: f32) -> f32 {
    if FMA { a.mul_add(b, c) } else { a * b + c }
}

#[inline(always)]
fn dot_body<const FMA: bool>(a: &[f32], b: &[f32]) -> f32 {
    let n = a.len().min(b.len());
    let ((a32, a_tail), (b32, b_tail)) = (a[..n].as_chunks::<32>(), b[..n].as_chunks::<32>());
    // Four independent accumulators of eight lanes hide the latency of the multiply-add.
    let mut acc = [0.0f32; 32];
    for (a, b) in a32.iter().zip(b32) {
        for i in 0..32 {
            acc[i] = fma::<FMA>(a[i], b[i], acc[i]);
        }
    }
    let mut width = 16;
    while width > 0 {
        for i in 0..width {
            acc[i] += acc[i + width];
        }
        width /= 2;
    }
    a_tail.iter().zip(b_tail).fold(acc[0], |s, (a, b)| fma::<FMA>(*a, *b, s))
}

#[inline(always)]
fn axpy_body<const FMA: bool>(s: f32, x: &[f32], y: &mut [f32]) {
    for (x, y) in x.iter().zip(y) {
        *y = fma::<FMA>(s, *x, *y);
    }
}

/// eˣ to about 2 units in the last place for x ≤ 88, 0 below −87: Cephes' range reduction and
/// polynomial, which vectorises where the library's `exp` does not.
#[inline(always)]
fn exp<const FMA: bool>(x: f32) -> f32 {
    let clamped = x.clamp(-87.0, 88.0);
    // Adding 1.5·2²³ rounds to an integer in the low bits of the mantissa.
    let shifted = fma::<FMA>(clamped, std::f32::consts::LOG2_E, 12_582_912.0);
    let n = shifted - 12_582_912.0;
    let r = fma::<FMA>(n, -0.693_359_4, clamped);
    let r = fma::<FMA>(n, 2.121_944_4e-4, r);
    let mut p = 1.987_569_2e-4;
    for c in [1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 0.5] {
        p = fma::<FMA>(p, r, c);
    }
    let value = fma::<FMA>(p, r * r, r) + 1.0;
    let scale = f32::from_bits((shifted.to_bits() << 23).wrapping_add(127 << 23));
    // NaN must stay NaN: `clamp` keeps it, and the comparison is false for it.
    if x < -87.0 { 0.0 } else { value * scale }
}

#[inline(always)]
fn silu_mul_body<const FMA: bool>(gate: &mut [f32], up: &[f32]) {
    for (g, u) in gate.iter_mut().zip(up) {
        *g = *g / (1.0 + exp::<FMA>(-*g)) * u;
    }
}

#[inline(always)]
fn sum_exp_body<const FMA: bool>(x: &[f32]) -> (f32, f32) {
    let max = x.iter().fold(f32::NEG_INFINITY, |m, v| if *v > m { *v } else { m });
    let (chunks, tail) = x.as_chunks::<16>();
    let mut acc = [0.0f32; 16];
    for c in chunks {
        for i in 0..16 {
            acc[i] += exp::<FMA>(c[i] - max);
        }
    }
    let sum = acc.iter().sum::<f32>() + tail.iter().map(|v| exp::<FMA>(v - max)).sum::<f32>();
    (sum, max)
}

/// C (+)= A·Bᵀ for row-major A `[m, k]`, B `[n, k]`, C `[m, n]` inside rows of `row_stride`.
///
/// Runs on the threads of the current rayon pool.
pub(crate) fn gemm_nt(
    [m, n, k]: [usize; 3],
    a: &[f32],
    b: &[f32],
    c: &mut [f32],
    row_stride: usize,
    accumulate: bool,
) {
    if m == 0 || n == 0 {
        return;
    }
    assert!(
        a.len() >= m * k
            && b.len() >= n * k
            && row_stride >= n
            && c.len() >= (m - 1) * row_stride + n
    );
    let threads = match rayon::current_num_threads() {
        1 => gemm::Parallelism::None,
        t => gemm::Parallelism::Rayon(t),
    };
    // SAFETY: the assertion above bounds every address that the three strided matrices reach, the
    // borrows keep A and B alive and C exclusive, and all slices are shorter than isize::MAX bytes.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            c.as_mut_ptr(),
            1,
            row_stride as isize,
            accumulate,
            a.as_ptr(),
            1,
            k as isize,
            b.as_ptr(),
            k as isize,
            1,
            1.0,
            1.0,
            false,
            false,
            false,
            threads,
        );
    }
}

//! The arithmetic that needs the CPU's wide instructions.
//!
//! Elementwise functions and reductions are written once in plain Rust and compiled twice, for the
//! baseline instruction set and for AVX2+FMA; dequantisation and the matrix product's innermost tile
//! have intrinsics in [`avx2`]. The choice is made at run time, so that one portable build is fast.
#![cfg_attr(
    target_arch = "x86_64",
    expect(unsafe_code, reason = "calls into run-time detected code")
)]

#[cfg(target_arch = "x86_64")]
mod avx2;

use crate::quant::{self, Format};

/// Rows of the innermost tile of the matrix product.
pub(crate) const TILE_ROWS: usize = 6;
/// Columns of the innermost tile, and width of a packed panel.
pub(crate) const TILE_COLS: usize = 16;

/// One tile of a matrix product: `c += a·b`, or `c = a·b`.
pub(crate) struct Tile<'a> {
    /// Rows of `a`, 1 to [`TILE_ROWS`].
    pub(crate) rows: usize,
    /// Columns of `c`, 1 to [`TILE_COLS`].
    pub(crate) cols: usize,
    /// Row i is `a[i·a_stride ..][.. b.len()]`.
    pub(crate) a: &'a [f32],
    pub(crate) a_stride: usize,
    /// `[depth][TILE_COLS]`.
    pub(crate) b: &'a [[f32; TILE_COLS]],
    /// Row i is `c[i·c_stride ..][.. cols]`.
    pub(crate) c: &'a mut [f32],
    pub(crate) c_stride: usize,
    pub(crate) accumulate: bool,
}

impl Tile<'_> {
    /// Adds or stores one row of results.
    #[inline(always)]
    fn store(&mut self, row: usize, values: &[f32; TILE_COLS]) {
        let c = &mut self.c[row * self.c_stride..][..self.cols];
        for (c, value) in c.iter_mut().zip(values) {
            *c = if self.accumulate { *c + value } else { *value };
        }
    }
}

/// `body` compiled for AVX2 when the CPU has it (with `FMA = true`), else for the baseline.
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

/// Dequantises whole rows; `src` and `dst` hold the same number of elements.
pub(crate) fn dequantise(format: Format, src: &[u8], dst: &mut [f32]) {
    #[cfg(target_arch = "x86_64")]
    if has_avx2() {
        // SAFETY: the function needs avx2, fma and f16c, which `has_avx2` has just found.
        return unsafe { avx2::dequantise(format, src, dst) };
    }
    quant::dequantise(format, src, dst);
}

/// Computes one tile of a matrix product.
pub(crate) fn tile(tile: Tile<'_>) {
    #[cfg(target_arch = "x86_64")]
    if has_avx2() {
        // SAFETY: the function needs avx2, fma and f16c, which `has_avx2` has just found.
        return unsafe { avx2::tile(tile) };
    }
    tile_portable(tile);
}

/// What the AVX2 paths need. The macro keeps its answers in an atomic: asking costs a load.
#[cfg(target_arch = "x86_64")]
fn has_avx2() -> bool {
    is_x86_feature_detected!("avx2")
        && is_x86_feature_detected!("fma")
        && is_x86_feature_detected!("f16c")
}

fn tile_portable(mut tile: Tile<'_>) {
    let mut acc = [[0.0f32; TILE_COLS]; TILE_ROWS];
    for (k, b) in tile.b.iter().enumerate() {
        for (row, acc) in acc.iter_mut().enumerate().take(tile.rows) {
            let a = tile.a[row * tile.a_stride + k];
            for j in 0..TILE_COLS {
                acc[j] += a * b[j];
            }
        }
    }
    for (row, values) in acc.iter().enumerate().take(tile.rows) {
        tile.store(row, values);
    }
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

/// eˣ to about 2 units in the last place for x ≤ 88, 0 below −87: range reduction to |r| ≤ ln 2 / 2
/// and a polynomial (Cephes' coefficients), which vectorises where the library's `exp` does not.
#[inline(always)]
fn exp<const FMA: bool>(x: f32) -> f32 {
    let clamped = x.clamp(-87.0, 88.0);
    // Adding 1.5·2²³ rounds to an integer in the low bits of the mantissa.
    let shifted = fma::<FMA>(clamped, std::f32::consts::LOG2_E, 12_582_912.0);
    let n = shifted - 12_582_912.0;
    // ln 2 in two parts, the first exact in few bits.
    let r = fma::<FMA>(n, -0.693_359_4, clamped);
    let r = fma::<FMA>(n, 2.121_944_4e-4, r);
    let mut p = 1.987_569_2e-4;
    for c in [1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 0.5] {
        p = fma::<FMA>(p, r, c);
    }
    let value = fma::<FMA>(p, r * r, r) + 1.0;
    let scale = f32::from_bits((shifted.to_bits() << 23).wrapping_add(127 << 23));
    // NaN stays NaN: `clamp` keeps it, and the comparison is false for it.
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
    let (chunks, tail) = x.as_chunks::<16>();
    let mut tops = [f32::NEG_INFINITY; 16];
    for c in chunks {
        for i in 0..16 {
            tops[i] = if c[i] > tops[i] { c[i] } else { tops[i] };
        }
    }
    let max = tops.iter().chain(tail).copied().fold(f32::NEG_INFINITY, f32::max);
    let mut acc = [0.0f32; 16];
    for c in chunks {
        for i in 0..16 {
            acc[i] += exp::<FMA>(c[i] - max);
        }
    }
    let sum = acc.iter().sum::<f32>() + tail.iter().map(|v| exp::<FMA>(v - max)).sum::<f32>();
    (sum, max)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_matches_the_library() {
        for i in -8700..8800 {
            let x = i as f32 * 0.01 + 0.0037;
            let (got, want) = (exp::<false>(x), x.exp());
            assert!((got - want).abs() <= 4e-7 * want, "exp({x}) = {got}, expected {want}");
        }
        assert_eq!(exp::<false>(-200.0), 0.0);
        assert!(exp::<false>(f32::NAN).is_nan());
    }

    #[test]
    fn dequantisation_agrees_with_the_portable_one() {
        use Format::*;
        for format in [F32, F16, Bf16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q4K, Q5K, Q6K] {
            let len = format.row_bytes(512).unwrap();
            // Small exponents everywhere: every byte pair read as f16 stays finite.
            let src: Vec<u8> = (0..len).map(|i| ((i * 7919 + i / 3) % 251) as u8 & 0x3f).collect();
            let (mut got, mut want) = (vec![0.0; 512], vec![1.0; 512]);
            dequantise(format, &src, &mut got);
            quant::dequantise(format, &src, &mut want);
            for (i, (g, w)) in got.iter().zip(&want).enumerate() {
                assert!(
                    (g - w).abs() <= 1e-5 * w.abs().max(1e-3),
                    "{format:?} element {i}: {g}, expected {w}"
                );
            }
        }
    }

    #[test]
    fn tiles_of_every_size_agree_with_the_portable_one() {
        let depth = 37;
        let value = |i: usize| ((i * 31 + 7) % 17) as f32 - 8.0;
        let a: Vec<f32> = (0..TILE_ROWS * 40).map(value).collect();
        let b: Vec<[f32; TILE_COLS]> =
            (0..depth).map(|k| std::array::from_fn(|j| value(k * 5 + j))).collect();
        for rows in 1..=TILE_ROWS {
            for cols in 1..=TILE_COLS {
                let run = |f: fn(Tile<'_>), accumulate| {
                    let mut c = vec![0.5; TILE_ROWS * 20];
                    let a = &a[..(rows - 1) * 40 + depth];
                    let c_len = (rows - 1) * 20 + cols;
                    f(Tile {
                        rows,
                        cols,
                        a,
                        a_stride: 40,
                        b: &b,
                        c: &mut c[..c_len],
                        c_stride: 20,
                        accumulate,
                    });
                    c
                };
                assert_eq!(run(tile, false), run(tile_portable, false), "{rows}×{cols}");
                assert_eq!(run(tile, true), run(tile_portable, true), "{rows}×{cols}");
            }
        }
    }
}

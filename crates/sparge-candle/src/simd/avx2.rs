//! Dequantisation and the matrix product's tile with AVX2 intrinsics.
//!
//! Plain Rust loops over 16-byte halves of a block are unrolled before they can be vectorised and run
//! at a tenth of this speed; a generic matrix product reaches half of the tile's.
#![expect(unsafe_code, reason = "vector loads and stores through pointers")]

use std::arch::x86_64::*;

use super::{TILE_COLS, TILE_ROWS, Tile};
use crate::quant::{self, Format, part, scale_min};

/// [`quant::dequantise`].
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn dequantise(format: Format, src: &[u8], dst: &mut [f32]) {
    match format {
        Format::F16 => {
            let (blocks, tail) = src.as_chunks::<16>();
            let (outs, out_tail) = dst.as_chunks_mut::<8>();
            for (b, y) in blocks.iter().zip(outs) {
                store(_mm256_cvtph_ps(load16(b)), y);
            }
            quant::dequantise(format, tail, out_tail);
        }
        Format::Q4_0 => {
            for (b, y) in blocks::<18, 32>(src, dst) {
                let d = half_at(b, 0);
                affine(unpack(part(b, 2)), d, -8.0 * d, y);
            }
        }
        Format::Q4_1 => {
            for (b, y) in blocks::<20, 32>(src, dst) {
                affine(unpack(part(b, 4)), half_at(b, 0), half_at(b, 2), y);
            }
        }
        Format::Q5_0 => {
            for (b, y) in blocks::<22, 32>(src, dst) {
                let d = half_at(b, 0);
                let q = _mm256_or_si256(unpack(part(b, 6)), fifth_bits(part(b, 2)));
                affine(q, d, -16.0 * d, y);
            }
        }
        Format::Q5_1 => {
            for (b, y) in blocks::<24, 32>(src, dst) {
                let q = _mm256_or_si256(unpack(part(b, 8)), fifth_bits(part(b, 4)));
                affine(q, half_at(b, 0), half_at(b, 2), y);
            }
        }
        Format::Q4K => {
            for (b, y) in blocks::<144, 256>(src, dst) {
                let (d, dmin, scales) = (half_at(b, 0), half_at(b, 2), part::<12>(b, 4));
                for (j, y) in y.as_chunks_mut::<32>().0.iter_mut().enumerate() {
                    let (s, m) = scale_min(scales, j);
                    affine(nibble(load32(part(b, 16 + 32 * (j / 2))), j % 2), d * s, -dmin * m, y);
                }
            }
        }
        Format::Q5K => {
            for (b, y) in blocks::<176, 256>(src, dst) {
                let (d, dmin, scales) = (half_at(b, 0), half_at(b, 2), part::<12>(b, 4));
                let high = load32(part(b, 16));
                for (j, y) in y.as_chunks_mut::<32>().0.iter_mut().enumerate() {
                    let (s, m) = scale_min(scales, j);
                    let q = nibble(load32(part(b, 48 + 32 * (j / 2))), j % 2);
                    affine(
                        _mm256_or_si256(q, bit_to_16(high, _mm256_set1_epi8((1u8 << j) as i8))),
                        d * s,
                        -dmin * m,
                        y,
                    );
                }
            }
        }
        Format::Q6K => {
            for (b, y) in blocks::<210, 256>(src, dst) {
                let d = half_at(b, 208);
                for (j, y) in y.as_chunks_mut::<32>().0.iter_mut().enumerate() {
                    // Half h, group g of 32: bits 2g of the half's high bytes, a scale per 16 elements.
                    let (h, g) = (j / 4, j % 4);
                    let low = nibble(load32(part(b, 64 * h + 32 * (g % 2))), g / 2);
                    let high = _mm256_srl_epi16(
                        load32(part(b, 128 + 32 * h)),
                        _mm_cvtsi32_si128(2 * g as i32),
                    );
                    let high = _mm256_slli_epi16::<4>(_mm256_and_si256(high, _mm256_set1_epi8(3)));
                    let q = _mm256_or_si256(low, high);
                    let s = [b[192 + 8 * h + 2 * g], b[193 + 8 * h + 2 * g]]
                        .map(|s| d * f32::from(s as i8));
                    let (y0, y1) = y.split_at_mut(16);
                    affine16(_mm256_castsi256_si128(q), s[0], -32.0 * s[0], y0);
                    affine16(_mm256_extracti128_si256::<1>(q), s[1], -32.0 * s[1], y1);
                }
            }
        }
        Format::F32 | Format::Bf16 | Format::Q8_0 | Format::Q2K | Format::Q3K => {
            quant::dequantise(format, src, dst)
        }
    }
}

fn blocks<'a, const B: usize, const N: usize>(
    src: &'a [u8],
    dst: &'a mut [f32],
) -> impl Iterator<Item = (&'a [u8; B], &'a mut [f32; N])> {
    src.as_chunks::<B>().0.iter().zip(dst.as_chunks_mut::<N>().0)
}

#[target_feature(enable = "avx2")]
fn load16(bytes: &[u8; 16]) -> __m128i {
    // SAFETY: the reference covers the 16 bytes read; the load needs no alignment.
    unsafe { _mm_loadu_si128(bytes.as_ptr().cast()) }
}

#[target_feature(enable = "avx2")]
fn load32(bytes: &[u8; 32]) -> __m256i {
    // SAFETY: the reference covers the 32 bytes read; the load needs no alignment.
    unsafe { _mm256_loadu_si256(bytes.as_ptr().cast()) }
}

#[target_feature(enable = "avx2")]
fn store(values: __m256, y: &mut [f32; 8]) {
    // SAFETY: the reference covers the 32 bytes written; the store needs no alignment.
    unsafe { _mm256_storeu_ps(y.as_mut_ptr(), values) }
}

#[target_feature(enable = "avx2,f16c")]
fn half_at(block: &[u8], at: usize) -> f32 {
    let bits = u16::from_le_bytes(*part::<2>(block, at));
    _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(i32::from(bits))))
}

/// 32 bytes from 16: low nibbles, then high nibbles.
#[target_feature(enable = "avx2")]
fn unpack(packed: &[u8; 16]) -> __m256i {
    let low = load16(packed);
    let both = _mm256_set_m128i(_mm_srli_epi16::<4>(low), low);
    _mm256_and_si256(both, _mm256_set1_epi8(15))
}

/// The low (`which` = 0) or high nibble of each byte.
#[target_feature(enable = "avx2")]
fn nibble(bytes: __m256i, which: usize) -> __m256i {
    let shifted = if which == 0 { bytes } else { _mm256_srli_epi16::<4>(bytes) };
    _mm256_and_si256(shifted, _mm256_set1_epi8(15))
}

/// 16 in every byte of which `bytes` has the bit `mask`.
#[target_feature(enable = "avx2")]
fn bit_to_16(bytes: __m256i, mask: __m256i) -> __m256i {
    let set = _mm256_cmpeq_epi8(_mm256_and_si256(bytes, mask), mask);
    _mm256_and_si256(set, _mm256_set1_epi8(16))
}

/// 16 in byte i if bit i of the little-endian word is set.
#[target_feature(enable = "avx2")]
fn fifth_bits(word: &[u8; 4]) -> __m256i {
    // Byte i/8 of the word in every byte i; both 128-bit lanes hold the whole word.
    let spread =
        _mm256_setr_epi64x(0, 0x0101_0101_0101_0101, 0x0202_0202_0202_0202, 0x0303_0303_0303_0303);
    let bytes = _mm256_shuffle_epi8(_mm256_set1_epi32(i32::from_le_bytes(*word)), spread);
    bit_to_16(bytes, _mm256_set1_epi64x(0x8040_2010_0804_0201_u64 as i64))
}

/// y = q·scale + min for 32 unsigned bytes.
#[target_feature(enable = "avx2,fma")]
fn affine(q: __m256i, scale: f32, min: f32, y: &mut [f32; 32]) {
    let (low, high) = y.split_at_mut(16);
    affine16(_mm256_castsi256_si128(q), scale, min, low);
    affine16(_mm256_extracti128_si256::<1>(q), scale, min, high);
}

/// y = q·scale + min for 16 unsigned bytes.
#[target_feature(enable = "avx2,fma")]
fn affine16(q: __m128i, scale: f32, min: f32, y: &mut [f32]) {
    let (scale, min) = (_mm256_set1_ps(scale), _mm256_set1_ps(min));
    let quarters = [_mm256_cvtepu8_epi32(q), _mm256_cvtepu8_epi32(_mm_srli_si128::<8>(q))];
    for (q, y) in quarters.into_iter().zip(y.as_chunks_mut::<8>().0) {
        store(_mm256_fmadd_ps(_mm256_cvtepi32_ps(q), scale, min), y);
    }
}

/// [`super::tile`]: twelve accumulators, two of b, one broadcast of a: fifteen of the sixteen registers.
#[target_feature(enable = "avx2,fma")]
pub(super) fn tile(mut t: Tile<'_>) {
    let depth = t.b.len();
    assert!((1..=TILE_ROWS).contains(&t.rows) && t.a.len() >= (t.rows - 1) * t.a_stride + depth);
    // Missing rows repeat the last one: their results are not stored.
    let rows: [*const f32; TILE_ROWS] =
        std::array::from_fn(|i| t.a[i.min(t.rows - 1) * t.a_stride..].as_ptr());
    let mut acc = [[_mm256_setzero_ps(); 2]; TILE_ROWS];
    for (k, b) in t.b.iter().enumerate() {
        // SAFETY: `b` has 16 elements; neither load needs alignment.
        let b = unsafe { [_mm256_loadu_ps(b.as_ptr()), _mm256_loadu_ps(b.as_ptr().add(8))] };
        for i in 0..TILE_ROWS {
            // SAFETY: k < depth, and the assertion gives every row `depth` elements.
            let a = unsafe { _mm256_broadcast_ss(&*rows[i].add(k)) };
            acc[i] = [_mm256_fmadd_ps(a, b[0], acc[i][0]), _mm256_fmadd_ps(a, b[1], acc[i][1])];
        }
    }
    if t.cols == TILE_COLS {
        assert!(t.c.len() >= (t.rows - 1) * t.c_stride + TILE_COLS);
        for (i, acc) in acc.iter().enumerate().take(t.rows) {
            let c = t.c[i * t.c_stride..].as_mut_ptr();
            for (j, value) in acc.iter().enumerate() {
                // SAFETY: the assertion gives row i sixteen elements of `c`, of which these are eight.
                unsafe {
                    let c = c.add(8 * j);
                    let value = if t.accumulate {
                        _mm256_add_ps(_mm256_loadu_ps(c), *value)
                    } else {
                        *value
                    };
                    _mm256_storeu_ps(c, value);
                }
            }
        }
        return;
    }
    for i in 0..t.rows {
        let mut values = [0.0; TILE_COLS];
        let (halves, _) = values.as_chunks_mut::<8>();
        for (value, y) in acc[i].into_iter().zip(halves) {
            store(value, y);
        }
        t.store(i, &values);
    }
}

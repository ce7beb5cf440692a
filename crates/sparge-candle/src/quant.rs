//! The block formats of GGUF files, and their dequantisation in plain Rust.
//!
//! This is the portable path and the yardstick; [`crate::simd`] has the same in AVX2.

use half::{bf16, f16};

/// How a tensor's rows are stored. Names are ggml's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[allow(missing_docs, reason = "the names are the documentation")]
pub enum Format {
    F32,
    F16,
    Bf16,
    Q4_0,
    Q4_1,
    Q5_0,
    Q5_1,
    Q8_0,
    Q2K,
    Q3K,
    Q4K,
    Q5K,
    Q6K,
}

impl Format {
    /// From ggml's type number.
    pub(crate) fn from_ggml(kind: u32) -> Option<Self> {
        Some(match kind {
            0 => Self::F32,
            1 => Self::F16,
            2 => Self::Q4_0,
            3 => Self::Q4_1,
            6 => Self::Q5_0,
            7 => Self::Q5_1,
            8 => Self::Q8_0,
            10 => Self::Q2K,
            11 => Self::Q3K,
            12 => Self::Q4K,
            13 => Self::Q5K,
            14 => Self::Q6K,
            30 => Self::Bf16,
            _ => return None,
        })
    }

    /// Elements per block and bytes per block.
    pub(crate) const fn block(self) -> (usize, usize) {
        match self {
            Self::F32 => (1, 4),
            Self::F16 | Self::Bf16 => (1, 2),
            Self::Q4_0 => (32, 18),
            Self::Q4_1 => (32, 20),
            Self::Q5_0 => (32, 22),
            Self::Q5_1 => (32, 24),
            Self::Q8_0 => (32, 34),
            Self::Q2K => (256, 84),
            Self::Q3K => (256, 110),
            Self::Q4K => (256, 144),
            Self::Q5K => (256, 176),
            Self::Q6K => (256, 210),
        }
    }

    /// Bytes of a row of `cols` elements; `None` if the blocks do not divide it.
    pub(crate) fn row_bytes(self, cols: usize) -> Option<usize> {
        let (elements, bytes) = self.block();
        if cols == 0 || cols % elements != 0 {
            return None;
        }
        (cols / elements).checked_mul(bytes)
    }
}

/// Dequantises whole rows: `src` and `dst` hold the same number of elements (checked by the caller).
#[inline(always)]
pub(crate) fn dequantise(format: Format, src: &[u8], dst: &mut [f32]) {
    match format {
        Format::F32 => each::<4, 1>(src, dst, |b, y| y[0] = f32::from_le_bytes(*b)),
        Format::F16 => each::<2, 1>(src, dst, |b, y| y[0] = f16::from_le_bytes(*b).to_f32()),
        Format::Bf16 => each::<2, 1>(src, dst, |b, y| y[0] = bf16::from_le_bytes(*b).to_f32()),
        Format::Q4_0 => each::<18, 32>(src, dst, |b, y| {
            let d = half_at(b, 0);
            nibbles(part(b, 2), y, d, -8.0 * d);
        }),
        Format::Q4_1 => {
            each::<20, 32>(src, dst, |b, y| nibbles(part(b, 4), y, half_at(b, 0), half_at(b, 2)))
        }
        Format::Q5_0 => each::<22, 32>(src, dst, |b, y| {
            let d = half_at(b, 0);
            five_bits(part(b, 2), part(b, 6), y, d, -16.0 * d);
        }),
        Format::Q5_1 => each::<24, 32>(src, dst, |b, y| {
            five_bits(part(b, 4), part(b, 8), y, half_at(b, 0), half_at(b, 2));
        }),
        Format::Q8_0 => each::<34, 32>(src, dst, |b, y| {
            let d = half_at(b, 0);
            for i in 0..32 {
                y[i] = f32::from(b[2 + i] as i8) * d;
            }
        }),
        Format::Q4K => each::<144, 256>(src, dst, q4k),
        Format::Q5K => each::<176, 256>(src, dst, q5k),
        Format::Q6K => each::<210, 256>(src, dst, q6k),
        // Rare in practice, left to candle (see `linear`).
        Format::Q2K | Format::Q3K => {}
    }
}

#[inline(always)]
fn each<const B: usize, const N: usize>(
    src: &[u8],
    dst: &mut [f32],
    f: impl Fn(&[u8; B], &mut [f32; N]),
) {
    let (blocks, _) = src.as_chunks::<B>();
    let (outs, _) = dst.as_chunks_mut::<N>();
    for (b, y) in blocks.iter().zip(outs) {
        f(b, y);
    }
}

/// The `M` bytes from `at`.
#[inline(always)]
pub(crate) fn part<const M: usize>(block: &[u8], at: usize) -> &[u8; M] {
    // The offsets are constants inside blocks of constant size: never out of range.
    match block[at..].first_chunk() {
        Some(bytes) => bytes,
        None => &[0; M],
    }
}

#[inline(always)]
pub(crate) fn half_at(block: &[u8], at: usize) -> f32 {
    f16::from_le_bytes(*part::<2>(block, at)).to_f32()
}

/// 32 elements of four bits: the low nibbles first, then the high ones.
#[inline(always)]
fn nibbles(q: &[u8; 16], y: &mut [f32; 32], scale: f32, min: f32) {
    for i in 0..16 {
        y[i] = f32::from(q[i] & 15) * scale + min;
    }
    for i in 0..16 {
        y[16 + i] = f32::from(q[i] >> 4) * scale + min;
    }
}

/// As [`nibbles`], with the fifth bits of all 32 elements in one little-endian word.
#[inline(always)]
fn five_bits(high: &[u8; 4], q: &[u8; 16], y: &mut [f32; 32], scale: f32, min: f32) {
    let high = u32::from_le_bytes(*high);
    for i in 0..16 {
        y[i] = ((u32::from(q[i]) & 15) | (((high >> i) & 1) << 4)) as f32 * scale + min;
    }
    for i in 0..16 {
        y[16 + i] = ((u32::from(q[i]) >> 4) | (((high >> (16 + i)) & 1) << 4)) as f32 * scale + min;
    }
}

/// The 6-bit scale and minimum of sub-block `j` (0..8) of Q4_K and Q5_K.
#[inline(always)]
pub(crate) fn scale_min(s: &[u8; 12], j: usize) -> (f32, f32) {
    let (scale, min) = if j < 4 {
        (s[j] & 63, s[j + 4] & 63)
    } else {
        ((s[j + 4] & 15) | ((s[j - 4] >> 6) << 4), (s[j + 4] >> 4) | ((s[j] >> 6) << 4))
    };
    (f32::from(scale), f32::from(min))
}

#[inline(always)]
fn q4k(b: &[u8; 144], y: &mut [f32; 256]) {
    let (d, dmin, scales) = (half_at(b, 0), half_at(b, 2), part::<12>(b, 4));
    for (j, y) in y.as_chunks_mut::<64>().0.iter_mut().enumerate() {
        let q = part::<32>(b, 16 + 32 * j);
        let ((s0, m0), (s1, m1)) = (scale_min(scales, 2 * j), scale_min(scales, 2 * j + 1));
        let (s0, m0, s1, m1) = (d * s0, dmin * m0, d * s1, dmin * m1);
        for i in 0..32 {
            y[i] = f32::from(q[i] & 15) * s0 - m0;
        }
        for i in 0..32 {
            y[32 + i] = f32::from(q[i] >> 4) * s1 - m1;
        }
    }
}

#[inline(always)]
fn q5k(b: &[u8; 176], y: &mut [f32; 256]) {
    let (d, dmin, scales) = (half_at(b, 0), half_at(b, 2), part::<12>(b, 4));
    let high = part::<32>(b, 16);
    for (j, y) in y.as_chunks_mut::<64>().0.iter_mut().enumerate() {
        let q = part::<32>(b, 48 + 32 * j);
        let ((s0, m0), (s1, m1)) = (scale_min(scales, 2 * j), scale_min(scales, 2 * j + 1));
        let (s0, m0, s1, m1) = (d * s0, dmin * m0, d * s1, dmin * m1);
        for i in 0..32 {
            y[i] = f32::from((q[i] & 15) | (((high[i] >> (2 * j)) & 1) << 4)) * s0 - m0;
        }
        for i in 0..32 {
            y[32 + i] = f32::from((q[i] >> 4) | (((high[i] >> (2 * j + 1)) & 1) << 4)) * s1 - m1;
        }
    }
}

#[inline(always)]
fn q6k(b: &[u8; 210], y: &mut [f32; 256]) {
    let d = half_at(b, 208);
    for (h, y) in y.as_chunks_mut::<128>().0.iter_mut().enumerate() {
        let (low, high, scales) =
            (part::<64>(b, 64 * h), part::<32>(b, 128 + 32 * h), part::<8>(b, 192 + 8 * h));
        // Four groups of 32; group g takes bits 2g of `high` and every 16 elements have a scale.
        for g in 0..4 {
            let low = part::<32>(low, 32 * (g % 2));
            for half in 0..2 {
                let s = d * f32::from(scales[2 * g + half] as i8);
                for i in 16 * half..16 * half + 16 {
                    let nibble = (low[i] >> (4 * (g / 2))) & 15;
                    let q = nibble | (((high[i] >> (2 * g)) & 3) << 4);
                    y[32 * g + i] = (f32::from(q) - 32.0) * s;
                }
            }
        }
    }
}

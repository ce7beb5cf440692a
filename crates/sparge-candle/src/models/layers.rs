//! The small parts between the matrix products, over plain slices, parallel in tokens.

use rayon::prelude::*;

use super::{Config, RopeStyle};
use crate::simd;

/// Tokens per parallel job: enough work to be worth a job, enough jobs for the threads.
const TOKENS: usize = 16;

/// `out = x / rms(x) · weight` for every row of `weight.len()` elements.
pub(super) fn rms_norm(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    let width = weight.len();
    out.par_chunks_mut(TOKENS * width).zip(x.par_chunks(TOKENS * width)).for_each(|(out, x)| {
        for (out, x) in out.chunks_exact_mut(width).zip(x.chunks_exact(width)) {
            let scale = 1.0 / (simd::dot(x, x) / width as f32 + eps).sqrt();
            for i in 0..width {
                out[i] = x[i] * scale * weight[i];
            }
        }
    });
}

/// `gate = silu(gate)·up`.
pub(super) fn swiglu(gate: &mut [f32], up: &[f32]) {
    let share = 1 << 14;
    gate.par_chunks_mut(share).zip(up.par_chunks(share)).for_each(|(g, u)| simd::silu_mul(g, u));
}

/// Adds `bias` to every row.
pub(super) fn add_bias(x: &mut [f32], bias: &[f32]) {
    for row in x.chunks_exact_mut(bias.len()) {
        for (x, b) in row.iter_mut().zip(bias) {
            *x += b;
        }
    }
}

/// Rotation angles of the positions of one chunk.
pub(super) struct Rope {
    /// `[tokens, rope_dim / 2]` of (cos, sin).
    table: Vec<(f32, f32)>,
    pairs: usize,
    style: RopeStyle,
}

impl Rope {
    /// The angles of the positions `start..start + tokens`; `factors` divide the frequencies.
    pub(super) fn new(
        config: &Config,
        factors: Option<&[f32]>,
        start: usize,
        tokens: usize,
    ) -> Self {
        let pairs = config.rope_dim / 2;
        let frequencies: Vec<f64> = (0..pairs)
            .map(|i| {
                let exponent = -2.0 * i as f64 / config.rope_dim as f64;
                config.rope_base.powf(exponent)
                    / config.rope_scale
                    / factors.map_or(1.0, |f| f64::from(f[i]))
            })
            .collect();
        // f64: at position 100,000 an f32 product would be off by a hundredth of a radian.
        let table = (start..start + tokens)
            .into_par_iter()
            .flat_map_iter(|p| {
                frequencies.iter().map(move |f| {
                    let (sin, cos) = (p as f64 * f).sin_cos();
                    (cos as f32, sin as f32)
                })
            })
            .collect();
        Self { table, pairs, style: config.rope_style }
    }

    /// Rotates token-major `[tokens, heads, head_dim]` in place.
    pub(super) fn apply(&self, x: &mut [f32], heads: usize, head_dim: usize) {
        let width = heads * head_dim;
        x.par_chunks_mut(TOKENS * width).zip(self.table.par_chunks(TOKENS * self.pairs)).for_each(
            |(x, table)| {
                for (token, angles) in x.chunks_exact_mut(width).zip(table.chunks_exact(self.pairs))
                {
                    for head in token.chunks_exact_mut(head_dim) {
                        self.rotate(head, angles);
                    }
                }
            },
        );
    }

    fn rotate(&self, head: &mut [f32], angles: &[(f32, f32)]) {
        match self.style {
            RopeStyle::Interleaved => {
                for (pair, (cos, sin)) in head.chunks_exact_mut(2).zip(angles) {
                    (pair[0], pair[1]) =
                        (pair[0] * cos - pair[1] * sin, pair[0] * sin + pair[1] * cos);
                }
            }
            RopeStyle::HalfSplit => {
                let (low, high) = head.split_at_mut(self.pairs);
                for ((a, b), (cos, sin)) in low.iter_mut().zip(high).zip(angles) {
                    (*a, *b) = (*a * cos - *b * sin, *a * sin + *b * cos);
                }
            }
        }
    }
}

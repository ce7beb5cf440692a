//! Negative log-likelihoods of known tokens, without ever holding a `[tokens, vocab]` matrix.

use rayon::prelude::*;

use crate::error::Result;
use crate::gemm;
use crate::linear::Matrix;
use crate::simd;

/// Logits held at a time (4 Mi floats, 16 MiB).
const LOGITS: usize = 1 << 22;

/// `−ln p(target)` for every row of `hidden` (normed, `[targets.len(), head.cols]`).
///
/// The output matrix is walked once, tile by tile; each tile updates a running log-sum-exp per row.
pub(super) fn nll(hidden: &[f32], head: &Matrix, targets: &[u32]) -> Result<Vec<f32>> {
    let mut states = vec![State { max: f32::NEG_INFINITY, sum: 0.0, target: 0.0 }; targets.len()];
    let mut logits = Vec::new();
    head.tiles(|first, w| {
        let width = w.rows;
        let rows = (LOGITS / width).max(1);
        logits.resize(rows.min(targets.len()) * width, 0.0);
        for (chunk, states) in states.chunks_mut(rows).enumerate() {
            let x = &hidden[chunk * rows * head.cols..][..states.len() * head.cols];
            gemm::multiply(x, w, &mut logits[..states.len() * width], width, false);
            let targets = &targets[chunk * rows..];
            states.par_iter_mut().zip(logits.par_chunks(width)).zip(targets).for_each(
                |((state, row), target)| {
                    state.update(row);
                    if let Some(logit) =
                        (*target as usize).checked_sub(first).and_then(|i| row.get(i))
                    {
                        state.target = *logit;
                    }
                },
            );
        }
    })?;
    Ok(states.iter().map(|s| s.max + s.sum.ln() - s.target).collect())
}

/// A running log-sum-exp, and the target's logit once its tile has passed.
#[derive(Clone, Copy)]
struct State {
    max: f32,
    sum: f32,
    target: f32,
}

impl State {
    fn update(&mut self, row: &[f32]) {
        let (sum, max) = simd::sum_exp(row);
        let top = self.max.max(max);
        self.sum = self.sum * (self.max - top).exp() + sum * (max - top).exp();
        self.max = top;
    }
}

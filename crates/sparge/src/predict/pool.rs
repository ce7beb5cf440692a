//! Means, variances and self-similarity of blocks.

use crate::geometry::{BLOCK_KV, Sequence};
use crate::plan::Plan;
use crate::tensor::{Element, TensorView};
use std::ops::Range;

/// One key/value head, pooled.
#[derive(Debug)]
pub(crate) struct PooledKeys {
    /// `[sub-block][features]`: the mean, then (second order) the variance per dimension.
    pub(super) features: Vec<f32>,
    /// Elements per sub-block in `features`.
    pub(super) width: usize,
    /// Sub-blocks in all.
    pub(super) len: usize,
    /// Per block: every mean is finite, so that scores can be computed.
    pub(super) is_finite: Vec<bool>,
    /// Per block: mean pairwise cosine of the smoothed keys; empty where no head judges.
    pub(super) similarity: Vec<f32>,
}

impl PooledKeys {
    /// Pools `k`.
    pub(crate) fn new<T: Element>(
        plan: &Plan<'_>,
        k: &TensorView<'_, T>,
        sequence: usize,
        kv_head: usize,
    ) -> Self {
        let seq = plan.sequences[sequence];
        let dim = plan.shape.head_dim;
        let pooling = plan.pooling;
        let width = if pooling.second_order { 2 * dim } else { dim };
        let len = seq.kv_len.div_ceil(pooling.kv_rows);
        let mut features = vec![0.0; len * width];
        let mut rows = RowReader { x: k, seq, head: kv_head, is_query: false, buffer: Vec::new() };
        for (i, out) in features.chunks_exact_mut(width).enumerate() {
            let range = i * pooling.kv_rows..((i + 1) * pooling.kv_rows).min(seq.kv_len);
            let tile = rows.read(range);
            let (mean, variance) = out.split_at_mut(dim);
            mean_into(tile, mean);
            if pooling.second_order {
                variance_into(tile, mean, variance);
            }
        }
        let per_block = BLOCK_KV / pooling.kv_rows * width;
        let is_finite =
            features.chunks(per_block).map(|f| f.iter().all(|x| x.is_finite())).collect();
        let judges = plan.heads.iter().any(|h| h.theta > 0.0);
        let similarity = if judges {
            let prefix = plan.visibility[sequence].has_diagonal();
            similarities(&mut rows, dim, prefix)
        } else {
            Vec::new()
        };
        Self { features, width, len, is_finite, similarity }
    }
}

/// Reads rows of one head as f32.
pub(super) struct RowReader<'x, 'a, T> {
    pub(super) x: &'x TensorView<'a, T>,
    pub(super) seq: Sequence,
    pub(super) head: usize,
    pub(super) is_query: bool,
    pub(super) buffer: Vec<f32>,
}

impl<T: Element> RowReader<'_, '_, T> {
    /// Rows `range` (the sequence's own coordinates), one after another.
    pub(super) fn read(&mut self, range: Range<usize>) -> &[f32] {
        let dim = self.x.dims().dim;
        let start = if self.is_query { self.seq.q_start } else { self.seq.kv_start };
        self.buffer.resize(range.len() * dim, 0.0);
        for (to, i) in self.buffer.chunks_exact_mut(dim).zip(range) {
            T::widen(self.x.row(self.seq.batch, self.head, start + i), to);
        }
        &self.buffer
    }
}

/// The mean of `tile`'s rows (each as long as `mean`).
pub(super) fn mean_into(tile: &[f32], mean: &mut [f32]) {
    mean.fill(0.0);
    for row in tile.chunks_exact(mean.len()) {
        mean.iter_mut().zip(row).for_each(|(m, x)| *m += x);
    }
    let inverse = mean.len() as f32 / tile.len() as f32;
    mean.iter_mut().for_each(|m| *m *= inverse);
}

fn variance_into(tile: &[f32], mean: &[f32], variance: &mut [f32]) {
    variance.fill(0.0);
    for row in tile.chunks_exact(mean.len()) {
        for ((v, x), m) in variance.iter_mut().zip(row).zip(mean) {
            *v += (x - m) * (x - m);
        }
    }
    let inverse = mean.len() as f32 / tile.len() as f32;
    variance.iter_mut().for_each(|v| *v *= inverse);
}

/// Mean pairwise cosine of `tile`'s rows minus `centre`: the squared norm of the mean of the unit
/// rows, which needs no Gram matrix. A zero row has cosine 0 with everything.
pub(super) fn mean_cosine(tile: &[f32], centre: &[f32], sum: &mut Vec<f32>) -> f32 {
    let dim = centre.len();
    sum.clear();
    sum.resize(dim, 0.0);
    for row in tile.chunks_exact(dim) {
        let norm: f32 = row.iter().zip(centre).map(|(x, c)| (x - c) * (x - c)).sum();
        if norm > 0.0 {
            let inverse = 1.0 / norm.sqrt();
            for ((s, x), c) in sum.iter_mut().zip(row).zip(centre) {
                *s += (x - c) * inverse;
            }
        }
    }
    let rows = (tile.len() / dim) as f32;
    sum.iter().map(|s| s * s).sum::<f32>() / (rows * rows)
}

/// The cosine of every key block, smoothed by the mean of the sequence, or, where later tokens
/// must not be seen, by the mean up to the block's end.
fn similarities<T: Element>(rows: &mut RowReader<'_, '_, T>, dim: usize, prefix: bool) -> Vec<f32> {
    let seq = rows.seq;
    // Sums in f64: a mean over 128K rows must not drift.
    let mut sum = vec![0.0f64; dim];
    let add = |sum: &mut [f64], tile: &[f32]| {
        for row in tile.chunks_exact(dim) {
            sum.iter_mut().zip(row).for_each(|(s, &x)| *s += f64::from(x));
        }
    };
    if !prefix {
        for block in 0..seq.kv_blocks() {
            add(&mut sum, rows.read(seq.kv_block(block)));
        }
    }
    let mut scratch = Vec::new();
    (0..seq.kv_blocks())
        .map(|block| {
            let range = seq.kv_block(block);
            let seen = if prefix { range.end } else { seq.kv_len } as f64;
            let tile = rows.read(range);
            if prefix {
                add(&mut sum, tile);
            }
            let centre: Vec<f32> = sum.iter().map(|s| (s / seen) as f32).collect();
            mean_cosine(tile, &centre, &mut scratch)
        })
        .collect()
}

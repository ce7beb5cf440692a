//! Pooled scores of one query block and the masses they predict.

use super::pool::{PooledKeys, RowReader, mean_cosine, mean_into};
use super::sample::Samples;
use super::select::RowScores;
use crate::config::ElementMask;
use crate::cpu::{PackedQ, Rows, Running, Scores};
use crate::geometry::{BLOCK_KV, Coverage};
use crate::plan::{HeadAt, Plan};
use crate::tensor::{Element, TensorView};
use std::ops::Range;

/// Scratch of one thread.
#[derive(Debug, Default)]
pub(crate) struct Scorer {
    rows: Vec<f32>,
    features: Vec<f32>,
    packed: PackedQ,
    scores: Vec<f32>,
    running: Running,
    scratch: Vec<f32>,
    samples: Samples,
    out: RowScores,
}

impl Scorer {
    /// Looks at single queries of the blocks `q_blocks`, which [`Scorer::row`] then mixes in.
    pub(crate) fn sample<T: Element>(
        &mut self,
        plan: &Plan<'_>,
        q: &TensorView<'_, T>,
        k: &TensorView<'_, T>,
        at: HeadAt,
        q_blocks: Range<usize>,
    ) {
        if plan.pooling.sampled_rows > 0 {
            self.samples.compute(plan, q, k, at, q_blocks);
        }
    }

    /// Scores query block `q_block` of `at` against every block it can reach; it must be among
    /// those last sampled.
    pub(crate) fn row<T: Element>(
        &mut self,
        plan: &Plan<'_>,
        q: &TensorView<'_, T>,
        at: HeadAt,
        q_block: usize,
        keys: &PooledKeys,
    ) -> &mut RowScores {
        let seq = plan.sequences[at.sequence];
        let rows = seq.q_block(q_block);
        self.out.reachable.clear();
        self.out.reachable.extend(plan.reachable(at, q_block));
        self.out.forced.clear();
        self.out.dissimilar.clear();
        self.out.masses.clear();
        self.out.undecidable = false;
        if self.out.reachable.is_empty() {
            return &mut self.out;
        }

        let theta = plan.heads[at.head].theta as f32;
        let buffer = std::mem::take(&mut self.rows);
        let mut reader = RowReader { x: q, seq, head: at.head, is_query: true, buffer };
        let tile = reader.read(rows.clone());
        let similar = self.pool_queries(plan, tile, theta);
        self.rows = reader.buffer;
        if !similar {
            self.out.undecidable = true;
            return &mut self.out;
        }

        let mut scored = Vec::with_capacity(self.out.reachable.len());
        for &j in &self.out.reachable {
            let similar = keys.is_finite[j] && (theta == 0.0 || keys.similarity[j] > theta);
            if plan.is_forced(at, &rows, j) {
                self.out.forced.push(j);
            } else if !similar {
                self.out.dissimilar.push(j);
            }
            if similar && !plan.is_frontier(at, &rows, j) {
                scored.push(j);
            }
        }
        if let (Some(&first), Some(&last)) = (scored.first(), scored.last()) {
            self.score(plan, at, &rows, keys, &scored, first..last + 1);
            if plan.pooling.sampled_rows > 0 && !self.out.undecidable {
                self.out.undecidable = !self.samples.mix(q_block, &mut self.out.masses);
            }
        }
        &mut self.out
    }

    /// Packs the block's pooled rows; false where they say nothing (not self-similar, not finite).
    fn pool_queries(&mut self, plan: &Plan<'_>, tile: &[f32], theta: f32) -> bool {
        let dim = plan.shape.head_dim;
        let pooling = plan.pooling;
        let scale = plan.softmax_scale;
        let log2e = std::f64::consts::LOG2_E;
        let width = if pooling.second_order { 2 * dim } else { dim };
        let subs = (tile.len() / dim).div_ceil(pooling.q_rows);
        self.features.resize(subs * width, 0.0);
        for (part, out) in
            tile.chunks(pooling.q_rows * dim).zip(self.features.chunks_exact_mut(width))
        {
            let (mean, square) = out.split_at_mut(dim);
            mean_into(part, mean);
            for (s, m) in square.iter_mut().zip(mean.iter()) {
                *s = m * m * (0.5 * scale * scale * log2e) as f32;
            }
            mean.iter_mut().for_each(|m| *m *= (scale * log2e) as f32);
        }
        if self.features[..subs * width].iter().any(|x| !x.is_finite()) {
            return false;
        }
        let lanes = plan.kernels.lanes;
        let panel = if subs <= lanes { lanes } else { plan.kernels.panel };
        let features = &self.features;
        self.packed.pack(subs, width, panel, 1.0, |i| &features[i * width..]);
        if theta == 0.0 {
            return true;
        }
        self.features.clear();
        self.features.resize(dim, 0.0);
        mean_cosine(tile, &self.features, &mut self.scratch) > theta
    }

    /// Fills `out.masses` for the blocks `scored`, all of which lie in `span`.
    fn score(
        &mut self,
        plan: &Plan<'_>,
        at: HeadAt,
        rows: &Range<usize>,
        keys: &PooledKeys,
        scored: &[usize],
        span: Range<usize>,
    ) {
        let pooling = plan.pooling;
        let per_block = BLOCK_KV / pooling.kv_rows;
        let first_sub = span.start * per_block;
        let subs = (span.end * per_block).min(keys.len) - first_sub;
        let pitch = Scores::pitch(self.packed.width);
        self.scores.resize(subs * pitch, 0.0);
        let k = Rows {
            data: &keys.features[first_sub * keys.width..],
            stride: keys.width,
            len: subs,
            dim: keys.width,
        };
        let mut s = Scores { data: &mut self.scores, pitch, keys: subs, width: self.packed.width };
        (plan.kernels.qk)(&self.packed, &k, &mut s);

        // Blocks that are not scored leave the softmax; partly visible ones are cut.
        let seq = plan.sequences[at.sequence];
        let mut next = scored.iter().peekable();
        for block in span.clone() {
            let sub_range =
                (block - span.start) * per_block..((block + 1 - span.start) * per_block).min(subs);
            if next.next_if_eq(&&block).is_none() {
                s.data[sub_range.start * pitch..sub_range.end * pitch].fill(f32::NEG_INFINITY);
                continue;
            }
            let block_keys = seq.kv_block(block);
            let whole = plan.element_mask.is_none()
                && plan.tile_coverage(at, rows, &block_keys) == Coverage::Full;
            for sub in sub_range {
                let start = (first_sub + sub) * pooling.kv_rows;
                let sub_keys = start..(start + pooling.kv_rows).min(seq.kv_len);
                let line = &mut s.data[sub * pitch..(sub + 1) * pitch];
                if sub_keys.len() < pooling.kv_rows {
                    let by_count = (sub_keys.len() as f32 / pooling.kv_rows as f32).log2();
                    line.iter_mut().for_each(|x| *x += by_count);
                }
                if !whole {
                    cut(plan, at, rows, &sub_keys, line);
                }
            }
        }
        self.running.reset(self.packed.width);
        (plan.kernels.softmax)(&mut s, &mut self.running);
        self.out.undecidable = !self.sum_masses(plan, rows, scored, &span, subs, pitch);
    }

    /// Adds up P per block, weighted by the rows of each pooled query; false where a sum is not
    /// finite.
    fn sum_masses(
        &mut self,
        plan: &Plan<'_>,
        rows: &Range<usize>,
        scored: &[usize],
        span: &Range<usize>,
        subs: usize,
        pitch: usize,
    ) -> bool {
        let pooling = plan.pooling;
        let per_block = BLOCK_KV / pooling.kv_rows;
        let width = self.packed.width;
        let mut total = 0.0;
        let weights = &mut self.scratch;
        weights.clear();
        weights.resize(width, 0.0);
        for (r, start) in (0..rows.len()).step_by(pooling.q_rows).enumerate() {
            let (sum, max) = (self.running.sum[r], self.running.max[r]);
            if !sum.is_finite() || max == f32::INFINITY {
                return false;
            }
            if sum > 0.0 {
                let count = pooling.q_rows.min(rows.len() - start) as f32;
                weights[r] = count / sum;
                total += count;
            }
        }
        if total == 0.0 {
            // Every score is out of range: nothing is known.
            return false;
        }
        for &block in scored {
            let from = (block - span.start) * per_block;
            let to = (from + per_block).min(subs);
            let mass: f32 = (from..to)
                .map(|sub| {
                    let line = &self.scores[sub * pitch..][..width];
                    line.iter().zip(weights.iter()).map(|(p, w)| p * w).sum::<f32>()
                })
                .sum();
            self.out.masses.push((block, mass / total));
        }
        true
    }
}

/// Removes pooled queries that see none of `sub_keys`, and adds the bias of the others.
fn cut(
    plan: &Plan<'_>,
    at: HeadAt,
    rows: &Range<usize>,
    sub_keys: &Range<usize>,
    line: &mut [f32],
) {
    for (r, start) in rows.clone().step_by(plan.pooling.q_rows).enumerate() {
        let sub_rows = start..(start + plan.pooling.q_rows).min(rows.end);
        if plan.tile_coverage(at, &sub_rows, sub_keys) == Coverage::Empty {
            line[r] = f32::NEG_INFINITY;
        } else if let Some(ElementMask::Additive(_)) = plan.element_mask {
            // log2 of the mean of exp(bias): one pair at −1e38 must not hide the others.
            let (mut max, mut sum, mut count) = (f64::NEG_INFINITY, 0.0f64, 0u32);
            for i in sub_rows {
                for j in sub_keys.clone().filter(|&j| plan.sees(at, i, j)) {
                    let bias = f64::from(plan.bias(at, i, j));
                    if bias > max {
                        sum *= (max - bias).exp();
                        max = bias;
                    }
                    sum += (bias - max).exp();
                    count += 1;
                }
            }
            let bias = (max + (sum / f64::from(count)).ln()) * std::f64::consts::LOG2_E;
            line[r] += bias as f32;
        }
    }
}

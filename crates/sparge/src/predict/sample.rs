//! A few queries of each block against every key: no pooling, so no bias, but few.

use super::pool::RowReader;
use crate::config::ElementMask;
use crate::cpu::{PackedQ, Rows, Running, Scores};
use crate::geometry::{BLOCK_KV, Coverage, Sequence};
use crate::plan::{HeadAt, Plan};
use crate::tensor::{Element, TensorView};
use std::ops::Range;

/// Query blocks whose samples go through the kernels together: alone they would leave most of a
/// vector empty.
pub(super) const GROUP: usize = 8;

/// The share of each key block in the sampled queries' attention; buffers are kept.
#[derive(Debug, Default)]
pub(super) struct Samples {
    /// The query blocks they are of.
    blocks: Range<usize>,
    kv_blocks: usize,
    /// `[query block][key block]`.
    shares: Vec<f32>,
    /// Per query block: its shares are numbers.
    is_finite: Vec<bool>,
    queries: Vec<f32>,
    keys: Vec<f32>,
    packed: PackedQ,
    scores: Vec<f32>,
    running: Running,
    /// `[key block][column]`: the largest score and Σ 2^(score − it).
    max: Vec<f32>,
    sum: Vec<f32>,
}

/// The queries that stand for a block: the middles of `count` equal parts.
pub(crate) fn positions(rows: Range<usize>, count: usize) -> impl Iterator<Item = usize> {
    let (start, len) = (rows.start, rows.len());
    (0..count).map(move |i| start + (2 * i + 1) * len / (2 * count))
}

impl Samples {
    /// Computes the shares for the query blocks `blocks` of `at`.
    pub(super) fn compute<T: Element>(
        &mut self,
        plan: &Plan<'_>,
        q: &TensorView<'_, T>,
        k: &TensorView<'_, T>,
        at: HeadAt,
        blocks: Range<usize>,
    ) {
        let seq = plan.sequences[at.sequence];
        let count = plan.pooling.sampled_rows;
        let rows: Vec<usize> =
            blocks.clone().flat_map(|b| positions(seq.q_block(b), count)).collect();
        self.pack(plan, q, at, &seq, &rows);
        (self.blocks, self.kv_blocks) = (blocks, seq.kv_blocks());
        let width = self.packed.width;
        let pitch = Scores::pitch(width);
        self.scores.resize(BLOCK_KV * pitch, 0.0);
        for (buffer, value) in [(&mut self.max, f32::NEG_INFINITY), (&mut self.sum, 0.0)] {
            buffer.clear();
            buffer.resize(self.kv_blocks * width, value);
        }
        for block in 0..self.kv_blocks {
            let keys = seq.kv_block(block);
            let coverage = self.coverage(plan, at, &rows, &keys);
            if coverage.iter().all(|c| *c == Coverage::Empty) {
                continue;
            }
            let len = keys.len();
            let head = plan.shape.kv_head(at.head);
            let in_place = T::as_f32(k.rows_from(seq.batch, head, seq.kv_start + keys.start));
            let (data, stride) = match in_place {
                Some(data) => (data, k.strides().token),
                None => {
                    let buffer = std::mem::take(&mut self.keys);
                    let mut reader = RowReader { x: k, seq, head, is_query: false, buffer };
                    reader.read(keys.clone());
                    self.keys = reader.buffer;
                    (&self.keys[..], plan.shape.head_dim)
                }
            };
            let k = Rows { data, stride, len, dim: plan.shape.head_dim };
            let mut s = Scores { data: &mut self.scores, pitch, keys: len, width };
            (plan.kernels.qk)(&self.packed, &k, &mut s);
            for (column, (&row, &coverage)) in rows.iter().zip(&coverage).enumerate() {
                if coverage != Coverage::Full {
                    cut(plan, at, row, &keys, &mut s, column);
                }
            }
            self.running.reset(width);
            (plan.kernels.softmax)(&mut s, &mut self.running);
            let line = block * width..(block + 1) * width;
            self.max[line.clone()].copy_from_slice(&self.running.max);
            self.sum[line].copy_from_slice(&self.running.sum);
        }
        self.share(width, count);
    }

    fn pack<T: Element>(
        &mut self,
        plan: &Plan<'_>,
        q: &TensorView<'_, T>,
        at: HeadAt,
        seq: &Sequence,
        rows: &[usize],
    ) {
        let dim = plan.shape.head_dim;
        self.queries.resize(rows.len() * dim, 0.0);
        for (to, &row) in self.queries.chunks_exact_mut(dim).zip(rows) {
            T::widen(q.row(seq.batch, at.head, seq.q_start + row), to);
        }
        let scale = (plan.softmax_scale * std::f64::consts::LOG2_E) as f32;
        let lanes = plan.kernels.lanes;
        let panel = if rows.len() <= lanes { lanes } else { plan.kernels.panel };
        let queries = &self.queries;
        self.packed.pack(rows.len(), dim, panel, scale, |i| &queries[i * dim..]);
    }

    /// What each sampled row sees of a block.
    fn coverage(
        &self,
        plan: &Plan<'_>,
        at: HeadAt,
        rows: &[usize],
        keys: &Range<usize>,
    ) -> Vec<Coverage> {
        let of = |row: usize| match plan.element_mask {
            // Pairs are looked up one by one.
            Some(_) => Coverage::Partial,
            None => plan.tile_coverage(at, &(row..row + 1), keys),
        };
        rows.iter().map(|&row| of(row)).collect()
    }

    /// Adds up the rows' shares of each block, from what the blocks say one by one.
    fn share(&mut self, width: usize, count: usize) {
        let blocks = self.blocks.len();
        self.shares.clear();
        self.shares.resize(blocks * self.kv_blocks, 0.0);
        self.is_finite.clear();
        self.is_finite.resize(blocks, true);
        for column in 0..blocks * count {
            let lines = || (column..self.max.len()).step_by(width);
            let max = lines().fold(f32::NEG_INFINITY, |m, i| m.max(self.max[i]));
            if max == f32::NEG_INFINITY {
                continue;
            }
            let weight = |i: usize| {
                let own = self.max[i];
                if own == f32::NEG_INFINITY { 0.0 } else { self.sum[i] * (own - max).exp2() }
            };
            let total: f32 = lines().map(weight).sum();
            let block = column / count;
            if !total.is_finite() || max == f32::INFINITY {
                self.is_finite[block] = false;
                continue;
            }
            let line = &mut self.shares[block * self.kv_blocks..][..self.kv_blocks];
            line.iter_mut().zip(lines()).for_each(|(share, i)| *share += weight(i) / total);
        }
    }

    /// Mixes the samples of query block `q_block` into `masses` (block, pooled mass), half and
    /// half, both over the blocks that are scored; false where the samples are not numbers.
    pub(super) fn mix(&self, q_block: usize, masses: &mut [(usize, f32)]) -> bool {
        let i = q_block - self.blocks.start;
        let line = &self.shares[i * self.kv_blocks..][..self.kv_blocks];
        let total: f32 = masses.iter().map(|&(block, _)| line[block]).sum();
        if total > 0.0 {
            for (block, mass) in masses {
                *mass = 0.5 * (*mass + line[*block] / total);
            }
        }
        self.is_finite[i]
    }
}

/// Sets what `row` may not see to −∞ and adds the bias, in log2 units.
fn cut(
    plan: &Plan<'_>,
    at: HeadAt,
    row: usize,
    keys: &Range<usize>,
    s: &mut Scores<'_>,
    column: usize,
) {
    let sees = plan.row(at, row);
    for (key, j) in keys.clone().enumerate() {
        let s = &mut s.data[key * s.pitch + column];
        if !sees.sees(j) {
            *s = f32::NEG_INFINITY;
        } else if let Some(ElementMask::Additive(_)) = plan.element_mask {
            let bias = plan.bias(at, row, j) * std::f32::consts::LOG2_E;
            *s += bias.clamp(f32::MIN / 2.0, f32::MAX);
        }
    }
}

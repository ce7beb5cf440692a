//! What each key block alone contributes to a query block: attention in pieces.
//!
//! For block b and row i: mᵢ = max s, lᵢ = Σ 2^(s − mᵢ), nᵢ = Σ 2^(s − mᵢ)·v. Brought to the row's
//! common maximum, the attention over *any* set of blocks is Σ n / Σ l: one dense pass answers what
//! every selection would have computed.

use super::kernels::{Accumulator, PackedQ, Running, STRIP, Scores};
use super::tile::{Qkv, Stage, Tile, apply_mask};
use crate::geometry::{BLOCK_KV, BLOCK_Q, Coverage};
use crate::plan::{HeadAt, Plan};
use crate::tensor::Element;
use std::ops::Range;

/// The pieces of one query block; buffers are kept from one block to the next.
///
/// Memory: reachable blocks × 128 rows × (head_dim_v + 2) floats, 2 MiB per thousand keys at 64.
#[derive(Debug, Default)]
pub(crate) struct Partials {
    /// Query rows, in the sequence's own coordinates.
    pub(crate) rows: Range<usize>,
    /// Reachable blocks, ascending.
    pub(crate) blocks: Vec<usize>,
    /// `[block][BLOCK_Q]`: the row's largest score in the block, log2 units; −∞ where it sees none.
    pub(crate) max: Vec<f32>,
    /// `[block][BLOCK_Q]`: Σ p, relative to the row's maximum over all blocks.
    pub(crate) sum: Vec<f32>,
    /// `[block][BLOCK_Q][pitch]`: Σ p·v, likewise.
    pub(crate) numerators: Vec<f32>,
    pub(crate) pitch: usize,
    /// `[block]`, a bit per strip: whether any of its rows sees the block.
    pub(crate) strips: Vec<u8>,
    scores: Vec<f32>,
    staged: Vec<f32>,
    packed: PackedQ,
    running: Running,
    stage: Stage,
}

impl Partials {
    /// Computes the pieces of query block `q_block`.
    pub(crate) fn compute<T: Element>(
        &mut self,
        plan: &Plan<'_>,
        x: &Qkv<'_, T>,
        at: HeadAt,
        q_block: usize,
    ) {
        let seq = plan.sequences[at.sequence];
        let rows = seq.q_block(q_block);
        self.blocks.clear();
        self.blocks.extend(plan.reachable(at, q_block));
        let count = self.blocks.len();
        self.pitch = plan.shape.head_dim_v.next_multiple_of(plan.kernels.lanes);
        for (buffer, len, value) in [
            (&mut self.max, count * BLOCK_Q, f32::NEG_INFINITY),
            (&mut self.sum, count * BLOCK_Q, 0.0),
            (&mut self.numerators, count * BLOCK_Q * self.pitch, 0.0),
        ] {
            buffer.clear();
            buffer.resize(len, value);
        }
        self.strips.clear();
        self.strips.resize(count, 0);
        for (i, start) in rows.clone().step_by(STRIP).enumerate() {
            self.strip(plan, x, at, i, start..(start + STRIP).min(rows.end));
        }
        self.rows = rows;
        self.rebase();
    }

    fn strip<T: Element>(
        &mut self,
        plan: &Plan<'_>,
        x: &Qkv<'_, T>,
        at: HeadAt,
        index: usize,
        rows: Range<usize>,
    ) {
        let seq = plan.sequences[at.sequence];
        let dim = plan.shape.head_dim;
        self.staged.resize(rows.len() * dim, 0.0);
        for (to, i) in self.staged.chunks_exact_mut(dim).zip(rows.clone()) {
            T::widen(x.q.row(seq.batch, at.head, seq.q_start + i), to);
        }
        let kernels = plan.kernels;
        let panel = if rows.len() <= kernels.lanes { kernels.lanes } else { kernels.panel };
        let scale = (plan.softmax_scale * std::f64::consts::LOG2_E) as f32;
        let staged = &self.staged;
        self.packed.pack(rows.len(), dim, panel, scale, |i| &staged[i * dim..]);
        let width = self.packed.width;
        let pitch = Scores::pitch(width);
        self.scores.resize(BLOCK_KV * pitch, 0.0);
        for (b, &block) in self.blocks.iter().enumerate() {
            let keys = seq.kv_block(block);
            let coverage = plan.tile_coverage(at, &rows, &keys);
            if coverage == Coverage::Empty {
                continue;
            }
            self.strips[b] |= 1 << index;
            let (k, v) = self.stage.tiles(plan, x, at, &seq, &keys, self.pitch);
            let mut s = Scores { data: &mut self.scores, pitch, keys: keys.len(), width };
            (kernels.qk)(&self.packed, &k, &mut s);
            if coverage == Coverage::Partial {
                let tile = Tile { at, keys, coverage, k, k8: None, v, pitch: self.pitch };
                apply_mask(plan, &tile, &rows, &mut s);
            }
            // Every block by itself: α is 0 and the accumulator starts at 0.
            self.running.reset(width);
            (kernels.softmax)(&mut s, &mut self.running);
            let first = b * BLOCK_Q + index * STRIP;
            let lines = first..first + rows.len();
            self.max[lines.clone()].copy_from_slice(&self.running.max[..rows.len()]);
            self.sum[lines.clone()].copy_from_slice(&self.running.sum[..rows.len()]);
            let data = &mut self.numerators[lines.start * self.pitch..lines.end * self.pitch];
            let mut o = Accumulator { data, pitch: self.pitch };
            (kernels.pv)(&s, &self.running.alpha, &v, 0..rows.len(), &mut o);
        }
    }

    /// Brings every block's sums to the row's maximum over all blocks.
    fn rebase(&mut self) {
        for i in 0..self.rows.len() {
            let lines = (i..self.max.len()).step_by(BLOCK_Q);
            let max = lines.clone().fold(f32::NEG_INFINITY, |m, line| m.max(self.max[line]));
            for line in lines {
                let own = self.max[line];
                let factor = if own == f32::NEG_INFINITY { 0.0 } else { (own - max).exp2() };
                self.sum[line] *= factor;
                let numerator = &mut self.numerators[line * self.pitch..][..self.pitch];
                numerator.iter_mut().for_each(|n| *n *= factor);
            }
        }
    }
}

impl Partials {
    /// Whether the strip of row `row` (counted from the block's first) sees any key of block number
    /// `b`.
    pub(crate) fn strip_sees(&self, b: usize, row: usize) -> bool {
        self.strips[b] >> (row / STRIP) & 1 == 1
    }

    /// Row `row`'s Σ p over all blocks.
    pub(crate) fn total(&self, row: usize) -> f32 {
        (row..self.sum.len()).step_by(BLOCK_Q).map(|line| self.sum[line]).sum()
    }

    /// The dense output, `[row][dim]`.
    pub(crate) fn dense(&self, dim: usize) -> Vec<f32> {
        let mut o = vec![0.0; self.rows.len() * dim];
        for (i, o) in o.chunks_mut(dim).enumerate() {
            for line in (i..self.sum.len()).step_by(BLOCK_Q) {
                let numerator = &self.numerators[line * self.pitch..][..dim];
                o.iter_mut().zip(numerator).for_each(|(o, n)| *o += n);
            }
            let total = self.total(i);
            let inverse = if total == 0.0 { 0.0 } else { 1.0 / total };
            o.iter_mut().for_each(|o| *o *= inverse);
        }
        o
    }

    /// `[block]`: the true share of each block in the rows' attention.
    pub(crate) fn masses(&self) -> Vec<f32> {
        let totals: Vec<f32> = (0..self.rows.len()).map(|i| self.total(i)).collect();
        let seeing = totals.iter().filter(|&&t| t > 0.0).count().max(1) as f32;
        self.sum
            .chunks(BLOCK_Q)
            .map(|sums| {
                let shares = sums.iter().zip(&totals).filter(|(_, t)| **t > 0.0);
                shares.map(|(s, t)| s / t).sum::<f32>() / seeing
            })
            .collect()
    }
}

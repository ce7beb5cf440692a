//! One query block against its key blocks: the online softmax, strip by strip.

use super::kernels::{Accumulator, PackedQ, PackedQ8, QuantizedRows, Rows, Running, STRIP, Scores};
use crate::config::QkPrecision;
use crate::geometry::{BLOCK_KV, BLOCK_Q, Coverage, Sequence};
use crate::mask::BlockMask;
use crate::plan::{HeadAt, Plan, RowMask};
use crate::quant::Quantized;
use crate::tensor::{Element, TensorView};
use std::ops::Range;

/// Rows that stage 2 skips together.
pub(crate) const SKIP_ROWS: usize = 16;

/// The tensors of a call.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Qkv<'a, T> {
    pub(crate) q: TensorView<'a, T>,
    pub(crate) k: TensorView<'a, T>,
    pub(crate) v: TensorView<'a, T>,
}

/// What all jobs of a call read.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Call<'a, T> {
    pub(crate) x: &'a Qkv<'a, T>,
    pub(crate) quantized: Option<&'a Quantized>,
    pub(crate) mask: Option<&'a BlockMask>,
}

/// A query block.
#[derive(Debug, Clone, Copy)]
pub(crate) struct BlockJob {
    pub(crate) at: HeadAt,
    pub(crate) q_block: usize,
    /// How many key blocks it attends to.
    pub(crate) kv_blocks: usize,
}

/// Everything a thread needs, allocated once per call.
#[derive(Debug, Default)]
pub(crate) struct Worker {
    strips: [Strip; BLOCK_Q / STRIP],
    scores: Vec<f32>,
    shift: Vec<f32>,
    stage: Stage,
}

/// The state of one strip while it walks the key blocks.
#[derive(Debug, Default)]
struct Strip {
    rows: Range<usize>,
    q: PackedQ,
    q8: PackedQ8,
    running: Running,
    o: Vec<f32>,
}

/// f32 copies of the tiles that cannot be read in place.
#[derive(Debug, Default)]
pub(super) struct Stage {
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
}

impl Worker {
    /// Computes a block; row i of it goes to `out[i]`, its natural-log LSE to `lse[i]`.
    /// Returns the number of (16-row group, key block) pairs whose P·V was computed.
    pub(crate) fn attend<T: Element>(
        &mut self,
        plan: &Plan<'_>,
        call: &Call<'_, T>,
        job: &BlockJob,
        out: &mut [&mut [T]],
        mut lse: Option<&mut [f32]>,
    ) -> u64 {
        let Call { x, quantized, mask } = *call;
        let seq = plan.sequences[job.at.sequence];
        let rows = seq.q_block(job.q_block);
        let strips = rows.len().div_ceil(STRIP);
        let pitch = plan.shape.head_dim_v.next_multiple_of(plan.kernels.lanes);
        for (i, strip) in self.strips[..strips].iter_mut().enumerate() {
            let start = rows.start + i * STRIP;
            let range = start..(start + STRIP).min(rows.end);
            strip.start(plan, &x.q, job.at, &seq, range, pitch, &mut self.stage.q);
        }
        let mut groups = 0;
        for block in plan.kept(mask, job.at, job.q_block) {
            let keys = seq.kv_block(block);
            let (k, v) = self.stage.tiles(plan, x, job.at, &seq, &keys, pitch);
            let k8 = quantized
                .and_then(|z| z.block(job.at.sequence, plan.shape.kv_head(job.at.head), block));
            for strip in &mut self.strips[..strips] {
                // The block is reachable; a strip of it may not be, or may be whole.
                let coverage = plan.tile_coverage(job.at, &strip.rows, &keys);
                if coverage != Coverage::Empty {
                    let tile = Tile { at: job.at, keys: keys.clone(), coverage, k, k8, v, pitch };
                    groups += strip.step(plan, &tile, &mut self.scores, &mut self.shift);
                }
            }
        }
        for (i, strip) in self.strips[..strips].iter_mut().enumerate() {
            let at = i * STRIP..i * STRIP + strip.rows.len();
            let lse = lse.as_deref_mut().map(|lse| &mut lse[at.clone()]);
            strip.finish(&mut out[at], lse, pitch);
        }
        groups
    }
}

/// A key block as a strip meets it.
pub(super) struct Tile<'a> {
    pub(super) at: HeadAt,
    pub(super) keys: Range<usize>,
    pub(super) coverage: Coverage,
    pub(super) k: Rows<'a>,
    /// The same keys in int8, and their mean, where they were quantised.
    pub(super) k8: Option<(QuantizedRows<'a>, Rows<'a>)>,
    pub(super) v: Rows<'a>,
    pub(super) pitch: usize,
}

impl Strip {
    #[expect(clippy::too_many_arguments, reason = "one call site, each argument its own type")]
    fn start<T: Element>(
        &mut self,
        plan: &Plan<'_>,
        q: &TensorView<'_, T>,
        at: HeadAt,
        seq: &Sequence,
        rows: Range<usize>,
        pitch: usize,
        staged: &mut Vec<f32>,
    ) {
        let dim = plan.shape.head_dim;
        let row = |i: usize| q.row(seq.batch, at.head, seq.q_start + rows.start + i);
        staged.resize(rows.len() * dim, 0.0);
        for i in 0..rows.len() {
            T::widen(row(i), &mut staged[i * dim..][..dim]);
        }
        let kernels = plan.kernels;
        let panel = if rows.len() <= kernels.lanes { kernels.lanes } else { kernels.panel };
        // Scores come out in log2 units: softmax is 2^(s·log2 e) then.
        let scale = (plan.softmax_scale * std::f64::consts::LOG2_E) as f32;
        self.q.pack(rows.len(), dim, panel, scale, |i| &staged[i * dim..]);
        if plan.qk == QkPrecision::Int8 {
            self.q8.pack(rows.len(), dim, panel, scale, |i| &staged[i * dim..]);
        }
        self.running.reset(self.q.width);
        self.o.clear();
        self.o.resize(rows.len() * pitch, 0.0);
        self.rows = rows;
    }

    /// One key block; returns the 16-row groups whose P·V was computed.
    fn step(
        &mut self,
        plan: &Plan<'_>,
        tile: &Tile<'_>,
        scores: &mut Vec<f32>,
        shift: &mut Vec<f32>,
    ) -> u64 {
        let kernels = plan.kernels;
        let pitch = Scores::pitch(self.q.width);
        scores.resize(BLOCK_KV * Scores::pitch(STRIP.max(self.q.width)), 0.0);
        let mut s = Scores { data: scores, pitch, keys: tile.keys.len(), width: self.q.width };
        match &tile.k8 {
            // A cut tile stays in f32: a row must not feel the scale of keys it cannot see.
            Some((k8, mean)) if tile.coverage == Coverage::Full => {
                shift.resize(pitch, 0.0);
                let mut row = Scores { data: shift, pitch, keys: 1, width: self.q.width };
                (kernels.qk)(&self.q, mean, &mut row);
                (kernels.qk_i8)(&self.q8, k8, shift, &mut s);
            }
            _ => (kernels.qk)(&self.q, &tile.k, &mut s),
        }
        if tile.coverage == Coverage::Partial {
            apply_mask(plan, tile, &self.rows, &mut s);
        }
        (kernels.softmax)(&mut s, &mut self.running);

        let lambda = (plan.head(tile.at).lambda * std::f64::consts::LOG2_E) as f32;
        // A masked pair has P = 0, which must not meet a NaN or ∞ in V.
        let guarded = tile.coverage == Coverage::Partial && !is_finite(&tile.v);
        let mut groups = 0;
        let mut pending = 0..0;
        for start in (0..self.rows.len()).step_by(SKIP_ROWS) {
            let group = start..(start + SKIP_ROWS).min(self.rows.len());
            if lambda < f32::INFINITY && self.running.is_idle(&group, lambda) {
                self.pv(plan, tile, &s, std::mem::take(&mut pending), guarded);
            } else {
                groups += 1;
                pending = if pending.is_empty() { group } else { pending.start..group.end };
            }
        }
        self.pv(plan, tile, &s, pending, guarded);
        groups
    }

    fn pv(
        &mut self,
        plan: &Plan<'_>,
        tile: &Tile<'_>,
        p: &Scores<'_>,
        rows: Range<usize>,
        guarded: bool,
    ) {
        let mut o = Accumulator { data: &mut self.o, pitch: tile.pitch };
        let alpha = &self.running.alpha;
        if !guarded {
            (plan.kernels.pv)(p, alpha, &tile.v, rows, &mut o);
            return;
        }
        // The finite part through the same kernel, so that rows which do not see the others get
        // the same bits; then the rest, pair by visible pair.
        let (dim, keys) = (tile.v.dim, tile.v.len);
        let row = |key: usize| &tile.v.data[key * tile.v.stride..][..dim];
        let finite: Vec<f32> = (0..keys)
            .flat_map(|key| row(key).iter().map(|&v| if v.is_finite() { v } else { 0.0 }))
            .collect();
        let v = Rows { data: &finite, stride: dim, len: keys, dim };
        (plan.kernels.pv)(p, alpha, &v, rows.clone(), &mut o);
        for i in rows {
            let o = &mut o.data[i * o.pitch..][..dim];
            let sees = plan.row(tile.at, self.rows.start + i);
            for (key, j) in tile.keys.clone().enumerate() {
                if sees.sees(j) {
                    let p = p.data[key * p.pitch + i];
                    for (o, &v) in o.iter_mut().zip(row(key)).filter(|(_, v)| !v.is_finite()) {
                        *o += p * v;
                    }
                }
            }
        }
    }

    fn finish<T: Element>(
        &mut self,
        out: &mut [&mut [T]],
        mut lse: Option<&mut [f32]>,
        pitch: usize,
    ) {
        for (i, out) in out.iter_mut().enumerate() {
            let (max, sum) = (self.running.max[i], self.running.sum[i]);
            let o = &mut self.o[i * pitch..][..out.len()];
            // sum = 0: the row attends to nothing, and its o is 0.
            let inverse = if sum == 0.0 { 0.0 } else { 1.0 / sum };
            o.iter_mut().for_each(|o| *o *= inverse);
            T::narrow(o, out);
            if let Some(lse) = lse.as_deref_mut() {
                lse[i] = ((f64::from(max) + f64::from(sum).log2()) * std::f64::consts::LN_2) as f32;
            }
        }
    }
}

impl Running {
    /// Whether no row of `rows` has, in the last tile, a score within `lambda` of its maximum.
    fn is_idle(&self, rows: &Range<usize>, lambda: f32) -> bool {
        rows.clone().all(|i| {
            let max = self.tile_max[i];
            max == f32::NEG_INFINITY || max < self.max[i] - lambda
        })
    }
}

impl Stage {
    /// The key and value tile, in place where they are f32 (and V a whole number of vectors wide),
    /// as f32 copies otherwise.
    pub(super) fn tiles<'s, T: Element>(
        &'s mut self,
        plan: &Plan<'_>,
        x: &Qkv<'s, T>,
        at: HeadAt,
        seq: &Sequence,
        keys: &Range<usize>,
        pitch: usize,
    ) -> (Rows<'s>, Rows<'s>) {
        let head = plan.shape.kv_head(at.head);
        let tile = |x: &TensorView<'_, T>, buffer: &mut Vec<f32>, pitch: usize| {
            let dim = x.dims().dim;
            buffer.resize(BLOCK_KV * pitch, 0.0);
            for (i, token) in keys.clone().enumerate() {
                let to = &mut buffer[i * pitch..][..pitch];
                T::widen(x.row(seq.batch, head, seq.kv_start + token), &mut to[..dim]);
                to[dim..].fill(0.0);
            }
        };
        let first = seq.kv_start + keys.start;
        let len = keys.len();
        let in_place = |x: &TensorView<'s, T>, pitch: usize| {
            let data = T::as_f32(x.rows_from(seq.batch, head, first))?;
            let (stride, dim) = (x.strides().token, x.dims().dim);
            (dim == pitch).then_some(Rows { data, stride, len, dim })
        };
        let dim = plan.shape.head_dim;
        let k = in_place(&x.k, dim).unwrap_or_else(|| {
            tile(&x.k, &mut self.k, dim);
            Rows { data: &self.k, stride: dim, len, dim }
        });
        let v = in_place(&x.v, pitch).unwrap_or_else(|| {
            tile(&x.v, &mut self.v, pitch);
            Rows { data: &self.v, stride: pitch, len, dim: pitch }
        });
        (k, v)
    }
}

/// Sets what a row may not see to −∞ and adds the bias, in log2 units.
pub(super) fn apply_mask(
    plan: &Plan<'_>,
    tile: &Tile<'_>,
    rows: &Range<usize>,
    s: &mut Scores<'_>,
) {
    for (column, i) in rows.clone().enumerate() {
        let row = plan.row(tile.at, i);
        for (key, j) in tile.keys.clone().enumerate() {
            let s = &mut s.data[key * s.pitch + column];
            if !row.sees(j) {
                *s = f32::NEG_INFINITY;
            } else if let RowMask::Bias(bias) = row.mask {
                // f32::MIN, which many libraries mask with, is a number: it must stay one.
                *s += (bias[j] * std::f32::consts::LOG2_E).clamp(f32::MIN / 2.0, f32::MAX);
            }
        }
    }
}

fn is_finite(v: &Rows<'_>) -> bool {
    (0..v.len).all(|i| v.data[i * v.stride..][..v.dim].iter().all(|x| x.is_finite()))
}

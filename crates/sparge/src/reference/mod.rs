//! The oracle: the algorithm in f64, in plain loops, with nothing tiled and nothing clever.
//!
//! Every other implementation is tested against this one. It follows the same [`Plan`] and the
//! same verbs: [`predict`] gives the mask, [`attend`] computes attention under a mask, [`sparge`]
//! does both and stage 2. [`Rules`] switches between this crate's definition, the paper's and the
//! authors' code, so that the differences can be measured.

mod predict;
mod rules;

pub use predict::{Prediction, predict};
pub use rules::{Rules, Similarity, TopKOf};

use crate::geometry::{BLOCK_KV, BLOCK_Q};
use crate::mask::BlockMask;
use crate::plan::{HeadAt, Plan};
use crate::tensor::{Element, Strides, TensorView};

/// What the reference computes.
#[derive(Debug, Clone, PartialEq)]
pub struct Output {
    /// `[batch, num_qo_heads, qo_len, head_dim_v]`, contiguous in the plan's layout.
    pub o: Vec<f64>,
    /// `[batch, num_qo_heads, qo_len]`, natural log; −∞ for a row that attends to nothing.
    pub lse: Vec<f64>,
}

/// Exact attention over every pair the plan's masks allow.
pub fn dense<T: Element>(
    plan: &Plan<'_>,
    q: &TensorView<'_, T>,
    k: &TensorView<'_, T>,
    v: &TensorView<'_, T>,
) -> Output {
    attend(plan, q, k, v, None)
}

/// Attention over the pairs the plan allows inside the blocks of `mask` (all blocks for `None`).
pub fn attend<T: Element>(
    plan: &Plan<'_>,
    q: &TensorView<'_, T>,
    k: &TensorView<'_, T>,
    v: &TensorView<'_, T>,
    mask: Option<&BlockMask>,
) -> Output {
    rows(plan, q, k, v, |at, i, j| plan.sees(at, i, j) && in_mask(plan, mask, at, i, j), None)
}

/// The whole algorithm under `rules`: [`predict`], then attention over the predicted blocks with
/// stage 2.
pub fn sparge<T: Element>(
    plan: &Plan<'_>,
    q: &TensorView<'_, T>,
    k: &TensorView<'_, T>,
    v: &TensorView<'_, T>,
    rules: &Rules,
) -> Output {
    let mask = predict(plan, q, k, rules).mask;
    let sees = |at, i, j| {
        (plan.sees(at, i, j) || !rules.causal_in_kernel) && in_mask(plan, Some(&mask), at, i, j)
    };
    rows(plan, q, k, v, sees, Some(rules))
}

/// Whether a pair lies in a block that both the caller's mask and `mask` hold.
fn in_mask(plan: &Plan<'_>, mask: Option<&BlockMask>, at: HeadAt, i: usize, j: usize) -> bool {
    [plan.block_mask, mask].into_iter().flatten().all(|mask| {
        let [s, h, _, _] = mask.shape();
        mask.get(at.sequence % s, at.head % h, i / BLOCK_Q, j / BLOCK_KV)
    })
}

/// Softmax attention of every row over the pairs `sees` admits, with stage 2 under `rules`.
fn rows<T: Element>(
    plan: &Plan<'_>,
    q: &TensorView<'_, T>,
    k: &TensorView<'_, T>,
    v: &TensorView<'_, T>,
    sees: impl Fn(HeadAt, usize, usize) -> bool,
    stage_two: Option<&Rules>,
) -> Output {
    let shape = &plan.shape;
    let dims = shape.output_dims();
    let strides = Strides::contiguous(dims, plan.layout);
    let mut out = Output {
        o: vec![0.0; dims.batch * dims.heads * dims.len * dims.dim],
        lse: vec![f64::NEG_INFINITY; dims.batch * dims.heads * dims.len],
    };
    for (sequence, seq) in plan.sequences.iter().enumerate() {
        for head in 0..shape.num_qo_heads {
            let at = HeadAt { sequence, head };
            let kv_head = shape.kv_head(head);
            // scores[i][j], −∞ where the pair does not take part.
            let scores: Vec<Vec<f64>> = (0..seq.q_len)
                .map(|i| {
                    let q = q.row(seq.batch, head, seq.q_start + i);
                    (0..seq.kv_len)
                        .map(|j| {
                            if !sees(at, i, j) {
                                return f64::NEG_INFINITY;
                            }
                            let k = k.row(seq.batch, kv_head, seq.kv_start + j);
                            plan.softmax_scale * dot(q, k) + f64::from(plan.bias(at, i, j))
                        })
                        .collect()
                })
                .collect();
            let skipped = stage_two.map(|rules| skips(&scores, plan.head(at).lambda, rules));
            for (i, scores) in scores.iter().enumerate() {
                let skips = |j: usize| skipped.as_ref().is_some_and(|s| s[i][j / BLOCK_KV]);
                let in_denominator =
                    |j: usize| !skips(j) || stage_two.is_some_and(|r| r.skipped_in_denominator);
                let max = scores.iter().copied().fold(f64::NEG_INFINITY, nan_max);
                if max == f64::NEG_INFINITY {
                    continue;
                }
                let p: Vec<f64> = scores.iter().map(|s| (s - max).exp()).collect();
                let sum: f64 = (0..p.len()).filter(|&j| in_denominator(j)).map(|j| p[j]).sum();
                let token = seq.q_start + i;
                out.lse[(seq.batch * dims.heads + head) * dims.len + token] = max + sum.ln();
                let o = seq.batch * strides.batch + head * strides.head + token * strides.token;
                for j in (0..p.len()).filter(|&j| sees(at, i, j) && !skips(j)) {
                    let v = v.row(seq.batch, kv_head, seq.kv_start + j);
                    for (o, v) in out.o[o..o + dims.dim].iter_mut().zip(v) {
                        *o += p[j] / sum * f64::from(v.to_f32());
                    }
                }
            }
        }
    }
    out
}

/// Stage 2: `[row][kv_block]` whose P·V is skipped, blocks visited in ascending order.
fn skips(scores: &[Vec<f64>], lambda: f64, rules: &Rules) -> Vec<Vec<bool>> {
    let blocks = scores.first().map_or(0, |s| s.len().div_ceil(BLOCK_KV));
    let mut skipped = vec![vec![false; blocks]; scores.len()];
    let mut running = vec![f64::NEG_INFINITY; scores.len()];
    for block in 0..blocks {
        let maxima: Vec<f64> = scores
            .iter()
            .map(|s| {
                let end = ((block + 1) * BLOCK_KV).min(s.len());
                s[block * BLOCK_KV..end].iter().copied().fold(f64::NEG_INFINITY, nan_max)
            })
            .collect();
        for (running, &max) in running.iter_mut().zip(&maxima) {
            *running = nan_max(*running, max);
        }
        // Groups start anew in every query block, as in the tiled kernels.
        for group in (0..scores.len())
            .step_by(BLOCK_Q)
            .flat_map(|start| (start..(start + BLOCK_Q).min(scores.len())).step_by(rules.skip_rows))
        {
            let group_end = (group + rules.skip_rows).min((group / BLOCK_Q + 1) * BLOCK_Q);
            let group = group..group_end.min(scores.len());
            let lambda = lambda * rules.lambda_unit;
            let idle = |i: usize| maxima[i] == f64::NEG_INFINITY || maxima[i] < running[i] - lambda;
            if lambda.is_finite() && group.clone().all(idle) {
                group.for_each(|i| skipped[i][block] = true);
            }
        }
    }
    skipped
}

fn nan_max(a: f64, b: f64) -> f64 {
    if a.is_nan() || b.is_nan() { f64::NAN } else { a.max(b) }
}

fn dot<T: Element>(a: &[T], b: &[T]) -> f64 {
    a.iter().zip(b).map(|(a, b)| f64::from(a.to_f32()) * f64::from(b.to_f32())).sum()
}

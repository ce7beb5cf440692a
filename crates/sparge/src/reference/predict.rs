//! Stage 1 in f64: pool, judge, score, select.

use super::rules::{Rules, Similarity, TopKOf};
use crate::geometry::{BLOCK_KV, BLOCK_Q, Coverage, top_k_count};
use crate::mask::BlockMask;
use crate::plan::{Budget, HeadAt, Plan};
use crate::tensor::{Element, TensorView};
use std::ops::Range;

/// A predicted mask, and how clear each decision was.
#[derive(Debug, Clone, PartialEq)]
pub struct Prediction {
    /// The blocks to compute.
    pub mask: BlockMask,
    /// Per mask row (`[sequence, head, q_block]`): the smallest change of a predicted mass, a
    /// cumulative sum or a cosine that would change the row. Implementations in lower precision
    /// may differ on rows where it is of the size of their rounding, and only there.
    pub margin: Vec<f64>,
}

/// Predicts the mask of a plan under `rules`.
///
/// # Panics
/// Never for a plan made for these tensors.
pub fn predict<T: Element>(
    plan: &Plan<'_>,
    q: &TensorView<'_, T>,
    k: &TensorView<'_, T>,
    rules: &Rules,
) -> Prediction {
    let shape = plan.mask_shape();
    let mut mask = BlockMask::empty(shape).unwrap_or_else(|e| unreachable!("validated: {e}"));
    let mut margin = vec![f64::INFINITY; shape[0] * shape[1] * shape[2]];
    for (sequence, seq) in plan.sequences.iter().enumerate() {
        for head in 0..plan.shape.num_qo_heads {
            let at = HeadAt { sequence, head };
            let queries = gather(q, seq.batch, head, seq.q_start..seq.q_start + seq.q_len);
            let keys = gather(
                k,
                seq.batch,
                plan.shape.kv_head(head),
                seq.kv_start..seq.kv_start + seq.kv_len,
            );
            let judged = Judged::new(plan, rules, at, &queries, &keys);
            for q_block in 0..seq.q_blocks() {
                let row = predict_row(plan, rules, at, &queries, &keys, &judged, q_block);
                row.kept.iter().for_each(|&j| mask.set(sequence, head, q_block, j));
                margin[(sequence * shape[1] + head) * shape[2] + q_block] =
                    row.margin.min(judged.margin);
            }
        }
    }
    Prediction { mask, margin }
}

struct Row {
    kept: Vec<usize>,
    margin: f64,
}

fn predict_row(
    plan: &Plan<'_>,
    rules: &Rules,
    at: HeadAt,
    queries: &[Vec<f64>],
    keys: &[Vec<f64>],
    judged: &Judged,
    q_block: usize,
) -> Row {
    let seq = &plan.sequences[at.sequence];
    let rows = seq.q_block(q_block);
    let reachable: Vec<usize> =
        (0..seq.kv_blocks()).filter(|&j| plan.coverage(at, &rows, j) != Coverage::Empty).collect();
    let Budget::Some { cdf, top_k } = plan.head(at).budget else {
        return Row { kept: reachable, margin: f64::INFINITY };
    };
    if !judged.q_similar[q_block] {
        return Row { kept: reachable, margin: f64::INFINITY };
    }
    let forced = |j: usize| {
        if rules.keep_diagonal { plan.is_forced(at, &rows, j) } else { j < plan.keep_first }
    };
    let scored: Vec<usize> = reachable
        .iter()
        .copied()
        .filter(|&j| !(rules.keep_diagonal && plan.is_frontier(at, &rows, j)))
        .filter(|&j| judged.kv_similar[j])
        .collect();
    let masses = masses(plan, rules, at, queries, keys, &rows, &scored);
    let Some(masses) = masses else {
        return Row { kept: reachable, margin: f64::INFINITY };
    };

    let counted = |j: &usize| rules.forced_first && forced(*j);
    let mut order: Vec<usize> = (0..scored.len()).filter(|&i| !counted(&scored[i])).collect();
    order.sort_by(|&a, &b| masses[b].total_cmp(&masses[a]).then(a.cmp(&b)));
    let of = match rules.top_k_of {
        TopKOf::Reachable => reachable.len(),
        TopKOf::All => seq.kv_blocks(),
    };
    let already = reachable.iter().filter(|j| counted(j)).count();
    let at_least = if top_k > 0.0 { top_k_count(top_k, of) } else { 1 };
    let by_count = at_least.saturating_sub(already).min(order.len());
    let mut by_mass = 0;
    let mut sum: f64 = (0..scored.len()).filter(|&i| counted(&scored[i])).map(|i| masses[i]).sum();
    let mut margin = f64::INFINITY;
    if cdf > 0.0 {
        while by_mass < order.len() && sum < cdf {
            margin = margin.min(cdf - sum);
            sum += masses[order[by_mass]];
            by_mass += 1;
        }
        margin = margin.min((sum - cdf).abs());
        if !rules.include_crossing && by_mass > 1 {
            by_mass -= 1;
        }
    }
    let count = by_count.max(by_mass);
    if by_count > by_mass {
        margin = f64::INFINITY;
    }
    if 0 < count && count < order.len() {
        margin = margin.min(masses[order[count - 1]] - masses[order[count]]);
    }
    let chosen: Vec<usize> = order[..count].iter().map(|&i| scored[i]).collect();
    let kept = reachable
        .into_iter()
        .filter(|&j| forced(j) || !judged.kv_similar[j] || chosen.contains(&j))
        .collect();
    Row { kept, margin }
}

/// P̂: the predicted share of each scored block in the attention of `rows`; `None` where the scores
/// are not finite, so nothing can be told.
fn masses(
    plan: &Plan<'_>,
    rules: &Rules,
    at: HeadAt,
    queries: &[Vec<f64>],
    keys: &[Vec<f64>],
    rows: &Range<usize>,
    scored: &[usize],
) -> Option<Vec<f64>> {
    let seq = &plan.sequences[at.sequence];
    let pooling = plan.pooling;
    let scale = if rules.scale_in_prediction {
        plan.softmax_scale
    } else {
        1.0 / (plan.shape.head_dim as f64).sqrt()
    };
    let mut masses = vec![0.0; scored.len()];
    let mut weight = 0.0;
    for sub_rows in parts(rows, pooling.q_rows) {
        let q = mean(&queries[sub_rows.clone()]);
        // (index into scored, score) of every visible key sub-block.
        let mut scores = Vec::new();
        for (index, &block) in scored.iter().enumerate() {
            for sub_keys in parts(&seq.kv_block(block), pooling.kv_rows) {
                if plan.tile_coverage(at, &sub_rows, &sub_keys) == Coverage::Empty {
                    continue;
                }
                let k = mean(&keys[sub_keys.clone()]);
                let mut score = scale * dot(&q, &k);
                if pooling.second_order {
                    score += 0.5
                        * scale
                        * scale
                        * dot(
                            &q.iter().map(|x| x * x).collect::<Vec<_>>(),
                            &variance(&keys[sub_keys.clone()], &k),
                        );
                }
                if rules.tail_by_count {
                    score += (sub_keys.len() as f64 / pooling.kv_rows as f64).ln();
                }
                score += mean_bias(plan, at, &sub_rows, &sub_keys);
                scores.push((index, score));
            }
        }
        if scores.is_empty() {
            continue;
        }
        let max = scores.iter().fold(f64::NEG_INFINITY, |m, s| m.max(s.1));
        let sum: f64 = scores.iter().map(|s| (s.1 - max).exp()).sum();
        // f32 implementations run out of range there.
        if !sum.is_finite() || !max.is_finite() || max.abs() > f64::from(f32::MAX) / 2.0 {
            return None;
        }
        let share = sub_rows.len() as f64;
        weight += share;
        for (index, score) in scores {
            masses[index] += share * (score - max).exp() / sum;
        }
    }
    masses.iter_mut().for_each(|m| *m /= weight);
    let sampled = sampled(plan, at, queries, keys, rows, scored, scale)?;
    let total: f64 = sampled.iter().sum();
    if total > 0.0 {
        masses.iter_mut().zip(&sampled).for_each(|(m, s)| *m = 0.5 * (*m + s / total));
    }
    Some(masses)
}

/// The sum over the sampled rows of each scored block's share of their attention; `None` where the
/// scores are not finite.
fn sampled(
    plan: &Plan<'_>,
    at: HeadAt,
    queries: &[Vec<f64>],
    keys: &[Vec<f64>],
    rows: &Range<usize>,
    scored: &[usize],
    scale: f64,
) -> Option<Vec<f64>> {
    let mut shares = vec![0.0; scored.len()];
    for i in crate::predict::positions(rows.clone(), plan.pooling.sampled_rows) {
        let seen: Vec<(usize, f64)> = (0..keys.len())
            .filter(|&j| plan.sees(at, i, j))
            .map(|j| (j, scale * dot(&queries[i], &keys[j]) + f64::from(plan.bias(at, i, j))))
            .collect();
        let max = seen.iter().fold(f64::NEG_INFINITY, |m, s| m.max(s.1));
        let sum: f64 = seen.iter().map(|s| (s.1 - max).exp()).sum();
        if seen.is_empty() {
            continue;
        }
        // f32 implementations run out of range there.
        if !sum.is_finite() || !max.is_finite() || max.abs() > f64::from(f32::MAX) / 2.0 {
            return None;
        }
        for (j, score) in seen {
            if let Ok(index) = scored.binary_search(&(j / BLOCK_KV)) {
                shares[index] += (score - max).exp() / sum;
            }
        }
    }
    Some(shares)
}

/// ln of the mean of exp(additive mask) over a tile's visible pairs.
fn mean_bias(plan: &Plan<'_>, at: HeadAt, rows: &Range<usize>, keys: &Range<usize>) -> f64 {
    let seen: Vec<f64> = rows
        .clone()
        .flat_map(|i| keys.clone().map(move |j| (i, j)))
        .filter(|&(i, j)| plan.sees(at, i, j))
        .map(|(i, j)| f64::from(plan.bias(at, i, j)))
        .collect();
    let max = seen.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    max + (seen.iter().map(|b| (b - max).exp()).sum::<f64>() / seen.len() as f64).ln()
}

/// The judge's verdict on every block of a head.
struct Judged {
    q_similar: Vec<bool>,
    kv_similar: Vec<bool>,
    margin: f64,
}

impl Judged {
    fn new(
        plan: &Plan<'_>,
        rules: &Rules,
        at: HeadAt,
        queries: &[Vec<f64>],
        keys: &[Vec<f64>],
    ) -> Self {
        let theta = plan.heads[at.head].theta;
        let prefix = rules.prefix_mean && plan.visibility[at.sequence].has_diagonal();
        let mut margin = f64::INFINITY;
        let mut judge = |rows: &[Vec<f64>], block: usize, means: &[Vec<f64>]| {
            if means.iter().flatten().any(|x| !x.is_finite()) {
                return false;
            }
            if theta == 0.0 {
                return true;
            }
            if rules.ragged_is_dissimilar && rows.len() < block {
                return false;
            }
            let value = match rules.similarity {
                Similarity::MeanCosine => mean_cosine(rows),
                Similarity::MaxNormalised => max_normalised(rows),
            };
            margin = margin.min((value - theta).abs());
            value > theta
        };
        let q_similar = queries
            .chunks(BLOCK_Q)
            .map(|b| {
                let means: Vec<_> = b.chunks(plan.pooling.q_rows).map(mean).collect();
                judge(b, BLOCK_Q, &means)
            })
            .collect();
        let kv_similar = keys
            .chunks(BLOCK_KV)
            .enumerate()
            .map(|(j, b)| {
                let means: Vec<_> = b.chunks(plan.pooling.kv_rows).map(mean).collect();
                let seen = if prefix { j * BLOCK_KV + b.len() } else { keys.len() };
                let centre = mean(&keys[..seen]);
                let smoothed: Vec<Vec<f64>> =
                    b.iter().map(|k| k.iter().zip(&centre).map(|(k, c)| k - c).collect()).collect();
                judge(&smoothed, BLOCK_KV, &means)
            })
            .collect();
        Self { q_similar, kv_similar, margin }
    }
}

/// Mean over all pairs of cos(xᵢ, xⱼ), zero rows counting 0 with everything.
fn mean_cosine(rows: &[Vec<f64>]) -> f64 {
    let unit: Vec<Vec<f64>> = rows
        .iter()
        .map(|x| {
            let norm = dot(x, x).sqrt();
            x.iter().map(|x| if norm > 0.0 { x / norm } else { 0.0 }).collect()
        })
        .collect();
    let pairs = unit.iter().flat_map(|a| unit.iter().map(|b| dot(a, b))).sum::<f64>();
    pairs / (rows.len() * rows.len()) as f64
}

/// mean(X·Xᵀ) / max|X·Xᵀ|, 0 for a zero block.
fn max_normalised(rows: &[Vec<f64>]) -> f64 {
    let gram: Vec<f64> = rows.iter().flat_map(|a| rows.iter().map(|b| dot(a, b))).collect();
    let max = gram.iter().fold(0.0f64, |m, x| m.max(x.abs()));
    if max > 0.0 { gram.iter().sum::<f64>() / (gram.len() as f64 * max) } else { 0.0 }
}

fn gather<T: Element>(
    x: &TensorView<'_, T>,
    batch: usize,
    head: usize,
    tokens: Range<usize>,
) -> Vec<Vec<f64>> {
    tokens.map(|t| x.row(batch, head, t).iter().map(|x| f64::from(x.to_f32())).collect()).collect()
}

fn parts(rows: &Range<usize>, size: usize) -> impl Iterator<Item = Range<usize>> {
    let rows = rows.clone();
    rows.clone().step_by(size).map(move |start| start..(start + size).min(rows.end))
}

fn mean(rows: &[Vec<f64>]) -> Vec<f64> {
    let mut mean = vec![0.0; rows[0].len()];
    for row in rows {
        mean.iter_mut().zip(row).for_each(|(m, x)| *m += x);
    }
    mean.iter_mut().for_each(|m| *m /= rows.len() as f64);
    mean
}

fn variance(rows: &[Vec<f64>], mean: &[f64]) -> Vec<f64> {
    let mut variance = vec![0.0; mean.len()];
    for row in rows {
        for ((v, x), m) in variance.iter_mut().zip(row).zip(mean) {
            *v += (x - m) * (x - m);
        }
    }
    variance.iter_mut().for_each(|v| *v /= rows.len() as f64);
    variance
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

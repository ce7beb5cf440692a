//! FlexPrefill: per head a vertical-slash pattern, or pooled scores of the whole map.

use super::Blocks;
use super::estimate::{Head, descending, largest, means, softmax};
use super::minference::lines;
use crate::geometry::{BLOCK_Q, Coverage};
use crate::tensor::Element;

/// Its block, queries and keys.
const BLOCK: usize = 128;
const _: () = assert!(BLOCK == BLOCK_Q, "a query block is one of FlexPrefill's");

/// As in [`super::Policy::FlexPrefill`].
pub(super) struct Settings {
    pub(super) gamma: f64,
    pub(super) tau: f64,
    pub(super) min_budget: usize,
}

/// Chooses the head's blocks.
pub(super) fn choose<T: Element>(
    head: &Head<'_, '_, '_, T>,
    blocks: &mut Blocks<'_, '_, '_, '_>,
    settings: &Settings,
) {
    let (q_len, kv_len) = (head.q_len(), head.kv_len());
    if q_len == 0 || kv_len == 0 {
        return;
    }
    let least = settings.min_budget.div_ceil(BLOCK).max(1);
    if kv_len <= (2 * BLOCK).max(least.saturating_mul(BLOCK)) {
        return super::pattern::dense(blocks);
    }
    let dim = head.plan.shape.head_dim;
    let wide = kv_len.div_ceil(BLOCK);
    let last = q_len - BLOCK.min(q_len)..q_len;
    let attention = head.attention(last.clone());
    let n = attention.rows() as f32;
    let [mut vertical, mut slash] = lines(head, &attention);
    vertical.iter_mut().chain(&mut slash).for_each(|x| *x /= n);
    let budget = |x: &[f32]| (covering(x, settings.gamma) / BLOCK + 1).clamp(least.min(wide), wide);
    let (mut n_vertical, mut n_slash) = (budget(&vertical), budget(&slash));

    let mut columns = vec![0.0f32; wide];
    vertical.iter().enumerate().for_each(|(j, x)| columns[j / BLOCK] += x);
    // Diagonals are summed from the far end, as FlexPrefill lays them out; the last sum is the
    // main diagonal's.
    let mut diagonals = vec![0.0f32; wide];
    for (o, x) in slash.iter().enumerate() {
        diagonals[wide - 1 - (kv_len - 1 - o) / BLOCK] += x;
    }

    let keys = means(&head.keys(0..kv_len), dim, BLOCK);
    let query = means(&head.queries(last), dim, BLOCK);
    let pooled = softmax(head.plan, (&query[..dim], &keys), dim, 1.0, |_, _| true);
    let pooled: Vec<f32> = (0..wide).map(|j| pooled.get(0, j)).collect();
    let query_aware = root_divergence(&pooled, &columns) < settings.tau;
    if query_aware {
        (n_vertical, n_slash) = (least.min(wide), least.min(wide));
    }

    columns[0] = f32::INFINITY;
    diagonals[0] = f32::INFINITY;
    let columns = largest(&columns, n_vertical);
    let diagonals = largest(&diagonals, n_slash);
    for q_block in 0..blocks.q_blocks() {
        columns.iter().for_each(|&j| blocks.keep_wide(q_block, j));
        // Where queries and keys are not aligned to blocks, a row's diagonal lies in two.
        let rows = head.plan.sequences[head.at.sequence].q_block(q_block);
        let of = |i: usize| head.position(i).div_euclid(BLOCK as isize);
        for own in of(rows.start)..=of(rows.end - 1) {
            let on_diagonal = diagonals.iter().filter_map(|&s| own.checked_sub_unsigned(s));
            for j in on_diagonal.filter_map(|j| usize::try_from(j).ok()) {
                blocks.keep_wide(q_block, j);
            }
        }
    }
    if query_aware {
        pooled_map(head, blocks, &keys, settings.gamma);
    }
}

/// 1 + how many of the largest values add up to at most `share`.
fn covering(values: &[f32], share: f64) -> usize {
    let mut sorted = values.to_vec();
    sorted.sort_unstable_by(|&a, &b| descending(f64::from(a), f64::from(b)));
    let mut sum = 0.0;
    let within = |x: &&f32| {
        sum += f64::from(**x);
        sum <= share
    };
    1 + sorted.iter().take_while(within).count()
}

/// √JS of two distributions, natural log; a term with probability 0 is 0. What is not a number is 0: such
/// a head is query-aware, and its map leaves nothing out.
fn root_divergence(a: &[f32], b: &[f32]) -> f64 {
    let term = |p: f64, m: f64| if p > 0.0 { 0.5 * p * (p / m).ln() } else { 0.0 };
    let pairs = a.iter().zip(b).map(|(&a, &b)| (f64::from(a), f64::from(b)));
    pairs.map(|(a, b)| term(a, 0.5 * (a + b)) + term(b, 0.5 * (a + b))).sum::<f64>().max(0.0).sqrt()
}

/// The largest entries of the map of pooled probabilities, while their sum over all rows is at most
/// `gamma` of the number of rows.
fn pooled_map<T: Element>(
    head: &Head<'_, '_, '_, T>,
    blocks: &mut Blocks<'_, '_, '_, '_>,
    keys: &[f32],
    gamma: f64,
) {
    let dim = head.plan.shape.head_dim;
    let queries = means(&head.queries(0..head.q_len()), dim, BLOCK);
    let seq = head.plan.sequences[head.at.sequence];
    let mut entries = Vec::new();
    for (q_block, query) in queries.chunks_exact(dim).enumerate() {
        let rows = seq.q_block(q_block);
        let sees = |_: usize, j: usize| {
            let keys = j * BLOCK..((j + 1) * BLOCK).min(seq.kv_len);
            head.plan.tile_coverage(head.at, &rows, &keys) != Coverage::Empty
        };
        let row = softmax(head.plan, (query, keys), dim, 1.0, sees);
        let visible = (0..row.keys()).filter(|&j| sees(0, j));
        entries.extend(visible.map(|j| (row.get(0, j), q_block, j)));
    }
    entries.sort_unstable_by(|a, b| {
        descending(f64::from(a.0), f64::from(b.0)).then((a.1, a.2).cmp(&(b.1, b.2)))
    });
    let limit = gamma * (queries.len() / dim) as f64;
    let mut sum = 0.0;
    for (p, q_block, j) in entries {
        sum += f64::from(p);
        if sum > limit {
            break;
        }
        blocks.keep_wide(q_block, j);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn divergence() {
        assert_eq!(root_divergence(&[0.5, 0.5], &[0.5, 0.5]), 0.0);
        // Disjoint distributions: √ln 2.
        assert!((root_divergence(&[1.0, 0.0], &[0.0, 1.0]) - 2f64.ln().sqrt()).abs() < 1e-12);
    }

    #[test]
    fn covering_counts_one_past_the_share() {
        assert_eq!(covering(&[0.1, 0.5, 0.25, 0.15], 0.75), 3);
        assert_eq!(covering(&[0.1, 0.5, 0.25, 0.15], 0.8), 3);
        assert_eq!(covering(&[0.1, 0.5, 0.25, 0.15], 0.4), 1);
    }
}

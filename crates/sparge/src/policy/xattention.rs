//! XAttention: block scores from sums of antidiagonals.

use super::Blocks;
use super::estimate::{Head, descending, softmax};
use crate::geometry::{BLOCK_Q, Coverage};
use crate::tensor::Element;

/// Its block, queries and keys.
const BLOCK: usize = 128;
const _: () = assert!(BLOCK == BLOCK_Q, "a query block is one of XAttention's");

/// Chooses the head's blocks.
///
/// Z[i][j] = Σ_t Q[iS + S−1−t]·K[jS + t] is the product of `stride` queries laid end to end in
/// reverse with `stride` keys laid end to end, so it comes from the kernel that computes Q·Kᵀ.
pub(super) fn choose<T: Element>(
    head: &Head<'_, '_, '_, T>,
    blocks: &mut Blocks<'_, '_, '_, '_>,
    stride: usize,
    threshold: f64,
) {
    let (q_len, kv_len) = (head.q_len(), head.kv_len());
    if q_len == 0 || kv_len == 0 {
        return;
    }
    let plan = head.plan;
    let dim = plan.shape.head_dim;
    let width = stride * dim;
    // Rows beyond the end are zero: they add nothing to an antidiagonal.
    let padded = |mut x: Vec<f32>| {
        x.resize(x.len().next_multiple_of(width), 0.0);
        x
    };
    let keys = padded(head.keys(0..kv_len));
    let seq = plan.sequences[head.at.sequence];
    let causal = plan.visibility[head.at.sequence].is_causal();
    let wide = kv_len.div_ceil(BLOCK);
    for q_block in 0..blocks.q_blocks() {
        let rows = seq.q_block(q_block);
        let mut queries = padded(head.queries(rows.clone()));
        for group in queries.chunks_exact_mut(width) {
            for t in 0..stride / 2 {
                let (a, b) = group.split_at_mut((stride - 1 - t) * dim);
                a[t * dim..(t + 1) * dim].swap_with_slice(&mut b[..dim]);
            }
        }
        // Causal by groups of `stride`: a group of queries sees its own group of keys, also where
        // the last one is short.
        let last = |r: usize| match head.position(rows.start + r * stride) {
            _ if !causal => kv_len as isize,
            start => start.saturating_add_unsigned(stride - 1),
        };
        let seen = |r: usize, j: usize| (j * stride) as isize <= last(r);
        // Groups that no query sees need no scores.
        let visible = (last(queries.len() / width - 1) + 1).clamp(0, kv_len as isize) as usize;
        let visible = &keys[..visible.div_ceil(stride) * width];
        let z = softmax(plan, (&queries, visible), width, 1.0 / stride as f64, seen);
        let mut mass = vec![0.0f64; wide];
        for j in 0..z.keys() {
            mass[j * stride / BLOCK] += f64::from(z.column(j));
        }
        let block = |j: usize| j * BLOCK..((j + 1) * BLOCK).min(kv_len);
        let reachable =
            |j: &usize| plan.tile_coverage(head.at, &rows, &block(*j)) != Coverage::Empty;
        let (from, to) = (head.position(rows.start), head.position(rows.end - 1));
        let forced = |j: usize| {
            let keys = block(j);
            causal && (j == 0 || (from < keys.end as isize && keys.start as isize <= to))
        };
        let total: f64 = mass.iter().sum();
        let mut order: Vec<usize> = (0..wide).filter(reachable).collect();
        order.sort_by(|&a, &b| {
            forced(b).cmp(&forced(a)).then(descending(mass[a], mass[b])).then(a.cmp(&b))
        });
        let mut sum = 0.0;
        for j in order {
            if !forced(j) && sum >= threshold * total {
                break;
            }
            blocks.keep_wide(q_block, j);
            sum += mass[j];
        }
    }
}

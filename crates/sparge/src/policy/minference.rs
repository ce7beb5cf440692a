//! MInference's vertical-slash and block-sparse patterns.

use super::Blocks;
use super::estimate::{Attention, Head, largest, means, softmax};
use crate::geometry::{BLOCK_KV, BLOCK_Q, Coverage};
use crate::tensor::Element;

/// Queries that vertical-slash estimates from.
const LAST: usize = 64;
/// Columns at the start that are always kept, and the fewest kept.
const FIRST_COLUMNS: usize = 30;
/// Diagonals next to the main one that come first.
const NEAR: usize = 100;
/// Fewest diagonals.
const LEAST_SLASH: usize = 50;
/// MInference's block in its block-sparse pattern, queries and keys.
const BLOCK: usize = 64;

/// Vertical and slash scores of the last queries: the sum of each key's column, and of each
/// diagonal (query − key).
pub(super) fn lines<T: Element>(
    head: &Head<'_, '_, '_, T>,
    attention: &Attention,
) -> [Vec<f32>; 2] {
    let first = head.q_len() - attention.rows();
    let keys = attention.keys();
    let vertical = (0..keys).map(|j| attention.column(j)).collect();
    let mut slash = vec![0.0; keys];
    let positions: Vec<isize> =
        (0..attention.rows()).map(|row| head.position(first + row)).collect();
    for j in 0..keys {
        for (row, position) in positions.iter().enumerate() {
            if let Some(o) = usize::try_from(position - j as isize).ok().filter(|&o| o < keys) {
                slash[o] += attention.get(row, j);
            }
        }
    }
    [vertical, slash]
}

/// Columns and diagonals with the most attention of the last 64 queries.
pub(super) fn vertical_slash<T: Element>(
    head: &Head<'_, '_, '_, T>,
    blocks: &mut Blocks<'_, '_, '_, '_>,
    vertical: usize,
    slash: usize,
) {
    let (q_len, kv_len) = (head.q_len(), head.kv_len());
    if q_len == 0 || kv_len == 0 {
        return;
    }
    let attention = head.attention(q_len - LAST.min(q_len)..q_len);
    let [mut columns, mut diagonals] = lines(head, &attention);
    columns.iter_mut().take(FIRST_COLUMNS).for_each(|x| *x = f32::INFINITY);
    diagonals.iter_mut().take(NEAR).for_each(|x| *x = f32::INFINITY);
    let columns = largest(&columns, vertical.max(FIRST_COLUMNS));
    let diagonals = largest(&diagonals, slash.max(LEAST_SLASH));

    let mut has_column = vec![false; kv_len.div_ceil(BLOCK_KV)];
    columns.iter().for_each(|j| has_column[j / BLOCK_KV] = true);
    // kept[o] diagonals have an offset below o: a range holds one where the ends differ.
    let mut kept = vec![0u32; kv_len + 1];
    diagonals.iter().for_each(|o| kept[o + 1] = 1);
    (0..kv_len).for_each(|o| kept[o + 1] += kept[o]);
    let before = |o: isize| kept[usize::try_from(o).unwrap_or(0).min(kv_len)];

    let seq = head.plan.sequences[head.at.sequence];
    for q_block in 0..blocks.q_blocks() {
        let rows = seq.q_block(q_block);
        for (j, &has_column) in has_column.iter().enumerate() {
            let keys = seq.kv_block(j);
            // Offsets of the block's pairs, the causal ones.
            let low = head.position(rows.start) - (keys.end as isize - 1);
            let high = head.position(rows.end - 1) - keys.start as isize;
            if has_column || before(high + 1) > before(low) {
                blocks.keep(q_block, j);
            }
        }
    }
}

/// Per 64 queries, the `count` blocks of 64 keys with the largest products of means.
pub(super) fn block_sparse<T: Element>(
    head: &Head<'_, '_, '_, T>,
    blocks: &mut Blocks<'_, '_, '_, '_>,
    count: usize,
) {
    let (q_len, kv_len) = (head.q_len(), head.kv_len());
    if q_len == 0 || kv_len == 0 {
        return;
    }
    let dim = head.plan.shape.head_dim;
    let q = means(&head.queries(0..q_len), dim, BLOCK);
    let k = means(&head.keys(0..kv_len), dim, BLOCK);
    let halves = BLOCK_Q / BLOCK;
    for q_block in 0..blocks.q_blocks() {
        let first = q_block * halves;
        let rows = &q[first * dim..((first + halves) * dim).min(q.len())];
        let sees = |r: usize, j: usize| {
            let start = (first + r) * BLOCK;
            let rows = start..(start + BLOCK).min(q_len);
            let keys = j * BLOCK..((j + 1) * BLOCK).min(kv_len);
            head.plan.tile_coverage(head.at, &rows, &keys) != Coverage::Empty
        };
        // The softmax keeps the order and gives what is not visible a 0.
        let scores = softmax(head.plan, (rows, &k), dim, 1.0, sees);
        for r in 0..scores.rows() {
            let visible: Vec<usize> = (0..scores.keys()).filter(|&j| sees(r, j)).collect();
            let values: Vec<f32> = visible.iter().map(|&j| scores.get(r, j)).collect();
            largest(&values, count).into_iter().for_each(|i| blocks.keep(q_block, visible[i]));
        }
    }
}

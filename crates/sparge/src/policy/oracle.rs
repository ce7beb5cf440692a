//! The other control: blocks by the attention that they truly hold.

use super::Blocks;
use super::estimate::{Head, softmax};
use crate::predict::{RowScores, select};
use crate::tensor::Element;

/// Chooses the head's blocks: stage 1's own choice, on true masses instead of predicted ones.
pub(super) fn choose<T: Element>(
    head: &Head<'_, '_, '_, T>,
    blocks: &mut Blocks<'_, '_, '_, '_>,
    cdf: f64,
) {
    let (plan, at) = (head.plan, head.at);
    let seq = plan.sequences[at.sequence];
    for q_block in 0..blocks.q_blocks() {
        let rows = seq.q_block(q_block);
        let reachable: Vec<usize> = plan.reachable(at, q_block).collect();
        let Some(&last) = reachable.last() else { continue };
        let (q, k) = (head.queries(rows.clone()), head.keys(0..seq.kv_block(last).end));
        let see = |r: usize, j: usize| plan.sees(at, rows.start + r, j);
        let p = softmax(plan, (&q, &k), plan.shape.head_dim, 1.0, see);
        let mass = |block: usize| seq.kv_block(block).map(|j| p.column(j)).sum::<f32>();
        let masses: Vec<f32> = reachable.iter().map(|&block| mass(block)).collect();
        // Rows that see something have 1 each.
        let total: f32 = masses.iter().filter(|x| !x.is_nan()).sum();
        let mut row = RowScores::default();
        for (&block, mass) in reachable.iter().zip(masses) {
            if plan.is_forced(at, &rows, block) {
                row.forced.push(block);
            } else if mass.is_nan() {
                row.dissimilar.push(block);
            }
            if !mass.is_nan() {
                row.masses.push((block, mass / total));
            }
        }
        row.reachable = reachable;
        select(&mut row, cdf, 0.0, |block| blocks.keep(q_block, block));
    }
}

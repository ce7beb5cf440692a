//! Choices that do not look at the tensors.

use super::Blocks;
use crate::geometry::top_k_count;

/// Every reachable block.
pub(super) fn dense(blocks: &mut Blocks<'_, '_, '_, '_>) {
    for q_block in 0..blocks.q_blocks() {
        let reachable: Vec<usize> = blocks.plan.reachable(blocks.at, q_block).collect();
        reachable.into_iter().for_each(|j| blocks.keep(q_block, j));
    }
}

/// Blocks with a pair where |query − key| < `tokens` or key < `sinks`, among the visible ones.
pub(super) fn window(blocks: &mut Blocks<'_, '_, '_, '_>, tokens: usize, sinks: usize) {
    let seq = blocks.plan.sequences[blocks.at.sequence];
    let visibility = blocks.plan.visibility[blocks.at.sequence];
    for q_block in 0..blocks.q_blocks() {
        let rows = seq.q_block(q_block);
        let low = visibility.position(rows.start).saturating_sub_unsigned(tokens - 1);
        let high = visibility.position(rows.end - 1).saturating_add_unsigned(tokens - 1);
        for j in 0..seq.kv_blocks() {
            let keys = seq.kv_block(j);
            let in_window = low < keys.end as isize && high >= keys.start as isize;
            if keys.start < sinks || in_window {
                blocks.keep(q_block, j);
            }
        }
    }
}

/// The forced blocks and, up to the share `density` of the reachable ones, others at random.
pub(super) fn random(blocks: &mut Blocks<'_, '_, '_, '_>, density: f64, seed: u64) {
    let (plan, at) = (blocks.plan, blocks.at);
    for q_block in 0..blocks.q_blocks() {
        let rows = plan.sequences[at.sequence].q_block(q_block);
        let reachable: Vec<usize> = plan.reachable(at, q_block).collect();
        let (forced, mut others): (Vec<usize>, Vec<usize>) =
            reachable.iter().partition(|&&j| plan.is_forced(at, &rows, j));
        let count = top_k_count(density, reachable.len());
        // A key per block instead of a shuffle: one row's draw does not depend on another's.
        // By position, so that a prompt read in chunks draws what it draws in one piece.
        let row = plan.visibility[at.sequence].position(rows.start) as u64;
        let place = [at.sequence as u64, at.head as u64, row];
        let place = place.into_iter().fold(seed, |x, y| mix(x ^ mix(y)));
        others.sort_by_key(|&j| mix(place ^ mix(j as u64)));
        let more = count.saturating_sub(forced.len());
        forced
            .into_iter()
            .chain(others.into_iter().take(more))
            .for_each(|j| blocks.keep(q_block, j));
    }
}

/// A bijection of 64-bit numbers without visible structure (SplitMix64's finaliser).
pub(crate) fn mix(x: u64) -> u64 {
    let x = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

//! Stage 1: pool → judge → score → select. Which blocks of the attention map matter.

mod pool;
mod sample;
mod score;
mod select;

use crate::error::{Error, Result};
use crate::geometry::{AttentionShape, Coverage};
use crate::mask::BlockMask;
use crate::plan::{Budget, HeadAt, Plan};
use crate::tensor::{Element, TensorView};
pub(crate) use pool::PooledKeys;
use rayon::prelude::*;
pub(crate) use sample::positions;
pub(crate) use score::Scorer;
pub(crate) use select::{RowScores, select};

/// Predicts the blocks that `plan`'s heads attend to.
///
/// Heads with [`crate::Selection::All`] get every reachable block.
///
/// # Errors
/// [`crate::Error::Mismatch`] where q and k are not of the plan's shape.
pub fn predict<T: Element>(
    plan: &Plan<'_>,
    q: &TensorView<'_, T>,
    k: &TensorView<'_, T>,
) -> Result<BlockMask> {
    check_shape(plan, q, k)?;
    let mut mask = BlockMask::empty(plan.mask_shape())?;
    let [_, num_qo_heads, q_blocks, _] = plan.mask_shape();

    // The key side once per key/value head, shared by the query heads of its group.
    let kv_heads = plan.shape.num_kv_heads;
    let group = num_qo_heads / kv_heads;
    let pooled: Vec<Option<PooledKeys>> = (0..plan.sequences.len() * kv_heads)
        .into_par_iter()
        .map(|i| {
            let (sequence, first) = (i / kv_heads, i % kv_heads * group);
            let needed = (first..first + group)
                .any(|head| plan.head(HeadAt { sequence, head }).budget != Budget::All);
            needed.then(|| PooledKeys::new(plan, k, i / kv_heads, i % kv_heads))
        })
        .collect();

    // Neighbouring query blocks together: their samples share the work.
    let mut rows: Vec<&mut [u64]> = mask.rows_mut().collect();
    let groups: Vec<(HeadAt, usize, &mut [&mut [u64]])> = rows
        .chunks_mut(q_blocks.max(1))
        .enumerate()
        .flat_map(|(i, rows)| {
            let at = HeadAt { sequence: i / num_qo_heads, head: i % num_qo_heads };
            let groups = rows.chunks_mut(sample::GROUP).enumerate();
            groups.map(move |(g, rows)| (at, g * sample::GROUP, rows))
        })
        .collect();
    groups.into_par_iter().for_each_init(Scorer::default, |scorer, (at, first, rows)| {
        let last = (first + rows.len()).min(plan.sequences[at.sequence].q_blocks());
        if first >= last {
            return;
        }
        let keys = pooled[at.sequence * kv_heads + plan.shape.kv_head(at.head)].as_ref();
        let budget = plan.head(at).budget;
        if let (Budget::Some { .. }, Some(_)) = (budget, keys) {
            scorer.sample(plan, q, k, at, first..last);
        }
        for (q_block, words) in (first..last).zip(rows) {
            let mut keep = |j: usize| words[j / 64] |= 1 << (j % 64);
            match (budget, keys) {
                (Budget::Some { cdf, top_k }, Some(keys)) => {
                    let row = scorer.row(plan, q, at, q_block, keys);
                    select::select(row, cdf, top_k, keep);
                }
                _ => plan.reachable(at, q_block).for_each(&mut keep),
            }
        }
    });
    Ok(mask)
}

/// The map stage 1 selects from, for one head.
#[derive(Debug, Clone, PartialEq)]
pub struct BlockMasses {
    /// ⌈qo_len/128⌉.
    pub q_blocks: usize,
    /// ⌈kv_len/64⌉.
    pub kv_blocks: usize,
    /// `[q_blocks, kv_blocks]`: P̂, the predicted share of each key block in its row's attention;
    /// each row with any scored block sums to 1. NaN where a block is not scored: unreachable,
    /// judged not self-similar, or past what the whole row may see.
    pub values: Vec<f32>,
}

/// The predicted block masses of one query head of one sequence (the batch entry, unless packed),
/// whatever its selection.
///
/// # Errors
/// [`crate::Error::Mismatch`] where q and k are not of the plan's shape,
/// [`crate::Error::Dimension`] where there is no such sequence or head.
pub fn block_masses<T: Element>(
    plan: &Plan<'_>,
    q: &TensorView<'_, T>,
    k: &TensorView<'_, T>,
    sequence: usize,
    head: usize,
) -> Result<BlockMasses> {
    check_shape(plan, q, k)?;
    let expected = "one of the call's";
    for (name, got, count) in
        [("sequence", sequence, plan.sequences.len()), ("head", head, plan.heads.len())]
    {
        if got >= count {
            return Err(Error::Dimension { name, got, expected });
        }
    }
    let seq = plan.sequences[sequence];
    let keys = PooledKeys::new(plan, k, sequence, plan.shape.kv_head(head));
    let (q_blocks, kv_blocks) = (seq.q_blocks(), seq.kv_blocks());
    let mut values = vec![f32::NAN; q_blocks * kv_blocks];
    let at = HeadAt { sequence, head };
    values.par_chunks_mut(kv_blocks.max(1) * sample::GROUP).enumerate().for_each_init(
        Scorer::default,
        |scorer, (group, out)| {
            let first = group * sample::GROUP;
            let rows = out.chunks_mut(kv_blocks.max(1));
            scorer.sample(plan, q, k, at, first..first + rows.len());
            for (i, out) in rows.enumerate() {
                let row = scorer.row(plan, q, at, first + i, &keys);
                row.masses.iter().for_each(|&(j, mass)| out[j] = mass);
            }
        },
    );
    Ok(BlockMasses { q_blocks, kv_blocks, values })
}

/// Refuses q and k that are not of the plan's shape.
pub(crate) fn check_shape<T: Element>(
    plan: &Plan<'_>,
    q: &TensorView<'_, T>,
    k: &TensorView<'_, T>,
) -> Result<()> {
    let head_dim_v = plan.shape.head_dim_v;
    plan.check_shape(&AttentionShape { head_dim_v, ..AttentionShape::of(q, k, k)? })
}

impl Plan<'_> {
    /// The key blocks a query block may attend to.
    pub(crate) fn reachable(&self, at: HeadAt, q_block: usize) -> impl Iterator<Item = usize> {
        let seq = self.sequences[at.sequence];
        let rows = seq.q_block(q_block);
        (0..seq.kv_blocks()).filter(move |&j| self.coverage(at, &rows, j) != Coverage::Empty)
    }

    /// The reachable blocks that `mask` holds (all for `None`).
    pub(crate) fn kept<'m>(
        &'m self,
        mask: Option<&'m BlockMask>,
        at: HeadAt,
        q_block: usize,
    ) -> impl Iterator<Item = usize> + 'm {
        self.reachable(at, q_block)
            .filter(move |&j| mask.is_none_or(|mask| mask.get(at.sequence, at.head, q_block, j)))
    }

    /// Every reachable block.
    pub(crate) fn reachable_mask(&self) -> Result<BlockMask> {
        let mut mask = BlockMask::empty(self.mask_shape())?;
        for (sequence, seq) in self.sequences.iter().enumerate() {
            for head in 0..self.shape.num_qo_heads {
                for q_block in 0..seq.q_blocks() {
                    for j in self.reachable(HeadAt { sequence, head }, q_block) {
                        mask.set(sequence, head, q_block, j);
                    }
                }
            }
        }
        Ok(mask)
    }
}

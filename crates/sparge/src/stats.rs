//! What a call skipped, and how long its stages took.

use serde::{Deserialize, Serialize};
use std::time::Duration;

/// Counts of one query head. A group is 16 query rows of one block pair.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct HeadStats {
    /// Blocks that hold at least one pair the masks allow.
    pub reachable_blocks: u64,
    /// Blocks whose Q·Kᵀ was computed.
    pub qk_blocks: u64,
    /// (group, block) pairs that are reachable.
    pub reachable_groups: u64,
    /// (group, block) pairs whose P·V was computed.
    pub pv_groups: u64,
}

impl HeadStats {
    /// Share of the reachable blocks whose Q·Kᵀ was skipped (stage 1), 0..=1.
    #[must_use]
    pub fn qk_sparsity(&self) -> f64 {
        skipped(self.qk_blocks, self.reachable_blocks)
    }

    /// Share of the reachable groups whose P·V was skipped (stages 1 and 2), 0..=1.
    #[must_use]
    pub fn pv_sparsity(&self) -> f64 {
        skipped(self.pv_groups, self.reachable_groups)
    }
}

impl std::ops::Add for HeadStats {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self {
            reachable_blocks: self.reachable_blocks + other.reachable_blocks,
            qk_blocks: self.qk_blocks + other.qk_blocks,
            reachable_groups: self.reachable_groups + other.reachable_groups,
            pv_groups: self.pv_groups + other.pv_groups,
        }
    }
}

fn skipped(done: u64, of: u64) -> f64 {
    if of == 0 { 0.0 } else { 1.0 - done as f64 / of as f64 }
}

/// Counts of a call, as fractions of what was *reachable*: a causal call that computes every
/// visible block has sparsity 0.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Stats {
    /// `[sequence][head]`, head fastest.
    heads: Vec<HeadStats>,
    num_qo_heads: usize,
    /// Time of stage 1; zero where nothing was predicted.
    pub predict: Duration,
    /// Time of the attention itself.
    pub attend: Duration,
}

impl Stats {
    pub(crate) fn new([sequences, num_qo_heads, _, _]: [usize; 4]) -> Self {
        Self {
            heads: vec![HeadStats::default(); sequences * num_qo_heads],
            num_qo_heads,
            ..Self::default()
        }
    }

    pub(crate) fn head_mut(&mut self, sequence: usize, head: usize) -> &mut HeadStats {
        &mut self.heads[sequence * self.num_qo_heads + head]
    }

    /// The counts of each head, `[sequence][head]`, head fastest.
    #[must_use]
    pub fn heads(&self) -> &[HeadStats] {
        &self.heads
    }

    /// The counts of all heads together.
    #[must_use]
    pub fn total(&self) -> HeadStats {
        self.heads.iter().fold(HeadStats::default(), |a, &b| a + b)
    }

    /// [`HeadStats::qk_sparsity`] of all heads.
    #[must_use]
    pub fn qk_sparsity(&self) -> f64 {
        self.total().qk_sparsity()
    }

    /// [`HeadStats::pv_sparsity`] of all heads.
    #[must_use]
    pub fn pv_sparsity(&self) -> f64 {
        self.total().pv_sparsity()
    }
}

//! The methods the paper compares with, as producers of block masks for the same kernel.
//!
//! Each [`Policy`] decides which 128×64 blocks are computed; the attention over them is the
//! operator's. What a method decides at another granularity is widened to those blocks, never
//! narrowed, as its own note says; so at equal settings a method computes at least what its authors'
//! kernel would, and methods are to be compared at equal measured sparsity or equal error.
//!
//! ```
//! use sparge::policy::{self, Policy};
//! use sparge::{Alignment, AttentionOptions, SpargeConfig, TensorView, attention};
//! let x: Vec<f32> = (0..2 * 2048 * 16).map(|i| (i as f32 * 0.37).sin()).collect();
//! let q = TensorView::hnd(&x, [1, 2, 2048, 16])?;
//! let options = AttentionOptions { causal: Some(Alignment::TopLeft), ..Default::default() };
//! let policy: Policy = "xattention:threshold=0.9,stride=16".parse()?;
//! let mask = policy::mask(&q, &q, &options, &policy)?;
//! let options = AttentionOptions { block_mask: Some(&mask), ..options };
//! let out = attention(&q, &q, &q, &options, &SpargeConfig::dense())?;
//! # let _ = out;
//! # Ok::<(), sparge::Error>(())
//! ```

mod estimate;
mod flexprefill;
mod minference;
mod name;
mod oracle;
mod pattern;
mod xattention;

use crate::attention::{Side, attend};
use crate::config::{AttentionOptions, SpargeConfig};
use crate::error::{Error, Result};
use crate::geometry::{AttentionShape, Coverage, Visibility};
use crate::mask::BlockMask;
use crate::plan::{HeadAt, Plan};
use crate::predict::check_shape;
use crate::tensor::{Element, TensorView};
use estimate::Head;
pub(crate) use pattern::mix;
use rayon::prelude::*;
use std::time::Instant;

/// A way to choose the blocks that are computed.
///
/// As text (`Display`, `FromStr`): the name, then settings after a colon; what is left out has the
/// default. `window:1024`, `random:0.5,seed=7`, `minference:v=1000,s=6096`, `a-shape:init=1024,local=4096`,
/// `block-sparse:100`, `flexprefill:0.95,tau=0.1,min=1024`, `xattention:0.9,stride=8`, `oracle:0.95`.
#[derive(Debug, Clone, Copy, PartialEq)]
#[non_exhaustive]
pub enum Policy {
    /// Every block that holds a visible pair.
    Dense,
    /// Sliding window and attention sinks (StreamingLLM): a pair is attended where
    /// query − key < `tokens` (in magnitude, where not causal) or key < `sinks`. A block is kept
    /// that holds such a pair.
    Window {
        /// Width of the window, the query's own token included. Default 1024.
        tokens: usize,
        /// Tokens at the start that every query attends to. Default 4 (StreamingLLM's).
        sinks: usize,
    },
    /// The control: as many blocks as [`crate::Selection::TopK`] keeps at this share and the same
    /// forced ones (the first, the diagonal), the others drawn at random.
    Random {
        /// Share of each row's reachable blocks, in (0, 1]. Default 0.5.
        density: f64,
        /// Default 0.
        seed: u64,
    },
    /// MInference's pattern for most heads: columns and diagonals that hold the most attention of
    /// the last 64 queries. Causal only.
    ///
    /// MInference gathers single columns; on this kernel a block is kept that holds a kept column
    /// or is crossed by a kept diagonal, so scattered columns cost whole blocks of 64 keys.
    VerticalSlash {
        /// Columns, at least 30 (the first 30 are always kept). Default 1000, MInference's for a
        /// model it has no table for.
        vertical: usize,
        /// Diagonals, at least 50 (the 100 nearest are kept first). Default 6096, likewise.
        slash: usize,
    },
    /// MInference's A-shape: the first tokens and a local window. Default 1024 and 4096, the one
    /// setting in its paper's search space.
    AShape {
        /// Tokens at the start.
        first: usize,
        /// Width of the window.
        local: usize,
    },
    /// MInference's block-sparse pattern: for each block of 64 queries the blocks of 64 keys with
    /// the largest products of mean query and mean key. A row of this kernel has 128 queries and
    /// keeps what either half chose.
    BlockSparse {
        /// Blocks of 64 keys per 64 queries, at least 1. Default 100, MInference's.
        blocks: usize,
    },
    /// FlexPrefill: vertical and slash blocks whose number follows from the attention of the last
    /// 128 queries, or, for heads it finds query-aware, pooled scores of the whole map. Causal only.
    ///
    /// Its blocks of 128 keys are two of this kernel's.
    FlexPrefill {
        /// Share of the attention to cover, in (0, 1]. Default 0.95 (its setting for Llama-3.1).
        gamma: f64,
        /// Heads whose divergence (√JS, 0 to 0.83) is below are query-aware, 0 for none. Default 0.1.
        tau: f64,
        /// Fewest key tokens per row; sequences up to this length are dense. Default 1024.
        min_budget: usize,
    },
    /// XAttention: blocks by the sums of their antidiagonals, until a share of the row is covered.
    ///
    /// Its blocks of 128 keys are two of this kernel's.
    XAttention {
        /// Distance of the antidiagonals: 2, 4, 8, 16, 32 or 64. Default 8.
        stride: usize,
        /// Share of each row's estimated attention, in (0, 1]. Default 0.9.
        threshold: f64,
    },
    /// The other control: what stage 1 would choose if it knew the true masses of the blocks. As
    /// good as a prediction can be, at more than the price of dense attention.
    Oracle {
        /// As [`crate::Selection::TopCdf`], in (0, 1]. Default 0.95.
        cdf: f64,
    },
}

impl Policy {
    /// Whether the choice for a query depends on later ones: the whole prompt then has to be read
    /// in one call, as these methods' authors do.
    #[must_use]
    pub fn looks_ahead(&self) -> bool {
        matches!(self, Self::VerticalSlash { .. } | Self::FlexPrefill { .. })
    }

    /// Refuses settings out of range.
    ///
    /// # Errors
    /// [`Error::Setting`] or [`Error::Dimension`] with the setting's name.
    pub fn validate(&self) -> Result<()> {
        match *self {
            Self::Dense | Self::VerticalSlash { .. } => Ok(()),
            Self::Window { tokens, .. } => at_least_one("window tokens", tokens),
            Self::AShape { local, .. } => at_least_one("a-shape local", local),
            Self::BlockSparse { blocks } => at_least_one("block-sparse blocks", blocks),
            Self::Random { density, .. } => share("random density", density),
            Self::FlexPrefill { gamma, tau, .. } => {
                share("flexprefill gamma", gamma)?;
                let ok = (0.0..=1.0).contains(&tau);
                setting("flexprefill tau", tau, ok, "0 to 1")
            }
            Self::Oracle { cdf } => share("oracle cdf", cdf),
            Self::XAttention { stride, threshold } => {
                share("xattention threshold", threshold)?;
                let ok = stride.is_power_of_two() && (2..=64).contains(&stride);
                setting("xattention stride", stride as f64, ok, "2, 4, 8, 16, 32 or 64")
            }
        }
    }

    /// Refuses settings out of range, and calls the method has no meaning for.
    ///
    /// # Errors
    /// As [`Policy::validate`]; [`Error::Conflict`] for a causal method without causal attention (no
    /// query sees keys after its position), or an element mask that its estimate would not see.
    pub fn check(&self, is_causal: bool, has_element_mask: bool) -> Result<()> {
        self.validate()?;
        let causal_only = self.looks_ahead();
        if causal_only && !is_causal {
            return Err(Error::Conflict {
                a: "a policy made from the last queries' diagonals (minference, flexprefill)",
                b: "attention that is not causal",
                remedy: "set causal, or take xattention, block-sparse, window or random",
            });
        }
        let scores = |policy: &Self| {
            matches!(
                policy,
                Self::BlockSparse { .. } | Self::XAttention { .. } | Self::Oracle { .. }
            )
        };
        let estimates = causal_only || scores(self);
        if estimates && has_element_mask {
            return Err(Error::Conflict {
                a: "a policy that estimates scores (minference, block-sparse, flexprefill, xattention, oracle)",
                b: "an element mask",
                remedy: "its estimate does not see the mask; drop the mask, or take dense, window, \
                         a-shape or random",
            });
        }
        Ok(())
    }
}

fn at_least_one(name: &'static str, got: usize) -> Result<()> {
    if got > 0 { Ok(()) } else { Err(Error::Dimension { name, got, expected: "at least 1" }) }
}

fn share(name: &'static str, got: f64) -> Result<()> {
    setting(name, got, got > 0.0 && got <= 1.0, "above 0 and at most 1")
}

fn setting(name: &'static str, got: f64, ok: bool, expected: &'static str) -> Result<()> {
    if ok { Ok(()) } else { Err(Error::Setting { name, got, expected }) }
}

/// The blocks `policy` computes for q `[batch, num_qo_heads, qo_len, head_dim]` and
/// k `[batch, num_kv_heads, kv_len, head_dim]`: a mask `[sequences, num_qo_heads, ⌈qo_len/128⌉,
/// ⌈kv_len/64⌉]` for [`AttentionOptions::block_mask`]. It holds only blocks that `options` (its own
/// block mask included) can reach. To have the skipped share counted, use [`forward`].
///
/// # Errors
/// Any [`Error`] of the call; a setting out of range; [`Error::Conflict`] for a causal method
/// without causal attention, or an element mask that the method's estimate would not see.
pub fn mask<T: Element>(
    q: &TensorView<'_, T>,
    k: &TensorView<'_, T>,
    options: &AttentionOptions<'_>,
    policy: &Policy,
) -> Result<BlockMask> {
    let plan = Plan::new(AttentionShape::of(q, k, k)?, options, &SpargeConfig::dense())?;
    predict(&plan, q, k, policy)
}

/// The blocks [`forward`] computes, as [`crate::predict`]: the plan's selection is not used, but
/// [`Policy::Random`] and [`Policy::Oracle`] keep what its `keep_first` and `keep_local` keep.
///
/// # Errors
/// As [`mask`], and [`Error::Mismatch`] where q and k are not of the plan's shape.
pub fn predict<T: Element>(
    plan: &Plan<'_>,
    q: &TensorView<'_, T>,
    k: &TensorView<'_, T>,
    policy: &Policy,
) -> Result<BlockMask> {
    check_shape(plan, q, k)?;
    masked(plan, q, k, policy)
}

/// Attention over `policy`'s blocks, as [`crate::forward`]: the plan gives shape, masks and stage 2;
/// its selection is not used. The time of the choice is in `stats.predict`.
///
/// # Errors
/// As [`mask`] and [`crate::forward`].
pub fn forward<T: Element>(
    plan: &Plan<'_>,
    q: &TensorView<'_, T>,
    k: &TensorView<'_, T>,
    v: &TensorView<'_, T>,
    policy: &Policy,
    out: &mut [T],
) -> Result<Side> {
    plan.check_shape(&AttentionShape::of(q, k, v)?)?;
    let start = Instant::now();
    let mask = masked(plan, q, k, policy)?;
    let predicted = start.elapsed();
    let mut side = attend(plan, q, k, v, Some(&mask), out)?;
    side.stats.predict = predicted;
    side.block_mask = plan.return_mask.then_some(mask);
    Ok(side)
}

fn masked<T: Element>(
    plan: &Plan<'_>,
    q: &TensorView<'_, T>,
    k: &TensorView<'_, T>,
    policy: &Policy,
) -> Result<BlockMask> {
    let is_causal = plan.visibility.iter().all(Visibility::is_causal);
    policy.check(is_causal, plan.element_mask.is_some())?;
    let mut mask = BlockMask::empty(plan.mask_shape())?;
    let [_, num_qo_heads, q_blocks, _] = plan.mask_shape();
    let mut rows: Vec<&mut [u64]> = mask.rows_mut().collect();
    rows.par_chunks_mut(q_blocks).enumerate().for_each(|(i, rows)| {
        let at = HeadAt { sequence: i / num_qo_heads, head: i % num_qo_heads };
        let head = Head { plan, at, q, k };
        let mut blocks = Blocks { plan, at, rows };
        match *policy {
            Policy::Dense => pattern::dense(&mut blocks),
            Policy::Window { tokens, sinks } => pattern::window(&mut blocks, tokens, sinks),
            Policy::AShape { first, local } => pattern::window(&mut blocks, local, first),
            Policy::Random { density, seed } => pattern::random(&mut blocks, density, seed),
            Policy::VerticalSlash { vertical, slash } => {
                minference::vertical_slash(&head, &mut blocks, vertical, slash);
            }
            Policy::BlockSparse { blocks: count } => {
                minference::block_sparse(&head, &mut blocks, count);
            }
            Policy::FlexPrefill { gamma, tau, min_budget } => {
                let settings = flexprefill::Settings { gamma, tau, min_budget };
                flexprefill::choose(&head, &mut blocks, &settings);
            }
            Policy::XAttention { stride, threshold } => {
                xattention::choose(&head, &mut blocks, stride, threshold);
            }
            Policy::Oracle { cdf } => oracle::choose(&head, &mut blocks, cdf),
        }
    });
    Ok(mask)
}

/// One head's part of the mask.
struct Blocks<'p, 'a, 'w, 'm> {
    plan: &'p Plan<'a>,
    at: HeadAt,
    rows: &'w mut [&'m mut [u64]],
}

impl Blocks<'_, '_, '_, '_> {
    /// Query blocks of this head's sequence.
    fn q_blocks(&self) -> usize {
        self.plan.sequences[self.at.sequence].q_blocks()
    }

    /// Keeps a block, if any of its pairs is visible.
    fn keep(&mut self, q_block: usize, kv_block: usize) {
        let seq = self.plan.sequences[self.at.sequence];
        if kv_block < seq.kv_blocks()
            && self.plan.coverage(self.at, &seq.q_block(q_block), kv_block) != Coverage::Empty
        {
            self.rows[q_block][kv_block / 64] |= 1 << (kv_block % 64);
        }
    }

    /// Keeps both halves of a block of 128 keys.
    fn keep_wide(&mut self, q_block: usize, wide: usize) {
        self.keep(q_block, 2 * wide);
        self.keep(q_block, 2 * wide + 1);
    }
}

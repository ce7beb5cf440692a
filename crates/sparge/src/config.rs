//! The knobs: what to compute ([`AttentionOptions`]) and what may be skipped ([`SpargeConfig`]).

use crate::cpu::Isa;
use crate::mask::BlockMask;
use crate::tensor::TensorView;
use serde::{Deserialize, Serialize};

/// One value for every query head, or one each.
#[derive(Debug, Clone, PartialEq)]
pub enum PerHead<T> {
    /// The same for all heads.
    All(T),
    /// One entry per query head.
    Heads(Vec<T>),
}

impl<T> PerHead<T> {
    /// The value of `head`.
    ///
    /// # Panics
    /// Where there are entries per head and `head` is not among them; [`crate::Plan::new`]
    /// checks the count.
    pub fn get(&self, head: usize) -> &T {
        match self {
            Self::All(x) => x,
            Self::Heads(xs) => &xs[head],
        }
    }

    /// All values present.
    pub fn values(&self) -> &[T] {
        match self {
            Self::All(x) => std::slice::from_ref(x),
            Self::Heads(xs) => xs,
        }
    }
}

impl<T> From<T> for PerHead<T> {
    fn from(x: T) -> Self {
        Self::All(x)
    }
}

/// Which key blocks each query block attends to, chosen from the predicted block masses.
///
/// A key block's predicted mass P̂ is its share of the query block's attention, estimated from
/// pooled queries and keys. The diagonal (when causal) with `keep_local` blocks before it and the
/// first `keep_first` blocks are always
/// kept and count towards the budget; the blocks that the judge θ found not self-similar are kept on
/// top of it. A row with any reachable block keeps at least one.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Selection {
    /// The measured default: [`Selection::AUTO_CDF`] where rows reach at least
    /// [`Selection::AUTO_MIN_LEN`] keys, all blocks where they do not (there nearly all would be
    /// kept, and prediction costs more than it saves).
    Auto,
    /// Every reachable block: exact attention.
    All,
    /// Blocks in descending predicted mass until their sum reaches τ, the block that reaches it
    /// included. τ in (0, 1]; the paper's τ, `cdfthreshd` in the authors' code.
    TopCdf(f64),
    /// ⌈f·reachable⌉ blocks, those of largest predicted mass. f in (0, 1]; `topk` in the authors'
    /// code, which takes the fraction of *all* blocks, also those a causal row cannot see.
    TopK(f64),
    /// The union of [`Selection::TopCdf`] and [`Selection::TopK`]: an adaptive budget with a
    /// floor, robust for flat and for peaked rows.
    Union {
        /// As in [`Selection::TopCdf`].
        cdf: f64,
        /// As in [`Selection::TopK`].
        top_k: f64,
    },
}

impl Selection {
    /// Aims at a relative L1 error Σ|O − O′|/Σ|O| of `error` (0 to 1) without calibration: each row
    /// keeps blocks until the attention it is estimated to lose is `error`.
    ///
    /// Skipped attention of share m moves an output by about m times its own size, since what is
    /// skipped and what is kept are of the same size and unlike each other. On SmolLM2 the error of a
    /// query block is 0.9 to 1.1 times the estimated loss in the median, by layer 0.5 to 1.5 times,
    /// on Qwen2.5-Coder-0.5B 0.9 to 1.1 and 0.8 to 1.3 (`docs/results/predictor.md`): a target, not a bound. Calibrate where a bound must hold.
    ///
    /// ```
    /// use sparge::Selection;
    /// assert_eq!(Selection::target_l1(0.25), Selection::TopCdf(0.75));
    /// ```
    #[must_use]
    pub fn target_l1(error: f64) -> Self {
        Self::TopCdf(1.0 - error)
    }

    /// τ of [`Selection::Auto`].
    pub const AUTO_CDF: f64 = 0.98;
    /// Keys that the rows of a sequence must reach (a window narrows it) for [`Selection::Auto`] to
    /// predict; below, it is exact (stage 2 too is off there).
    pub const AUTO_MIN_LEN: usize = 1024;
    /// Queries likewise.
    pub const AUTO_MIN_QUERIES: usize = 16;
}

/// How queries and keys are pooled before their scores are computed.
///
/// The paper pools a whole block into one mean ([`Pooling::BLOCK`]). Finer pooling scores
/// sub-blocks and adds up their masses; single queries against all keys correct its bias.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Pooling {
    /// Query rows per mean: a divisor of 128.
    pub q_rows: usize,
    /// Key rows per mean: a divisor of 64.
    pub kv_rows: usize,
    /// Add ½·scale²·Σ q̄²·var(k), the second-order term of the log of the mean of exp(scale·q·k)
    /// over the keys of a sub-block (keys taken as independent per dimension).
    pub second_order: bool,
    /// Single queries of each block that are scored against every key; their masses and the
    /// pooled ones are averaged. The pooled estimate is biased, the samples are few: together they
    /// are nearer to the truth than either. 0 to 128.
    #[serde(default)]
    pub sampled_rows: usize,
}

impl Pooling {
    /// The paper's: one mean per block, no second-order term.
    pub const BLOCK: Self = Self { q_rows: 128, kv_rows: 64, second_order: false, sampled_rows: 0 };
    /// 16×16 sub-blocks, no second-order term.
    pub const SUB_BLOCK: Self =
        Self { q_rows: 16, kv_rows: 16, second_order: false, sampled_rows: 0 };
    /// 16×16 sub-blocks with the second-order term.
    pub const SECOND_ORDER: Self =
        Self { q_rows: 16, kv_rows: 16, second_order: true, sampled_rows: 0 };
    /// 16×16 sub-blocks and two sampled queries.
    pub const MIXED: Self = Self { q_rows: 16, kv_rows: 16, second_order: false, sampled_rows: 2 };
}

impl Default for Pooling {
    fn default() -> Self {
        Self::MIXED
    }
}

/// The arithmetic of Q·Kᵀ on the CPU.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum QkPrecision {
    /// f32 throughout.
    #[default]
    F32,
    /// int8 with one scale per token and K smoothed per block, as in SageAttention; tiles cut by
    /// a mask run in f32. Pays where the processor has VNNI ([`Isa::Avx512`]), correct on all.
    Int8,
}

/// What may be skipped, and how that is decided.
///
/// ```
/// use sparge::{Selection, SpargeConfig};
/// let config = SpargeConfig { selection: Selection::TopK(0.5).into(), ..SpargeConfig::default() };
/// ```
#[derive(Debug, Clone, PartialEq)]
pub struct SpargeConfig {
    /// Stage 1: which blocks are computed. Default [`Selection::Auto`].
    pub selection: PerHead<Selection>,
    /// The judge: a block whose mean pairwise cosine is ≤ θ is not self-similar, so its mean says
    /// little, and it is always kept. θ in [0, 1); 0 turns the judge off, which is the default
    /// (finer pooling serves better). The paper's θ, `simthreshd1` in the authors' code.
    pub theta: PerHead<f64>,
    /// Stage 2: P·V of a 16-row group and a key block is skipped where no row has a score within
    /// λ of its running maximum. A positive gap in natural-log units: the numerators dropped are
    /// below e^−λ of the largest; the denominator counts them all. That bounds each pair, not their
    /// sum: a row of n keys can lose a share of up to n·e^−λ of its largest weight. Infinity turns it
    /// off. Default 6, measured to cost 0.02% of perplexity. The paper's λ (there negative), `pvthreshd` in the authors' code (there in log2 units).
    pub lambda: PerHead<f64>,
    /// What the prediction looks at. Default [`Pooling::MIXED`].
    pub pooling: Pooling,
    /// Key blocks at the start of the sequence that are always kept (attention sinks). Default 1.
    pub keep_first: usize,
    /// Key blocks before the diagonal's that are always kept where there is a diagonal (causal
    /// attention); they count towards the budget. Default 2: the first rows of a query block would
    /// otherwise lose the tokens just before them, on which a language model's perplexity depends
    /// more than their share of the attention says (docs/results/local.md). 0: the diagonal's own
    /// blocks alone, as in the paper.
    pub keep_local: usize,
    /// Arithmetic of Q·Kᵀ. Default [`QkPrecision::F32`].
    pub qk: QkPrecision,
    /// Instruction set, `None` for the best the processor has.
    pub isa: Option<Isa>,
}

impl Default for SpargeConfig {
    fn default() -> Self {
        Self {
            selection: Selection::Auto.into(),
            theta: 0.0.into(),
            lambda: 6.0.into(),
            pooling: Pooling::default(),
            keep_first: 1,
            keep_local: 2,
            qk: QkPrecision::F32,
            isa: None,
        }
    }
}

impl SpargeConfig {
    /// Exact dense attention: every reachable block, no stage 2, f32.
    #[must_use]
    pub fn dense() -> Self {
        Self {
            selection: Selection::All.into(),
            lambda: f64::INFINITY.into(),
            // Nothing is selected here; methods that choose on such a plan force only what they must.
            keep_local: 0,
            ..Self::default()
        }
    }

    /// Exactly the blocks `selection` picks with the paper's pooling, stage 2 off: the setting
    /// under which masks are compared.
    #[must_use]
    pub fn paper(selection: Selection) -> Self {
        Self {
            selection: selection.into(),
            lambda: f64::INFINITY.into(),
            pooling: Pooling::BLOCK,
            keep_local: 0,
            ..Self::default()
        }
    }
}

/// Where the causal diagonal lies when `qo_len` ≠ `kv_len`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Alignment {
    /// Query i sees keys 0..=i (PyTorch's SDPA `is_causal`).
    TopLeft,
    /// The last query sees the last key: query i sees keys 0..=i + kv_len − qo_len
    /// (FlashAttention; chunked prefill and decoding with a KV cache).
    BottomRight,
}

/// A band around the aligned diagonal: query i sees keys i + offset − left ..= i + offset + right
/// (FlashAttention's `window_size`). `None` is unbounded.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct Window {
    /// Keys before the diagonal.
    pub left: Option<usize>,
    /// Keys after the diagonal.
    pub right: Option<usize>,
}

/// A mask over single (query, key) pairs, `[batch|1, heads|1, qo_len, kv_len]`; with `cu_seqlens`
/// `[sequences|1, heads|1, longest qo_len, longest kv_len]` in each sequence's own coordinates.
#[derive(Debug, Clone, Copy)]
pub enum ElementMask<'a> {
    /// `true` takes part (SDPA's convention).
    Bool(TensorView<'a, bool>),
    /// Added to the scaled scores, natural-log units; −∞ removes the pair.
    Additive(TensorView<'a, f32>),
}

/// Ragged batches: either packed sequences or padded ones.
#[derive(Debug, Clone, Copy, Default)]
pub enum Lengths<'a> {
    /// Every batch entry has the tensors' full lengths.
    #[default]
    Full,
    /// Batch entry i has `kv_lens[i]` valid keys, the first ones; the rest is padding that is
    /// never read. A length of 0 is allowed: its rows are zero.
    Keys(&'a [usize]),
    /// q, k, v have batch 1 and hold all sequences one after another; sequence i is
    /// `cu_seqlens[i]..cu_seqlens[i + 1]` (both start at 0 and end at the tensor's length).
    Packed {
        /// Offsets of the queries.
        cu_seqlens_q: &'a [usize],
        /// Offsets of the keys.
        cu_seqlens_k: &'a [usize],
    },
}

/// What to compute, apart from sparsity.
#[derive(Debug, Clone, Copy, Default)]
pub struct AttentionOptions<'a> {
    /// Factor on q·k. `None`: 1/√head_dim.
    pub softmax_scale: Option<f64>,
    /// Causal attention with this alignment.
    pub causal: Option<Alignment>,
    /// Sliding window. Without `causal` its diagonal is aligned bottom-right.
    pub window: Option<Window>,
    /// Key blocks (of 64) at the start that stay visible outside the window, and are always kept
    /// (StreamingLLM's attention sinks).
    pub sink_blocks: usize,
    /// Blocks that may be attended, `[batch|1, heads|1, ⌈qo_len/128⌉, ⌈kv_len/64⌉]`. Selection
    /// picks among them; with [`Selection::All`] it is the mask.
    pub block_mask: Option<&'a BlockMask>,
    /// Pairs that may be attended, or a bias.
    pub element_mask: Option<ElementMask<'a>>,
    /// Ragged batches.
    pub lengths: Lengths<'a>,
    /// Return the log-sum-exp of each row's scaled scores (natural log).
    pub return_lse: bool,
    /// Return the mask of attended blocks.
    pub return_mask: bool,
    /// Layout of the output.
    pub layout: Layout,
}

use crate::tensor::Layout;

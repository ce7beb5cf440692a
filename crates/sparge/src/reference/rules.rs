//! The points where this crate, the paper and the authors' code differ.

/// How a block's self-similarity is measured, from its rows x.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Similarity {
    /// Mean pairwise cosine, as the squared norm of the mean of the unit rows (the code's form).
    MeanCosine,
    /// mean(X·Xᵀ / max|X·Xᵀ|), the paper's formula.
    MaxNormalised,
}

/// What `TopK`'s fraction is taken of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TopKOf {
    /// The blocks the row can reach.
    Reachable,
    /// All blocks of the row.
    All,
}

/// One set of answers. [`Rules::OURS`] is what the CPU and CUDA backends compute.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Rules {
    /// The judge's measure.
    pub similarity: Similarity,
    /// Causal only: the mean that smooths key block j before it is judged is that of the keys up
    /// to the block's end, so that
    /// nothing depends on tokens after the block. Otherwise the sequence's.
    pub prefix_mean: bool,
    /// A last block with fewer rows than the others counts as not self-similar (the authors' code
    /// divides its zero padding by zero).
    pub ragged_is_dissimilar: bool,
    /// `softmax_scale` replaces 1/√head_dim in the prediction too.
    pub scale_in_prediction: bool,
    /// A pooled tail counts by the rows it has.
    pub tail_by_count: bool,
    /// The diagonal blocks of a causal row are kept and, where they reach past the row's view, not
    /// scored.
    pub keep_diagonal: bool,
    /// The forced blocks count towards τ and the top-k share; otherwise they are added to it.
    pub forced_first: bool,
    /// `TopCdf` includes the block whose mass makes the sum reach τ.
    pub include_crossing: bool,
    /// What `TopK`'s fraction is taken of.
    pub top_k_of: TopKOf,
    /// Causal masking inside the kernel. The authors' recommended functions pass `False`.
    pub causal_in_kernel: bool,
    /// Rows that stage 2 skips together.
    pub skip_rows: usize,
    /// λ's unit in nats: 1, or ln 2 where it is compared with scores in log2 units.
    pub lambda_unit: f64,
    /// A skipped block's probabilities stay in the softmax denominator (the paper's Algorithm 1).
    pub skipped_in_denominator: bool,
}

impl Rules {
    /// This crate.
    pub const OURS: Self = Self {
        similarity: Similarity::MeanCosine,
        prefix_mean: true,
        ragged_is_dissimilar: false,
        scale_in_prediction: true,
        tail_by_count: true,
        keep_diagonal: true,
        forced_first: true,
        include_crossing: true,
        top_k_of: TopKOf::Reachable,
        causal_in_kernel: true,
        skip_rows: 16,
        lambda_unit: 1.0,
        skipped_in_denominator: true,
    };

    /// The paper, arXiv 2502.18137, Algorithm 1 (use with [`crate::Pooling::BLOCK`]).
    pub const PAPER: Self = Self {
        similarity: Similarity::MaxNormalised,
        prefix_mean: false,
        tail_by_count: false,
        keep_diagonal: false,
        forced_first: false,
        ..Self::OURS
    };

    /// The authors' repository at bfd980b (use with [`crate::Pooling::BLOCK`]).
    pub const AUTHORS: Self = Self {
        similarity: Similarity::MeanCosine,
        prefix_mean: false,
        ragged_is_dissimilar: true,
        scale_in_prediction: false,
        tail_by_count: false,
        keep_diagonal: false,
        forced_first: false,
        include_crossing: false,
        top_k_of: TopKOf::All,
        causal_in_kernel: false,
        skip_rows: 128,
        lambda_unit: std::f64::consts::LN_2,
        skipped_in_denominator: false,
    };
}

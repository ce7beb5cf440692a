//! One call, validated once: everything below the public edge reads a [`Plan`] and checks nothing.

use crate::config::{
    AttentionOptions, ElementMask, Lengths, PerHead, Pooling, QkPrecision, Selection, SpargeConfig,
};
use crate::cpu::{self, Isa, TileKernels};
use crate::error::{Error, Result};
use crate::geometry::{AttentionShape, BLOCK_KV, BLOCK_Q, Coverage, RowKeys, Sequence, Visibility};
use crate::mask::BlockMask;
use crate::tensor::Layout;
use std::ops::Range;

/// A validated call: shape, sequences, masks and the settings of every head.
#[derive(Debug, Clone)]
pub struct Plan<'a> {
    pub(crate) shape: AttentionShape,
    pub(crate) sequences: Vec<Sequence>,
    /// Tokens that masks cover, `[q, kv]`: the tensors' lengths, or the longest packed sequence's.
    pub(crate) extent: [usize; 2],
    /// One per sequence.
    pub(crate) visibility: Vec<Visibility>,
    /// One per query head.
    pub(crate) heads: Vec<HeadPlan>,
    pub(crate) softmax_scale: f64,
    pub(crate) pooling: Pooling,
    pub(crate) keep_first: usize,
    pub(crate) block_mask: Option<&'a BlockMask>,
    pub(crate) element_mask: Option<ElementMask<'a>>,
    pub(crate) qk: QkPrecision,
    pub(crate) kernels: &'static TileKernels,
    pub(crate) return_lse: bool,
    pub(crate) return_mask: bool,
    pub(crate) layout: Layout,
}

/// What one query head skips.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct HeadPlan {
    pub(crate) budget: Budget,
    /// Nothing was asked for: short sequences run dense.
    pub(crate) auto: bool,
    /// 0: judge off.
    pub(crate) theta: f64,
    /// Natural-log units; infinite: stage 2 off.
    pub(crate) lambda: f64,
}

/// A resolved [`Selection`].
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Budget {
    /// Every reachable block, no prediction.
    All,
    /// Blocks until the mass reaches `cdf`, and at least the `top_k` share of them.
    Some { cdf: f64, top_k: f64 },
}

impl<'a> Plan<'a> {
    /// Validates a call.
    ///
    /// # Errors
    /// Any [`Error`]: see its variants.
    pub fn new(
        shape: AttentionShape,
        options: &AttentionOptions<'a>,
        config: &SpargeConfig,
    ) -> Result<Self> {
        shape.validate()?;
        let softmax_scale = options.softmax_scale.unwrap_or(1.0 / (shape.head_dim as f64).sqrt());
        let in_log2 = (softmax_scale * std::f64::consts::LOG2_E) as f32;
        let expected = "a finite number, also in f32 and times log2(e)";
        setting("softmax_scale", softmax_scale, in_log2.is_finite(), expected)?;
        if let (Some(_), Some(window)) = (options.causal, options.window)
            && window.right.is_some_and(|right| right != 0)
        {
            return Err(Error::Conflict {
                a: "a window that reaches past the diagonal",
                b: "causal",
                remedy: "set window.right to None or 0, or drop causal",
            });
        }
        let sequences = sequences(&shape, &options.lengths)?;
        let extent = match options.lengths {
            Lengths::Packed { .. } => {
                let most = |f: fn(&Sequence) -> usize| sequences.iter().map(f).max().unwrap_or(0);
                [most(|s| s.q_len), most(|s| s.kv_len)]
            }
            Lengths::Full | Lengths::Keys(_) => [shape.qo_len, shape.kv_len],
        };
        let plan = Self {
            extent,
            visibility: sequences.iter().map(|s| Visibility::new(options, s)).collect(),
            heads: heads(&shape, config)?,
            softmax_scale,
            pooling: pooling(config.pooling)?,
            keep_first: config.keep_first.max(options.sink_blocks),
            block_mask: options.block_mask,
            element_mask: options.element_mask,
            qk: config.qk,
            kernels: cpu::kernels(config.isa)?,
            return_lse: options.return_lse,
            return_mask: options.return_mask,
            layout: options.layout,
            sequences,
            shape,
        };
        plan.check_masks()?;
        Ok(plan)
    }

    /// The sizes of the call.
    #[must_use]
    pub fn shape(&self) -> &AttentionShape {
        &self.shape
    }

    /// The instruction set whose kernels run.
    #[must_use]
    pub fn isa(&self) -> Isa {
        self.kernels.isa
    }

    /// `[sequences, heads, q_blocks, kv_blocks]`: the shape of this call's block masks.
    #[must_use]
    pub fn mask_shape(&self) -> [usize; 4] {
        let [q, kv] = self.extent;
        [self.sequences.len(), self.shape.num_qo_heads, q.div_ceil(BLOCK_Q), kv.div_ceil(BLOCK_KV)]
    }

    /// Refuses tensors of another shape than the plan was made for.
    pub(crate) fn check_shape(&self, got: &AttentionShape) -> Result<()> {
        let sizes = |s: &AttentionShape| {
            [
                ("batch", s.batch),
                ("num_qo_heads", s.num_qo_heads),
                ("num_kv_heads", s.num_kv_heads),
                ("qo_len", s.qo_len),
                ("kv_len", s.kv_len),
                ("head_dim", s.head_dim),
                ("head_dim of v", s.head_dim_v),
            ]
        };
        for ((name, got_a), (_, got_b)) in sizes(&self.shape).into_iter().zip(sizes(got)) {
            if got_a != got_b {
                return Err(Error::Mismatch {
                    name,
                    a: "the plan",
                    got_a,
                    b: "the tensors",
                    got_b,
                });
            }
        }
        Ok(())
    }

    /// Whether any head predicts.
    pub(crate) fn predicts(&self) -> bool {
        let heads = 0..self.heads.len();
        (0..self.sequences.len()).any(|sequence| {
            heads.clone().any(|head| self.head(HeadAt { sequence, head }).budget != Budget::All)
        })
    }

    /// Whether [`Selection::Auto`] runs dense in a sequence (a batch entry, or a packed one): where
    /// prediction cannot pay, because no row reaches many keys (a short sequence, a narrow window:
    /// nearly all would be kept), or because so few queries make predicting read as much as
    /// attending. True for a sequence that the call does not have.
    #[must_use]
    pub fn auto_is_dense(&self, sequence: usize) -> bool {
        self.sequences.get(sequence).is_none_or(|s| {
            self.visibility[sequence].reach(s.q_len) < Selection::AUTO_MIN_LEN
                || s.q_len < Selection::AUTO_MIN_QUERIES
        })
    }

    /// What a head skips in a sequence.
    pub(crate) fn head(&self, at: HeadAt) -> HeadPlan {
        let head = self.heads[at.head];
        if head.auto && self.auto_is_dense(at.sequence) {
            HeadPlan { budget: Budget::All, lambda: f64::INFINITY, ..head }
        } else {
            head
        }
    }

    fn check_masks(&self) -> Result<()> {
        if let Some(mask) = self.block_mask {
            broadcasts("block_mask", mask.shape(), self.mask_shape())?;
        }
        let dims = match self.element_mask {
            None => return Ok(()),
            Some(ElementMask::Bool(m)) => m.dims(),
            Some(ElementMask::Additive(m)) => m.dims(),
        };
        let [q, kv] = self.extent;
        let expected = [self.sequences.len(), self.shape.num_qo_heads, q, kv];
        broadcasts("attn_mask", [dims.batch, dims.heads, dims.len, dims.dim], expected)
    }

    /// Whether any pair of a block may be attended, and whether all of them may.
    pub(crate) fn coverage(&self, at: HeadAt, rows: &Range<usize>, kv_block: usize) -> Coverage {
        let keys = self.sequences[at.sequence].kv_block(kv_block);
        if let Some(mask) = self.block_mask {
            let [s, h, _, _] = mask.shape();
            if !mask.get(at.sequence % s, at.head % h, rows.start / BLOCK_Q, kv_block) {
                return Coverage::Empty;
            }
        }
        self.tile_coverage(at, rows, &keys)
    }

    /// The same for any part of a block, without the block mask.
    pub(crate) fn tile_coverage(
        &self,
        at: HeadAt,
        rows: &Range<usize>,
        keys: &Range<usize>,
    ) -> Coverage {
        let coverage = self.visibility[at.sequence].tile(rows, keys);
        if coverage == Coverage::Empty || self.element_mask.is_none() {
            return coverage;
        }
        let any = rows.clone().any(|i| {
            let row = self.row(at, i);
            keys.clone().any(|j| row.sees(j))
        });
        if any { Coverage::Partial } else { Coverage::Empty }
    }

    /// What query row `i` may attend (block mask aside).
    pub(crate) fn row(&self, at: HeadAt, i: usize) -> Row<'_> {
        let visibility = &self.visibility[at.sequence];
        let mask = match self.element_mask {
            None => RowMask::None,
            Some(ElementMask::Bool(m)) => {
                RowMask::Bool(m.row(at.sequence % m.dims().batch, at.head % m.dims().heads, i))
            }
            Some(ElementMask::Additive(m)) => {
                RowMask::Bias(m.row(at.sequence % m.dims().batch, at.head % m.dims().heads, i))
            }
        };
        Row { keys: visibility.row(i), mask }
    }

    /// Whether query row `i` may attend key `j` (block mask aside).
    pub(crate) fn sees(&self, at: HeadAt, i: usize, j: usize) -> bool {
        self.row(at, i).sees(j)
    }

    /// What the element mask adds to the scaled score, natural-log units.
    pub(crate) fn bias(&self, at: HeadAt, i: usize, j: usize) -> f32 {
        match self.row(at, i).mask {
            RowMask::Bias(bias) => bias[j],
            _ => 0.0,
        }
    }

    /// Key blocks every row of `rows` keeps where it can reach them: the first ones, the diagonal,
    /// and, when causal, a block that reaches past the last row's view (its mean would tell the
    /// selection about tokens no row of the block may see).
    pub(crate) fn is_forced(&self, at: HeadAt, rows: &Range<usize>, kv_block: usize) -> bool {
        let visibility = &self.visibility[at.sequence];
        let keys = self.sequences[at.sequence].kv_block(kv_block);
        let diagonal = visibility.diagonal(rows);
        kv_block < self.keep_first
            || (keys.start < diagonal.end && diagonal.start < keys.end)
            || self.is_frontier(at, rows, kv_block)
    }

    /// Whether a block holds keys that no row of `rows` may see yet.
    pub(crate) fn is_frontier(&self, at: HeadAt, rows: &Range<usize>, kv_block: usize) -> bool {
        let visibility = &self.visibility[at.sequence];
        visibility.has_diagonal()
            && self.sequences[at.sequence].kv_block(kv_block).end > visibility.hi(rows.end - 1)
    }
}

/// The keys one query row may attend.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Row<'a> {
    keys: RowKeys,
    pub(crate) mask: RowMask<'a>,
}

/// One row of the element mask.
#[derive(Debug, Clone, Copy)]
pub(crate) enum RowMask<'a> {
    None,
    Bool(&'a [bool]),
    Bias(&'a [f32]),
}

impl Row<'_> {
    pub(crate) fn sees(&self, j: usize) -> bool {
        self.keys.sees(j)
            && match self.mask {
                RowMask::None => true,
                RowMask::Bool(mask) => mask[j],
                RowMask::Bias(bias) => bias[j] != f32::NEG_INFINITY,
            }
    }
}

/// A query head of a sequence.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct HeadAt {
    pub(crate) sequence: usize,
    pub(crate) head: usize,
}

fn setting(name: &'static str, got: f64, ok: bool, expected: &'static str) -> Result<()> {
    if ok { Ok(()) } else { Err(Error::Setting { name, got, expected }) }
}

fn pooling(pooling: Pooling) -> Result<Pooling> {
    for (name, rows, block) in [
        ("pooling.q_rows", pooling.q_rows, BLOCK_Q),
        ("pooling.kv_rows", pooling.kv_rows, BLOCK_KV),
    ] {
        let ok = rows > 0 && block % rows == 0;
        setting(name, rows as f64, ok, "a divisor of the block (128 for q, 64 for k)")?;
    }
    let (got, most) = (pooling.sampled_rows, BLOCK_Q);
    setting("pooling.sampled_rows", got as f64, got <= most, "0 to 128, the rows of a block")?;
    Ok(pooling)
}

fn heads(shape: &AttentionShape, config: &SpargeConfig) -> Result<Vec<HeadPlan>> {
    let n = shape.num_qo_heads;
    counted("selection", &config.selection, n)?;
    counted("theta", &config.theta, n)?;
    counted("lambda", &config.lambda, n)?;
    for &theta in config.theta.values() {
        setting("theta", theta, (0.0..1.0).contains(&theta), "0 (off) up to, not including, 1")?;
    }
    for &lambda in config.lambda.values() {
        setting("lambda", lambda, lambda > 0.0, "a positive gap (infinity turns stage 2 off)")?;
    }
    for selection in config.selection.values() {
        let (cdf, top_k) = match *selection {
            Selection::Auto | Selection::All => (1.0, 1.0),
            Selection::TopCdf(cdf) => (cdf, 1.0),
            Selection::TopK(top_k) => (1.0, top_k),
            Selection::Union { cdf, top_k } => (cdf, top_k),
        };
        setting("cdf", cdf, cdf > 0.0 && cdf <= 1.0, "above 0 and at most 1")?;
        setting("top_k", top_k, top_k > 0.0 && top_k <= 1.0, "above 0 and at most 1")?;
    }
    Ok((0..n)
        .map(|head| HeadPlan {
            budget: budget(*config.selection.get(head)),
            auto: *config.selection.get(head) == Selection::Auto && *config.theta.get(head) == 0.0,
            theta: *config.theta.get(head),
            lambda: *config.lambda.get(head),
        })
        .collect())
}

/// What a selection comes down to.
pub(crate) fn budget(selection: Selection) -> Budget {
    match selection {
        Selection::Auto => Budget::Some { cdf: Selection::AUTO_CDF, top_k: 0.0 },
        Selection::All => Budget::All,
        // Every block, whatever its mass: nothing to predict.
        Selection::TopK(1.0)
        | Selection::TopCdf(1.0)
        | Selection::Union { top_k: 1.0, .. }
        | Selection::Union { cdf: 1.0, .. } => Budget::All,
        Selection::TopCdf(cdf) => Budget::Some { cdf, top_k: 0.0 },
        Selection::TopK(top_k) => Budget::Some { cdf: 0.0, top_k },
        Selection::Union { cdf, top_k } => Budget::Some { cdf, top_k },
    }
}

fn counted<T>(name: &'static str, values: &PerHead<T>, num_qo_heads: usize) -> Result<()> {
    match values {
        PerHead::Heads(xs) if xs.len() != num_qo_heads => {
            Err(Error::PerHead { name, got: xs.len(), num_qo_heads })
        }
        _ => Ok(()),
    }
}

fn broadcasts(name: &'static str, got: [usize; 4], expected: [usize; 4]) -> Result<()> {
    let fits = |i: usize| got[i] == expected[i] || (i < 2 && got[i] == 1);
    if (0..4).all(fits) { Ok(()) } else { Err(Error::MaskShape { name, got, expected }) }
}

fn sequences(shape: &AttentionShape, lengths: &Lengths<'_>) -> Result<Vec<Sequence>> {
    let whole =
        |batch, kv_len| Sequence { batch, q_start: 0, q_len: shape.qo_len, kv_start: 0, kv_len };
    match *lengths {
        Lengths::Full => Ok((0..shape.batch).map(|b| whole(b, shape.kv_len)).collect()),
        Lengths::Keys(lens) => {
            let bad = |reason| Err(Error::Sequences { name: "kv_lens", reason });
            if lens.len() != shape.batch {
                return bad(format!(
                    "{} entries, expected one per batch entry ({})",
                    lens.len(),
                    shape.batch
                ));
            }
            if let Some(len) = lens.iter().find(|&&len| len > shape.kv_len) {
                return bad(format!("{len} keys, but k has only {}", shape.kv_len));
            }
            Ok(lens.iter().enumerate().map(|(b, &len)| whole(b, len)).collect())
        }
        Lengths::Packed { cu_seqlens_q, cu_seqlens_k } => {
            offsets("cu_seqlens_q", cu_seqlens_q, shape.qo_len)?;
            offsets("cu_seqlens_k", cu_seqlens_k, shape.kv_len)?;
            let bad = |reason| Err(Error::Sequences { name: "cu_seqlens", reason });
            if cu_seqlens_q.len() != cu_seqlens_k.len() {
                return bad(format!(
                    "{} offsets for q and {} for k, expected as many",
                    cu_seqlens_q.len(),
                    cu_seqlens_k.len()
                ));
            }
            if shape.batch != 1 {
                return bad(format!("batch is {}, expected 1 for packed sequences", shape.batch));
            }
            Ok(cu_seqlens_q
                .windows(2)
                .zip(cu_seqlens_k.windows(2))
                .map(|(q, k)| Sequence {
                    batch: 0,
                    q_start: q[0],
                    q_len: q[1] - q[0],
                    kv_start: k[0],
                    kv_len: k[1] - k[0],
                })
                .collect())
        }
    }
}

fn offsets(name: &'static str, offsets: &[usize], len: usize) -> Result<()> {
    let ok = offsets.first() == Some(&0)
        && offsets.last() == Some(&len)
        && offsets.len() >= 2
        && offsets.windows(2).all(|w| w[0] <= w[1]);
    if ok {
        return Ok(());
    }
    Err(Error::Sequences {
        name,
        reason: format!(
            "expected offsets that start at 0, never fall and end at the number of tokens ({len})"
        ),
    })
}

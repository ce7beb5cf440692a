//! One kind of call, validated once: its kernels, its workspace, its arguments.

use crate::device::Device;
use crate::error::{Error, Result};
use crate::jit::Kernel;
use crate::launch::{Args, Budget, MAX_HEADS};
use crate::spec::{DIMS, KernelSpec, Pool, SELECT_ROWS};
use sparge::{
    Alignment, AttentionOptions, AttentionShape, BLOCK_KV, BLOCK_Q, Lengths, Plan, Pooling,
    Selection, SpargeConfig, Strides,
};
use std::sync::Arc;

/// Element type of q, k, v and o.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum DType {
    /// IEEE half precision.
    F16,
    /// bfloat16.
    Bf16,
}

impl DType {
    pub(crate) fn cuda_name(self) -> &'static str {
        match self {
            Self::F16 => "sparge::F16",
            Self::Bf16 => "sparge::Bf16",
        }
    }
}

/// A `[batch, heads, tokens, dim]` tensor in device memory: a 16-byte aligned address and strides
/// in elements, multiples of 8; the last dimension's stride is 1.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Tensor {
    /// Address of the first element.
    pub address: u64,
    /// Distances between neighbours.
    pub strides: Strides,
}

/// q, k and v.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Inputs {
    /// Queries.
    pub q: Tensor,
    /// Keys.
    pub k: Tensor,
    /// Values.
    pub v: Tensor,
}

/// Where results go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Output {
    /// `[batch, num_qo_heads, qo_len, head_dim]`.
    pub o: Tensor,
    /// Address of `[batch, num_qo_heads, qo_len]` f32, contiguous: ln Σ exp of each row's scaled
    /// scores over the attended pairs, −∞ where there are none.
    pub lse: Option<u64>,
}

/// A kind of call on one device. Make it once, call it often.
#[derive(Debug, Clone)]
pub struct Attention {
    pub(crate) device: Device,
    pub(crate) shape: AttentionShape,
    /// Sizes and settings; addresses are zero until a call fills them in.
    pub(crate) args: Args,
    pub(crate) layout: Workspace,
    pub(crate) kernels: Kernels,
    pool: Pool,
}

#[derive(Debug, Clone)]
pub(crate) struct Kernels {
    pub(crate) statistics: Arc<Kernel>,
    pub(crate) quantize: Arc<Kernel>,
    /// With its pooled rows per thread block and its shared memory.
    pub(crate) select: Option<(Arc<Kernel>, usize, usize)>,
    pub(crate) attend: Arc<Kernel>,
    pub(crate) attend_shared: usize,
}

/// Offsets in bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Workspace {
    /// Zeroed by every call, up to `zeroed_end`.
    pub(crate) counters: usize,
    pub(crate) v_amax: usize,
    pub(crate) zeroed_end: usize,
    pub(crate) q8: usize,
    pub(crate) q_scale: usize,
    pub(crate) q_shift: usize,
    pub(crate) k8: usize,
    pub(crate) k_scale: usize,
    pub(crate) v8: usize,
    pub(crate) partial: usize,
    pub(crate) k_mean: usize,
    pub(crate) q_pool: usize,
    pub(crate) k_pool: usize,
    pub(crate) mask: usize,
    pub(crate) bytes: usize,
}

impl Attention {
    /// Validates the call, compiles what it needs (at the first use on this device).
    ///
    /// # Errors
    /// [`Error::Plan`] for what is invalid anywhere, [`Error::Unsupported`] for what only the CPU
    /// backend does, and what compiling and loading may raise.
    pub fn new(
        device: &Device,
        shape: AttentionShape,
        dtype: DType,
        options: &AttentionOptions<'_>,
        config: &SpargeConfig,
    ) -> Result<Self> {
        let pool = check(shape, options, config)?;
        let mut args = arguments(shape, options, config)?;
        let load = |spec: KernelSpec| device.kernel(&spec);
        let dim = shape.head_dim;
        let select = if pool == Pool::None {
            None
        } else {
            let width = 4 * (args.kv_blocks as usize | 1);
            let fits = |rows: &usize| {
                let spec = KernelSpec::Select { dim, pool, rows: *rows };
                rows * width <= spec.most_shared_bytes()
            };
            // Whole-block pooling has few rows: small thread blocks fill the GPU.
            let start = if pool == Pool::Block { SELECT_ROWS.len() - 1 } else { 0 };
            let Some(rows) = SELECT_ROWS.into_iter().skip(start).find(fits) else {
                return Err(Error::Unsupported {
                    what: format!("selection among {} keys", shape.kv_len),
                    remedy: "split the keys and combine the parts by their log-sum-exp",
                });
            };
            Some((load(KernelSpec::Select { dim, pool, rows })?, rows, rows * width))
        };
        let attend = KernelSpec::Attend { dim, dtype };
        let kernels = Kernels {
            statistics: load(KernelSpec::Statistics { dim, dtype })?,
            quantize: load(KernelSpec::Quantize { dim, dtype, pool })?,
            select,
            attend: load(attend)?,
            attend_shared: attend.most_shared_bytes(),
        };
        // Enough chunks to fill the GPU twice, of at least 256 keys.
        let heads = shape.batch * shape.num_kv_heads;
        let wanted = (2 * device.multiprocessors()).div_ceil(heads).max(1);
        let chunk = shape.kv_len.div_ceil(wanted).next_multiple_of(64).max(256);
        args.chunk = chunk as i32;
        args.chunks = shape.kv_len.div_ceil(chunk) as i32;
        let layout = Workspace::new(shape, &args, pool)?;
        Ok(Self { device: device.clone(), shape, args, layout, kernels, pool })
    }

    /// Bytes of device memory a call needs; 256-byte aligned, contents arbitrary.
    #[must_use]
    pub fn workspace_bytes(&self) -> usize {
        self.layout.bytes
    }

    /// Whether a call predicts a mask. Without, every reachable block is attended.
    #[must_use]
    pub fn predicts(&self) -> bool {
        self.kernels.select.is_some()
    }

    /// `[batch, num_qo_heads, q_blocks, words]`: a block mask in device memory is this many 32-bit
    /// words, a set bit is a key block to attend, the lowest bit of a word comes first. On a
    /// little-endian host these are the words of a `sparge::BlockMask`.
    #[must_use]
    pub fn mask_shape(&self) -> [usize; 4] {
        let words = self.args.mask_words as usize;
        [self.shape.batch, self.shape.num_qo_heads, self.args.q_blocks as usize, words]
    }

    /// Pooled queries of a query block.
    pub(crate) fn pooled_per_block(&self) -> usize {
        self.pool.subs().0
    }

    /// Where in the workspace [`Attention::predict`] leaves its mask, in bytes.
    #[must_use]
    pub fn mask_offset(&self) -> usize {
        self.layout.mask
    }
}

/// Refuses what the kernels do not do; says what is pooled.
fn check(
    shape: AttentionShape,
    options: &AttentionOptions<'_>,
    config: &SpargeConfig,
) -> Result<Pool> {
    Plan::new(shape, options, config)?;
    let unsupported = |what: String, remedy| Err(Error::Unsupported { what, remedy });
    const CPU: &str = "use the CPU backend of the crate `sparge`";
    if !DIMS.contains(&shape.head_dim) || shape.head_dim_v != shape.head_dim {
        return unsupported(
            format!("head_dim {} with head_dim {} of v", shape.head_dim, shape.head_dim_v),
            "pad q, k and v with zeros to 64 or 128 (and set softmax_scale to 1/√head_dim)",
        );
    }
    if shape.num_qo_heads > MAX_HEADS {
        return unsupported(format!("{} query heads", shape.num_qo_heads), "call on 128 at a time");
    }
    if options.window.is_some_and(|w| w.left.is_some() || w.right.is_some()) {
        return unsupported("a sliding window".into(), CPU);
    }
    if options.element_mask.is_some() {
        return unsupported("an element mask".into(), CPU);
    }
    if options.block_mask.is_some() {
        return unsupported(
            "a block mask in host memory".into(),
            "pass it in device memory to Attention::attend",
        );
    }
    if !matches!(options.lengths, Lengths::Full) {
        return unsupported("a ragged batch".into(), "call once per sequence");
    }
    if config.keep_local > 0 && options.causal.is_some() {
        return unsupported(
            "keep_local".into(),
            "set it to 0, or pass a block mask with the local blocks to Attention::attend",
        );
    }
    if config.theta.values().iter().any(|&theta| theta > 0.0) {
        return unsupported(
            "the self-similarity judge (theta)".into(),
            "set theta to 0 and use Pooling::SUB_BLOCK",
        );
    }
    let predicts =
        (0..shape.num_qo_heads).any(|h| budget(config.selection.get(h), shape).is_some());
    match config.pooling {
        _ if !predicts => Ok(Pool::None),
        Pooling::SUB_BLOCK => Ok(Pool::SubBlock),
        Pooling::BLOCK => Ok(Pool::Block),
        other => unsupported(format!("{other:?}"), "use Pooling::SUB_BLOCK or Pooling::BLOCK"),
    }
}

/// What a head selects; `None` for everything.
fn budget(selection: &Selection, shape: AttentionShape) -> Option<Budget> {
    let (cdf, top_k) = match *selection {
        Selection::All => return None,
        Selection::Auto if shape.kv_len < Selection::AUTO_MIN_LEN => return None,
        Selection::Auto => (Selection::AUTO_CDF, 0.0),
        Selection::TopCdf(cdf) => (cdf, 0.0),
        Selection::TopK(top_k) => (0.0, top_k),
        Selection::Union { cdf, top_k } => (cdf, top_k),
    };
    (cdf < 1.0 && top_k < 1.0).then_some(Budget { cdf: cdf as f32, top_k: top_k as f32 })
}

fn arguments(
    shape: AttentionShape,
    options: &AttentionOptions<'_>,
    config: &SpargeConfig,
) -> Result<Args> {
    let q_blocks = shape.qo_len.div_ceil(BLOCK_Q);
    let kv_blocks = shape.kv_len.div_ceil(BLOCK_KV);
    let heads = shape.batch * shape.num_qo_heads;
    // Kernels count tokens, blocks and pooled rows in 32 bits.
    let most = (heads * q_blocks * 8).max(heads * kv_blocks * 4).max(shape.qo_len + shape.kv_len);
    if most > i32::MAX as usize / 2 {
        return Err(Error::Unsupported {
            what: format!("{most} pooled rows"),
            remedy: "call on fewer heads at a time",
        });
    }
    let scale = options.softmax_scale.unwrap_or(1.0 / (shape.head_dim as f64).sqrt());
    let mut args = Args {
        batch: shape.batch as i32,
        heads: shape.num_qo_heads as i32,
        kv_heads: shape.num_kv_heads as i32,
        qo_len: shape.qo_len as i32,
        kv_len: shape.kv_len as i32,
        q_blocks: q_blocks as i32,
        kv_blocks: kv_blocks as i32,
        mask_words: (kv_blocks.div_ceil(64) * 2) as i32,
        causal: i32::from(options.causal.is_some()),
        diagonal: match options.causal {
            Some(Alignment::BottomRight) => shape.kv_len as i32 - shape.qo_len as i32,
            Some(Alignment::TopLeft) | None => 0,
        },
        keep_first: i32::try_from(config.keep_first.max(options.sink_blocks)).unwrap_or(i32::MAX),
        scale_log2: (scale * std::f64::consts::LOG2_E) as f32,
        ..Args::default()
    };
    for (head, to) in args.budget[..shape.num_qo_heads].iter_mut().enumerate() {
        *to = budget(config.selection.get(head), shape).unwrap_or(Budget { cdf: 2.0, top_k: 1.0 });
    }
    Ok(args)
}

impl Workspace {
    fn new(shape: AttentionShape, args: &Args, pool: Pool) -> Result<Self> {
        let dim = shape.head_dim;
        let q = shape.batch * shape.num_qo_heads * args.q_blocks as usize;
        let pairs = shape.batch * shape.num_kv_heads;
        let kv = pairs * args.kv_blocks as usize;
        let (q_subs, kv_subs) = pool.subs();
        let mut at = 0usize;
        let mut overflow = false;
        let mut take = |sizes: &[usize]| {
            let start = at;
            let bytes = sizes.iter().try_fold(1usize, |a, &b| a.checked_mul(b));
            let end = bytes.and_then(|b| at.checked_add(b)?.checked_next_multiple_of(256));
            overflow |= end.is_none();
            at = end.unwrap_or(at);
            start
        };
        let mut layout = Self {
            counters: take(&[1 + pairs, 4]),
            v_amax: take(&[pairs, dim, 4]),
            zeroed_end: take(&[0]),
            q8: take(&[q, BLOCK_Q, dim]),
            q_scale: take(&[q, BLOCK_Q, 4]),
            q_shift: take(&[q, BLOCK_Q, 4]),
            k8: take(&[kv, BLOCK_KV, dim]),
            k_scale: take(&[kv, 16]),
            v8: take(&[kv, BLOCK_KV, dim]),
            partial: take(&[pairs, args.chunks as usize, dim, 4]),
            k_mean: take(&[pairs, dim, 4]),
            q_pool: take(&[q, q_subs, 2, dim, 2]),
            k_pool: take(&[kv, kv_subs, 2, dim, 2]),
            mask: take(&[if pool == Pool::None { 0 } else { q }, args.mask_words as usize, 4]),
            bytes: 0,
        };
        if overflow {
            return Err(sparge::Error::Overflow { tensor: "the workspace" }.into());
        }
        layout.bytes = at;
        Ok(layout)
    }
}

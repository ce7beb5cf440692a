//! The fast path of one kind of call (compute capability 9.0): its kernels, its workspace, its
//! arguments. `launch/forward.rs` enqueues them.

use crate::device::Device;
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::jit::Kernel;
use crate::launch::{Args, Budget, MAX_HEADS};
use crate::spec::{DIMS, KernelSpec, Pool, SLAB_ROWS};
use sparge::{
    Alignment, AttentionOptions, AttentionShape, BLOCK_KV, BLOCK_Q, Lengths, Pooling, Selection,
    SpargeConfig,
};
use std::sync::Arc;

/// A kind of call on the fast path.
#[derive(Debug, Clone)]
pub(crate) struct Hopper {
    pub(crate) device: Device,
    pub(crate) shape: AttentionShape,
    /// Sizes and settings; addresses are zero until a call fills them in.
    pub(crate) args: Args,
    pub(crate) layout: Workspace,
    pub(crate) kernels: Kernels,
    pool: Pool,
}

/// Whether the fast path computes this shape under these options, in `dtype`.
pub(crate) fn takes(shape: &AttentionShape, dtype: DType, options: &AttentionOptions<'_>) -> bool {
    DIMS.contains(&shape.head_dim)
        && shape.head_dim_v == shape.head_dim
        && shape.num_qo_heads <= MAX_HEADS
        && shape.batch * shape.num_qo_heads <= 65535
        && dtype != DType::F32
        && !options.window.is_some_and(|w| w.left.is_some() || w.right.is_some())
        && matches!(options.lengths, Lengths::Full)
}

/// What a head of the fast path's own selection keeps; `None` for everything.
fn budget(config: &SpargeConfig, head: usize, is_short: bool) -> Option<Budget> {
    let (cdf, top_k) = match *config.selection.get(head) {
        Selection::All => return None,
        Selection::Auto if is_short => return None,
        Selection::Auto => (Selection::AUTO_CDF, 0.0),
        Selection::TopCdf(cdf) => (cdf, 0.0),
        Selection::TopK(top_k) => (0.0, top_k),
        Selection::Union { cdf, top_k } => (cdf, top_k),
    };
    (cdf < 1.0 && top_k < 1.0).then_some(Budget { cdf: cdf as f32, top_k: top_k as f32 })
}

#[derive(Debug, Clone)]
pub(crate) struct Kernels {
    pub(crate) statistics: Arc<Kernel>,
    pub(crate) quantize: Arc<Kernel>,
    pub(crate) select: Option<Select>,
    pub(crate) attend: Arc<Kernel>,
    pub(crate) attend_shared: usize,
}

/// Kernels of the selection.
#[derive(Debug, Clone)]
pub(crate) struct Select {
    pub(crate) score: Arc<Kernel>,
    pub(crate) score_shared: usize,
    pub(crate) select: Arc<Kernel>,
    /// Query blocks of a thread block of `select`.
    pub(crate) warps: usize,
}

/// Offsets in bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Workspace {
    /// Zeroed by every call, up to `zeroed_end`.
    pub(crate) counters: usize,
    pub(crate) v_amax: usize,
    pub(crate) k_norm: usize,
    pub(crate) q_norm: usize,
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
    pub(crate) bytes: usize,
}

impl Hopper {
    /// Compiles what the call needs (at the first use on this device). `pool`: what the selection
    /// pools, where the fast path selects; `is_short`: where `Selection::Auto` runs dense.
    pub(crate) fn new(
        device: &Device,
        shape: AttentionShape,
        dtype: DType,
        options: &AttentionOptions<'_>,
        config: &SpargeConfig,
        pool: Pool,
        is_short: bool,
    ) -> Result<Self> {
        let mut args = arguments(shape, options, config, is_short)?;
        let load = |spec: KernelSpec| device.kernel(&spec);
        let dim = shape.head_dim;
        let select = if pool == Pool::None {
            None
        } else {
            let spec = KernelSpec::Select { dim, pool };
            let fits =
                |warps: &usize| 8 * warps * args.kv_blocks as usize <= spec.most_shared_bytes();
            let Some(warps) = [4, 2, 1].into_iter().find(fits) else {
                return Err(Error::Unsupported {
                    what: format!("selection among {} keys", shape.kv_len),
                    remedy: "split the keys and combine the parts by their log-sum-exp",
                });
            };
            // Thread blocks enough to fill the GPU twice.
            let [q, kv] = score_tiles(&args, pool);
            let all = shape.batch * shape.num_qo_heads * q * kv;
            let tiles = (all / (6 * device.multiprocessors())).clamp(2, 64);
            args.score_chunk = (tiles * SLAB_ROWS / pool.subs().1) as i32;
            let score = KernelSpec::Score { dim, pool };
            Some(Select {
                score_shared: score.most_shared_bytes(),
                score: load(score)?,
                select: load(spec)?,
                warps,
            })
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

    /// Whether it selects itself.
    pub(crate) fn selects(&self) -> bool {
        self.kernels.select.is_some()
    }

    /// What the selection of one head keeps, in f32 numbers: its scores and their sums.
    pub(crate) fn head_scores(&self) -> usize {
        self.pooled_rows() * (self.args.kv_blocks as usize + 2 * self.score_chunks())
    }

    /// Bytes of the sums of so many heads; their scores come behind them.
    pub(crate) fn sums_bytes(&self, heads: usize) -> usize {
        8 * heads * self.pooled_rows() * self.score_chunks()
    }

    /// Pooled queries of a head of all batch entries.
    fn pooled_rows(&self) -> usize {
        self.shape.batch * self.args.q_blocks as usize * self.pool.subs().0
    }

    /// Chunks of a head's keys that `score` sums up.
    fn score_chunks(&self) -> usize {
        (self.args.kv_blocks as usize).div_ceil(self.args.score_chunk.max(1) as usize)
    }

    /// Thread blocks of `score` for one head of one batch entry.
    pub(crate) fn score_blocks(&self) -> usize {
        score_tiles(&self.args, self.pool)[0] * self.score_chunks()
    }
}

/// Tiles of pooled queries and of pooled keys of one head.
fn score_tiles(args: &Args, pool: Pool) -> [usize; 2] {
    let (q, kv) = pool.subs();
    let tiles = |blocks: i32, subs: usize, rows: usize| (blocks as usize * subs).div_ceil(rows);
    [tiles(args.q_blocks, q, 2 * SLAB_ROWS), tiles(args.kv_blocks, kv, SLAB_ROWS)]
}

/// What the fast path's own selection pools for this config; `None` where it cannot select.
pub(crate) fn pool_of(pooling: Pooling) -> Option<Pool> {
    // Sampled queries come beside either.
    match (Pooling { sampled_rows: 0, ..pooling }) {
        Pooling::SUB_BLOCK => Some(Pool::SubBlock),
        Pooling::BLOCK => Some(Pool::Block),
        _ => None,
    }
}

fn arguments(
    shape: AttentionShape,
    options: &AttentionOptions<'_>,
    config: &SpargeConfig,
    is_short: bool,
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
        keep_local: i32::try_from(config.keep_local).unwrap_or(i32::MAX),
        scale_log2: (scale * std::f64::consts::LOG2_E) as f32,
        sampled_rows: config.pooling.sampled_rows as i32,
        ..Args::default()
    };
    for (head, to) in args.budget[..shape.num_qo_heads].iter_mut().enumerate() {
        *to = budget(config, head, is_short).unwrap_or(Budget { cdf: 2.0, top_k: 1.0 });
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
            k_norm: take(&[pairs, 4]),
            q_norm: take(&[q, 4]),
            zeroed_end: take(&[0]),
            q8: take(&[q, BLOCK_Q, dim]),
            q_scale: take(&[q, BLOCK_Q, 4]),
            q_shift: take(&[q, BLOCK_Q, 4]),
            k8: take(&[kv, BLOCK_KV, dim]),
            k_scale: take(&[kv, 32]),
            v8: take(&[kv, BLOCK_KV, dim]),
            partial: take(&[pairs, args.chunks as usize, dim, 4]),
            k_mean: take(&[pairs, dim, 4]),
            q_pool: take(&[q, q_subs, 2, dim, 2]),
            k_pool: take(&[kv, kv_subs, 2, dim, 2]),
            bytes: 0,
        };
        if overflow {
            return Err(sparge::Error::Overflow { tensor: "the workspace" }.into());
        }
        layout.bytes = at;
        Ok(layout)
    }
}

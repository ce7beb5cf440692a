//! The general path of one kind of call: its tables, its workspace, its kernels.
//! `launch/general.rs` enqueues them.

use crate::device::Device;
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::jit::Kernel;
use crate::launch::Call;
use crate::options::{CudaOptions, Precision};
use crate::spec::{Arch, KernelSpec, Mma, SLAB_ROWS, sample_halves};
use crate::tables::{Head, Tables};
use crate::tensors::MaskKind;
use sparge::{AttentionOptions, AttentionShape, BLOCK_KV, BLOCK_Q, Plan, Pooling, SpargeConfig};
use std::sync::Arc;

/// A kind of call on the general path.
#[derive(Debug, Clone)]
pub(crate) struct General {
    pub(crate) shape: AttentionShape,
    pub(crate) dtype: DType,
    pub(crate) precision: Precision,
    /// Sizes and settings; addresses are zero until a call fills them in.
    pub(crate) call: Call,
    pub(crate) tables: Tables,
    /// `tables` as it travels.
    pub(crate) words: Arc<[u32]>,
    pub(crate) pooling: Pooling,
    pub(crate) layout: Layout,
    pub(crate) kernels: Kernels,
    pub(crate) duties: Duties,
    /// Arithmetic of the attention kernel.
    pub(crate) mma: Mma,
    /// Thread blocks of `choose`.
    pub(crate) choosers: usize,
    /// Heads that are selected for together.
    pub(crate) heads_together: usize,
}

/// What this path does in a call.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Duties {
    pub(crate) attends: bool,
    pub(crate) predicts: bool,
    /// The workspace holds a mask, whoever writes it.
    pub(crate) has_mask: bool,
    /// Numbers that the fast path's selection keeps of a head, 0 where it does not select: then this
    /// path samples queries for it.
    pub(crate) head_scores: usize,
    /// It intersects masks for the fast path.
    pub(crate) intersects: bool,
}

/// Kernels of the parts that a call has.
#[derive(Debug, Clone, Default)]
pub(crate) struct Kernels {
    pub(crate) upload: Option<Arc<Kernel>>,
    pub(crate) count: Option<Arc<Kernel>>,
    pub(crate) intersect: Option<Arc<Kernel>>,
    pub(crate) reach: Option<Arc<Kernel>>,
    pub(crate) pool_mask: Option<Arc<Kernel>>,
    pub(crate) pool: Option<Arc<Kernel>>,
    pub(crate) judge: Option<Judge>,
    pub(crate) sample: Option<Arc<Kernel>>,
    pub(crate) choose: Option<Arc<Kernel>>,
    pub(crate) casts: Option<[Arc<Kernel>; 3]>,
    pub(crate) int8: Option<Int8>,
    pub(crate) fp8: Option<Fp8>,
    pub(crate) attend: Option<Arc<Kernel>>,
}

/// The judge's kernels.
#[derive(Debug, Clone)]
pub(crate) struct Judge {
    pub(crate) sums: Arc<Kernel>,
    pub(crate) centres: Arc<Kernel>,
    pub(crate) judge: Arc<Kernel>,
}

/// Kernels that quantise Q and K.
#[derive(Debug, Clone)]
pub(crate) struct Int8 {
    pub(crate) sums: Arc<Kernel>,
    pub(crate) centres: Arc<Kernel>,
    pub(crate) rows: Arc<Kernel>,
}

/// Kernels that quantise V.
#[derive(Debug, Clone)]
pub(crate) struct Fp8 {
    pub(crate) largest: Arc<Kernel>,
    pub(crate) quantize: Arc<Kernel>,
}

/// Offsets in bytes, from the start of this path's part.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Layout {
    pub(crate) tables: usize,
    /// Zeroed before it is filled, as `v_amax`.
    pub(crate) groups: usize,
    pub(crate) groups_bytes: usize,
    pub(crate) element_pool: usize,
    pub(crate) q_features: usize,
    pub(crate) k_features: usize,
    pub(crate) q_known: usize,
    pub(crate) k_known: usize,
    pub(crate) k_sums: usize,
    pub(crate) k_centre: usize,
    pub(crate) q_cosine: usize,
    pub(crate) k_cosine: usize,
    pub(crate) scratch: usize,
    pub(crate) samples: usize,
    pub(crate) scores: usize,
    pub(crate) q8: usize,
    pub(crate) q_scale: usize,
    pub(crate) q_shift: usize,
    pub(crate) k8: usize,
    pub(crate) k_scale: usize,
    pub(crate) k_mean: usize,
    pub(crate) v8: usize,
    pub(crate) v_amax: usize,
    pub(crate) v_amax_bytes: usize,
    /// q, k and v in bf16.
    pub(crate) casts: [usize; 3],
    pub(crate) mask: usize,
    /// Where masks are intersected.
    pub(crate) both: usize,
    pub(crate) bytes: usize,
}

impl General {
    /// Sizes and tables; no kernels and no workspace yet.
    pub(crate) fn new(
        plan: &Plan<'_>,
        dtype: DType,
        options: &AttentionOptions<'_>,
        config: &SpargeConfig,
        cuda: &CudaOptions,
    ) -> Result<Self> {
        let shape = *plan.shape();
        // Tokens and heads are counted in 32 bits.
        let most = [shape.batch, shape.num_qo_heads, shape.qo_len, shape.kv_len];
        if most.into_iter().any(|size| size > 1 << 29) {
            return Err(too_large(&shape));
        }
        let tables = Tables::new(plan, options, config);
        let scale = options.softmax_scale.unwrap_or(1.0 / (shape.head_dim as f64).sqrt());
        let window = options.window.unwrap_or_default();
        // Longer than any sequence is as good as without end.
        let limit = |x: usize| i32::try_from(x).unwrap_or(i32::MAX).min(1 << 29);
        let band = |x: Option<usize>| x.map_or(-1, limit);
        let pooling = config.pooling;
        let width = shape.head_dim * if pooling.second_order { 2 } else { 1 };
        let [q_blocks, kv_blocks] = tables.longest.map(|x| x as i32);
        let mask = cuda.element_mask;
        let call = Call {
            n_sequences: tables.sequences.len() as i32,
            heads: shape.num_qo_heads as i32,
            kv_heads: shape.num_kv_heads as i32,
            dim: shape.head_dim as i32,
            dim_v: shape.head_dim_v as i32,
            padded: Mma::padded(shape.head_dim.max(shape.head_dim_v)) as i32,
            all_q_blocks: tables.all[0] as i32,
            all_kv_blocks: tables.all[1] as i32,
            q_blocks,
            kv_blocks,
            mask_words: (tables.longest[1].div_ceil(64) * 2) as i32,
            left: band(window.left),
            right: if options.causal.is_some() { 0 } else { band(window.right) },
            sink: limit(options.sink_blocks.saturating_mul(BLOCK_KV)),
            keep_first: limit(config.keep_first.max(options.sink_blocks)),
            keep_local: limit(config.keep_local),
            element_kind: match mask.map(|mask| mask.kind) {
                None => 0,
                Some(MaskKind::Bool) => 1,
                Some(MaskKind::Additive(dtype)) => dtype.kind(),
            },
            element_heads: match mask {
                Some(mask) if mask.per_head => shape.num_qo_heads as i32,
                _ => 1,
            },
            q_rows: pooling.q_rows as i32,
            kv_rows: pooling.kv_rows as i32,
            second_order: i32::from(pooling.second_order),
            width: width.next_multiple_of(16) as i32,
            sampled_rows: pooling.sampled_rows as i32,
            head_samples: tables.head_samples as i64,
            q_len_tensor: shape.qo_len as i32,
            kv_len_tensor: shape.kv_len as i32,
            batch: shape.batch as i32,
            o_kind: dtype.kind(),
            scale_log2: (scale * std::f64::consts::LOG2_E) as f32,
            square_scale: (0.5 * scale * scale * std::f64::consts::LOG2_E) as f32,
            ..Call::default()
        };
        let general = Self {
            shape,
            dtype,
            precision: cuda.precision,
            call,
            words: tables.words().into(),
            tables,
            pooling,
            layout: Layout::default(),
            kernels: Kernels::default(),
            duties: Duties::default(),
            mma: Mma::Half,
            choosers: 0,
            heads_together: shape.num_qo_heads,
        };
        general.check_sizes()?;
        Ok(general)
    }

    /// Kernels count blocks, rows and their own thread blocks in 32 bits.
    fn check_sizes(&self) -> Result<()> {
        let (t, s) = (&self.tables, &self.shape);
        let heads = s.num_qo_heads as u128;
        let sequences = t.sequences.len() as u128;
        let element_heads =
            if self.call.element_kind == 0 { 0 } else { self.call.element_heads as u128 };
        let parts = (BLOCK_Q / self.pooling.q_rows).max(8) as u128;
        let counts = [
            sequences * heads * t.longest[0] as u128 * 2,
            heads * t.all[0] as u128 + s.num_kv_heads as u128 * t.all[1] as u128,
            s.batch as u128 * heads * s.qo_len.max(s.kv_len) as u128,
            // Thread blocks of the kernels that read the element mask.
            sequences * element_heads * t.longest[0] as u128 * parts,
            // Those of `sample`.
            sequences * heads * self.sample_groups() as u128 * t.longest[1] as u128 / 8,
        ];
        let is_large = counts.iter().any(|&count| count > i32::MAX as u128 / 2);
        if is_large { Err(too_large(s)) } else { Ok(()) }
    }

    /// Whether any head of any sequence selects blocks.
    pub(crate) fn selects(&self) -> bool {
        self.tables.sequences.iter().any(|s| {
            self.tables
                .heads
                .iter()
                .any(|h: &Head| h.keeps_all == 0 && (h.is_auto == 0 || s.is_short == 0))
        })
    }

    /// Loads kernels and lays out the workspace for what this path has to do.
    pub(crate) fn finish(mut self, device: &Device, duties: Duties) -> Result<Self> {
        let dtype = self.dtype;
        self.duties = duties;
        let load = |spec: KernelSpec| device.kernel(&spec);
        let k = &mut self.kernels;
        k.upload = Some(load(KernelSpec::Upload)?);
        k.count = Some(load(KernelSpec::Count)?);
        if duties.intersects {
            k.intersect = Some(load(KernelSpec::Intersect)?);
        }
        let has_element_mask = self.call.element_kind != 0;
        if has_element_mask {
            k.reach = Some(load(KernelSpec::Reach)?);
        }
        let selects = duties.predicts && self.selects();
        let k = &mut self.kernels;
        if duties.predicts {
            let sub_block = (self.pooling.q_rows, self.pooling.kv_rows) == (16, 16);
            k.choose = Some(load(KernelSpec::Choose { sub_block })?);
        }
        let samples = (duties.predicts || duties.head_scores > 0)
            && self.selects()
            && self.pooling.sampled_rows > 0;
        let k = &mut self.kernels;
        if samples {
            k.sample = Some(load(KernelSpec::Sample { dtype, has_mask: has_element_mask })?);
        }
        if selects {
            k.pool = Some(load(KernelSpec::PoolRows { dtype })?);
            if has_element_mask {
                k.pool_mask = Some(load(KernelSpec::PoolMask)?);
            }
            if self.tables.heads.iter().any(|head| head.theta > 0.0) {
                k.judge = Some(Judge {
                    sums: load(KernelSpec::Sums { dtype, clean: false })?,
                    centres: load(KernelSpec::Centres { per_block: true })?,
                    judge: load(KernelSpec::Judge { dtype })?,
                });
            }
        }
        if duties.attends {
            let padded = self.call.padded as usize;
            self.mma = match self.precision {
                Precision::Quantized if padded <= Mma::MOST_QUANTIZED => {
                    if device.arch() == Arch::Sm80 { Mma::Int8 } else { Mma::Int8Fp8 }
                }
                Precision::Quantized | Precision::Half => Mma::Half,
            };
            if self.mma != Mma::Half {
                k.int8 = Some(Int8 {
                    sums: load(KernelSpec::Sums { dtype, clean: true })?,
                    centres: load(KernelSpec::Centres { per_block: false })?,
                    rows: load(KernelSpec::QuantizeRows { dtype })?,
                });
            }
            if self.mma == Mma::Int8Fp8 {
                k.fp8 = Some(Fp8 {
                    largest: load(KernelSpec::LargestV { dtype })?,
                    quantize: load(KernelSpec::QuantizeV { dtype })?,
                });
            } else if dtype == DType::F32 {
                k.casts = Some([
                    load(KernelSpec::Cast { which: 0 })?,
                    load(KernelSpec::Cast { which: 1 })?,
                    load(KernelSpec::Cast { which: 2 })?,
                ]);
            }
            let attend = load(self.attend_spec())?;
            self.kernels.attend = Some(attend);
        }
        let head_samples = if samples { self.tables.head_samples } else { 0 };
        let per_head = 4 * (head_samples + duties.head_scores).max(1);
        self.heads_together = (PASS_BYTES / per_head).clamp(1, self.shape.num_qo_heads);
        let rows = self.tables.sequences.len() * self.heads_together;
        let subs = BLOCK_Q / self.pooling.q_rows;
        let items = rows * self.tables.longest[0].div_ceil(subs.max(32) / subs);
        self.choosers = items.min(2 * device.multiprocessors());
        // Key blocks enough to be worth the loading of the queries, and thread blocks enough to fill
        // the GPU twice.
        let tiles = rows * self.sample_groups() * self.tables.longest[1];
        self.call.sample_chunk = (tiles / (8 * device.multiprocessors())).clamp(8, 64) as i32;
        self.layout = Layout::new(&self, selects)?;
        Ok(self)
    }

    /// The attention kernel.
    pub(crate) fn attend_spec(&self) -> KernelSpec {
        let dtype = match self.dtype {
            DType::F32 => DType::Bf16,
            // It reads neither: one kernel serves both.
            DType::F16 if self.mma == Mma::Int8Fp8 => DType::Bf16,
            dtype => dtype,
        };
        KernelSpec::AttendMma { dim: self.call.padded as usize, dtype, mma: self.mma }
    }

    /// Groups of sampled queries of a head that thread blocks of `sample` score together.
    pub(crate) fn sample_groups(&self) -> usize {
        let rows = SLAB_ROWS * sample_halves(self.dtype);
        (self.tables.longest[0] * self.pooling.sampled_rows).div_ceil(rows)
    }

    /// f32 numbers of one thread block of `choose`.
    fn scratch(&self) -> usize {
        let (subs, per_block) = (BLOCK_Q / self.pooling.q_rows, BLOCK_KV / self.pooling.kv_rows);
        let rows = subs.max(32);
        let (blocks, kv_blocks) = (rows / subs, self.tables.longest[1]);
        let entries = per_block / per_block.min(16);
        rows * kv_blocks * entries + blocks * kv_blocks + (blocks * kv_blocks).div_ceil(4)
    }
}

/// What the selection may keep of the heads of a pass; one head may take more.
const PASS_BYTES: usize = 512 << 20;

fn too_large(s: &AttentionShape) -> Error {
    Error::Unsupported {
        what: format!(
            "a call of {} × {} heads × {} queries and {} keys",
            s.batch, s.num_qo_heads, s.qo_len, s.kv_len
        ),
        remedy: "call on fewer heads, sequences or tokens at a time",
    }
}

impl Layout {
    fn new(g: &General, selects: bool) -> Result<Self> {
        let (call, t, s) = (&g.call, &g.tables, &g.shape);
        let sequences = t.sequences.len();
        let (heads, kv_heads) = (s.num_qo_heads, s.num_kv_heads);
        let (q, kv) = (heads * t.all[0], kv_heads * t.all[1]);
        let (width, padded) = (call.width as usize, call.padded as usize);
        let words = call.mask_words as usize;
        let (q_subs, kv_subs) = (BLOCK_Q / g.pooling.q_rows, BLOCK_KV / g.pooling.kv_rows);
        let element_heads = call.element_heads as usize;
        let (judges, int8) = (g.kernels.judge.is_some(), g.kernels.int8.is_some());
        let (fp8, casts) = (g.kernels.fp8.is_some(), g.kernels.casts.is_some());
        let samples = g.kernels.sample.is_some();
        let mut at = 0usize;
        let mut overflow = false;
        let mut take = |wanted: bool, sizes: &[usize]| {
            let start = at;
            if wanted {
                let bytes = sizes.iter().try_fold(1usize, |a, &b| a.checked_mul(b));
                let end = bytes.and_then(|b| at.checked_add(b)?.checked_next_multiple_of(256));
                overflow |= end.is_none();
                at = end.unwrap_or(at);
            }
            start
        };
        let has_groups = call.element_kind != 0;
        let groups_bytes = sequences * element_heads * t.longest[0] * 8 * words * 4;
        let v_amax_bytes = kv_heads * sequences * padded * 4;
        let mut layout = Self {
            tables: take(true, &[g.words.len(), 4]),
            groups: take(has_groups, &[groups_bytes]),
            groups_bytes,
            element_pool: take(
                has_groups && selects,
                &[sequences * element_heads, t.longest[0] * q_subs, t.longest[1] * kv_subs, 4],
            ),
            q_features: take(selects, &[q, q_subs, width, 4]),
            k_features: take(selects, &[kv, kv_subs, width, 4]),
            q_known: take(selects, &[q, 4]),
            k_known: take(selects, &[kv, 4]),
            k_sums: take(judges || int8, &[kv, s.head_dim, 8]),
            k_centre: take(judges, &[kv, s.head_dim, 4]),
            q_cosine: take(judges, &[q, 4]),
            k_cosine: take(judges, &[kv, 4]),
            scratch: take(g.duties.predicts, &[g.choosers, g.scratch(), 4]),
            samples: take(samples, &[g.heads_together, t.head_samples, 4]),
            scores: take(true, &[g.heads_together, g.duties.head_scores, 4]),
            q8: take(int8, &[q, BLOCK_Q, padded]),
            q_scale: take(int8, &[q, BLOCK_Q, 4]),
            q_shift: take(int8, &[q, BLOCK_Q, 4]),
            k8: take(int8, &[kv, BLOCK_KV, padded]),
            k_scale: take(int8, &[kv, BLOCK_KV, 4]),
            k_mean: take(int8, &[kv_heads * sequences, s.head_dim, 4]),
            v8: take(fp8, &[kv, BLOCK_KV, padded]),
            v_amax: take(fp8, &[v_amax_bytes]),
            v_amax_bytes,
            casts: [
                take(casts && !int8, &[s.batch * heads, s.qo_len, s.head_dim, 2]),
                take(casts && !int8, &[s.batch * kv_heads, s.kv_len, s.head_dim, 2]),
                take(casts, &[s.batch * kv_heads, s.kv_len, s.head_dim_v, 2]),
            ],
            mask: take(g.duties.has_mask, &[sequences * heads, t.longest[0], words, 4]),
            both: take(g.duties.intersects, &[sequences * heads, t.longest[0], words, 4]),
            bytes: 0,
        };
        if overflow {
            return Err(sparge::Error::Overflow { tensor: "the workspace" }.into());
        }
        layout.bytes = at;
        Ok(layout)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn general(shape: AttentionShape) -> Result<General> {
        let (options, config) = (AttentionOptions::default(), SpargeConfig::default());
        let plan = Plan::new(shape, &options, &config)?;
        General::new(&plan, DType::F16, &options, &config, &CudaOptions::default())
    }

    #[test]
    fn sizes_beyond_32_bits_are_refused() {
        let shape = AttentionShape {
            batch: 1,
            num_qo_heads: 8,
            num_kv_heads: 8,
            qo_len: 4096,
            kv_len: 4096,
            head_dim: 64,
            head_dim_v: 64,
        };
        assert!(general(shape).is_ok_and(|g| g.selects()));
        for shape in [
            AttentionShape { kv_len: 1 << 31, ..shape },
            AttentionShape { qo_len: (1 << 31) + 7, kv_len: 100, ..shape },
            AttentionShape { batch: 1 << 20, ..shape },
        ] {
            let refused = general(shape);
            assert!(matches!(refused, Err(Error::Unsupported { .. })), "{shape:?}");
        }
    }
}

//! The operator as a candle custom op.

use candle_core::{CpuStorage, CustomOp3, DType, Layout, Result, Shape, Tensor, bail};
use sparge::{
    Alignment, AttentionOptions, Dims, Element, ElementMask, Lengths, SpargeConfig, Stats, Strides,
    TensorView, Window,
};
use std::sync::{Arc, Mutex};

/// Options of [`attention`] apart from sparsity; see [`sparge::AttentionOptions`].
#[derive(Debug, Clone, Default)]
pub struct Options {
    /// Factor on q·k; `None`: 1/√head_dim.
    pub softmax_scale: Option<f64>,
    /// Causal attention with this alignment.
    pub causal: Option<Alignment>,
    /// Sliding window.
    pub window: Option<Window>,
    /// Key blocks of 64 at the start that every row sees.
    pub sink_blocks: usize,
    /// Valid keys of each batch entry; the rest is padding.
    pub kv_lens: Option<Vec<usize>>,
    /// `[batch|1, heads|1, qo_len, kv_len]`: u8 (nonzero takes part) or f32 (added to the scaled
    /// scores, −∞ removes the pair).
    pub attn_mask: Option<Tensor>,
    /// `Hnd`: tensors are `[batch, heads, tokens, dim]`; `Nhd`: `[batch, tokens, heads, dim]` (as
    /// candle-flash-attn has them).
    pub layout: sparge::Layout,
}

/// Sparse attention on candle tensors; see [`sparge::attention`].
///
/// q, k, v are f32, f16 or bf16 on the CPU, with any strides whose last one is 1 (transposed and
/// narrowed tensors are read where they lie). The result is contiguous, of q's type and layout.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use sparge_candle::op::{Options, attention};
/// let q = Tensor::randn(0f32, 1.0, (1, 4, 300, 64), &Device::Cpu)?;
/// let kv = Tensor::randn(0f32, 1.0, (1, 2, 300, 64), &Device::Cpu)?; // GQA: 2 heads
/// let options = Options { causal: Some(sparge::Alignment::TopLeft), ..Default::default() };
/// let o = attention(&q, &kv, &kv, &options, &sparge::SpargeConfig::default())?;
/// assert_eq!(o.dims(), [1, 4, 300, 64]);
/// # Ok::<(), candle_core::Error>(())
/// ```
///
/// # Errors
/// Shapes, types, devices or options that the operator refuses. There is no backward pass:
/// differentiating through the result is an error.
pub fn attention(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    options: &Options,
    config: &SpargeConfig,
) -> Result<Tensor> {
    attention_with_stats(q, k, v, options, config).map(|(o, _)| o)
}

/// [`attention`], and what it skipped.
///
/// # Errors
/// As [`attention`].
pub fn attention_with_stats(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    options: &Options,
    config: &SpargeConfig,
) -> Result<(Tensor, Stats)> {
    for (name, x) in [("k", k), ("v", v)] {
        if x.dtype() != q.dtype() {
            bail!("{name} is {:?} and q is {:?}; convert one with to_dtype", x.dtype(), q.dtype());
        }
    }
    let stats = Arc::new(Mutex::new(Stats::default()));
    let op = SpargeOp {
        mask: options.attn_mask.as_ref().map(Mask::new).transpose()?,
        options: options.clone(),
        config: config.clone(),
        stats: Arc::clone(&stats),
    };
    let o = q.apply_op3(k, v, op)?;
    let stats = std::mem::take(&mut *stats.lock().unwrap_or_else(|e| e.into_inner()));
    Ok((o, stats))
}

struct SpargeOp {
    options: Options,
    config: SpargeConfig,
    mask: Option<Mask>,
    stats: Arc<Mutex<Stats>>,
}

/// The element mask's values, row-major.
enum Mask {
    Bool(Vec<bool>, Dims),
    Additive(Vec<f32>, Dims),
}

impl Mask {
    fn new(mask: &Tensor) -> Result<Self> {
        let (batch, heads, len, dim) = mask.dims4()?;
        let dims = Dims { batch, heads, len, dim };
        let flat = mask.flatten_all()?;
        match mask.dtype() {
            DType::U8 => {
                Ok(Self::Bool(flat.to_vec1::<u8>()?.into_iter().map(|x| x != 0).collect(), dims))
            }
            DType::F32 => Ok(Self::Additive(flat.to_vec1()?, dims)),
            other => bail!("attn_mask is {other:?}, expected U8 (boolean) or F32 (additive)"),
        }
    }

    fn view(&self) -> sparge::Result<ElementMask<'_>> {
        Ok(match self {
            Self::Bool(x, d) => {
                ElementMask::Bool(TensorView::contiguous(x, *d, sparge::Layout::Hnd)?)
            }
            Self::Additive(x, d) => {
                ElementMask::Additive(TensorView::contiguous(x, *d, sparge::Layout::Hnd)?)
            }
        })
    }
}

impl CustomOp3 for SpargeOp {
    fn name(&self) -> &'static str {
        "sparge-attention"
    }

    fn cpu_fwd(
        &self,
        q: &CpuStorage,
        q_layout: &Layout,
        k: &CpuStorage,
        k_layout: &Layout,
        v: &CpuStorage,
        v_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let layouts = [q_layout, k_layout, v_layout];
        let (storage, dims) = match (q, k, v) {
            (CpuStorage::F32(q), CpuStorage::F32(k), CpuStorage::F32(v)) => {
                let (o, dims) = self.run([q, k, v], layouts)?;
                (CpuStorage::F32(o), dims)
            }
            (CpuStorage::F16(q), CpuStorage::F16(k), CpuStorage::F16(v)) => {
                let (o, dims) = self.run([q, k, v], layouts)?;
                (CpuStorage::F16(o), dims)
            }
            (CpuStorage::BF16(q), CpuStorage::BF16(k), CpuStorage::BF16(v)) => {
                let (o, dims) = self.run([q, k, v], layouts)?;
                (CpuStorage::BF16(o), dims)
            }
            _ => bail!("q, k and v must be F32, F16 or BF16; convert them with to_dtype"),
        };
        let Dims { batch, heads, len, dim } = dims;
        let shape = match self.options.layout {
            sparge::Layout::Hnd => (batch, heads, len, dim).into(),
            sparge::Layout::Nhd => (batch, len, heads, dim).into(),
        };
        Ok((storage, shape))
    }
}

impl SpargeOp {
    fn run<T: Element>(&self, x: [&[T]; 3], layouts: [&Layout; 3]) -> Result<(Vec<T>, Dims)> {
        let view = |i: usize, name| view(name, x[i], layouts[i], self.options.layout);
        let (q, k, v) = (view(0, "q")?, view(1, "k")?, view(2, "v")?);
        let options = AttentionOptions {
            softmax_scale: self.options.softmax_scale,
            causal: self.options.causal,
            window: self.options.window,
            sink_blocks: self.options.sink_blocks,
            element_mask: self.mask.as_ref().map(Mask::view).transpose().map_err(wrap)?,
            lengths: self.options.kv_lens.as_deref().map_or(Lengths::Full, Lengths::Keys),
            layout: self.options.layout,
            ..AttentionOptions::default()
        };
        let out = sparge::attention(&q, &k, &v, &options, &self.config).map_err(wrap)?;
        *self.stats.lock().unwrap_or_else(|e| e.into_inner()) = out.stats;
        Ok((out.o, Dims { dim: v.dims().dim, ..q.dims() }))
    }
}

/// A candle tensor where it lies.
fn view<'a, T: Element>(
    name: &str,
    data: &'a [T],
    layout: &Layout,
    order: sparge::Layout,
) -> Result<TensorView<'a, T>> {
    let (&[b, x, y, dim], &[sb, sx, sy, sd]) = (layout.dims(), layout.stride()) else {
        bail!("{name} has shape {:?}, expected 4 dimensions", layout.dims());
    };
    if sd != 1 && dim > 1 {
        bail!("{name}'s last dimension has stride {sd}, expected 1; call contiguous() on it");
    }
    let (dims, strides) = match order {
        sparge::Layout::Hnd => {
            (Dims { batch: b, heads: x, len: y, dim }, Strides { batch: sb, head: sx, token: sy })
        }
        sparge::Layout::Nhd => {
            (Dims { batch: b, heads: y, len: x, dim }, Strides { batch: sb, head: sy, token: sx })
        }
    };
    TensorView::strided(&data[layout.start_offset()..], dims, strides).map_err(wrap)
}

fn wrap(e: sparge::Error) -> candle_core::Error {
    candle_core::Error::wrap(e)
}

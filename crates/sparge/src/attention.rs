//! The pipeline, top to bottom: plan, predict, attend.

use crate::config::{AttentionOptions, QkPrecision, SpargeConfig};
use crate::cpu::{self, Qkv};
use crate::error::{Error, Result};
use crate::geometry::AttentionShape;
use crate::mask::BlockMask;
use crate::plan::Plan;
use crate::predict::predict;
use crate::quant::quantize;
use crate::stats::Stats;
use crate::tensor::{Element, TensorView};
use std::time::Instant;

/// What a call returns.
#[derive(Debug, Clone, PartialEq)]
pub struct AttentionOutput<T> {
    /// `[batch, num_qo_heads, qo_len, head_dim_v]` (or NHD, as asked), contiguous.
    pub o: Vec<T>,
    /// `[batch, num_qo_heads, qo_len]`: ln Σ exp(scaled scores) over the attended pairs, −∞ for a
    /// row that attends to nothing. Where asked for.
    pub lse: Option<Vec<f32>>,
    /// The attended blocks, where asked for.
    pub block_mask: Option<BlockMask>,
    /// What was skipped.
    pub stats: Stats,
}

/// Sparse attention: softmax(scale·q·kᵀ + mask)·v over the blocks that matter.
///
/// * `q` `[batch, num_qo_heads, qo_len, head_dim]`
/// * `k` `[batch, num_kv_heads, kv_len, head_dim]`
/// * `v` `[batch, num_kv_heads, kv_len, head_dim_v]`
///
/// of one element type (f32, f16 or bf16), with any strides ([`TensorView`]); `num_qo_heads` is a
/// multiple of `num_kv_heads`, head dimensions are 1 to 256, lengths any. The output has the
/// inputs' type. Runs on the current rayon pool; the result does not depend on its size.
///
/// ```
/// use sparge::{Alignment, AttentionOptions, Selection, SpargeConfig, TensorView, attention};
/// let (tokens, dim) = (300, 64);
/// let x: Vec<f32> = (0..4 * tokens * dim).map(|i| (i as f32 * 0.37).sin()).collect();
/// let q = TensorView::hnd(&x, [1, 4, tokens, dim])?;
/// let kv = TensorView::hnd(&x[..2 * tokens * dim], [1, 2, tokens, dim])?; // 2 heads: GQA
/// let options = AttentionOptions { causal: Some(Alignment::TopLeft), ..Default::default() };
/// let config = SpargeConfig { selection: Selection::TopK(0.5).into(), ..Default::default() };
/// let out = attention(&q, &kv, &kv, &options, &config)?;
/// assert_eq!(out.o.len(), 4 * tokens * dim);
/// println!("{:.0}% of Q·Kᵀ skipped", 100.0 * out.stats.qk_sparsity());
/// # Ok::<(), sparge::Error>(())
/// ```
///
/// # Errors
/// Any [`Error`], before anything is computed.
pub fn attention<T: Element>(
    q: &TensorView<'_, T>,
    k: &TensorView<'_, T>,
    v: &TensorView<'_, T>,
    options: &AttentionOptions<'_>,
    config: &SpargeConfig,
) -> Result<AttentionOutput<T>> {
    let plan = Plan::new(AttentionShape::of(q, k, v)?, options, config)?;
    let shape = plan.shape;
    let mut o =
        vec![T::default(); shape.batch * shape.num_qo_heads * shape.qo_len * shape.head_dim_v];
    let side = forward(&plan, q, k, v, &mut o)?;
    Ok(AttentionOutput { o, lse: side.lse, block_mask: side.block_mask, stats: side.stats })
}

/// Everything but the output tensor.
#[derive(Debug, Clone, PartialEq)]
pub struct Side {
    /// As in [`AttentionOutput`].
    pub lse: Option<Vec<f32>>,
    /// As in [`AttentionOutput`].
    pub block_mask: Option<BlockMask>,
    /// As in [`AttentionOutput`].
    pub stats: Stats,
}

/// [`attention`] with a plan made before and into a buffer of the caller's: predict, then attend.
///
/// # Errors
/// [`Error::Mismatch`] where the tensors are not of the plan's shape, [`Error::BufferTooShort`]
/// where `out` is not exactly the output's size.
pub fn forward<T: Element>(
    plan: &Plan<'_>,
    q: &TensorView<'_, T>,
    k: &TensorView<'_, T>,
    v: &TensorView<'_, T>,
    out: &mut [T],
) -> Result<Side> {
    check(plan, q, k, v, out)?;
    let start = Instant::now();
    let mask = if plan.predicts() { Some(predict(plan, q, k)?) } else { None };
    let predicted = start.elapsed();
    let mut side = attend(plan, q, k, v, mask.as_ref(), out)?;
    side.stats.predict = if mask.is_some() { predicted } else { Default::default() };
    if plan.return_mask {
        side.block_mask = Some(match mask {
            Some(mask) => mask,
            None => plan.reachable_mask()?,
        });
    }
    Ok(side)
}

/// Attention over the blocks of `mask` that the plan's own masks allow (all of those for `None`),
/// stage 2 included.
///
/// # Errors
/// As [`forward`], and [`Error::MaskShape`] where `mask` is not of [`Plan::mask_shape`].
pub fn attend<T: Element>(
    plan: &Plan<'_>,
    q: &TensorView<'_, T>,
    k: &TensorView<'_, T>,
    v: &TensorView<'_, T>,
    mask: Option<&BlockMask>,
    out: &mut [T],
) -> Result<Side> {
    check(plan, q, k, v, out)?;
    if let Some(mask) = mask.filter(|mask| mask.shape() != plan.mask_shape()) {
        let expected = plan.mask_shape();
        return Err(Error::MaskShape { name: "mask", got: mask.shape(), expected });
    }
    let shape = plan.shape;
    let rows = shape.batch * shape.num_qo_heads * shape.qo_len;
    let start = Instant::now();
    let mut lse = vec![f32::NEG_INFINITY; if plan.return_lse { rows } else { 0 }];
    let x = Qkv { q: *q, k: *k, v: *v };
    let quantized = match plan.qk {
        QkPrecision::F32 => None,
        QkPrecision::Int8 => Some(quantize(plan, k)?),
    };
    let mut stats = cpu::attend(plan, &x, quantized.as_ref(), mask, out, &mut lse);
    stats.attend = start.elapsed();
    Ok(Side { lse: plan.return_lse.then_some(lse), block_mask: None, stats })
}

/// Refuses tensors and outputs that are not the plan's.
fn check<T: Element>(
    plan: &Plan<'_>,
    q: &TensorView<'_, T>,
    k: &TensorView<'_, T>,
    v: &TensorView<'_, T>,
    out: &[T],
) -> Result<()> {
    plan.check_shape(&AttentionShape::of(q, k, v)?)?;
    let s = &plan.shape;
    let needed = s.batch * s.num_qo_heads * s.qo_len * s.head_dim_v;
    if out.len() != needed {
        return Err(Error::BufferTooShort { tensor: "out", got: out.len(), needed });
    }
    Ok(())
}

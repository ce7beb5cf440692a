//! The verbs on CPU tensors.
#![expect(unsafe_code, reason = "addresses become slices; tensor.rs states what is trusted")]

use crate::errors::{SpargeError, refused};
use crate::settings::Settings;
use crate::tensor::{Raw, Views, slice, slice_mut};
use crate::threads::pool;
use half::{bf16, f16};
use pyo3::prelude::*;
use sparge::policy;
use sparge::{
    AttentionOptions, AttentionShape, BLOCK_KV, BLOCK_Q, BlockMask, Element, ElementMask, Layout,
    Lengths, Plan, Selection, Side,
};
use std::ops::Range;
use std::sync::OnceLock;

/// Tensors beside q, k and v. All are on the CPU; addresses of 0 stand for none.
#[derive(Debug, FromPyObject)]
pub(crate) struct Extra {
    /// `[batch|1, heads|1, qo_len, kv_len]`, bool.
    #[pyo3(item)]
    bool_mask: Option<Raw>,
    /// The same shape, f32, added to the scores.
    #[pyo3(item)]
    bias: Option<Raw>,
    /// `[batch|1, heads|1, q_blocks, kv_blocks]`, contiguous bytes.
    #[pyo3(item)]
    block_mask: Option<Raw>,
    /// Valid keys of each batch entry.
    #[pyo3(item)]
    kv_lens: Option<Vec<usize>>,
    /// `[batch, heads, qo_len]`, f32, written.
    #[pyo3(item)]
    lse: usize,
    /// `[batch, heads, q_blocks, kv_blocks]` bytes, written: the attended blocks.
    #[pyo3(item)]
    mask_out: usize,
    /// `[batch, heads, 4]`, i64, written: reachable and computed blocks, reachable and computed
    /// groups.
    #[pyo3(item)]
    counts: usize,
}

/// Attention on CPU tensors into `out` (contiguous, the settings' layout). Returns the seconds
/// spent in stage 1 and in attending.
///
/// The caller promises that every address is valid for its shape, strides and `dtype`, that `out`
/// and the written extras overlap nothing else, and that all of it lives until the return.
#[pyfunction]
#[pyo3(signature = (settings, dtype, threads, q, k, v, out, extra=None))]
#[expect(clippy::too_many_arguments, reason = "positional integers are the fast way from Python")]
pub(crate) fn attend(
    py: Python<'_>,
    settings: &Settings,
    dtype: &str,
    threads: usize,
    q: Raw,
    k: Raw,
    v: Raw,
    out: usize,
    extra: Option<Extra>,
) -> PyResult<(f64, f64)> {
    settings.check_for_cpu()?;
    let call = Call { settings, q, k, v, extra, threads, bools: OnceLock::new() };
    py.detach(|| match dtype {
        "f32" => call.attend::<f32>(out),
        "f16" => call.attend::<f16>(out),
        "bf16" => call.attend::<bf16>(out),
        _ => Err(unsupported(dtype)),
    })
}

/// Stage 1 alone: writes `[batch, heads, q_blocks, kv_blocks]` bytes to `extra["mask_out"]`.
#[pyfunction]
pub(crate) fn predict(
    py: Python<'_>,
    settings: &Settings,
    dtype: &str,
    threads: usize,
    q: Raw,
    k: Raw,
    extra: Extra,
) -> PyResult<()> {
    settings.check_for_cpu()?;
    let bools = OnceLock::new();
    let call = Call { settings, q, k, v: k, extra: Some(extra), threads, bools };
    py.detach(|| match dtype {
        "f32" => call.predict::<f32>(),
        "f16" => call.predict::<f16>(),
        "bf16" => call.predict::<bf16>(),
        _ => Err(unsupported(dtype)),
    })
}

/// int8 keys: writes `[batch, kv_heads, kv_len, head_dim]` i8 values, `[batch, kv_heads, kv_len]`
/// f32 scales and `[batch, kv_heads, kv_blocks, head_dim]` f32 block means.
#[pyfunction]
pub(crate) fn quantize(
    py: Python<'_>,
    dtype: &str,
    layout: &str,
    threads: usize,
    k: Raw,
    out: (usize, usize, usize),
) -> PyResult<()> {
    let layout = if layout == "NHD" { Layout::Nhd } else { Layout::Hnd };
    py.detach(|| match dtype {
        "f32" => quantized::<f32>(layout, threads, &k, out),
        "f16" => quantized::<f16>(layout, threads, &k, out),
        "bf16" => quantized::<bf16>(layout, threads, &k, out),
        _ => Err(unsupported(dtype)),
    })
}

fn unsupported(dtype: &str) -> PyErr {
    SpargeError::new_err(format!("dtype is {dtype:?}, expected f32, f16 or bf16"))
}

struct Call<'a> {
    settings: &'a Settings,
    q: Raw,
    k: Raw,
    v: Raw,
    extra: Option<Extra>,
    threads: usize,
    /// The bool mask, where its bytes are not Rust's bools.
    bools: OnceLock<Vec<bool>>,
}

impl Call<'_> {
    fn attend<T: Element>(&self, out: usize) -> PyResult<(f64, f64)> {
        // SAFETY: the Python side's promise, stated at `attend`.
        let x = unsafe { Views::<T>::new(&self.q, &self.k, &self.v, self.settings.layout)? };
        let block_mask = self.block_mask()?;
        let options = self.options(block_mask.as_ref())?;
        let plan = self.plan(AttentionShape::of(&x.q, &x.k, &x.v), &options)?;
        let shape = *plan.shape();
        let rows = shape.batch * shape.num_qo_heads * shape.qo_len;
        // SAFETY: as above: `out` is exactly the output.
        let out = unsafe { slice_mut::<T>(out, rows * shape.head_dim_v) };
        // One query block is one job: it runs here, without waking anybody.
        let is_tiny = rows <= BLOCK_Q && shape.kv_len < Selection::AUTO_MIN_LEN;
        let side = if is_tiny && self.settings.is_dense() {
            self.run(&plan, &x, out)
        } else {
            pool(self.threads)?.install(|| self.run(&plan, &x, out))
        };
        let side = side.map_err(refused)?;
        self.write(&plan, &side, rows)?;
        Ok((side.stats.predict.as_secs_f64(), side.stats.attend.as_secs_f64()))
    }

    fn run<T: Element>(
        &self,
        plan: &Plan<'_>,
        x: &Views<'_, T>,
        out: &mut [T],
    ) -> sparge::Result<Side> {
        match &self.settings.policy {
            _ if self.settings.keeps_more() => {}
            Some(policy) => return policy::forward(plan, &x.q, &x.k, &x.v, policy, out),
            None => return sparge::forward(plan, &x.q, &x.k, &x.v, out),
        }
        let start = std::time::Instant::now();
        let mask = self.predicted(plan, x)?;
        let predicted = start.elapsed();
        let mut side = sparge::attend(plan, &x.q, &x.k, &x.v, Some(&mask), out)?;
        side.stats.predict = predicted;
        side.block_mask = Some(mask);
        Ok(side)
    }

    /// The chosen blocks and those that are always kept.
    fn predicted<T: Element>(
        &self,
        plan: &Plan<'_>,
        x: &Views<'_, T>,
    ) -> sparge::Result<BlockMask> {
        let mut mask = match &self.settings.policy {
            Some(policy) => policy::predict(plan, &x.q, &x.k, policy)?,
            None => sparge::predict(plan, &x.q, &x.k)?,
        };
        let [sequences, heads, q_blocks, kv_blocks] = mask.shape();
        let blocks = |tokens: &[Range<usize>], size: usize, count: usize| -> Vec<usize> {
            let of = |x: &Range<usize>| x.start / size..x.end.div_ceil(size).min(count);
            tokens.iter().flat_map(of).collect()
        };
        let columns = blocks(&self.settings.keep_keys, BLOCK_KV, kv_blocks);
        let rows = blocks(&self.settings.keep_queries, BLOCK_Q, q_blocks);
        for sequence in 0..sequences {
            for head in 0..heads {
                let mut set = |i, j| mask.set(sequence, head, i, j);
                (0..q_blocks).for_each(|i| columns.iter().for_each(|&j| set(i, j)));
                rows.iter().for_each(|&i| (0..kv_blocks).for_each(|j| set(i, j)));
            }
        }
        Ok(mask)
    }

    fn predict<T: Element>(&self) -> PyResult<()> {
        // SAFETY: the Python side's promise, stated at `attend`.
        let x = unsafe { Views::<T>::new(&self.q, &self.k, &self.v, self.settings.layout)? };
        let block_mask = self.block_mask()?;
        let options = self.options(block_mask.as_ref())?;
        let plan = self.plan(AttentionShape::of(&x.q, &x.k, &x.v), &options)?;
        let mask = pool(self.threads)?.install(|| self.predicted(&plan, &x)).map_err(refused)?;
        self.write_mask(&mask);
        Ok(())
    }

    fn options<'p>(&'p self, block_mask: Option<&'p BlockMask>) -> PyResult<AttentionOptions<'p>> {
        let extra = self.extra.as_ref();
        let lens = extra.and_then(|extra| extra.kv_lens.as_deref());
        Ok(AttentionOptions {
            block_mask,
            element_mask: self.element_mask()?,
            lengths: lens.map_or(Lengths::Full, Lengths::Keys),
            return_lse: extra.is_some_and(|extra| extra.lse != 0),
            return_mask: extra.is_some_and(|extra| extra.mask_out != 0),
            ..self.settings.options()
        })
    }

    fn plan<'p>(
        &'p self,
        shape: sparge::Result<AttentionShape>,
        options: &AttentionOptions<'p>,
    ) -> PyResult<Plan<'p>> {
        Plan::new(shape.map_err(refused)?, options, &self.settings.config).map_err(refused)
    }

    fn element_mask(&self) -> PyResult<Option<ElementMask<'_>>> {
        let Some(extra) = &self.extra else { return Ok(None) };
        // SAFETY: the Python side's promise.
        unsafe {
            Ok(match (&extra.bool_mask, &extra.bias) {
                (Some(mask), _) => {
                    let mask = mask.bools("attn_mask", Layout::Hnd, &self.bools)?;
                    Some(ElementMask::Bool(mask))
                }
                (_, Some(bias)) => {
                    Some(ElementMask::Additive(bias.view("attn_mask", Layout::Hnd)?))
                }
                (None, None) => None,
            })
        }
    }

    fn block_mask(&self) -> PyResult<Option<BlockMask>> {
        let Some(raw) = self.extra.as_ref().and_then(|extra| extra.block_mask) else {
            return Ok(None);
        };
        let dims = raw.dims(Layout::Hnd);
        let shape = [dims.batch, dims.heads, dims.len, dims.dim];
        let len = shape.iter().try_fold(1usize, |a, &b| a.checked_mul(b));
        let len = len.ok_or_else(|| refused(sparge::Error::Overflow { tensor: "block_mask" }))?;
        // SAFETY: the Python side's promise.
        let bytes = unsafe { slice::<u8>(raw.address(), len) };
        BlockMask::from_bytes(shape, bytes).map(Some).map_err(refused)
    }

    fn write(&self, plan: &Plan<'_>, side: &Side, rows: usize) -> PyResult<()> {
        let Some(extra) = &self.extra else { return Ok(()) };
        // SAFETY (all three): the Python side's promise about the sizes of what is written.
        if let Some(lse) = side.lse.as_ref().filter(|_| extra.lse != 0) {
            // SAFETY: see above.
            unsafe { slice_mut::<f32>(extra.lse, rows) }.copy_from_slice(lse);
        }
        if let Some(mask) = side.block_mask.as_ref().filter(|_| extra.mask_out != 0) {
            self.write_mask(mask);
        }
        if extra.counts != 0 {
            let [sequences, heads, _, _] = plan.mask_shape();
            // SAFETY: see above.
            let to = unsafe { slice_mut::<i64>(extra.counts, sequences * heads * 4) };
            for (to, head) in to.chunks_exact_mut(4).zip(side.stats.heads()) {
                let counts =
                    [head.reachable_blocks, head.qk_blocks, head.reachable_groups, head.pv_groups];
                to.copy_from_slice(&counts.map(|x| x as i64));
            }
        }
        Ok(())
    }

    fn write_mask(&self, mask: &BlockMask) {
        let Some(to) = self.extra.as_ref().map(|extra| extra.mask_out).filter(|&to| to != 0) else {
            return;
        };
        let bytes = mask.to_bytes();
        // SAFETY: the Python side's promise: a byte per block of the plan's mask shape.
        unsafe { slice_mut::<u8>(to, bytes.len()) }.copy_from_slice(&bytes);
    }
}

fn quantized<T: Element>(
    layout: Layout,
    threads: usize,
    k: &Raw,
    (values, scales, means): (usize, usize, usize),
) -> PyResult<()> {
    // SAFETY: the Python side's promise, stated at `attend`.
    let view = unsafe { k.view::<T>("key", layout)? };
    let shape = AttentionShape::of(&view, &view, &view).map_err(refused)?;
    let plan =
        Plan::new(shape, &AttentionOptions::default(), &Default::default()).map_err(refused)?;
    let keys = pool(threads)?.install(|| sparge::quantize(&plan, &view)).map_err(refused)?;
    let (dim, len) = (shape.head_dim, shape.kv_len);
    let heads = shape.batch * shape.num_kv_heads;
    let blocks = len.div_ceil(BLOCK_KV);
    // SAFETY: as above: sizes are stated at `quantize`.
    let (values, scales, means) = unsafe {
        (
            slice_mut::<i8>(values, heads * len * dim),
            slice_mut::<f32>(scales, heads * len),
            slice_mut::<f32>(means, heads * blocks * dim),
        )
    };
    for head in 0..heads {
        for token in 0..len {
            let (sequence, kv_head) = (head / shape.num_kv_heads, head % shape.num_kv_heads);
            let (row, scale, mean) = keys.key(sequence, kv_head, token);
            let at = head * len + token;
            values[at * dim..][..dim].copy_from_slice(row);
            scales[at] = scale;
            let at = head * blocks + token / BLOCK_KV;
            means[at * dim..][..dim].copy_from_slice(mean);
        }
    }
    Ok(())
}

//! The trait through which a model's layers reach an attention implementation, and a plain one.

use rayon::prelude::*;

use crate::error::{Error, Result};
use crate::simd;

/// A read-only `[heads, len, head_dim]` tensor in a slice: unit stride in `head_dim`, any other strides.
///
/// Queries come token-major as the projections leave them, keys and values are windows of the cache's
/// `[num_kv_heads, capacity, head_dim]`; nothing is copied to make a view.
#[derive(Debug, Clone, Copy)]
pub struct HeadsView<'a> {
    data: &'a [f32],
    heads: usize,
    len: usize,
    head_dim: usize,
    head_stride: usize,
    token_stride: usize,
}

/// As [`HeadsView`], to be written.
#[derive(Debug)]
pub struct HeadsViewMut<'a> {
    data: &'a mut [f32],
    heads: usize,
    len: usize,
    head_dim: usize,
    head_stride: usize,
    token_stride: usize,
}

/// Elements a view reaches; `None` for an impossible one.
fn extent(
    [heads, len, head_dim]: [usize; 3],
    [head_stride, token_stride]: [usize; 2],
) -> Option<usize> {
    if heads == 0 || len == 0 || head_dim == 0 || token_stride < head_dim {
        return None;
    }
    let heads = (heads - 1).checked_mul(head_stride)?;
    let tokens = (len - 1).checked_mul(token_stride)?;
    heads.checked_add(tokens)?.checked_add(head_dim)
}

fn check(have: usize, shape: [usize; 3], strides: [usize; 2]) -> Result<()> {
    match extent(shape, strides) {
        Some(needed) if needed <= have => Ok(()),
        needed => Err(Error::Argument(format!(
            "a view of shape {shape:?} (heads, len, head_dim) with strides {strides:?} (head, token) needs \
             {needed:?} elements, the slice has {have}"
        ))),
    }
}

impl<'a> HeadsView<'a> {
    /// A view of `shape` = [heads, len, head_dim] with `strides` = [head, token], in elements.
    pub fn new(data: &'a [f32], shape: [usize; 3], strides: [usize; 2]) -> Result<Self> {
        check(data.len(), shape, strides)?;
        let ([heads, len, head_dim], [head_stride, token_stride]) = (shape, strides);
        Ok(Self { data, heads, len, head_dim, head_stride, token_stride })
    }

    /// The slice; element (h, t, i) is at `h·head_stride + t·token_stride + i`.
    pub fn data(&self) -> &'a [f32] {
        self.data
    }

    /// [heads, len, head_dim].
    pub fn shape(&self) -> [usize; 3] {
        [self.heads, self.len, self.head_dim]
    }

    /// [head_stride, token_stride], in elements.
    pub fn strides(&self) -> [usize; 2] {
        [self.head_stride, self.token_stride]
    }

    /// One head's vector of one token.
    pub fn row(&self, head: usize, token: usize) -> &'a [f32] {
        let at = head * self.head_stride + token * self.token_stride;
        &self.data[at..at + self.head_dim]
    }
}

impl<'a> HeadsViewMut<'a> {
    /// A view of `shape` = [heads, len, head_dim] with `strides` = [head, token], in elements.
    /// The rows must not overlap.
    pub fn new(data: &'a mut [f32], shape: [usize; 3], strides: [usize; 2]) -> Result<Self> {
        check(data.len(), shape, strides)?;
        let ([heads, len, head_dim], [head_stride, token_stride]) = (shape, strides);
        let disjoint = head_stride >= token_stride.saturating_mul(len)
            || token_stride >= head_stride.saturating_mul(heads);
        if !disjoint || head_stride < head_dim {
            return Err(Error::Argument(format!(
                "an output view of shape {shape:?} with strides {strides:?} has overlapping rows"
            )));
        }
        Ok(Self { data, heads, len, head_dim, head_stride, token_stride })
    }

    /// The slice; element (h, t, i) is at `h·head_stride + t·token_stride + i`.
    pub fn data(&mut self) -> &mut [f32] {
        self.data
    }

    /// [heads, len, head_dim].
    pub fn shape(&self) -> [usize; 3] {
        [self.heads, self.len, self.head_dim]
    }

    /// [head_stride, token_stride], in elements.
    pub fn strides(&self) -> [usize; 2] {
        [self.head_stride, self.token_stride]
    }
}

/// One layer's attention over the tokens that have just entered the cache.
///
/// Causal with bottom-right alignment: query `i` of `qo_len` sees the keys `0..= kv_len − qo_len + i`.
/// Query head `h` reads key/value head `h / (num_qo_heads / num_kv_heads)`.
#[derive(Debug)]
pub struct AttentionCall<'a> {
    /// The layer, from 0.
    pub layer: usize,
    /// Queries `[num_qo_heads, qo_len, head_dim]`, token-major.
    pub q: HeadsView<'a>,
    /// All keys so far `[num_kv_heads, kv_len, head_dim]`, head-major, strided by the cache's capacity.
    pub k: HeadsView<'a>,
    /// All values so far, as `k`.
    pub v: HeadsView<'a>,
    /// Output `[num_qo_heads, qo_len, head_dim]`, token-major. To be written completely.
    pub out: HeadsViewMut<'a>,
    /// Factor on QKᵀ: 1/√head_dim.
    pub softmax_scale: f32,
}

/// An attention implementation; it may keep statistics, and per-layer settings by `call.layer`.
pub trait Attention {
    /// Computes `call.out` from q, k and v.
    fn attend(
        &mut self,
        call: AttentionCall<'_>,
    ) -> Result<(), Box<dyn std::error::Error + Send + Sync>>;
}

/// Exact attention, one query row at a time: the yardstick for tests and the path for single tokens.
#[derive(Debug, Clone, Copy, Default)]
pub struct DenseReference;

impl Attention for DenseReference {
    fn attend(
        &mut self,
        call: AttentionCall<'_>,
    ) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
        let AttentionCall { q, k, v, mut out, softmax_scale, .. } = call;
        let [num_qo_heads, qo_len, head_dim] = q.shape();
        let [num_kv_heads, kv_len, _] = k.shape();
        let group = num_qo_heads / num_kv_heads;
        let [head_stride, token_stride] = out.strides();
        // Independent rows in parallel, then laid out: the copy is nothing beside the arithmetic.
        let rows: Vec<Vec<f32>> = (0..num_qo_heads * qo_len)
            .into_par_iter()
            .map(|job| {
                let (head, token) = (job % num_qo_heads, job / num_qo_heads);
                let (query, kv_head) = (q.row(head, token), head / group);
                let seen = kv_len - qo_len + token + 1;
                let mut p: Vec<f32> = (0..seen)
                    .map(|j| simd::dot(query, k.row(kv_head, j)) * softmax_scale)
                    .collect();
                let max = p.iter().copied().fold(f32::NEG_INFINITY, f32::max);
                let mut sum = 0.0;
                for p in &mut p {
                    *p = (*p - max).exp();
                    sum += *p;
                }
                let mut o = vec![0.0; head_dim];
                for (j, p) in p.iter().enumerate() {
                    simd::axpy(p / sum, v.row(kv_head, j), &mut o);
                }
                o
            })
            .collect();
        for (job, row) in rows.iter().enumerate() {
            let at = (job % num_qo_heads) * head_stride + (job / num_qo_heads) * token_stride;
            out.data()[at..at + head_dim].copy_from_slice(row);
        }
        Ok(())
    }
}

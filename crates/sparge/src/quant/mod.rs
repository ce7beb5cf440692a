//! int8 keys and queries, as in SageAttention: smooth, scale, round.

use crate::cpu::{QuantizedRows, Rows};
use crate::error::Result;
use crate::geometry::{AttentionShape, BLOCK_KV};
use crate::plan::Plan;
use crate::tensor::{Element, TensorView};
use rayon::prelude::*;

/// The keys of a call in int8.
///
/// Key j of block B is stored as round((k_j − μ_B)/δ_j): μ_B is the block's own mean (finer than
/// the paper's mean over the sequence, and blind to later tokens; the scores get q·μ_B back in
/// f32), δ_j = max|k_j − μ_B|/127 the key's own scale.
#[derive(Debug, Clone)]
pub struct Quantized {
    /// `[sequence][kv_head]`.
    heads: Vec<QuantizedHead>,
    num_kv_heads: usize,
}

#[derive(Debug, Clone)]
struct QuantizedHead {
    len: usize,
    dim: usize,
    /// `dim` rounded up to a multiple of four; the rest is zero.
    stride: usize,
    /// `[kv_len][stride]`.
    data: Vec<i8>,
    scales: Vec<f32>,
    sums: Vec<i32>,
    /// `[kv_blocks][dim]`.
    means: Vec<f32>,
    /// Per block: all keys are finite.
    is_finite: Vec<bool>,
}

impl Quantized {
    /// Key `token` of a head: its int8 values, its scale δ and the mean μ of its block, so that
    /// k ≈ δ·values + μ.
    ///
    /// # Panics
    /// Where an index is out of range.
    #[must_use]
    pub fn key(&self, sequence: usize, kv_head: usize, token: usize) -> (&[i8], f32, &[f32]) {
        let head = &self.heads[sequence * self.num_kv_heads + kv_head];
        (
            &head.data[token * head.stride..][..head.dim],
            head.scales[token],
            &head.means[token / BLOCK_KV * head.dim..][..head.dim],
        )
    }

    /// A key block for the kernels, with its mean; `None` where it holds a NaN or an infinity,
    /// which int8 cannot carry.
    pub(crate) fn block(
        &self,
        sequence: usize,
        kv_head: usize,
        block: usize,
    ) -> Option<(QuantizedRows<'_>, Rows<'_>)> {
        let head = &self.heads[sequence * self.num_kv_heads + kv_head];
        if !head.is_finite[block] {
            return None;
        }
        let keys = block * BLOCK_KV..((block + 1) * BLOCK_KV).min(head.len);
        let rows = Rows {
            data: &head.data[keys.start * head.stride..],
            stride: head.stride,
            len: keys.len(),
            dim: head.stride,
        };
        let (scales, sums) = (&head.scales[keys.clone()], &head.sums[keys]);
        let mean =
            Rows { data: &head.means[block * head.dim..], stride: head.dim, len: 1, dim: head.dim };
        Some((QuantizedRows { rows, scales, sums }, mean))
    }
}

/// Quantises the keys of a call.
///
/// # Errors
/// [`crate::Error::Mismatch`] where `k` is not of the plan's shape.
pub fn quantize<T: Element>(plan: &Plan<'_>, k: &TensorView<'_, T>) -> Result<Quantized> {
    let got = k.dims();
    let num_kv_heads = plan.shape.num_kv_heads;
    plan.check_shape(&AttentionShape {
        batch: got.batch,
        num_kv_heads: got.heads,
        kv_len: got.len,
        head_dim: got.dim,
        ..plan.shape
    })?;
    let heads = (0..plan.sequences.len() * num_kv_heads)
        .into_par_iter()
        .map(|i| quantize_head(plan, k, i / num_kv_heads, i % num_kv_heads))
        .collect();
    Ok(Quantized { heads, num_kv_heads })
}

fn quantize_head<T: Element>(
    plan: &Plan<'_>,
    k: &TensorView<'_, T>,
    sequence: usize,
    kv_head: usize,
) -> QuantizedHead {
    let seq = plan.sequences[sequence];
    let dim = plan.shape.head_dim;
    let stride = dim.next_multiple_of(4);
    let mut head = QuantizedHead {
        len: seq.kv_len,
        dim,
        stride,
        data: vec![0; seq.kv_len * stride],
        scales: vec![0.0; seq.kv_len],
        sums: vec![0; seq.kv_len],
        means: vec![0.0; seq.kv_blocks() * dim],
        is_finite: Vec::with_capacity(seq.kv_blocks()),
    };
    let mut tile = vec![0.0; BLOCK_KV * dim];
    for (block, mean) in head.means.chunks_exact_mut(dim).enumerate() {
        let keys = seq.kv_block(block);
        let tile = &mut tile[..keys.len() * dim];
        for (row, token) in tile.chunks_exact_mut(dim).zip(keys.clone()) {
            T::widen(k.row(seq.batch, kv_head, seq.kv_start + token), row);
            mean.iter_mut().zip(row.iter()).for_each(|(m, x)| *m += x);
        }
        mean.iter_mut().for_each(|m| *m /= keys.len() as f32);
        for (row, token) in tile.chunks_exact_mut(dim).zip(keys) {
            row.iter_mut().zip(mean.iter()).for_each(|(x, m)| *x -= m);
            let out = &mut head.data[token * stride..][..dim];
            head.scales[token] = quantize_row(row, out);
            head.sums[token] = out.iter().map(|&x| i32::from(x)).sum();
        }
        head.is_finite.push(tile.iter().all(|x| x.is_finite()));
    }
    head
}

/// Rounds a row to int8 and returns its scale: x ≈ scale·out. A row with a NaN or an infinity
/// becomes zeros with a NaN scale, which makes its scores NaN.
pub(crate) fn quantize_row(row: &[f32], out: &mut [i8]) -> f32 {
    let max = row.iter().fold(0.0f32, |m, x| m.max(x.abs()));
    let is_finite = row.iter().all(|x| x.is_finite());
    if max == 0.0 || !is_finite {
        out.fill(0);
        return if is_finite { 0.0 } else { f32::NAN };
    }
    let inverse = 127.0 / max;
    for (out, x) in out.iter_mut().zip(row) {
        *out = (x * inverse).round_ties_even() as i8;
    }
    max / 127.0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_round_to_nearest_and_keep_their_sign() {
        let mut out = [0i8; 4];
        let scale = quantize_row(&[1.0, -0.5, 0.0, 0.004], &mut out);
        assert_eq!(out, [127, -64, 0, 1]);
        assert!((scale - 1.0 / 127.0).abs() < 1e-9);
        assert_eq!(quantize_row(&[0.0; 4], &mut out), 0.0);
        assert!(quantize_row(&[0.0, f32::NAN, 1.0, 2.0], &mut out).is_nan());
        assert_eq!(out, [0; 4]);
        assert!(quantize_row(&[f32::NAN; 4], &mut out).is_nan());
    }
}

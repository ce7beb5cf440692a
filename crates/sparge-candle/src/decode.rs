//! Attention of a single token: dense, bound by reading the cache once.
//!
//! The query heads of a group read the same keys, so they go through the operator as rows of one
//! head: the keys are read once for all of them. And keys are cut into chunks that run as sequences
//! of their own, so that a few key/value heads keep all threads busy; the parts are put together by
//! their log-sum-exp (as in flash decoding). The cuts do not depend on the number of threads, so
//! neither does the result.

use sparge::{
    AttentionOptions, AttentionShape, Dims, Lengths, Plan, SpargeConfig, Strides, TensorView,
    forward,
};

use crate::attention::{AttentionCall, HeadsView};

/// Keys that run together.
const CHUNK: usize = 1024;

/// Computes `call.out` exactly. `call` has one query token.
pub(crate) fn decode(call: &mut AttentionCall<'_>, config: &SpargeConfig) -> sparge::Result<()> {
    let [num_qo_heads, _, dim] = call.q.shape();
    let [num_kv_heads, kv_len, _] = call.k.shape();
    let (group, chunks) = (num_qo_heads / num_kv_heads, kv_len.div_ceil(CHUNK));
    let rows = chunks * group;

    // [num_kv_heads, chunks × group, dim]: every chunk has the group's queries.
    let mut q = Vec::with_capacity(num_kv_heads * rows * dim);
    for kv_head in 0..num_kv_heads {
        for _ in 0..chunks {
            (0..group).for_each(|i| q.extend_from_slice(call.q.row(kv_head * group + i, 0)));
        }
    }
    let cu_seqlens_q: Vec<usize> = (0..=chunks).map(|chunk| chunk * group).collect();
    let cu_seqlens_k: Vec<usize> = (0..=chunks).map(|chunk| (chunk * CHUNK).min(kv_len)).collect();
    let options = AttentionOptions {
        softmax_scale: Some(f64::from(call.softmax_scale)),
        lengths: Lengths::Packed { cu_seqlens_q: &cu_seqlens_q, cu_seqlens_k: &cu_seqlens_k },
        return_lse: true,
        ..AttentionOptions::default()
    };
    let (k, v) = (view(&call.k)?, view(&call.v)?);
    let q = TensorView::hnd(&q, [1, num_kv_heads, rows, dim])?;
    let plan = Plan::new(AttentionShape::of(&q, &k, &v)?, &options, config)?;
    let mut parts = vec![0.0; num_kv_heads * rows * dim];
    let side = forward(&plan, &q, &k, &v, &mut parts)?;
    let lse = side.lse.unwrap_or_default();

    let [head_stride, _] = call.out.strides();
    for head in 0..num_qo_heads {
        let part = |chunk: usize| (head / group) * rows + chunk * group + head % group;
        let max = (0..chunks).map(|c| lse[part(c)]).fold(f32::NEG_INFINITY, f32::max);
        let weights: Vec<f32> = (0..chunks).map(|c| (lse[part(c)] - max).exp()).collect();
        let total: f32 = weights.iter().sum();
        let out = &mut call.out.data()[head * head_stride..][..dim];
        out.fill(0.0);
        for (chunk, weight) in weights.iter().enumerate() {
            let part = &parts[part(chunk) * dim..][..dim];
            out.iter_mut().zip(part).for_each(|(o, &x)| *o += weight / total * x);
        }
    }
    Ok(())
}

/// The operator's view of a model's tensor.
pub(crate) fn view<'a>(x: &HeadsView<'a>) -> sparge::Result<TensorView<'a, f32>> {
    let ([heads, len, dim], [head, token]) = (x.shape(), x.strides());
    TensorView::strided(
        x.data(),
        Dims { batch: 1, heads, len, dim },
        Strides { batch: 0, head, token },
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::attention::{Attention, DenseReference, HeadsViewMut};
    use sparge::testing::structured;

    #[test]
    fn agrees_with_one_row_at_a_time() {
        let (num_qo_heads, num_kv_heads, dim) = (6, 2, 32);
        for kv_len in [1, 63, CHUNK, CHUNK + 1, 2 * CHUNK + 500] {
            let q = structured(1, num_qo_heads, 1, dim);
            let (k, v) = (
                structured(2, num_kv_heads, kv_len, dim),
                structured(3, num_kv_heads, kv_len, dim),
            );
            let kv =
                |x| HeadsView::new(x, [num_kv_heads, kv_len, dim], [kv_len * dim, dim]).unwrap();
            let run = |attend: &mut dyn FnMut(&mut AttentionCall<'_>)| {
                let mut out = vec![f32::NAN; num_qo_heads * dim];
                attend(&mut AttentionCall {
                    layer: 0,
                    q: HeadsView::new(&q, [num_qo_heads, 1, dim], [dim, num_qo_heads * dim])
                        .unwrap(),
                    k: kv(&k),
                    v: kv(&v),
                    out: HeadsViewMut::new(
                        &mut out,
                        [num_qo_heads, 1, dim],
                        [dim, num_qo_heads * dim],
                    )
                    .unwrap(),
                    softmax_scale: 0.2,
                });
                out
            };
            let ours = run(&mut |call| decode(call, &SpargeConfig::dense()).unwrap());
            let exact = run(&mut |call| {
                let out = call.out.strides();
                let AttentionCall { layer, q, k, v, softmax_scale, .. } = *call;
                let shape = call.out.shape();
                let out = HeadsViewMut::new(call.out.data(), shape, out).unwrap();
                let call = AttentionCall { layer, q, k, v, out, softmax_scale };
                DenseReference.attend(call).unwrap();
            });
            for (a, b) in ours.iter().zip(&exact) {
                assert!((a - b).abs() < 1e-5, "{kv_len}: {a} {b}");
            }
        }
    }
}

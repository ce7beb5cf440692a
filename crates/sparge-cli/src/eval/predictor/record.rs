//! Queries, keys and values of some layers, kept while a model reads.

use crate::error::Result;
use sparge::{Isa, SpargeConfig, TensorView};
use sparge_candle::SpargeAttention;
use sparge_candle::attention::{Attention, AttentionCall, HeadsView};

/// Dense attention that keeps what it is given in some layers.
pub(super) struct Recorder {
    inner: SpargeAttention,
    wanted: Vec<usize>,
    /// Per wanted layer: q, k, v, each `[head][len · dim]`.
    kept: Vec<[Vec<Vec<f32>>; 3]>,
    scale: f64,
    dim: usize,
}

/// One layer's tensors, `[1, heads, len, dim]`, contiguous.
pub(super) struct Layer {
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
    len: usize,
    dim: usize,
    /// Factor on q·k.
    pub(super) scale: f64,
}

impl Layer {
    /// q, k and v for the operator.
    pub(super) fn views(&self) -> Result<[TensorView<'_, f32>; 3]> {
        let per_head = self.len * self.dim;
        let shape = |x: &[f32]| [1, x.len() / per_head.max(1), self.len, self.dim];
        Ok([
            TensorView::hnd(&self.q, shape(&self.q))?,
            TensorView::hnd(&self.k, shape(&self.k))?,
            TensorView::hnd(&self.v, shape(&self.v))?,
        ])
    }

    /// One query head's queries, keys and values, row after row.
    pub(super) fn head(&self, head: usize) -> [&[f32]; 3] {
        let per_head = self.len * self.dim;
        let group = self.q.len() / self.k.len();
        let of = |head: usize| head * per_head..(head + 1) * per_head;
        [&self.q[of(head)], &self.k[of(head / group)], &self.v[of(head / group)]]
    }

    /// Elements of a head.
    pub(super) fn dim(&self) -> usize {
        self.dim
    }
}

impl Recorder {
    /// Keeps the layers `wanted`.
    pub(super) fn new(wanted: &[usize], isa: Option<Isa>) -> Self {
        Self {
            inner: SpargeAttention::new(SpargeConfig { isa, ..SpargeConfig::dense() }),
            wanted: wanted.to_vec(),
            kept: vec![Default::default(); wanted.len()],
            scale: 1.0,
            dim: 0,
        }
    }

    /// What was kept, in the order of `wanted`.
    pub(super) fn into_layers(self) -> Vec<Layer> {
        let (scale, dim) = (self.scale, self.dim);
        self.kept
            .into_iter()
            .map(|[q, k, v]| Layer {
                len: q.first().map_or(0, Vec::len) / dim.max(1),
                q: q.concat(),
                k: k.concat(),
                v: v.concat(),
                dim,
                scale,
            })
            .collect()
    }
}

/// Appends the last `len` tokens of every head.
fn append(kept: &mut Vec<Vec<f32>>, x: &HeadsView<'_>, len: usize) {
    let [heads, all, _] = x.shape();
    kept.resize(heads, Vec::new());
    for (head, kept) in kept.iter_mut().enumerate() {
        (all - len..all).for_each(|i| kept.extend(x.row(head, i)));
    }
}

impl Attention for Recorder {
    fn attend(
        &mut self,
        call: AttentionCall<'_>,
    ) -> std::result::Result<(), Box<dyn std::error::Error + Send + Sync>> {
        let [_, len, dim] = call.q.shape();
        (self.scale, self.dim) = (f64::from(call.softmax_scale), dim);
        for (wanted, [q, k, v]) in self.wanted.iter().zip(&mut self.kept) {
            if *wanted == call.layer {
                append(q, &call.q, len);
                append(k, &call.k, len);
                append(v, &call.v, len);
            }
        }
        self.inner.attend(call)
    }
}

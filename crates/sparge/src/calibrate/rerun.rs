//! Chosen settings through the real operator.

use super::file::Measured;
use crate::attention::attention;
use crate::config::{AttentionOptions, SpargeConfig};
use crate::error::{Error, Result};
use crate::stats::HeadStats;
use crate::tensor::{Element, Layout, TensorView};
use serde::{Deserialize, Serialize};

/// What a setting did to one head. Runs of several calls add up.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
pub struct HeadRun {
    /// Σ|O − O′|.
    pub l1: f64,
    /// Σ|O| of dense attention.
    pub norm: f64,
    /// What was skipped.
    pub stats: HeadStats,
}

impl std::ops::AddAssign<&Self> for HeadRun {
    fn add_assign(&mut self, other: &Self) {
        self.l1 += other.l1;
        self.norm += other.norm;
        self.stats = self.stats + other.stats;
    }
}

impl HeadRun {
    /// Error and sparsity.
    #[must_use]
    pub fn measured(&self) -> Measured {
        Measured {
            rel_l1: if self.l1 == 0.0 { 0.0 } else { self.l1 / self.norm },
            qk_sparsity: self.stats.qk_sparsity(),
            pv_sparsity: self.stats.pv_sparsity(),
        }
    }
}

/// Runs `config` and compares every query head with `dense`, the output of dense attention in the
/// layout of `options`; batch entries and sequences are added up.
///
/// # Errors
/// As [`crate::attention()`], and [`Error::BufferTooShort`] where `dense` is not the output's size.
pub fn rerun<T: Element>(
    q: &TensorView<'_, T>,
    k: &TensorView<'_, T>,
    v: &TensorView<'_, T>,
    options: &AttentionOptions<'_>,
    config: &SpargeConfig,
    dense: &[T],
) -> Result<Vec<HeadRun>> {
    let sparse = attention(q, k, v, options, config)?;
    if dense.len() != sparse.o.len() {
        let (got, needed) = (dense.len(), sparse.o.len());
        return Err(Error::BufferTooShort { tensor: "dense", got, needed });
    }
    let (heads, tokens, dim) = (q.dims().heads, q.dims().len, v.dims().dim);
    let mut runs = vec![HeadRun::default(); heads];
    for (row, (a, b)) in dense.chunks(dim).zip(sparse.o.chunks(dim)).enumerate() {
        let head = match options.layout {
            Layout::Hnd => row / tokens % heads,
            Layout::Nhd => row % heads,
        };
        for (a, b) in a.iter().zip(b) {
            runs[head].l1 += f64::from((a.to_f32() - b.to_f32()).abs());
            runs[head].norm += f64::from(a.to_f32().abs());
        }
    }
    for (i, &stats) in sparse.stats.heads().iter().enumerate() {
        runs[i % heads].stats = runs[i % heads].stats + stats;
    }
    Ok(runs)
}

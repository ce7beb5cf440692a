//! Sparse, quantised attention that makes a model's inference faster without retraining.
//!
//! This crate is SpargeAttn ([arXiv 2502.18137](https://arxiv.org/abs/2502.18137)) as an operator:
//! [`attention`] takes q, k and v and returns softmax(q·kᵀ)·v, computing only the blocks of the
//! attention map that matter. Stage 1 ([`predict()`]) finds them from pooled queries and keys;
//! stage 2 skips P·V inside the kernel where the softmax cannot matter. [`mod@reference`] is the same
//! algorithm in plain f64, which everything else is tested against.
//!
//! Read [`attention`] first, then [`SpargeConfig`] and [`AttentionOptions`].

mod attention;
pub mod calibrate;
mod config;
mod cpu;
mod error;
mod geometry;
mod mask;
pub mod metrics;
pub mod permute;
mod plan;
pub mod policy;
mod predict;
mod quant;
pub mod reference;
mod stats;
mod tensor;
#[cfg(feature = "testing")]
pub mod testing;

pub use attention::{AttentionOutput, Side, attend, attention, forward};
pub use config::{
    Alignment, AttentionOptions, ElementMask, Lengths, PerHead, Pooling, QkPrecision, Selection,
    SpargeConfig, Window,
};
pub use cpu::Isa;
pub use error::{Error, Result};
pub use geometry::{AttentionShape, BLOCK_KV, BLOCK_Q};
pub use mask::{BlockMask, Csr};
pub use plan::Plan;
pub use predict::{BlockMasses, block_masses, predict};
pub use quant::{Quantized, quantize};
pub use stats::{HeadStats, Stats};
pub use tensor::{Dims, Element, Layout, Strides, TensorView};

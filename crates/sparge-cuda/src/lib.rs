//! The operator of the `sparge` crate on NVIDIA GPUs.
//!
//! [`Attention::new`] takes the same shape, options and config as `sparge::Plan`, chooses kernels
//! and sizes the workspace. [`Attention::forward`] enqueues predict → quantize → attend on the
//! caller's stream, on the caller's device pointers: nothing is allocated and nothing waits, so a
//! call can be captured in a CUDA graph. The same inputs give the same bits.
//!
//! The kernels are CUDA C++ sources in `kernels/`, compiled by NVRTC when a [`Device`] first needs
//! them and kept in a cache on disk. Driver and NVRTC are loaded dynamically: this crate builds,
//! and its tests pass, on a machine that has neither.
//!
//! What runs: compute capability 9.0 (H100, H200), f16 and bf16, head dimensions 64 and 128, any
//! lengths, GQA, causal with both alignments, every `Selection`, poolings `BLOCK` and `SUB_BLOCK`.
//! Q·Kᵀ is int8 (per-token scales for Q, per-block scales for K less its mean), P·V is fp8 e4m3
//! with fp32 sums. Everything else is [`Error::Unsupported`], by name. Stage 2 (λ) permits skipping
//! and is not used: the products it would leave out are computed.

mod attention;
mod context;
mod device;
mod dtype;
mod env;
mod error;
mod general;
mod hopper;
mod jit;
mod launch;
mod options;
mod spec;
mod tables;
mod tensors;

pub use attention::{Attention, Int8Offsets};
pub use device::{Device, Stream};
pub use dtype::DType;
pub use env::Environment;
pub use error::{Error, Result};
pub use jit::{Compiled, Compiler};
pub use options::{CudaOptions, Path, Precision};
pub use spec::{Arch, KernelSpec, Mma, Pool};
pub use tensors::{DeviceBlockMask, ElementMask, Inputs, MaskKind, Output, Tensor};

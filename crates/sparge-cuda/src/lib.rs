//! The operator of the `sparge` crate on NVIDIA GPUs.
//!
//! [`Attention::with`] takes the same shape, options and config as `sparge::Plan`, chooses kernels
//! and sizes the workspace. [`Attention::forward`] enqueues quantize → predict → attend on the
//! caller's stream, on the caller's device pointers: nothing is allocated and nothing waits, so a
//! call can be captured in a CUDA graph. The same inputs give the same bits.
//!
//! The kernels are CUDA C++ sources in `kernels/`, compiled by NVRTC when a [`Device`] first needs
//! them and kept in a cache on disk, or taken from a pack made ahead of time
//! ([`Environment::pack_dir`]). Driver and NVRTC are loaded dynamically: this crate builds, and its
//! tests pass, on a machine that has neither.
//!
//! Compute capability 8.x, 9.0, 10.x and 12.x; f16, bf16 and f32; head dimensions that are multiples
//! of 8 up to 256; every option of `sparge::AttentionOptions` and `sparge::SpargeConfig`, masks in
//! device memory. On an H100 or H200 the common calls take a fast path ([`Path`] says which). How a
//! call is computed, and what becomes of numbers that are not finite, is [`Precision`]'s to say.
//! Stage 2 (λ) is permission to skip; the fast path does not use it, so that a call's outputs may
//! differ between the paths by what the skipped products are worth (e^−λ) and its statistics by
//! their number.

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

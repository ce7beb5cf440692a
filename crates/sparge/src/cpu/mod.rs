//! The CPU backend: the driver that walks the blocks, and tile kernels per instruction set.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod dispatch;
mod driver;
mod kernels;
mod partials;
mod scalar;
mod simd;
mod tile;

pub use dispatch::Isa;
pub(crate) use dispatch::{TileKernels, kernels};
pub(crate) use driver::attend;
pub(crate) use kernels::{PackedQ, QuantizedRows, Rows, Running, Scores};
pub(crate) use partials::Partials;
pub(crate) use tile::{Qkv, SKIP_ROWS};

//! From a [`crate::KernelSpec`] to machine code: NVRTC, a disk cache, the driver's module.

mod cache;
mod module;
mod nvrtc;

pub(crate) use cache::packed;
pub(crate) use module::Kernel;
pub use nvrtc::{Compiled, Compiler};

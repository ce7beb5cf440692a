//! The extension module of the Python package `sparge`: calls on addresses, shapes and strides.
//!
//! Nothing here knows a framework. `python/sparge` checks the tensors of torch, numpy or whoever
//! speaks DLPack, allocates the results with the same framework, and hands over integers.

mod call;
mod cuda;
mod dlpack;
mod errors;
mod info;
mod permute;
mod settings;
mod tensor;
mod threads;

use pyo3::prelude::*;

/// The module `sparge._sparge`.
#[pymodule]
mod _sparge {
    #[pymodule_export]
    use super::call::{attend, predict, quantize};
    #[pymodule_export]
    use super::cuda::CudaCall;
    #[pymodule_export]
    use super::dlpack::Array;
    #[pymodule_export]
    use super::errors::SpargeError;
    #[pymodule_export]
    use super::info::info;
    #[pymodule_export]
    use super::permute::token_order;
    #[pymodule_export]
    use super::settings::Settings;
}

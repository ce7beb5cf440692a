//! Errors of the Rust crates as Python exceptions.

use pyo3::PyErr;
use pyo3::create_exception;
use pyo3::exceptions::{PyNotImplementedError, PyRuntimeError, PyValueError};

create_exception!(
    sparge,
    SpargeError,
    PyValueError,
    "A call that cannot be served as asked. The message says what was wrong, what was expected and \
     what to do."
);

/// What the operator refuses.
pub(crate) fn refused(error: sparge::Error) -> PyErr {
    SpargeError::new_err(error.to_string())
}

/// What the CUDA backend refuses, or what its driver reports. A machine without what the kernels need is
/// as good as an option they lack: `fallback="dense"` serves both.
pub(crate) fn cuda(error: sparge_cuda::Error) -> PyErr {
    use sparge_cuda::Error as E;
    match error {
        E::Plan(e) => refused(e),
        E::Unsupported { .. }
        | E::Gpu { .. }
        | E::NoDriver
        | E::NoDevice { .. }
        | E::NoNvrtc { .. }
        | E::Compile { .. } => PyNotImplementedError::new_err(error.to_string()),
        E::Tensor { .. } => SpargeError::new_err(error.to_string()),
        _ => PyRuntimeError::new_err(error.to_string()),
    }
}

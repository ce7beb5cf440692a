//! What can go wrong, and what to do about it.

/// Why a call was refused. Nothing was enqueued when one is returned, [`Error::Driver`] aside.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The shape, options or config are invalid on any device.
    #[error(transparent)]
    Plan(#[from] sparge::Error),
    /// libcuda is missing.
    #[error(
        "no NVIDIA driver: libcuda was not found; install the NVIDIA driver, or use the CPU backend of the crate `sparge`"
    )]
    NoDriver,
    /// There is a driver, but no such GPU.
    #[error(
        "no GPU {ordinal}: {message}; check `nvidia-smi` and CUDA_VISIBLE_DEVICES (GPUs count from 0), or use the CPU backend of the crate `sparge`"
    )]
    NoDevice {
        /// The number asked for.
        ordinal: usize,
        /// The driver's words.
        message: String,
    },
    /// libnvrtc is missing.
    #[error(
        "no NVRTC: libnvrtc was not found in {searched:?} or on the loader's path; `pip install nvidia-cuda-nvrtc`, install the CUDA toolkit, or set SPARGE_NVRTC to the directory that holds libnvrtc.so"
    )]
    NoNvrtc {
        /// Directories looked at.
        searched: Vec<String>,
    },
    /// No kernels for this GPU.
    #[error(
        "{name} has compute capability {major}.{minor}; kernels exist for 8.x, 9.0, 10.x and 12.x; use the CPU backend of the crate `sparge`"
    )]
    Gpu {
        /// The device's name.
        name: String,
        /// Major compute capability.
        major: i32,
        /// Minor compute capability.
        minor: i32,
    },
    /// Valid, but not available on the GPU.
    #[error("{what} is not available on the GPU: {remedy}")]
    Unsupported {
        /// The option.
        what: String,
        /// What to do instead.
        remedy: &'static str,
    },
    /// A device tensor that the kernels cannot read or write.
    #[error("{tensor}: {problem}")]
    Tensor {
        /// Which tensor.
        tensor: &'static str,
        /// What is wrong and what would be right.
        problem: String,
    },
    /// NVRTC refused a kernel.
    #[error("NVRTC could not compile {kernel} for {arch}: {log}")]
    Compile {
        /// The kernel's name.
        kernel: String,
        /// The architecture.
        arch: String,
        /// The compiler's words.
        log: String,
    },
    /// A pack of compiled kernels could not be written.
    #[error("{file} could not be written: {message}")]
    Pack {
        /// The file.
        file: String,
        /// The system's words.
        message: String,
    },
    /// The driver refused a call.
    #[error("CUDA driver, while {doing}: {message}")]
    Driver {
        /// What was being done.
        doing: &'static str,
        /// The driver's words.
        message: String,
    },
}

/// Shorthand for results of this crate.
pub type Result<T> = std::result::Result<T, Error>;

/// Turns a driver error into ours.
pub(crate) fn driver(doing: &'static str) -> impl FnOnce(cudarc::driver::DriverError) -> Error {
    move |e| Error::Driver { doing, message: e.to_string() }
}

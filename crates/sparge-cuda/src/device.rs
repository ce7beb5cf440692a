//! A GPU and the kernels loaded on it.

use crate::context::{Context, Restore};
use crate::env::Environment;
use crate::error::{Error, Result, driver};
use crate::jit::{Compiler, Kernel, packed};
use crate::launch;
use crate::spec::{Arch, KernelSpec};
use cudarc::driver::sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT;
use cudarc::driver::sys::CUresult;
use cudarc::driver::{CudaContext, DriverError};
use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

/// The caller's stream: a `CUstream`, which the runtime API calls `cudaStream_t`. Null is the
/// legacy default stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stream(pub *mut std::ffi::c_void);

/// A GPU this crate has kernels for. Cheap to clone; there may be one for each GPU of the machine.
#[derive(Debug, Clone)]
pub struct Device(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    context: Context,
    /// Loaded when a kernel is neither packed nor loaded yet.
    compiler: Mutex<Option<Compiler>>,
    env: Environment,
    arch: Arch,
    multiprocessors: usize,
    kernels: Mutex<HashMap<KernelSpec, Arc<Kernel>>>,
}

impl Device {
    /// Opens GPU `ordinal` in its primary context (the one PyTorch and the runtime API use).
    ///
    /// # Errors
    /// [`Error::NoDriver`], [`Error::NoDevice`], [`Error::Gpu`], [`Error::Driver`].
    pub fn new(ordinal: usize, env: &Environment) -> Result<Self> {
        if !launch::has_driver() {
            return Err(Error::NoDriver);
        }
        let _restore = Restore::later();
        let context = CudaContext::new(ordinal).map_err(|error| unopened(ordinal, error))?;
        let (major, minor) =
            context.compute_capability().map_err(driver("reading the compute capability"))?;
        let Some(arch) = Arch::of(major, minor) else {
            let name = context.name().unwrap_or_else(|_| "this GPU".into());
            return Err(Error::Gpu { name, major, minor });
        };
        let multiprocessors = context
            .attribute(CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)
            .map_err(driver("counting multiprocessors"))?;
        Ok(Self(Arc::new(Inner {
            context: Context::new(context),
            compiler: Mutex::default(),
            env: env.clone(),
            arch,
            multiprocessors: usize::try_from(multiprocessors).unwrap_or(1).max(1),
            kernels: Mutex::default(),
        })))
    }

    /// The architecture whose kernels it runs.
    #[must_use]
    pub fn arch(&self) -> Arch {
        self.0.arch
    }

    /// Multiprocessors of the GPU.
    #[must_use]
    pub fn multiprocessors(&self) -> usize {
        self.0.multiprocessors
    }

    pub(crate) fn context(&self) -> &Context {
        &self.0.context
    }

    fn compiler(&self) -> Result<Compiler> {
        let mut compiler = self.0.compiler.lock().unwrap_or_else(PoisonError::into_inner);
        match *compiler {
            Some(compiler) => Ok(compiler),
            None => Ok(*compiler.insert(Compiler::load(&self.0.env)?)),
        }
    }

    /// The kernel of `spec`, compiled and loaded at its first use.
    pub(crate) fn kernel(&self, spec: &KernelSpec) -> Result<Arc<Kernel>> {
        let mut kernels = self.0.kernels.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(kernel) = kernels.get(spec) {
            return Ok(Arc::clone(kernel));
        }
        let (env, arch) = (&self.0.env, self.0.arch.name());
        let compiled = match env.pack_dir.as_deref().and_then(|dir| packed(dir, spec, arch)) {
            Some(compiled) => compiled,
            None => self.compiler()?.compile_cached(spec, arch, env.cache_dir.as_deref())?,
        };
        let kernel = Arc::new(Kernel::load(&self.0.context, &compiled, spec.most_shared_bytes())?);
        kernels.insert(*spec, Arc::clone(&kernel));
        Ok(kernel)
    }
}

/// Why a GPU could not be opened.
fn unopened(ordinal: usize, error: DriverError) -> Error {
    match error.0 {
        // No GPU at all, none of this number, or a driver library without a driver.
        CUresult::CUDA_ERROR_NO_DEVICE
        | CUresult::CUDA_ERROR_INVALID_DEVICE
        | CUresult::CUDA_ERROR_STUB_LIBRARY => {
            Error::NoDevice { ordinal, message: error.to_string() }
        }
        _ => driver("opening the GPU")(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_driver_without_a_gpu_is_said_to_be_one() {
        let error = unopened(3, DriverError(CUresult::CUDA_ERROR_INVALID_DEVICE));
        assert!(matches!(error, Error::NoDevice { ordinal: 3, .. }), "{error}");
        let error = unopened(0, DriverError(CUresult::CUDA_ERROR_OUT_OF_MEMORY));
        assert!(matches!(error, Error::Driver { .. }), "{error}");
    }
}

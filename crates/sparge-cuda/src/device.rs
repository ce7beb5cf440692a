//! A GPU and the kernels loaded on it.

use crate::env::Environment;
use crate::error::{Error, Result, driver};
use crate::jit::{Compiler, Kernel};
use crate::launch;
use crate::spec::{Arch, KernelSpec};
use cudarc::driver::CudaContext;
use cudarc::driver::sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT;
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
    context: Arc<CudaContext>,
    compiler: Compiler,
    env: Environment,
    arch: Arch,
    multiprocessors: usize,
    kernels: Mutex<HashMap<KernelSpec, Arc<Kernel>>>,
}

impl Device {
    /// Opens GPU `ordinal` in its primary context (the one PyTorch and the runtime API use).
    ///
    /// # Errors
    /// [`Error::NoDriver`], [`Error::NoNvrtc`], [`Error::Gpu`], [`Error::Driver`].
    pub fn new(ordinal: usize, env: &Environment) -> Result<Self> {
        if !launch::has_driver() {
            return Err(Error::NoDriver);
        }
        let context = CudaContext::new(ordinal).map_err(driver("opening the GPU"))?;
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
            context,
            compiler: Compiler::load(env)?,
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

    pub(crate) fn context(&self) -> &Arc<CudaContext> {
        &self.0.context
    }

    /// The kernel of `spec`, compiled and loaded at its first use.
    pub(crate) fn kernel(&self, spec: &KernelSpec) -> Result<Arc<Kernel>> {
        let mut kernels = self.0.kernels.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(kernel) = kernels.get(spec) {
            return Ok(Arc::clone(kernel));
        }
        let compiled =
            self.0.compiler.compile_cached(spec, self.0.arch.name(), self.0.env.cache_dir.as_deref())?;
        let kernel = Arc::new(Kernel::load(&self.0.context, &compiled, spec.most_shared_bytes())?);
        kernels.insert(*spec, Arc::clone(&kernel));
        Ok(kernel)
    }
}

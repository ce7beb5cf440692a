//! A kernel in a context, ready to launch.
#![expect(unsafe_code, reason = "the driver's modules are raw handles")]

use super::Compiled;
use crate::context::Context;
use crate::error::{Error, Result, driver};
use cudarc::driver::{result, sys};
use std::ffi::CString;

/// A loaded kernel; unloaded when dropped.
#[derive(Debug)]
pub(crate) struct Kernel {
    context: Context,
    module: sys::CUmodule,
    function: sys::CUfunction,
}

// SAFETY: driver handles may be used from any thread in which their context is current, and every
// use below makes it current first.
unsafe impl Send for Kernel {}
// SAFETY: as above; a loaded module is not changed after `load`.
unsafe impl Sync for Kernel {}

impl Kernel {
    pub(crate) fn load(
        context: &Context,
        compiled: &Compiled,
        shared_bytes: usize,
    ) -> Result<Self> {
        let _restore = context.enter()?;
        let name = CString::new(compiled.entry.as_str()).map_err(|_| Error::Driver {
            doing: "loading a kernel",
            message: "its name holds a NUL byte".into(),
        })?;
        // SAFETY: the cubin is a whole ELF image from NVRTC (or the hashed cache).
        let module = unsafe { result::module::load_data(compiled.cubin.as_ptr().cast()) }
            .map_err(driver("loading a kernel"))?;
        let mut kernel = Self { context: context.clone(), module, function: std::ptr::null_mut() };
        // SAFETY: the module is loaded and the name NUL-terminated.
        kernel.function = unsafe { result::module::get_function(module, name) }
            .map_err(driver("finding a kernel"))?;
        if shared_bytes > 48 << 10 {
            // SAFETY: the function is live.
            unsafe {
                result::function::set_function_attribute(
                    kernel.function,
                    sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES,
                    shared_bytes as i32,
                )
            }
            .map_err(driver("raising a kernel's shared memory"))?;
        }
        Ok(kernel)
    }

    pub(crate) fn function(&self) -> sys::CUfunction {
        self.function
    }
}

impl Drop for Kernel {
    fn drop(&mut self) {
        if let Ok(_restore) = self.context.enter() {
            // SAFETY: loaded by `load`, unloaded once. An error here has nobody to go to.
            let _ = unsafe { result::module::unload(self.module) };
        }
    }
}

//! The device's context, which calls make current and then give the thread back the one it had.
#![expect(unsafe_code, reason = "which context is current is the driver's state of a thread")]

use crate::error::{Result, driver};
use cudarc::driver::{CudaContext, result, sys};
use std::mem::ManuallyDrop;
use std::sync::Arc;

/// A shared primary context. Released, where this is the last owner, with the thread's current
/// context as it was.
#[derive(Debug)]
pub(crate) struct Context(ManuallyDrop<Arc<CudaContext>>);

/// Restores the thread's current context when dropped.
#[derive(Debug)]
pub(crate) struct Restore(sys::CUcontext);

impl Restore {
    /// Remembers the current context; none, where the driver does not run yet.
    pub(crate) fn later() -> Self {
        Self(result::ctx::get_current().ok().flatten().unwrap_or(std::ptr::null_mut()))
    }
}

impl Drop for Restore {
    fn drop(&mut self) {
        if result::ctx::get_current().is_ok_and(|now| now.unwrap_or(std::ptr::null_mut()) != self.0)
        {
            // SAFETY: it was current when this guard was made, in this thread: the guard holds a
            // raw pointer and so stays there. An error here has nobody to go to.
            let _ = unsafe { result::ctx::set_current(self.0) };
        }
    }
}

impl Context {
    pub(crate) fn new(context: Arc<CudaContext>) -> Self {
        Self(ManuallyDrop::new(context))
    }

    /// Makes the context current for as long as the guard lives.
    pub(crate) fn enter(&self) -> Result<Restore> {
        let restore = Restore::later();
        self.0.bind_to_thread().map_err(driver("making the context current"))?;
        Ok(restore)
    }
}

impl Clone for Context {
    fn clone(&self) -> Self {
        Self::new(Arc::clone(&self.0))
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        let _restore = Restore::later();
        // SAFETY: dropped once, here; nothing reads it afterwards.
        unsafe { ManuallyDrop::drop(&mut self.0) };
    }
}

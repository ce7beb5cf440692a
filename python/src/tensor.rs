//! Addresses from Python as tensor views. All trust in the caller's integers is placed here.
#![expect(unsafe_code, reason = "tensors of other frameworks arrive as addresses")]

use crate::errors::{SpargeError, refused};
use pyo3::prelude::*;
use sparge::{Dims, Element, Layout, Strides, TensorView};
use std::sync::OnceLock;

pub(crate) type Four<T> = (T, T, T, T);

/// A tensor of another framework: address, sizes and strides (in elements) of its four dimensions.
#[derive(Debug, Clone, Copy, FromPyObject)]
pub(crate) struct Raw {
    #[pyo3(item(0))]
    address: usize,
    #[pyo3(item(1))]
    shape: Four<usize>,
    #[pyo3(item(2))]
    strides: Four<isize>,
}

impl Raw {
    /// The address of the first element.
    pub(crate) fn address(&self) -> usize {
        self.address
    }

    /// Sizes, the dimensions taken in `layout`'s order.
    pub(crate) fn dims(&self, layout: Layout) -> Dims {
        let (batch, a, b, dim) = self.shape;
        let (heads, len) = if layout == Layout::Hnd { (a, b) } else { (b, a) };
        Dims { batch, heads, len, dim }
    }

    /// Strides in elements.
    pub(crate) fn strides(&self, name: &str, layout: Layout) -> PyResult<Strides> {
        let (batch, a, b, dim) = self.strides;
        if dim != 1 && self.shape.3 > 1 {
            let m = format!("{name} has stride {dim} in its last dimension, expected 1");
            return Err(SpargeError::new_err(m));
        }
        let positive = |x: isize| {
            usize::try_from(x).map_err(|_| {
                SpargeError::new_err(format!("{name} has the negative stride {x}; copy it first"))
            })
        };
        let (batch, a, b) = (positive(batch)?, positive(a)?, positive(b)?);
        let (head, token) = if layout == Layout::Hnd { (a, b) } else { (b, a) };
        Ok(Strides { batch, head, token })
    }

    /// The tensor as a view.
    ///
    /// # Safety
    /// * Shape and strides stay inside one allocation of initialised `T`s.
    /// * It lives, and nobody writes to it, for `'a`.
    pub(crate) unsafe fn view<'a, T: Copy>(
        &self,
        name: &str,
        layout: Layout,
    ) -> PyResult<TensorView<'a, T>> {
        // SAFETY: the caller's promise.
        let (data, dims, strides) = unsafe { self.span::<T>(name, layout)? };
        TensorView::strided(data, dims, strides).map_err(refused)
    }

    /// A bool tensor as a view. Other frameworks' bools may be bytes above 1, which Rust's may not:
    /// those are copied to `kept`.
    ///
    /// # Safety
    /// As [`Raw::view`] for `u8`.
    pub(crate) unsafe fn bools<'a>(
        &self,
        name: &str,
        layout: Layout,
        kept: &'a OnceLock<Vec<bool>>,
    ) -> PyResult<TensorView<'a, bool>> {
        // SAFETY: the caller's promise.
        let (bytes, dims, strides) = unsafe { self.span::<u8>(name, layout)? };
        let data = if bytes.iter().all(|&byte| byte <= 1) {
            // SAFETY: the same memory, and each of its bytes is a bool.
            unsafe { slice::<bool>(bytes.as_ptr() as usize, bytes.len()) }
        } else {
            kept.get_or_init(|| bytes.iter().map(|&byte| byte != 0).collect())
        };
        TensorView::strided(data, dims, strides).map_err(refused)
    }

    /// The elements from the first to the last one reached, and how they are arranged.
    ///
    /// # Safety
    /// As [`Raw::view`].
    unsafe fn span<'a, T>(&self, name: &str, layout: Layout) -> PyResult<(&'a [T], Dims, Strides)> {
        let (dims, strides) = (self.dims(layout), self.strides(name, layout)?);
        let last = |size: usize, stride: usize| size.saturating_sub(1).checked_mul(stride);
        let reach = last(dims.batch, strides.batch)
            .zip(last(dims.heads, strides.head))
            .zip(last(dims.len, strides.token))
            .and_then(|((a, b), c)| a.checked_add(b)?.checked_add(c)?.checked_add(dims.dim))
            .filter(|reach| *reach <= isize::MAX as usize / size_of::<T>())
            .ok_or_else(|| refused(sparge::Error::Overflow { tensor: "tensor" }))?;
        let is_empty = dims.batch == 0 || dims.heads == 0 || dims.len == 0 || dims.dim == 0;
        let reach = if is_empty { 0 } else { reach };
        if reach > 0 && (self.address == 0 || !self.address.is_multiple_of(align_of::<T>())) {
            let m = format!(
                "{name} is at address {:#x}, expected a multiple of {}; copy it first",
                self.address,
                align_of::<T>()
            );
            return Err(SpargeError::new_err(m));
        }
        // SAFETY: by the contract the last element reached is inside the allocation; the address was
        // just checked.
        Ok((unsafe { slice(self.address, reach) }, dims, strides))
    }
}

/// `len` elements at `address`.
///
/// # Safety
/// As [`Raw::view`].
pub(crate) unsafe fn slice<'a, T>(address: usize, len: usize) -> &'a [T] {
    if len == 0 {
        return &[];
    }
    // SAFETY: the caller's promise; a null pointer with a length would break it.
    unsafe { std::slice::from_raw_parts(address as *const T, len) }
}

/// `len` elements at `address`, to write to.
///
/// # Safety
/// As [`Raw::view`], and nobody else reads or writes them for `'a`.
pub(crate) unsafe fn slice_mut<'a, T>(address: usize, len: usize) -> &'a mut [T] {
    if len == 0 {
        return &mut [];
    }
    // SAFETY: the caller's promise; a null pointer with a length would break it.
    unsafe { std::slice::from_raw_parts_mut(address as *mut T, len) }
}

/// q, k and v of one element type.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Views<'a, T> {
    pub(crate) q: TensorView<'a, T>,
    pub(crate) k: TensorView<'a, T>,
    pub(crate) v: TensorView<'a, T>,
}

impl<T: Element> Views<'_, T> {
    /// # Safety
    /// As [`Raw::view`], for all three.
    pub(crate) unsafe fn new(q: &Raw, k: &Raw, v: &Raw, layout: Layout) -> PyResult<Self> {
        // SAFETY: the caller's promise.
        unsafe {
            Ok(Self {
                q: q.view("query", layout)?,
                k: k.view("key", layout)?,
                v: v.view("value", layout)?,
            })
        }
    }
}

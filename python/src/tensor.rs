//! Addresses from Python as tensor views. All trust in the caller's integers is placed here.
#![expect(unsafe_code, reason = "tensors of other frameworks arrive as addresses")]

use crate::errors::{SpargeError, refused};
use pyo3::prelude::*;
use sparge::{Dims, Element, Layout, Strides, TensorView};

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
    /// * The address is aligned for `T`, and shape and strides stay inside one allocation of
    ///   initialised `T`s (for `bool`: bytes 0 and 1).
    /// * It lives, and nobody writes to it, for `'a`.
    pub(crate) unsafe fn view<'a, T: Copy>(
        &self,
        name: &str,
        layout: Layout,
    ) -> PyResult<TensorView<'a, T>> {
        let (dims, strides) = (self.dims(layout), self.strides(name, layout)?);
        let last = |size: usize, stride: usize| size.saturating_sub(1).checked_mul(stride);
        let reach = last(dims.batch, strides.batch)
            .zip(last(dims.heads, strides.head))
            .zip(last(dims.len, strides.token))
            .and_then(|((a, b), c)| a.checked_add(b)?.checked_add(c)?.checked_add(dims.dim))
            .filter(|reach| *reach <= isize::MAX as usize / size_of::<T>())
            .ok_or_else(|| refused(sparge::Error::Overflow { tensor: "tensor" }))?;
        let is_empty = dims.batch == 0 || dims.heads == 0 || dims.len == 0 || dims.dim == 0;
        // SAFETY: by the contract the last element reached is inside the allocation.
        let data = unsafe { slice(self.address, if is_empty { 0 } else { reach }) };
        TensorView::strided(data, dims, strides).map_err(refused)
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

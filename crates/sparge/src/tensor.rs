//! Borrowed 4-d tensors with unit stride in the last dimension, and the element types.

use crate::error::{Error, Result};
use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};

mod sealed {
    pub trait Sealed {}
    impl Sealed for f32 {}
    impl Sealed for half::f16 {}
    impl Sealed for half::bf16 {}
}

/// An element type of q, k, v and o: `f32`, [`half::f16`] or [`half::bf16`].
///
/// Arithmetic is done in f32; half types are converted one tile at a time.
pub trait Element: sealed::Sealed + Copy + Send + Sync + Default + 'static {
    /// The type's name as PyTorch and safetensors users know it: `f32`, `f16`, `bf16`.
    const NAME: &'static str;
    /// One value as f32 (exact).
    fn to_f32(self) -> f32;
    /// The nearest value of this type, ties to even; out-of-range values become infinities.
    fn from_f32(x: f32) -> Self;
    /// Converts `src` into the equally long `dst`.
    fn widen(src: &[Self], dst: &mut [f32]);
    /// Converts `src` into the equally long `dst`, rounding to nearest.
    fn narrow(src: &[f32], dst: &mut [Self]);
    /// The slice itself where the type is already f32.
    fn as_f32(src: &[Self]) -> Option<&[f32]>;
}

impl Element for f32 {
    const NAME: &'static str = "f32";
    fn to_f32(self) -> f32 {
        self
    }
    fn from_f32(x: f32) -> Self {
        x
    }
    fn widen(src: &[Self], dst: &mut [f32]) {
        dst.copy_from_slice(src);
    }
    fn narrow(src: &[f32], dst: &mut [Self]) {
        dst.copy_from_slice(src);
    }
    fn as_f32(src: &[Self]) -> Option<&[f32]> {
        Some(src)
    }
}

macro_rules! half_element {
    ($t:ty, $name:literal) => {
        impl Element for $t {
            const NAME: &'static str = $name;
            fn to_f32(self) -> f32 {
                <$t>::to_f32(self)
            }
            fn from_f32(x: f32) -> Self {
                <$t>::from_f32(x)
            }
            fn widen(src: &[Self], dst: &mut [f32]) {
                src.convert_to_f32_slice(dst);
            }
            fn narrow(src: &[f32], dst: &mut [Self]) {
                dst.convert_from_f32_slice(src);
            }
            fn as_f32(_: &[Self]) -> Option<&[f32]> {
                None
            }
        }
    };
}
half_element!(f16, "f16");
half_element!(bf16, "bf16");

/// How the heads and tokens of a contiguous tensor are ordered.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Layout {
    /// `[batch, heads, tokens, dim]` (PyTorch's SDPA).
    #[default]
    Hnd,
    /// `[batch, tokens, heads, dim]` (FlashAttention, candle-transformers).
    Nhd,
}

/// Sizes of a 4-d tensor, independent of how it is laid out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Dims {
    /// Batch entries.
    pub batch: usize,
    /// Heads.
    pub heads: usize,
    /// Tokens.
    pub len: usize,
    /// Elements of one token in one head.
    pub dim: usize,
}

/// Distances, in elements, between neighbours; the last dimension has stride 1.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Strides {
    /// From one batch entry to the next.
    pub batch: usize,
    /// From one head to the next.
    pub head: usize,
    /// From one token to the next.
    pub token: usize,
}

impl Strides {
    /// The strides of a contiguous tensor in `layout`.
    #[must_use]
    pub fn contiguous(dims: Dims, layout: Layout) -> Self {
        match layout {
            Layout::Hnd => Self {
                batch: dims.heads.wrapping_mul(dims.len).wrapping_mul(dims.dim),
                head: dims.len.wrapping_mul(dims.dim),
                token: dims.dim,
            },
            Layout::Nhd => Self {
                batch: dims.heads.wrapping_mul(dims.len).wrapping_mul(dims.dim),
                head: dims.dim,
                token: dims.heads.wrapping_mul(dims.dim),
            },
        }
    }
}

/// A borrowed `[batch, heads, tokens, dim]` tensor with any strides.
///
/// ```
/// use sparge::TensorView;
/// let data = vec![0.0f32; 2 * 4 * 10 * 8];
/// let q = TensorView::hnd(&data, [2, 4, 10, 8])?; // [batch, heads, tokens, dim]
/// assert_eq!(q.dims().len, 10);
/// # Ok::<(), sparge::Error>(())
/// ```
#[derive(Debug, Clone, Copy)]
pub struct TensorView<'a, T> {
    data: &'a [T],
    dims: Dims,
    strides: Strides,
}

impl<'a, T: Copy> TensorView<'a, T> {
    /// A contiguous `[batch, heads, tokens, dim]` tensor.
    ///
    /// # Errors
    /// [`Error::BufferTooShort`] or [`Error::Overflow`] where `data` cannot hold the shape.
    pub fn hnd(data: &'a [T], shape: [usize; 4]) -> Result<Self> {
        let [batch, heads, len, dim] = shape;
        Self::contiguous(data, Dims { batch, heads, len, dim }, Layout::Hnd)
    }

    /// A contiguous `[batch, tokens, heads, dim]` tensor.
    ///
    /// # Errors
    /// As [`TensorView::hnd`].
    pub fn nhd(data: &'a [T], shape: [usize; 4]) -> Result<Self> {
        let [batch, len, heads, dim] = shape;
        Self::contiguous(data, Dims { batch, heads, len, dim }, Layout::Nhd)
    }

    /// A contiguous tensor in `layout`.
    ///
    /// # Errors
    /// As [`TensorView::hnd`].
    pub fn contiguous(data: &'a [T], dims: Dims, layout: Layout) -> Result<Self> {
        Self::strided(data, dims, Strides::contiguous(dims, layout))
    }

    /// A tensor with explicit strides (in elements; the last dimension's is 1). Strides may be
    /// zero or overlap: the tensor is only read.
    ///
    /// # Errors
    /// As [`TensorView::hnd`].
    pub fn strided(data: &'a [T], dims: Dims, strides: Strides) -> Result<Self> {
        let needed = extent(dims, strides).ok_or(Error::Overflow { tensor: "tensor" })?;
        if data.len() < needed {
            return Err(Error::BufferTooShort { tensor: "tensor", got: data.len(), needed });
        }
        Ok(Self { data, dims, strides })
    }

    /// The tensor's sizes.
    #[must_use]
    pub fn dims(&self) -> Dims {
        self.dims
    }

    /// The tensor's strides.
    #[must_use]
    pub fn strides(&self) -> Strides {
        self.strides
    }

    /// One token of one head: `dim` elements.
    ///
    /// # Panics
    /// Where an index is out of range.
    #[must_use]
    pub fn row(&self, batch: usize, head: usize, token: usize) -> &'a [T] {
        assert!(batch < self.dims.batch && head < self.dims.heads && token < self.dims.len);
        let s = &self.strides;
        let at = batch * s.batch + head * s.head + token * s.token;
        &self.data[at..at + self.dims.dim]
    }

    /// The elements from the first of token `token` on, for tile kernels that step by
    /// `strides().token`.
    pub(crate) fn rows_from(&self, batch: usize, head: usize, token: usize) -> &'a [T] {
        let s = &self.strides;
        &self.data[batch * s.batch + head * s.head + token * s.token..]
    }
}

/// Elements a buffer needs for `dims` at `strides`; `None` on overflow.
fn extent(dims: Dims, strides: Strides) -> Option<usize> {
    // A contiguous view's strides may have wrapped; the product of the sizes tells.
    dims.batch.checked_mul(dims.heads)?.checked_mul(dims.len)?.checked_mul(dims.dim)?;
    if dims.batch == 0 || dims.heads == 0 || dims.len == 0 || dims.dim == 0 {
        return Some(0);
    }
    let last = (dims.batch - 1)
        .checked_mul(strides.batch)?
        .checked_add((dims.heads - 1).checked_mul(strides.head)?)?
        .checked_add((dims.len - 1).checked_mul(strides.token)?)?;
    last.checked_add(dims.dim)
}

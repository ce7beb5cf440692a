//! What only a GPU call has to say.

use crate::tensors::ElementMask;

/// Arithmetic of the two products. `SpargeConfig::qk` is the CPU's and is not read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Precision {
    /// The paper's. Q·Kᵀ in int8: a scale per query; on the general path a scale per key, on the
    /// fast path one per 64 keys; K less its mean over the sequence. P·V in e4m3 with a scale per
    /// channel of V, from compute capability 8.9 on; in the element type (bf16 for f32) below.
    /// Sums in f32. A row feels later tokens through the mean and the scales, to their rounding.
    /// Head dimensions above 128 are not quantised.
    ///
    /// What is not finite has no place in int8 and e4m3. It reaches the rows that see it and no
    /// other, as NaN: on the general path an infinity in V, too; on the fast path, a K or V that is not
    /// finite makes all channels of those rows NaN, and their log-sum-exp. Tensors (V: channels)
    /// smaller than 1.4e-36 in magnitude count as zero.
    #[default]
    Quantized,
    /// Both products in the element type (bf16 for f32), sums in f32: what FlashAttention computes.
    /// A row does not feel later tokens at all. An infinity in V is NaN to the rows of a block that
    /// a mask or the diagonal cuts.
    Half,
}

/// Which kernels run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Path {
    /// The fast path where it computes the call (compute capability 9.0, quantised, head
    /// dimension 64 or 128, no window, no element mask, one length for all), else the general one.
    /// The fast path leaves out no product that λ permits to: its outputs differ from the general
    /// path's by what those are worth, at most e^−λ of a row's weights each, and its statistics count
    /// them.
    #[default]
    Auto,
    /// The general path: every option, every GPU. Here for tests and comparisons.
    General,
}

/// Settings of an `Attention` beside those of crate `sparge`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct CudaOptions {
    /// Arithmetic of the products. Default [`Precision::Quantized`].
    pub precision: Precision,
    /// Which kernels run. Default [`Path::Auto`].
    pub path: Path,
    /// The element mask that calls bring in `Inputs::element_mask`. Default none.
    pub element_mask: Option<ElementMask>,
    /// Whether calls bring `Inputs::block_mask`. Default no.
    pub block_mask: bool,
}

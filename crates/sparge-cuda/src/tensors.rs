//! What a call reads and writes in device memory.

use crate::dtype::DType;
use sparge::Strides;

/// A `[batch, heads, tokens, dim]` tensor in device memory: a 16-byte aligned address and strides
/// in elements, multiples of 16 bytes; the last dimension's stride is 1.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Tensor {
    /// Address of the first element.
    pub address: u64,
    /// Distances between neighbours.
    pub strides: Strides,
}

/// What an element mask holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum MaskKind {
    /// One byte a pair; not 0: it takes part.
    Bool,
    /// Added to the scaled scores, natural-log units; −∞ removes the pair.
    Additive(DType),
}

/// The element mask that the calls of an `Attention` bring.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct ElementMask {
    /// Its type.
    pub kind: MaskKind,
    /// Whether it differs between query heads; if not, its head stride is not read.
    pub per_head: bool,
}

/// A block mask in device memory, `[sequences, heads, q_blocks, words]` as
/// `Attention::mask_shape` says: the blocks that may be attended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DeviceBlockMask {
    /// Address of the first word.
    pub address: u64,
    /// 32-bit words from one sequence to the next; 0 where all share one mask.
    pub sequence_stride: usize,
    /// 32-bit words from one head to the next; 0 where all share one mask.
    pub head_stride: usize,
}

/// What a call reads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Inputs {
    /// Queries.
    pub q: Tensor,
    /// Keys.
    pub k: Tensor,
    /// Values.
    pub v: Tensor,
    /// Where [`crate::CudaOptions::element_mask`] asks for one:
    /// `[sequences, heads, qo_len, kv_len]` (of the longest packed sequence, in each sequence's own
    /// coordinates). Strides in elements, 0 to broadcast; `strides.token` is that of the queries,
    /// keys are neighbours. Aligned to its elements.
    pub element_mask: Option<Tensor>,
    /// Where [`crate::CudaOptions::block_mask`] asks for one.
    pub block_mask: Option<DeviceBlockMask>,
}

impl Inputs {
    /// q, k and v, no masks.
    #[must_use]
    pub fn new(q: Tensor, k: Tensor, v: Tensor) -> Self {
        Self { q, k, v, element_mask: None, block_mask: None }
    }
}

/// Where results go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Output {
    /// `[batch, num_qo_heads, qo_len, head_dim_v]`, of the inputs' element type.
    pub o: Tensor,
    /// Address of `[batch, num_qo_heads, qo_len]` f32, contiguous: ln Σ exp of each row's scaled
    /// scores over the attended pairs, −∞ where there are none.
    pub lse: Option<u64>,
    /// Address of `[sequences, num_qo_heads, 4]` u64, contiguous: the fields of
    /// `sparge::HeadStats` in their order.
    pub stats: Option<u64>,
}

impl Output {
    /// The output alone.
    #[must_use]
    pub fn new(o: Tensor) -> Self {
        Self { o, lse: None, stats: None }
    }
}

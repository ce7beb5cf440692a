//! What a call reads and writes in device memory.

use crate::dtype::DType;
use crate::error::{Error, Result};
use sparge::{Dims, Strides};

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
    /// `sparge::HeadStats` in their order. A group is 16 rows of one key block, and counts where a
    /// pair of its own may be attended; the CPU counts the groups of a strip of 64 rows together, so
    /// that its numbers are higher where masks cut. The fast path computes the products of all kept
    /// groups, the general one counts those that λ left.
    pub stats: Option<u64>,
}

impl Output {
    /// The output alone.
    #[must_use]
    pub fn new(o: Tensor) -> Self {
        Self { o, lse: None, stats: None }
    }
}

/// Kernels read and write 16 bytes at a time. The stride of a dimension of size 1 leads nowhere.
pub(crate) fn check(name: &'static str, tensor: &Tensor, dims: Dims, dtype: DType) -> Result<()> {
    check_aligned(name, tensor.address, 16)?;
    let (s, unit) = (tensor.strides, 16 / dtype.bytes());
    let steps = [(dims.batch, s.batch), (dims.heads, s.head), (dims.len, s.token)];
    if steps.iter().any(|&(size, stride)| size > 1 && stride % unit != 0) {
        let problem = format!("{s:?} are not all multiples of {unit} elements; make it contiguous");
        return Err(Error::Tensor { tensor: name, problem });
    }
    Ok(())
}

/// Refuses null and what is not a multiple of `bytes`.
pub(crate) fn check_aligned(tensor: &'static str, address: u64, bytes: u64) -> Result<()> {
    if address == 0 || !address.is_multiple_of(bytes) {
        let problem = format!(
            "its address is {address:#x}, expected one that is a multiple of {bytes} and not 0"
        );
        return Err(Error::Tensor { tensor, problem });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn strides_of_one_are_not_looked_at() {
        let dims = Dims { batch: 1, heads: 2, len: 5, dim: 64 };
        let with = |batch, head, token| {
            let tensor = Tensor { address: 0x100, strides: Strides { batch, head, token } };
            check("q", &tensor, dims, DType::F16)
        };
        assert_eq!(with(3, 320, 64), Ok(()));
        assert!(with(640, 321, 64).is_err());
        assert!(with(640, 320, 65).is_err());
    }

    #[test]
    fn addresses_are_aligned_and_not_null() {
        assert_eq!(check_aligned("mask", 0x104, 4), Ok(()));
        for address in [0, 0x102] {
            let error = check_aligned("mask", address, 4).expect_err("refused").to_string();
            assert!(error.contains("mask") && error.contains("multiple of 4"), "{error}");
        }
    }
}

//! The sizes of one call, its sequences and its blocks.

use crate::error::{Error, Result};
use crate::tensor::{Dims, TensorView};
use std::ops::Range;

/// Query rows per block, on every device.
pub const BLOCK_Q: usize = 128;
/// Key rows per block, on every device.
pub const BLOCK_KV: usize = 64;
/// Largest head dimension of q, k and v.
const MAX_HEAD_DIM: usize = 256;

/// The sizes of one attention call.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct AttentionShape {
    /// Batch entries.
    pub batch: usize,
    /// Query (and output) heads; a multiple of `num_kv_heads`.
    pub num_qo_heads: usize,
    /// Key and value heads.
    pub num_kv_heads: usize,
    /// Query tokens (of all sequences together where they are packed).
    pub qo_len: usize,
    /// Key tokens (likewise).
    pub kv_len: usize,
    /// Elements of a query or key, 1..=256.
    pub head_dim: usize,
    /// Elements of a value, 1..=256.
    pub head_dim_v: usize,
}

impl AttentionShape {
    /// Reads the sizes off the tensors and checks that they fit together.
    ///
    /// # Errors
    /// [`Error::Mismatch`], [`Error::Dimension`] or [`Error::Groups`].
    pub fn of<T: Copy>(
        q: &TensorView<'_, T>,
        k: &TensorView<'_, T>,
        v: &TensorView<'_, T>,
    ) -> Result<Self> {
        Self::of_dims(q.dims(), k.dims(), v.dims())
    }

    /// The same from the sizes alone, for tensors that are not in this process's memory.
    ///
    /// # Errors
    /// As [`AttentionShape::of`].
    pub fn of_dims(q: Dims, k: Dims, v: Dims) -> Result<Self> {
        let same = |name, a, got_a, b, got_b| {
            if got_a == got_b { Ok(()) } else { Err(Error::Mismatch { name, a, got_a, b, got_b }) }
        };
        same("batch", "q", q.batch, "k", k.batch)?;
        same("batch", "k", k.batch, "v", v.batch)?;
        same("number of heads", "k", k.heads, "v", v.heads)?;
        same("kv_len", "k", k.len, "v", v.len)?;
        same("head_dim", "q", q.dim, "k", k.dim)?;
        let shape = Self {
            batch: q.batch,
            num_qo_heads: q.heads,
            num_kv_heads: k.heads,
            qo_len: q.len,
            kv_len: k.len,
            head_dim: q.dim,
            head_dim_v: v.dim,
        };
        shape.validate()?;
        Ok(shape)
    }

    /// Checks the ranges.
    pub(crate) fn validate(&self) -> Result<()> {
        for (name, got) in [
            ("batch", self.batch),
            ("num_qo_heads", self.num_qo_heads),
            ("num_kv_heads", self.num_kv_heads),
            ("qo_len", self.qo_len),
            ("kv_len", self.kv_len),
        ] {
            if got == 0 {
                return Err(Error::Dimension { name, got, expected: "at least 1" });
            }
        }
        for (name, got) in [("head_dim", self.head_dim), ("head_dim of v", self.head_dim_v)] {
            if got == 0 || got > MAX_HEAD_DIM {
                return Err(Error::Dimension { name, got, expected: "1 to 256" });
            }
        }
        if !self.num_qo_heads.is_multiple_of(self.num_kv_heads) {
            return Err(Error::Groups {
                num_qo_heads: self.num_qo_heads,
                num_kv_heads: self.num_kv_heads,
            });
        }
        // Every size derived below (outputs, masks) must be addressable.
        self.batch
            .checked_mul(self.num_qo_heads)
            .and_then(|x| x.checked_mul(self.qo_len))
            .and_then(|x| x.checked_mul(self.head_dim_v))
            .filter(|&x| x <= isize::MAX as usize / 8)
            .ok_or(Error::Overflow { tensor: "the output" })?;
        Ok(())
    }

    /// The output tensor's sizes.
    pub(crate) fn output_dims(&self) -> Dims {
        Dims { batch: self.batch, heads: self.num_qo_heads, len: self.qo_len, dim: self.head_dim_v }
    }

    /// The key/value head that query head `head` reads.
    #[must_use]
    pub fn kv_head(&self, head: usize) -> usize {
        head / (self.num_qo_heads / self.num_kv_heads)
    }
}

/// One independent attention problem inside a call: a batch entry, or one packed sequence.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Sequence {
    /// Batch index in q, k, v.
    pub(crate) batch: usize,
    /// First query token in the tensor.
    pub(crate) q_start: usize,
    pub(crate) q_len: usize,
    /// First key token in the tensor.
    pub(crate) kv_start: usize,
    pub(crate) kv_len: usize,
}

impl Sequence {
    pub(crate) fn q_blocks(&self) -> usize {
        self.q_len.div_ceil(BLOCK_Q)
    }

    pub(crate) fn kv_blocks(&self) -> usize {
        self.kv_len.div_ceil(BLOCK_KV)
    }

    /// Rows of query block `i`, in the sequence's own coordinates.
    pub(crate) fn q_block(&self, i: usize) -> Range<usize> {
        i * BLOCK_Q..((i + 1) * BLOCK_Q).min(self.q_len)
    }

    /// Rows of key block `j`, in the sequence's own coordinates.
    pub(crate) fn kv_block(&self, j: usize) -> Range<usize> {
        j * BLOCK_KV..((j + 1) * BLOCK_KV).min(self.kv_len)
    }
}

/// ⌈fraction·reachable⌉, at least 1, where a product that is a whole number up to the rounding of
/// the fraction counts as that number (0.15 of 20 is 3).
pub(crate) fn top_k_count(fraction: f64, reachable: usize) -> usize {
    let exact = fraction * reachable as f64;
    let near = exact.round();
    let count =
        if (exact - near).abs() <= 1e-6 * reachable as f64 { near } else { exact.ceil() } as usize;
    count.clamp(1, reachable.max(1))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn top_k_counts() {
        assert_eq!(top_k_count(0.15, 20), 3);
        assert_eq!(top_k_count(f64::from(0.15f32), 20), 3);
        assert_eq!(top_k_count(0.5, 7), 4);
        assert_eq!(top_k_count(1.0, 7), 7);
        assert_eq!(top_k_count(1e-9, 7), 1);
    }
}

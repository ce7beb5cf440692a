//! Compressed sparse rows: the mask form of FlashInfer and of scipy.

use super::BlockMask;
use crate::error::{Error, Result};

/// A block mask as compressed sparse rows. Row r = (sequence·heads + head)·q_blocks + q_block has
/// the key blocks `indices[indptr[r]..indptr[r + 1]]`, ascending.
///
/// ```
/// use sparge::{BlockMask, Csr};
/// let mut mask = BlockMask::empty([1, 1, 2, 3])?;
/// mask.set(0, 0, 1, 2);
/// let csr = Csr::from(&mask);
/// assert_eq!((csr.indptr.as_slice(), csr.indices.as_slice()), (&[0, 0, 1][..], &[2][..]));
/// assert_eq!(csr.to_mask()?, mask);
/// # Ok::<(), sparge::Error>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Csr {
    /// `[sequences, heads, q_blocks, kv_blocks]`.
    pub shape: [usize; 4],
    /// Row starts; one more entry than there are rows.
    pub indptr: Vec<usize>,
    /// Key blocks.
    pub indices: Vec<u32>,
}

impl From<&BlockMask> for Csr {
    fn from(mask: &BlockMask) -> Self {
        let mut indptr = Vec::with_capacity(mask.rows() + 1);
        let mut indices = Vec::with_capacity(mask.count());
        indptr.push(0);
        for row in 0..mask.rows() {
            indices.extend(super::bits(mask.words_of(row)).map(|j| j as u32));
            indptr.push(indices.len());
        }
        Self { shape: mask.shape(), indptr, indices }
    }
}

impl Csr {
    /// The same mask as bits.
    ///
    /// # Errors
    /// [`Error::Csr`] where `indptr` or `indices` do not describe a mask of this shape.
    pub fn to_mask(&self) -> Result<BlockMask> {
        let bad = |what: String| Err(Error::Csr(what));
        let [s, h, q, kv] = self.shape;
        let rows = s
            .checked_mul(h)
            .and_then(|x| x.checked_mul(q))
            .ok_or(Error::Overflow { tensor: "csr mask" })?;
        if self.indptr.len() != rows.saturating_add(1) {
            return bad(format!("indptr has {} entries, expected {rows} + 1", self.indptr.len()));
        }
        if self.indptr[0] != 0 || self.indptr[rows] != self.indices.len() {
            return bad(format!(
                "indptr runs from {} to {}, expected 0 to {} (the number of indices)",
                self.indptr[0],
                self.indptr[rows],
                self.indices.len()
            ));
        }
        if kv > u32::MAX as usize {
            return bad(format!("{kv} key blocks, expected at most {}", u32::MAX));
        }
        // Check before allocating: a hostile shape must not decide how much memory is taken.
        for row in 0..rows {
            let (from, to) = (self.indptr[row], self.indptr[row + 1]);
            let Some(indices) = self.indices.get(from..to) else {
                return bad(format!("row {row} runs from {from} to {to}"));
            };
            if indices.windows(2).any(|w| w[0] >= w[1]) {
                return bad(format!("row {row}'s indices are not strictly ascending"));
            }
            if let Some(&j) = indices.last().filter(|&&j| j as usize >= kv) {
                return bad(format!("row {row} has key block {j} of {kv}"));
            }
        }
        let mut mask = BlockMask::empty(self.shape)?;
        for (row, words) in mask.rows_mut().enumerate().take(rows) {
            for &j in &self.indices[self.indptr[row]..self.indptr[row + 1]] {
                words[j as usize / 64] |= 1 << (j % 64);
            }
        }
        Ok(mask)
    }
}

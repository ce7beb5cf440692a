//! Block masks: which 128×64 blocks of the attention map are computed.

mod csr;

pub use csr::Csr;

use crate::error::{Error, Result};

/// A `[sequences, heads, q_blocks, kv_blocks]` bit mask; a set bit is a block that is computed.
///
/// `q_blocks` = ⌈qo_len/128⌉, `kv_blocks` = ⌈kv_len/64⌉, on every device. With packed sequences
/// the sizes are those of the longest one and the blocks beyond a sequence are never set.
///
/// ```
/// use sparge::BlockMask;
/// let mut mask = BlockMask::empty([1, 2, 3, 4])?;
/// mask.set(0, 1, 2, 3);
/// assert!(mask.get(0, 1, 2, 3));
/// assert_eq!(mask.row(0, 1, 2).collect::<Vec<_>>(), [3]);
/// # Ok::<(), sparge::Error>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BlockMask {
    shape: [usize; 4],
    words_per_row: usize,
    words: Vec<u64>,
}

impl BlockMask {
    /// A mask of `shape` `[sequences, heads, q_blocks, kv_blocks]` with no block set.
    ///
    /// # Errors
    /// [`Error::Overflow`] where the shape is not addressable.
    pub fn empty(shape: [usize; 4]) -> Result<Self> {
        let words_per_row = shape[3].div_ceil(64);
        let words = shape[0]
            .checked_mul(shape[1])
            .and_then(|x| x.checked_mul(shape[2]))
            .and_then(|x| x.checked_mul(words_per_row))
            .filter(|&x| x <= isize::MAX as usize / 64)
            .ok_or(Error::Overflow { tensor: "block_mask" })?;
        let mut storage = Vec::new();
        storage.try_reserve_exact(words).map_err(|_| Error::Overflow { tensor: "block_mask" })?;
        storage.resize(words, 0);
        Ok(Self { shape, words_per_row, words: storage })
    }

    /// A mask from one byte per block, row-major, nonzero = set.
    ///
    /// # Errors
    /// [`Error::BufferTooShort`] where `bytes` is not exactly the shape's size.
    pub fn from_bytes(shape: [usize; 4], bytes: &[u8]) -> Result<Self> {
        let needed = shape
            .iter()
            .try_fold(1usize, |a, &b| a.checked_mul(b))
            .ok_or(Error::Overflow { tensor: "block_mask" })?;
        if bytes.len() != needed {
            return Err(Error::BufferTooShort { tensor: "block_mask", got: bytes.len(), needed });
        }
        let mut mask = Self::empty(shape)?;
        if needed > 0 {
            for (words, row) in
                mask.words.chunks_mut(mask.words_per_row).zip(bytes.chunks(shape[3]))
            {
                for (j, _) in row.iter().enumerate().filter(|&(_, &b)| b != 0) {
                    words[j / 64] |= 1 << (j % 64);
                }
            }
        }
        Ok(mask)
    }

    /// One byte per block, row-major: 1 = set.
    #[must_use]
    pub fn to_bytes(&self) -> Vec<u8> {
        let kv = self.shape[3];
        let mut bytes = Vec::with_capacity(self.rows() * kv);
        for row in 0..self.rows() {
            let words = self.words_of(row);
            bytes.extend((0..kv).map(|j| (words[j / 64] >> (j % 64) & 1) as u8));
        }
        bytes
    }

    /// `[sequences, heads, q_blocks, kv_blocks]`.
    #[must_use]
    pub fn shape(&self) -> [usize; 4] {
        self.shape
    }

    /// Whether a block is set.
    ///
    /// # Panics
    /// Where an index is out of range.
    #[must_use]
    pub fn get(&self, sequence: usize, head: usize, q_block: usize, kv_block: usize) -> bool {
        assert!(kv_block < self.shape[3], "kv_block {kv_block} of {}", self.shape[3]);
        let words = self.words_of(self.row_index(sequence, head, q_block));
        words[kv_block / 64] >> (kv_block % 64) & 1 == 1
    }

    /// Sets a block.
    ///
    /// # Panics
    /// Where an index is out of range.
    pub fn set(&mut self, sequence: usize, head: usize, q_block: usize, kv_block: usize) {
        assert!(kv_block < self.shape[3], "kv_block {kv_block} of {}", self.shape[3]);
        let at = self.row_index(sequence, head, q_block) * self.words_per_row + kv_block / 64;
        self.words[at] |= 1 << (kv_block % 64);
    }

    /// The set key blocks of one query block, ascending.
    ///
    /// # Panics
    /// Where an index is out of range.
    pub fn row(&self, sequence: usize, head: usize, q_block: usize) -> impl Iterator<Item = usize> {
        bits(self.words_of(self.row_index(sequence, head, q_block)))
    }

    /// Number of set blocks.
    #[must_use]
    pub fn count(&self) -> usize {
        self.words.iter().map(|w| w.count_ones() as usize).sum()
    }

    fn rows(&self) -> usize {
        self.shape[0] * self.shape[1] * self.shape[2]
    }

    fn row_index(&self, sequence: usize, head: usize, q_block: usize) -> usize {
        let [s, h, q, _] = self.shape;
        assert!(
            sequence < s && head < h && q_block < q,
            "row [{sequence}, {head}, {q_block}] of {:?}",
            self.shape
        );
        (sequence * h + head) * q + q_block
    }

    fn words_of(&self, row: usize) -> &[u64] {
        &self.words[row * self.words_per_row..][..self.words_per_row]
    }

    /// Rows in `[sequence, head, q_block]` order, as words to fill in parallel.
    pub(crate) fn rows_mut(&mut self) -> std::slice::ChunksMut<'_, u64> {
        self.words.chunks_mut(self.words_per_row.max(1))
    }
}

/// Positions of the set bits, ascending.
pub(crate) fn bits(words: &[u64]) -> impl Iterator<Item = usize> {
    words.iter().enumerate().flat_map(|(i, &word)| {
        std::iter::successors((word != 0).then_some(word), |w| {
            let rest = w & (w - 1);
            (rest != 0).then_some(rest)
        })
        .map(move |w| i * 64 + w.trailing_zeros() as usize)
    })
}

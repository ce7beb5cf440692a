//! Orders of tokens that lie in a T×H×W box: neighbours in space should share a block.
//!
//! Stage 1 works where the 64 or 128 tokens of a block are alike. In an image or a clip, the tokens
//! of a row-major block are a thin strip; along a Hilbert curve they are a compact patch. Attention
//! without a causal mask does not care about the order, so q, k and v (and whatever depends on the
//! position, such as RoPE tables) are permuted before and the output is permuted back after.
//!
//! ```
//! use sparge::permute::{Grid, Order, Permutation};
//! // 16 text tokens, then a clip of 4×6×10.
//! let grid = Grid { prefix: 16, time: 4, height: 6, width: 10, suffix: 0 };
//! let p = Permutation::new(Order::Hilbert, &grid)?;
//! let x: Vec<f32> = (0..2 * 256 * 8).map(|i| i as f32).collect(); // [heads 2, tokens 256, dim 8]
//! let y = p.apply(&x, 8)?;
//! assert_eq!(p.invert(&y, 8)?, x);
//! # Ok::<(), sparge::Error>(())
//! ```

mod hilbert;
mod locality;

pub use locality::{mean_distance, similarity};

use crate::error::{Error, Result};
use crate::policy::mix;
use std::fmt;
use std::str::FromStr;

/// How the tokens of a box are put in a line.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Order {
    /// As they come: x fastest, then y, then t.
    RowMajor,
    /// y fastest, then x, then t.
    ColumnMajor,
    /// t fastest, then x, then y.
    TimeMajor,
    /// Along a generalised Hilbert curve: each token is a direct neighbour of the one before, for
    /// every size of box.
    Hilbert,
    /// The control: shuffled.
    Random {
        /// Another shuffle for each.
        seed: u64,
    },
}

impl fmt::Display for Order {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::RowMajor => "row-major",
            Self::ColumnMajor => "column-major",
            Self::TimeMajor => "time-major",
            Self::Hilbert => "hilbert",
            Self::Random { seed: 0 } => "random",
            Self::Random { seed } => return f.pad(&format!("random:{seed}")),
        })
    }
}

impl FromStr for Order {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        Ok(match text {
            "row-major" => Self::RowMajor,
            "column-major" => Self::ColumnMajor,
            "time-major" => Self::TimeMajor,
            "hilbert" => Self::Hilbert,
            "random" => Self::Random { seed: 0 },
            _ => match text.strip_prefix("random:").and_then(|seed| seed.parse().ok()) {
                Some(seed) => Self::Random { seed },
                None => return Err(Error::Order(text.into())),
            },
        })
    }
}

/// A sequence: `prefix` tokens that stay, a box of `time`×`height`×`width` tokens (row-major: token
/// (t, y, x) is the (t·height + y)·width + x-th), `suffix` tokens that stay.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Grid {
    /// Tokens before the box (text).
    pub prefix: usize,
    /// Frames.
    pub time: usize,
    /// Rows.
    pub height: usize,
    /// Columns.
    pub width: usize,
    /// Tokens after the box (text).
    pub suffix: usize,
}

impl Grid {
    /// A box alone.
    #[must_use]
    pub fn of(time: usize, height: usize, width: usize) -> Self {
        Self { prefix: 0, time, height, width, suffix: 0 }
    }

    /// Tokens in all; `None` where they cannot be counted in u32.
    fn tokens(&self) -> Option<usize> {
        let cells = self.time.checked_mul(self.height)?.checked_mul(self.width)?;
        let all = cells.checked_add(self.prefix)?.checked_add(self.suffix)?;
        (all <= u32::MAX as usize).then_some(all)
    }
}

/// A permutation of a sequence's tokens and its inverse.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Permutation {
    indices: Vec<u32>,
    inverse: Vec<u32>,
}

impl Permutation {
    /// The permutation that puts `grid`'s box in `order`.
    ///
    /// # Errors
    /// [`Error::Dimension`] for an empty box, [`Error::Overflow`] for more than 2³² − 1 tokens.
    pub fn new(order: Order, grid: &Grid) -> Result<Self> {
        let &Grid { prefix, time, height, width, suffix } = grid;
        for (name, got) in [("time", time), ("height", height), ("width", width)] {
            if got == 0 {
                return Err(Error::Dimension { name, got, expected: "at least 1" });
            }
        }
        let tokens = grid.tokens().ok_or(Error::Overflow { tensor: "the grid" })?;
        let mut indices = Vec::new();
        indices.try_reserve_exact(tokens).map_err(|_| Error::Overflow { tensor: "the grid" })?;
        indices.extend(0..prefix as u32);
        let at = |t: usize, y: usize, x: usize| (prefix + (t * height + y) * width + x) as u32;
        let cells = || prefix as u32..(tokens - suffix) as u32;
        match order {
            Order::RowMajor => indices.extend(cells()),
            Order::ColumnMajor => {
                for t in 0..time {
                    (0..width).for_each(|x| indices.extend((0..height).map(|y| at(t, y, x))));
                }
            }
            Order::TimeMajor => {
                for y in 0..height {
                    (0..width).for_each(|x| indices.extend((0..time).map(|t| at(t, y, x))));
                }
            }
            Order::Hilbert => {
                hilbert::walk([time, height, width], |[t, y, x]| indices.push(at(t, y, x)));
            }
            Order::Random { seed } => {
                let mut shuffled: Vec<u32> = cells().collect();
                shuffled.sort_unstable_by_key(|&i| (mix(mix(seed) ^ u64::from(i)), i));
                indices.append(&mut shuffled);
            }
        }
        indices.extend((tokens - suffix) as u32..tokens as u32);
        let mut inverse = vec![0; tokens];
        indices.iter().zip(0u32..).for_each(|(&from, to)| inverse[from as usize] = to);
        Ok(Self { indices, inverse })
    }

    /// `indices()[i]` is the token that comes to place i.
    #[must_use]
    pub fn indices(&self) -> &[u32] {
        &self.indices
    }

    /// `inverse()[i]` is the place that token i comes to.
    #[must_use]
    pub fn inverse(&self) -> &[u32] {
        &self.inverse
    }

    /// `x` `[.., tokens, width]` (contiguous) with its tokens in this order: q, k and v
    /// `[batch, heads, tokens, dim]` with `width` = dim, `[batch, tokens, heads, dim]` with
    /// `width` = heads·dim, RoPE tables `[tokens, dim]`.
    ///
    /// # Errors
    /// [`Error::Dimension`] for a `width` of 0, [`Error::BufferTooShort`] where `x` is no whole
    /// number of sequences.
    pub fn apply<T: Copy>(&self, x: &[T], width: usize) -> Result<Vec<T>> {
        gather(x, width, &self.indices)
    }

    /// The inverse of [`Permutation::apply`]: an output back in the tokens' own order.
    ///
    /// # Errors
    /// As [`Permutation::apply`].
    pub fn invert<T: Copy>(&self, x: &[T], width: usize) -> Result<Vec<T>> {
        gather(x, width, &self.inverse)
    }
}

fn gather<T: Copy>(x: &[T], width: usize, order: &[u32]) -> Result<Vec<T>> {
    if width == 0 {
        return Err(Error::Dimension { name: "width", got: 0, expected: "at least 1" });
    }
    let sequence =
        order.len().checked_mul(width).ok_or(Error::Overflow { tensor: "the sequence" })?;
    if !x.len().is_multiple_of(sequence) {
        let needed = x.len().next_multiple_of(sequence);
        return Err(Error::BufferTooShort { tensor: "the sequence", got: x.len(), needed });
    }
    let mut out = Vec::with_capacity(x.len());
    for sequence in x.chunks_exact(sequence) {
        for &token in order {
            out.extend_from_slice(&sequence[token as usize * width..][..width]);
        }
    }
    Ok(out)
}

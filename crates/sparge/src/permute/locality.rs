//! What an order does to the blocks: how far apart their tokens are, and how alike.

use super::{Grid, Permutation};
use crate::error::{Error, Result};

/// Mean Euclidean distance, in cells, between the tokens of the same block of `block` consecutive
/// box tokens (those before and after the box are left out), over all pairs of different tokens.
///
/// # Errors
/// [`Error::Mismatch`] where the permutation is not of the grid's length.
pub fn mean_distance(permutation: &Permutation, grid: &Grid, block: usize) -> Result<f64> {
    let (got_a, got_b) = (permutation.indices().len(), grid.tokens().unwrap_or(0));
    if got_a != got_b {
        let name = "number of tokens";
        return Err(Error::Mismatch { name, a: "the permutation", got_a, b: "the grid", got_b });
    }
    let cells = &permutation.indices()[grid.prefix..got_a - grid.suffix];
    let place = |&i: &u32| {
        let cell = i as usize - grid.prefix;
        let (t, rest) = (cell / (grid.height * grid.width), cell % (grid.height * grid.width));
        [t, rest / grid.width, rest % grid.width].map(|x| x as f64)
    };
    let (mut sum, mut pairs) = (0.0, 0u64);
    for block in cells.chunks(block.max(2)) {
        let places: Vec<[f64; 3]> = block.iter().map(place).collect();
        for (i, a) in places.iter().enumerate() {
            for b in &places[..i] {
                sum += (0..3).map(|k| (a[k] - b[k]).powi(2)).sum::<f64>().sqrt();
                pairs += 1;
            }
        }
    }
    Ok(if pairs == 0 { 0.0 } else { sum / pairs as f64 })
}

/// Mean over the blocks of `block` consecutive rows of `x` (rows of `width`) of their mean pairwise
/// cosine, the rows themselves included: the paper's self-similarity, 1/block for rows that have
/// nothing in common. A zero row has cosine 0 with everything.
///
/// # Errors
/// [`Error::Dimension`] for a `width` or `block` of 0, [`Error::BufferTooShort`] where `x` is no
/// whole number of rows.
pub fn similarity(x: &[f32], width: usize, block: usize) -> Result<f64> {
    for (name, got) in [("width", width), ("block", block)] {
        if got == 0 {
            return Err(Error::Dimension { name, got, expected: "at least 1" });
        }
    }
    if !x.len().is_multiple_of(width) {
        let needed = x.len().next_multiple_of(width);
        return Err(Error::BufferTooShort { tensor: "x", got: x.len(), needed });
    }
    let blocks = x.chunks(width * block);
    let count = blocks.len().max(1);
    let cosine = |rows: &[f32]| {
        let mut sum = vec![0.0f64; width];
        for row in rows.chunks_exact(width) {
            let norm = row.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>().sqrt();
            if norm > 0.0 {
                sum.iter_mut().zip(row).for_each(|(s, &x)| *s += f64::from(x) / norm);
            }
        }
        let n = (rows.len() / width) as f64;
        sum.iter().map(|s| s * s).sum::<f64>() / (n * n)
    };
    Ok(blocks.map(cosine).sum::<f64>() / count as f64)
}

#[cfg(test)]
mod tests {
    use super::super::{Order, Permutation};
    use super::*;

    #[test]
    fn similarity_of_known_rows() {
        // One block of equal directions, one of two orthogonal ones.
        let x = [1.0, 0.0, 3.0, 0.0, 1.0, 0.0, 0.0, 2.0];
        let got = similarity(&x, 2, 2).expect("valid");
        assert!((got - (1.0 + 0.5) / 2.0).abs() < 1e-12);
    }

    #[test]
    fn hilbert_blocks_are_compact() {
        let grid = Grid { prefix: 3, time: 8, height: 20, width: 30, suffix: 5 };
        let distance = |order| {
            let p = Permutation::new(order, &grid).expect("valid");
            mean_distance(&p, &grid, 64).expect("valid")
        };
        let hilbert = distance(Order::Hilbert);
        for other in [Order::RowMajor, Order::ColumnMajor, Order::TimeMajor] {
            assert!(hilbert < 0.5 * distance(other), "{other}: {hilbert} {}", distance(other));
        }
        assert!(distance(Order::Random { seed: 1 }) > 2.0 * hilbert);
    }
}

//! A blocked f32 matrix product, C = X·Wᵀ, for weights that are packed as they are dequantised.
//!
//! ```text
//! for each block of BLOCK_ROWS tokens (parallel)      its X stays in the second-level cache
//!   for each slice of ≤ DEPTH inputs
//!     for each panel of 16 outputs                     slice of W in the first-level cache
//!       for each 6 tokens: the 6×16 tile in registers
//! ```

use rayon::prelude::*;

use crate::error::Result;
use crate::simd::{self, TILE_COLS, TILE_ROWS, Tile};

/// Tokens per parallel job.
const BLOCK_ROWS: usize = 8 * TILE_ROWS;
/// Inputs per pass: 384·16 floats are 24 KiB, which leaves room in a first-level cache of 32 KiB.
const DEPTH: usize = 384;

/// Rows of W in panels of [`TILE_COLS`]: `[rows / 16][cols][16]`, the last panel padded with zeros.
pub(crate) struct Panels {
    data: Vec<[f32; TILE_COLS]>,
    pub(crate) rows: usize,
    cols: usize,
}

impl Panels {
    /// Room for `rows` rows.
    pub(crate) fn new(rows: usize, cols: usize) -> Self {
        Self { data: vec![[0.0; TILE_COLS]; rows.div_ceil(TILE_COLS) * cols], rows, cols }
    }

    /// Fills with `rows` rows (at most those of `new`); `read(first, out)` writes the rows from `first`
    /// into `out`, row-major.
    pub(crate) fn fill(
        &mut self,
        rows: usize,
        read: impl Fn(usize, &mut [f32]) -> Result<()> + Sync,
    ) -> Result<()> {
        self.rows = rows;
        let cols = self.cols;
        let panels = self.data.par_chunks_mut(cols).take(rows.div_ceil(TILE_COLS)).enumerate();
        panels.try_for_each_init(
            || vec![0.0; TILE_COLS * cols],
            |scratch, (p, panel)| {
                let used = TILE_COLS.min(rows - p * TILE_COLS);
                read(p * TILE_COLS, &mut scratch[..used * cols])?;
                scratch[used * cols..].fill(0.0);
                interleave(scratch, panel);
                Ok(())
            },
        )
    }
}

/// `[16][cols]` → `[cols][16]`, eight columns at a time so that whole cache lines are read.
fn interleave(rows: &[f32], panel: &mut [[f32; TILE_COLS]]) {
    let cols = panel.len();
    for (block, out) in panel.chunks_mut(8).enumerate() {
        for (r, row) in rows.chunks_exact(cols).enumerate() {
            for (out, value) in out.iter_mut().zip(&row[block * 8..]) {
                out[r] = *value;
            }
        }
    }
}

/// C (+)= X·Wᵀ for X `[m, cols]` and C `[m, w.rows]` inside rows of `stride`.
pub(crate) fn multiply(x: &[f32], w: &Panels, c: &mut [f32], stride: usize, accumulate: bool) {
    let cols = w.cols;
    let m = x.len() / cols;
    debug_assert!(stride >= w.rows && (m == 0 || c.len() >= (m - 1) * stride + w.rows));
    // Equal slices: a short last one would waste the tile's start and end.
    let slices = cols.div_ceil(DEPTH);
    let depth = cols.div_ceil(slices);
    let blocks = c.par_chunks_mut(BLOCK_ROWS * stride).zip(x.par_chunks(BLOCK_ROWS * cols));
    blocks.for_each(|(c, x)| {
        for start in (0..cols).step_by(depth) {
            let end = cols.min(start + depth);
            for (p, panel) in w.data.chunks_exact(cols).take(w.rows.div_ceil(TILE_COLS)).enumerate()
            {
                let first = p * TILE_COLS;
                for (t, x) in x.chunks(TILE_ROWS * cols).enumerate() {
                    simd::tile(Tile {
                        rows: x.len() / cols,
                        cols: TILE_COLS.min(w.rows - first),
                        a: &x[start..],
                        a_stride: cols,
                        b: &panel[start..end],
                        c: &mut c[t * TILE_ROWS * stride + first..],
                        c_stride: stride,
                        accumulate: accumulate || start > 0,
                    });
                }
            }
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn product_matches_the_definition() {
        for (m, n, k) in [(1, 1, 1), (7, 17, 5), (49, 33, 400), (100, 40, 801)] {
            let x: Vec<f32> = (0..m * k).map(|i| ((i * 37) % 11) as f32 - 5.0).collect();
            let w: Vec<f32> = (0..n * k).map(|i| ((i * 53) % 13) as f32 - 6.0).collect();
            let mut panels = Panels::new(n + 5, k);
            panels
                .fill(n, |first, out| {
                    out.copy_from_slice(&w[first * k..first * k + out.len()]);
                    Ok(())
                })
                .unwrap();
            let stride = n + 3;
            let mut c = vec![1.0; m * stride];
            multiply(&x, &panels, &mut c, stride, true);
            for i in 0..m {
                for j in 0..stride {
                    // Integers below 2²⁴: exact in any order.
                    let sum: f32 =
                        if j < n { (0..k).map(|l| x[i * k + l] * w[j * k + l]).sum() } else { 0.0 };
                    assert_eq!(c[i * stride + j], 1.0 + sum, "({i}, {j}) of {m}×{n}×{k}");
                }
            }
        }
    }

    /// `cargo test --release -p sparge-candle --lib gemm -- --ignored --nocapture`
    #[test]
    #[ignore = "a measurement"]
    fn measure() {
        for threads in [1, 2] {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| {
                for [m, n, k] in
                    [[4096, 1536, 576], [1024, 576, 1536], [1024, 192, 576], [1024, 896, 4864]]
                {
                    let x = vec![0.5; m * k];
                    let mut w = Panels::new(n, k);
                    w.fill(n, |_, out| {
                        out.fill(0.25);
                        Ok(())
                    })
                    .unwrap();
                    let mut c = vec![0.0; m * n];
                    let best = (0..15)
                        .map(|_| {
                            let start = std::time::Instant::now();
                            multiply(&x, &w, &mut c, n, false);
                            start.elapsed().as_secs_f64()
                        })
                        .fold(f64::MAX, f64::min);
                    println!(
                        "{threads} threads [{m}×{k}]·[{k}×{n}]: {:.0} GFLOP/s",
                        2e-9 * (m * n * k) as f64 / best
                    );
                }
            });
        }
    }
}

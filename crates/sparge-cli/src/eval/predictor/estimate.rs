//! Ways to guess block masses that the operator does not have, written plainly.
//!
//! All have one form: representatives of the queries and of the keys, as feature vectors whose dot
//! products are scores; a softmax over the representatives a query may see; its sums per block.

use sparge::{BLOCK_KV, BLOCK_Q, BlockMasses};
use std::fmt;
use std::ops::Range;

/// A way to guess.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Estimator {
    /// `rows` single queries of each block, evenly spaced, against means of `kv_rows` keys with the
    /// second-order term (1: the keys themselves).
    Sampled { rows: usize, kv_rows: usize },
    /// Means of `q_rows` queries and `kv_rows` keys, and the second order of ln E exp(scale·q·k)
    /// over both: ½·scale²·Σ mean(q²)·var(k), with `both` also ½·scale²·Σ var(q)·k̄² (keys centred).
    Moments { q_rows: usize, kv_rows: usize, both: bool },
    /// Sums along the antidiagonals of `stride` × `stride` tiles (XAttention's score).
    Antidiagonal { stride: usize },
}

impl fmt::Display for Estimator {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Sampled { rows, kv_rows: 1 } => write!(f, "{rows} sampled rows"),
            Self::Sampled { rows, kv_rows } => write!(f, "{rows} sampled rows, {kv_rows} keys+var"),
            Self::Moments { q_rows, kv_rows, both: false } => write!(f, "{q_rows}x{kv_rows}+q²var"),
            Self::Moments { q_rows, kv_rows, .. } => write!(f, "{q_rows}x{kv_rows}+q²var+qvar"),
            Self::Antidiagonal { stride } => write!(f, "antidiagonals, stride {stride}"),
        }
    }
}

/// One head's rows, one after another.
#[derive(Clone, Copy)]
pub(super) struct Rows<'a> {
    pub(super) data: &'a [f32],
    pub(super) dim: usize,
}

impl Rows<'_> {
    pub(super) fn range(&self, rows: &Range<usize>) -> &[f32] {
        &self.data[rows.start * self.dim..rows.end * self.dim]
    }
}

/// What stands for some tokens.
struct Representative {
    tokens: Range<usize>,
    features: Vec<f32>,
}

/// The guessed masses of a causal head whose queries are as many as its keys.
pub(super) fn masses(estimator: Estimator, q: Rows<'_>, k: Rows<'_>, scale: f32) -> BlockMasses {
    let len = q.data.len() / q.dim;
    let (queries, keys) = match estimator {
        Estimator::Sampled { rows, kv_rows } => (
            parts(len, BLOCK_Q / rows)
                .map(|r| {
                    // The middle of the part it stands for.
                    let middle = r.start + r.len() / 2;
                    let row = middle..middle + 1;
                    let features = with_squares(&scaled(q.range(&row), scale), kv_rows > 1);
                    Representative { tokens: row, features }
                })
                .collect::<Vec<_>>(),
            parts(len, kv_rows)
                .map(|r| {
                    let (mean, variance) = moments(k.range(&r), k.dim);
                    let features = if kv_rows > 1 { [mean, variance].concat() } else { mean };
                    Representative { tokens: r, features }
                })
                .collect::<Vec<_>>(),
        ),
        Estimator::Moments { q_rows, kv_rows, both } => {
            let (centre, _) = moments(k.data, k.dim);
            let query = |r: Range<usize>| {
                let (mean, variance) = moments(&scaled(q.range(&r), scale), q.dim);
                let squares = mean.iter().zip(&variance).map(|(m, v)| 0.5 * (m * m + v));
                let half = variance.iter().filter(|_| both).map(|v| 0.5 * v);
                let features = mean.iter().copied().chain(squares).chain(half).collect();
                Representative { tokens: r, features }
            };
            let key = |r: Range<usize>| {
                let (mut mean, variance) = moments(k.range(&r), k.dim);
                mean.iter_mut().zip(&centre).for_each(|(m, c)| *m -= c);
                let squares = mean.iter().filter(|_| both).map(|m| m * m);
                let features = mean.iter().chain(&variance).copied().chain(squares).collect();
                Representative { tokens: r, features }
            };
            (parts(len, q_rows).map(query).collect(), parts(len, kv_rows).map(key).collect())
        }
        Estimator::Antidiagonal { stride } => {
            // Row stride − 1 − i of the queries meets row i of the keys.
            let query = |r: Range<usize>| {
                let rows = scaled(q.range(&r), scale / stride as f32);
                let features = rows.chunks(q.dim).rev().flatten().copied().collect();
                Representative { tokens: r, features }
            };
            let key = |r: Range<usize>| {
                let features = k.range(&r).to_vec();
                Representative { tokens: r, features }
            };
            (parts(len, stride).map(query).collect(), parts(len, stride).map(key).collect())
        }
    };
    sums(len, &queries, &keys)
}

/// The softmax of every query representative over the keys it sees, summed per block.
fn sums(len: usize, queries: &[Representative], keys: &[Representative]) -> BlockMasses {
    let (q_blocks, kv_blocks) = (len.div_ceil(BLOCK_Q), len.div_ceil(BLOCK_KV));
    let mut values = vec![0.0f32; q_blocks * kv_blocks];
    let mut counts = vec![0.0f32; q_blocks];
    for query in queries {
        let block = query.tokens.start / BLOCK_Q;
        let last = query.tokens.end - 1;
        // Where the ragged end makes one side shorter, the common part counts.
        let scores: Vec<f32> = keys
            .iter()
            .take_while(|k| k.tokens.start <= last)
            .map(|k| dot(&query.features, &k.features) + (k.tokens.len() as f32).ln())
            .collect();
        let max = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let sum: f32 = scores.iter().map(|s| (s - max).exp()).sum();
        let row = &mut values[block * kv_blocks..][..kv_blocks];
        for (score, key) in scores.iter().zip(keys) {
            row[key.tokens.start / BLOCK_KV] += (score - max).exp() / sum;
        }
        counts[block] += 1.0;
    }
    for (row, count) in values.chunks_mut(kv_blocks).zip(counts) {
        row.iter_mut().for_each(|x| *x /= count);
    }
    BlockMasses { q_blocks, kv_blocks, values }
}

fn parts(len: usize, size: usize) -> impl Iterator<Item = Range<usize>> {
    (0..len).step_by(size).map(move |start| start..(start + size).min(len))
}

fn scaled(rows: &[f32], factor: f32) -> Vec<f32> {
    rows.iter().map(|x| x * factor).collect()
}

/// `x`, and ½·x² behind it where asked for.
fn with_squares(x: &[f32], squares: bool) -> Vec<f32> {
    let mut all = x.to_vec();
    if squares {
        all.extend(x.iter().map(|x| 0.5 * x * x));
    }
    all
}

/// Mean and variance per dimension.
pub(super) fn moments(rows: &[f32], dim: usize) -> (Vec<f32>, Vec<f32>) {
    let n = (rows.len() / dim) as f32;
    let (mut mean, mut variance) = (vec![0.0; dim], vec![0.0; dim]);
    for row in rows.chunks(dim) {
        mean.iter_mut().zip(row).for_each(|(m, x)| *m += x / n);
    }
    for row in rows.chunks(dim) {
        for ((v, x), m) in variance.iter_mut().zip(row).zip(&mean) {
            *v += (x - m) * (x - m) / n;
        }
    }
    (mean, variance)
}

pub(super) fn dot(a: &[f32], b: &[f32]) -> f32 {
    // Eight sums at once: the compiler may not reorder one.
    let mut sums = [0.0f32; 8];
    let (a8, b8) = (a.chunks_exact(8), b.chunks_exact(8));
    let rest: f32 = a8.remainder().iter().zip(b8.remainder()).map(|(a, b)| a * b).sum();
    for (a, b) in a8.zip(b8) {
        for (sum, (a, b)) in sums.iter_mut().zip(a.iter().zip(b)) {
            *sum += a * b;
        }
    }
    sums.iter().sum::<f32>() + rest
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rows(n: usize, seed: u32) -> Vec<f32> {
        (0..n).map(|i| ((i as f32 + seed as f32) * 0.7).sin()).collect()
    }

    #[test]
    fn all_rows_and_single_keys_are_the_true_masses() {
        let (len, dim, scale) = (256, 8, 0.5);
        let (q, k) = (rows(len * dim, 1), rows(len * dim, 77));
        let (q, k) = (Rows { data: &q, dim }, Rows { data: &k, dim });
        let all = Estimator::Sampled { rows: BLOCK_Q, kv_rows: 1 };
        let got = masses(all, q, k, scale);
        for block in 0..2 {
            let mut exact = [0.0f64; 4];
            for i in block * BLOCK_Q..(block + 1) * BLOCK_Q {
                let p: Vec<f64> = (0..=i)
                    .map(|j| {
                        let s = dot(q.range(&(i..i + 1)), k.range(&(j..j + 1)));
                        f64::from(s * scale).exp()
                    })
                    .collect();
                let sum: f64 = p.iter().sum();
                p.iter().enumerate().for_each(|(j, p)| {
                    exact[j / BLOCK_KV] += p / sum / BLOCK_Q as f64;
                });
            }
            for (got, exact) in got.values[block * 4..].iter().zip(exact) {
                assert!((f64::from(*got) - exact).abs() < 1e-5, "{got} {exact}");
            }
        }
    }

    #[test]
    fn every_row_of_masses_sums_to_one() {
        let (len, dim) = (300, 8);
        let (q, k) = (rows(len * dim, 3), rows(len * dim, 9));
        for estimator in [
            Estimator::Sampled { rows: 8, kv_rows: 16 },
            Estimator::Moments { q_rows: 16, kv_rows: 16, both: true },
            Estimator::Antidiagonal { stride: 4 },
        ] {
            let got = masses(estimator, Rows { data: &q, dim }, Rows { data: &k, dim }, 0.3);
            for row in got.values.chunks(got.kv_blocks) {
                assert!((row.iter().sum::<f32>() - 1.0).abs() < 1e-4, "{estimator}: {row:?}");
            }
        }
    }
}

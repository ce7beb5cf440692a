//! Exact attention of a few queries, and means of rows: what the methods estimate from.

use crate::cpu::{PackedQ, Rows, Running, Scores};
use crate::plan::{HeadAt, Plan};
use crate::tensor::{Element, TensorView};
use std::cmp::Ordering;
use std::ops::Range;

/// One query head of a call and its tensors.
pub(super) struct Head<'h, 'p, 't, T> {
    pub(super) plan: &'h Plan<'p>,
    pub(super) at: HeadAt,
    pub(super) q: &'h TensorView<'t, T>,
    pub(super) k: &'h TensorView<'t, T>,
}

impl<T: Element> Head<'_, '_, '_, T> {
    /// Queries of the sequence.
    pub(super) fn q_len(&self) -> usize {
        self.plan.sequences[self.at.sequence].q_len
    }

    /// Keys of the sequence.
    pub(super) fn kv_len(&self) -> usize {
        self.plan.sequences[self.at.sequence].kv_len
    }

    /// The key position that query `i` is aligned with.
    pub(super) fn position(&self, i: usize) -> isize {
        self.plan.visibility[self.at.sequence].position(i)
    }

    /// Queries `range` as f32, one after another.
    pub(super) fn queries(&self, range: Range<usize>) -> Vec<f32> {
        let seq = self.plan.sequences[self.at.sequence];
        read(self.q, seq.batch, self.at.head, seq.q_start + range.start..seq.q_start + range.end)
    }

    /// Keys `range` as f32, one after another.
    pub(super) fn keys(&self, range: Range<usize>) -> Vec<f32> {
        let seq = self.plan.sequences[self.at.sequence];
        let head = self.plan.shape.kv_head(self.at.head);
        read(self.k, seq.batch, head, seq.kv_start + range.start..seq.kv_start + range.end)
    }

    /// softmax(scale·q·kᵀ) of queries `rows` (at most a few hundred) over all visible keys.
    pub(super) fn attention(&self, rows: Range<usize>) -> Attention {
        let dim = self.plan.shape.head_dim;
        let (q, k) = (self.queries(rows.clone()), self.keys(0..self.kv_len()));
        let see = |r: usize, j: usize| self.plan.sees(self.at, rows.start + r, j);
        softmax(self.plan, (&q, &k), dim, 1.0, see)
    }
}

/// Rows `range` of one head as f32.
fn read<T: Element>(
    x: &TensorView<'_, T>,
    batch: usize,
    head: usize,
    range: Range<usize>,
) -> Vec<f32> {
    let dim = x.dims().dim;
    let mut out = vec![0.0; range.len() * dim];
    for (to, i) in out.chunks_exact_mut(dim).zip(range) {
        T::widen(x.row(batch, head, i), to);
    }
    out
}

/// Attention probabilities, `[key][query]` with a pitch.
pub(super) struct Attention {
    p: Vec<f32>,
    pitch: usize,
    rows: usize,
    /// 1/Σ of each query's column; 0 where a query sees nothing.
    inverse: Vec<f32>,
}

impl Attention {
    /// The probability that query `row` gives to `key`.
    pub(super) fn get(&self, row: usize, key: usize) -> f32 {
        self.p[key * self.pitch + row] * self.inverse[row]
    }

    /// Queries.
    pub(super) fn rows(&self) -> usize {
        self.rows
    }

    /// Keys.
    pub(super) fn keys(&self) -> usize {
        self.p.len() / self.pitch
    }

    /// Sum over the queries of what each gives to `key`.
    pub(super) fn column(&self, key: usize) -> f32 {
        (0..self.rows).map(|row| self.get(row, key)).sum()
    }
}

/// Row softmax of `extra`·scale·q·kᵀ over the pairs that `see` allows; q and k are rows of `width`. Where
/// a row has scores of NaN or +∞ their probabilities are NaN and its others 0: who cannot be compared is
/// taken first, wherever it stands.
pub(super) fn softmax(
    plan: &Plan<'_>,
    (q, k): (&[f32], &[f32]),
    width: usize,
    extra: f64,
    see: impl Fn(usize, usize) -> bool,
) -> Attention {
    let (rows, keys) = (q.len() / width, k.len() / width);
    let lanes = plan.kernels.lanes;
    let panel = if rows <= lanes { lanes } else { plan.kernels.panel };
    let scale = plan.softmax_scale * extra * std::f64::consts::LOG2_E;
    let mut packed = PackedQ::default();
    packed.pack(rows, width, panel, scale as f32, |i| &q[i * width..]);
    let pitch = Scores::pitch(packed.width);
    let mut p = vec![0.0; keys * pitch];
    let k = Rows { data: k, stride: width, len: keys, dim: width };
    let mut s = Scores { data: &mut p, pitch, keys, width: packed.width };
    (plan.kernels.qk)(&packed, &k, &mut s);
    let mut not_numbers = Vec::new();
    for (j, line) in s.data.chunks_exact_mut(pitch).enumerate() {
        for (row, x) in line[..rows].iter_mut().enumerate() {
            let sees = see(row, j);
            let is_number = *x < f32::INFINITY;
            if sees && !is_number {
                not_numbers.push((j, row));
            }
            if !sees || !is_number {
                *x = f32::NEG_INFINITY;
            }
        }
    }
    let mut running = Running::default();
    running.reset(packed.width);
    (plan.kernels.softmax)(&mut s, &mut running);
    let mut inverse: Vec<f32> =
        running.sum[..rows].iter().map(|&x| if x > 0.0 { 1.0 / x } else { 0.0 }).collect();
    for (j, row) in not_numbers {
        p[j * pitch + row] = f32::NAN;
        inverse[row] = 0.0;
    }
    Attention { p, pitch, rows, inverse }
}

/// The means of `x`'s rows (of `width`), `size` rows at a time; the last mean may have fewer.
pub(super) fn means(x: &[f32], width: usize, size: usize) -> Vec<f32> {
    let mut out = Vec::with_capacity(x.len().div_ceil(size * width) * width);
    for part in x.chunks(size * width) {
        let mut mean = vec![0.0f32; width];
        for row in part.chunks_exact(width) {
            mean.iter_mut().zip(row).for_each(|(m, x)| *m += x);
        }
        let inverse = width as f32 / part.len() as f32;
        out.extend(mean.iter().map(|m| m * inverse));
    }
    out
}

/// The larger one first, and NaN before all: of either sign, for which one a processor makes is its own
/// affair.
pub(super) fn descending(a: f64, b: f64) -> Ordering {
    match (a.is_nan(), b.is_nan()) {
        (false, false) => b.total_cmp(&a),
        (a, b) => b.cmp(&a),
    }
}

/// The `count` indices of the largest of `values`, ties to the smaller index. NaN counts as largest.
pub(super) fn largest(values: &[f32], count: usize) -> Vec<usize> {
    let mut order: Vec<usize> = (0..values.len()).collect();
    let by_value = |&a: &usize, &b: &usize| {
        descending(f64::from(values[a]), f64::from(values[b])).then(a.cmp(&b))
    };
    if count < order.len() {
        order.select_nth_unstable_by(count, by_value);
        order.truncate(count);
    }
    order
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn largest_takes_the_first_of_equals() {
        let mut got = largest(&[1.0, 3.0, 3.0, 2.0, 3.0], 2);
        got.sort_unstable();
        assert_eq!(got, [1, 2]);
        assert_eq!(largest(&[1.0, 2.0], 9).len(), 2);
        assert!(largest(&[1.0], 0).is_empty());
    }

    #[test]
    fn largest_takes_nan_of_either_sign_before_all() {
        let mut got = largest(&[f32::INFINITY, 1.0, -f32::NAN, f32::NAN], 2);
        got.sort_unstable();
        assert_eq!(got, [2, 3]);
    }

    #[test]
    fn means_of_a_ragged_tail() {
        assert_eq!(means(&[1.0, 2.0, 3.0, 4.0, 10.0, 20.0], 2, 2), [2.0, 3.0, 10.0, 20.0]);
    }
}

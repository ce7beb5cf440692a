//! How far one output is from another.

/// Differences of an output from a reference, over all elements.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Error {
    /// Σ|o − o′| / Σ|o′|, the paper's relative L1 (o′ the reference). 0 for two zero tensors.
    pub rel_l1: f64,
    /// Cosine of the two as vectors, 1 for two zero tensors.
    pub cosine: f64,
    /// Root of the mean squared difference.
    pub rmse: f64,
    /// Largest |o − o′|.
    pub max_abs: f64,
}

/// Compares `got` with `reference`, element by element.
///
/// ```
/// let e = sparge::metrics::compare([1.0, 2.0], [1.0, 2.5]);
/// assert!((e.rel_l1 - 0.5 / 3.5).abs() < 1e-12);
/// ```
pub fn compare(
    got: impl IntoIterator<Item = f64>,
    reference: impl IntoIterator<Item = f64>,
) -> Error {
    let (mut l1, mut norm, mut dot, mut a2, mut b2, mut d2) = (0.0, 0.0, 0.0, 0.0, 0.0, 0.0);
    let mut max_abs = 0.0f64;
    let mut n = 0u64;
    for (a, b) in got.into_iter().zip(reference) {
        let d = (a - b).abs();
        l1 += d;
        norm += b.abs();
        dot += a * b;
        a2 += a * a;
        b2 += b * b;
        d2 += d * d;
        // A NaN anywhere stays.
        max_abs = if d.is_nan() || max_abs.is_nan() { f64::NAN } else { max_abs.max(d) };
        n += 1;
    }
    let ratio = |x: f64, y: f64, empty: f64| if x == 0.0 && y == 0.0 { empty } else { x / y };
    Error {
        rel_l1: ratio(l1, norm, 0.0),
        cosine: ratio(dot, (a2 * b2).sqrt(), if a2 == b2 { 1.0 } else { 0.0 }),
        rmse: if n == 0 { 0.0 } else { (d2 / n as f64).sqrt() },
        max_abs,
    }
}

//! Inputs, tolerances and comparers for tests of any backend, and for benchmarks.

use crate::tensor::Element;

/// SplitMix64: small, seedable, the same everywhere.
#[derive(Debug, Clone)]
pub struct Rng(u64);

impl Rng {
    /// A generator with this seed.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// The next 64 bits.
    pub fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Uniform in [−1, 1).
    pub fn unit(&mut self) -> f32 {
        (self.bits() >> 40) as f32 / (1u32 << 23) as f32 - 1.0
    }

    /// Uniform in 0..n.
    pub fn below(&mut self, n: usize) -> usize {
        (self.bits() % n.max(1) as u64) as usize
    }

    /// Roughly standard normal (sum of four uniforms).
    pub fn normal(&mut self) -> f32 {
        (self.unit() + self.unit() + self.unit() + self.unit()) * 0.75f32.sqrt()
    }
}

/// `[heads, len, dim]` with the structure attention maps of real models have: each head's rows
/// drift slowly (neighbours are alike, so blocks are self-similar), every so often jump to a new
/// topic, and share a mean. Unstructured noise has no sparsity to find.
#[must_use]
pub fn structured(seed: u64, heads: usize, len: usize, dim: usize) -> Vec<f32> {
    let mut out = Vec::with_capacity(heads * len * dim);
    for head in 0..heads {
        let mut rng = Rng::new(seed ^ (head as u64).wrapping_mul(0x5851_f42d_4c95_7f2d));
        let mean: Vec<f32> = (0..dim).map(|_| 0.5 * rng.normal()).collect();
        let mut topic: Vec<f32> = (0..dim).map(|_| rng.normal()).collect();
        for _ in 0..len {
            if rng.below(96) == 0 {
                topic.iter_mut().for_each(|t| *t = 1.5 * rng.normal());
            }
            for (t, m) in topic.iter_mut().zip(&mean) {
                *t = 0.98 * *t + 0.2 * rng.normal();
                out.push(m + *t + 0.3 * rng.normal());
            }
        }
    }
    out
}

/// Largest acceptable |o − reference| for inputs whose values are at most `v_max` in magnitude and
/// whose scaled scores are at most `s_max`: the rounding of the output type, and f32 rounding of
/// the scores, which the softmax turns into a relative error of that size.
#[must_use]
pub fn tolerance<T: Element>(v_max: f64, s_max: f64) -> f64 {
    let output = match T::NAME {
        "f16" => 2f64.powi(-11),
        "bf16" => 2f64.powi(-8),
        _ => 2f64.powi(-23),
    };
    let scores = 2f64.powi(-22) * (8.0 + s_max);
    (output + scores) * v_max + 1e-7
}

/// The first element where two outputs differ by more than `tolerance`, in words. Non-finite
/// elements must be non-finite in both.
///
/// # Errors
/// A sentence with the place and both values.
pub fn close<T: Element>(got: &[T], reference: &[f64], tolerance: f64) -> Result<(), String> {
    if got.len() != reference.len() {
        return Err(format!("{} elements, the reference has {}", got.len(), reference.len()));
    }
    for (i, (got, &reference)) in got.iter().zip(reference).enumerate() {
        let got = f64::from(got.to_f32());
        let same = if reference.is_finite() {
            (got - reference).abs() <= tolerance
        } else {
            !got.is_finite()
        };
        if !same {
            return Err(format!(
                "element {i}: {got}, reference {reference}, tolerance {tolerance}"
            ));
        }
    }
    Ok(())
}

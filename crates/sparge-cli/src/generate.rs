//! Structured inputs for benchmarks: tokens that resemble their neighbours.
//!
//! Independent random vectors would be the wrong input for sparse attention: every block of their
//! attention map weighs the same. In trained models neighbouring tokens are alike, and queries
//! look for keys like themselves. Both come from a stationary random walk along the tokens,
//! w₀ = e₀, wₜ = ρ·wₜ₋₁ + √(1−ρ²)·eₜ with e standard normal and ρ = 0.99 (neighbours resemble each
//! other over about 100 tokens). Queries and keys share one walk per key/value head, values have
//! their own:
//!
//! q = 1.2·w + 0.6·e₁, k = 1.2·w + 0.6·e₂, v = w′ + 0.5·e₃.
//!
//! The same seed gives the same tensors on every machine.

use std::f64::consts::TAU;

/// q, k and v, contiguous `[heads, tokens, dim]`.
#[derive(Debug)]
pub(crate) struct Inputs {
    pub(crate) q: Vec<f32>,
    pub(crate) k: Vec<f32>,
    pub(crate) v: Vec<f32>,
}

/// Tensors for self-attention with `num_qo_heads` (a multiple of `num_kv_heads`) heads.
pub(crate) fn inputs(
    num_qo_heads: usize,
    num_kv_heads: usize,
    len: usize,
    dim: usize,
    seed: u64,
) -> Inputs {
    let mut rng = Normal::new(seed);
    let group = num_qo_heads / num_kv_heads.max(1);
    let mut inputs = Inputs { q: Vec::new(), k: Vec::new(), v: Vec::new() };
    for _ in 0..num_kv_heads {
        let w = walk(len, dim, &mut rng);
        for _ in 0..group {
            inputs.q.extend(w.iter().map(|w| 1.2 * w + 0.6 * rng.next()));
        }
        inputs.k.extend(w.iter().map(|w| 1.2 * w + 0.6 * rng.next()));
        let w = walk(len, dim, &mut rng);
        inputs.v.extend(w.iter().map(|w| w + 0.5 * rng.next()));
    }
    inputs
}

fn walk(len: usize, dim: usize, rng: &mut Normal) -> Vec<f32> {
    const RHO: f32 = 0.99;
    let fresh = (1.0 - RHO * RHO).sqrt();
    let mut x: Vec<f32> = Vec::with_capacity(len * dim);
    for t in 0..len {
        for i in 0..dim {
            let e = rng.next();
            x.push(if t == 0 { e } else { RHO * x[(t - 1) * dim + i] + fresh * e });
        }
    }
    x
}

/// Standard normal numbers: SplitMix64 and the Box–Muller transform.
#[derive(Debug)]
struct Normal {
    state: u64,
    spare: Option<f32>,
}

impl Normal {
    fn new(seed: u64) -> Self {
        Self { state: seed, spare: None }
    }

    /// Uniform in (0, 1].
    fn uniform(&mut self) -> f64 {
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.state;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^= z >> 31;
        ((z >> 11) + 1) as f64 / (1u64 << 53) as f64
    }

    fn next(&mut self) -> f32 {
        if let Some(x) = self.spare.take() {
            return x;
        }
        let radius = (-2.0 * self.uniform().ln()).sqrt();
        let (sin, cos) = (TAU * self.uniform()).sin_cos();
        self.spare = Some((radius * sin) as f32);
        (radius * cos) as f32
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn normal_numbers_are_normal() {
        let mut rng = Normal::new(1);
        let x: Vec<f64> = (0..100_000).map(|_| f64::from(rng.next())).collect();
        let mean = x.iter().sum::<f64>() / x.len() as f64;
        let var = x.iter().map(|x| x * x).sum::<f64>() / x.len() as f64;
        assert!(mean.abs() < 0.02 && (var - 1.0).abs() < 0.02, "{mean} {var}");
    }

    #[test]
    fn neighbours_are_alike() {
        let x = inputs(4, 2, 256, 16, 0);
        assert_eq!((x.q.len(), x.k.len(), x.v.len()), (4 * 256 * 16, 2 * 256 * 16, 2 * 256 * 16));
        let dot = |a: usize, b: usize| -> f32 {
            (0..16).map(|i| x.k[a * 16 + i] * x.k[b * 16 + i]).sum()
        };
        let near: f32 = (0..200).map(|t| dot(t, t + 1)).sum();
        let far: f32 = (0..200).map(|t| dot(t, (t + 128) % 256)).sum();
        assert!(near > 2.0 * far.abs(), "{near} {far}");
    }
}

//! Numbers to put in and to compare.

use half::{bf16, f16};
use sparge_cuda::DType;

/// Standard normal numbers, reproducible.
pub(crate) struct Normal(pub(crate) u64);
impl Normal {
    pub(crate) fn next(&mut self) -> f32 {
        let mut uniform = || {
            self.0 = self.0.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            ((self.0 >> 40) as f32 + 0.5) / (1u64 << 24) as f32
        };
        (-2.0 * uniform().ln()).sqrt() * (std::f32::consts::TAU * uniform()).cos()
    }
}

/// `x` as `dtype` holds it.
pub(crate) fn rounded(x: f32, dtype: DType) -> f32 {
    match dtype {
        DType::F16 => f16::from_f32(x).to_f32(),
        DType::Bf16 => bf16::from_f32(x).to_f32(),
        DType::F32 => x,
    }
}

pub(crate) fn to_bytes(x: &[f32], dtype: DType) -> Vec<u8> {
    match dtype {
        DType::F16 => x.iter().flat_map(|&x| f16::from_f32(x).to_le_bytes()).collect(),
        DType::Bf16 => x.iter().flat_map(|&x| bf16::from_f32(x).to_le_bytes()).collect(),
        DType::F32 => x.iter().flat_map(|x| x.to_le_bytes()).collect(),
    }
}

pub(crate) fn from_bytes(x: &[u8], dtype: DType) -> Vec<f32> {
    let two = |b: &[u8]| [b[0], b[1]];
    match dtype {
        DType::F16 => x.chunks_exact(2).map(|b| f16::from_le_bytes(two(b)).to_f32()).collect(),
        DType::Bf16 => x.chunks_exact(2).map(|b| bf16::from_le_bytes(two(b)).to_f32()).collect(),
        DType::F32 => {
            x.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect()
        }
    }
}

/// Σ|a − b| / Σ|b|; infinite where a is not finite and b is.
pub(crate) fn relative_l1(a: &[f32], b: &[f64]) -> f64 {
    assert_eq!(a.len(), b.len());
    let (mut difference, mut size) = (0.0, 1e-30);
    for (&a, &b) in a.iter().zip(b) {
        if a.is_finite() != b.is_finite() {
            return f64::INFINITY;
        }
        if b.is_finite() {
            difference += (f64::from(a) - b).abs();
            size += b.abs();
        }
    }
    if difference == 0.0 { 0.0 } else { difference / size }
}

/// Largest difference of two log-sum-exps. Rows masked with the lowest numbers of f32, times log2(e)
/// out of its range, count as equal.
pub(crate) fn lse_error(a: &[f32], b: &[f64]) -> f64 {
    a.iter().zip(b).fold(0.0, |most: f64, (&a, &b)| {
        let lowest = a < -1e37 && b < -1e37 && a.is_finite();
        let e = if lowest
            || f64::from(a) == b
            || !b.is_finite() && b != f64::NEG_INFINITY && !a.is_finite()
        {
            0.0
        } else {
            (f64::from(a) - b).abs()
        };
        if e.is_nan() { f64::INFINITY } else { most.max(e) }
    })
}

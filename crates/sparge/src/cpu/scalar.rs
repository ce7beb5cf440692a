//! Plain Rust: the kernels everywhere, and the measure of the others' tests.

use super::dispatch::{Isa, TileKernels};
use super::kernels;
use super::simd::Simd;

const LANES: usize = 4;

#[derive(Clone, Copy)]
struct Scalar;

macro_rules! lanewise {
    ($a:ident $(, $b:ident)*; $f:expr) => {
        std::array::from_fn(|i| $f($a[i] $(, $b[i])*))
    };
}

impl Simd for Scalar {
    type Array = [f32; LANES];
    type F = [f32; LANES];
    type Bytes = [u8; 4 * LANES];
    type I = [i32; LANES];
    const LANES: usize = LANES;

    #[inline(always)]
    fn splat(self, x: f32) -> Self::F {
        [x; LANES]
    }
    #[inline(always)]
    fn load(self, from: &Self::Array) -> Self::F {
        *from
    }
    #[inline(always)]
    fn store(self, x: Self::F, to: &mut Self::Array) {
        *to = x;
    }
    #[inline(always)]
    fn add(self, a: Self::F, b: Self::F) -> Self::F {
        lanewise!(a, b; |a, b| a + b)
    }
    #[inline(always)]
    fn sub(self, a: Self::F, b: Self::F) -> Self::F {
        lanewise!(a, b; |a, b| a - b)
    }
    #[inline(always)]
    fn mul(self, a: Self::F, b: Self::F) -> Self::F {
        lanewise!(a, b; |a, b| a * b)
    }
    #[inline(always)]
    fn fma(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F {
        // Not mul_add: without hardware FMA that is a library call per element.
        lanewise!(a, b, c; |a: f32, b: f32, c: f32| a * b + c)
    }
    #[inline(always)]
    fn max(self, a: Self::F, b: Self::F) -> Self::F {
        lanewise!(a, b; |a, b| if a > b { a } else { b })
    }
    #[inline(always)]
    fn zero_if_neg_inf(self, x: Self::F) -> Self::F {
        lanewise!(x; |x| if x == f32::NEG_INFINITY { 0.0 } else { x })
    }
    #[inline(always)]
    fn round(self, x: Self::F) -> Self::F {
        // Adding and subtracting 1.5·2²³ rounds |x| < 2²² to nearest, ties to even.
        const MAGIC: f32 = 12_582_912.0;
        lanewise!(x; |x| (x + MAGIC) - MAGIC)
    }
    #[inline(always)]
    fn scale(self, x: Self::F, n: Self::F) -> Self::F {
        lanewise!(x, n; |x: f32, n: f32| {
            f32::from_bits(x.to_bits().wrapping_add(((n as i32) << 23) as u32))
        })
    }
    #[inline(always)]
    fn zero_below(self, x: Self::F, of: Self::F, limit: Self::F) -> Self::F {
        lanewise!(x, of, limit; |x, of, limit| if of < limit { 0.0 } else { x })
    }
    #[inline(always)]
    fn zero_i32(self) -> Self::I {
        [0; LANES]
    }
    #[inline(always)]
    fn load_bytes(self, from: &Self::Bytes) -> Self::I {
        std::array::from_fn(|lane| i32::from_le_bytes(std::array::from_fn(|i| from[4 * lane + i])))
    }
    #[inline(always)]
    fn splat_bytes(self, k: [i8; 4]) -> Self::I {
        [i32::from_le_bytes(k.map(|k| k as u8)); LANES]
    }
    #[inline(always)]
    fn dot4(self, acc: Self::I, q: Self::I, k: Self::I) -> Self::I {
        std::array::from_fn(|lane| {
            let pairs = q[lane].to_le_bytes().into_iter().zip(k[lane].to_le_bytes());
            pairs.fold(acc[lane], |sum, (q, k)| sum + i32::from(q) * i32::from(k as i8))
        })
    }
    #[inline(always)]
    fn to_f32(self, x: Self::I, offset: i32) -> Self::F {
        lanewise!(x; |x| (x - offset) as f32)
    }
}

pub(super) static KERNELS: TileKernels = TileKernels {
    isa: Isa::Scalar,
    lanes: LANES,
    panel: 2 * LANES,
    qk: |q, k, s| kernels::qk::<_, 2>(Scalar, q, k, s),
    qk_i8: |q, k, shift, s| kernels::qk_i8::<_, 2>(Scalar, q, k, shift, s),
    softmax: |s, running| kernels::softmax(Scalar, s, running),
    pv: |p, alpha, v, rows, o| kernels::pv::<_, 2>(Scalar, p, alpha, v, rows, o),
};

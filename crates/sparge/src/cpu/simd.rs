//! The vector operations the tile kernels are written over.

/// A vector unit. A value of an implementing type is the proof that the processor has it, so the
/// methods are safe to call.
///
/// Every method must be `#[inline(always)]`: the kernels are compiled once per instruction set,
/// inside a function that enables it.
pub(crate) trait Simd: Copy {
    /// `LANES` floats in memory.
    type Array: bytemuck::Pod;
    /// `LANES` floats in a register.
    type F: Copy;
    /// `LANES` groups of four bytes in memory.
    type Bytes: bytemuck::Pod;
    /// `LANES` 32-bit integers in a register.
    type I: Copy;
    const LANES: usize;

    fn splat(self, x: f32) -> Self::F;
    fn load(self, from: &Self::Array) -> Self::F;
    fn store(self, x: Self::F, to: &mut Self::Array);
    fn add(self, a: Self::F, b: Self::F) -> Self::F;
    fn sub(self, a: Self::F, b: Self::F) -> Self::F;
    fn mul(self, a: Self::F, b: Self::F) -> Self::F;
    /// a·b + c.
    fn fma(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F;
    /// The larger; `b` where either is NaN.
    fn max(self, a: Self::F, b: Self::F) -> Self::F;
    /// `x` where it is not −∞, else 0.
    fn zero_if_neg_inf(self, x: Self::F) -> Self::F;
    /// The nearest integer.
    fn round(self, x: Self::F) -> Self::F;
    /// x·2ⁿ for whole n in −126..=0.
    fn scale(self, x: Self::F, n: Self::F) -> Self::F;
    /// `x` where `of` is not below `limit` (or is NaN), else 0.
    fn zero_below(self, x: Self::F, of: Self::F, limit: Self::F) -> Self::F;

    /// `LANES` zeros.
    fn zero_i32(self) -> Self::I;
    /// `LANES` groups of four bytes.
    fn load_bytes(self, from: &Self::Bytes) -> Self::I;
    /// The same four bytes in every lane.
    fn splat_bytes(self, k: [i8; 4]) -> Self::I;
    /// acc + Σ q[4·lane + i]·k[4·lane + i] per lane, exact; q unsigned, k signed.
    fn dot4(self, acc: Self::I, q: Self::I, k: Self::I) -> Self::I;
    /// The integers minus `offset`, as floats.
    fn to_f32(self, x: Self::I, offset: i32) -> Self::F;

    /// 2ˣ for x ≤ 0, relative error below 2e-7; exactly 1 at 0, exactly 0 below −126 (masked
    /// scores are −∞ and must leave no trace), NaN for NaN.
    #[inline(always)]
    fn exp2(self, x: Self::F) -> Self::F {
        let limit = self.splat(-126.0);
        let clamped = self.max(limit, x);
        let n = self.round(clamped);
        let f = self.sub(clamped, n);
        // Minimax of 2^f on [−½, ½] with the constant fixed at 1.
        let mut p = self.splat(EXP2[4]);
        p = self.fma(p, f, self.splat(EXP2[3]));
        p = self.fma(p, f, self.splat(EXP2[2]));
        p = self.fma(p, f, self.splat(EXP2[1]));
        p = self.fma(p, f, self.splat(EXP2[0]));
        p = self.fma(p, f, self.splat(1.0));
        self.zero_below(self.scale(p, n), x, limit)
    }
}

/// Coefficients of f¹..f⁵ (least maximum relative error 9.1e-8, found by reweighted least squares
/// on Chebyshev nodes).
const EXP2: [f32; 5] = [0.693_146_97, 0.240_222_42, 0.055_507_34, 0.009_671_513, 0.001_326_472_7];

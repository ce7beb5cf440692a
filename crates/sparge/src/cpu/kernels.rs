//! The tile kernels, written once over [`Simd`].
//!
//! A strip of up to [`STRIP`] query rows meets one block of up to 64 keys:
//!
//! ```text
//! Sᵀ[key][row] = Σ_d K[key][d] · Q[row][d]        qk       keys broadcast, rows across the vector
//! m' = max(m, max_key S); P = 2^(S − m')          softmax  all down the columns of Sᵀ
//! α = 2^(m − m'); l = α·l + Σ_key P
//! O[row][:] = α·O[row][:] + Σ_key P[key][row]·V[key][:]    pv
//! ```
//!
//! Holding S transposed is what makes this cheap: K and V are read where they lie (no packing, no
//! transposes, any token stride), only Q is packed, once per strip, and the softmax needs no
//! reductions across a vector. Register tiles are `MR` × `NV` vectors, 6×2 for 16 registers: 12
//! independent accumulators hide the latency of two 4-cycle FMAs per cycle, and 8 loads per 12 FMAs
//! leave the load ports slack.

use super::simd::Simd;
use crate::quant::quantize_row;

/// Query rows that go through the tile kernels together. Two strips make a block: a strip's Sᵀ
/// (64×64 floats) and V tile stay in a 32 KiB first-level cache.
pub(crate) const STRIP: usize = 64;

/// Query rows, transposed into panels: `data[panel][d][column]`.
#[derive(Debug, Default)]
pub(crate) struct PackedQ {
    pub(crate) data: Vec<f32>,
    pub(crate) dim: usize,
    /// Columns of one panel, a multiple of the vector's lanes.
    pub(crate) panel: usize,
    /// Columns in all: the rows, rounded up to whole panels.
    pub(crate) width: usize,
}

impl PackedQ {
    /// Packs `rows` rows of length `dim`; columns beyond them are zero.
    pub(crate) fn pack<'r>(
        &mut self,
        rows: usize,
        dim: usize,
        panel: usize,
        scale: f32,
        row: impl Fn(usize) -> &'r [f32],
    ) {
        self.dim = dim;
        self.panel = panel;
        self.width = rows.next_multiple_of(panel);
        self.data.clear();
        self.data.resize(self.width * dim, 0.0);
        for i in 0..rows {
            let at = i / panel * panel * dim + i % panel;
            for (d, &x) in row(i)[..dim].iter().enumerate() {
                self.data[at + d * panel] = x * scale;
            }
        }
    }
}

/// int8 query rows, offset to unsigned and transposed by groups of four:
/// `data[panel][d/4][column][d%4]` = q + 128. Every lane of a vector then multiplies the same four
/// key bytes, the form the unsigned-by-signed dot product instructions have.
#[derive(Debug, Default)]
pub(crate) struct PackedQ8 {
    pub(crate) data: Vec<u8>,
    /// Rounded up to a multiple of four.
    pub(crate) dim: usize,
    pub(crate) panel: usize,
    /// Per column: what one unit of q·k is worth, the key's own scale apart.
    pub(crate) scales: Vec<f32>,
}

impl PackedQ8 {
    /// Quantises and packs `rows` rows of length `dim`, one scale each.
    pub(crate) fn pack<'r>(
        &mut self,
        rows: usize,
        dim: usize,
        panel: usize,
        scale: f32,
        row: impl Fn(usize) -> &'r [f32],
    ) {
        let width = rows.next_multiple_of(panel);
        self.dim = dim.next_multiple_of(4);
        self.panel = panel;
        self.data.clear();
        self.data.resize(width * self.dim, 128);
        self.scales.clear();
        self.scales.resize(width, 0.0);
        let mut quantized = vec![0i8; dim];
        for i in 0..rows {
            self.scales[i] = quantize_row(&row(i)[..dim], &mut quantized) * scale;
            let at = i / panel * panel * self.dim + i % panel * 4;
            for (d, &x) in quantized.iter().enumerate() {
                self.data[at + d / 4 * panel * 4 + d % 4] = (i16::from(x) + 128) as u8;
            }
        }
    }
}

/// Rows of a matrix, `stride` elements apart.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Rows<'a, T = f32> {
    pub(crate) data: &'a [T],
    pub(crate) stride: usize,
    pub(crate) len: usize,
    pub(crate) dim: usize,
}

impl<'a, T> Rows<'a, T> {
    #[inline(always)]
    fn row(&self, i: usize) -> &'a [T] {
        &self.data[i * self.stride..][..self.dim]
    }
}

/// int8 keys of one block, dimensions padded with zeros to a multiple of four.
#[derive(Debug, Clone, Copy)]
pub(crate) struct QuantizedRows<'a> {
    pub(crate) rows: Rows<'a, i8>,
    /// Per key.
    pub(crate) scales: &'a [f32],
    /// Per key: the sum of its elements, to take the queries' offset of 128 out again.
    pub(crate) sums: &'a [i32],
}

/// Sᵀ, `[key][pitch]`. The pitch is not a power of two, so that a column's keys do not all fall
/// into the same few cache sets.
#[derive(Debug)]
pub(crate) struct Scores<'a> {
    pub(crate) data: &'a mut [f32],
    pub(crate) pitch: usize,
    pub(crate) keys: usize,
    /// Columns in use, a multiple of the vector's lanes.
    pub(crate) width: usize,
}

impl Scores<'_> {
    /// Pitch for `width` columns.
    pub(crate) fn pitch(width: usize) -> usize {
        width + 16
    }
}

/// The running softmax of a strip; each field has `width` entries. Log2 units.
#[derive(Debug, Default)]
pub(crate) struct Running {
    /// Maximum so far.
    pub(crate) max: Vec<f32>,
    /// Sum of 2^(S − max) so far.
    pub(crate) sum: Vec<f32>,
    /// Factor for what was accumulated before the last tile.
    pub(crate) alpha: Vec<f32>,
    /// Maximum of the last tile.
    pub(crate) tile_max: Vec<f32>,
}

impl Running {
    pub(crate) fn reset(&mut self, width: usize) {
        for (field, start) in [
            (&mut self.max, f32::NEG_INFINITY),
            (&mut self.sum, 0.0),
            (&mut self.alpha, 1.0),
            (&mut self.tile_max, f32::NEG_INFINITY),
        ] {
            field.clear();
            field.resize(width, start);
        }
    }
}

/// The output of a strip, `[row][pitch]`.
#[derive(Debug)]
pub(crate) struct Accumulator<'a> {
    pub(crate) data: &'a mut [f32],
    pub(crate) pitch: usize,
}

/// Sᵀ = K·Qᵀ for all of `k`'s rows and `q`'s columns. `NV` vectors make a full panel.
#[inline(always)]
pub(crate) fn qk<S: Simd, const NV: usize>(simd: S, q: &PackedQ, k: &Rows<'_>, s: &mut Scores<'_>) {
    if q.panel == NV * S::LANES {
        qk_panels::<S, NV>(simd, q, k, s);
    } else {
        debug_assert_eq!(q.panel, S::LANES);
        qk_panels::<S, 1>(simd, q, k, s);
    }
}

#[inline(always)]
fn qk_panels<S: Simd, const NV: usize>(simd: S, q: &PackedQ, k: &Rows<'_>, s: &mut Scores<'_>) {
    for (panel, q) in q.data.chunks_exact(q.dim * q.panel).enumerate() {
        let q: &[S::Array] = bytemuck::cast_slice(q);
        let column = panel * NV * S::LANES;
        let mut key = 0;
        while key + 6 <= k.len {
            qk_tile::<S, 6, NV>(simd, q, k, key, s, column);
            key += 6;
        }
        match k.len - key {
            0 => {}
            1 => qk_tile::<S, 1, NV>(simd, q, k, key, s, column),
            2 => qk_tile::<S, 2, NV>(simd, q, k, key, s, column),
            3 => qk_tile::<S, 3, NV>(simd, q, k, key, s, column),
            4 => qk_tile::<S, 4, NV>(simd, q, k, key, s, column),
            _ => qk_tile::<S, 5, NV>(simd, q, k, key, s, column),
        }
    }
}

#[inline(always)]
fn qk_tile<S: Simd, const MR: usize, const NV: usize>(
    simd: S,
    q: &[S::Array],
    k: &Rows<'_>,
    key: usize,
    s: &mut Scores<'_>,
    column: usize,
) {
    let mut acc = [[simd.splat(0.0); NV]; MR];
    let mut rows: [&[f32]; MR] = [&[]; MR];
    for i in 0..MR {
        rows[i] = &k.row(key + i)[..q.len() / NV];
    }
    for (d, q) in q.chunks_exact(NV).enumerate() {
        let mut b = [simd.splat(0.0); NV];
        for v in 0..NV {
            b[v] = simd.load(&q[v]);
        }
        for i in 0..MR {
            let a = simd.splat(rows[i][d]);
            for v in 0..NV {
                acc[i][v] = simd.fma(a, b[v], acc[i][v]);
            }
        }
    }
    for i in 0..MR {
        let at = (key + i) * s.pitch + column;
        let out: &mut [S::Array] = bytemuck::cast_slice_mut(&mut s.data[at..at + NV * S::LANES]);
        for v in 0..NV {
            simd.store(acc[i][v], &mut out[v]);
        }
    }
}

/// Sᵀ from int8: (q·k)·(scale of q)·(scale of k) + `shift` of q.
#[inline(always)]
pub(crate) fn qk_i8<S: Simd, const NV: usize>(
    simd: S,
    q: &PackedQ8,
    k: &QuantizedRows<'_>,
    shift: &[f32],
    s: &mut Scores<'_>,
) {
    if q.panel == NV * S::LANES {
        qk_i8_panels::<S, NV>(simd, q, k, shift, s);
    } else {
        debug_assert_eq!(q.panel, S::LANES);
        qk_i8_panels::<S, 1>(simd, q, k, shift, s);
    }
}

#[inline(always)]
fn qk_i8_panels<S: Simd, const NV: usize>(
    simd: S,
    q: &PackedQ8,
    k: &QuantizedRows<'_>,
    shift: &[f32],
    s: &mut Scores<'_>,
) {
    for (panel, bytes) in q.data.chunks_exact(q.dim * q.panel).enumerate() {
        let bytes: &[S::Bytes] = bytemuck::cast_slice(bytes);
        let column = panel * NV * S::LANES;
        let mut key = 0;
        // Four keys by `NV` vectors already hide the latency, and a whole block leaves no remainder.
        while key + 4 <= k.rows.len {
            qk_i8_tile::<S, 4, NV>(simd, q, bytes, k, key, shift, s, column);
            key += 4;
        }
        while key < k.rows.len {
            qk_i8_tile::<S, 1, NV>(simd, q, bytes, k, key, shift, s, column);
            key += 1;
        }
    }
}

#[inline(always)]
#[expect(clippy::too_many_arguments, reason = "inlined into its one caller")]
fn qk_i8_tile<S: Simd, const MR: usize, const NV: usize>(
    simd: S,
    q: &PackedQ8,
    bytes: &[S::Bytes],
    k: &QuantizedRows<'_>,
    key: usize,
    shift: &[f32],
    s: &mut Scores<'_>,
    column: usize,
) {
    let mut acc = [[simd.zero_i32(); NV]; MR];
    let mut rows: [&[[i8; 4]]; MR] = [&[]; MR];
    for i in 0..MR {
        rows[i] = &bytemuck::cast_slice(k.rows.row(key + i))[..bytes.len() / NV];
    }
    for (d, bytes) in bytes.chunks_exact(NV).enumerate() {
        let mut b = [simd.zero_i32(); NV];
        for v in 0..NV {
            b[v] = simd.load_bytes(&bytes[v]);
        }
        for i in 0..MR {
            let a = simd.splat_bytes(rows[i][d]);
            for v in 0..NV {
                acc[i][v] = simd.dot4(acc[i][v], b[v], a);
            }
        }
    }
    let columns = column..column + NV * S::LANES;
    let scale: &[S::Array] = bytemuck::cast_slice(&q.scales[columns.clone()]);
    let shift: &[S::Array] = bytemuck::cast_slice(&shift[columns]);
    let (scales, sums) = (&k.scales[key..][..MR], &k.sums[key..][..MR]);
    for i in 0..MR {
        let at = (key + i) * s.pitch + column;
        let out: &mut [S::Array] = bytemuck::cast_slice_mut(&mut s.data[at..at + NV * S::LANES]);
        for v in 0..NV {
            let dot = simd.to_f32(acc[i][v], 128 * sums[i]);
            let scaled = simd.mul(dot, simd.splat(scales[i]));
            simd.store(simd.fma(scaled, simd.load(&scale[v]), simd.load(&shift[v])), &mut out[v]);
        }
    }
}

/// One step of the online softmax: turns S into P in place and updates `running`.
#[inline(always)]
pub(crate) fn softmax<S: Simd>(simd: S, s: &mut Scores<'_>, running: &mut Running) {
    for column in (0..s.width).step_by(S::LANES) {
        let lanes = column..column + S::LANES;
        let cell = |key: usize| key * s.pitch + column..key * s.pitch + column + S::LANES;
        let mut tile_max = simd.splat(f32::NEG_INFINITY);
        for key in 0..s.keys {
            tile_max = simd.max(tile_max, simd.load(one(&s.data[cell(key)])));
        }
        let before = simd.load(one(&running.max[lanes.clone()]));
        let max = simd.max(before, tile_max);
        // A row that has seen nothing yet: subtract 0, so that −∞ stays −∞ and P is 0.
        let base = simd.zero_if_neg_inf(max);
        let mut sum = simd.splat(0.0);
        for key in 0..s.keys {
            let at: &mut S::Array = one_mut(&mut s.data[cell(key)]);
            let p = simd.exp2(simd.sub(simd.load(at), base));
            sum = simd.add(sum, p);
            simd.store(p, at);
        }
        let alpha = simd.exp2(simd.sub(before, base));
        let total = simd.fma(alpha, simd.load(one(&running.sum[lanes.clone()])), sum);
        simd.store(max, one_mut(&mut running.max[lanes.clone()]));
        simd.store(total, one_mut(&mut running.sum[lanes.clone()]));
        simd.store(alpha, one_mut(&mut running.alpha[lanes.clone()]));
        simd.store(tile_max, one_mut(&mut running.tile_max[lanes]));
    }
}

/// O = α·O + Pᵀ·V for the strip's rows `rows`. `v.dim` is a multiple of the vector's lanes.
#[inline(always)]
pub(crate) fn pv<S: Simd, const NV: usize>(
    simd: S,
    p: &Scores<'_>,
    alpha: &[f32],
    v: &Rows<'_>,
    rows: std::ops::Range<usize>,
    o: &mut Accumulator<'_>,
) {
    let mut row = rows.start;
    while row + 6 <= rows.end {
        pv_rows::<S, 6, NV>(simd, p, alpha, v, row, o);
        row += 6;
    }
    match rows.end - row {
        0 => {}
        1 => pv_rows::<S, 1, NV>(simd, p, alpha, v, row, o),
        2 => pv_rows::<S, 2, NV>(simd, p, alpha, v, row, o),
        3 => pv_rows::<S, 3, NV>(simd, p, alpha, v, row, o),
        4 => pv_rows::<S, 4, NV>(simd, p, alpha, v, row, o),
        _ => pv_rows::<S, 5, NV>(simd, p, alpha, v, row, o),
    }
}

#[inline(always)]
fn pv_rows<S: Simd, const MR: usize, const NV: usize>(
    simd: S,
    p: &Scores<'_>,
    alpha: &[f32],
    v: &Rows<'_>,
    row: usize,
    o: &mut Accumulator<'_>,
) {
    let mut column = 0;
    while column + NV * S::LANES <= v.dim {
        pv_tile::<S, MR, NV>(simd, p, alpha, v, row, column, o);
        column += NV * S::LANES;
    }
    while column < v.dim {
        pv_tile::<S, MR, 1>(simd, p, alpha, v, row, column, o);
        column += S::LANES;
    }
}

#[inline(always)]
fn pv_tile<S: Simd, const MR: usize, const NV: usize>(
    simd: S,
    p: &Scores<'_>,
    alpha: &[f32],
    v: &Rows<'_>,
    row: usize,
    column: usize,
    o: &mut Accumulator<'_>,
) {
    let mut acc = [[simd.splat(0.0); NV]; MR];
    for i in 0..MR {
        let at = (row + i) * o.pitch + column;
        let from: &[S::Array] = bytemuck::cast_slice(&o.data[at..at + NV * S::LANES]);
        let alpha = simd.splat(alpha[row + i]);
        for n in 0..NV {
            acc[i][n] = simd.mul(alpha, simd.load(&from[n]));
        }
    }
    for key in 0..p.keys {
        let at = key * v.stride + column;
        let from: &[S::Array] = bytemuck::cast_slice(&v.data[at..at + NV * S::LANES]);
        let p = &p.data[key * p.pitch + row..][..MR];
        let mut b = [simd.splat(0.0); NV];
        for n in 0..NV {
            b[n] = simd.load(&from[n]);
        }
        for i in 0..MR {
            let a = simd.splat(p[i]);
            for n in 0..NV {
                acc[i][n] = simd.fma(a, b[n], acc[i][n]);
            }
        }
    }
    for i in 0..MR {
        let at = (row + i) * o.pitch + column;
        let to: &mut [S::Array] = bytemuck::cast_slice_mut(&mut o.data[at..at + NV * S::LANES]);
        for n in 0..NV {
            simd.store(acc[i][n], &mut to[n]);
        }
    }
}

/// `LANES` floats as one array.
#[inline(always)]
fn one<A: bytemuck::Pod>(x: &[f32]) -> &A {
    &bytemuck::cast_slice(x)[0]
}

#[inline(always)]
fn one_mut<A: bytemuck::Pod>(x: &mut [f32]) -> &mut A {
    &mut bytemuck::cast_slice_mut(x)[0]
}

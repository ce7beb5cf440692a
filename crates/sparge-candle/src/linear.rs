//! Matrices that stay quantised in the file, and their products with many tokens or with one.
//!
//! Many tokens: a tile of rows is dequantised once and multiplied by a blocked f32 matrix product, so
//! the cost of dequantisation is shared by all tokens and the extra memory is one tile. One token:
//! every row is dequantised into the first-level cache and dotted at once; the weights are read from
//! memory in their small form, which is what bounds decoding.

use std::ops::Range;
use std::sync::Arc;

use candle_core::quantized::{GgmlDType, ggml_file::qtensor_from_ggml};
use rayon::prelude::*;

use crate::error::{Error, Result};
use crate::gemm::{self, Panels};
use crate::gguf::{Header, TensorInfo};
use crate::mapped::Mapped;
use crate::quant::Format;
use crate::simd::{self, TILE_COLS};

/// Floats in one dequantised tile (4 MiB): it stays in the last-level cache.
const TILE: usize = 1 << 20;
/// Below this many tokens the row-by-row product is used.
const FEW_TOKENS: usize = 4;

/// A `[rows, cols]` matrix in the model file; a linear layer maps `cols` inputs to `rows` outputs.
#[derive(Debug, Clone)]
pub(crate) struct Matrix {
    file: Arc<Mapped>,
    bytes: Range<usize>,
    format: Format,
    row_bytes: usize,
    pub(crate) rows: usize,
    pub(crate) cols: usize,
}

impl Matrix {
    /// The tensor `name`, which must be `[rows, cols]`.
    pub(crate) fn load(
        file: &Arc<Mapped>,
        header: &Header,
        name: &str,
        rows: usize,
        cols: usize,
    ) -> Result<Self> {
        let info = find(header, name, rows, cols)?;
        let row_bytes = info
            .format
            .row_bytes(cols)
            .ok_or_else(|| Error::gguf(format!("tensor {name:?} has broken rows")))?;
        Ok(Self {
            file: file.clone(),
            bytes: info.bytes.clone(),
            format: info.format,
            row_bytes,
            rows,
            cols,
        })
    }

    /// Dequantises `rows` into `out` on this thread.
    pub(crate) fn dequantise(&self, rows: Range<usize>, out: &mut [f32]) -> Result<()> {
        let start = self.bytes.start + rows.start * self.row_bytes;
        let src = &self.file[start..start + rows.len() * self.row_bytes];
        let dtype = match self.format {
            Format::Q2K => GgmlDType::Q2K,
            Format::Q3K => GgmlDType::Q3K,
            _ => {
                simd::dequantise(self.format, src, out);
                return Ok(());
            }
        };
        let candle = |e: candle_core::Error| Error::gguf(format!("{:?}: {e}", self.format));
        let cpu = candle_core::Device::Cpu;
        let tensor =
            qtensor_from_ggml(dtype, src, vec![rows.len(), self.cols], &cpu).map_err(candle)?;
        let values = tensor
            .dequantize(&cpu)
            .and_then(|t| t.flatten_all()?.to_vec1::<f32>())
            .map_err(candle)?;
        out.copy_from_slice(&values);
        Ok(())
    }

    /// Calls `each(first_row, panels)` for dequantised, packed tiles of whole rows, in order.
    pub(crate) fn tiles(&self, mut each: impl FnMut(usize, &Panels)) -> Result<()> {
        let tile_rows = (TILE / self.cols).next_multiple_of(TILE_COLS).min(self.rows);
        let mut panels = Panels::new(tile_rows, self.cols);
        for first in (0..self.rows).step_by(tile_rows) {
            panels.fill(tile_rows.min(self.rows - first), |row, out| {
                self.dequantise(first + row..first + row + out.len() / self.cols, out)
            })?;
            each(first, &panels);
        }
        Ok(())
    }
}

/// A vector (a norm's weight, a bias), dequantised whole.
pub(crate) fn vector(
    file: &Arc<Mapped>,
    header: &Header,
    name: &str,
    len: usize,
) -> Result<Vec<f32>> {
    let mut out = vec![0.0; len];
    Matrix::load(file, header, name, 1, len)?.dequantise(0..1, &mut out)?;
    Ok(out)
}

fn find<'a>(header: &'a Header, name: &str, rows: usize, cols: usize) -> Result<&'a TensorInfo> {
    let info = header
        .tensors
        .get(name)
        .ok_or_else(|| Error::gguf(format!("tensor {name:?} is missing")))?;
    if (info.rows, info.cols) != (rows, cols) {
        return Err(Error::gguf(format!(
            "tensor {name:?} is [{}, {}], expected [{rows}, {cols}]",
            info.rows, info.cols
        )));
    }
    Ok(info)
}

/// `out = x·Wᵀ` for every `(W, out)` (or `out += x·Wᵀ`), with x `[tokens, cols]` and out `[tokens, rows]`.
///
/// Taking all the layers that share an input at once halves the number of parallel regions when decoding.
pub(crate) fn apply(
    x: &[f32],
    tokens: usize,
    layers: &mut [(&Matrix, &mut [f32])],
    accumulate: bool,
) -> Result<()> {
    if tokens >= FEW_TOKENS {
        for (matrix, out) in layers {
            let rows = matrix.rows;
            matrix.tiles(|first, w| gemm::multiply(x, w, &mut out[first..], rows, accumulate))?;
        }
        return Ok(());
    }
    for t in 0..tokens {
        let jobs: Vec<_> = layers
            .iter_mut()
            .flat_map(|(matrix, out)| {
                let matrix: &Matrix = matrix;
                let y = &mut out[t * matrix.rows..(t + 1) * matrix.rows];
                // Several jobs a thread even out their speeds; too many cost more than they give.
                let share = matrix.rows.div_ceil(4 * rayon::current_num_threads()).max(16);
                y.chunks_mut(share).enumerate().map(move |(i, y)| (matrix, i * share, y))
            })
            .collect();
        jobs.into_par_iter().try_for_each(|(matrix, first, y)| {
            let x = &x[t * matrix.cols..(t + 1) * matrix.cols];
            let mut row = vec![0.0; matrix.cols];
            for (r, y) in y.iter_mut().enumerate() {
                matrix.dequantise(first + r..first + r + 1, &mut row)?;
                let value = simd::dot(&row, x);
                *y = if accumulate { *y + value } else { value };
            }
            Ok::<(), Error>(())
        })?;
    }
    Ok(())
}

//! Orders of tokens that lie in a T×H×W box.

use crate::errors::refused;
use pyo3::prelude::*;
use pyo3::types::PyByteArray;
use sparge::permute::{Grid, Order, Permutation};

/// The token that comes to each place, native int64: `order` is one of [`Order`]'s words.
#[pyfunction]
pub(crate) fn token_order<'py>(
    py: Python<'py>,
    order: &str,
    shape: (usize, usize, usize),
) -> PyResult<Bound<'py, PyByteArray>> {
    let (time, height, width) = shape;
    let bytes = py.detach(|| {
        let order: Order = order.parse()?;
        let permutation = Permutation::new(order, &Grid::of(time, height, width))?;
        Ok(permutation.indices().iter().flat_map(|&i| i64::from(i).to_ne_bytes()).collect())
    });
    let bytes: Vec<u8> = bytes.map_err(refused)?;
    Ok(PyByteArray::new(py, &bytes))
}

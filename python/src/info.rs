//! What this build is and what it found.

use pyo3::prelude::*;
use pyo3::types::PyDict;
use sparge::{BLOCK_KV, BLOCK_Q, Isa, Selection};

/// Facts for `sparge.build_info()`.
#[pyfunction]
pub(crate) fn info(py: Python<'_>) -> PyResult<Bound<'_, PyDict>> {
    let dict = PyDict::new(py);
    dict.set_item("version", env!("CARGO_PKG_VERSION"))?;
    dict.set_item("target", format!("{}-{}", std::env::consts::ARCH, std::env::consts::OS))?;
    dict.set_item("profile", if cfg!(debug_assertions) { "debug" } else { "release" })?;
    dict.set_item("block", (BLOCK_Q, BLOCK_KV))?;
    dict.set_item("isa", name(Isa::detect()))?;
    let available: Vec<_> = Isa::ALL.into_iter().filter(|isa| isa.is_available()).collect();
    dict.set_item("isas", available.into_iter().map(name).collect::<Vec<_>>())?;
    dict.set_item("auto_cdf", Selection::AUTO_CDF)?;
    dict.set_item("auto_min_len", Selection::AUTO_MIN_LEN)?;
    dict.set_item("auto_min_queries", Selection::AUTO_MIN_QUERIES)?;
    Ok(dict)
}

fn name(isa: Isa) -> String {
    format!("{isa:?}").to_lowercase()
}

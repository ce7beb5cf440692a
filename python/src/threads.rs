//! Thread pools of the size the framework asks for.

use pyo3::exceptions::PyRuntimeError;
use pyo3::prelude::*;
use rayon::{ThreadPool, ThreadPoolBuilder};
use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

static POOLS: Mutex<Option<Pools>> = Mutex::new(None);

struct Pools {
    /// The process that made them: a fork has the memory but not the threads.
    pid: u32,
    by_size: HashMap<usize, Arc<ThreadPool>>,
}

/// A pool of `threads` threads (0: as many as the machine has cores).
pub(crate) fn pool(threads: usize) -> PyResult<Arc<ThreadPool>> {
    let pid = std::process::id();
    let mut pools = POOLS.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(stale) = pools.take_if(|pools| pools.pid != pid) {
        // Dropping a pool joins threads that do not exist here.
        std::mem::forget(stale);
    }
    let pools = pools.get_or_insert_with(|| Pools { pid, by_size: HashMap::new() });
    if let Some(pool) = pools.by_size.get(&threads) {
        return Ok(Arc::clone(pool));
    }
    let pool = ThreadPoolBuilder::new()
        .num_threads(threads)
        .thread_name(|i| format!("sparge-{i}"))
        .build()
        .map_err(|e| PyRuntimeError::new_err(format!("cannot start {threads} threads: {e}")))?;
    let pool = Arc::new(pool);
    pools.by_size.insert(threads, Arc::clone(&pool));
    Ok(pool)
}

//! Refuses calls whose results cannot fit in memory, before anything is allocated.
//!
//! Shapes come from files. A small file can ask for a huge output (a wide v for a one-element head
//! dimension) or a huge mask (many empty sequences beside a long one).

use crate::error::{Error, Result};

/// Checks that `bytes` more can be allocated. Always passes where the system does not tell.
pub(crate) fn check(bytes: u128, what: &str) -> Result<()> {
    match available() {
        Some(available) if bytes > u128::from(available) => Err(Error::input(format!(
            "{what} needs {}, but {} of memory are available; use shorter or fewer sequences",
            gib(bytes),
            gib(u128::from(available))
        ))),
        _ => Ok(()),
    }
}

fn gib(bytes: u128) -> String {
    format!("{:.1} GiB", bytes as f64 / f64::from(1 << 30))
}

/// Memory that can be used without swapping, in bytes (Linux).
pub(crate) fn available() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
}

//! What this crate takes from its surroundings: where NVRTC is, where compiled kernels are kept.

use std::path::{Path, PathBuf};

/// Directories to search and to write to.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Environment {
    /// Directories that may hold libnvrtc, best first.
    pub nvrtc_dirs: Vec<PathBuf>,
    /// A pack of kernels compiled ahead of time, looked at first: with it, a known GPU needs no
    /// NVRTC. `examples/pack.rs` makes one.
    pub pack_dir: Option<PathBuf>,
    /// Where compiled kernels are kept; `None` keeps them in memory only.
    pub cache_dir: Option<PathBuf>,
}

impl Environment {
    /// Reads `SPARGE_NVRTC`, `VIRTUAL_ENV`, `CONDA_PREFIX`, `CUDA_HOME`, `CUDA_PATH`, and for the
    /// cache `SPARGE_CACHE`, `XDG_CACHE_HOME`, `HOME`; for the pack `SPARGE_CUBINS`.
    #[must_use]
    pub fn from_process() -> Self {
        let mut dirs: Vec<PathBuf> = path("SPARGE_NVRTC").into_iter().collect();
        for prefix in ["VIRTUAL_ENV", "CONDA_PREFIX"].iter().filter_map(|name| path(name)) {
            dirs.extend(python_dirs(&prefix.join("lib")));
        }
        for home in ["CUDA_HOME", "CUDA_PATH"].iter().filter_map(|name| path(name)) {
            dirs.push(home.join("lib64"));
        }
        let mut toolkits = children(Path::new("/usr/local"), "cuda");
        toolkits.sort_unstable_by(|a, b| b.cmp(a));
        dirs.extend(toolkits.into_iter().map(|dir| dir.join("lib64")));
        dirs.retain(|dir| dir.is_dir());
        let cache_dir = path("SPARGE_CACHE")
            .or_else(|| path("XDG_CACHE_HOME").map(|dir| dir.join("sparge")))
            .or_else(|| path("HOME").map(|dir| dir.join(".cache/sparge")));
        Self { nvrtc_dirs: dirs, pack_dir: path("SPARGE_CUBINS"), cache_dir }
    }
}

/// NVRTC's places in the site-packages below `lib`.
fn python_dirs(lib: &Path) -> Vec<PathBuf> {
    children(lib, "python3")
        .into_iter()
        .flat_map(|python| {
            ["cu13", "cuda_nvrtc"]
                .map(|package| python.join("site-packages/nvidia").join(package).join("lib"))
        })
        .collect()
}

/// Entries of `dir` whose names start with `prefix`.
pub(crate) fn children(dir: &Path, prefix: &str) -> Vec<PathBuf> {
    let Ok(entries) = std::fs::read_dir(dir) else { return Vec::new() };
    entries
        .flatten()
        .filter(|entry| entry.file_name().to_string_lossy().starts_with(prefix))
        .map(|entry| entry.path())
        .collect()
}

#[expect(clippy::disallowed_methods, reason = "the one place that reads the environment")]
fn path(name: &str) -> Option<PathBuf> {
    std::env::var(name).ok().filter(|value| !value.is_empty()).map(PathBuf::from)
}

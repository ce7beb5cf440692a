//! What an interrupted run leaves behind: everything it has read.

use crate::error::{Error, Result};
use crate::output::write_atomically;
use crate::terminal;
use serde::{Deserialize, Serialize};
use sparge::calibrate::{Bounds, Grid, HeadRun, HeadTally};
use std::ops::AddAssign;
use std::path::{Path, PathBuf};

/// The state of a run, written after every sample.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Progress {
    /// What was read and how, in words that are equal only for the same run.
    key: String,
    /// Samples in `tallies`.
    pub(super) surveyed: usize,
    /// `[layer][head]`.
    pub(super) tallies: Vec<Vec<HeadTally>>,
    /// What `runs` were chosen for; the tallies serve any.
    bounds: Option<Bounds>,
    /// Samples in `runs`.
    pub(super) rerun: usize,
    /// `[layer][head]`.
    pub(super) runs: Vec<Vec<HeadRun>>,
}

fn path(output: &Path) -> PathBuf {
    let mut name = output.as_os_str().to_owned();
    name.push(".progress");
    name.into()
}

impl Progress {
    /// What an earlier run with the same `what` and `grid` left for `output`, or nothing yet.
    pub(super) fn open(output: &Path, what: &str, grid: &Grid, restart: bool) -> Result<Self> {
        let key = format!("{what}; {grid:?}");
        let fresh = Self {
            key: key.clone(),
            surveyed: 0,
            tallies: Vec::new(),
            bounds: None,
            rerun: 0,
            runs: Vec::new(),
        };
        let path = path(output);
        if restart || !path.exists() {
            return Ok(fresh);
        }
        let found = std::fs::read_to_string(&path)
            .map_err(|e| e.to_string())
            .and_then(|text| serde_json::from_str::<Self>(&text).map_err(|e| e.to_string()));
        match found {
            Ok(found) if found.key == key => {
                terminal::note(&format!(
                    "going on with {}: {} samples read",
                    path.display(),
                    found.surveyed
                ));
                Ok(found)
            }
            Ok(_) => Err(Error::input(format!(
                "{} was left by a run with another model, text or settings; finish that one, or \
                 begin again with --restart",
                path.display()
            ))),
            Err(e) => Err(Error::input(format!(
                "{} cannot be gone on with ({e}); begin again with --restart",
                path.display()
            ))),
        }
    }

    /// Forgets the runs of settings that other bounds led to.
    pub(super) fn choose(&mut self, bounds: Bounds) {
        if self.bounds != Some(bounds) {
            self.bounds = Some(bounds);
            self.rerun = 0;
            self.runs.clear();
        }
    }

    /// Keeps the state beside `output`.
    pub(super) fn save(&self, output: &Path) -> Result<()> {
        write_atomically(&path(output), |w| {
            serde_json::to_writer(w, self).map_err(std::io::Error::other)
        })
    }
}

/// Removes what a finished run no longer needs.
pub(super) fn remove(output: &Path) -> Result<()> {
    let path = path(output);
    match std::fs::remove_file(&path) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
            Err(Error::failed(format!("cannot remove {}: {e}", path.display())))
        }
        _ => Ok(()),
    }
}

/// Adds `more` to `sums`, layer by layer and head by head.
pub(super) fn add<T: Clone + for<'a> AddAssign<&'a T>>(sums: &mut Vec<Vec<T>>, more: &[Vec<T>]) {
    if sums.is_empty() {
        *sums = more.to_vec();
        return;
    }
    for (sum, more) in sums.iter_mut().flatten().zip(more.iter().flatten()) {
        *sum += more;
    }
}

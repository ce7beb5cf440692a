//! Calibration: what every head may skip, found from dense passes and written to a file.
//!
//! ```text
//! survey  one dense pass per call: what each key block alone contributes to each query block, so
//!         that any selection's error is a sum over blocks, not another attention   ─► HeadTally
//! choose  per head the sparsest setting within the error bounds                    ─► HeadSettings
//! rerun   the chosen settings through the real operator, against dense             ─► HeadRun
//! ```
//!
//! Tallies of several calls (samples, chunks of a prompt) add up. [`Calibration`] is the file.
//!
//! ```
//! use sparge::calibrate::{Bounds, Grid, HeadTally, survey};
//! use sparge::{AttentionOptions, Pooling, SpargeConfig, TensorView};
//! let (heads, tokens, dim) = (2, 512, 32);
//! let x: Vec<f32> = (0..heads * tokens * dim).map(|i| (i as f32 * 0.01).sin()).collect();
//! let x = TensorView::hnd(&x, [1, heads, tokens, dim])?;
//! let grid = Grid::tuning(Pooling::default());
//! let mut dense = vec![0.0f32; heads * tokens * dim]; // softmax(q·kᵀ)·v, by the way
//! let options = AttentionOptions::default();
//! let tallies = survey(&x, &x, &x, &options, &SpargeConfig::default(), &grid, &mut dense)?;
//! let setting = tallies[0].choose(&grid, Bounds { l1: 0.05, l2: 0.06 });
//! assert!(setting.measured.rel_l1 <= 0.06);
//! # Ok::<(), sparge::Error>(())
//! ```

mod file;
mod rerun;
mod survey;
mod tally;

pub use file::{
    Bounds, CalibratedModel, Calibration, CalibrationData, HeadSettings, LayerSettings, Measured,
    Shared,
};
pub use rerun::{HeadRun, rerun};
pub use survey::survey;
pub use tally::{Cell, Grid, HeadTally, Ranking};

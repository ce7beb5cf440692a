//! `--calibration`: settings of every head from a file.

use crate::error::{Error, Result};
use crate::language::Language;
use crate::policy::Policy;
use sparge::calibrate::Calibration;
use sparge::{AttentionShape, Isa, SpargeConfig};
use sparge_candle::SpargeAttention;
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

/// Largest calibration file.
const MAX_FILE: u64 = 64 << 20;

/// Settings from a file instead of from flags.
#[derive(Debug, Clone, Default, clap::Args)]
pub(crate) struct CalibrationArgs {
    /// Every head's own settings, from a file that sparge tune wrote for this model
    #[arg(
        long,
        value_name = "FILE",
        conflicts_with_all = ["topk", "cdf", "theta", "lambda", "pooling", "keep_first", "qk"]
    )]
    calibration: Option<PathBuf>,
}

/// The same where there are no selection flags to conflict with.
#[derive(Debug, Clone, Default, clap::Args)]
pub(crate) struct TunedArgs {
    /// Also measure every head's own settings, from a file that sparge tune wrote for this model, as
    /// the policy tuned
    #[arg(long, value_name = "FILE")]
    calibration: Option<PathBuf>,
}

impl CalibrationArgs {
    /// The file, checked against a model's `[layers, query heads, key/value heads, head_dim]`.
    pub(crate) fn load(
        &self,
        shape: [usize; 4],
        sha256: impl FnOnce() -> Result<String>,
    ) -> Result<Option<Calibration>> {
        self.calibration.as_deref().map(|path| checked(path, shape, sha256)).transpose()
    }

    /// The configuration of one layer for a call of this shape, whatever model it belongs to.
    pub(crate) fn layer(
        &self,
        shape: &AttentionShape,
        layer: usize,
        isa: Option<Isa>,
    ) -> Result<Option<SpargeConfig>> {
        let Some(path) = &self.calibration else { return Ok(None) };
        let calibration = read(path)?;
        let layers = calibration.model.num_layers;
        let got = [layers, shape.num_qo_heads, shape.num_kv_heads, shape.head_dim];
        calibration.check(got, None).map_err(|e| named(path, &e))?;
        let config = calibration.config(layer).map_err(|e| named(path, &e))?;
        let short = shape.kv_len < calibration.settings.min_kv_len;
        let config = if short { SpargeConfig::dense() } else { config };
        Ok(Some(SpargeConfig { isa, ..config }))
    }

    /// Where the file is.
    pub(crate) fn path(&self) -> Option<&Path> {
        self.calibration.as_deref()
    }
}

/// A name and the attention it stands for.
pub(crate) type Contender = (String, SpargeAttention);

impl TunedArgs {
    /// `policies`, checked against the model, and where a file was given `tuned`.
    pub(crate) fn contenders(
        &self,
        policies: &[Policy],
        language: &Language,
        isa: Option<Isa>,
    ) -> Result<Vec<Contender>> {
        let mut all = Vec::new();
        for policy in policies {
            let config = policy.config(isa);
            language.check_config(&config)?;
            all.push((policy.to_string(), policy.attention(isa)));
        }
        if let Some(path) = &self.calibration {
            let calibration = checked(path, language.shape(), || language.sha256())?;
            all.push(("tuned".into(), SpargeAttention::calibrated(&calibration, isa)?));
        }
        Ok(all)
    }
}

fn checked(
    path: &Path,
    shape: [usize; 4],
    sha256: impl FnOnce() -> Result<String>,
) -> Result<Calibration> {
    let calibration = read(path)?;
    // The checksum of a model's file takes a second per gigabyte: shapes first.
    calibration.check(shape, None).map_err(|e| named(path, &e))?;
    if calibration.model.sha256.is_some() {
        calibration.check(shape, Some(&sha256()?)).map_err(|e| named(path, &e))?;
    }
    Ok(calibration)
}

/// Reads a calibration file.
pub(crate) fn read(path: &Path) -> Result<Calibration> {
    let cannot = |e: std::io::Error| Error::input(format!("cannot read {}: {e}", path.display()));
    let mut text = String::new();
    File::open(path)
        .and_then(|file| file.take(MAX_FILE + 1).read_to_string(&mut text))
        .map_err(cannot)?;
    Calibration::from_json(&text).map_err(|e| named(path, &e))
}

fn named(path: &Path, e: &sparge::Error) -> Error {
    Error::input(format!("{}: {e}", path.display()))
}

//! The calibration file: what a model's heads may skip, in JSON that people can read.

use crate::config::{PerHead, Pooling, Selection, SpargeConfig};
use crate::error::{Error, Result};
use serde::{Deserialize, Serialize};

/// What `format` says in every file.
const FORMAT: &str = "sparge-calibration";
/// The version this crate writes, and the only one it reads.
const VERSION: u32 = 1;
/// Largest file that is parsed; a thousand layers of a hundred heads are a tenth of it.
const MAX_BYTES: usize = 64 << 20;

/// Settings of every head of a model, chosen by calibration, and what they were measured to do.
///
/// ```
/// use sparge::calibrate::Calibration;
/// let json = r#"{
///   "format": "sparge-calibration", "version": 1, "made_by": "sparge 0.1.0",
///   "model": { "id": "tiny", "sha256": null,
///              "num_layers": 1, "num_qo_heads": 2, "num_kv_heads": 1, "head_dim": 64 },
///   "data": { "source": "a text", "samples": 5, "tokens": 4096, "causal": true },
///   "bounds": { "l1": 0.05, "l2": 0.06 },
///   "settings": { "pooling": { "q_rows": 16, "kv_rows": 16, "second_order": true },
///                 "keep_first": 1, "keep_local": 2, "min_kv_len": 1024 },
///   "measured": { "rel_l1": 0.02, "qk_sparsity": 0.3, "pv_sparsity": 0.4 },
///   "layers": [ { "heads": [
///     { "cdf": 0.97, "top_k": null, "theta": 0.0, "lambda": 5.0,
///       "rel_l1": 0.04, "qk_sparsity": 0.6, "pv_sparsity": 0.65 },
///     { "cdf": null, "top_k": null, "theta": 0.0, "lambda": null,
///       "rel_l1": 0.0, "qk_sparsity": 0.0, "pv_sparsity": 0.0 } ] } ]
/// }"#;
/// let calibration = Calibration::from_json(json)?;
/// calibration.check([1, 2, 1, 64], None)?; // the model's shape
/// let config = calibration.config(0)?; // of layer 0, for `sparge::attention`
/// assert_eq!(config.selection.get(0), &sparge::Selection::TopCdf(0.97));
/// assert_eq!(config.selection.get(1), &sparge::Selection::All);
/// # Ok::<(), sparge::Error>(())
/// ```
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Calibration {
    /// Always `sparge-calibration`.
    pub format: String,
    /// Version of the format: 1.
    pub version: u32,
    /// The program that wrote the file.
    pub made_by: String,
    /// What was calibrated.
    pub model: CalibratedModel,
    /// What it was calibrated on.
    pub data: CalibrationData,
    /// The error that was allowed.
    pub bounds: Bounds,
    /// What all layers share.
    pub settings: Shared,
    /// All heads together, measured by running the chosen settings.
    pub measured: Measured,
    /// One entry per layer, layer 0 first.
    pub layers: Vec<LayerSettings>,
}

/// The model a calibration belongs to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CalibratedModel {
    /// Its name, Hugging Face id or file name.
    pub id: String,
    /// SHA-256 of the model's file, 64 hexadecimal digits; `None` where it is not known.
    pub sha256: Option<String>,
    /// Layers with attention.
    pub num_layers: usize,
    /// Query heads of a layer.
    pub num_qo_heads: usize,
    /// Key/value heads of a layer.
    pub num_kv_heads: usize,
    /// Elements of a head.
    pub head_dim: usize,
}

impl CalibratedModel {
    /// `[num_layers, num_qo_heads, num_kv_heads, head_dim]`.
    #[must_use]
    pub fn shape(&self) -> [usize; 4] {
        [self.num_layers, self.num_qo_heads, self.num_kv_heads, self.head_dim]
    }
}

/// What was read to calibrate.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CalibrationData {
    /// The text, or the recorded files.
    pub source: String,
    /// How many pieces of it.
    pub samples: usize,
    /// Tokens of each.
    pub tokens: usize,
    /// Whether attention was causal.
    pub causal: bool,
}

/// The relative L1 error Σ|O − O′|/Σ|O| that a head may have.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Bounds {
    /// With stage 1 alone; the paper's l₁ (0.05 to 0.08 there).
    pub l1: f64,
    /// With both stages; the paper's l₂ (0.06 to 0.09 there).
    pub l2: f64,
}

/// What all heads share.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Shared {
    /// Granularity of the prediction.
    pub pooling: Pooling,
    /// As in [`SpargeConfig::keep_first`].
    pub keep_first: usize,
    /// As in [`SpargeConfig::keep_local`]; 0 where the file does not say.
    #[serde(default)]
    pub keep_local: usize,
    /// Calls with fewer keys run dense.
    pub min_kv_len: usize,
}

/// An error and what was skipped for it.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
pub struct Measured {
    /// Σ|O − O′|/Σ|O| against dense attention on the same inputs.
    pub rel_l1: f64,
    /// Share of the reachable blocks whose Q·Kᵀ was skipped.
    pub qk_sparsity: f64,
    /// Share of the reachable 16-row groups whose P·V was skipped, by both stages.
    pub pv_sparsity: f64,
}

/// A layer's heads.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct LayerSettings {
    /// One entry per query head, head 0 first.
    pub heads: Vec<HeadSettings>,
}

/// What a head skips, and what that was measured to do.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct HeadSettings {
    /// τ of [`Selection::TopCdf`]; with `top_k`: [`Selection::Union`]; neither: the head is dense.
    #[serde(default)]
    pub cdf: Option<f64>,
    /// The share of [`Selection::TopK`].
    #[serde(default)]
    pub top_k: Option<f64>,
    /// The judge's θ, 0 for none.
    #[serde(default)]
    pub theta: f64,
    /// λ of stage 2 in nats, `None` where it is off.
    #[serde(default)]
    pub lambda: Option<f64>,
    /// What the setting was measured to do.
    #[serde(flatten)]
    pub measured: Measured,
}

impl HeadSettings {
    /// Stage 1's selection.
    #[must_use]
    pub fn selection(&self) -> Selection {
        match (self.cdf, self.top_k) {
            (None, None) => Selection::All,
            (Some(cdf), None) => Selection::TopCdf(cdf),
            (None, Some(top_k)) => Selection::TopK(top_k),
            (Some(cdf), Some(top_k)) => Selection::Union { cdf, top_k },
        }
    }

    /// Whether stage 1 computes every block.
    #[must_use]
    pub fn is_dense(&self) -> bool {
        self.selection() == Selection::All
    }
}

impl Calibration {
    /// `format` and `version` of a new file.
    #[must_use]
    pub fn header() -> (String, u32) {
        (FORMAT.into(), VERSION)
    }

    /// Parses a file's contents and checks it: format, version, as many layers and heads as it
    /// says, every setting in its range.
    ///
    /// # Errors
    /// [`Error::Calibration`], which says what is wrong and what to do.
    pub fn from_json(text: &str) -> Result<Self> {
        /// Read first: of another format or version only these two are certain.
        #[derive(Deserialize)]
        struct Head {
            format: String,
            version: u32,
        }
        let bad = |what: String| Err(Error::Calibration(what));
        if text.len() > MAX_BYTES {
            return bad(format!("{} bytes, expected at most {MAX_BYTES}", text.len()));
        }
        match serde_json::from_str::<Head>(text) {
            Err(e) => {
                return bad(format!("not a calibration file ({e}); make one with sparge tune"));
            }
            Ok(head) if head.format != FORMAT => {
                return bad(format!(
                    "its format is {:?}, expected {FORMAT:?}; make one with sparge tune",
                    head.format
                ));
            }
            Ok(head) if head.version != VERSION => {
                return bad(format!(
                    "its version is {}, this program reads version {VERSION}; tune again with this \
                     one, or use the one that wrote it",
                    head.version
                ));
            }
            Ok(_) => {}
        }
        let calibration: Self = serde_json::from_str(text)
            .map_err(|e| Error::Calibration(format!("{e}; make it again with sparge tune")))?;
        calibration.validate()?;
        Ok(calibration)
    }

    fn validate(&self) -> Result<()> {
        let bad = |what: String| Err(Error::Calibration(what));
        let model = &self.model;
        if self.layers.len() != model.num_layers || model.num_layers == 0 {
            return bad(format!(
                "it has {} layers and says {}; make it again",
                self.layers.len(),
                model.num_layers
            ));
        }
        if model.num_kv_heads == 0 || !model.num_qo_heads.is_multiple_of(model.num_kv_heads) {
            return bad(format!(
                "num_qo_heads is {} and num_kv_heads {}, expected a multiple",
                model.num_qo_heads, model.num_kv_heads
            ));
        }
        for (i, layer) in self.layers.iter().enumerate() {
            if layer.heads.len() != model.num_qo_heads {
                return bad(format!(
                    "layer {i} has {} heads, expected {}; make it again",
                    layer.heads.len(),
                    model.num_qo_heads
                ));
            }
            // The operator's own rules, so that a file which loads also runs.
            let shape = crate::AttentionShape {
                batch: 1,
                num_qo_heads: model.num_qo_heads,
                num_kv_heads: model.num_kv_heads,
                qo_len: 1,
                kv_len: 1,
                head_dim: model.head_dim,
                head_dim_v: model.head_dim,
            };
            crate::Plan::new(shape, &Default::default(), &self.config(i)?)
                .map_err(|e| Error::Calibration(format!("layer {i}: {e}")))?;
        }
        Ok(())
    }

    /// The file's contents: one line per head.
    #[must_use]
    pub fn to_json(&self) -> String {
        let mut text = String::from("{\n");
        for (name, json) in [
            ("format", line(&self.format)),
            ("version", line(&self.version)),
            ("made_by", line(&self.made_by)),
            ("model", line(&self.model)),
            ("data", line(&self.data)),
            ("bounds", line(&self.bounds)),
            ("settings", line(&self.settings)),
            ("measured", line(&self.measured)),
        ] {
            text += &format!("  \"{name}\": {json},\n");
        }
        text += "  \"layers\": [\n";
        for (i, layer) in self.layers.iter().enumerate() {
            let heads: Vec<String> =
                layer.heads.iter().map(|h| format!("      {}", line(h))).collect();
            let comma = if i + 1 < self.layers.len() { "," } else { "" };
            text += &format!("    {{ \"heads\": [\n{}\n    ] }}{comma}\n", heads.join(",\n"));
        }
        text + "  ]\n}\n"
    }

    /// Refuses a model of another shape `[num_layers, num_qo_heads, num_kv_heads, head_dim]`, or
    /// of another file where both checksums are known.
    ///
    /// # Errors
    /// [`Error::Calibration`], which names both.
    pub fn check(&self, shape: [usize; 4], sha256: Option<&str>) -> Result<()> {
        let names = ["layers", "query heads", "key/value heads", "elements per head"];
        for ((name, ours), theirs) in names.into_iter().zip(self.model.shape()).zip(shape) {
            if ours != theirs {
                return Err(Error::Calibration(format!(
                    "it was made for {} with {ours} {name}, this model has {theirs}; tune this one",
                    self.model.id
                )));
            }
        }
        match (&self.model.sha256, sha256) {
            (Some(ours), Some(theirs)) if !ours.eq_ignore_ascii_case(theirs) => {
                Err(Error::Calibration(format!(
                    "it was made for {} with sha256 {ours}, this model's file has {theirs}; tune \
                     this one",
                    self.model.id
                )))
            }
            _ => Ok(()),
        }
    }

    /// The configuration of layer `layer`, for calls with at least
    /// [`Shared::min_kv_len`] keys.
    ///
    /// # Errors
    /// [`Error::Calibration`] where there is no such layer.
    pub fn config(&self, layer: usize) -> Result<SpargeConfig> {
        let heads = &self
            .layers
            .get(layer)
            .ok_or_else(|| {
                Error::Calibration(format!(
                    "it has {} layers, there is no layer {layer}",
                    self.layers.len()
                ))
            })?
            .heads;
        fn each<T>(heads: &[HeadSettings], f: impl Fn(&HeadSettings) -> T) -> PerHead<T> {
            PerHead::Heads(heads.iter().map(f).collect())
        }
        Ok(SpargeConfig {
            selection: each(heads, HeadSettings::selection),
            theta: each(heads, |h| h.theta),
            lambda: each(heads, |h| h.lambda.unwrap_or(f64::INFINITY)),
            pooling: self.settings.pooling,
            keep_first: self.settings.keep_first,
            keep_local: self.settings.keep_local,
            ..SpargeConfig::default()
        })
    }
}

/// A value as one line of JSON.
fn line(x: &impl Serialize) -> String {
    // Plain structs of numbers and strings: there is nothing that could fail.
    serde_json::to_string(x).unwrap_or_default()
}

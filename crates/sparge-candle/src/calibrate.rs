//! Calibration of a model's heads while it reads: see [`sparge::calibrate`].
//!
//! Both attentions are dense as far as the model can tell, so that every layer is calibrated on the
//! inputs it has when nothing is skipped.

use sparge::calibrate::{Grid, HeadRun, HeadTally, rerun, survey};
use sparge::{AttentionShape, Plan, SpargeConfig, TensorView, forward};

use crate::attention::{Attention, AttentionCall};
use crate::decode::view;
use crate::sparge_attention::{MIN_QUERIES, model_options, output};

type Outcome = Result<(), Box<dyn std::error::Error + Send + Sync>>;

/// Dense attention that tallies what every setting of a grid would do, per layer and head.
#[derive(Debug, Clone)]
pub struct SurveyAttention {
    grid: Grid,
    config: SpargeConfig,
    min_kv_len: usize,
    layers: Vec<Vec<HeadTally>>,
}

impl SurveyAttention {
    /// Of `config` only `keep_first` and `isa` count. Calls with fewer than `min_kv_len` keys, or
    /// few queries, are left out: they run dense in a calibrated model too.
    #[must_use]
    pub fn new(grid: Grid, config: SpargeConfig, min_kv_len: usize) -> Self {
        Self { grid, config, min_kv_len, layers: Vec::new() }
    }

    /// The tallies of everything read since it was made, `[layer][head]`.
    #[must_use]
    pub fn into_layers(self) -> Vec<Vec<HeadTally>> {
        self.layers
    }
}

impl Attention for SurveyAttention {
    fn attend(&mut self, mut call: AttentionCall<'_>) -> Outcome {
        let [q, k, v] = [view(&call.q)?, view(&call.k)?, view(&call.v)?];
        if q.dims().len < MIN_QUERIES || k.dims().len < self.min_kv_len {
            return dense(&mut call, &[q, k, v], &self.config);
        }
        let options = model_options(&call);
        let out = output(&mut call)?;
        let tallies = survey(&q, &k, &v, &options, &self.config, &self.grid, out)?;
        let grid = &self.grid;
        let sums = layer(&mut self.layers, call.layer, tallies.len(), || grid.tally());
        sums.iter_mut().zip(&tallies).for_each(|(a, b)| *a += b);
        Ok(())
    }
}

/// Dense attention that also runs each layer's settings and measures their error.
#[derive(Debug, Clone)]
pub struct RerunAttention {
    configs: Vec<SpargeConfig>,
    min_kv_len: usize,
    layers: Vec<Vec<HeadRun>>,
}

impl RerunAttention {
    /// One configuration per layer; as for [`SurveyAttention::new`], short calls are left out.
    #[must_use]
    pub fn new(configs: Vec<SpargeConfig>, min_kv_len: usize) -> Self {
        Self { configs, min_kv_len, layers: Vec::new() }
    }

    /// What the settings did to everything read since it was made, `[layer][head]`.
    #[must_use]
    pub fn into_layers(self) -> Vec<Vec<HeadRun>> {
        self.layers
    }
}

impl Attention for RerunAttention {
    fn attend(&mut self, mut call: AttentionCall<'_>) -> Outcome {
        let [q, k, v] = [view(&call.q)?, view(&call.k)?, view(&call.v)?];
        let config = self
            .configs
            .get(call.layer)
            .ok_or_else(|| format!("there are settings for {} layers", self.configs.len()))?;
        dense(&mut call, &[q, k, v], config)?;
        if q.dims().len >= MIN_QUERIES && k.dims().len >= self.min_kv_len {
            let options = model_options(&call);
            let runs = rerun(&q, &k, &v, &options, config, output(&mut call)?)?;
            let sums = layer(&mut self.layers, call.layer, runs.len(), HeadRun::default);
            sums.iter_mut().zip(&runs).for_each(|(a, b)| *a += b);
        }
        Ok(())
    }
}

fn dense(
    call: &mut AttentionCall<'_>,
    [q, k, v]: &[TensorView<'_, f32>; 3],
    config: &SpargeConfig,
) -> Outcome {
    let options = model_options(call);
    let config = SpargeConfig { isa: config.isa, ..SpargeConfig::dense() };
    let plan = Plan::new(AttentionShape::of(q, k, v)?, &options, &config)?;
    forward(&plan, q, k, v, output(call)?)?;
    Ok(())
}

/// The sums of one layer, made where they do not exist yet.
fn layer<T: Clone>(
    layers: &mut Vec<Vec<T>>,
    index: usize,
    heads: usize,
    empty: impl Fn() -> T,
) -> &mut [T] {
    if layers.len() <= index {
        layers.resize_with(index + 1, Vec::new);
    }
    if layers[index].is_empty() {
        layers[index] = vec![empty(); heads];
    }
    &mut layers[index]
}

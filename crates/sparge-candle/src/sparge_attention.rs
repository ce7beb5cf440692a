//! The operator as a model's attention.

use sparge::calibrate::Calibration;
use sparge::policy::{self, Policy};
use sparge::{
    Alignment, AttentionOptions, AttentionShape, Dims, HeadStats, Isa, Layout, Plan, SpargeConfig,
    Stats, Strides, forward,
};

use crate::attention::{Attention, AttentionCall};
use crate::decode::{decode, view};

/// Fewer queries than this run dense: a decoding step reads every key once, and predicting which
/// to skip reads them too.
pub(crate) const MIN_QUERIES: usize = 16;

/// Attention through [`sparge`]: prefill under a [`SpargeConfig`], single tokens dense, and counts
/// of what was skipped.
///
/// ```
/// use sparge_candle::SpargeAttention;
/// let sparse = SpargeAttention::new(sparge::SpargeConfig::default());
/// let dense = SpargeAttention::new(sparge::SpargeConfig::dense());
/// # let _ = (sparse, dense);
/// ```
#[derive(Debug, Clone)]
pub struct SpargeAttention {
    /// Layer i's at i; a single one is every layer's.
    configs: Vec<SpargeConfig>,
    /// Prefill with fewer keys runs dense.
    min_kv_len: usize,
    /// Chooses the blocks instead of the configuration's selection.
    policy: Option<Policy>,
    dense: SpargeConfig,
    /// `[layer][head]`, prefill only.
    layers: Vec<Vec<HeadStats>>,
    predict: std::time::Duration,
    attend: std::time::Duration,
}

impl SpargeAttention {
    /// Prefill under `config`.
    #[must_use]
    pub fn new(config: SpargeConfig) -> Self {
        let isa = config.isa;
        Self::with(vec![config], 0, isa)
    }

    /// Prefill with every head's own settings, as `sparge tune` found them; dense where there are
    /// fewer keys than they were made for. [`Calibration::check`] says whether it is this model's.
    ///
    /// # Errors
    /// None for a calibration that was read from a file.
    pub fn calibrated(calibration: &Calibration, isa: Option<Isa>) -> sparge::Result<Self> {
        let configs = (0..calibration.layers.len())
            .map(|layer| Ok(SpargeConfig { isa, ..calibration.config(layer)? }))
            .collect::<sparge::Result<Vec<_>>>()?;
        Ok(Self::with(configs, calibration.settings.min_kv_len, isa))
    }

    fn with(configs: Vec<SpargeConfig>, min_kv_len: usize, isa: Option<Isa>) -> Self {
        Self {
            configs,
            min_kv_len,
            policy: None,
            dense: SpargeConfig { isa, ..SpargeConfig::dense() },
            layers: Vec::new(),
            predict: Default::default(),
            attend: Default::default(),
        }
    }

    /// Prefill over the blocks that `policy` chooses; `config` gives stage 2 and the arithmetic, its
    /// selection is not used. A policy that [looks ahead](Policy::looks_ahead) wants the prompt in
    /// one chunk ([`crate::models::PrefillOptions::chunk`]); a random one draws anew in every layer.
    #[must_use]
    pub fn with_policy(policy: Policy, config: SpargeConfig) -> Self {
        Self { policy: Some(policy), ..Self::new(config) }
    }

    /// Whether the prompt has to be read in one piece, see [`Self::with_policy`].
    #[must_use]
    pub fn looks_ahead(&self) -> bool {
        self.policy.is_some_and(|policy| policy.looks_ahead())
    }

    /// Counts of every prefill since it was made, `[layer][head]`.
    #[must_use]
    pub fn layers(&self) -> &[Vec<HeadStats>] {
        &self.layers
    }

    /// The counts of all layers and heads together.
    #[must_use]
    pub fn total(&self) -> HeadStats {
        self.layers.iter().flatten().fold(HeadStats::default(), |a, &b| a + b)
    }

    /// Time spent in stage 1 and in attention itself, prefill only.
    #[must_use]
    pub fn times(&self) -> (std::time::Duration, std::time::Duration) {
        (self.predict, self.attend)
    }

    fn count(&mut self, layer: usize, stats: &Stats) {
        if self.layers.len() <= layer {
            self.layers.resize(layer + 1, Vec::new());
        }
        let heads = &mut self.layers[layer];
        heads.resize(stats.heads().len(), HeadStats::default());
        heads.iter_mut().zip(stats.heads()).for_each(|(a, &b)| *a = *a + b);
        self.predict += stats.predict;
        self.attend += stats.attend;
    }
}

impl Attention for SpargeAttention {
    fn attend(
        &mut self,
        mut call: AttentionCall<'_>,
    ) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
        if call.q.shape()[1] == 1 {
            return Ok(decode(&mut call, &self.dense)?);
        }
        let (q, k, v) = (view(&call.q)?, view(&call.k)?, view(&call.v)?);
        let prefill = q.dims().len >= MIN_QUERIES;
        let options = model_options(&call);
        let config = match &self.configs[..] {
            _ if !prefill || k.dims().len < self.min_kv_len => &self.dense,
            [all] => all,
            layers => layers.get(call.layer).ok_or_else(|| {
                format!("there are settings for {} layers, not for this one", layers.len())
            })?,
        };
        let plan = Plan::new(AttentionShape::of(&q, &k, &v)?, &options, config)?;
        let layer = call.layer;
        let out = output(&mut call)?;
        let side = match &self.policy {
            Some(policy) if prefill => {
                let policy = in_layer(*policy, layer);
                policy::forward(&plan, &q, &k, &v, &policy, out)?
            }
            _ => forward(&plan, &q, &k, &v, out)?,
        };
        if prefill {
            self.count(layer, &side.stats);
        }
        Ok(())
    }
}

/// What a model's layers ask for.
pub(crate) fn model_options(call: &AttentionCall<'_>) -> AttentionOptions<'static> {
    AttentionOptions {
        softmax_scale: Some(f64::from(call.softmax_scale)),
        causal: Some(Alignment::BottomRight),
        layout: Layout::Nhd,
        ..AttentionOptions::default()
    }
}

/// The call's output as the operator writes it.
pub(crate) fn output<'o>(call: &'o mut AttentionCall<'_>) -> Result<&'o mut [f32], &'static str> {
    let [heads, len, dim] = call.out.shape();
    let contiguous = Strides::contiguous(Dims { batch: 1, heads, len, dim }, Layout::Nhd);
    if call.out.strides() != [contiguous.head, contiguous.token] {
        return Err("the output is not contiguous [tokens, heads, head_dim]");
    }
    Ok(&mut call.out.data()[..len * heads * dim])
}

/// A layer's own policy.
fn in_layer(policy: Policy, layer: usize) -> Policy {
    match policy {
        // The same blocks lost in every layer would be another experiment.
        Policy::Random { density, seed } => Policy::Random {
            density,
            seed: seed.wrapping_mul(0x1_0000_0001).wrapping_add(layer as u64),
        },
        other => other,
    }
}

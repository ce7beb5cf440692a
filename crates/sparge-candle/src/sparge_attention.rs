//! The operator as a model's attention.

use sparge::policy::{self, Policy};
use sparge::{
    Alignment, AttentionOptions, AttentionShape, HeadStats, Layout, Plan, SpargeConfig, Stats,
    Strides, forward,
};

use crate::attention::{Attention, AttentionCall};
use crate::decode::{decode, view};

/// Fewer queries than this run dense: a decoding step reads every key once, and predicting which
/// to skip reads them too.
const MIN_QUERIES: usize = 16;

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
    config: SpargeConfig,
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
        let dense = SpargeConfig { isa: config.isa, ..SpargeConfig::dense() };
        Self {
            config,
            policy: None,
            dense,
            layers: Vec::new(),
            predict: Default::default(),
            attend: Default::default(),
        }
    }

    /// Prefill over the blocks that `policy` chooses; `config` gives stage 2 and the arithmetic, its
    /// selection is not used. A policy that [looks ahead](Policy::looks_ahead) wants the prompt in
    /// one chunk ([`crate::models::PrefillOptions::chunk`]).
    #[must_use]
    pub fn with_policy(policy: Policy, config: SpargeConfig) -> Self {
        Self { policy: Some(policy), ..Self::new(config) }
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
        let dims = q.dims();
        let prefill = dims.len >= MIN_QUERIES;
        let options = AttentionOptions {
            softmax_scale: Some(f64::from(call.softmax_scale)),
            causal: Some(Alignment::BottomRight),
            layout: Layout::Nhd,
            ..AttentionOptions::default()
        };
        let config = if prefill { &self.config } else { &self.dense };
        let plan = Plan::new(AttentionShape::of(&q, &k, &v)?, &options, config)?;
        let contiguous = Strides::contiguous(dims, Layout::Nhd);
        if call.out.strides() != [contiguous.head, contiguous.token] {
            return Err("the output is not contiguous [tokens, heads, head_dim]".into());
        }
        let out = &mut call.out.data()[..dims.len * dims.heads * dims.dim];
        let side = match &self.policy {
            Some(policy) if prefill => policy::forward(&plan, &q, &k, &v, policy, out)?,
            _ => forward(&plan, &q, &k, &v, out)?,
        };
        if prefill {
            self.count(call.layer, &side.stats);
        }
        Ok(())
    }
}

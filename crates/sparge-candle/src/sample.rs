//! Choosing the next token, and the loop that generates text.

use std::ops::ControlFlow;

use crate::attention::Attention;
use crate::error::{Error, Result};
use crate::models::{KvCache, Model, Timings};

/// Draws tokens from logits: greedy, or by temperature within the nucleus of `top_p`.
#[derive(Debug, Clone)]
pub struct Sampler {
    temperature: f32,
    top_p: f32,
    state: u64,
}

impl Sampler {
    /// Always the most likely token.
    pub fn greedy() -> Self {
        Self { temperature: 0.0, top_p: 1.0, state: 0 }
    }

    /// `temperature` ≥ 0 (0 is greedy); `top_p` in (0, 1]: the smallest set of tokens whose
    /// probability reaches it. The same seed gives the same tokens.
    pub fn new(temperature: f32, top_p: f32, seed: u64) -> Result<Self> {
        if !(temperature.is_finite() && temperature >= 0.0 && top_p > 0.0 && top_p <= 1.0) {
            return Err(Error::Argument(format!(
                "temperature {temperature}, top-p {top_p}; expected a temperature ≥ 0 and a top-p in (0, 1]"
            )));
        }
        Ok(Self { temperature, top_p, state: seed })
    }

    /// The next token; ties and NaN go to the lower index.
    pub fn sample(&mut self, logits: &[f32]) -> u32 {
        let best = logits
            .iter()
            .enumerate()
            .fold((0, f32::NEG_INFINITY), |best, (i, x)| if *x > best.1 { (i, *x) } else { best });
        if self.temperature == 0.0 || !best.1.is_finite() {
            return best.0 as u32;
        }
        let mut tokens: Vec<(u32, f32)> = (0u32..)
            .zip(logits)
            .map(|(i, x)| (i, ((x - best.1) / self.temperature).exp()))
            // Below 1e-7 of the best: never drawn, and dropping them makes the sort short.
            .filter(|(_, p)| *p > 1e-7)
            .collect();
        tokens.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
        let total: f32 = tokens.iter().map(|(_, p)| p).sum();
        let mut mass = 0.0;
        let nucleus = tokens.iter().position(|(_, p)| {
            mass += p;
            mass >= self.top_p * total
        });
        tokens.truncate(nucleus.map_or(tokens.len(), |last| last + 1));
        let mut point = self.uniform() * tokens.iter().map(|(_, p)| p).sum::<f32>();
        for (token, p) in &tokens {
            point -= p;
            if point < 0.0 {
                return *token;
            }
        }
        tokens.last().map_or(best.0 as u32, |(token, _)| *token)
    }

    /// SplitMix64, as 24 bits in [0, 1).
    fn uniform(&mut self) -> f32 {
        self.state = self.state.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.state;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        ((z ^ (z >> 31)) >> 40) as f32 / (1u32 << 24) as f32
    }
}

/// What [`generate`] produced.
#[derive(Debug, Clone, Default)]
pub struct Generated {
    /// The new tokens, without the one that ended the answer.
    pub tokens: Vec<u32>,
    /// Time of the model's steps.
    pub timings: Timings,
}

/// Generates up to `max_new_tokens` tokens after a prefill that left `logits` and `cache`.
///
/// Stops at a token for which `is_end` holds, when the cache is full, or when `on_token`, which sees
/// every new token, breaks.
pub fn generate(
    model: &Model,
    mut logits: Vec<f32>,
    cache: &mut KvCache,
    attention: &mut dyn Attention,
    sampler: &mut Sampler,
    max_new_tokens: usize,
    is_end: impl Fn(u32) -> bool,
    mut on_token: impl FnMut(u32) -> ControlFlow<()>,
) -> Result<Generated> {
    let mut out = Generated::default();
    while out.tokens.len() < max_new_tokens {
        let token = sampler.sample(&logits);
        if is_end(token) {
            break;
        }
        out.tokens.push(token);
        if on_token(token).is_break()
            || out.tokens.len() == max_new_tokens
            || cache.len() == cache.capacity()
        {
            break;
        }
        let (next, timings) = model.decode(token, cache, attention)?;
        logits = next;
        out.timings += timings;
    }
    Ok(out)
}

//! One transformer for the whole family: norm, attention, norm, gated feed-forward, in every layer.

use std::ops::ControlFlow;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::layers::{Rope, add_bias, rms_norm, swiglu};
use super::{Config, KvCache, score};
use crate::attention::{Attention, AttentionCall, HeadsView, HeadsViewMut};
use crate::error::{Error, Result};
use crate::gguf::Header;
use crate::linear::{self, Matrix};
use crate::mapped::Mapped;

/// A model whose weights stay, quantised, in a memory-mapped GGUF file.
#[derive(Debug)]
pub struct Model {
    config: Config,
    header: Header,
    embedding: Matrix,
    layers: Vec<Layer>,
    norm: Vec<f32>,
    head: Matrix,
    rope_factors: Option<Vec<f32>>,
}

#[derive(Debug)]
struct Layer {
    attention_norm: Vec<f32>,
    /// q, k, v, each with its bias if it has one.
    qkv: [(Matrix, Option<Vec<f32>>); 3],
    attention_out: Matrix,
    feed_forward_norm: Vec<f32>,
    gate: Matrix,
    up: Matrix,
    down: Matrix,
}

/// Where the time went. The time to the first token is [`Timings::total`] without `scoring`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Timings {
    /// Matrix products, dequantisation included.
    pub linear: Duration,
    /// The attention implementation.
    pub attention: Duration,
    /// Norms, rotation, activation, cache.
    pub other: Duration,
    /// Negative log-likelihoods, if asked for.
    pub scoring: Duration,
}

impl Timings {
    /// The sum of all phases.
    pub fn total(&self) -> Duration {
        self.linear + self.attention + self.other + self.scoring
    }

    /// Runs `f` and adds its time to the phase that `phase` picks.
    fn time<T>(
        &mut self,
        phase: impl FnOnce(&mut Self) -> &mut Duration,
        f: impl FnOnce() -> T,
    ) -> T {
        let start = Instant::now();
        let result = f();
        *phase(self) += start.elapsed();
        result
    }
}

impl std::ops::AddAssign for Timings {
    fn add_assign(&mut self, other: Self) {
        self.linear += other.linear;
        self.attention += other.attention;
        self.other += other.other;
        self.scoring += other.scoring;
    }
}

/// How to read a prompt.
pub struct PrefillOptions<'a> {
    /// Tokens per pass through the layers. Bounds the memory of the activations; default 1024.
    pub chunk: usize,
    /// Whether to compute [`Prefill::nll`]; default no.
    pub score: bool,
    /// Called after each chunk with the number of tokens read so far; `Break` stops with
    /// [`Error::Stopped`].
    pub progress: Option<&'a mut dyn FnMut(usize) -> ControlFlow<()>>,
}

impl Default for PrefillOptions<'_> {
    fn default() -> Self {
        Self { chunk: 1024, score: false, progress: None }
    }
}

/// What reading tokens gave.
#[derive(Debug, Clone)]
pub struct Prefill {
    /// Logits after the last token, one per vocabulary entry.
    pub logits: Vec<f32>,
    /// `nll[i]` = −ln p(token i+1 | tokens 0..=i), one fewer than tokens; empty unless asked for.
    pub nll: Vec<f32>,
    /// Where the time went.
    pub timings: Timings,
}

impl Prefill {
    /// exp(mean of `nll`); NaN if it was not asked for or there was a single token.
    pub fn perplexity(&self) -> f64 {
        let sum: f64 = self.nll.iter().map(|x| f64::from(*x)).sum();
        (sum / self.nll.len() as f64).exp()
    }
}

impl Model {
    /// Opens the GGUF file `path`. Reads only its header and norms; weights are paged in when used.
    pub fn open(path: &Path) -> Result<Self> {
        let file = Arc::new(Mapped::open(path)?);
        let header = Header::read(&file)?;
        let config = Config::read(&header)?;
        let matrix = |name: &str, rows, cols| Matrix::load(&file, &header, name, rows, cols);
        let vector = |name: &str, len| linear::vector(&file, &header, name, len);
        let has = |name: &str| header.tensors.contains_key(name);

        let c = &config;
        let (q_width, kv_width) = (c.num_qo_heads * c.head_dim, c.num_kv_heads * c.head_dim);
        let layer = |i: usize| -> Result<Layer> {
            let name = |part: &str| format!("blk.{i}.{part}");
            let projection = |part: &str, rows| -> Result<(Matrix, Option<Vec<f32>>)> {
                let bias = name(&format!("{part}.bias"));
                let bias = if has(&bias) { Some(vector(&bias, rows)?) } else { None };
                Ok((matrix(&name(&format!("{part}.weight")), rows, c.hidden)?, bias))
            };
            Ok(Layer {
                attention_norm: vector(&name("attn_norm.weight"), c.hidden)?,
                qkv: [
                    projection("attn_q", q_width)?,
                    projection("attn_k", kv_width)?,
                    projection("attn_v", kv_width)?,
                ],
                attention_out: matrix(&name("attn_output.weight"), c.hidden, q_width)?,
                feed_forward_norm: vector(&name("ffn_norm.weight"), c.hidden)?,
                gate: matrix(&name("ffn_gate.weight"), c.feed_forward, c.hidden)?,
                up: matrix(&name("ffn_up.weight"), c.feed_forward, c.hidden)?,
                down: matrix(&name("ffn_down.weight"), c.hidden, c.feed_forward)?,
            })
        };
        // Without an output matrix of its own a model uses the embedding's.
        let head = if has("output.weight") { "output.weight" } else { "token_embd.weight" };
        Ok(Self {
            layers: (0..c.num_layers).map(layer).collect::<Result<_>>()?,
            embedding: matrix("token_embd.weight", c.vocab, c.hidden)?,
            norm: vector("output_norm.weight", c.hidden)?,
            head: matrix(head, c.vocab, c.hidden)?,
            rope_factors: if has("rope_freqs.weight") {
                Some(vector("rope_freqs.weight", c.rope_dim / 2)?)
            } else {
                None
            },
            config,
            header,
        })
    }

    /// The model's shape and constants.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// The file's metadata, from which a [`crate::Tokenizer`] is made.
    pub fn header(&self) -> &Header {
        &self.header
    }

    /// Reads `tokens` behind those in `cache`. On an error the cache keeps the chunks already read.
    pub fn prefill(
        &self,
        tokens: &[u32],
        cache: &mut KvCache,
        attention: &mut dyn Attention,
        options: PrefillOptions<'_>,
    ) -> Result<Prefill> {
        let PrefillOptions { chunk, score, mut progress } = options;
        if tokens.is_empty() || chunk == 0 {
            return Err(Error::Argument(
                "no tokens to read (or a chunk of 0); expected at least one".into(),
            ));
        }
        if let Some(token) = tokens.iter().find(|t| **t as usize >= self.config.vocab) {
            return Err(Error::Argument(format!(
                "token {token}; the vocabulary has {}",
                self.config.vocab
            )));
        }
        cache.reserve(&self.config, tokens.len())?;

        let mut timings = Timings::default();
        let mut nll = Vec::new();
        let mut logits = Vec::new();
        for (i, part) in tokens.chunks(chunk).enumerate() {
            let read = i * chunk + part.len();
            let hidden = self.forward(part, cache, attention, &mut timings)?;
            if score {
                // The last token of all has no known successor.
                let targets = &tokens[i * chunk + 1..tokens.len().min(read + 1)];
                nll.extend(timings.time(|t| &mut t.scoring, || self.score(&hidden, targets))?);
            }
            if read == tokens.len() {
                let last = &hidden[hidden.len() - self.config.hidden..];
                logits = timings.time(|t| &mut t.linear, || self.logits(last))?;
            }
            if progress.as_mut().is_some_and(|p| p(read).is_break()) {
                return Err(Error::Stopped);
            }
        }
        Ok(Prefill { logits, nll, timings })
    }

    /// Reads one token and returns the logits after it.
    pub fn decode(
        &self,
        token: u32,
        cache: &mut KvCache,
        attention: &mut dyn Attention,
    ) -> Result<(Vec<f32>, Timings)> {
        let read = self.prefill(&[token], cache, attention, PrefillOptions::default())?;
        Ok((read.logits, read.timings))
    }

    /// `hidden` before the final norm → logits of one token.
    fn logits(&self, hidden: &[f32]) -> Result<Vec<f32>> {
        let mut normed = vec![0.0; self.config.hidden];
        rms_norm(hidden, &self.norm, self.config.norm_eps, &mut normed);
        let mut logits = vec![0.0; self.config.vocab];
        linear::apply(&normed, 1, &mut [(&self.head, &mut logits)], false)?;
        Ok(logits)
    }

    fn score(&self, hidden: &[f32], targets: &[u32]) -> Result<Vec<f32>> {
        let hidden = &hidden[..targets.len() * self.config.hidden];
        let mut normed = vec![0.0; hidden.len()];
        rms_norm(hidden, &self.norm, self.config.norm_eps, &mut normed);
        score::nll(&normed, &self.head, targets)
    }

    /// One chunk through all layers; returns the residual stream `[tokens, hidden]`.
    fn forward(
        &self,
        tokens: &[u32],
        cache: &mut KvCache,
        attention: &mut dyn Attention,
        timings: &mut Timings,
    ) -> Result<Vec<f32>> {
        let c = &self.config;
        let (n, start) = (tokens.len(), cache.len());
        let (q_width, kv_width) = (c.num_qo_heads * c.head_dim, c.num_kv_heads * c.head_dim);
        let mut x = vec![0.0; n * c.hidden];
        for (row, token) in x.chunks_exact_mut(c.hidden).zip(tokens) {
            let token = *token as usize;
            self.embedding.dequantise(token..token + 1, row)?;
        }
        let rope =
            timings.time(|t| &mut t.other, || Rope::new(c, self.rope_factors.as_deref(), start, n));
        // One set of buffers for all layers.
        let mut normed = vec![0.0; n * c.hidden];
        let (mut q, mut attended) = (vec![0.0; n * q_width], vec![0.0; n * q_width]);
        let (mut k, mut v) = (vec![0.0; n * kv_width], vec![0.0; n * kv_width]);
        let (mut gate, mut up) = (vec![0.0; n * c.feed_forward], vec![0.0; n * c.feed_forward]);

        for (index, layer) in self.layers.iter().enumerate() {
            timings.time(
                |t| &mut t.other,
                || rms_norm(&x, &layer.attention_norm, c.norm_eps, &mut normed),
            );
            let [(wq, bq), (wk, bk), (wv, bv)] = &layer.qkv;
            timings.time(
                |t| &mut t.linear,
                || {
                    linear::apply(
                        &normed,
                        n,
                        &mut [(wq, &mut q), (wk, &mut k), (wv, &mut v)],
                        false,
                    )
                },
            )?;
            timings.time(
                |t| &mut t.other,
                || {
                    for (x, bias) in [(&mut q, bq), (&mut k, bk), (&mut v, bv)] {
                        if let Some(bias) = bias {
                            add_bias(x, bias);
                        }
                    }
                    rope.apply(&mut q, c.num_qo_heads, c.head_dim);
                    rope.apply(&mut k, c.num_kv_heads, c.head_dim);
                    cache.write(index, &k, &v, n);
                },
            );
            let [keys, values] = cache.views(index, start + n)?;
            let shape = [c.num_qo_heads, n, c.head_dim];
            let call = AttentionCall {
                layer: index,
                q: HeadsView::new(&q, shape, [c.head_dim, q_width])?,
                k: keys,
                v: values,
                out: HeadsViewMut::new(&mut attended, shape, [c.head_dim, q_width])?,
                softmax_scale: 1.0 / (c.head_dim as f32).sqrt(),
            };
            timings
                .time(|t| &mut t.attention, || attention.attend(call))
                .map_err(|source| Error::Attention { layer: index, source })?;
            timings.time(
                |t| &mut t.linear,
                || linear::apply(&attended, n, &mut [(&layer.attention_out, &mut x)], true),
            )?;

            timings.time(
                |t| &mut t.other,
                || rms_norm(&x, &layer.feed_forward_norm, c.norm_eps, &mut normed),
            );
            timings.time(
                |t| &mut t.linear,
                || {
                    linear::apply(
                        &normed,
                        n,
                        &mut [(&layer.gate, &mut gate), (&layer.up, &mut up)],
                        false,
                    )
                },
            )?;
            timings.time(|t| &mut t.other, || swiglu(&mut gate, &up));
            timings.time(
                |t| &mut t.linear,
                || linear::apply(&gate, n, &mut [(&layer.down, &mut x)], true),
            )?;
        }
        cache.advance(n);
        Ok(x)
    }
}

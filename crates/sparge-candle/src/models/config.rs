//! What distinguishes one model of the family from another, read from the GGUF's metadata.

use crate::error::{Error, Result};
use crate::gguf::{Header, Value};

/// Which pairs of a head's dimensions are rotated together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RopeStyle {
    /// (0,1), (2,3), …: Llama as stored in GGUF.
    Interleaved,
    /// (0, d/2), (1, d/2+1), …: Qwen2.
    HalfSplit,
}

/// Shape and constants of a decoder-only transformer.
#[derive(Debug, Clone, PartialEq)]
pub struct Config {
    /// `general.architecture`.
    pub architecture: String,
    /// Layers.
    pub num_layers: usize,
    /// Width of the residual stream.
    pub hidden: usize,
    /// Width of the gated feed-forward part.
    pub feed_forward: usize,
    /// Query heads.
    pub num_qo_heads: usize,
    /// Key/value heads; divides `num_qo_heads`.
    pub num_kv_heads: usize,
    /// Elements of a head.
    pub head_dim: usize,
    /// Elements of a head that are rotated; even, at most `head_dim`.
    pub rope_dim: usize,
    /// Base of the rotation's frequencies.
    pub rope_base: f64,
    /// Positions are divided by this (linear scaling), 1 for none.
    pub rope_scale: f64,
    /// Pairing of the rotated dimensions.
    pub rope_style: RopeStyle,
    /// ε of the RMS norms.
    pub norm_eps: f32,
    /// Tokens the model was trained for.
    pub context: usize,
    /// Size of the vocabulary.
    pub vocab: usize,
}

impl Config {
    /// Reads and checks the configuration.
    pub fn read(header: &Header) -> Result<Self> {
        let architecture = header.text("general.architecture").unwrap_or("none").to_owned();
        let rope_style = match architecture.as_str() {
            "llama" => RopeStyle::Interleaved,
            "qwen2" => RopeStyle::HalfSplit,
            other => {
                return Err(Error::Unsupported {
                    what: format!("model architecture {other:?}"),
                    expected: "llama (Llama, SmolLM2) or qwen2",
                });
            }
        };
        let key = |name: &str| format!("{architecture}.{name}");
        let opt = |name: &str, max: usize| -> Result<Option<usize>> {
            match header.int(&key(name)) {
                Some(n) if (1..=max).contains(&n) => Ok(Some(n)),
                Some(n) => Err(Error::gguf(format!("{} is {n}, expected 1 to {max}", key(name)))),
                None if header.metadata.contains_key(&key(name)) => {
                    Err(Error::gguf(format!("{} is not a positive integer", key(name))))
                }
                None => Ok(None),
            }
        };
        let int = |name: &str, max: usize| -> Result<usize> {
            opt(name, max)?
                .ok_or_else(|| Error::gguf(format!("metadata {:?} is missing", key(name))))
        };
        // The bounds are far above any model and keep every product below within usize.
        let hidden = int("embedding_length", 1 << 20)?;
        let num_qo_heads = int("attention.head_count", 1 << 12)?;
        let num_kv_heads = opt("attention.head_count_kv", 1 << 12)?.unwrap_or(num_qo_heads);
        let head_dim = opt("attention.key_length", 1 << 12)?.unwrap_or(hidden / num_qo_heads);
        let value_dim = opt("attention.value_length", 1 << 12)?.unwrap_or(head_dim);
        let rope_dim = opt("rope.dimension_count", 1 << 12)?.unwrap_or(head_dim);
        if num_qo_heads % num_kv_heads != 0 {
            return Err(Error::gguf(format!(
                "{num_kv_heads} key/value heads do not divide {num_qo_heads} query heads"
            )));
        }
        if head_dim == 0 || value_dim != head_dim || rope_dim % 2 != 0 || rope_dim > head_dim {
            return Err(Error::gguf(format!(
                "head sizes: key {head_dim}, value {value_dim}, rotated {rope_dim}; expected equal, and an even rotated part"
            )));
        }
        if opt("expert_count", 1 << 12).is_ok_and(|n| n.is_some()) {
            return Err(Error::Unsupported {
                what: "a mixture of experts".into(),
                expected: "a dense feed-forward part",
            });
        }
        let rope_scale = match header.text(&key("rope.scaling.type")) {
            None | Some("none") => 1.0,
            Some("linear") => header.float(&key("rope.scaling.factor")).unwrap_or(1.0),
            Some(other) => {
                return Err(Error::Unsupported {
                    what: format!("rope scaling {other:?}"),
                    expected: "none, linear, or a rope_freqs tensor",
                });
            }
        };
        let rope_base = header.float(&key("rope.freq_base")).unwrap_or(10_000.0);
        if !(rope_base.is_finite() && rope_base > 0.0 && rope_scale.is_finite() && rope_scale > 0.0)
        {
            return Err(Error::gguf(format!(
                "rope base {rope_base}, scale {rope_scale}; expected positive numbers"
            )));
        }
        let norm_eps = header.float(&key("attention.layer_norm_rms_epsilon")).ok_or_else(|| {
            Error::gguf(format!(
                "metadata {:?} is missing",
                key("attention.layer_norm_rms_epsilon")
            ))
        })?;
        let vocab = match header.metadata.get("tokenizer.ggml.tokens") {
            Some(Value::Texts(tokens)) => tokens.len(),
            _ => int("vocab_size", 1 << 24)?,
        };
        // The embedding's own row count rules: some files pad it beyond the tokenizer's list.
        let vocab = header.tensors.get("token_embd.weight").map_or(vocab, |t| t.rows);
        Ok(Self {
            num_layers: int("block_count", 1 << 12)?,
            feed_forward: int("feed_forward_length", 1 << 22)?,
            context: int("context_length", 1 << 30)?,
            norm_eps: norm_eps as f32,
            architecture,
            hidden,
            num_qo_heads,
            num_kv_heads,
            head_dim,
            rope_dim,
            rope_base,
            rope_scale,
            rope_style,
            vocab,
        })
    }
}

//! Keys and values of all tokens so far.

use rayon::prelude::*;

use super::Config;
use crate::attention::HeadsView;
use crate::error::{Error, Result};

/// Per layer `[num_kv_heads, capacity, head_dim]` of keys and of values, f32.
///
/// The memory is reserved at once but touched only as tokens arrive.
#[derive(Debug, Clone)]
pub struct KvCache {
    layers: Vec<[Vec<f32>; 2]>,
    num_kv_heads: usize,
    head_dim: usize,
    capacity: usize,
    len: usize,
}

impl KvCache {
    /// An empty cache for up to `capacity` tokens.
    pub fn new(config: &Config, capacity: usize) -> Result<Self> {
        let (num_kv_heads, head_dim) = (config.num_kv_heads, config.head_dim);
        if capacity == 0 || capacity > config.context {
            return Err(Error::Argument(format!(
                "a cache of {capacity} tokens; expected 1 to {}, the model's context",
                config.context
            )));
        }
        let size = num_kv_heads * head_dim * capacity;
        // vec![0.0; n] asks the system for zeroed pages, which cost nothing until they are written.
        let layers = (0..config.num_layers).map(|_| [vec![0.0; size], vec![0.0; size]]).collect();
        Ok(Self { layers, num_kv_heads, head_dim, capacity, len: 0 })
    }

    /// Tokens in the cache.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether no token has been read yet.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Tokens it can hold.
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// Forgets all tokens but the first `len`.
    pub fn truncate(&mut self, len: usize) {
        self.len = self.len.min(len);
    }

    /// Checks that `tokens` more fit a cache of this model.
    pub(super) fn reserve(&self, config: &Config, tokens: usize) -> Result<()> {
        if (self.layers.len(), self.num_kv_heads, self.head_dim)
            != (config.num_layers, config.num_kv_heads, config.head_dim)
        {
            return Err(Error::Argument(
                "the cache belongs to another model; make one with this model's config".into(),
            ));
        }
        let needed = self.len + tokens;
        if needed > self.capacity {
            return Err(Error::CacheFull { needed, capacity: self.capacity });
        }
        Ok(())
    }

    /// Writes the token-major keys and values of the next `tokens` tokens of `layer` behind the
    /// existing ones; they count only after [`KvCache::advance`].
    pub(super) fn write(&mut self, layer: usize, k: &[f32], v: &[f32], tokens: usize) {
        let (d, heads, start) = (self.head_dim, self.num_kv_heads, self.len);
        let head_size = self.capacity * d;
        for (buffer, new) in self.layers[layer].iter_mut().zip([k, v]) {
            buffer.par_chunks_mut(head_size).enumerate().for_each(|(h, head)| {
                for t in 0..tokens {
                    let from = (t * heads + h) * d;
                    head[(start + t) * d..(start + t + 1) * d]
                        .copy_from_slice(&new[from..from + d]);
                }
            });
        }
    }

    pub(super) fn advance(&mut self, tokens: usize) {
        self.len += tokens;
    }

    /// Views of the first `len` tokens' keys and values.
    pub(super) fn views(&self, layer: usize, len: usize) -> Result<[HeadsView<'_>; 2]> {
        let shape = [self.num_kv_heads, len, self.head_dim];
        let strides = [self.capacity * self.head_dim, self.head_dim];
        let [k, v] = &self.layers[layer];
        Ok([HeadsView::new(k, shape, strides)?, HeadsView::new(v, shape, strides)?])
    }
}

//! Decoder-only language models from GGUF files: Llama (SmolLM2) and Qwen2.

mod cache;
mod config;
mod layers;
mod score;
mod transformer;

pub use cache::KvCache;
pub use config::{Config, RopeStyle};
pub use transformer::{Model, Prefill, PrefillOptions, Timings};

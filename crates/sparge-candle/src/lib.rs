//! Sparse attention for candle: language models from GGUF files whose attention sits behind a trait.
//!
//! [`models::Model`] opens a Llama or Qwen2 GGUF file and reads prompts through any
//! [`attention::Attention`]; [`Tokenizer`] and [`Sampler`] turn text into tokens and logits into text;
//! [`hub`] fetches pinned models and texts.

pub mod attention;
pub mod calibrate;
mod decode;
mod error;
mod gemm;
pub mod gguf;
pub mod hub;
mod linear;
mod mapped;
pub mod models;
pub mod op;
mod quant;
mod sample;
mod simd;
mod sparge_attention;
mod tokenizer;

pub use error::{Error, Result};
pub use quant::Format;
pub use sample::{GenerateOptions, Generated, Sampler, generate};
pub use sparge_attention::SpargeAttention;
pub use tokenizer::{Message, Tokenizer};

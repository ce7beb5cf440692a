//! Sparse attention for candle.

pub mod op;

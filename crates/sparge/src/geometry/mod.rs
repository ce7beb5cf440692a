//! Sizes, blocks and which key a query may see: the only place with tail arithmetic.

mod shape;
mod visibility;

pub use shape::{AttentionShape, BLOCK_KV, BLOCK_Q};
pub(crate) use shape::{Sequence, top_k_count};
pub(crate) use visibility::{Coverage, RowKeys, Visibility};

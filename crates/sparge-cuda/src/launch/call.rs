//! The argument structs of the general path's kernels.

use super::Strides;
use std::mem::{offset_of, size_of};

/// `Call` of kernels/sparge/call.cuh, which says what the fields are.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(crate) struct Call {
    pub(crate) q: u64,
    pub(crate) k: u64,
    pub(crate) v: u64,
    pub(crate) o: u64,
    pub(crate) lse: u64,
    pub(crate) stats: u64,
    pub(crate) q_strides: Strides,
    pub(crate) k_strides: Strides,
    pub(crate) v_strides: Strides,
    pub(crate) o_strides: Strides,
    pub(crate) element: u64,
    pub(crate) element_strides: Strides,
    pub(crate) allowed: u64,
    pub(crate) allowed_sequence: i64,
    pub(crate) allowed_head: i64,
    pub(crate) mask: u64,
    pub(crate) sequences: u64,
    pub(crate) head: u64,
    pub(crate) groups: u64,
    pub(crate) element_pool: u64,
    pub(crate) q_features: u64,
    pub(crate) k_features: u64,
    pub(crate) q_known: u64,
    pub(crate) k_known: u64,
    pub(crate) k_sums: u64,
    pub(crate) k_centre: u64,
    pub(crate) q_cosine: u64,
    pub(crate) k_cosine: u64,
    pub(crate) scratch: u64,
    pub(crate) samples: u64,
    pub(crate) head_samples: i64,
    pub(crate) q8: u64,
    pub(crate) q_scale: u64,
    pub(crate) q_shift: u64,
    pub(crate) k8: u64,
    pub(crate) k_scale: u64,
    pub(crate) k_mean: u64,
    pub(crate) v8: u64,
    pub(crate) v_amax: u64,
    pub(crate) cast: u64,
    pub(crate) n_sequences: i32,
    pub(crate) heads: i32,
    pub(crate) kv_heads: i32,
    pub(crate) dim: i32,
    pub(crate) dim_v: i32,
    pub(crate) padded: i32,
    pub(crate) all_q_blocks: i32,
    pub(crate) all_kv_blocks: i32,
    pub(crate) q_blocks: i32,
    pub(crate) kv_blocks: i32,
    pub(crate) mask_words: i32,
    pub(crate) left: i32,
    pub(crate) right: i32,
    pub(crate) sink: i32,
    pub(crate) keep_first: i32,
    pub(crate) keep_local: i32,
    pub(crate) element_kind: i32,
    pub(crate) element_heads: i32,
    pub(crate) q_rows: i32,
    pub(crate) kv_rows: i32,
    pub(crate) second_order: i32,
    pub(crate) width: i32,
    pub(crate) sampled_rows: i32,
    pub(crate) sample_chunk: i32,
    pub(crate) first_head: i32,
    pub(crate) some_heads: i32,
    pub(crate) unused: i32,
    pub(crate) q_len_tensor: i32,
    pub(crate) kv_len_tensor: i32,
    pub(crate) batch: i32,
    pub(crate) o_kind: i32,
    pub(crate) counts_products: i32,
    pub(crate) scale_log2: f32,
    pub(crate) square_scale: f32,
}

// The size is asserted in call.cuh too.
const _: () = assert!(size_of::<Call>() == 536);
const _: () = assert!(offset_of!(Call, mask) == 200);
const _: () = assert!(offset_of!(Call, n_sequences) == 400);

/// `Masks` of kernels/pool.cu.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Masks {
    pub(crate) mask: u64,
    pub(crate) allowed: u64,
    pub(crate) both: u64,
    pub(crate) allowed_sequence: i64,
    pub(crate) allowed_head: i64,
    pub(crate) heads: i64,
    pub(crate) head_words: i64,
    pub(crate) words: i64,
}

const _: () = assert!(size_of::<Masks>() == 64);

/// Words that one launch of `upload` carries.
pub(crate) const UPLOAD_WORDS: usize = 1000;

/// `Upload` of kernels/convert.cu.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub(crate) struct Upload {
    pub(crate) to: u64,
    pub(crate) count: i32,
    pub(crate) unused: i32,
    pub(crate) words: [u32; UPLOAD_WORDS],
}

const _: () = assert!(size_of::<Upload>() == 4016);

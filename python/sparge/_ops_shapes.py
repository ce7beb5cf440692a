"""Shapes and types that the operators share on every device."""

from __future__ import annotations

import torch

from ._mask import BLOCK_KV, BLOCK_Q
from ._sparge import SpargeError

Tensor = torch.Tensor

DTYPES = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}
MAX_DIM = 256  # of keys and values, as in crate `sparge`


def is_nhd(settings: str) -> bool:
    """Whether a settings text asks for ``[batch, tokens, heads, dim]``."""
    return settings.startswith("layout=NHD")


def out_shape(query: Tensor, value: Tensor) -> tuple[int, int, int, int]:
    """The output's sizes, in the inputs' layout."""
    a, b, c, _ = query.shape
    return a, b, c, value.shape[3]


def heads_and_lens(query: Tensor, key: Tensor, settings: str) -> tuple[int, int, int, int]:
    """(batch, query heads, q_len, kv_len)"""
    if is_nhd(settings):
        batch, q_len, heads, _ = query.shape
        return batch, heads, q_len, key.shape[1]
    batch, heads, q_len, _ = query.shape
    return batch, heads, q_len, key.shape[2]


def mask_shape(query: Tensor, key: Tensor, settings: str) -> tuple[int, int, int, int]:
    """(batch, heads, q_blocks, kv_blocks)"""
    batch, heads, q_len, kv_len = heads_and_lens(query, key, settings)
    return batch, heads, (q_len + BLOCK_Q - 1) // BLOCK_Q, (kv_len + BLOCK_KV - 1) // BLOCK_KV


def check_dtype(query: Tensor, key: Tensor, value: Tensor) -> str:
    """The one element type of q, k and v, by its short name."""
    dtype = query.dtype
    if key.dtype != dtype or value.dtype != dtype:
        raise SpargeError(
            f"query is {dtype}, key {key.dtype}, value {value.dtype}; they must be the same"
        )
    name = DTYPES.get(dtype)
    if name is None:
        raise SpargeError(f"dtype is {dtype}, expected float32, float16 or bfloat16")
    if query.ndim != 4 or key.ndim != 4 or value.ndim != 4:
        raise SpargeError(
            f"query, key and value have {query.ndim}, {key.ndim} and {value.ndim} dimensions, "
            "expected 4 each"
        )
    return name

"""The operators ``torch.ops.sparge.*``: what compiled graphs, CUDA graphs and exports hold.

All tensors are 4-d. ``settings`` is the text form of ``sparge._sparge.Settings`` and begins with
``layout=HND`` (``[batch, heads, tokens, dim]``) or ``layout=NHD``. ``attn_mask`` is bool or float32
``[batch|1, heads|1, q_len, kv_len]``, ``block_mask`` bool ``[batch|1, heads|1, q_blocks,
kv_blocks]``, ``kv_lens`` int64 ``[batch]``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Optional

import torch

from . import _cuda, _sparge
from ._config import parsed
from ._mask import BLOCK_KV
from ._ops_shapes import check_dtype, heads_and_lens, mask_shape, out_shape
from ._sparge import SpargeError

if TYPE_CHECKING:
    from torch import Tensor

_QKV = "Tensor query, Tensor key, Tensor value"
_MASKS = "Tensor? attn_mask, Tensor? block_mask, Tensor? kv_lens, str settings"

_library = torch.library.Library("sparge", "DEF")
_library.define(f"attention({_QKV}, {_MASKS}) -> Tensor")
_library.define(f"attention_full({_QKV}, {_MASKS}) -> (Tensor, Tensor, Tensor)")
_library.define(f"predict(Tensor query, Tensor key, {_MASKS}) -> Tensor")
_library.define("quantize(Tensor key, str layout) -> (Tensor, Tensor, Tensor)")

_Raw = tuple[int, tuple[int, int, int, int], tuple[int, int, int, int]]


def _raw(tensor: Tensor) -> tuple[Tensor, _Raw]:
    """A tensor's address, sizes and strides, and the tensor that keeps them valid."""
    strides = tensor.stride()
    if strides[-1] != 1:
        tensor = tensor.contiguous()
        strides = tensor.stride()
    return tensor, (tensor.data_ptr(), tensor.shape, strides)  # type: ignore[return-value]


def _extra(
    attn_mask: Optional[Tensor],
    block_mask: Optional[Tensor],
    kv_lens: Optional[Tensor],
) -> tuple[list[Tensor], "_sparge._Extra"]:
    """The optional tensors of a call, and the tensors that keep their addresses valid."""
    extra: _sparge._Extra = {
        "bool_mask": None,
        "bias": None,
        "block_mask": None,
        "kv_lens": None,
        "lse": 0,
        "mask_out": 0,
        "counts": 0,
    }
    held = []
    if attn_mask is not None:
        if attn_mask.ndim != 4 or attn_mask.dtype not in (torch.bool, torch.float32):
            raise SpargeError(
                f"attn_mask is {attn_mask.dtype} with {attn_mask.ndim} dimensions, "
                "expected bool or float32 with 4"
            )
        tensor, raw = _raw(attn_mask)
        held.append(tensor)
        extra["bool_mask" if attn_mask.dtype == torch.bool else "bias"] = raw
    if block_mask is not None:
        if block_mask.ndim != 4 or block_mask.dtype != torch.bool:
            raise SpargeError(
                f"block_mask is {block_mask.dtype} with {block_mask.ndim} dimensions, "
                "expected bool with 4"
            )
        tensor, raw = _raw(block_mask.contiguous())
        held.append(tensor)
        extra["block_mask"] = raw
    if kv_lens is not None:
        if kv_lens.dtype != torch.int64 or kv_lens.ndim != 1 or bool((kv_lens < 0).any()):
            raise SpargeError(
                f"kv_lens is {kv_lens.dtype} with {kv_lens.ndim} dimensions, expected int64 "
                "with 1 and no negative length"
            )
        extra["kv_lens"] = kv_lens.tolist()
    return held, extra


def _attention_cpu(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Optional[Tensor],
    block_mask: Optional[Tensor],
    kv_lens: Optional[Tensor],
    settings: str,
) -> Tensor:
    dtype = check_dtype(query, key, value)
    query, q = _raw(query)
    key, k = _raw(key)
    value, v = _raw(value)
    out = query.new_empty(out_shape(query, value))
    threads = torch.get_num_threads()
    if attn_mask is None and block_mask is None and kv_lens is None:
        _sparge.attend(parsed(settings), dtype, threads, q, k, v, out.data_ptr())
    else:
        _held, extra = _extra(attn_mask, block_mask, kv_lens)
        _sparge.attend(parsed(settings), dtype, threads, q, k, v, out.data_ptr(), extra)
    return out


def _attention_full_cpu(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Optional[Tensor],
    block_mask: Optional[Tensor],
    kv_lens: Optional[Tensor],
    settings: str,
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = check_dtype(query, key, value)
    out, lse, counts = _attention_full_meta(
        query, key, value, attn_mask, block_mask, kv_lens, settings
    )
    query, q = _raw(query)
    key, k = _raw(key)
    value, v = _raw(value)
    _held, extra = _extra(attn_mask, block_mask, kv_lens)
    extra["lse"] = lse.data_ptr()
    extra["counts"] = counts.data_ptr()
    threads = torch.get_num_threads()
    _sparge.attend(parsed(settings), dtype, threads, q, k, v, out.data_ptr(), extra)
    return out, lse, counts


def _predict_cpu(
    query: Tensor,
    key: Tensor,
    attn_mask: Optional[Tensor],
    block_mask: Optional[Tensor],
    kv_lens: Optional[Tensor],
    settings: str,
) -> Tensor:
    dtype = check_dtype(query, key, key)
    blocks = query.new_empty(mask_shape(query, key, settings), dtype=torch.bool)
    query, q = _raw(query)
    key, k = _raw(key)
    _held, extra = _extra(attn_mask, block_mask, kv_lens)
    extra["mask_out"] = blocks.data_ptr()
    _sparge.predict(parsed(settings), dtype, torch.get_num_threads(), q, k, extra)
    return blocks


def _quantize_cpu(key: Tensor, layout: str) -> tuple[Tensor, Tensor, Tensor]:
    dtype = check_dtype(key, key, key)
    values, scales, means = _quantize_meta(key, layout)
    key, k = _raw(key)
    out = (values.data_ptr(), scales.data_ptr(), means.data_ptr())
    _sparge.quantize(dtype, layout, torch.get_num_threads(), k, out)
    return values, scales, means


def _attention_meta(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Optional[Tensor],
    block_mask: Optional[Tensor],
    kv_lens: Optional[Tensor],
    settings: str,
) -> Tensor:
    return query.new_empty(out_shape(query, value))


def _attention_full_meta(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Optional[Tensor],
    block_mask: Optional[Tensor],
    kv_lens: Optional[Tensor],
    settings: str,
) -> tuple[Tensor, Tensor, Tensor]:
    batch, heads, q_len, _ = heads_and_lens(query, key, settings)
    return (
        query.new_empty(out_shape(query, value)),
        query.new_empty((batch, heads, q_len), dtype=torch.float32),
        query.new_empty((batch, heads, 4), dtype=torch.int64),
    )


def _predict_meta(
    query: Tensor,
    key: Tensor,
    attn_mask: Optional[Tensor],
    block_mask: Optional[Tensor],
    kv_lens: Optional[Tensor],
    settings: str,
) -> Tensor:
    return query.new_empty(mask_shape(query, key, settings), dtype=torch.bool)


def _quantize_meta(key: Tensor, layout: str) -> tuple[Tensor, Tensor, Tensor]:
    batch, heads, length, dim = key.shape
    if layout == "NHD":
        heads, length = length, heads
    blocks = (length + BLOCK_KV - 1) // BLOCK_KV
    return (
        key.new_empty((batch, heads, length, dim), dtype=torch.int8),
        key.new_empty((batch, heads, length), dtype=torch.float32),
        key.new_empty((batch, heads, blocks, dim), dtype=torch.float32),
    )


for _name, _cpu, _gpu, _meta in (
    ("attention", _attention_cpu, _cuda.attention, _attention_meta),
    ("attention_full", _attention_full_cpu, _cuda.attention_full, _attention_full_meta),
    ("predict", _predict_cpu, _cuda.predict, _predict_meta),
    ("quantize", _quantize_cpu, _cuda.quantize, _quantize_meta),
):
    _library.impl(_name, _cpu, "CPU")
    _library.impl(_name, _gpu, "CUDA")
    # A fake kernel, not a Meta one alone: those refuse key lengths on the host beside CUDA tensors.
    torch.library.register_fake(f"sparge::{_name}", _meta, lib=_library)

attention = torch.ops.sparge.attention.default
attention_full = torch.ops.sparge.attention_full.default
predict = torch.ops.sparge.predict.default
quantize = torch.ops.sparge.quantize.default

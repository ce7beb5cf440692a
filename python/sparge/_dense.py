"""Exact SDPA for every option of `attention`: the dense fallback, and what tuning compares with."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Optional, Union

import torch
import torch.nn.functional as F

from ._sparge import SpargeError

Tensor = torch.Tensor
Window = Optional[tuple[Optional[int], Optional[int]]]

sdpa = F.scaled_dot_product_attention


def host_lengths(lengths: Union[Tensor, Sequence[int]], query: Tensor) -> Tensor:
    """On the host: they decide the shape of the work. A tensor on a GPU makes the host wait."""
    device = "meta" if query.is_meta else "cpu"
    # Numbers belong on the CPU, whatever torch's default device is.
    given = lengths if isinstance(lengths, Tensor) else torch.as_tensor(lengths, device="cpu")
    if given.dtype.is_floating_point or given.dtype.is_complex or given.dtype == torch.bool:
        raise SpargeError(f"key_lengths is {given.dtype}, expected integers, one per batch entry")
    return given.to(device, torch.int64)


def fitted_mask(mask: Optional[Tensor], query: Tensor, kv_len: int) -> Optional[Tensor]:
    """The mask as SDPA takes it: two dimensions or more, bool or of the query's type, and on a GPU a column
    for every key. (torch 2.11's kernels take one column for all, or keys that lie apart, with an
    error, a wrong result or a misaligned read.)"""
    if mask is None:
        return None
    if mask.ndim == 1:
        mask = mask.unsqueeze(0)
    if mask.dtype != torch.bool:
        mask = mask.to(query.dtype)
    if not mask.is_cuda or (mask.shape[-1] == kv_len and mask.stride(-1) == 1):
        return mask
    return mask.expand(*mask.shape[:-1], kv_len).contiguous()


def dense_mask(
    q_len: int,
    kv_len: int,
    causal: Optional[str],
    window: Window,
    key_lengths: Optional[Tensor],
    device: torch.device,
) -> Optional[Tensor]:
    """The bool mask that says the same to SDPA, `[batch|1, 1, q_len, kv_len]`."""
    offset: Union[int, Tensor] = 0
    if causal == "bottom_right" or (window and causal is None):
        # The last query stands at the last valid key.
        valid = kv_len if key_lengths is None else key_lengths[:, None, None, None]
        offset = valid - q_len
    rows = torch.arange(q_len, device=device)[:, None] + offset
    columns = torch.arange(kv_len, device=device)
    mask: Optional[Tensor] = None
    parts = [columns <= rows] if causal else []
    if window:
        left, right = window
        if left is not None and left >= 0:
            parts.append(columns >= rows - left)
        if right is not None and right >= 0:
            parts.append(columns <= rows + right)
    if key_lengths is not None:
        parts.append(columns < key_lengths[:, None, None, None])
    for part in parts:
        mask = part if mask is None else mask & part
    return None if mask is None else mask.expand(*mask.shape[:-2], q_len, kv_len)


@dataclass(frozen=True)
class DenseOptions:
    """What exact SDPA must be told."""

    scale: Optional[float] = None
    enable_gqa: bool = False
    causal: Optional[str] = None
    window: Window = None
    layout: str = "HND"
    key_lengths: Union[Tensor, Sequence[int], None] = None
    dropout_p: float = 0.0


def dense(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Optional[Tensor],
    options: DenseOptions,
) -> Tensor:
    """Exact SDPA for every option of `attention`."""
    o = options
    if o.layout == "NHD":
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    q_len, kv_len = query.shape[-2], key.shape[-2]
    is_causal = o.causal == "top_left" or (o.causal is not None and q_len == kv_len)
    if (o.causal is not None and not is_causal) or o.window or o.key_lengths is not None:
        lens = None if o.key_lengths is None else host_lengths(o.key_lengths, query)
        lens = None if lens is None else lens.to(query.device)
        extra = dense_mask(q_len, kv_len, o.causal, o.window, lens, query.device)
        is_causal = False
        if attn_mask is None or extra is None:
            attn_mask = extra if attn_mask is None else attn_mask
        elif attn_mask.dtype == torch.bool:
            attn_mask = attn_mask & extra
        else:
            attn_mask = attn_mask.masked_fill(~extra, -math.inf)
    out = sdpa(
        query,
        key,
        value,
        fitted_mask(attn_mask, query, kv_len),
        o.dropout_p,
        is_causal,
        scale=o.scale,
        enable_gqa=o.enable_gqa,
    )
    return out.transpose(1, 2) if o.layout == "NHD" else out

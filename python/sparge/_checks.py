"""What torch calls are refused for, whatever their length."""

from __future__ import annotations

from typing import Any, Optional

import torch

from ._dense import host_lengths
from ._ops import attention as operator
from ._ops_shapes import MAX_DIM, check_dtype
from ._sparge import SpargeError

Tensor = torch.Tensor


def check_kinds(key: Any, value: Any, attn_mask: Any = None, block_mask: Any = None) -> None:
    """Beside a torch query everything is a torch tensor."""
    if (
        isinstance(key, Tensor) and isinstance(value, Tensor)
        and (attn_mask is None or isinstance(attn_mask, Tensor))
        and (block_mask is None or isinstance(block_mask, Tensor))
    ):  # fmt: skip
        return
    given = {"key": key, "value": value, "attn_mask": attn_mask, "block_mask": block_mask}
    for name, x in given.items():
        if x is not None and not isinstance(x, Tensor) or x is None and name in ("key", "value"):
            raise TypeError(
                f"query is a torch tensor and {name} {type(x).__module__}.{type(x).__name__}; pass "
                "torch tensors (torch.from_numpy), or arrays of one framework throughout"
            )


def same_device(query: Tensor, tensor: Optional[Tensor], name: str) -> None:
    if tensor is not None and tensor.device != query.device:
        raise SpargeError(
            f"query is on {query.device} and {name} on {tensor.device}; "
            "they must be on one device"
        )


def check_layout(layout: str) -> None:
    if layout != "HND" and layout != "NHD":
        raise SpargeError(f"layout is {layout!r}, expected 'HND' or 'NHD'")


def check_dims(query: Tensor, key: Tensor, value: Tensor) -> None:
    if query.ndim != 4 or key.ndim != 4 or value.ndim != 4:
        raise SpargeError(
            f"query, key and value have {query.ndim}, {key.ndim} and {value.ndim} dimensions, "
            "expected 4 each (or 3: batch, tokens, dim)"
        )


def check(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout_p: float,
    is_causal: bool,
    attn_mask: Optional[Tensor],
    enable_gqa: bool,
    layout: str,
) -> None:
    """Refuses what the operator does not do."""
    if dropout_p:
        raise SpargeError(
            f"dropout_p is {dropout_p}, expected 0: this is inference; call model.eval()"
        )
    if (
        query.requires_grad or key.requires_grad or value.requires_grad
    ) and torch.is_grad_enabled():
        raise SpargeError(
            "query, key or value requires gradients, and there is no backward pass; "
            "run under torch.no_grad() or torch.inference_mode()"
        )
    if attn_mask is not None:
        if not 1 <= attn_mask.ndim <= 4:
            raise SpargeError(f"attn_mask has {attn_mask.ndim} dimensions, expected 1 to 4")
        if is_causal:
            raise SpargeError(
                "is_causal cannot be combined with attn_mask: put the diagonal into the mask"
            )
        if attn_mask.requires_grad and torch.is_grad_enabled():
            raise SpargeError(
                "attn_mask requires gradients, and there is no backward pass; "
                "run under torch.no_grad() or torch.inference_mode()"
            )
        same_device(query, attn_mask, "attn_mask")
    check_layout(layout)
    heads = 1 if layout == "HND" else 2
    if not enable_gqa and query.shape[heads] != key.shape[heads]:
        raise SpargeError(
            f"query has {query.shape[heads]} heads and key {key.shape[heads]}; "
            "pass enable_gqa=True for grouped-query attention"
        )
    device = query.device
    if key.device != device or value.device != device:
        raise SpargeError(
            f"query is on {device}, key on {key.device}, value on {value.device}; "
            "they must be on one device"
        )
    if not (query.is_cpu or query.is_cuda or query.is_meta):
        raise SpargeError(f"the tensors are on {device}, expected the CPU or a CUDA GPU")


def check_fit(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Optional[Tensor], layout: str
) -> None:
    """What the operator would say of types and sizes: SDPA serves more of them, and only while calls
    are short."""
    check_dtype(query, key, value)
    batch, heads, q_len, dim = query.shape
    _, kv_heads, kv_len, dim_k = key.shape
    _, v_heads, v_len, dim_v = value.shape
    if layout == "NHD":
        heads, q_len = q_len, heads
        kv_heads, kv_len, v_heads, v_len = kv_len, kv_heads, v_len, v_heads
    if not (batch and heads and q_len and kv_len):
        raise SpargeError(
            f"batch is {batch}, heads {heads}, qo_len {q_len} and kv_len {kv_len}, expected at least 1 each"
        )
    if dim_k != dim or not (0 < dim <= MAX_DIM and 0 < dim_v <= MAX_DIM):
        raise SpargeError(
            f"query, key and value have head dimensions {dim}, {dim_k} and {dim_v}; query and key must "
            f"have the same, and all 1 to {MAX_DIM}"
        )
    if v_len != kv_len or v_heads != kv_heads:
        raise SpargeError(
            f"key has {kv_heads} heads of {kv_len} tokens and value {v_heads} of {v_len}; they must be "
            "the same"
        )
    if kv_heads == 0 or heads % kv_heads:
        raise SpargeError(
            f"query has {heads} heads and key {kv_heads}; grouped-query attention needs a multiple"
        )
    if attn_mask is not None:
        check_mask(attn_mask, (batch, heads, q_len, kv_len))


def check_words(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_lengths: Any,
    layout: str,
    text: str,
) -> None:
    """What is wrong with a call whatever computes it: asked before exact attention takes one over."""
    check_dims(query, key, value)
    check_layout(layout)
    tokens, heads = (2, 1) if layout == "HND" else (1, 2)
    # The operator itself judges the settings, on next to nothing; ranges were judged when they became text.
    words = " ".join(word for word in text.split() if not word.startswith("keep_"))
    tiny = [torch.zeros(1, x.shape[heads], 1, 8, device="cpu") for x in (query, key, key)]
    if layout == "NHD":
        tiny = [x.transpose(1, 2) for x in tiny]
    operator(*tiny, None, None, None, words)
    if key_lengths is not None:
        lens = host_lengths(key_lengths, query)
        if lens.ndim != 1 or lens.shape[0] != query.shape[0]:
            raise SpargeError(
                f"key_lengths has shape {tuple(lens.shape)}, expected one length per batch entry "
                f"({query.shape[0]})"
            )
        most = key.shape[tokens]
        if not lens.is_meta and lens.numel() and not 0 <= int(lens.min()) <= int(lens.max()) <= most:
            raise SpargeError(f"key_lengths is {lens.tolist()}, expected lengths from 0 to {most}")


def check_mask(mask: Tensor, full: "tuple[int, int, int, int]") -> None:
    """A mask's type, and sizes that are the call's or 1."""
    if mask.dtype != torch.bool and not mask.dtype.is_floating_point:
        raise SpargeError(f"attn_mask is {mask.dtype}, expected bool or a float type")
    if mask.ndim > 4:
        raise SpargeError(f"attn_mask has {mask.ndim} dimensions, expected at most 4")
    if any(n not in (1, want) for n, want in zip(mask.shape, full[4 - mask.ndim :])):
        sizes = "×".join(map(str, mask.shape))
        raise SpargeError(
            f"attn_mask is {sizes}, expected {full[0]}×{full[1]}×{full[2]}×{full[3]} or the last of "
            "these (1 broadcasts)"
        )

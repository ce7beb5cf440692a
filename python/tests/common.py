"""Inputs, and attention in float64 written down plainly."""

from __future__ import annotations

import math
from typing import Any, Optional

import torch

BLOCK_Q, BLOCK_KV = 128, 64

# What the CUDA kernels may be off from float64. fp8 (e4m3, 3 bits of mantissa) rounds P and V by 2.6% each
# in the root mean square; averages of values around zero shrink no faster than the errors do. And
# 16-bit products, which `policy="dense"` and `qk="half"` ask for.
QUANTIZED, HALF = 0.04, 0.01


def bound(device: str, on_cpu: float, on_gpu: float = QUANTIZED) -> float:
    """What a result may be off, on either device."""
    return on_gpu if device == "cuda" else on_cpu


def qkv(
    heads: int = 4,
    kv_heads: int = 2,
    q_len: int = 1200,
    kv_len: Optional[int] = None,
    dim: int = 64,
    batch: int = 1,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    seed: int = 0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries and keys that follow one slow random walk: tokens attend to their surroundings."""
    kv_len = q_len if kv_len is None else kv_len
    generator = torch.Generator().manual_seed(seed)

    def normal(h: int, length: int) -> torch.Tensor:
        return torch.randn(batch, h, length, dim, generator=generator)

    base = normal(kv_heads, max(q_len, kv_len))
    for token in range(1, base.shape[2]):  # a correlation of 1/e over 50 tokens
        base[:, :, token] = 0.98 * base[:, :, token - 1] + 0.2 * base[:, :, token]
    group = heads // kv_heads
    q = 2 * base[:, :, :q_len].repeat_interleave(group, 1) + 0.5 * normal(heads, q_len)
    k = base[:, :, :kv_len] + 0.5 * normal(kv_heads, kv_len)
    v = normal(kv_heads, kv_len)
    return tuple(x.to(device, dtype) for x in (q, k, v))  # type: ignore[return-value]


def inputs(device: str, **options: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`qkv` there; on a GPU in the type that the fastest kernels are for."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    return qkv(device=device, **{"dtype": dtype, **options})


def exact(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    mask: Optional[torch.Tensor] = None,
    bias: Optional[torch.Tensor] = None,
    blocks: Optional[torch.Tensor] = None,
    causal: Optional[str] = None,
    window: Optional[tuple[Optional[int], Optional[int]]] = None,
    scale: Optional[float] = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention and log-sum-exp in float64, every pair by the book."""
    q, k, v = (x.double() for x in (q, k, v))
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    q_len, kv_len = q.shape[2], k.shape[2]
    scores = q @ k.transpose(-1, -2) * (scale if scale is not None else 1 / math.sqrt(q.shape[-1]))
    if bias is not None:
        scores = scores + bias.double()
    i = torch.arange(q_len, device=q.device)[:, None]
    j = torch.arange(kv_len, device=q.device)
    keep = torch.ones(q_len, kv_len, dtype=torch.bool, device=q.device)
    shift = kv_len - q_len if causal == "bottom_right" or (window and not causal) else 0
    if causal:
        keep = keep & (j <= i + shift)
    if window:
        left, right = window
        keep = keep if left is None else keep & (j >= i + shift - left)
        keep = keep if right is None else keep & (j <= i + shift + right)
    if mask is not None:
        keep = keep & mask
    if blocks is not None:
        keep = keep & expand(blocks, q_len, kv_len)
    scores = scores.masked_fill(~keep, -math.inf)
    weights = torch.nan_to_num(torch.softmax(scores, -1))
    return weights @ v, torch.logsumexp(scores, -1)


def expand(blocks: torch.Tensor, q_len: int, kv_len: int) -> torch.Tensor:
    """A block mask, pair by pair."""
    wide = blocks.repeat_interleave(BLOCK_Q, -2).repeat_interleave(BLOCK_KV, -1)
    return wide[..., :q_len, :kv_len]


def relative_l1(got: Any, want: Any) -> float:
    """Σ|got − want| / Σ|want|"""
    got, want = torch.as_tensor(got).double(), torch.as_tensor(want).double()
    return float((got - want).abs().sum() / want.abs().sum())


def alike(got: torch.Tensor, want: torch.Tensor, on_gpu: float = 1e-3) -> bool:
    """The same bits on the CPU; near enough on a GPU, where SDPA's choice of kernel and the libraries'
    of an algorithm may change with strides and sizes."""
    if got.is_cuda:
        return got.shape == want.shape and relative_l1(got, want) < on_gpu
    return torch.equal(got, want)


def awkward_keys(dtype: torch.dtype, device: str = "cpu") -> torch.Tensor:
    """Keys of a ragged length with all that quantising treats apart: NaN, ±∞, equal and tiny ones."""
    _, keys, _ = qkv(q_len=300, dim=40, batch=2, dtype=dtype)
    keys = keys + 3 * torch.randn(1, 2, 1, 40, dtype=dtype)
    keys[0, 0, 70, 3] = math.nan
    keys[0, 0, 130, 5] = math.inf
    keys[0, 0, 200, 5] = -math.inf
    keys[0, 1, 64:128] = 1.5
    keys[1, 0, 128:192] = 0.0
    keys[1, 0, 128:192, 7] = torch.linspace(-1, 1, 64).to(dtype) * torch.finfo(dtype).tiny
    keys[1, 1, 0] = torch.finfo(dtype).max
    return keys.to(device)


def same_bits(got: torch.Tensor, want: torch.Tensor) -> bool:
    """Equal, of one type and with the same strides; any NaN stands for any other."""
    if got.dtype != want.dtype or got.stride() != want.stride():
        return False
    if got.dtype == torch.float32:
        got, want = (x.masked_fill(x.isnan(), math.nan).view(torch.int32) for x in (got, want))
    return torch.equal(got, want)

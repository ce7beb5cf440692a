"""The names of the authors' package, for code written for ``spas_sage_attn``.

>>> from sparge.spas_sage_attn import spas_sage2_attn_meansim_topk_cuda

Signatures are those of the authors' ``main`` since ``return_lse`` came (2025): every argument has its
name and place, so positional calls mean the same. Defaults are theirs but for ``topk`` (0.5, as before
that; 0.35 there since) and ``output_dtype`` (float16 there). Their older names, ``spas_sage_attn_…``
without the 2, are here too: the same functions.

What differs from the authors' code, everywhere:

* ``is_causal`` masks the elements inside the kernel. The authors' functions mask blocks alone and
  pass ``False`` on: rows see up to 127 later tokens there.
* ``attn_mask`` is refused unless None; there it is accepted and ignored.
* ``dropout_p`` is refused unless 0; there it is ignored.
* ``scale`` is used in the prediction too.
* ``topk`` under ``is_causal`` is a share of the blocks a row can see, not of all blocks.
* ``simthreshd1`` is θ in [0, 1), and values below 0 mean 0: the measure is never negative.
* ``cdfthreshd`` includes the block that crosses the threshold, so that the mass is reached.
* ``pvthreshd`` is a gap in log2 units as there; it becomes λ = pvthreshd·ln 2.
* The diagonal blocks of a causal call and the first key block are always kept
  (``attention_sink`` is therefore always on), and they count towards ``topk``.
* The output has the input's type (float32 comes back as float32). Any length works, and
  grouped-query attention; head dimensions as in ``sparge.attention`` (on a GPU some are refused, by
  name).
* ``smooth_k=False`` is refused: where keys are quantised they are smoothed, and results differ by
  rounding alone.
* ``return_sparsity`` is the share of *reachable* blocks that was skipped. With ``return_lse`` too the
  result is ``(out, sparsity)`` as there, without the log-sum-exp.
* ``return_lse`` gives ``(out, lse)``, ``[batch, heads, q_len]`` float32, natural log.
* CPU tensors work too.

And of the older names:

* P·V is in float16 with float16 sums there; here the arithmetic is that of the newer ones (on a GPU fp8
  where it has it). ``sparge.attention(..., config=sparge.Config(qk="half"))`` has both products in 16 bits.
* ``is_causal`` reaches the kernel there as well, so in this the results agree.
* ``return_lse`` is in units of log2 there and lacks the keys' mean (the top-k function returns the flag in its place);
  here it is as above.
* There is no block-sparse one there, nor here.
"""

from __future__ import annotations

import math
from typing import Any, Optional, Union

import torch

from ._api import attention, block_sparse_attention
from ._config import Config, per_head
from ._mask import BLOCK_KV, BLOCK_Q
from ._sparge import SpargeError

Tensor = torch.Tensor
PerHead = Union[float, Tensor, None]


def _values(name: str, value: Any) -> Any:
    """One float or a tuple of floats; a tensor, array or list of one is one value, as there."""
    if isinstance(value, Tensor):
        value = value.flatten()
    value = per_head(name, value)
    return value[0] if isinstance(value, tuple) and len(value) == 1 else value


def _check_smooth(smooth_k: bool) -> None:
    if not smooth_k:
        raise SpargeError("smooth_k is False; keys are always smoothed here, leave it at True")


def _map(value: Any, function: Any) -> Any:
    if value is None:
        return None
    return tuple(function(x) for x in value) if isinstance(value, tuple) else function(value)


def _call(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Optional[Tensor],
    dropout_p: float,
    is_causal: bool,
    scale: Optional[float],
    tensor_layout: str,
    config: Config,
    return_sparsity: bool,
    return_lse: bool,
) -> Any:
    if attn_mask is not None:
        raise SpargeError(
            "attn_mask is ignored by the authors' code; call sparge.attention, which applies it"
        )
    if tensor_layout not in ("HND", "NHD"):
        raise SpargeError(f"tensor_layout is {tensor_layout!r}, expected 'HND' or 'NHD'")
    head = 1 if tensor_layout == "HND" else 2
    options: dict[str, Any] = {
        "dropout_p": dropout_p,
        "is_causal": is_causal,
        "scale": scale,
        "layout": tensor_layout,
        "enable_gqa": q.shape[head] != k.shape[head],
        "config": config,
    }
    return attention(q, k, v, return_stats=return_sparsity, return_lse=return_lse, **options)


def _config(
    topk: PerHead = None, cdf: PerHead = None, theta: PerHead = None, gap: PerHead = None
) -> Config:
    return Config(
        topk=_values("topk", topk),
        cdf=_values("cdfthreshd", cdf),
        theta=_map(_values("simthreshd1", theta), lambda x: min(max(x, 0.0), math.nextafter(1.0, 0.0))),
        pv_gap=_map(_values("pvthreshd", gap), lambda x: x * math.log(2)),
        pooling="block",
        keep_local=0,
    )


def spas_sage2_attn_meansim_topk_cuda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Optional[Tensor] = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: Optional[float] = None,
    smooth_k: bool = True,
    simthreshd1: PerHead = -0.1,
    cdfthreshd: PerHead = None,
    topk: PerHead = 0.5,
    pvthreshd: PerHead = 50,
    attention_sink: bool = False,
    tensor_layout: str = "HND",
    output_dtype: Optional[torch.dtype] = None,
    return_sparsity: bool = False,
    return_lse: bool = False,
) -> Any:
    """Top-k by pooled scores: ``sparge.attention(..., topk=topk, pooling="block")``.

    ``attention_sink`` is always on here and accepted for its name's sake.
    """
    if cdfthreshd is not None:
        raise SpargeError(
            "cdfthreshd is given beside topk; call spas_sage2_attn_meansim_cuda for one, or "
            "sparge.attention(topk=, cdf=) for the union of both"
        )
    _check_smooth(smooth_k)
    config = _config(topk=topk, theta=simthreshd1, gap=pvthreshd)
    result = _call(
        q, k, v, attn_mask, dropout_p, is_causal, scale, tensor_layout, config, return_sparsity,
        return_lse and not return_sparsity,
    )  # fmt: skip
    return _typed(result, output_dtype)


def spas_sage2_attn_meansim_cuda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Optional[Tensor] = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: Optional[float] = None,
    smooth_k: bool = True,
    simthreshd1: PerHead = 0.6,
    cdfthreshd: PerHead = 0.98,
    pvthreshd: PerHead = 50,
    attention_sink: bool = False,
    tensor_layout: str = "HND",
    output_dtype: Optional[torch.dtype] = None,
    return_sparsity: bool = False,
    return_lse: bool = False,
) -> Any:
    """Cumulative mass of pooled scores: ``sparge.attention(..., cdf=…, theta=…, pooling="block")``."""
    _check_smooth(smooth_k)
    config = _config(cdf=cdfthreshd, theta=simthreshd1, gap=pvthreshd)
    result = _call(
        q, k, v, attn_mask, dropout_p, is_causal, scale, tensor_layout, config, return_sparsity,
        return_lse and not return_sparsity,
    )  # fmt: skip
    return _typed(result, output_dtype)


# The older names; the module's docstring says what was different about them.
spas_sage_attn_meansim_topk_cuda = spas_sage2_attn_meansim_topk_cuda
spas_sage_attn_meansim_cuda = spas_sage2_attn_meansim_cuda


def block_sparse_sage2_attn_cuda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask_id: Optional[Tensor] = None,
    dropout_p: float = 0.0,
    scale: Optional[float] = None,
    smooth_k: bool = True,
    pvthreshd: PerHead = 50,
    attention_sink: bool = False,
    tensor_layout: str = "HND",
    output_dtype: Optional[torch.dtype] = None,
    return_sparsity: bool = False,
    return_lse: bool = False,
) -> Any:
    """A given block mask: ``sparge.block_sparse_attention``.

    ``mask_id`` ``[batch, heads, ceil(q_len / 128), ceil(kv_len / 64)]``, 1 or True is computed: the
    128×64 geometry on every GPU (the authors' is 64×128 on Hopper).
    """
    _check_smooth(smooth_k)
    if dropout_p:
        raise SpargeError(f"dropout_p is {dropout_p}, expected 0: this is inference")
    head, token = (1, 2) if tensor_layout == "HND" else (2, 1)
    if mask_id is None:
        blocks = (-(-q.shape[token] // BLOCK_Q), -(-k.shape[token] // BLOCK_KV))
        mask_id = torch.ones(1, 1, *blocks, dtype=torch.bool, device=q.device)
    result = block_sparse_attention(
        q,
        k,
        v,
        mask_id.bool(),
        scale=scale,
        enable_gqa=q.shape[head] != k.shape[head],
        pv_gap=_map(_values("pvthreshd", pvthreshd), lambda x: x * math.log(2)),
        layout=tensor_layout,
        return_stats=return_sparsity,
        return_lse=return_lse and not return_sparsity,
    )
    return _typed(result, output_dtype)


def _typed(result: Any, dtype: Optional[torch.dtype]) -> Any:
    """The output in that type; statistics as the sparsity they say."""
    out, *more = result if isinstance(result, tuple) else (result,)
    out = out if dtype is None else out.to(dtype)
    if not more:
        return out
    return out, more[0] if isinstance(more[0], Tensor) else more[0].qk_sparsity()

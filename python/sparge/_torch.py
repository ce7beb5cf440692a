"""The torch edge: SDPA's semantics, checks, and the crossover to SDPA."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any, Optional, Union

import torch

from . import _ops
from ._config import DENSE, Config, per_head, settings_text
from ._dense import DenseOptions, Window, dense, host_lengths, sdpa, fitted_mask
from ._checks import check, check_dims, check_fit, check_kinds, check_words, same_device
from ._mask import BlockMask
from ._ops_shapes import DTYPES, MAX_DIM
from ._sparge import SpargeError
from ._types import Quantized, Stats

Tensor = torch.Tensor

# Below these the default is exact, and exact on torch tensors is SDPA itself: what it costs, a call
# costs. Measured right after other torch work, whose threads still spin then, on inputs that offer
# nothing to skip (benchmarks/record/2026-11-24-python-cpu-zen4.jsonl): within 5% of SDPA from 2048 keys
# on; at 1024 keys up to 1.1 (once 1.46) times SDPA's time, though `Selection::Auto` predicts from there.
CPU_MIN_LEN = 2048
# On an H100 against cuDNN and FlashAttention, the faster one, on inputs that offer nothing to skip
# (benchmarks/record/2026-11-24-h100-python.jsonl): within 5% where a row sees so many keys on average.
# On smooth inputs sparse calls are ahead from about 4096 keys on at dimension 128.
CUDA_MIN_REACH = 7168
CUDA_MIN_REACH_64 = 8192  # head dimensions up to 64
AUTO_MIN_QUERIES = 16

# What settings leave open: everything (short calls may run as SDPA); only how to be exact, as the user
# asked or as a schedule has it (which on the CPU takes SDPA for short calls alone).
AUTO, EXACT, SCHEDULED = "auto", "exact", "scheduled"

_texts: dict[Any, tuple[str, str]] = {}
_warned: set[str] = set()


def _settings(
    kv_len: int,
    config: Optional[Config],
    topk: Any,
    cdf: Any,
    theta: Any,
    pv_gap: Any,
    policy: Optional[str],
    layout: str,
    scale: Optional[float],
    causal: Optional[str],
    window: Window,
    keep_keys: Any,
    keep_queries: Any,
    is_short: bool,
) -> tuple[str, str]:
    """The settings' text, and what they leave open: `AUTO`, `EXACT`, `SCHEDULED` or nothing."""
    config = (config or Config()).override(
        topk=topk, cdf=cdf, theta=theta, pv_gap=pv_gap, policy=policy
    )
    config = config.at(kv_len)
    if is_short and config.is_default():
        config = DENSE  # on a GPU its arithmetic as well: the default one is int8
    text = settings_text(
        config, layout=layout, scale=scale, causal=causal, window=window, keep_keys=keep_keys,
        keep_queries=keep_queries,
    )
    if config.is_default():
        return text, AUTO
    if config is DENSE:
        return text, SCHEDULED
    return text, EXACT if config.policy == "dense" else ""


def _kept_settings(
    config: Optional[Config],
    kv_len: int,
    topk: Any,
    cdf: Any,
    theta: Any,
    pv_gap: Any,
    *more: Any,
) -> tuple[str, str]:
    """`_settings`, remembered: building the text costs more than the rest of a call."""
    if config is None or config.min_kv_len is None:
        kv_len = 0  # the length changes nothing
    # As values: an array or a tensor may be another one next time, under the same identity.
    heads = (
        per_head("topk", topk), per_head("cdf", cdf), per_head("theta", theta),
        per_head("pv_gap", pv_gap),
    )  # fmt: skip
    knobs = (kv_len, config, *heads, *more)
    if torch.compiler.is_compiling():
        return _settings(*knobs)
    try:
        found = _texts.get(knobs)
    except TypeError:  # ranges as lists
        return _settings(*knobs)
    if found is None:
        if len(_texts) > 4096:
            _texts.clear()
        found = _texts[knobs] = _settings(*knobs)
    return found


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Optional[Tensor],
    dropout_p: float,
    is_causal: bool,
    scale: Optional[float],
    enable_gqa: bool,
    topk: Any,
    cdf: Any,
    theta: Any,
    pv_gap: Any,
    policy: Optional[str],
    layout: str,
    causal_alignment: str,
    window: Window,
    key_lengths: Union[Tensor, Sequence[int], None],
    keep_keys: Any,
    keep_queries: Any,
    block_mask: Optional[Tensor],
    return_lse: bool,
    return_stats: bool,
    config: Optional[Config],
    fallback: Optional[str],
) -> Any:
    """`sparge.attention` on torch tensors."""
    check_kinds(key, value, attn_mask, block_mask)
    query, key, value = _as_autocast(query, key, value)
    if isinstance(scale, Tensor):
        scale = float(scale)  # a value: the settings of a call are remembered
    causal = causal_alignment if is_causal else None
    if query.ndim == 3:
        query, key, value = (x.unsqueeze(1 if layout == "HND" else 2) for x in (query, key, value))
        one = attention(
            query, key, value,
            attn_mask if attn_mask is None or attn_mask.ndim < 3 else attn_mask.unsqueeze(-3),
            dropout_p, is_causal, scale, enable_gqa, topk, cdf, theta, pv_gap, policy, layout,
            causal_alignment, window, key_lengths, keep_keys, keep_queries, block_mask, return_lse, return_stats,
            config, fallback,
        )  # fmt: skip
        return _without_heads(one, layout, return_lse)
    check_dims(query, key, value)
    q_len, kv_len = _lens(query, key, layout)
    # Not asked for tuned calls: compiled graphs guard on lengths that were asked about.
    is_untuned = (
        topk is None and cdf is None and theta is None and pv_gap is None
        and policy in (None, "auto")
        and (config is None or config.is_default() or (
            policy is not None and config.override(policy=policy).is_default()))
    )  # fmt: skip
    is_short = is_untuned and _is_short(query, q_len, kv_len, AUTO, causal, window)
    text, leaves = _kept_settings(
        config, kv_len, topk, cdf, theta, pv_gap, policy, layout, scale, causal, window, keep_keys,
        keep_queries, is_short,
    )  # fmt: skip
    try:
        check(query, key, value, dropout_p, is_causal, attn_mask, enable_gqa, layout)
        same_device(query, block_mask, "block_mask")
        query, key, value = _one_batch(query, key, value)
        if leaves and _is_short(query, q_len, kv_len, leaves, causal, window):
            # What is kept anyway changes nothing where everything is.
            extras = return_lse or return_stats or window
            plain = not extras and block_mask is None and key_lengths is None
            if plain and (causal != "bottom_right" or q_len == kv_len):
                # The crossover: below it the default is exact attention, and SDPA is exact.
                check_fit(query, key, value, attn_mask, layout)
                short = (query, key, value)
                if layout == "NHD":
                    short = tuple(x.transpose(1, 2) for x in short)  # type: ignore[assignment]
                mask = fitted_mask(attn_mask, query, kv_len)
                out = sdpa(*short, mask, 0.0, is_causal, scale=scale, enable_gqa=enable_gqa)
                return out.transpose(1, 2) if layout == "NHD" else out
        if attn_mask is not None:
            attn_mask = _element_mask(attn_mask, q_len, kv_len)
        lens = None if key_lengths is None else host_lengths(key_lengths, query)
        if not (return_lse or return_stats):
            return _ops.attention(query, key, value, attn_mask, block_mask, lens, text)
        out, lse, counts = _ops.attention_full(
            query, key, value, attn_mask, block_mask, lens, text
        )
    except (SpargeError, TypeError, NotImplementedError) as error:
        if fallback != "dense" or return_lse or return_stats or block_mask is not None:
            raise
        # What the operator cannot do is served; what no attention means is not.
        check_words(query, key, value, key_lengths, layout, text)
        _warn(error)
        options = DenseOptions(scale, enable_gqa, causal, window, layout, key_lengths, dropout_p)
        return dense(query, key, value, attn_mask, options)
    return (out,) + ((lse,) if return_lse else ()) + ((Stats(counts),) if return_stats else ())


def _as_autocast(query: Tensor, key: Tensor, value: Tensor) -> "tuple[Tensor, Tensor, Tensor]":
    """Under autocast in its type, as SDPA does, so that a call's length does not decide it."""
    kind = query.device.type
    if kind not in ("cpu", "cuda") or not torch.is_autocast_enabled(kind):
        return query, key, value
    dtype = torch.get_autocast_dtype(kind)
    return tuple(  # type: ignore[return-value]
        x.to(dtype) if x.is_floating_point() and x.dtype != torch.float64 else x
        for x in (query, key, value)
    )


def _without_heads(result: Any, layout: str, has_lse: bool) -> Any:
    """Drops the one head that stood in for none."""
    head = 1 if layout == "HND" else 2
    if isinstance(result, Tensor):
        return result.squeeze(head)
    out, *more = result
    if has_lse:
        more[0] = more[0].squeeze(1)
    return (out.squeeze(head), *more)


def plain_and_short(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Optional[Tensor],
    is_causal: bool,
    scale: Optional[float],
    enable_gqa: bool,
    layout: str,
    causal_alignment: str,
) -> Optional[Tensor]:
    """SDPA's output where the call is `_is_plain_and_short`."""
    if not (isinstance(key, Tensor) and isinstance(value, Tensor)):
        return None
    if scale is not None and (isinstance(scale, Tensor) or not math.isfinite(scale)):
        return None
    is_nhd = layout == "NHD"
    if is_nhd:
        if query.ndim != 4 or key.ndim != 4 or value.ndim != 4:
            return None
        query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    elif layout != "HND":
        return None
    if not _is_plain_and_short(query, key, value, attn_mask, is_causal, enable_gqa):
        return None
    if causal_alignment != "top_left" and (
        causal_alignment != "bottom_right" or query.shape[2] != key.shape[2]
    ):
        return None
    mask = fitted_mask(attn_mask, query, key.shape[2])
    out = sdpa(query, key, value, mask, 0.0, is_causal, scale=scale, enable_gqa=enable_gqa)
    return out.transpose(1, 2) if is_nhd else out


def _is_plain_and_short(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Optional[Tensor],
    is_causal: bool,
    enable_gqa: bool,
) -> bool:
    """Whether a call with the defaults is one that SDPA serves, and nothing is wrong with it: what has
    anything unusual goes the long way, where it is looked at."""
    shape, keys, dtype = query.shape, key.shape, query.dtype
    return (
        key.dtype is dtype and value.dtype is dtype and dtype in DTYPES
        and len(shape) == 4 and len(keys) == 4
        and shape[0] == keys[0] and (shape[1] == keys[1] or enable_gqa and keys[1] > 0 and shape[1] % keys[1] == 0)
        and shape[3] == keys[3] and 0 < shape[3] <= MAX_DIM
        and shape[0] > 0 and shape[2] > 0 and keys[2] > 0
        # An ordinary value has the key's sizes.
        and value.shape == keys
        and (query.is_cpu or query.is_cuda)
        and keys[2] < (CPU_MIN_LEN if query.is_cpu else CUDA_MIN_REACH)
        and key.device == value.device == query.device
        and not (query.requires_grad or key.requires_grad or value.requires_grad)
        and not (is_causal and attn_mask is not None)
        and (attn_mask is None or _is_plain_mask(attn_mask, query, shape[2], keys[2]))
    )  # fmt: skip


def _is_plain_mask(mask: Tensor, query: Tensor, q_len: int, kv_len: int) -> bool:
    if not isinstance(mask, Tensor):
        return False
    shape, dtype = mask.shape, mask.dtype
    return (
        (dtype is torch.bool or dtype is query.dtype)
        and 2 <= len(shape) <= 4
        and shape[-1] in (1, kv_len) and shape[-2] in (1, q_len)
        and (len(shape) < 3 or shape[-3] in (1, query.shape[1]))
        and (len(shape) < 4 or shape[0] in (1, query.shape[0]))
        and mask.device == query.device
        and not mask.requires_grad
    )  # fmt: skip


def _is_short(
    query: Tensor,
    q_len: int,
    kv_len: int,
    leaves: str,
    causal: Optional[str] = None,
    window: Window = None,
) -> bool:
    """Whether the call is to be exact, and SDPA is the way to do that."""
    if query.is_cuda:
        if leaves != AUTO or q_len < AUTO_MIN_QUERIES:
            return True
        least = CUDA_MIN_REACH if query.shape[3] > 64 else CUDA_MIN_REACH_64
        return _reach(q_len, kv_len, causal, window) < least
    if leaves == EXACT:
        return False
    return kv_len < CPU_MIN_LEN or q_len < AUTO_MIN_QUERIES


def _reach(q_len: int, kv_len: int, causal: Optional[str], window: Window) -> int:
    """About how many keys a query sees; key lengths and masks are not asked."""
    reach = kv_len
    if causal:
        reach -= min(q_len, kv_len) // 2
    if causal == "top_left":
        reach -= max(0, kv_len - q_len)
    left, right = window or (None, None)
    right = 0 if causal else right
    return reach if left is None or right is None else min(reach, left + 1 + right)


def _lens(query: Tensor, key: Tensor, layout: str) -> tuple[int, int]:
    tokens = 2 if layout == "HND" else 1
    return query.shape[tokens], key.shape[tokens]


def _one_batch(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """All three with the same number of batch entries; 1 broadcasts."""
    sizes = (query.shape[0], key.shape[0], value.shape[0])
    batch = max(sizes)
    if sizes == (batch, batch, batch):
        return query, key, value
    if any(n not in (1, batch) for n in sizes):
        raise SpargeError(
            f"query, key and value have {sizes[0]}, {sizes[1]} and {sizes[2]} batch entries, "
            "expected the same number (1 broadcasts)"
        )
    query, key, value = (x.expand(batch, -1, -1, -1) for x in (query, key, value))
    return query, key, value


def _element_mask(mask: Tensor, q_len: int, kv_len: int) -> Tensor:
    """SDPA's mask as the operator takes it: 4-d, bool or float32, the last two sizes full."""
    if mask.dtype != torch.bool:
        if not mask.dtype.is_floating_point:
            raise SpargeError(f"attn_mask is {mask.dtype}, expected bool or a float type")
        mask = mask.float()
    if mask.ndim > 4:
        raise SpargeError(f"attn_mask has {mask.ndim} dimensions, expected at most 4")
    while mask.ndim < 4:
        mask = mask.unsqueeze(0)
    if mask.shape[2] != q_len or mask.shape[3] != kv_len:
        rows, columns = mask.shape[2], mask.shape[3]
        if rows not in (1, q_len) or columns not in (1, kv_len):
            raise SpargeError(
                f"attn_mask is {rows}×{columns}, expected {q_len}×{kv_len} (1 broadcasts)"
            )
        mask = mask.expand(-1, -1, q_len, kv_len)
    return mask


def _warn(error: Exception) -> None:
    """Once per reason."""
    reason = str(error)
    if reason not in _warned:
        _warned.add(reason)
        warnings.warn(f"sparge: dense attention instead: {reason}", stacklevel=4)


def predict(
    query: Tensor,
    key: Tensor,
    config: Optional[Config],
    knobs: dict[str, Any],
    layout: str,
    scale: Optional[float],
    causal: Optional[str],
    window: Window,
    attn_mask: Optional[Tensor],
    key_lengths: Any,
) -> BlockMask:
    """`sparge.predict` on torch tensors."""
    check_kinds(key, key, attn_mask)
    check_dims(query, key, key)
    check(query, key, key, 0.0, causal is not None, attn_mask, True, layout)
    q_len, kv_len = _lens(query, key, layout)
    text, _ = _kept_settings(
        config, kv_len, knobs["topk"], knobs["cdf"], knobs["theta"], None, knobs["policy"], layout,
        scale, causal, window, None, None,
        _is_short(query, q_len, kv_len, AUTO, causal, window),
    )  # fmt: skip
    query, key, _ = _one_batch(query, key, key)
    mask = None if attn_mask is None else _element_mask(attn_mask, q_len, kv_len)
    lens = None if key_lengths is None else host_lengths(key_lengths, query)
    return BlockMask(_ops.predict(query, key, mask, None, lens, text), q_len, kv_len)


def quantize(key: Tensor, layout: str) -> Quantized:
    """`sparge.quantize` on torch tensors."""
    return Quantized(*_ops.quantize(key, layout))

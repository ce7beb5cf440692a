"""Calibration on recorded calls: `sparge.tune`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Optional

import torch

from ._api import attention
from ._calibration import Calibration
from ._config import Config
from ._dense import DenseOptions, dense
from ._sparge import SpargeError
from ._tune import Progress, Study
from ._types import Stats

Tensor = torch.Tensor
Calls = Mapping[int, Sequence["tuple[Tensor, Tensor, Tensor]"]]


def exact(
    query: Tensor, key: Tensor, value: Tensor, is_causal: bool, scale: Optional[float]
) -> Tensor:
    """SDPA in the tensors' own precision. Heads that share keys get their own copies: of grouped
    heads some of its kernels form all scores."""
    group = query.shape[1] // key.shape[1]
    if group > 1:
        key, value = (x.repeat_interleave(group, 1) for x in (key, value))
    options = DenseOptions(scale, False, "bottom_right" if is_causal else None)
    return dense(query, key, value, None, options)


def tune(
    calls: Calls,
    l1: float,
    l2: Optional[float],
    is_causal: bool,
    scale: Optional[float],
    name: str,
    progress: Progress,
    config: Optional[Config],
    knobs: "dict[str, Any]",
) -> Calibration:
    """`sparge.tune`, whose documentation says what the arguments are."""
    if not calls or sorted(calls) != list(range(len(calls))):
        raise SpargeError(
            f"calls has the layers {list(calls)}, expected integers from 0 on without a gap"
        )
    study = Study(l1, l2, "error", config, knobs, progress)
    study.min_kv_len = study.min_kv_len or 0  # as they were recorded, so they run, however short

    def read(_: bool) -> None:
        for layer in range(len(calls)):
            for sample, (q, k, v) in enumerate(calls[layer]):
                _check_recorded(layer, sample, q, k, v)
                options: dict[str, Any] = {
                    "is_causal": is_causal, "causal_alignment": "bottom_right", "scale": scale,
                    "enable_gqa": True, "return_stats": True,
                }  # fmt: skip

                def attend(config: Config) -> "tuple[Tensor, Stats]":
                    return attention(q, k, v, config=config, **options)  # type: ignore[no-any-return]

                study.call(layer, q, k, attend, exact(q, k, v, is_causal, scale))

    with torch.no_grad():
        study.run(read)
    return study.calibration(name, "recorded calls", len(calls), is_causal)


def _check_recorded(layer: int, sample: int, q: Any, k: Any, v: Any) -> None:
    for name, x in (("query", q), ("key", k), ("value", v)):
        if not isinstance(x, Tensor) or x.ndim != 4:
            got = f"{x.ndim} dimensions" if isinstance(x, Tensor) else type(x).__name__
            raise SpargeError(
                f"layer {layer}, call {sample}: {name} is {got}, expected a torch tensor "
                "[batch, heads, tokens, dim]"
            )
    if q.shape[0] != k.shape[0] or k.shape[:3] != v.shape[:3] or q.shape[1] % k.shape[1]:
        raise SpargeError(
            f"layer {layer}, call {sample}: query, key and value are {tuple(q.shape)}, "
            f"{tuple(k.shape)} and {tuple(v.shape)}, expected one batch, query heads a multiple of the "
            "key/value heads, and as many values as keys"
        )

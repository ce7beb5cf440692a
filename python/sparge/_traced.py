"""What transformers' models are under ``torch.compile``: the mask of plain causal attention, and the
warning where a mask hides what was configured."""

from __future__ import annotations

import warnings
from typing import Any, Optional

import torch
from transformers.masking_utils import sdpa_mask


def causal_mask(*args: Any, **kwargs: Any) -> Optional[torch.Tensor]:
    """transformers' mask function, which before torch 2.14 makes a mask of plain causal attention too while
    a graph is traced; a mask says nothing then. Without padding and at the cache's start None says all."""
    local, offset = kwargs.get("local_size"), kwargs.get("q_offset")
    if (
        torch.compiler.is_compiling()
        and not args
        and kwargs.get("allow_is_causal_skip", True)
        and kwargs.get("attention_mask") is None
        and isinstance(offset, int) and offset == 0 and not kwargs.get("kv_offset", 0)
        and (local is None or kwargs["kv_length"] < local)
    ):  # fmt: skip
        return None
    return sdpa_mask(*args, **kwargs)


def is_on_gpu(query: torch.Tensor) -> bool:
    return query.is_cuda


_warned: "set[bool]" = set()


@torch.compiler.assume_constant_result
def warn_dense(is_compiling: bool) -> bool:
    """Once per reason; while a graph is traced, then."""
    if is_compiling not in _warned:
        _warned.add(is_compiling)
        reason = (
            "under torch.compile a mask's content is not known; where nothing is padded pass no "
            "attention_mask and leave use_cache on, or do not compile the prefill"
            if is_compiling
            else "the mask is not causal, a window or padding"
        )
        warnings.warn(f"sparge: dense attention instead of what was configured: {reason}", stacklevel=3)
    return True

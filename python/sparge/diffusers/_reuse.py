"""Masks that live for several denoising steps, as long as a sample of fresh ones agrees with them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Optional

import torch

from .. import _ops, _torch
from .._api import attention
from .._checks import check
from .._config import Config, settings_text
from .._mask import BLOCK_Q
from .._sparge import SpargeError
from ._steps import Passes

Tensor = torch.Tensor
Ranges = Optional[tuple[tuple[int, int], ...]]

# The drift check predicts anew for one of so many query blocks, others in every step.
SAMPLE_EVERY = 16
# No guidance runs a transformer more often for one step.
MAX_PASSES = 8


@dataclass(frozen=True)
class Reuse:
    """How long block masks live.

    * ``steps``: denoising steps that one prediction serves, the one it was made for included; 1:
      nothing is reused.
    * ``drift``: where a sample of fresh predictions (one of 16 query blocks, all heads) has more
      than this share of its blocks outside the mask in use, the mask is made anew; in [0, 1], 1:
      never. On the CPU before the mask is used; on a GPU, so as not to wait for it, one step later.
      The default is above what neighbouring steps of a small trained model differ by (2% in the
      mean, 6% at most) and below five steps' (7%, 18%): `benchmarks/python/mask_reuse.py`.
    """

    steps: int
    drift: float = 0.1

    def __post_init__(self) -> None:
        if type(self.steps) is not int or self.steps < 1:
            raise SpargeError(
                f"reuse_mask is for {self.steps!r} steps, expected an integer from 1 on"
            )
        if not 0 <= self.drift <= 1:
            raise SpargeError(f"drift is {self.drift}, expected a share from 0 to 1")

    @classmethod
    def of(cls, value: "Reuse | int | None", config: Config) -> "Optional[Reuse]":
        """What `enable` was given, None where nothing is to be reused."""
        reuse = cls(value) if isinstance(value, int) else value
        if reuse is None or reuse.steps == 1:
            return None
        if config.policy not in (None, "auto", "paper"):
            raise SpargeError(
                f"reuse_mask keeps this package's own predictions, and policy={config.policy!r} "
                "makes none; leave one of them out"
            )
        return reuse


@dataclass
class MaskCounts:
    """Attention calls since `enable`: masks predicted, reused, and made anew because of drift (these
    are among the predicted)."""

    predicted: int = 0
    reused: int = 0
    drifted: int = 0


class _Share:
    """A number on its way from the device."""

    def __init__(self, value: Tensor) -> None:
        self._host, self._done = value, None
        if value.is_cuda:
            self._host = torch.empty((), dtype=value.dtype, device="cpu", pin_memory=True)
            self._host.copy_(value, non_blocking=True)
            self._done = torch.cuda.current_stream(value.device).record_event()

    def read(self) -> float:
        if self._done is not None:
            self._done.synchronize()  # a whole step old: the device has a step's work ahead
        return float(self._host)


@dataclass
class _Kept:
    """A mask, what it was made for, and in which step."""

    mask: Tensor
    about: Any
    step: int
    share: Optional[_Share] = None


class Masks:
    """One attention module's masks, by the forward pass of the step and the call of the pass."""

    def __init__(self, reuse: Reuse, passes: Passes, counts: MaskCounts) -> None:
        self._reuse = reuse
        self._passes = passes
        self._counts = counts
        self._kept: dict[tuple[int, int], _Kept] = {}
        self._pass, self._call = -1, 0

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        config: Config,
        scale: Optional[float],
        keep_keys: Ranges,
    ) -> Tensor:
        """`sparge.attention`, with an earlier step's mask where there is one that still holds."""
        place = self._place()
        check(query, key, value, 0.0, False, None, False, "HND")
        if _predicts_nothing(config, query, key):
            options: Any = {"config": config, "scale": scale, "keep_keys": keep_keys}
            return attention(query, key, value, **options)  # type: ignore[no-any-return]
        if query.is_cuda and torch.cuda.is_current_stream_capturing():
            raise SpargeError(
                "reuse_mask decides on the host, which a CUDA graph cannot hold; capture without it"
            )
        steps = self._passes.steps
        shapes = (query.shape, key.shape, query.dtype, query.device)
        about = (steps.run, shapes, config, scale, keep_keys)
        predicting = settings_text(config, scale=scale, keep_keys=keep_keys)
        kept = self._kept.get(place)
        if kept is None or kept.about != about or steps.step - kept.step >= self._reuse.steps:
            kept = None
        elif self._has_drifted(kept, query, key, predicting):
            self._counts.drifted += 1
            kept = None
        if kept is None:
            mask = _ops.predict(query, key, None, None, None, predicting)
            kept = self._kept[place] = _Kept(mask, about, steps.step)
            self._counts.predicted += 1
        else:
            self._counts.reused += 1
        attending = settings_text(_with_given_mask(config), scale=scale)
        return _ops.attention(query, key, value, None, kept.mask, None, attending)

    def forget(self) -> None:
        """Frees the masks."""
        self._kept.clear()

    def _place(self) -> "tuple[int, int]":
        """The pass of the step and the call of the pass."""
        if self._pass != self._passes.count:
            self._pass, self._call = self._passes.count, -1
        self._call += 1
        if self._passes.index >= MAX_PASSES:
            raise SpargeError(
                f"more than {MAX_PASSES} forward passes in one step: reuse_mask must know the steps; "
                "enable the pipeline rather than its transformer, or set handle.step in each"
            )
        return self._passes.index, self._call

    def _has_drifted(self, kept: _Kept, query: Tensor, key: Tensor, predicting: str) -> bool:
        """Whether a sample of fresh rows leaves the mask by more than is allowed."""
        if self._reuse.drift >= 1:
            return False
        step = self._passes.steps.step
        if not _is_async(query):
            return _missing(kept.mask, query, key, predicting, step).read() > self._reuse.drift
        before, kept.share = kept.share, None
        if before is not None and before.read() > self._reuse.drift:
            return True
        if step + 1 - kept.step < self._reuse.steps:  # else nobody will ask
            kept.share = _missing(kept.mask, query, key, predicting, step)
        return False


def _is_async(x: Tensor) -> bool:
    """Whether reading a number back would make the host wait."""
    return x.is_cuda


def _missing(mask: Tensor, query: Tensor, key: Tensor, predicting: str, step: int) -> _Share:
    """The share of the blocks that a sample of fresh rows has and ``mask`` has not."""
    blocks = query.shape[2] // BLOCK_Q
    every = min(SAMPLE_EVERY, blocks)
    first = step % every
    rows = query[:, :, : blocks * BLOCK_Q].unflatten(2, (blocks, BLOCK_Q))
    rows = rows[:, :, first::every].flatten(2, 3)
    fresh = _ops.predict(rows, key, None, None, None, predicting)
    lost = fresh & ~mask[:, :, first:blocks:every]
    return _Share(lost.sum() / fresh.sum())


def _predicts_nothing(config: Config, query: Tensor, key: Tensor) -> bool:
    """Whether a call is exact, or too short to be worth a mask."""
    q_len, kv_len = query.shape[2], key.shape[2]
    is_exact = config.at(kv_len).policy == "dense" or q_len < BLOCK_Q
    is_short = config.is_default() and _torch._is_short(query, q_len, kv_len, _torch.AUTO)
    return is_exact or is_short


def _with_given_mask(config: Config) -> Config:
    """The settings of stage 2 and of the arithmetic alone."""
    pv_gap = config.pv_gap
    if pv_gap is None and config.policy == "paper":
        pv_gap = math.inf
    return Config(topk=1.0, pv_gap=pv_gap, qk=config.qk, isa=config.isa)

"""The ways in which the DiT's attention is computed during a sampled run."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F

import sparge

Tensor = torch.Tensor


class Way:
    """``way(layer, q, k, v)``; knows the step, and the share of the blocks that it computed."""

    #: Whether one call by itself is what every step does, so that its error says something.
    is_alike_in_all_steps = True

    def __init__(self) -> None:
        self.step = 0
        self.reset()

    def reset(self) -> None:
        #: Per step and layer what share of the blocks was computed, ``[batch, heads]``.
        self.kept: dict[tuple[int, int], Tensor] = {}

    def begin(self, step: int) -> None:
        self.step = step

    def density(self) -> float:
        if not self.kept:
            return 1.0
        return torch.stack([x.mean() for x in self.kept.values()]).mean().item()

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        raise NotImplementedError


class Dense(Way):
    """SDPA, by torch's choice or by one of its kernels."""

    def __init__(self, backend: torch.nn.attention.SDPBackend | None = None) -> None:
        super().__init__()
        self.backend = backend

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        chosen = contextlib.nullcontext() if self.backend is None else torch.nn.attention.sdpa_kernel(self.backend)
        with chosen:
            return F.scaled_dot_product_attention(q, k, v)


class Capture(Dense):
    """Dense, and keeps q, k, v of chosen (step, sample) pairs of every layer."""

    def __init__(self, wanted: dict[int, int]) -> None:
        super().__init__()
        self.wanted = wanted
        self.calls: dict[int, list[tuple[Tensor, Tensor, Tensor]]] = {}

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.step in self.wanted:
            one = slice(self.wanted[self.step], self.wanted[self.step] + 1)
            self.calls.setdefault(layer, []).append(tuple(x[one].contiguous().clone() for x in (q, k, v)))
        return super().__call__(layer, q, k, v)


class Sparge(Way):
    """One configuration, or one per layer; the first ``dense_steps`` steps are SDPA."""

    def __init__(self, config: sparge.Config | Sequence[sparge.Config], dense_steps: int = 0) -> None:
        super().__init__()
        self.config, self.dense_steps = config, dense_steps
        self.is_alike_in_all_steps = dense_steps == 0

    def at(self, layer: int) -> sparge.Config:
        return self.config if isinstance(self.config, sparge.Config) else self.config[layer]

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.step < self.dense_steps:
            self.kept[self.step, layer] = q.new_ones(q.shape[:2], dtype=torch.float32)
            return F.scaled_dot_product_attention(q, k, v)
        out, stats = sparge.attention(q, k, v, config=self.at(layer), return_stats=True)
        self.kept[self.step, layer] = stats.counts[..., 1].float() / stats.counts[..., 0]
        return out


class Masked(Way):
    """The blocks that ``mask(q, k)`` chooses, on this package's kernel, without stage 2."""

    def __init__(self, mask: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.mask = mask

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mask = self.mask(q, k)
        self.kept[self.step, layer] = mask.float().mean((2, 3))
        return sparge.block_sparse_attention(q, k, v, mask, pv_gap=math.inf)


class Reused(Sparge):
    """The masks of every so many steps, for the steps between as well; no drift check."""

    def __init__(self, config: sparge.Config | Sequence[sparge.Config], steps: int) -> None:
        super().__init__(config)
        self.is_alike_in_all_steps = False
        self.steps = steps
        self.masks: dict[int, Tensor] = {}

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        config = self.at(layer)
        if self.step % self.steps == 0 or layer not in self.masks:
            self.masks[layer] = sparge.predict(q, k, config=config).tensor
        mask = self.masks[layer]
        self.kept[self.step, layer] = mask.float().mean((2, 3))
        return sparge.block_sparse_attention(q, k, v, mask, pv_gap=config.pv_gap)

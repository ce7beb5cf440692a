"""The paper's tuning: per layer and head the sparsest setting within a bound of the error."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F

import sparge

Tensor = torch.Tensor
Calls = dict[int, list[tuple[Tensor, Tensor, Tensor]]]
CDF = (0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.93, 0.95, 0.97, 0.98, 0.99, 0.995, 1.0)
GAPS = (1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0, math.inf)
#: (l1, l2) as in the paper: for its video and its image models.
BOUNDS = {"video": (0.05, 0.06), "image": (0.07, 0.08)}


def exact(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q.float(), k.float(), v.float())


def errors(out: Tensor, want: Tensor) -> Tensor:
    """Relative L1 per head, of one batch entry."""
    return ((out.float() - want).abs().sum((2, 3)) / want.abs().sum((2, 3)))[0]


def smallest(values: tuple[float, ...], found: list[Tensor], bound: float) -> tuple[float, ...]:
    """Per head the first of the values, from sparse to dense, whose worst error is within the bound."""
    fits = torch.stack(found) <= bound
    fits[-1] = True
    return tuple(values[at] for at in fits.int().argmax(0).tolist())


def tune(calls: Calls, bounds: tuple[float, float], is_quick: bool, **knobs: Any) -> list[sparge.Config]:
    """One configuration per layer. τ without stage 2 within l1, then λ within l2.

    The error includes that of the 8-bit arithmetic. What is chosen was tested on these calls.
    """
    grid = CDF[::6] if is_quick else CDF
    gaps = GAPS[::4] + GAPS[-1:] if is_quick else GAPS
    tuned = []
    for layer in sorted(calls):
        wanted = [exact(*call) for call in calls[layer]]

        def worst(config: sparge.Config) -> Tensor:
            outs = [sparge.attention(*call, config=config) for call in calls[layer]]
            return torch.stack([errors(out, want) for out, want in zip(outs, wanted)]).amax(0)

        found = [worst(sparge.Config(cdf=x, pv_gap=math.inf, **knobs)) for x in grid]
        cdf = smallest(grid, found, bounds[0])
        found = [worst(sparge.Config(cdf=cdf, pv_gap=x, **knobs)) for x in gaps]
        tuned.append(sparge.Config(cdf=cdf, pv_gap=smallest(gaps, found, bounds[1]), **knobs))
    return tuned


def permuted(calls: Calls, order: Tensor) -> Calls:
    """The same calls with tokens in another order: positions are in q and k already."""
    return {
        layer: [tuple(x[:, :, order].contiguous() for x in call) for call in found]
        for layer, found in calls.items()
    }


def self_similarity(x: Tensor, block: int = 64) -> float:
    """Mean cosine of the rows of a block, over the blocks of ``[batch, heads, tokens, dim]``."""
    unit = F.normalize(x.float(), dim=-1).unflatten(2, (-1, block))
    return unit.mean(3).square().sum(-1).mean().item()

"""Recorded calls of a run: the paper's bounds to tune them to, and what else is asked of them."""

from __future__ import annotations

import torch
import torch.nn.functional as F

Tensor = torch.Tensor
Calls = dict[int, list[tuple[Tensor, Tensor, Tensor]]]
#: (l1, l2) as in the paper: for its video and its image models.
BOUNDS = {"video": (0.05, 0.06), "image": (0.07, 0.08)}


def exact(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q.float(), k.float(), v.float())


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

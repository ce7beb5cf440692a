"""Block masks of other methods at a given density, for attention that is not causal.

Each ranks the 128x64 blocks of a head; the best so many are kept, so that methods are compared at equal
sparsity. MInference and FlexPrefill are causal methods that look at the last queries; here their probes
are spread over the sequence, since every query sees every key. That favours them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

Tensor = torch.Tensor
BLOCK_Q, BLOCK_KV = 128, 64


def probe(query: Tensor, key: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Attention of ``count`` queries evenly apart, summed per key block ``[b, h, count, kv_blocks]``;
    and the queries' places in units of key blocks."""
    n = query.shape[2]
    rows = torch.linspace(0, n - 1, min(count, n), device=query.device).round().long()
    scores = query[:, :, rows].float() @ key.float().transpose(-1, -2) * query.shape[3] ** -0.5
    weights = scores.softmax(-1)
    return weights.unflatten(-1, (-1, BLOCK_KV)).sum(-1), rows // BLOCK_KV


def diagonals(weights: Tensor, units: Tensor) -> Tensor:
    """Mean mass per block diagonal ``[b, h, 2·kv_blocks − 1]``; place 0 is offset −(kv_blocks − 1)."""
    blocks = weights.shape[-1]
    offset = units[:, None] - torch.arange(blocks, device=units.device) + blocks - 1
    shape = (*weights.shape[:2], 2 * blocks - 1)
    index = offset.flatten().expand(*shape[:2], -1)
    total = weights.new_zeros(shape).scatter_add_(2, index, weights.flatten(2))
    count = weights.new_zeros(shape).scatter_add_(2, index, torch.ones_like(weights).flatten(2))
    return total / count.clamp(min=1)


def crossed(per_diagonal: Tensor, q_blocks: int) -> Tensor:
    """The least of the values of the two diagonals through each block ``[b, h, q_blocks, kv_blocks]``."""
    blocks = (per_diagonal.shape[2] + 1) // 2
    a = torch.arange(q_blocks, device=per_diagonal.device)[:, None]
    b = torch.arange(blocks, device=per_diagonal.device)
    first = 2 * a - b + blocks - 1
    second = (first + 1).clamp(max=2 * blocks - 2)
    return torch.minimum(per_diagonal[:, :, first], per_diagonal[:, :, second])


def rank(score: Tensor) -> Tensor:
    """0 for the largest along the last axis."""
    return score.argsort(-1, descending=True).argsort(-1).float()


def mass_before(score: Tensor) -> Tensor:
    """The share of the mass that larger entries hold, along the last axis."""
    share = score / score.sum(-1, keepdim=True).clamp(min=1e-20)
    ordered, index = share.sort(-1, descending=True)
    before = ordered.cumsum(-1) - ordered
    return torch.empty_like(before).scatter_(-1, index, before)


def best(cost: Tensor, density: float, per: int) -> Tensor:
    """The cheapest ``density`` of the blocks, counted over the axes from ``per`` on."""
    flat = cost.flatten(per)
    count = max(1, min(flat.shape[-1], round(density * flat.shape[-1])))
    # Ties (a whole column) would keep too many: a hair of the place decides.
    flat = flat.double() + torch.arange(flat.shape[-1], device=flat.device) * 1e-9
    return (flat <= flat.kthvalue(count, -1, keepdim=True).values).view(cost.shape)


def minference(query: Tensor, key: Tensor, density: float) -> Tensor:
    """Vertical-slash: columns and diagonals by the mass that 64 queries give them, equally many of both."""
    weights, units = probe(query, key, 64)
    columns = rank(weights.sum(2))[:, :, None]
    slashes = crossed(rank(diagonals(weights, units)), -(-query.shape[2] // BLOCK_Q))
    return best(torch.minimum(columns, slashes), density, 2)


def flexprefill(query: Tensor, key: Tensor, density: float) -> Tensor:
    """Per head vertical-slash or, where the pooled estimate is good (JS < 0.1), pooled Q·K; budgets by one
    cumulative share for all heads of a layer, which is chosen for the density."""
    weights, units = probe(query, key, 128)
    q_blocks = -(-query.shape[2] // BLOCK_Q)
    vertical = weights.mean(2)
    costs = torch.minimum(
        mass_before(vertical)[:, :, None], crossed(mass_before(diagonals(weights, units)), q_blocks)
    )
    scale = query.shape[3] ** -0.5
    pooled_q = query.float().unflatten(2, (q_blocks, -1)).mean(3)
    pooled_k = key.float().unflatten(2, (-1, BLOCK_KV)).mean(3)
    estimate = (pooled_q.mean(2, keepdim=True) @ pooled_k.transpose(-1, -2) * scale).softmax(-1)[:, :, 0]
    middle = (estimate + vertical) / 2
    divergence = sum((x * (x / middle).log()).nansum(-1) for x in (estimate, vertical)) / 2
    is_query_aware = divergence.clamp(min=0).sqrt() < 0.1
    pooled = (pooled_q @ pooled_k.transpose(-1, -2) * scale).softmax(-1)
    aware = mass_before(pooled.flatten(2)).view(pooled.shape)
    costs = torch.where(is_query_aware[:, :, None, None], aware, costs)
    costs[..., 0] = -1.0
    blocks = torch.arange(q_blocks, device=query.device)
    costs[:, :, blocks, 2 * blocks] = -1.0
    return best(costs, density, 1)


def window(query: Tensor, key: Tensor, density: float) -> Tensor:
    """The blocks nearest to the diagonal."""
    b, h, n, _ = query.shape
    a = torch.arange(-(-n // BLOCK_Q), device=query.device)[:, None] * 2 + 0.5
    distance = (a - torch.arange(-(-n // BLOCK_KV), device=query.device)).abs()
    return best(distance.expand(b, h, -1, -1), density, 2)


def random(query: Tensor, key: Tensor, density: float) -> Tensor:
    b, h, n, _ = query.shape
    generator = torch.Generator(query.device).manual_seed(0)
    shape = (b, h, -(-n // BLOCK_Q), -(-n // BLOCK_KV))
    cost = torch.rand(shape, generator=generator, device=query.device)
    cost[..., 0] = -1.0  # a row without keys would be zero
    return best(cost, density, 2)


def oracle(query: Tensor, key: Tensor, density: float) -> Tensor:
    """The blocks of most true mass in each row: what no prediction can beat at this budget per row."""
    kept = []
    for q, k in zip(query, key):
        weights = (q.float() @ k.float().transpose(-1, -2) * query.shape[3] ** -0.5).softmax(-1)
        mass = weights.unflatten(-1, (-1, BLOCK_KV)).sum(-1).unflatten(1, (-1, BLOCK_Q)).mean(2)
        kept.append(best(-mass, density, 2))
    return torch.stack(kept)


METHODS: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {
    "MInference-style": minference, "FlexPrefill-style": flexprefill, "window": window, "random": random,
    "oracle": oracle,
}  # fmt: skip

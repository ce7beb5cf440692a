"""What takes the place of the terrain U-Net's attention: this package's settings, and the others'.

A method is called as `method(layer, q, k, v)` and returns the output and the counts of
`sparge.Stats`. `Sparse` uses it where a layer has at least 1024 tokens; below that (2×4 blocks at
most) every method runs the exact attention.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import sparge
import torch
from sparge import Config
from terrain_net import HEAD_DIM, dense
from torch import Tensor

MIN_TOKENS = 1024
# The blocks of every mask of this package.
BLOCK_Q, BLOCK_KV = 128, 64
Method = Callable[[int, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
# q, k and v of each layer, as a dense pass had them.
Recorded = dict[int, tuple[Tensor, Tensor, Tensor]]


@dataclass
class Sparse:
    """`attend` of the U-Net by a method, with the tokens of a layer in an order of their own."""

    method: Method
    order: str = "row"
    # Of each layer: `sparge.Stats.counts`, summed over the calls.
    counts: dict[int, Tensor] = field(default_factory=dict)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        tokens = q.shape[2]
        if tokens < MIN_TOKENS:
            return dense(layer, q, k, v)
        if self.order == "hilbert":
            index = hilbert(math.isqrt(tokens)).to(q.device)
            out, counts = self.method(layer, *(x[:, :, index] for x in (q, k, v)))
            out = out[:, :, index.argsort()]
        else:
            out, counts = self.method(layer, q, k, v)
        self.counts[layer] = self.counts.get(layer, 0) + counts.sum(0).cpu()
        return out


def own(config: Callable[[int], Config]) -> Method:
    """This package's operator with the settings `config(layer)`."""

    def method(layer: int, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        out, stats = sparge.attention(q, k, v, config=config(layer), return_stats=True)
        return out, stats.counts

    return method


def in_bf16(method: Method) -> Method:
    """The same on q, k and v rounded to bf16, as most models run: a yardstick for rounding."""

    def rounded(layer: int, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        out, counts = method(layer, q.bfloat16(), k.bfloat16(), v.bfloat16())
        return out.float(), counts

    return rounded


def masked(choose: Callable[[Tensor, Tensor], Tensor]) -> Method:
    """The same kernel over the blocks that `choose(q, k)` gives, without stage 2."""

    def method(layer: int, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        mask = choose(q, k)
        out = sparge.block_sparse_attention(q, k, v, mask, pv_gap=math.inf)
        kept, every = mask.sum((2, 3)), torch.full(mask.shape[:2], mask[0, 0].numel())
        return out, torch.stack([every.to(kept), kept, every.to(kept), kept], -1)

    return method


def policy(text: str) -> Callable[[Tensor, Tensor], Tensor]:
    """A method of `sparge::policy`. It chooses on the CPU, whatever attends."""
    config = Config(policy=text)

    def choose(q: Tensor, k: Tensor) -> Tensor:
        return sparge.predict(q.cpu(), k.cpu(), config=config).tensor.to(q.device)

    return choose


def flexprefill(gamma: float) -> Callable[[Tensor, Tensor], Tensor]:
    """FlexPrefill's query-aware half: its other half follows diagonals, so it is causal only.

    Softmax of the products of mean queries and mean keys; over the whole head the largest blocks
    until they hold `gamma` of it, and the largest of each row.
    """

    def choose(q: Tensor, k: Tensor) -> Tensor:
        q_mean = q.unflatten(2, (-1, BLOCK_Q)).mean(3)
        k_mean = k.unflatten(2, (-1, BLOCK_KV)).mean(3)
        share = (q_mean @ k_mean.transpose(2, 3) * HEAD_DIM**-0.5).softmax(-1)
        rows = share.shape[2]
        ranked, order = share.flatten(2).sort(-1, descending=True)
        # A block is taken while those before it hold less than gamma.
        taken = ranked.cumsum(-1) - ranked < gamma * rows
        mask = torch.zeros_like(taken).scatter(2, order, taken).view(share.shape)
        return mask | (share == share.amax(-1, keepdim=True))

    return choose


def _own(**knobs: Any) -> Method:
    # An image has no first token that everything attends to.
    config = Config(keep_first=0, **knobs)
    return own(lambda layer: config)


# Of each family: the range of its parameter, of which more computes more, and the method.
FAMILIES: dict[str, tuple[float, float, Callable[[float], Method]]] = {
    "SpargeAttn, τ": (0.2, 0.9999, lambda x: _own(cdf=x)),
    "SpargeAttn, top-k": (0.02, 1.0, lambda x: _own(topk=x)),
    "paper's pooling, τ": (0.05, 0.9999, lambda x: _own(policy="paper", cdf=x)),
    "paper's pooling, top-k": (0.02, 1.0, lambda x: _own(policy="paper", topk=x)),
    "MInference, block-sparse": (1, 64, lambda x: masked(policy(f"block-sparse:{round(x)}"))),
    "FlexPrefill, query-aware": (0.05, 0.9999, lambda x: masked(flexprefill(x))),
    "XAttention": (0.05, 0.9999, lambda x: masked(policy(f"xattention:{x}"))),
    "window": (1, 4096, lambda x: masked(policy(f"window:{round(x)}"))),
    "random": (0.02, 1.0, lambda x: masked(policy(f"random:{x}"))),
}


def matched(family: str, sparsity: float, recorded: Recorded, steps: int = 10) -> float:
    """The parameter with which the family skips `sparsity` of the recorded layers' blocks."""
    low, high, make = FAMILIES[family]
    for _ in range(steps):
        middle = (low + high) / 2
        if skipped([make(middle)(layer, *qkv)[1] for layer, qkv in recorded.items()]) > sparsity:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def skipped(counts: list[Tensor], done: int = 1, of: int = 0) -> float:
    """The share of blocks that was skipped: of Q·Kᵀ, or of P·V with 3 and 2."""
    every = torch.stack([x.reshape(-1, 4).sum(0).cpu() for x in counts]).sum(0)
    return 1 - every[done].item() / every[of].item()


def along_hilbert(layers: Recorded) -> Recorded:
    return {
        layer: tuple(x[:, :, hilbert(math.isqrt(x.shape[2])).to(x.device)] for x in qkv)
        for layer, qkv in layers.items()
    }


def hilbert(side: int) -> Tensor:
    """The tokens of a row-major square, a power of two wide, along the Hilbert curve."""
    index = torch.arange(side * side)
    x, y, size = torch.zeros_like(index), torch.zeros_like(index), 1
    while size < side:
        right = index >> 1 & 1
        up = (index ^ right) & 1
        # A quarter that is entered from the other end is mirrored, then turned.
        mirrored = (up == 0) & (right == 1)
        x, y = torch.where(mirrored, size - 1 - x, x), torch.where(mirrored, size - 1 - y, y)
        x, y = torch.where(up == 0, y, x), torch.where(up == 0, x, y)
        x, y = x + size * right, y + size * up
        index, size = index >> 2, 2 * size
    return y * side + x

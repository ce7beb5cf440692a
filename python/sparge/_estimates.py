"""What the compared methods estimate from: exact attention of a few queries, means, the largest of
many. As `sparge::policy`'s module of that name, in torch operations on any device."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Optional, Union

import torch
import torch.nn.functional as F

from ._visible import Visible

Tensor = torch.Tensor


@dataclass(frozen=True)
class Heads:
    """Some heads of one sequence: queries ``[kv_heads, group, q_len, dim]``, keys ``[kv_heads,
    kv_len, dim]``, in the call's own type."""

    q: Tensor
    k: Tensor
    see: Visible
    scale: float

    def attention(self, start: int) -> Tensor:
        """``[heads, queries, keys]``: the attention of the queries from ``start`` on."""
        rows = self.see.pairs(start, self.see.q_len)
        return self.softmax(self.q[:, :, start:], self.k, rows)

    def softmax(self, q: Tensor, k: Tensor, sees: Optional[Tensor], extra: float = 1.0) -> Tensor:
        """``[heads, rows, keys]``: softmax of ``extra``·scale·q·kᵀ over the pairs that ``sees``
        allows; 0 where a row sees nothing. Where a row has scores of NaN or +∞ their probabilities are
        NaN and its others 0: who cannot be compared is taken first."""
        # Powers of two as in the crate, and like there one below −126 is 0: which of two such
        # probabilities is larger is not left to chance.
        rows = q.float() * (self.scale * extra * math.log2(math.e))
        p = rows.flatten(1, 2) @ k.float().transpose(1, 2)
        p = p.unflatten(1, q.shape[1:3]).flatten(0, 1)
        if sees is not None:
            p.masked_fill_(~sees, -math.inf)
        not_numbers = (p < math.inf).logical_not_()
        p.masked_fill_(not_numbers, -math.inf)
        p -= p.amax(-1, keepdim=True).clamp_(min=torch.finfo(p.dtype).min)
        p.masked_fill_(p < -126, -math.inf).exp2_()
        total = p.sum(-1, keepdim=True)
        is_plain = (total > 0) & ~not_numbers.any(-1, keepdim=True)
        p *= torch.where(is_plain, total.reciprocal(), 0.0)
        return p.masked_fill_(not_numbers, math.nan)


def lines(some: Heads, start: int) -> "tuple[Tensor, Tensor]":
    """``[heads, keys]`` each: the sums of what the queries from ``start`` on give to each key, and to
    each distance query − key."""
    p = some.attention(start)
    heads, rows, keys = p.shape
    # Row r's key at distance o is x + r with x = position − o, so sums over one x are diagonals: in a
    # row-major copy with room on both sides, lines with a step of one row and one key. (Adding by
    # index would add in any order.) Rows that lie past all keys have all their diagonals in the room.
    position = min(max(start + some.see.offset, -rows), 2 * keys)
    left, right = max(0, keys - 1 - position), max(0, position + rows - keys)
    padded = F.pad(p, (left, right))
    width = padded.shape[2]
    diagonals = padded.as_strided(
        (heads, rows, keys), (rows * width, width + 1, 1), left + position - (keys - 1)
    )
    return p.sum(1), diagonals.sum(1).flip(-1)


def split(x: Tensor, size: int, dim: int = -1) -> Tensor:
    """One dimension in parts of ``size``; the last part may end in zeros."""
    missing = -x.shape[dim] % size
    if missing:
        x = F.pad(x, (0, missing) if dim == -1 else (0, 0, 0, missing))
    return x.unflatten(dim, (-1, size))


def means(x: Tensor, size: int) -> Tensor:
    """The float32 means of ``size`` rows at a time; the last one may have fewer."""
    whole = x.shape[-2] // size
    full, rest = x[..., : whole * size, :], x[..., whole * size :, :]
    found = full.unflatten(-2, (whole, size)).sum(-2, dtype=torch.float32) * (1 / size)
    if rest.shape[-2] == 0:
        return found
    last = rest.sum(-2, keepdim=True, dtype=torch.float32) * (1 / rest.shape[-2])
    return torch.cat((found, last), -2)


def largest(values: Tensor, count: Union[int, Tensor]) -> Tensor:
    """True at the ``count`` (an int, or one per head) largest of each row, ties to the first."""
    order = values.sort(dim=-1, descending=True, stable=True).indices
    kept = torch.zeros_like(values, dtype=torch.bool)
    if isinstance(count, int):
        return kept.scatter_(-1, order[..., : min(count, values.shape[-1])], True)
    ranks = torch.arange(values.shape[-1], device=values.device)
    return kept.scatter_(-1, order, ranks < count[:, None])

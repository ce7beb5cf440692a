"""Which keys the queries of one sequence may see, in torch operations on any device.

The rules are those of `sparge::geometry::Visibility`: positions and lengths decide, so nothing is
copied and nothing waits for the device.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Optional

import torch

from ._mask import BLOCK_KV, BLOCK_Q

Tensor = torch.Tensor

# Longer than any sequence, and sums of a few of them fit into 64 bits.
_FAR = 1 << 40


@dataclass(frozen=True)
class Visible:
    """Query i is aligned with key ``offset + i`` and sees ``left`` keys before and ``right`` after it
    (None: all), and the keys before ``sink`` up to there."""

    q_len: int
    kv_len: int
    offset: int
    left: Optional[int]
    right: Optional[int]
    sink: int
    device: torch.device

    @classmethod
    def of(
        cls,
        q_len: int,
        kv_len: int,
        visibility: tuple[bool, Optional[int], Optional[int], int],
        device: torch.device,
    ) -> "Visible":
        """From `_sparge.Settings.visibility`."""
        is_top_left, left, right, sink_blocks = visibility
        left, right = (None if x is None else min(x, _FAR) for x in (left, right))
        sink = min(sink_blocks * BLOCK_KV, _FAR)
        return cls(q_len, kv_len, 0 if is_top_left else kv_len - q_len, left, right, sink, device)

    @property
    def is_causal(self) -> bool:
        return self.right == 0

    def span(self, start: int, end: int, step: int = 1) -> Tensor:
        """``start, start + step, …`` below ``end``, int64."""
        return torch.arange(start, max(start, end), step, device=self.device)

    def starts(self, first: int, last: int) -> "tuple[Tensor, Tensor]":
        """The positions of the first and the last query of blocks ``first..last``."""
        start = self.span(first * BLOCK_Q, min(last * BLOCK_Q, self.q_len), BLOCK_Q)
        end = (start + (BLOCK_Q - 1)).clamp(max=self.q_len - 1)
        return start + self.offset, end + self.offset

    def _lo(self, queries: Tensor) -> Tensor:
        """The first key in a query's window."""
        if self.left is None:
            return torch.zeros_like(queries)
        return (queries + (self.offset - self.left)).clamp(0, self.kv_len)

    def _hi(self, queries: Tensor) -> Tensor:
        """One past the last key that a query sees."""
        if self.right is None:
            return torch.full_like(queries, self.kv_len)
        return (queries + (self.offset + self.right + 1)).clamp(0, self.kv_len)

    def pairs(self, start: int, end: int) -> Tensor:
        """``[queries, keys]``: what queries ``start..end`` see."""
        queries = self.span(start, end)[:, None]
        keys = self.span(0, self.kv_len)
        in_reach = keys >= self._lo(queries)
        if self.sink:
            in_reach |= keys < self.sink
        return in_reach & (keys < self._hi(queries))

    def tiles(self, q_size: int, kv_size: int, first: int, last: int) -> Tensor:
        """``[last − first, kv tiles]``: the tiles of so many queries and keys that hold a pair that is
        seen; of a tile across the end of the sinks, what the window leaves of it."""
        start = self.span(first * q_size, min(last * q_size, self.q_len), q_size)[:, None]
        end = (start + (q_size - 1)).clamp(max=self.q_len - 1)
        k_start = self.span(0, self.kv_len, kv_size)
        k_end = (k_start + kv_size).clamp(max=self.kv_len)
        # The first query that reaches the tile's keys has the smallest `lo` of those that do.
        query = start
        if self.right is not None:
            query = torch.maximum(start, k_start - (self.offset + self.right))
        seen = (query <= end) & (self._hi(query) > k_start)
        if self.left is None:
            return seen
        return seen & ((self._lo(query) < k_end) | (k_end <= self.sink))

    def blocks(
        self, first: int, last: int, attn_mask: Optional[Tensor], block_mask: Optional[Tensor]
    ) -> Tensor:
        """``[heads or 1, last − first, kv_blocks]``: the blocks of this geometry in rows
        ``first..last`` with a pair that all masks allow. ``attn_mask`` ``[heads or 1, queries, keys]``
        and ``block_mask`` ``[heads or 1, q_blocks, kv_blocks]`` may be longer than the sequence."""
        if attn_mask is None:
            found = self.tiles(BLOCK_Q, BLOCK_KV, first, last)[None]
        else:
            start, end = first * BLOCK_Q, min(last * BLOCK_Q, self.q_len)
            given = attn_mask[:, start:end, : self.kv_len]
            seen = given if given.dtype == torch.bool else given != float("-inf")
            seen = seen & self.pairs(start, end)
            columns = -(-self.kv_len // BLOCK_KV) * BLOCK_KV - self.kv_len
            rows = (last - first) * BLOCK_Q - (end - start)
            seen = torch.nn.functional.pad(seen, (0, columns, 0, rows))
            seen = seen.unflatten(2, (-1, BLOCK_KV)).any(3)
            found = seen.unflatten(1, (-1, BLOCK_Q)).any(2)
        if block_mask is None:
            return found
        return found & block_mask[:, first:last, : found.shape[2]]

"""What calls return beside the output."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Stats:
    """What a call skipped, as fractions of what the masks allowed.

    ``counts`` is ``[batch, heads, 4]`` int64, a torch tensor for torch calls and a numpy array for
    numpy and DLPack calls: blocks that are reachable,
    blocks whose Q·Kᵀ was computed, groups of 16 rows that are reachable, groups whose P·V was
    computed. The fast path of CUDA has no stage 2: there both count what stage 1 left.
    """

    counts: Any

    def qk_sparsity(self) -> float:
        """Share of the reachable blocks whose Q·Kᵀ was skipped (stage 1), 0 to 1."""
        return self._skipped(1, 0)

    def pv_sparsity(self) -> float:
        """Share of the reachable groups whose P·V was skipped (both stages), 0 to 1."""
        return self._skipped(3, 2)

    def _skipped(self, done: int, of: int) -> float:
        total = float(self.counts[:, :, of].sum())
        return 1.0 - float(self.counts[:, :, done].sum()) / total if total else 0.0


@dataclass(frozen=True)
class Quantized:
    """int8 keys: ``k ≈ values · scales[..., None] + means[token // 64]``.

    * ``values`` ``[batch, kv_heads, kv_len, head_dim]`` int8
    * ``scales`` ``[batch, kv_heads, kv_len]`` float32, one per token
    * ``means`` ``[batch, kv_heads, ceil(kv_len / 64), head_dim]`` float32, one per key block
    """

    values: Any
    scales: Any
    means: Any

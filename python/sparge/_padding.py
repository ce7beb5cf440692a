"""What a boolean mask says, if it is one of the patterns the operator does without a mask."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Optional

import torch


@dataclass(frozen=True)
class Pattern:
    """The keys of query i, the last query at the last key.

    * ``causal``: none after its own position.
    * ``window``: its own position and the ``window - 1`` before it (None: all).
    * ``keys``: per batch entry, the only keys ``(from, to)`` that are valid (None: all).
    """

    causal: bool
    window: Optional[int] = None
    keys: Optional[tuple[tuple[int, int], ...]] = None


# Layers share one mask: it is looked at once per forward pass. A weak reference tells whether the
# tensor is still the same object, the version whether it has been written to.
_last: "tuple[Optional[weakref.ref[torch.Tensor]], int, Optional[Pattern]]" = (None, 0, None)


def pattern_of(mask: torch.Tensor, q_len: int, kv_len: int) -> Optional[Pattern]:
    """The pattern that equals ``mask`` on every row that has one of the sequence's keys at its own
    position, or None. The answer is checked against the whole mask: nothing is assumed."""
    global _last
    reference, version, pattern = _last
    current = 0 if mask.is_inference() else mask._version
    if reference is not None and reference() is mask and version == current:
        return pattern
    pattern = _look(mask, q_len, kv_len)
    _last = (weakref.ref(mask), current, pattern)
    return pattern


def _look(mask: torch.Tensor, q_len: int, kv_len: int) -> Optional[Pattern]:
    is_plain = mask.dtype == torch.bool and mask.ndim == 4 and mask.shape[1] == 1
    if not is_plain or mask.shape[2:] != (q_len, kv_len):
        return None
    rows = mask[:, 0]
    # A key is valid where any query sees it.
    valid = rows.any(1)
    ranges = _ranges(valid)
    if ranges is None:
        return None
    position = torch.arange(q_len, device=mask.device)[:, None] + (kv_len - q_len)
    column = torch.arange(kv_len, device=mask.device)
    causal = not bool((rows & (column > position)).any())
    window = _window(rows, ranges, kv_len) if causal else None
    expected = column <= position if causal else torch.ones_like(column <= position)
    if window is not None:
        expected = expected & (column > position - window)
    for at, (start, end) in enumerate(ranges):
        own = expected & (column >= start) & (column < end)
        # Rows at padded positions attend whatever transformers found convenient.
        is_padding = (position[:, 0] < start) | (position[:, 0] >= end) if causal else None
        same = (rows[at] == own).all(1)
        if is_padding is not None:
            same = same | is_padding
        if not bool(same.all()):
            return None
    everything = all(r == (0, kv_len) for r in ranges)
    return Pattern(causal, window, None if everything else ranges)


def _ranges(valid: torch.Tensor) -> Optional[tuple[tuple[int, int], ...]]:
    """The one run of True in each row."""
    ranges = []
    for row in valid.tolist():
        if True not in row:
            return None
        start = row.index(True)
        end = len(row) - row[::-1].index(True)
        if not all(row[start:end]):
            return None
        ranges.append((start, end))
    return tuple(ranges)


def _window(
    rows: torch.Tensor, ranges: tuple[tuple[int, int], ...], kv_len: int
) -> Optional[int]:
    """The window of the last row of the first sequence that ends at the last key."""
    for at, (start, end) in enumerate(ranges):
        if end == kv_len:
            seen = int(rows[at, -1].sum())
            return None if seen == end - start else seen
    return None

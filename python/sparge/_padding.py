"""What a boolean mask says, if it is one of the patterns the operator does without a mask."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any, Optional

import torch


@dataclass(frozen=True)
class Pattern:
    """The keys of query i.

    * ``causal``: none after its own position, which is ``i + offset``.
    * ``window``: its own position and the ``window - 1`` before it (None: all).
    * ``keys``: per batch entry (one stands for all), the only keys ``(from, to)`` that are valid.
      None: all are, and the last query is at the last key.
    """

    causal: bool
    window: Optional[int] = None
    keys: Optional[tuple[tuple[int, int], ...]] = None
    offset: int = 0

    def rows(self, at: int, q_len: int) -> tuple[int, int]:
        """The queries of a batch entry that are not padding: those at a valid key's position. What
        is not causal has no positions and no padding queries."""
        assert self.keys is not None
        if not self.causal:
            return 0, q_len
        start, end = self.keys[at]
        return max(0, start - self.offset), min(q_len, end - self.offset)


# Layers share one mask: it is looked at once per forward pass. A weak reference tells whether the
# tensor is still the same object, the version whether it has been written to.
_last: "tuple[Optional[weakref.ref[torch.Tensor]], Any, Optional[Pattern]]" = (None, None, None)


def pattern_of(
    mask: torch.Tensor, q_len: int, kv_len: int, is_causal: bool
) -> Optional[Pattern]:
    """The pattern that equals ``mask``, or None. The answer is checked against the whole mask:
    nothing is assumed. ``is_causal`` says whether queries have positions among the keys at all."""
    global _last
    if mask.is_inference():  # it has no version: nobody would notice a change
        return _look(mask, q_len, kv_len, is_causal)
    about = (mask._version, q_len, kv_len, is_causal)
    reference, known, pattern = _last
    if reference is not None and reference() is mask and known == about:
        return pattern
    pattern = _look(mask, q_len, kv_len, is_causal)
    _last = (weakref.ref(mask), about, pattern)
    return pattern


def _look(mask: torch.Tensor, q_len: int, kv_len: int, is_causal: bool) -> Optional[Pattern]:
    is_plain = mask.dtype == torch.bool and mask.ndim == 4 and mask.shape[1] == 1
    if not is_plain or mask.shape[2:] != (q_len, kv_len):
        return None
    rows = mask[:, 0]
    # A key is valid where any query sees it.
    valid = rows.any(1)
    ranges = _ranges(valid)
    if ranges is None:
        return None
    everything = all(r == (0, kv_len) for r in ranges)
    if bool((rows == valid[:, None]).all()):
        return Pattern(False, None, None if everything else ranges)
    if not is_causal:
        return None
    offset = _offset(rows)
    if offset < 0 or offset + q_len > kv_len:
        return None
    window = _window(rows, ranges, offset)
    position = torch.arange(q_len, device=mask.device)[:, None] + offset
    column = torch.arange(kv_len, device=mask.device)
    expected = column <= position
    if window is not None:
        expected = expected & (column > position - window)
    everything = everything and offset + q_len == kv_len
    pattern = Pattern(True, window, None if everything else ranges, offset)
    for at, (start, end) in enumerate(ranges):
        own = expected & (column >= start) & (column < end)
        if not bool((rows[at] == own).all()):
            return None
        if not everything:
            first, last = pattern.rows(at, q_len)
            # Without a query of its own, or where a query before the end misses keys that a later
            # one sees, an entry is not a padded sequence.
            if last <= first or last + offset != end:
                return None
    return pattern


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


def _offset(rows: torch.Tensor) -> int:
    """The key at the first query's position, if the rows are causal: an entry's first query that
    sees a key sees its own last, unless the entry's keys have ended before."""
    first = rows.any(2).int().argmax(1)
    seen = rows[torch.arange(len(rows), device=rows.device), first]
    last = torch.where(seen, torch.arange(rows.shape[2], device=rows.device), -1).amax(1)
    return int((last - first).max())


def _window(
    rows: torch.Tensor, ranges: tuple[tuple[int, int], ...], offset: int
) -> Optional[int]:
    """What the query at an entry's last key sees, where that is not all of its keys."""
    for at, (start, end) in enumerate(ranges):
        row = end - 1 - offset
        if 0 <= row < rows.shape[1]:
            seen = int(rows[at, row].sum())
            if seen < end - start:
                return seen
    return None

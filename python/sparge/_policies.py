"""Block masks of the compared methods in torch operations, so that they are made where the tensors are.

What each method keeps is said at `sparge::policy::Policy`, and the masks are those of that crate but
where rounding decides: sums are taken in another order, in float32 like there. (Products are float32
ones unless torch was told to use TF32; a cumulated mass is float64.) Nothing waits for the device or
copies from the host. (Under ``torch.use_deterministic_algorithms(True)`` some versions of torch refuse the
floating-point ``cumsum`` of FlexPrefill and XAttention on CUDA.) Beside the mask, a call works in at most about 512 MB up to 128K tokens, a
few heads and rows of blocks at a time; FlexPrefill sorts the pooled map of a whole head, which from
there on grows with its square.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Optional

import torch
import torch.nn.functional as F

from . import _sparge
from ._config import parsed
from ._estimates import Heads, largest, lines, means, split
from ._mask import BLOCK_KV, BLOCK_Q
from ._ops_shapes import is_nhd, mask_shape
from ._visible import Visible

Tensor = torch.Tensor

# What heads and what rows taken together may need to work in, each.
_BYTES = 192 << 20
# MInference: its last queries; columns and diagonals that come first; fewest diagonals; its block.
_LAST, _FIRST_COLUMNS, _NEAR, _LEAST_SLASH, _SMALL = 64, 30, 100, 50, 64
# The block of FlexPrefill and XAttention, queries and keys: two blocks of keys.
_WIDE = 128


# The blocks a method keeps, reachable or not: rows `first..last` of the heads' masks,
# [heads or 1, rows, kv_blocks].
_Rows = Callable[[int, int], Tensor]


def chosen(
    query: Tensor,
    key: Tensor,
    attn_mask: Optional[Tensor],
    block_mask: Optional[Tensor],
    kv_lens: Optional[Tensor],
    settings: str,
) -> Tensor:
    """``[batch, heads, q_blocks, kv_blocks]``, bool: what the settings' policy keeps of the blocks that
    the masks allow. ``kv_lens`` on a GPU wait for it, and so does ``random``."""
    asked = parsed(settings)
    asked.check_policy(attn_mask is not None)
    assert asked.policy is not None
    if asked.policy[0] == "random":
        # Where nothing is estimated, the crate needs no tensors.
        return on_the_host(query, key, attn_mask, block_mask, kv_lens, settings)
    out = query.new_zeros(mask_shape(query, key, settings), dtype=torch.bool)
    if is_nhd(settings):
        query, key = query.transpose(1, 2), key.transpose(1, 2)
    (batch, _, q_len, dim), (_, kv_heads, all_keys, _) = query.shape, key.shape
    scale = 1 / math.sqrt(dim) if asked.scale is None else asked.scale
    lens = [all_keys] * batch if kv_lens is None else kv_lens.tolist()
    # Autocast would round what is float32 here on purpose.
    with torch.no_grad(), torch.autocast(query.device.type, enabled=False):
        for at, kv_len in enumerate(lens):
            if kv_len == 0:
                continue
            see = Visible.of(q_len, kv_len, asked.visibility, query.device)
            method = _Method.of(*asked.policy, see, dim)
            masks = [None if x is None else x[at % x.shape[0]] for x in (attn_mask, block_mask)]
            q = query[at].unflatten(0, (kv_heads, -1))
            k = key[at, :, :kv_len]
            to = out[at].unflatten(0, (kv_heads, -1))
            for kv, group in _chunks(kv_heads, q.shape[1], method.head_bytes):
                some = Heads(q[kv, group], k[kv], see, scale)
                allowed = [_of_heads(x, kv, group, q.shape[:2]) for x in masks]
                _fill(to[kv, group], some, method, allowed)
    return out


def on_the_host(
    query: Tensor,
    key: Tensor,
    attn_mask: Optional[Tensor],
    block_mask: Optional[Tensor],
    kv_lens: Optional[Tensor],
    settings: str,
) -> Tensor:
    """The blocks of settings that do not ask for the tensors' values: all that the masks allow, or
    drawn ones. Found on the host, where the same rules are written down: copying them waits for the
    device."""
    from ._ops import _extra

    masks = [None if x is None else x.cpu() for x in (attn_mask, block_mask)]
    if masks[0] is not None and masks[0].dtype != torch.bool:
        masks[0] = masks[0].float()
    held, extra = _extra(masks[0], masks[1], kv_lens)
    found = torch.empty(mask_shape(query, key, settings), dtype=torch.bool, device="cpu")
    # Nothing is predicted, so every row may be the same one.
    row = torch.zeros(query.shape[3], device="cpu")
    extra["mask_out"] = found.data_ptr()
    q, k = ((row.data_ptr(), x.shape, (0, 0, 0, 1)) for x in (query, key))
    about = (
        "layout=", "causal=", "window=", "sink_blocks=", "keep_first=", "keep_local=", "policy=",
    )  # fmt: skip
    words = [word for word in settings.split() if word.startswith(about)]
    if found.numel():
        text = " ".join([*words, "select=all"])
        _sparge.predict(parsed(text), "f32", torch.get_num_threads(), q, k, extra)  # type: ignore[arg-type]
    del held
    return found.to(query.device)


def _fill(to: Tensor, some: Heads, method: "_Method", masks: "list[Optional[Tensor]]") -> None:
    """The mask of some heads, ``[kv_heads, group, q_blocks, kv_blocks]``."""
    see = some.see
    kept, kv_blocks = method.prepare(some), -(-see.kv_len // BLOCK_KV)
    row_bytes = method.row_bytes * some.q.shape[0] * some.q.shape[1] + 64 * kv_blocks
    if masks[0] is not None:
        row_bytes += 4 * BLOCK_Q * see.kv_len * masks[0].shape[0]
    step = max(1, _BYTES // row_bytes)
    for first in range(0, to.shape[2], step):
        last = min(first + step, to.shape[2])
        blocks = see.blocks(first, last, *masks)
        if kept is not None:
            blocks = kept(first, last) & blocks
        if blocks.shape[0] > 1:
            blocks = blocks.unflatten(0, to.shape[:2])
        to[:, :, first:last, :kv_blocks] = blocks


def _chunks(kv_heads: int, group: int, head_bytes: int) -> "Iterator[tuple[slice, slice]]":
    """Heads that are taken together: some groups, or a part of one."""
    heads = max(1, _BYTES // max(1, head_bytes))
    groups = max(1, heads // group)
    part = min(group, heads)
    for kv in range(0, kv_heads, groups):
        for start in range(0, group, part):
            yield slice(kv, kv + groups), slice(start, start + part)


def _of_heads(
    mask: Optional[Tensor], kv: slice, group: slice, shape: "torch.Size"
) -> Optional[Tensor]:
    """Those heads of a mask ``[heads or 1, …]``."""
    if mask is None or mask.shape[0] == 1:
        return mask
    return mask.unflatten(0, shape)[kv, group].flatten(0, 1)


@dataclass(frozen=True)
class _Method:
    """A policy for one sequence: what it looks at once (None: it keeps what there is), and the bytes
    that this takes per head, and a row of blocks after it."""

    prepare: Callable[[Heads], Optional[_Rows]]
    head_bytes: int
    row_bytes: int

    @classmethod
    def of(cls, name: str, with_: dict[str, Any], see: Visible, dim: int) -> "_Method":
        keys, kv_blocks = see.kv_len, -(-see.kv_len // BLOCK_KV)
        floats = 4 * keys * dim  # a head's keys
        if name == "window":
            return cls(lambda x: _window(x, with_["tokens"], with_["sinks"]), 0, kv_blocks)
        if name == "a-shape":
            return cls(lambda x: _window(x, with_["local"], with_["first"]), 0, kv_blocks)
        if name == "minference":
            return cls(
                lambda x: _vertical_slash(x, **with_), floats + 16 * _LAST * keys, 12 * kv_blocks
            )
        if name == "block-sparse":
            return cls(
                lambda x: _block_sparse(x, with_["blocks"]), floats // 16, 2 * 40 * kv_blocks
            )
        if name == "flexprefill":
            least = max(1, -(-with_["min_budget"] // _WIDE))
            if keys <= max(2 * _WIDE, least * _WIDE):
                return cls(lambda x: None, 0, kv_blocks)
            pooled = -(-see.q_len // _WIDE) * -(-keys // _WIDE)
            head_bytes = floats + 16 * _WIDE * keys + 64 * pooled
            gamma, tau = with_["gamma"], with_["tau"]
            return cls(lambda x: _flexprefill(x, gamma, tau, least), head_bytes, 8 * kv_blocks)
        if name == "xattention":
            row_bytes = 24 * (_WIDE // with_["stride"]) * -(-keys // with_["stride"])
            return cls(lambda x: _xattention(x, **with_), 2 * floats, row_bytes)
        if name == "dense":
            return cls(lambda x: None, 0, kv_blocks)
        raise AssertionError(f"policy {name} is not made here")


def _window(some: Heads, tokens: int, sinks: int) -> _Rows:
    """Blocks with a pair where |query − key| < `tokens` or key < `sinks`."""
    see = some.see
    start = see.span(0, see.kv_len, BLOCK_KV)
    end = (start + BLOCK_KV).clamp(max=see.kv_len)
    # Beyond every position: as good as unbounded.
    reach = min(tokens, see.q_len + see.kv_len) - 1
    sinks = min(sinks, see.kv_len)

    def rows(first: int, last: int) -> Tensor:
        low, high = (x[:, None] for x in see.starts(first, last))
        near = (low - reach < end) & (high + reach >= start)
        return (near | (start < sinks))[None]

    return rows


def _vertical_slash(some: Heads, vertical: int, slash: int) -> _Rows:
    """Blocks that hold a kept column or are crossed by a kept diagonal of the last queries."""
    see = some.see
    columns, diagonals = lines(some, max(0, see.q_len - _LAST))
    columns[:, :_FIRST_COLUMNS] = math.inf
    diagonals[:, :_NEAR] = math.inf
    kept_columns = largest(columns, max(vertical, _FIRST_COLUMNS))
    has_column = split(kept_columns, BLOCK_KV).any(2)[:, None]
    # before[o] kept diagonals have an offset below o: a range holds one where the ends differ.
    kept = largest(diagonals, max(slash, _LEAST_SLASH))
    before = F.pad(kept.cumsum(-1, dtype=torch.int32), (1, 0))
    start = see.span(0, see.kv_len, BLOCK_KV)
    end = (start + BLOCK_KV).clamp(max=see.kv_len)

    def rows(first: int, last: int) -> Tensor:
        # Offsets of the block's pairs, the causal ones.
        low, high = (x[:, None] for x in see.starts(first, last))
        low = (low - (end - 1)).clamp(0, see.kv_len)
        high = (high - start + 1).clamp(0, see.kv_len)
        return has_column | (before[:, high] > before[:, low])

    return rows


def _block_sparse(some: Heads, count: int) -> _Rows:
    """Per 64 queries, the `count` blocks of 64 keys with the largest products of means."""
    see = some.see
    q, k = means(some.q, _SMALL), means(some.k, _SMALL)
    halves = BLOCK_Q // _SMALL

    def rows(first: int, last: int) -> Tensor:
        part = q[:, :, halves * first : halves * last]
        sees = see.tiles(_SMALL, _SMALL, halves * first, halves * last)
        # The softmax keeps the order.
        scores = some.softmax(part, k, sees).masked_fill_(~sees, -1.0)
        return split(largest(scores, count) & sees, halves, 1).any(2)

    return rows


def _flexprefill(some: Heads, gamma: float, tau: float, least: int) -> _Rows:
    """Vertical and slash blocks of the last 128 queries, and of query-aware heads the pooled map."""
    see = some.see
    wide, start = -(-see.kv_len // _WIDE), max(0, see.q_len - _WIDE)
    least = min(least, wide)
    vertical, slash = (x / (see.q_len - start) for x in lines(some, start))

    def budget(x: Tensor) -> Tensor:
        covered = x.sort(-1, descending=True).values.double().cumsum(-1) <= gamma
        return ((covered.sum(-1) + 1) // _WIDE + 1).clamp(least, wide)

    n_vertical, n_slash = budget(vertical), budget(slash)
    columns = split(vertical, _WIDE).sum(2)
    # Blocks of diagonals begin at the far end, as FlexPrefill lays them out.
    diagonals = split(slash.flip(-1), _WIDE).sum(2).flip(-1)

    keys = means(some.k, _WIDE)
    query = means(some.q[:, :, start:], _WIDE)
    pooled = some.softmax(query, keys, None)[:, 0]
    is_aware = _root_divergence(pooled, columns) < tau
    n_vertical = torch.where(is_aware, least, n_vertical)
    n_slash = torch.where(is_aware, least, n_slash)
    columns[:, 0] = math.inf
    diagonals[:, 0] = math.inf
    columns, diagonals = largest(columns, n_vertical), largest(diagonals, n_slash)
    # Whether any head is aware is on the device: the map is made for all.
    whole = _pooled_map(some, keys, gamma) & is_aware[:, None, None] if tau > 0 else None
    at = see.span(0, wide)

    def rows(first: int, last: int) -> Tensor:
        kept = columns[:, None]
        # Where queries and keys are not aligned to blocks, a row's diagonal lies in two.
        for own in see.starts(first, last):
            back = (own // _WIDE)[:, None] - at
            kept = kept | (diagonals[:, back.clamp(0, wide - 1)] & (back >= 0) & (back < wide))
        if whole is not None:
            kept = kept | whole[:, first:last]
        return _narrow(kept, see)

    return rows


def _root_divergence(a: Tensor, b: Tensor) -> Tensor:
    """√JS of two distributions, natural log; a term with probability 0 is 0. What is not a number is 0,
    as in the crate: such a head is query-aware, and its map leaves nothing out."""
    a, b = a.double(), b.double()
    mean = 0.5 * (a + b)
    terms = (torch.where(x > 0, 0.5 * x * (x / mean).log(), 0.0) for x in (a, b))
    return sum(terms).sum(-1).nan_to_num(0.0).clamp(min=0).sqrt()  # type: ignore[union-attr]


def _pooled_map(some: Heads, keys: Tensor, gamma: float) -> Tensor:
    """``[heads, q_blocks, wide blocks]``: the largest pooled probabilities, while their sum over all
    rows is at most `gamma` of the number of rows."""
    queries = means(some.q, _WIDE)
    count = queries.shape[2]
    sees = some.see.tiles(_WIDE, _WIDE, 0, count)
    p = some.softmax(queries, keys, sees).masked_fill_(~sees, -1.0).flatten(1)
    found = p.sort(dim=-1, descending=True, stable=True)
    # As the crate asks it: a NaN sum is never above the limit, and everything is kept.
    within = ~(found.values.clamp(min=0).double().cumsum(-1) > gamma * count)
    kept = torch.zeros_like(within).scatter_(-1, found.indices, within)
    return kept.unflatten(1, sees.shape) & sees


def _xattention(some: Heads, stride: int, threshold: float) -> _Rows:
    """Blocks by the sums of their antidiagonals, until a share of the row is covered."""
    see, q_len = some.see, some.q.shape[-2]
    wide, per = -(-see.kv_len // _WIDE), _WIDE // stride

    def laid(x: Tensor, length: int, backwards: bool = False) -> Tensor:
        """`stride` rows laid end to end; rows past the end are 0 and add nothing."""
        x = F.pad(x.float(), (0, 0, 0, length - x.shape[-2])).unflatten(-2, (-1, stride))
        return (x.flip(-2) if backwards else x).flatten(-2)

    keys = laid(some.k, -(-see.kv_len // stride) * stride)
    key_start = see.span(0, see.kv_len, stride)
    wide_start = see.span(0, see.kv_len, _WIDE)
    wide_end = (wide_start + _WIDE).clamp(max=see.kv_len)

    def rows(first: int, last: int) -> Tensor:
        start, end = first * BLOCK_Q, last * BLOCK_Q
        queries = laid(some.q[:, :, start : min(end, q_len)], end - start, True)
        # Causal by groups of `stride`: a group of queries sees its own group of keys.
        at = see.span(start, end, stride)[:, None]
        sees, seen = at < q_len, keys.shape[1]
        if see.is_causal:
            sees = sees & (key_start <= at + (see.offset + stride - 1))
            # Groups that no query sees need no scores.
            seen = min(seen, max(1, -(-(min(end, q_len) + see.offset + stride) // stride)))
            sees = sees[:, :seen]
        z = some.softmax(queries, keys[:, :seen], sees, 1 / stride)
        z = z.unflatten(1, (-1, per)).sum(2).double()
        mass = F.pad(z, (0, wide * per - seen)).unflatten(2, (wide, per)).sum(3)
        total = mass.sum(-1, keepdim=True)
        reachable = see.tiles(_WIDE, _WIDE, first, last)
        forced = torch.zeros_like(reachable)
        if see.is_causal:
            low, high = (x[:, None] for x in see.starts(first, last))
            forced = (low < wide_end) & (wide_start <= high)
            forced[:, 0] = True
        by = mass.masked_fill(forced, math.inf).masked_fill(~reachable, -1.0)
        order = by.sort(dim=-1, descending=True, stable=True).indices
        taken = mass.masked_fill(~reachable, 0.0).gather(-1, order)
        before = F.pad(taken.cumsum(-1)[..., :-1], (1, 0))
        kept = torch.zeros_like(mass, dtype=torch.bool)
        # As the crate asks it: a NaN total reaches no threshold, and everything is kept.
        kept.scatter_(-1, order, ~(before >= threshold * total))
        return _narrow((kept | forced) & reachable, see)

    return rows


def _narrow(wide: Tensor, see: Visible) -> Tensor:
    """Blocks of 128 keys as two of 64 each."""
    both = wide[..., None].expand(*wide.shape, _WIDE // BLOCK_KV).flatten(-2)
    return both[..., : -(-see.kv_len // BLOCK_KV)]

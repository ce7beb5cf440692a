"""Joint attention over image and text tokens: image queries sparse, text queries whole."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Optional, Union

import torch
import torch.nn.functional as F

from .._api import attention
from .._config import Config
from .._sparge import SpargeError

Tensor = torch.Tensor
# What stands in for `sparge.attention`: q, k, v; config, scale, keep_keys by name.
Attend = Optional[Callable[..., Tensor]]


@dataclass(frozen=True)
class Text:
    """Where the text tokens of a joint sequence are: ``start`` to ``end``, at one of its ends."""

    start: int
    end: int

    @classmethod
    def at(cls, place: Optional[str], text_len: int, length: int) -> "Optional[Text]":
        """``text_len`` tokens at ``"first"`` or ``"last"`` of ``length``."""
        if place is None or text_len == 0:
            return None
        return cls(0, text_len) if place == "first" else cls(length - text_len, length)


def dense(
    query: Tensor, key: Tensor, value: Tensor, mask: Optional[Tensor], scale: Optional[float]
) -> Tensor:
    """SDPA on ``[batch, heads, tokens, dim]``."""
    return F.scaled_dot_product_attention(query, key, value, mask, scale=scale)


def sparse(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    text: Optional[Text],
    config: Config,
    scale: Optional[float] = None,
    key_mask: Optional[Tensor] = None,
    attend: Attend = None,
) -> Tensor:
    """Self-attention over ``[batch, heads, tokens, dim]``.

    ``key_mask`` bool ``[batch, 1, 1, tokens]`` leaves keys out (padded text); queries at those
    places are computed as SDPA would. ``attend`` computes the image queries. Without it
    they go, on a GPU, through one call with the text queries, nothing of which is skipped: a call of
    their own and putting both outputs together would cost more than is saved.
    """
    if key_mask is None:
        return _joint(query, key, value, text, text, config, scale, attend)
    parts = []
    for at, valid in enumerate(_valid(key_mask, key.shape[0], key.shape[2])):
        one = slice(at, at + 1)
        if isinstance(valid, slice):
            k, v = key[one, :, valid], value[one, :, valid]
        else:
            k, v = key[one].index_select(2, valid), value[one].index_select(2, valid)
        parts.append(_joint(query[one], k, v, text, _kept(valid, text), config, scale, attend))
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def _joint(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rows: Optional[Text],
    keys: Optional[Text],
    config: Config,
    scale: Optional[float],
    attend: Attend,
) -> Tensor:
    """``rows`` are the text queries, ``keys`` the text keys."""
    keep = None if keys is None or keys.start >= keys.end else ((keys.start, keys.end),)
    options: dict[str, Any] = {"config": config, "scale": scale, "keep_keys": keep}
    if attend is None and query.is_cuda:
        options["keep_queries"] = None if rows is None else ((rows.start, rows.end),)
        # Out comes tokens before heads in memory: what the caller projects is then a view.
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        out: Tensor = attention(q, k, v, layout="NHD", **options)
        return out.transpose(1, 2)
    attend = attend or attention
    if rows is None:
        return attend(query, key, value, **options)
    text_out = dense(query[:, :, rows.start : rows.end], key, value, None, scale)
    image = slice(rows.end, None) if rows.start == 0 else slice(0, rows.start)
    image_out = attend(query[:, :, image], key, value, **options)
    parts = [text_out, image_out] if rows.start == 0 else [image_out, text_out]
    # In memory tokens before heads: what the caller projects is then a view.
    return torch.cat([part.transpose(1, 2) for part in parts], dim=1).transpose(1, 2)


_Valid = Union[slice, Tensor]
_last: "tuple[Optional[weakref.ref[Tensor]], Any, list[_Valid]]" = (None, None, [])


def _valid(mask: Tensor, batch: int, length: int) -> "list[_Valid]":
    """The valid keys of each batch entry: a slice where they are one run, indices otherwise.

    All layers of a forward pass share the mask, so the host waits for the device once per pass. (An
    inference tensor has no version that tells of changes: it is looked at by every layer.)
    """
    global _last
    about = None if mask.is_inference() else (mask._version, batch, length)
    reference, seen, known = _last
    if about is not None and about == seen and reference is not None and reference() is mask:
        return known
    if mask.dtype != torch.bool or mask.shape[1:] != (1, 1, length):
        raise SpargeError(
            f"attn_mask is {mask.dtype} {tuple(mask.shape)}, expected bool "
            f"[batch, 1, 1, {length}] (which keys are valid)"
        )
    found: list[_Valid] = []
    for row in mask.expand(batch, 1, 1, length)[:, 0, 0].cpu():
        indices = row.nonzero().flatten()
        if len(indices) == 0:
            raise SpargeError("attn_mask leaves a batch entry without any key")
        first, last = int(indices[0]), int(indices[-1]) + 1
        is_run = last - first == len(indices)
        found.append(slice(first, last) if is_run else indices.to(mask.device))
    if about is not None:
        _last = (weakref.ref(mask), about, found)
    return found


def _kept(valid: _Valid, text: Optional[Text]) -> Optional[Text]:
    """The text among the valid keys."""
    if text is None:
        return None
    if isinstance(valid, slice):
        start, end = (min(max(x, valid.start), valid.stop) for x in (text.start, text.end))
        return Text(start - valid.start, end - valid.start)
    host = valid.cpu()
    return Text(int((host < text.start).sum()), int((host < text.end).sum()))

"""transformers models: ``sparge.transformers.register()``, then ``attn_implementation="sparge"``.

>>> import sparge.transformers
>>> sparge.transformers.register()
>>> model.set_attn_implementation("sparge")          # or from_pretrained(..., attn_implementation=)
>>> sparge.transformers.configure(model, topk=0.5, dense_layers=2)   # optional

Prefill is sparse; decoding (fewer than 16 queries) is dense, through transformers' own SDPA.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, Optional, Union

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from ._api import attention
from ._calibration import Calibration, load_calibration
from ._config import DENSE, Config, parsed
from ._padding import Pattern, pattern_of
from ._sparge import SpargeError
from ._torch import AUTO_MIN_QUERIES

NAME = "sparge"

# Arguments of attention functions that change nothing about which keys a query sees or how scores
# become weights: positions and bookkeeping of the model around.
_HARMLESS = frozenset(
    {
        "position_ids", "cache_position", "use_cache", "output_attentions", "output_hidden_states",
        "return_dict", "num_items_in_batch", "position_embeddings", "is_causal", "layer_idx",
        "sliding_window", "softcap", "s_aux", "position_bias", "output_router_logits",
        "logits_to_keep", "cache", "past_key_values", "seq_idx", "labels",
    }
)  # fmt: skip


@dataclass(frozen=True)
class Schedule:
    """What each layer of a model skips."""

    config: Config = Config()
    dense_layers: frozenset[int] = frozenset()
    calibration: Optional[Calibration] = None

    def layer(self, index: int) -> Config:
        """The settings of a layer; knobs of ``configure`` win over the calibration's."""
        if index in self.dense_layers:
            return DENSE
        if self.calibration is None:
            return self.config
        return self.calibration.layer(index).override(**self.config.given())


_schedules: "weakref.WeakKeyDictionary[Any, Schedule]" = weakref.WeakKeyDictionary()


def register(
    name: str = NAME,
    *,
    config: Optional[Config] = None,
    dense_layers: Union[int, Iterable[int]] = 0,
    calibration: Union[str, "dict[str, Any]", Calibration, None] = None,
    **knobs: Any,
) -> None:
    """Registers the attention function and its mask function under ``name``.

    The other arguments are :func:`configure`'s, for models that use this name and have not been
    configured. Several names may be registered with different settings.
    """
    schedule = _schedule(config, dense_layers, calibration, knobs)
    AttentionInterface.register(name, functools.partial(_attention_forward, schedule))
    AttentionMaskInterface.register(name, sdpa_mask)


def configure(
    model: torch.nn.Module,
    *,
    config: Optional[Config] = None,
    dense_layers: Union[int, Iterable[int]] = 0,
    calibration: Union[str, "dict[str, Any]", Calibration, None] = None,
    **knobs: Any,
) -> None:
    """Sets what one model skips.

    * ``topk``, ``cdf``, ``theta``, ``pv_gap``, ``policy``, …: the fields of ``sparge.Config``, or a
      whole ``config``.
    * ``dense_layers``: the first so many layers, or the indices of layers, that stay dense.
    * ``calibration``: a calibration file's path or parsed JSON; its model must have as many layers
      and heads.
    """
    schedule = _schedule(config, dense_layers, calibration, knobs)
    modules = [m for m in model.modules() if getattr(m, "layer_idx", None) is not None]
    if not modules:
        raise SpargeError(
            f"{type(model).__name__} has no attention layer with a layer_idx; "
            "pass the settings to register() instead"
        )
    if schedule.calibration is not None:
        _check_shape(model, schedule.calibration)
    for module in modules:
        _schedules[module] = schedule


def _schedule(
    config: Optional[Config],
    dense_layers: Union[int, Iterable[int]],
    calibration: Union[str, "dict[str, Any]", Calibration, None],
    knobs: "dict[str, Any]",
) -> Schedule:
    layers = range(dense_layers) if isinstance(dense_layers, int) else dense_layers
    config = (config or Config()).override(**knobs)
    parsed(config.text())  # refuses bad settings here rather than in the middle of a forward pass
    loaded = None if calibration is None else load_calibration(calibration)
    return Schedule(config, frozenset(layers), loaded)


def _check_shape(model: torch.nn.Module, calibration: Calibration) -> None:
    config: Any = getattr(model, "config", None)
    config = config.get_text_config() if config is not None else None
    said = calibration.model
    for ours, theirs in (("num_layers", "num_hidden_layers"), ("num_qo_heads", "num_attention_heads")):
        got = getattr(config, theirs, None)
        if got is not None and said.get(ours) != got:
            raise SpargeError(
                f"the calibration of {said.get('id')!r} has {ours} {said.get(ours)}, this model "
                f"{got}; calibrate this model"
            )


def _attention_forward(
    default: Schedule,
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Optional[torch.Tensor],
    dropout: float = 0.0,
    scaling: Optional[float] = None,
    is_causal: Optional[bool] = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """The attention function; ``default`` is its name's. ``query`` ``[batch, heads, q_len, dim]``; the output has tokens
    before heads, as transformers wants it."""
    _refuse(kwargs, dropout)
    q_len, kv_len = query.shape[2], key.shape[2]
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    sinks, bias = kwargs.get("s_aux"), kwargs.get("position_bias")
    if q_len < AUTO_MIN_QUERIES and sinks is None:
        return sdpa_attention_forward(  # type: ignore[no-any-return]
            module, query, key, value, attention_mask, dropout, scaling, is_causal, **kwargs
        )
    if bias is not None:
        raise SpargeError("a position bias is not supported; use attn_implementation='sdpa'")
    schedule = _schedules.get(module, default)
    index = getattr(module, "layer_idx", None)
    config = schedule.config if index is None else schedule.layer(index)
    window = kwargs.get("sliding_window")
    if attention_mask is None:
        # transformers' mask function returns None where the mask is exactly the flag, aligned
        # top-left: keys past the queries are a static cache's empty places.
        if causal and q_len > 1 and kv_len > q_len:
            key, value = key[:, :, :q_len], value[:, :, :q_len]
        pattern: Optional[Pattern] = Pattern(causal=bool(causal and q_len > 1))
        if window is not None and key.shape[2] > window:
            raise SpargeError(
                f"sliding_window is {window} and there is no mask for {key.shape[2]} keys: the "
                "mask function registered for this attention is not sparge's; call "
                "sparge.transformers.register()"
            )
    elif torch.compiler.is_compiling():
        pattern = None
    else:
        pattern = pattern_of(attention_mask, q_len, kv_len, bool(causal))
    if pattern is None and query.is_cuda and sinks is None:
        return sdpa_attention_forward(  # type: ignore[no-any-return]
            module, query, key, value, attention_mask, dropout, scaling, is_causal, **kwargs
        )
    out, lse = _attend(query, key, value, attention_mask, pattern, scaling, config, sinks is not None)
    out = out.transpose(1, 2)
    if sinks is not None:
        # A sink adds exp(sink) to the softmax's denominator and nothing to its numerator.
        assert lse is not None
        share = torch.sigmoid(lse.transpose(1, 2) - sinks.float())
        out = out * share.unsqueeze(-1).to(out.dtype)
    return out.contiguous(), None


def _refuse(kwargs: "dict[str, Any]", dropout: float) -> None:
    """Nothing is ignored: what is not understood is an error."""
    if dropout:
        raise SpargeError(f"dropout is {dropout}: this is inference; call model.eval()")
    if kwargs.get("softcap") is not None:
        raise SpargeError(
            "softcap is not supported; use attn_implementation='eager' for this model"
        )
    if kwargs.get("output_attentions"):
        raise SpargeError("attention weights are never formed; set output_attentions=False")
    for name, value in kwargs.items():
        if value is None or name in _HARMLESS:
            continue
        if name.startswith(("cu_seq_lens", "max_length", "cu_seqlens")):
            raise SpargeError(
                f"{name}: packed sequences are not supported; pass a batch with attention_mask"
            )
        raise SpargeError(
            f"{name} is an attention argument that sparge does not know; "
            "use attn_implementation='sdpa' for this model"
        )


def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: Optional[torch.Tensor],
    pattern: Optional[Pattern],
    scale: Optional[float],
    config: Config,
    wants_lse: bool,
) -> tuple[torch.Tensor, Optional[torch.Tensor]]:
    """Output ``[batch, heads, q_len, dim]`` and, where wanted, the log-sum-exp."""

    def call(q: Any, k: Any, v: Any, **more: Any) -> tuple[torch.Tensor, Optional[torch.Tensor]]:
        result = attention(
            q, k, v, scale=scale, enable_gqa=True, config=config, return_lse=wants_lse, **more
        )
        return result if wants_lse else (result, None)

    if pattern is None:
        return call(query, key, value, attn_mask=mask)
    more: dict[str, Any] = {
        "is_causal": pattern.causal,
        "causal_alignment": "bottom_right",
        "window": None if pattern.window is None else (pattern.window - 1, None),
    }
    if pattern.keys is None:
        return call(query, key, value, **more)
    # Padded: each sequence alone, on views of its own keys. Rows that are padding are zero.
    batch, _, q_len, _ = query.shape
    ranges = pattern.keys * (batch if len(pattern.keys) == 1 else 1)
    pattern = replace(pattern, keys=ranges)
    out = query.new_zeros((*query.shape[:3], value.shape[3]))
    lse = query.new_full(query.shape[:3], -torch.inf, dtype=torch.float32) if wants_lse else None
    for at, (start, end) in enumerate(ranges):
        first, last = pattern.rows(at, q_len)
        rows, keys = slice(first, last), slice(start, end)
        one = slice(at, at + 1)
        part, part_lse = call(query[one, :, rows], key[one, :, keys], value[one, :, keys], **more)
        out[one, :, rows] = part
        if lse is not None and part_lse is not None:
            lse[one, :, rows] = part_lse
    return out, lse

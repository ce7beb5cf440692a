"""transformers models: ``sparge.transformers.register()``, then ``attn_implementation="sparge"``.

>>> import sparge.transformers
>>> sparge.transformers.register()
>>> model.set_attn_implementation("sparge")          # or from_pretrained(..., attn_implementation=)
>>> sparge.transformers.configure(model, topk=0.5, dense_layers=2)   # optional
>>> tuned = sparge.transformers.tune(model, samples, l1=0.05)        # optional: what each head may skip
>>> sparge.transformers.configure(model, calibration=tuned)

Prefill is sparse; decoding (fewer than 16 queries) is dense, through transformers' own SDPA. So is,
on a GPU and with one warning, prefill under a mask that is not causal, a window or padding (a prefix LM's,
packed texts'), or under any mask tensor while ``torch.compile`` traces, which cannot look at it. (On the
CPU such a mask is applied as it is, and blocks are chosen under it.) Compiled prefill selects as the
eager one where no mask is made: without an ``attention_mask``, and with the cache, for without one
transformers has to expect packed texts there.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
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
from ._traced import causal_mask, is_on_gpu, warn_dense
from ._tune import Progress, Study
from ._types import Stats

NAME = "sparge"
# What a model's attention is called while it is tuned.
_TUNING = "sparge_tuning"

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
_studies: "weakref.WeakKeyDictionary[Any, Study]" = weakref.WeakKeyDictionary()


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
    AttentionMaskInterface.register(name, causal_mask)


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
    * ``calibration``: a calibration (:func:`tune`), a file's path or its parsed JSON; its model must have as many layers
      and heads.
    """
    schedule = _schedule(config, dense_layers, calibration, knobs)
    modules = _layers(model)
    if not modules:
        raise SpargeError(
            f"{type(model).__name__} has no attention layer with a layer_idx; "
            "pass the settings to register() instead"
        )
    if schedule.calibration is not None:
        _check_shape(model, schedule.calibration)
    for module in modules:
        _schedules[module] = schedule


def tune(
    model: torch.nn.Module,
    samples: "Iterable[Union[torch.Tensor, Mapping[str, Any]]]",
    *,
    l1: float = 0.05,
    l2: Optional[float] = None,
    by: str = "error",
    name: Optional[str] = None,
    source: str = "samples of the caller",
    progress: Progress = False,
    config: Optional[Config] = None,
    **knobs: Any,
) -> Calibration:
    """Finds what every head may skip within an error bound, while the model reads samples densely.

    * ``samples``: token ids ``[tokens]`` or ``[batch, tokens]``, or dicts of the model's inputs, not
      padded; a few (the paper: five) as long as what will be read. They are read twice and must fit
      the device one by one; of attention only tables of errors are kept.
    * ``l1``, ``l2``, ``progress``, ``config`` and knobs: see :func:`sparge.tune`. ``min_kv_len``:
      calls with fewer keys run dense, default 1024, or the shortest sample.
    * ``by``: ``"error"``, the paper's rule: one bound for all layers. ``"effect"``: layers whose error
      moves the model's last hidden state more get a smaller bound, others a larger one (1/8 to 8 of
      the given, which is their geometric mean); the first sample is read once more for every layer.
    * ``name``, ``source``: what the file says of the model (default: its config's) and the samples.

    Returns the :class:`sparge.Calibration`, for ``configure(model, calibration=)`` and ``save(path)``.
    The model is as it was afterwards, also where it raises. Raises ``SpargeError`` for models and
    inputs that sparse attention does not serve, by name.
    """
    study = Study(l1, l2, by, config, knobs, progress)
    modules = _layers(model)
    if not modules:
        raise SpargeError(f"{type(model).__name__} has no attention layer with a layer_idx to tune")
    inputs = [_inputs(model, at, sample) for at, sample in enumerate(samples)]
    if not inputs:
        raise SpargeError("samples is empty, expected token ids of at least one text")
    # Without the head: all logits of a long sample are larger than everything else.
    body = getattr(model, "base_model", model)

    def read(first_alone: bool) -> Any:
        first = None
        for at, sample in enumerate(inputs[:1] if first_alone else inputs):
            out = body(**{"use_cache": False, **sample})
            first = out[0] if at == 0 else first
        return first

    with _studied(model, modules, study), torch.no_grad():
        study.run(read)
    said = _text_config(model)
    # Layers without attention count too: configure() looks at their number.
    count = getattr(said, "num_hidden_layers", None) or 1 + max(int(m.layer_idx) for m in modules)
    is_causal = all(getattr(m, "is_causal", True) for m in modules)
    name = name or getattr(said, "_name_or_path", None) or type(model).__name__
    return study.calibration(name, source, count, is_causal)


def _layers(model: torch.nn.Module) -> "list[Any]":
    return [m for m in model.modules() if getattr(m, "layer_idx", None) is not None]


def _inputs(model: Any, at: int, sample: Any) -> "dict[str, Any]":
    """A sample as the model's keyword arguments, on its device."""
    if isinstance(sample, Mapping):
        return {
            name: x.to(model.device) if isinstance(x, torch.Tensor) else x for name, x in sample.items()
        }
    ids = torch.as_tensor(sample)
    if ids.dtype.is_floating_point or ids.dtype == torch.bool or ids.ndim not in (1, 2):
        raise SpargeError(
            f"sample {at} is {ids.dtype} with {ids.ndim} dimensions, expected token ids [tokens] or "
            "[batch, tokens], or a dict of model inputs"
        )
    return {"input_ids": (ids if ids.ndim == 2 else ids[None]).to(model.device)}


@contextmanager
def _studied(model: Any, modules: "list[Any]", study: Study) -> "Iterator[None]":
    """The model with its attention announced to ``study``."""
    AttentionInterface.register(_TUNING, _tuning_forward)
    AttentionMaskInterface.register(_TUNING, sdpa_mask)
    parts = {"": model.config}
    for part in getattr(model.config, "sub_configs", {}):
        if getattr(model.config, part, None) is not None:
            parts[part] = getattr(model.config, part)
    before = {part: config._attn_implementation for part, config in parts.items()}
    try:
        model.set_attn_implementation(_TUNING)
        _studies.update(dict.fromkeys(modules, study))
        yield
    finally:
        for module in modules:
            _studies.pop(module, None)
        model.set_attn_implementation(before if len(before) > 1 else before[""])


def _tuning_forward(
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
    """Dense attention, and the study of it."""
    _refuse(kwargs, dropout)
    for what in ("s_aux", "position_bias"):
        if kwargs.get(what) is not None:
            raise SpargeError(f"{what} is not supported by tune(): use settings by hand for this model")
    out, _ = sdpa_attention_forward(
        module, query, key, value, attention_mask, dropout, scaling, is_causal, **kwargs
    )
    study = _studies.get(module)
    if study is None or query.shape[2] < AUTO_MIN_QUERIES:
        return out, None
    k, v, pattern = _pattern(module, query, key, value, attention_mask, is_causal, kwargs)
    if pattern is None or pattern.keys is not None:
        raise SpargeError(
            "the samples are padded or have a mask of their own, which tune() cannot study; give each "
            "sample by itself, without padding"
        )
    options = {"scale": scaling, "enable_gqa": True, **_said(pattern)}

    def attend(config: Config) -> tuple[torch.Tensor, Stats]:
        return attention(query, k, v, config=config, return_stats=True, **options)  # type: ignore[no-any-return]

    want = out.transpose(1, 2)
    used = study.call(int(module.layer_idx), query, k, attend, want)  # type: ignore[arg-type]
    return (out if used is want else used.transpose(1, 2).contiguous()), None


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


def _text_config(model: torch.nn.Module) -> Any:
    config: Any = getattr(model, "config", None)
    return None if config is None else config.get_text_config()


def _check_shape(model: torch.nn.Module, calibration: Calibration) -> None:
    config, said = _text_config(model), calibration.model
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
    q_len = query.shape[2]
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
    if q_len < AUTO_MIN_QUERIES:
        config = DENSE  # decoding, which sinks alone bring here
    key, value, pattern = _pattern(module, query, key, value, attention_mask, is_causal, kwargs)
    if pattern is None and sinks is None and is_on_gpu(query):
        if not (config.is_default() or config.policy == "dense"):
            warn_dense(torch.compiler.is_compiling())
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


def _pattern(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Optional[torch.Tensor],
    is_causal: Optional[bool],
    kwargs: "dict[str, Any]",
) -> tuple[torch.Tensor, torch.Tensor, Optional[Pattern]]:
    """What the queries see: the keys and values that count, and the pattern; None where it is none."""
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    window = kwargs.get("sliding_window")
    pattern: Optional[Pattern]
    q_len, kv_len = query.shape[2], key.shape[2]
    if attention_mask is None:
        # transformers' mask function returns None where the mask is exactly the flag, aligned
        # top-left: keys past the queries are a static cache's empty places.
        if causal and q_len > 1 and kv_len > q_len:
            key, value = key[:, :, :q_len], value[:, :, :q_len]
        pattern = Pattern(causal=bool(causal and q_len > 1))
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
    return key, value, pattern


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
    more = _said(pattern)
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


def _said(pattern: Pattern) -> "dict[str, Any]":
    """The pattern, less its keys, as `sparge.attention` is told it."""
    return {
        "is_causal": pattern.causal,
        "causal_alignment": "bottom_right",
        "window": None if pattern.window is None else (pattern.window - 1, None),
    }

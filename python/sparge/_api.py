"""The public calls: the arguments' framework decides who serves them."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Callable, Optional, Union

from ._config import Config, PerHead
from ._mask import BlockMask
from ._sparge import SpargeError
from ._types import Quantized

if TYPE_CHECKING:
    from ._calibration import Calibration

Window = Optional[tuple[Optional[int], Optional[int]]]


# `sparge._torch`, where torch is or comes: importing it imports torch. Before a compiled graph asks if it
# may be (torch 2.6 does not follow that), so where torch is there already, now.
_torch: Any = None


def _is_torch(array: Any) -> bool:
    if _torch is None:
        if sys.modules.get("torch") is None:
            return False
        _import_torch()
    return isinstance(array, _torch.Tensor)


def _import_torch() -> None:
    global _torch
    from . import _torch as module

    _torch = module


if sys.modules.get("torch") is not None:
    # A torch that is too old, or a stand-in, is no torch to numpy's users.
    with contextlib.suppress(ImportError, AttributeError):
        _import_torch()


def attention(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Optional[Any] = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: Optional[float] = None,
    enable_gqa: bool = False,
    *,
    topk: PerHead = None,
    cdf: PerHead = None,
    theta: PerHead = None,
    pv_gap: PerHead = None,
    policy: Optional[str] = None,
    layout: str = "HND",
    causal_alignment: str = "top_left",
    window: Window = None,
    key_lengths: Union[Any, Sequence[int], None] = None,
    keep_keys: Optional[tuple[tuple[int, int], ...]] = None,
    keep_queries: Optional[tuple[tuple[int, int], ...]] = None,
    return_lse: bool = False,
    return_stats: bool = False,
    config: Optional[Config] = None,
    calibration: Optional[Config] = None,
    fallback: Optional[str] = None,
) -> Any:
    """Sparse attention with the semantics of ``torch.nn.functional.scaled_dot_product_attention``.

    * ``query`` ``[batch, heads, q_len, dim]``, ``key`` ``[batch, kv_heads, kv_len, dim]``,
      ``value`` ``[batch, kv_heads, kv_len, dim_v]`` (``layout="NHD"``: tokens before heads; torch
      also without heads), float32, float16 or bfloat16, any strides. Torch tensors on the CPU or a
      CUDA GPU, numpy arrays, or DLPack arrays on the CPU; the result is of the same kind.
    * ``attn_mask``: bool (True takes part) or float (added), broadcastable as in SDPA.
    * ``is_causal``: aligned as ``causal_alignment`` says: ``"top_left"`` as SDPA,
      ``"bottom_right"`` for a key/value cache. The same where q_len = kv_len.
    * ``scale``: default 1/√dim. ``enable_gqa``: heads a multiple of kv_heads, nothing is repeated.
    * ``topk``, ``cdf``, ``theta``, ``pv_gap``, ``policy``: see :class:`Config`; they override
      ``config``, which overrides ``calibration`` (:meth:`Calibration.layer`).
    * ``window`` ``(left, right)``: keys before and after the diagonal, None for unbounded.
    * ``key_lengths`` ``[batch]``, integers: the first so many keys of each batch entry are valid. They
      are needed on the host: a GPU tensor is copied there, for which the host waits.
    * ``keep_keys``: token ranges ``((from, to), …)`` whose key blocks every query attends,
      whatever is predicted (text tokens of a diffusion transformer). ``keep_queries``: ranges whose
      query blocks attend every key block they can reach.

    Returns the output, or a tuple of it and what was asked for: ``return_lse`` the log-sum-exp
    ``[batch, heads, q_len]`` float32 (natural log), ``return_stats`` a :class:`Stats`.

    Left to its defaults it is exact for short sequences: on torch tensors that is SDPA itself, below
    2048 keys (on a GPU where rows see fewer than 7168 keys on average, 8192 at dimensions up to 64: a
    causal row sees half) and below 16 queries; on arrays below 1024 keys. Any knob that is set
    means what it says at any length.

    Raises ``SpargeError`` (a ``ValueError``) for what cannot be served: dropout, inputs that
    require gradients, other types or devices, masks that do not fit, settings out of range;
    ``TypeError`` for arguments of the wrong kind; ``NotImplementedError`` for what only the CPU does,
    or a machine without a GPU that has kernels, its driver or NVRTC. With ``fallback="dense"`` such a
    torch call runs as exact SDPA instead, with one warning per reason.
    """
    if (
        topk is None and cdf is None and theta is None and pv_gap is None and policy is None
        and window is None and key_lengths is None and keep_keys is None
        and keep_queries is None and calibration is None
        and (config is None or type(config) is Config and config.is_default())
        and (fallback is None or fallback == "dense")
        and not (return_lse or return_stats or dropout_p)
    ):  # fmt: skip
        # Short calls with the defaults, without the price of everything below.
        if _is_torch(query):
            out = _torch.plain_and_short(
                query, key, value, attn_mask, is_causal, scale, enable_gqa, layout, causal_alignment
            )
            if out is not None:
                return out
    if fallback not in (None, "dense"):
        raise ValueError(f"fallback is {fallback!r}, expected None or 'dense'")
    _check_said(config, causal_alignment)
    if calibration is not None:
        config = _merged(config, calibration)
    if _is_torch(query):
        return _torch.attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa,
            topk, cdf, theta, pv_gap, policy, layout, causal_alignment, window, key_lengths,
            keep_keys, keep_queries, None, return_lse, return_stats, config, fallback,
        )  # fmt: skip
    from . import _arrays

    return _arrays.attention(
        query,
        key,
        value,
        attn_mask,
        (config or Config()).override(
            topk=topk, cdf=cdf, theta=theta, pv_gap=pv_gap, policy=policy
        ),
        _arrays.Options(
            dropout_p=dropout_p,
            causal=causal_alignment if is_causal else None,
            scale=scale,
            enable_gqa=enable_gqa,
            layout=layout,
            window=window,
            key_lengths=key_lengths,
            keep_keys=keep_keys,
            keep_queries=keep_queries,
            return_lse=return_lse,
            return_stats=return_stats,
        ),
        None,
    )


def block_sparse_attention(
    query: Any,
    key: Any,
    value: Any,
    block_mask: Union[BlockMask, Any],
    attn_mask: Optional[Any] = None,
    is_causal: bool = False,
    scale: Optional[float] = None,
    enable_gqa: bool = False,
    *,
    pv_gap: PerHead = None,
    layout: str = "HND",
    causal_alignment: str = "top_left",
    window: Window = None,
    key_lengths: Union[Any, Sequence[int], None] = None,
    return_lse: bool = False,
    return_stats: bool = False,
) -> Any:
    """Attention over exactly the blocks of ``block_mask`` that the other masks allow.

    ``block_mask``: a :class:`BlockMask`, or a bool array ``[batch|1, heads|1, ceil(q_len / 128),
    ceil(kv_len / 64)]`` on the tensors' device. A row left without keys is zero, its log-sum-exp
    −inf. ``pv_gap`` defaults to 6, as everywhere; ``inf`` turns stage 2 off. The other arguments,
    the results and the errors are those of :func:`attention`.
    """
    _check_said(None, causal_alignment)
    mask = block_mask.tensor if isinstance(block_mask, BlockMask) else block_mask
    config = Config(topk=1.0, pv_gap=pv_gap)
    if _is_torch(query):
        return _torch.attention(
            query, key, value, attn_mask, 0.0, is_causal, scale, enable_gqa,
            None, None, None, None, None, layout, causal_alignment, window, key_lengths,
            None, None, mask, return_lse, return_stats, config, None,
        )  # fmt: skip
    from . import _arrays

    options = _arrays.Options(
        causal=causal_alignment if is_causal else None,
        scale=scale,
        enable_gqa=enable_gqa,
        layout=layout,
        window=window,
        key_lengths=key_lengths,
        return_lse=return_lse,
        return_stats=return_stats,
    )
    return _arrays.attention(query, key, value, attn_mask, config, options, mask)


def predict(
    query: Any,
    key: Any,
    attn_mask: Optional[Any] = None,
    is_causal: bool = False,
    scale: Optional[float] = None,
    *,
    topk: PerHead = None,
    cdf: PerHead = None,
    theta: PerHead = None,
    policy: Optional[str] = None,
    layout: str = "HND",
    causal_alignment: str = "top_left",
    window: Window = None,
    key_lengths: Union[Any, Sequence[int], None] = None,
    config: Optional[Config] = None,
    calibration: Optional[Config] = None,
) -> BlockMask:
    """Stage 1 alone: the blocks :func:`attention` would compute with the same arguments.

    It has no ``keep_keys`` and ``keep_queries``, whose blocks attention adds to these, and no
    ``enable_gqa``: heads are a multiple of kv_heads without being told.
    """
    _check_said(config, causal_alignment)
    causal = causal_alignment if is_causal else None
    if calibration is not None:
        config = _merged(config, calibration)
    knobs = {"topk": topk, "cdf": cdf, "theta": theta, "policy": policy}
    if _is_torch(query):
        return _torch.predict(
            query, key, config, knobs, layout, scale, causal, window, attn_mask, key_lengths
        )
    from . import _arrays

    options = _arrays.Options(
        causal=causal, scale=scale, layout=layout, window=window, key_lengths=key_lengths
    )
    return _arrays.predict(query, key, attn_mask, (config or Config()).override(**knobs), options)


def quantize(key: Any, *, layout: str = "HND") -> Quantized:
    """int8 keys as the CPU operator's ``qk="int8"`` uses them. See :class:`Quantized`.

    The same bits for a torch tensor on a GPU, there in plain torch operations: for inspection. The
    CUDA kernels read int8 keys of another form, less their mean over the whole sequence.
    """
    if layout not in ("HND", "NHD"):
        raise ValueError(f"layout is {layout!r}, expected 'HND' or 'NHD'")
    if _is_torch(key):
        return _torch.quantize(key, layout)
    from . import _arrays

    return _arrays.quantize(key, layout)


def tune(
    calls: "Mapping[int, Sequence[tuple[Any, Any, Any]]]",
    *,
    l1: float = 0.05,
    l2: Optional[float] = None,
    is_causal: bool = False,
    scale: Optional[float] = None,
    name: str = "recorded calls",
    progress: Union[bool, Callable[[str], None]] = False,
    config: Optional[Config] = None,
    **knobs: Any,
) -> "Calibration":
    """Finds what every head may skip within an error bound, on recorded calls of every layer.

    * ``calls``: for each layer, from 0 on without a gap, its calls ``(query, key, value)``: torch
      tensors ``[batch, heads, tokens, dim]``, key and value with ``kv_heads``, on the CPU or a GPU. A
      batch entry of a call is a sample.
    * ``l1``: the paper's l₁, in (0, 1): the relative L1 error Σ|O − O′|/Σ|O| of stage 1 that a head
      may have on any sample, exact attention in the tensors' own precision being O. Per head the
      smallest τ (``cdf``) within it is taken, of 23 values from 0.2 to 0.9999; a head that cannot skip
      3% of its blocks is dense. The paper has 0.05 to 0.08.
    * ``l2``: l₂, the same with both stages, at least ``l1``; default 1.2 · ``l1``. The smallest λ
      (``pv_gap``) of 1 to 8 within it is taken; none where stage 2 changes nothing (the fast path of
      H100 and H200 has none).
    * ``is_causal``: the last query is at the last key. ``scale``: default 1/√dim.
    * ``name``: the model's, for the file.
    * ``progress``: True for a line on stderr, or a function that is told it.
    * ``config`` and knobs: what is kept fixed: ``pooling``, ``keep_first``, ``keep_local``, ``theta``
      (the judge θ, default 0), ``min_kv_len`` (default 0: calls run as they were recorded), and ``qk``
      and ``isa``, which the file does not hold: give them again where it is used.

    Returns the :class:`Calibration`: ``save(path)`` writes the file, ``layer(i)`` is the ``config`` of a
    layer. Each head's error and sparsity in it were measured with its final setting on these calls.
    For models: ``sparge.transformers.tune``, ``sparge.diffusers.tune``. Raises ``SpargeError`` for what
    does not fit.
    """
    try:
        from . import _recorded
    except ModuleNotFoundError as error:
        raise SpargeError(
            "sparge.tune works on torch tensors, and torch is not installed; the command `sparge tune` "
            "reads recorded tensors from files without it"
        ) from error

    return _recorded.tune(calls, l1, l2, is_causal, scale, name, progress, config, knobs)


def _check_said(config: Any, causal_alignment: str) -> None:
    """Whatever the length, the framework and the device."""
    if config is not None and not isinstance(config, Config):
        raise TypeError(f"config is {type(config).__name__}, expected a sparge.Config")
    if causal_alignment not in ("top_left", "bottom_right"):
        raise SpargeError(
            f"causal_alignment is {causal_alignment!r}, expected 'top_left' or 'bottom_right'"
        )


def _merged(config: Optional[Config], calibration: Any) -> Config:
    """The calibrated knobs, with those that ``config`` sets over them."""
    if not isinstance(calibration, Config):
        raise TypeError(
            f"calibration is {type(calibration).__name__}; pass one layer's: "
            "sparge.load_calibration(path).layer(i)"
        )
    if config is None:
        return calibration
    return calibration.override(**config.given())
